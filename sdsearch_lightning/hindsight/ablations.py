"""The paper's block with one thing changed, and what relatives of the method give their teachers instead.

    NoLabels, ShuffledLabels                  what do the outcomes add to the queries?
    CorrectOnly, OwnRollout, LeaveOneOut      whose queries does a teacher need?
    UnmaskedRollouts, CurrentDocuments        what the paper keeps from the teacher: both cost more than is gained
    Placebo                                   the block of another question: the control
    SuccessfulSibling, GoldAnswer             a solution, or the answer itself (SDPO, OPSD)

Points are those of the paper's ablation table, against its own block.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from sdsearch_lightning.hindsight.base import GroupBlocks, is_query, judged, sibling_records, taught_weight
from sdsearch_lightning.hindsight.queries_and_labels import QueriesAndLabels
from sdsearch_lightning.hindsight.writer import BlockBudget, BlockWriter
from sdsearch_lightning.losses.weights import GroupsRule
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import (
    HindsightBlock,
    Label,
    Passage,
    RolloutGroup,
    SiblingRecord,
    SpanKind,
    TeacherView,
    Trajectory,
)

# Other labels


class NoLabels(QueriesAndLabels):
    """All siblings' queries, and no outcome (paper: -1.4 points)."""

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """Every record, its label taken away."""
        return tuple(replace(record, label=None) for record in records)


class ShuffledLabels(QueriesAndLabels):
    """All siblings' queries, each with the outcome of a sibling drawn without replacement (paper: -2.3 points).

    The draw depends on `seed` and the group's instance_id alone, so a resumed run tells the same. Where outcomes differ
    it is repeated until at least one label has moved: true labels would be no ablation. (In a group of two that leaves
    the two exchanged.) Where all outcomes are the same there is nothing to shuffle, and the block is the paper's.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """Every record, with another one's label."""
        labels = [record.label for record in records]
        epoch, position = group.instance_id
        rng = random.Random(f"{self.seed}/shuffled-labels/{epoch}/{position}")
        shuffled = labels.copy()
        while shuffled == labels and len(set(labels)) > 1:
            rng.shuffle(shuffled)
        return tuple(replace(record, label=label) for record, label in zip(records, shuffled, strict=True))


# Other members


class CorrectOnly(QueriesAndLabels):
    """Queries of CORRECT rollouts only (paper: -0.7 points); a group without one is not taught."""

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """The records of CORRECT rollouts."""
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
        """The records that the teacher of one rollout reads."""


class OwnRollout(_EntriesPerRollout):
    """Each rollout reads its own queries and outcome, and no sibling's (paper, "no group": -1.0 points)."""

    def entries(self, own: SiblingRecord, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """The record of the rollout that reads."""
        return (own,)


class LeaveOneOut(_EntriesPerRollout):
    """Each rollout reads all siblings but itself, so that it cannot copy its own query (paper: -0.5 points)."""

    def entries(self, own: SiblingRecord, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """All records but that of the rollout that reads."""
        return tuple(record for record in records if record.rollout_index != own.rollout_index)


# More than queries


class UnmaskedRollouts(GroupBlocks):
    """All siblings' whole rollouts with their outcomes: thoughts, documents and answers too (paper: -3.0 points).

    The rollouts are text from outside here: their tags are neutralized, so that the taught rollout stays the only one
    that the model sees as a rollout. Such blocks are long; see hindsight.max_block_tokens.
    """

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One text of whole rollouts, which every rollout of the group reads."""
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
        """A view for each query, with what it returned."""

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


# The control: a block that looks right and says nothing of this question (as in OP2SD, arXiv:2608.09228)


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


# Hints of the method's relatives; both tell the answer on purpose


class SuccessfulSibling(GroupBlocks):
    """Each rollout reads the first CORRECT sibling's searches, what they returned, and its answer.

    After SDPO (arXiv:2601.20802). Never its own: a rollout without another CORRECT one is not taught. Reasoning and
    refine notes stay out: the text is made of recorded queries, passages and answer, not cut out of the rollout.
    """

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One view per rollout; `entries` are those of the siblings that any of them reads."""

        def write(solutions: Sequence[Trajectory]) -> str:
            (solution,) = solutions
            searches = [
                (query, writer.protocol.format_passages(passages))
                for query, passages in zip(solution.queries, solution.passages, strict=True)
                if is_query(query, writer.codec)
            ]
            return writer.templates.write_solution(writer.codec, searches, solution.answer or "")

        rollouts = judged(group)
        correct = [trajectory for trajectory in rollouts if trajectory.label is Label.CORRECT]
        views, told = [], set()
        for own in rollouts:
            solution = [trajectory for trajectory in correct if trajectory is not own][:1]
            if text := writer.fit(solution, write)[1]:
                views.append(TeacherView(own.rollout_index, None, text))
                told.add(solution[0].rollout_index)
        entries = tuple(record for record in records if record.rollout_index in told)
        return HindsightBlock(group.instance_id, entries, "", views=tuple(views)) if views else None


class GoldAnswer(GroupBlocks):
    """Every rollout reads the first gold answer, after OPSD (arXiv:2601.18734) and SDPG (arXiv:2606.04036).

    No sibling is read; which groups are taught is the rule's as ever.
    """

    def block(
        self, group: RolloutGroup, records: tuple[SiblingRecord, ...], writer: BlockWriter
    ) -> HindsightBlock | None:
        """One text with the gold answer, which every rollout of the group reads."""
        answers = group.question.answers[:1]
        kept, text = writer.fit(answers, lambda some: writer.templates.write_gold_answer(writer.codec, some[0]))
        return HindsightBlock(group.instance_id, (), text) if kept else None
