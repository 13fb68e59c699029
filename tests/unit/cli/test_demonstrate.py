"""`sdsearch demonstrate` as a user meets it: a script in a file, a corpus, and a file that `supervise` can read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.corpora import write_four_texts
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.cli.demonstrate import load_script
from sdsearch_lightning.datamodules.demonstrations import read_demonstrations
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Label, SpanKind

SCRIPT = """\
from sdsearch_lightning.datamodules.scripts import Answer, Search
from words import WORDS

def script(task):
    found = yield Search(task.rng.choice(WORDS) + " " + task.question.text, thought="look")
    yield Answer(found[0].id + task.rng.choice(["", " perhaps"]), thought="found")

def broken(task):
    yield 3
"""
QUESTIONS = {"capital of France": "paris", "capital of Italy": "rome", "play by Shakespeare": "Hamlet"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_four_texts(tmp_path)
    (tmp_path / "mine.py").write_text(SCRIPT)
    (tmp_path / "words.py").write_text('WORDS = ["drink", "the", "leaves"]\n')
    rows = ({"asked": text, "gold": answer} for text, answer in QUESTIONS.items())
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "keys.yaml").write_text(
        "data:\n  columns: {question: asked, answers: gold}\n"
        "  retriever: {class_path: BM25Retriever, init_args: {corpus: corpus.jsonl, index_path: index}}\n"
        "rollout: {top_k: 2, label: ExactMatchLabelRule}\n"
    )
    return tmp_path


def demonstrate(*options: Any, script: str = "mine.py", output: str = "made.jsonl") -> int:
    own = ["--script", script, "--questions", "questions.jsonl", "--output", output, "--config", "keys.yaml"]
    return main(["demonstrate", *own, *map(str, options)])


def test_a_script_becomes_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demonstrate("--block_share", 1, "--num_siblings", 2, 3) == 0
    table = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[:4])
    shown = read_demonstrations(folder / "made.jsonl")
    assert (folder / "index").is_dir(), "the index was built"
    right = [one for one in shown if str(one.turns[-1][1]).lower() == one.question.answers[0].lower()]
    assert 0 < len(right) < 3
    siblings = [sibling for one in shown for sibling in one.siblings]
    correct = [sibling for sibling in siblings if sibling.label is Label.CORRECT]
    assert 0 < len(correct) < len(siblings), "by exact match; any overlap of words would do for the default rule"
    assert table == {
        "demonstrations": "3",
        "searches per demonstration": "1.00",
        "right answers (exact match)": f"{len(right) / 3:.1%}",
        "CORRECT siblings": f"{len(correct) / len(siblings):.1%}",
    }
    assert [one.question.text for one in shown] == list(QUESTIONS)
    for one in shown:
        assert [kind for kind, _ in one.turns][1:3] == [SpanKind.QUERY, SpanKind.OBSERVATION]
        assert 1 <= len(one.turns[2][1]) <= 2
    whole = (folder / "made.jsonl").read_text()
    assert demonstrate("--block_share", 1, "--num_siblings", 2, 3, "--limit", 2, output="two.jsonl") == 0
    assert (folder / "two.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"script": "mine.py:broken"}, "the script, questions.jsonl line 1 (question '1'): expected it to yield"),
        ({"output": "made.csv"}, "output: expected a file that ends in .jsonl or .jsonl.gz, found 'made.csv'."),
        ({"output": "questions.jsonl"}, "output: expected another file than the questions', found questions.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str], told: str
) -> None:
    assert demonstrate(**options) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {told}")
    assert not (folder / "made.jsonl").exists()


def test_without_a_retriever_there_is_nothing_to_search(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "keys.yaml").write_text("data: {columns: {question: asked, answers: gold}}\n")
    assert demonstrate() == 2
    assert capsys.readouterr().err.startswith("error: data.retriever is empty: ")


def test_options_that_are_missing_or_no_numbers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        ([], "--script, --questions, --output"),
        (["--limit", "x"], "argument --limit: invalid int value"),
    ):
        assert main(["demonstrate", *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line


# Which function is meant


def test_a_script_is_found_in_a_file_or_a_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_script("mine.py").__name__ == "script" and load_script("mine.py:broken").__name__ == "broken"
    monkeypatch.syspath_prepend(folder)
    assert load_script("mine:broken").__module__ == "mine" and load_script("mine").__name__ == "script"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("other.py", "script: other.py cannot be imported: FileNotFoundError: there is no file other.py."),
        ("no.such.module", "script: no.such.module cannot be imported: ModuleNotFoundError: No module named 'no'."),
        ("wrong.py", "script: wrong.py cannot be imported: SyntaxError: "),
        (
            "mine.py:scirpt",
            "script: expected a function 'scirpt' in mine.py, found script, broken. Name it: --script mine.py:NAME.",
        ),
        ("words.py", "script: expected a function 'script' in words.py, found none."),
    ],
)
def test_a_script_that_is_not_there_is_told(folder: Path, name: str, told: str) -> None:
    (folder / "wrong.py").write_text("def script(task)\n")
    with pytest.raises(ConfigError) as error:
        load_script(name)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)
