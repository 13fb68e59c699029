"""Which query earned the credit: the teacher's verdict, token by token, sorted back to rollouts and spans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from sdsearch_lightning.step.collate import WeightedRollout
from sdsearch_lightning.step.taught_spans import TaughtSpans
from sdsearch_lightning.types import InstanceId, RolloutGroup, TokenCredit

Credits = dict[tuple[InstanceId, int], tuple[TokenCredit, ...]]
"""By (instance_id, rollout_index)."""


@dataclass(frozen=True, slots=True)
class CreditRows:
    """The verdict at the Q query tokens of one micro-batch, in the order of `SearchBatch.query_row`."""

    jsd: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    top_ids: Tensor
    top_probs: Tensor

    def rows(self) -> Iterator[tuple[float, float, float, tuple[tuple[int, float], ...]]]:
        """One tuple per query token."""
        values = (self.jsd, self.student_logprob, self.teacher_logprob)
        tops = zip(self.top_ids.tolist(), self.top_probs.tolist(), strict=True)
        for jsd, student, teacher, (ids, probs) in zip(*(v.tolist() for v in values), tops, strict=True):
            yield jsd, student, teacher, tuple(zip(ids, probs, strict=True))


def credit_rollouts(rollouts: Sequence[WeightedRollout], taught: Sequence[TaughtSpans], rows: CreditRows) -> Credits:
    """Deal the rows of a micro-batch out to the spans they belong to."""
    credits: Credits = {}
    pending = rows.rows()
    for part in taught:
        trajectory = rollouts[part.rollout].trajectory
        key = trajectory.instance_id, trajectory.rollout_index
        for index in part.spans:
            verdict = [next(pending) for _ in trajectory.spans[index].token_ids]
            jsd, student, teacher, top = zip(*verdict, strict=True)
            credits[key] = (*credits.get(key, ()), TokenCredit(index, jsd, student, teacher, top))
    assert next(pending, None) is None, "every row belongs to a span"
    return credits


def credit_table(
    groups: Iterable[RolloutGroup], credits: Credits
) -> tuple[tuple[tuple[TokenCredit, ...] | None, ...], ...]:
    """Credits as `StepBatch.credit` holds them: per group and rollout, None where there was no teacher."""
    return tuple(tuple(credits.get((t.instance_id, t.rollout_index)) for t in group.trajectories) for group in groups)
