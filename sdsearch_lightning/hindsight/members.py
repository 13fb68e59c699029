"""The paper's block with some of its entries: whose queries does a teacher need?"""

from __future__ import annotations

from abc import abstractmethod

from sdsearch_lightning.hindsight.base import GroupBlocks
from sdsearch_lightning.hindsight.queries_and_labels import QueriesAndLabels
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, SiblingRecord, TeacherView


class CorrectOnly(QueriesAndLabels):
    """Queries of CORRECT rollouts only (paper: -0.7 points); a group without one is not taught."""

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """The CORRECT ones."""
        return tuple(record for record in records if record.label is Label.CORRECT)


class _EntriesPerRollout(GroupBlocks):
    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One view per rollout that has anything to read; `entries` are those of the whole group."""
        written = [(own.rollout_index, writer.siblings(self.entries(own, records))[1]) for own in records]
        views = tuple(TeacherView(index, None, text) for index, text in written if text)
        return HindsightBlock(group.instance_id, records, "", views=views) if views else None

    @abstractmethod
    def entries(self, own: SiblingRecord, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """What the teacher of one rollout reads."""


class OwnRollout(_EntriesPerRollout):
    """Each rollout reads its own queries and outcome, and no sibling's (paper, "no group": -1.0 points)."""

    def entries(self, own: SiblingRecord, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """Its own."""
        return (own,)


class LeaveOneOut(_EntriesPerRollout):
    """Each rollout reads all siblings but itself, so that it cannot copy its own query (paper: -0.5 points)."""

    def entries(self, own: SiblingRecord, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """All but its own."""
        return tuple(record for record in records if record.rollout_index != own.rollout_index)
