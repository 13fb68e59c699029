"""What the reports show of trajectories.jsonl: one held-out question before and after, and two taught groups.

The choice is a rule, told to the reader, and the same on every call. Text from rollouts is made printable here, so that
a passage cannot drive a terminal; escaping for HTML is the page's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdsearch_lightning.report.trajectories import Record, read_trajectories
from sdsearch_lightning.scoring.rewards import exact_match

LABELS = {"REASONING": "think", "QUERY": "search", "OBSERVATION": "read", "REFINE": "refine", "ANSWER": "answer"}
"""Shown span kinds. The prompt stands above the rollouts; SCAFFOLD is the tags, which the labels replace."""
_OUTER_TAG = re.compile(r"^<([^<>\s]+)>(.*)</\1>$")
_GroupKey = tuple[int, tuple[int, ...]]


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
    taught: tuple[tuple[Record, ...], ...] = ()
    """The G rollouts of a group that the teacher read: one early, one late."""


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


def choose_example(path: Path, *, with_taught: bool = True) -> Example:
    """What to show of a trajectories.jsonl; empty where it holds no such rollouts.

    The question is the first one, in order of evaluation, that greedy decoding answers wrongly at the first validation
    and rightly, with two searches or more, at the last; failing that with any number of searches; failing that the
    first one that both hold. A taught group has the teacher's verdict, or credit per query; mixed ones come first.
    """
    if not path.is_file():
        return Example()
    greedy: dict[int, dict[tuple[int, ...], tuple[bool, int]]] = defaultdict(dict)
    outcomes: dict[_GroupKey, set[Any]] = defaultdict(set)
    for record in read_trajectories(path):
        instance = tuple(record["instance_id"])
        if record["phase"] == "val":
            greedy[record["step"]][instance] = (is_correct(record), len(record["queries"]))
        elif (
            with_taught and record["phase"] == "train" and (record["credit"] is not None or record.get("query_credit"))
        ):
            outcomes[record["step"], instance] |= {record["label"]} - {None}
    first, last = min(greedy, default=0), max(greedy, default=0)
    question, choice = _question(greedy[first], greedy[last])
    groups = _taught_groups(outcomes)
    wanted = [record for record in read_trajectories(path) if _is_wanted(record, first, last, question, groups)]
    return Example(
        before=_at(wanted, first) if first < last else (),
        after=_at(wanted, last),
        choice=choice,
        taught=tuple(_group(wanted, group) for group in groups),
    )


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


def _taught_groups(outcomes: dict[_GroupKey, set[Any]]) -> list[_GroupKey]:
    mixed = sorted(group for group, labels in outcomes.items() if len(labels) > 1)
    candidates = mixed or sorted(outcomes)
    return sorted({candidates[0], candidates[-1]}) if candidates else []


def _is_wanted(
    record: Record, first: int, last: int, question: tuple[int, ...] | None, groups: Collection[_GroupKey]
) -> bool:
    instance = tuple(record["instance_id"])
    if record["phase"] == "train":
        return (record["step"], instance) in groups
    return record["phase"] in ("val", "val_sampled") and instance == question and record["step"] in (first, last)


def _at(wanted: Iterable[Record], step: int) -> tuple[Record, ...]:
    """The greedy rollout of a validation and the first sampled one."""
    found = [record for record in wanted if record["phase"] != "train" and record["step"] == step]
    found.sort(key=lambda record: record["rollout_index"], reverse=True)
    return tuple(record for _, record in sorted({record["phase"]: record for record in found}.items()))


def _group(wanted: Iterable[Record], group: _GroupKey) -> tuple[Record, ...]:
    found = [r for r in wanted if r["phase"] == "train" and (r["step"], tuple(r["instance_id"])) == group]
    return tuple(sorted(found, key=lambda record: record["rollout_index"]))
