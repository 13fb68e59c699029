"""docs/metrics.md lists every metric key that the source logs, and nothing else.

To add a key: log it under a literal name or an f-string that starts with its phase (`f"train/{name}"`), and give it a
line in docs/metrics.md. A score of `RolloutScores` gets one line in the table of scores, for all its phases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest

from helpers.metrics_page import METRICS_PAGE, Page, read_page
from helpers.paths import ROOT
from sdsearch_lightning.scoring.scores import RolloutScores

PHASES = ("train", "val", "test", "rollout", "search", "distill", "teacher", "credit", "health")
KEY = re.compile(rf"({'|'.join(PHASES)})(/(<source>|[a-z][a-z0-9_]*))+")


@dataclass
class Source:
    """What the source says of metric keys."""

    keys: set[str] = field(default_factory=set)
    """Literal keys."""
    patterns: dict[str, set[str]] = field(default_factory=dict)
    """f-strings that start with a phase, as regular expressions, with the words of their files to fill them."""
    words: set[str] = field(default_factory=set)
    """All other string constants."""

    def makes(self, key: str) -> bool:
        """Whether `key` is a literal or an f-string filled with words of its file."""
        return key in self.keys or any(
            set(match.groups()) <= words
            for pattern, words in self.patterns.items()
            if (match := re.fullmatch(pattern, key))
        )


def scan(texts: Iterable[str]) -> Source:
    """Keys in Python source; docstrings are no keys."""
    source = Source()
    for text in texts:
        tree = ast.parse(text)
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        constants = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        }
        source.keys |= {value for value in constants if KEY.fullmatch(value)}
        source.words |= constants
        for node in ast.walk(tree):
            if pattern := _pattern(node):
                source.patterns.setdefault(pattern, set()).update(constants)
    return source


def _pattern(node: ast.AST) -> str | None:
    if not isinstance(node, ast.JoinedStr) or not isinstance(node.values[0], ast.Constant):
        return None
    if not str(node.values[0].value).startswith(tuple(f"{phase}/" for phase in PHASES)):
        return None
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "([a-z0-9_]+)" for part in node.values)


def python_files(*, with_readers: bool) -> list[str]:
    """The library's source; the report reads keys and logs none."""
    files = [
        path for room in ("sdsearch_lightning", "callbacks", "datamodules") for path in (ROOT / room).rglob("*.py")
    ]
    return [path.read_text() for path in files if with_readers or "report" not in path.parts]


def unlisted(source: Source, page: Page) -> set[str]:
    """What the source has and the page has not."""
    listed = page.keys | {family + score for family in page.families for score in page.scores}
    dead_patterns = {p for p in source.patterns if not any(re.fullmatch(p, key) for key in listed)}
    return (source.keys - listed) | dead_patterns


def unlogged(source: Source, page: Page) -> set[str]:
    """What the page lists and the source cannot make."""
    return {key for key in page.keys if not source.makes(key)} | {f for f in page.families if not _is_made(f, source)}


def _is_made(family: str, source: Source) -> bool:
    # Where the phase is a variable too, the parts meet at run time: each has to be a word of the source.
    parts = [part for part in family.split("/") if part not in ("", "<source>")]
    return f"{re.escape(family)}([a-z0-9_]+)" in source.patterns or source.words.issuperset(parts)


@pytest.fixture(scope="module")
def page() -> Page:
    return read_page(METRICS_PAGE.read_text())


def test_every_key_of_the_source_is_listed(page: Page) -> None:
    assert unlisted(scan(python_files(with_readers=True)), page) == set(), "give it a line in docs/metrics.md"


def test_every_listed_key_is_logged(page: Page) -> None:
    assert unlogged(scan(python_files(with_readers=False)), page) == set(), "nothing logs it: delete its line"


def test_the_scores_are_those_of_rollout_scores(page: Page) -> None:
    scores = RolloutScores()
    scores.update([])
    assert page.scores == set(scores.compute())


LOGS = """
def step(self):
    "The key `train/prose` in a docstring is no key."
    self.log("train/loss", 1)
    self.log_dict({f"distill/{name}": 0 for name in ("jsd", "weight")})
    self.count("val", prefix="sampled_")
"""
LISTS = "| key |\n|---|\n| `train/loss` | x |\n| `distill/jsd` | x |\n| `val/sampled_<score>` | x |\n| `f1` | x |\n"


def test_a_matching_pair_passes() -> None:
    source, page = scan([LOGS]), read_page(LISTS)
    assert (unlisted(source, page), unlogged(source, page)) == (set(), set())


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda logs: logs.replace("train/loss", "train/lost"), "train/lost"),
        (lambda logs: logs + "\nKEY = 'val/sampled_em'\n", "val/sampled_em"),
        (lambda logs: logs + "\nKEY = f'health/{x}'\n", "health/([a-z0-9_]+)"),
    ],
)
def test_an_unlisted_key_is_found(change: Callable[[str], str], fault: str) -> None:
    assert unlisted(scan([change(LOGS)]), read_page(LISTS)) == {fault}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("| `train/gone` | x |", "train/gone"),
        ("| `distill/gone` | x |", "distill/gone"),  # matches the f-string, but no word fills it
        ("| `test/<source>/<score>` | x |", "test/<source>/"),
    ],
)
def test_a_line_that_nothing_logs_is_found(line: str, fault: str) -> None:
    assert unlogged(scan([LOGS]), read_page(LISTS + line + "\n")) == {fault}
