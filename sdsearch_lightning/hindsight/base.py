"""What all blocks share: which rollouts may enter, and which groups are taught."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from sdsearch_lightning.hindsight.writer import BlockBudget, BlockWriter
from sdsearch_lightning.losses.weights import GroupsRule, group_weight
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import HindsightBlock, Pluggable, RolloutGroup, SiblingRecord, Trajectory


def judged(group: RolloutGroup) -> tuple[Trajectory, ...]:
    """The rollouts that have an outcome, in rollout order; those that ended in a retrieval error have none."""
    return tuple(t for t in group.trajectories if t.label is not None and not t.stop_reason.is_error)


def is_query(text: str, codec: TokenCodec) -> bool:
    """Whether a query may enter a block: not empty, no tag, no special token.

    `Conversation` refuses such queries already; they are dropped once more so that none can reach a teacher.
    """
    return bool(text.strip()) and not codec.holds_control(text)


def sibling_records(group: RolloutGroup, codec: TokenCodec) -> tuple[SiblingRecord, ...]:
    """Queries and outcome of each judged rollout, in rollout order, the taught one among them (paper: with tau_i)."""
    return tuple(
        SiblingRecord(t.rollout_index, tuple(query for query in t.queries if is_query(query, codec)), t.label)
        for t in judged(group)
    )


def taught_weight(records: Sequence[SiblingRecord], rule: GroupsRule) -> float:
    """Weight of a group by its true outcomes, whatever a block tells of them; 0 where no rollout searched.

    Args:
        records: from `sibling_records`.
        rule: see `losses.group_weight`.
    """
    searched = any(record.queries for record in records)
    return group_weight([record.label for record in records], rule) if searched else 0.0


class BlockBuilder(Pluggable):
    """Makes the hindsight blocks of a step; the base of users' own builders."""

    required, optional = ("build",), ("per_query",)

    per_query: ClassVar[bool] = False
    """Whether a view belongs to one query: there is then nothing to read at other tokens."""

    @abstractmethod
    def build(
        self,
        groups: Sequence[RolloutGroup],
        rule: GroupsRule,
        protocol: Protocol,
        codec: TokenCodec,
        budget: BlockBudget | None = None,
    ) -> list[HindsightBlock | None]:
        """One block per group; None = this group is not taught.

        Args:
            groups: of one training step.
            rule: which groups are taught, see `losses.group_weight`; decided by the label, not by the reward.
            protocol: writes the block.
            codec: tells control strings, counts tokens.
            budget: given where hindsight.max_block_tokens is set; a builder without this parameter cannot have one.
        """


class GroupBlocks(BlockBuilder):
    """Base of the blocks below: the rule is applied here, a subclass says what a taught group reads."""

    def build(
        self,
        groups: Sequence[RolloutGroup],
        rule: GroupsRule,
        protocol: Protocol,
        codec: TokenCodec,
        budget: BlockBudget | None = None,
    ) -> list[HindsightBlock | None]:
        """One block per group of positive weight in which any rollout searched."""
        writer = BlockWriter(protocol, codec, budget or BlockBudget())
        return [self._build_one(group, rule, writer) for group in groups]

    def _build_one(self, group: RolloutGroup, rule: GroupsRule, writer: BlockWriter) -> HindsightBlock | None:
        records = sibling_records(group, writer.codec)
        if not (weight := taught_weight(records, rule)):
            return None
        dropped_before = writer.budget.dropped_entries
        block = self.block(group, records, writer)
        if block is None:
            writer.budget.groups_over_budget += writer.budget.dropped_entries > dropped_before
            return None
        return replace(block, weight=weight)

    @abstractmethod
    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """What a taught group reads; None = there is nothing to tell.

        Args:
            group: it.
            records: its `sibling_records`.
            writer: every text has to come out of its `fit`.
        """
