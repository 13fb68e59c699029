"""Two blocks instead of one: what speaks for a query is what the right siblings say beyond the wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdsearch_lightning.hindsight.base import GroupBlocks
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, SiblingRecord, TeacherView


class ContrastedSiblings(GroupBlocks):
    """Each rollout reads the CORRECT siblings' queries, and apart from them the INCORRECT ones'; never its own.

    After RLCSD (arXiv:2606.11709, eq. 7): what both texts do to a token alike, as any block does by its form, cancels.
    Ours: queries with outcomes for solutions, one text of all wrong siblings for several hints, and what stands where a
    side has no sibling that searched: the other side's queries without outcomes, so that the outcome is left of the
    contrast. A rollout without a sibling that searched is not taught. Both texts are read in one pass, twice as long.
    """

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One view per rollout that has two texts to read."""
        views = []
        for own in records:
            others = [record for record in records if record is not own and record.queries]
            right, wrong = ([r for r in others if r.label is label] for label in (Label.CORRECT, Label.INCORRECT))
            text, contrast = (
                writer.siblings(side or _unlabelled(other))[1] for side, other in ((right, wrong), (wrong, right))
            )
            if text and contrast:
                views.append(TeacherView(own.rollout_index, None, text, contrast))
        return HindsightBlock(group.instance_id, records, "", views=tuple(views)) if views else None


def _unlabelled(records: Sequence[SiblingRecord]) -> list[SiblingRecord]:
    return [replace(record, label=None) for record in records]
