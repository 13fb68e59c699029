"""One micro-batch as the student sees it: which rows are read, what each is worth, and the sums of it all.

Rows of taught query tokens are read for every term at once, all other tokens of the policy for its own terms only; so
the student's logits are made once. Invariant: a row's share of a term depends on that row alone (the weights know the
rest), so chunks add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import Divergence
from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax, wide_dtype
from sdsearch_lightning.losses.teacher_use import TeacherUse
from sdsearch_lightning.losses.terms import Terms, stack_terms, unstack_terms
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.lora import Reference
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.credit import CreditRows
from sdsearch_lightning.step.metrics import distillation_sums
from sdsearch_lightning.step.policy_terms import PolicyTerms
from sdsearch_lightning.step.teacher_rows import TeacherRows, Verdict, divergence_to_teacher, join, judge_tokens


@dataclass(frozen=True, slots=True)
class StepSums:
    """One micro-batch's share of a step: weights are applied, so shares add up to the step's losses."""

    terms: Terms[Tensor]
    metrics: Mapping[str, Tensor]
    """Sums over tokens, and the counts to divide them by; detached."""
    credit: CreditRows | None = None
    """The teacher's verdict on the taught query tokens; None without a teacher."""

    @property
    def policy_loss(self) -> Tensor:
        """Scalar: the clipped surrogate, see `Terms.policy_loss`."""
        return self.terms.policy_loss

    @property
    def kl(self) -> Tensor:
        """Scalar: the KL to the initial policy, see `Terms.kl`."""
        return self.terms.kl

    @property
    def entropy_loss(self) -> Tensor:
        """Scalar: the entropy terms, see `Terms.entropy_loss`."""
        return self.terms.entropy_loss

    @property
    def jsd_loss(self) -> Tensor:
        """Scalar: the divergence from the teacher, see `Terms.jsd_loss`."""
        return self.terms.jsd_loss


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of the micro-batch that are read alike."""

    targets: Tensor
    """[R] index into the batch's T tokens."""
    teacher: TeacherRows | None
    """[R] rows paired with them; None where no teacher has read them."""
    reference: Tensor | None = None
    """[R] log-probs under the initial policy; None without a KL."""


_Kept = tuple[dict[str, Tensor], CreditRows | None]
"""Metrics of a chunk, and the teacher's verdict on it."""


class Student:
    """Reads one micro-batch.

    Args:
        batch: with `query_row` aligned to `teacher`.
        policy_terms: of the policy's tokens.
        divergence: from the teacher at query tokens.
        teacher_use: what the teacher's verdict on a token is used for.
        teacher: its rows; None leaves the JSD out.
        controls: tokens that steer a rollout.
        project: [R, H] -> [R, V], the output layer of a teacher that is a copy; None for the policy itself, whose rows
            share the student's pass.
    """

    def __init__(
        self,
        batch: SearchBatch,
        policy_terms: PolicyTerms,
        divergence: Divergence,
        teacher_use: TeacherUse,
        teacher: TeacherRows | None,
        controls: ControlTokens,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._batch, self._policy_terms, self._divergence = batch, policy_terms, divergence
        self._teacher_use, self._controls, self._project = teacher_use, controls, project
        queries = batch.query_row if teacher is not None else batch.query_row[:0]
        is_other = batch.policy_weight != 0
        is_other[queries] = False
        self._parts = [_Part(queries, teacher), _Part(is_other.nonzero()[:, 0], None)]

    def step(self, policy: Policy, jsd_weight: float, reference: Policy | Reference | None = None) -> StepSums:
        """All terms from one forward pass.

        Args:
            policy: who learns.
            jsd_weight: of the JSD in the loss that will be trained on; see `head.read_rows`.
            reference: the initial policy, for the KL; None without one.
        """
        parts = self._parts if reference is None else self._with_reference(reference)
        readings = [Reading(part.targets, partial(self._read, part), self._paired(part)) for part in parts]
        outcome: Outcome = policy(self._batch.sequences, readings, self._policy_terms.coefficients(jsd_weight))
        return _sums(outcome)

    def _paired(self, part: _Part) -> Tensor | None:
        """[R, H] hidden rows of the teacher that go through the student's own output layer beside it."""
        return part.teacher.hidden if part.teacher is not None and self._project is None else None

    @torch.no_grad()
    def _with_reference(self, reference: Policy | Reference) -> list[_Part]:
        """The parts with the reference's log-probs of their tokens."""

        def read(part: _Part, chunk: Chunk) -> tuple[Tensor, Tensor]:
            logprobs = log_softmax(chunk.logits, self._policy_terms.temperature)
            return logprobs.new_zeros(0), at_tokens(logprobs, self._batch.token_ids[part.targets[chunk.rows]])

        readings = [Reading(part.targets, partial(read, part)) for part in self._parts]
        outcome: Outcome = reference(self._batch.sequences, readings)
        return [
            _Part(part.targets, part.teacher, torch.cat(kept))
            for part, kept in zip(self._parts, outcome.kept, strict=True)
        ]

    def _read(self, part: _Part, chunk: Chunk) -> tuple[Tensor, _Kept]:
        """[K] terms of a chunk: the policy's own, and the JSD where a teacher has read it."""
        targets = part.targets[chunk.rows]
        reference = None if part.reference is None else part.reference[chunk.rows]
        if part.teacher is None:
            terms, metrics = self._policy_terms.read(chunk.logits, reference, self._batch, targets)
            return stack_terms(terms), (metrics, None)
        teacher = part.teacher.at(chunk.rows)
        logprobs, student, verdict = self._hear(chunk, teacher, targets)
        terms, metrics = self._policy_terms.read(chunk.logits, reference, self._batch, targets, verdict.advantages)
        jsd = self._diverge(chunk, teacher)
        found = jsd.detach()
        terms = terms._replace(jsd_loss=(jsd * verdict.gate * self._batch.query_weight[chunk.rows]).sum())
        more = distillation_sums(found, logprobs, student, teacher, self._controls, verdict)
        credit = CreditRows(found, student, teacher.logprob, teacher.top_ids, teacher.top_probs)
        return stack_terms(terms), (metrics | more, credit)

    @torch.no_grad()
    def _hear(self, chunk: Chunk, teacher: TeacherRows, targets: Tensor) -> tuple[Tensor, Tensor, Verdict]:
        """[C, V] log-probs of the student, [C] those of the sampled tokens, and the teacher's verdict on them."""
        logprobs = log_softmax(chunk.logits)
        student = at_tokens(logprobs, self._batch.token_ids[targets])
        advantages, labels = self._batch.advantages[targets], self._batch.query_label[chunk.rows]
        return logprobs, student, judge_tokens(self._teacher_use, student, teacher, advantages, labels)

    def _diverge(self, chunk: Chunk, teacher: TeacherRows) -> Tensor:
        """[C] divergence from the teacher, with gradient."""
        paired = chunk.paired
        if self._project is not None and teacher.hidden is not None:
            with torch.no_grad():
                paired = self._project(teacher.hidden)
        logits = chunk.logits.to(wide_dtype(chunk.logits.dtype))
        return divergence_to_teacher(self._divergence, logits, teacher, paired, self._controls)


def _sums(outcome: Outcome) -> StepSums:
    """The shares of all chunks, added up."""
    metrics: dict[str, Tensor] = {}
    for more, _ in chain(*outcome.kept):
        for name, value in more.items():
            metrics[name] = metrics[name] + value if name in metrics else value
    credit = [rows for _, rows in chain(*outcome.kept) if rows is not None]
    return StepSums(unstack_terms(outcome.terms), metrics, join(credit) if credit else None)
