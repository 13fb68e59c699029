"""One held-out question before and after, and how a rollout's text is made fit to be shown.

The choice is a rule, told to the reader, and the same on every call. Text from rollouts is made printable here, so that
a passage cannot drive a terminal; escaping for HTML is the page's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdsearch_lightning.report.trajectories import Record, read_trajectories
from sdsearch_lightning.scoring.rewards import exact_match

LABELS = {"REASONING": "think", "QUERY": "search", "OBSERVATION": "read", "REFINE": "refine", "ANSWER": "answer"}
"""Shown span kinds. The prompt stands above the rollouts; SCAFFOLD is the tags, which the labels replace."""
_OUTER_TAG = re.compile(r"^<([^<>\s]+)>(.*)</\1>$")


@dataclass(frozen=True, slots=True)
class Row:
    """One span of a rollout, as reports show it."""

    label: str
    kind: str
    text: str
    span: int
    """Index into the record's spans."""


@dataclass(frozen=True, slots=True)
class Example:
    """Records to show. `before` and `after`: one question at the first and at the last validation, greedy first."""

    before: tuple[Record, ...] = ()
    after: tuple[Record, ...] = ()
    choice: str = ""
    """Why this question."""


def is_correct(record: Record) -> bool:
    """Whether the answer is an exact match."""
    asked = record["question"]
    return exact_match(record["answer"], asked["answers"], asked.get("normalization", "english")) == 1.0


def harmless(text: str) -> str:
    """`text` with a space for each control character; none of them reaches a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable(text: str) -> str:
    """`text` on one line, without control characters."""
    return " ".join(harmless(text).split())


def rows(record: Record) -> list[Row]:
    """The spans of a rollout that are shown, in order; an observation loses its outer tag."""
    shown = []
    for index, span in enumerate(record["spans"]):
        text = printable(span["text"])
        if span["kind"] == "OBSERVATION" and (inside := _OUTER_TAG.match(text)):
            text = inside[2].strip()
        if span["kind"] in LABELS and text:
            shown.append(Row(LABELS[span["kind"]], span["kind"], text, index))
    return shown


class QuestionChoice:
    """Chooses the question that reports show, from one pass over the rollouts.

    It is the first one, in order of evaluation, that greedy decoding answers wrongly at the first validation and
    rightly, with two searches or more, at the last; failing that with any number of searches; failing that the first
    one that both hold.
    """

    def __init__(self) -> None:
        self._greedy: dict[int, dict[tuple[int, ...], tuple[bool, int]]] = defaultdict(dict)

    def add(self, record: Record) -> None:
        """Takes note of a rollout."""
        if record["phase"] == "val":
            instance = tuple(record["instance_id"])
            self._greedy[record["step"]][instance] = (is_correct(record), len(record["queries"]))

    def example(self, records: Iterable[Record]) -> Example:
        """The chosen question's rollouts.

        Args:
            records: a second pass over the same rollouts, or those of validations.
        """
        first, last = min(self._greedy, default=0), max(self._greedy, default=0)
        question, choice = _question(self._greedy[first], self._greedy[last])
        wanted = [record for record in records if is_of(record, question) and record["step"] in (first, last)]
        return Example(_at(wanted, first) if first < last else (), _at(wanted, last), choice)


def is_of(record: Record, question: tuple[int, ...] | None) -> bool:
    """Whether a rollout answers `question` in a validation."""
    return record["phase"] in ("val", "val_sampled") and tuple(record["instance_id"]) == question


def choose_example(path: Path) -> Example:
    """What to show of a trajectories.jsonl, by `QuestionChoice`; empty where it holds no validation."""
    if not path.is_file():
        return Example()
    choice = QuestionChoice()
    for record in read_trajectories(path):
        choice.add(record)
    return choice.example(read_trajectories(path))


def _question(
    before: dict[tuple[int, ...], tuple[bool, int]], after: dict[tuple[int, ...], tuple[bool, int]]
) -> tuple[tuple[int, ...] | None, str]:
    common = sorted(before.keys() & after.keys())
    learnt = [instance for instance in common if after[instance][0] and not before[instance][0]]
    searched = [instance for instance in learnt if after[instance][1] >= 2]
    if searched:
        return searched[0], "the first that turned from wrong to right with two searches or more"
    if learnt:
        return learnt[0], "the first that turned from wrong to right"
    return next(iter(common), None), "the first one: none turned from wrong to right"


def _at(wanted: Iterable[Record], step: int) -> tuple[Record, ...]:
    """The greedy rollout of a validation and the first sampled one."""
    found = [record for record in wanted if record["step"] == step]
    found.sort(key=lambda record: record["rollout_index"], reverse=True)
    return tuple(record for _, record in sorted({record["phase"]: record for record in found}.items()))
