"""Hints of the method's relatives: a sibling's solution, the gold answer. Both tell the answer on purpose."""

from __future__ import annotations

from collections.abc import Sequence

from sdsearch_lightning.hindsight.base import GroupBlocks, is_query, judged
from sdsearch_lightning.hindsight.writer import BlockWriter
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, SiblingRecord, TeacherView, Trajectory


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
        """One text for the whole group."""
        answers = group.question.answers[:1]
        kept, text = writer.fit(answers, lambda some: writer.templates.write_gold_answer(writer.codec, some[0]))
        return HindsightBlock(group.instance_id, (), text) if kept else None
