"""The control: a block that looks right and says nothing of this question (as in OP2SD, arXiv:2608.09228)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sdsearch_lightning.hindsight.base import sibling_records, taught_weight
from sdsearch_lightning.hindsight.queries_and_labels import QueriesAndLabels
from sdsearch_lightning.hindsight.writer import BlockBudget, BlockWriter
from sdsearch_lightning.losses.weights import GroupsRule
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import HindsightBlock, RolloutGroup


class Placebo(QueriesAndLabels):
    """The paper's block of another question of the same batch, with that one's queries and outcomes.

    The donor is the next group in the batch (after the last comes the first) with another question in which any rollout
    searched; without one, as in a batch of one group, nothing is taught. Which groups are taught, and their weight, is
    decided by their own outcomes.
    """

    def build(
        self,
        groups: Sequence[RolloutGroup],
        rule: GroupsRule,
        protocol: Protocol,
        codec: TokenCodec,
        budget: BlockBudget | None = None,
    ) -> list[HindsightBlock | None]:
        """See `BlockBuilder.build`; `entries` of a block are the donor's."""
        writer = BlockWriter(protocol, codec, budget or BlockBudget())
        blocks: list[HindsightBlock | None] = []
        for position, group in enumerate(groups):
            weight = taught_weight(sibling_records(group, codec), rule)
            donor = _donor([*groups[position + 1 :], *groups[:position]], group, codec) if weight else None
            block = self._build_one(donor, "all", writer) if donor else None
            blocks.append(replace(block, instance_id=group.instance_id, weight=weight) if block else None)
        return blocks


def _donor(others: Sequence[RolloutGroup], group: RolloutGroup, codec: TokenCodec) -> RolloutGroup | None:
    return next(
        (
            other
            for other in others
            if other.question.text != group.question.text and taught_weight(sibling_records(other, codec), "all")
        ),
        None,
    )
