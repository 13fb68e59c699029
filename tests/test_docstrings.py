"""Docstrings stand without the name above them, their examples run, and `Next:` leads along one path."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("sdsearch_lightning", "callbacks", "datamodules") for path in (ROOT / folder).rglob("*.py")
)
STATIONS = (
    "datamodules/questions.py",
    "callbacks/rollout_grouping.py",
    "sdsearch_lightning/rollout/window.py",
    "callbacks/hindsight_construction.py",
    "sdsearch_lightning/step/collate.py",
    "sdsearch_lightning/module.py",
    "sdsearch_lightning/losses/terms.py",
)
"""The path of one question, as the README has it."""
MIN_WORDS = 4


def by_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


def short_docstrings(text: str) -> Iterator[str]:
    """Definitions whose docstring says less than a sentence does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            words = (ast.get_docstring(node) or "").split()
            if 0 < len(words) < MIN_WORDS:
                yield f"{node.name}: {' '.join(words)}"


@pytest.mark.parametrize("path", FILES, ids=by_path)
def test_a_docstring_says_something(path: Path) -> None:
    assert list(short_docstrings(path.read_text())) == []


def test_next_leads_along_the_path_of_one_question() -> None:
    pointing = {by_path(path) for path in FILES if re.search(r"^Next: ", path.read_text(), re.MULTILINE)}
    assert pointing == set(STATIONS[:-1])
    for here, there in zip(STATIONS, STATIONS[1:], strict=False):
        pointer = re.search(r"^Next: (.*?)\"\"\"", (ROOT / here).read_text(), re.MULTILINE | re.DOTALL)
        assert pointer and there.removeprefix("sdsearch_lightning/") in pointer[1], f"{here} should lead to {there}"


def run_examples(name: str, text: str | None = None) -> doctest.TestResults:
    """All examples of a module, in one namespace and in the order of the file: one may go on from another."""
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    examples = {**vars(module), "replace": replace}
    runner = doctest.DocTestRunner(verbose=False)
    for test in sorted(found, key=lambda test: test.lineno or 0):
        test.globs = examples
        if text is not None:
            test.examples[0].want = text
        runner.run(test, clear_globs=False)
    return runner.summarize(verbose=False)


EXAMPLES = sorted(
    f"sdsearch_lightning.{'.'.join(path.relative_to(ROOT).with_suffix('').parts).removeprefix('sdsearch_lightning.')}"
    for path in FILES
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    assert run_examples(name).failed == 0


def test_these_tests_can_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(short_docstrings('def f():\n    """S."""\ndef g():\n    """The number of rows."""')) == ["f: S."]
    assert {"sdsearch_lightning.types", "sdsearch_lightning.losses.terms"} <= set(EXAMPLES)
    assert run_examples("sdsearch_lightning.pluggable", "(False, '')\n").failed > 0
    capsys.readouterr()
