"""The hindsight block: what the teacher reads of a group, and what it must never read.

Built from an allow-list, the executed queries and the outcome of each rollout: thoughts, documents and answers of the
siblings stay out, or the gold answer could be read off the prefix (paper, "future masking").

    h(G) = { (M(tau_j), y(tau_j)) : j = 1..G }                                        (arXiv:2605.18299)

Next: collate.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdsearch_lightning.losses import GroupsRule, group_weight
from sdsearch_lightning.templates import Protocol
from sdsearch_lightning.tokenization import TokenCodec
from sdsearch_lightning.types import HindsightBlock, Pluggable, RolloutGroup, SiblingRecord


def sibling_records(group: RolloutGroup, codec: TokenCodec) -> tuple[SiblingRecord, ...]:
    """Queries and outcome of each rollout, in rollout order, the taught one among them (paper: tau_i is included).

    Rollouts that ended in a retrieval error have no outcome and are left out. A query that holds a tag or a special
    token is no query (`Conversation` refuses it); here it is dropped once more, so that none can reach a teacher.
    """
    return tuple(
        SiblingRecord(
            trajectory.rollout_index,
            tuple(query for query in trajectory.queries if query.strip() and not codec.holds_control(query)),
            trajectory.label,
        )
        for trajectory in group.trajectories
        if trajectory.label is not None and not trajectory.stop_reason.is_error
    )


class BlockBuilder(Pluggable):
    """Makes the blocks; the base of users' own."""

    required = ("build",)

    def build(
        self, groups: Sequence[RolloutGroup], rule: GroupsRule, protocol: Protocol, codec: TokenCodec
    ) -> list[HindsightBlock | None]:
        """One block per group; None = this group is not taught.

        Args:
            groups: of one training step.
            rule: which groups are taught, see `losses.group_weight`; decided by the label, not by the reward.
            protocol: writes the block.
            codec: tells control strings.
        """
        raise NotImplementedError


class QueriesAndLabels(BlockBuilder):
    """The paper's block: all siblings' queries with CORRECT / INCORRECT."""

    def build(
        self, groups: Sequence[RolloutGroup], rule: GroupsRule, protocol: Protocol, codec: TokenCodec
    ) -> list[HindsightBlock | None]:
        """One block per group of positive weight in which any rollout searched."""
        blocks: list[HindsightBlock | None] = []
        for group in groups:
            entries = sibling_records(group, codec)
            weight = group_weight([entry.label for entry in entries], rule)
            taught = weight > 0 and any(entry.queries for entry in entries)
            text = protocol.render_block(codec, entries) if taught else ""
            blocks.append(HindsightBlock(group.instance_id, entries, text, weight) if taught else None)
        return blocks
