"""The paper's block with an outcome for each query instead of one for each rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.hindsight.base import GroupBlocks, is_query, judged
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, SiblingRecord, Trajectory

Judge = Callable[[Trajectory], Sequence[float] | None]
"""One number per executed query, above 0 where it found something; None where a rollout has none."""


class QueryLabels(GroupBlocks):
    """All siblings' queries, each CORRECT or INCORRECT by itself: whether it found something. Not in the paper.

    A rollout that the judge knows nothing of has its own outcome at each of its queries. Which groups are taught is the
    rule's by the outcomes of rollouts, as ever.

    Args:
        judge: from a trajectory to one number per executed query, above 0 where it found something; a dotted name.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One text, which every rollout of the group reads."""
        told = [(r, self._labels(t, writer)) for r, t in zip(records, judged(group), strict=True)]
        kept, text = writer.fit(told, lambda some: writer.templates.write_judged_queries(writer.codec, some))
        return HindsightBlock(group.instance_id, tuple(record for record, _ in kept), text) if kept else None

    def _labels(self, trajectory: Trajectory, writer: BlockWriter) -> list[Label | None]:
        """Of the queries that a block may tell."""
        found = self.judge(trajectory)
        if found is not None and len(found) != len(trajectory.queries):
            raise ConfigError(
                f"hindsight.block.judge: expected one number for each of {len(trajectory.queries)} executed queries of "
                f"rollout {trajectory.rollout_index} of {trajectory.instance_id}, found {len(found)}. "
                "Return None where it has none."
            )
        labels = [trajectory.label] * len(trajectory.queries) if found is None else [_label(value) for value in found]
        return [y for y, query in zip(labels, trajectory.queries, strict=True) if is_query(query, writer.codec)]


def _label(value: float) -> Label | None:
    return Label.CORRECT if value > 0 else Label.INCORRECT
