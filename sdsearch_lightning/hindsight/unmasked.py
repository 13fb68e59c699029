"""What the paper's block keeps from the teacher, given to it: both cost the paper more than the method gains."""

from __future__ import annotations

from collections.abc import Sequence

from sdsearch_lightning.hindsight.base import GroupBlocks, judged
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import (
    HindsightBlock,
    Passage,
    RolloutGroup,
    SiblingRecord,
    SpanKind,
    TeacherView,
    Trajectory,
)


class UnmaskedRollouts(GroupBlocks):
    """All siblings' whole rollouts with their outcomes: thoughts, documents and answers too (paper: -3.0 points).

    The rollouts are text from outside here: their tags are neutralized, so that the taught rollout stays the only one
    that the model sees as a rollout. Such blocks are long; see hindsight.max_block_tokens.
    """

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One text for the whole group."""
        told = [(writer.codec.decode(t.token_ids[t.prompt_length :]).strip(), t.label) for t in judged(group)]
        kept, text = writer.fit(told, lambda some: writer.templates.write_rollouts(writer.codec, some))
        return HindsightBlock(group.instance_id, records[: len(kept)], text) if kept else None


class CurrentDocuments(GroupBlocks):
    """At each query the teacher reads what that query returned: no siblings, no outcome (paper: -3.4 points).

    An entry of the block is a passage. A query that returned none has no teacher, and neither has a rollout in which
    some query has no token of its own (all of them straddle its tags): which passages belong to whom is not told there.
    """

    per_query = True

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One view per query."""

        def write(passages: Sequence[Passage]) -> str:
            return writer.templates.write_documents(writer.codec, writer.protocol.format_passages(passages))

        views = tuple(
            TeacherView(trajectory.rollout_index, query_index, text)
            for trajectory in judged(group)
            for query_index, passages in enumerate(_passages_by_span(trajectory))
            if (text := writer.fit(passages, write)[1])
        )
        return HindsightBlock(group.instance_id, (), "", views=views) if views else None


def _passages_by_span(trajectory: Trajectory) -> Sequence[Sequence[Passage]]:
    """What each QUERY span returned; () where spans and searches do not pair."""
    num_spans = sum(span.kind is SpanKind.QUERY for span in trajectory.spans)
    return trajectory.passages if num_spans == len(trajectory.passages) else ()
