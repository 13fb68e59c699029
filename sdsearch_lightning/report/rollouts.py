"""The rollouts of a run that a report shows: two passes over trajectories.jsonl, and no more of it in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdsearch_lightning.report.example import Example, QuestionChoice
from sdsearch_lightning.report.sampling import GroupKey, LeftOut, Survey, key_of
from sdsearch_lightning.report.trajectories import Record, read_trajectories
from sdsearch_lightning.report.views import View, group_head, outcome, rollout_view


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What a report shows of trajectories.jsonl."""

    example: Example = Example()
    groups: Sequence[View] = ()
    """In order of phase, step and instance; `rollouts` of a group by index, greedy ones first."""
    left_out: Sequence[LeftOut] = ()


def read_rollouts(path: Path, budget: int) -> Rollouts:
    """The example and as many groups as fit, by the rule of sampling.py; empty where there is no such file.

    Args:
        path: trajectories.jsonl of a run.
        budget: bytes that the groups may take as JSON.

    Raises:
        DataError: as `read_trajectories`.
    """
    if not path.is_file():
        return Rollouts()
    choice, survey = QuestionChoice(), Survey()
    for record in read_trajectories(path):
        choice.add(record)
        survey.add(record)
    chosen = survey.choose(budget)
    views: dict[GroupKey, View] = {}
    example = choice.example(_collecting(read_trajectories(path), dict.fromkeys(chosen), views))
    groups = [_finished(views[key]) for key in chosen]
    return Rollouts(example, groups, survey.left_out(chosen))


def _collecting(
    records: Iterator[Record], chosen: dict[GroupKey, None], views: dict[GroupKey, View]
) -> Iterator[Record]:
    """`records` as they are; on the way, those of `chosen` groups are added to `views`."""
    for record in records:
        if (key := key_of(record)) in chosen:
            views.setdefault(key, group_head(record))["rollouts"].append(rollout_view(record))
        yield record


def _finished(group: View) -> View:
    rollouts = sorted(group["rollouts"], key=lambda view: (view.get("decoding", ""), view["index"]))
    blocks = {view["block"] for view in rollouts if "block" in view}
    if len(blocks) == 1:  # every teacher of the group read the same: once is enough
        group["block"] = blocks.pop()
        for view in rollouts:
            view.pop("block", None)
    return group | {"rollouts": rollouts, "outcome": outcome([view["right"] for view in rollouts])}
