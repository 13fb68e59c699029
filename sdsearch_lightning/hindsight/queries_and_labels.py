"""The paper's block."""

from __future__ import annotations

from sdsearch_lightning.hindsight.base import GroupBlocks
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, SiblingRecord


class QueriesAndLabels(GroupBlocks):
    """All siblings' queries with CORRECT / INCORRECT; every rollout of the group reads the same."""

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One text, which every rollout of the group reads."""
        kept, text = writer.siblings(self.entries(group, records))
        return HindsightBlock(group.instance_id, kept, text) if kept else None

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """The records that the block tells; ablations leave out or change some."""
        return records
