"""docs/troubleshooting.md: each error class and each health alarm has its row, in the words of the code."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from sdsearch_lightning import errors
from sdsearch_lightning.callbacks.health_defaults import RULES
from sdsearch_lightning.errors import ConfigError, SDSearchError

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
]
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, SDSearchError) and value.__module__ == errors.__name__
}


def row_of(name: str) -> list[str]:
    (row,) = [row for row in ROWS if row[0] == f"`{name}`"]
    return row


@pytest.mark.parametrize("name", RULES)
def test_a_health_alarm_has_its_cure(name: str) -> None:
    rule = RULES[name]
    assert row_of(name)[1:] == [f"`{rule.metric}`", rule.meaning, rule.advice]


def test_there_is_no_alarm_of_the_page_alone() -> None:
    alarms = PAGE.partition("## Health alarms")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", alarms, re.MULTILINE)) == set(RULES)


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_has_its_cure(name: str) -> None:
    code, about, cure = row_of(name)[1:]
    assert code == ("2" if issubclass(CLASSES[name], ConfigError) else "1"), "as cli/commands.py has it"
    assert len(about.split()) > 2 and len(cure.split()) > 2


def test_messages_are_those_of_the_code() -> None:
    start = PAGE.partition("### At the start")[2].partition("### In a run")[0]
    phrases = re.findall(r"`([^`]+)`", "".join(re.findall(r"^(\|.*?\|)", start, re.MULTILINE)))
    source = "".join(path.read_text() for path in (ROOT / "sdsearch_lightning").rglob("*.py"))
    assert len(phrases) > 9
    assert [phrase for phrase in phrases if phrase not in source] == []
