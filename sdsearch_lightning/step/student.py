"""One micro-batch as the student sees it: which rows are read, what each is worth, and the sums of it all.

Rows of taught query tokens are read for every term at once, all other tokens of the policy for its own terms only; so
the student's logits are made once. Invariant: a row's share of a term depends on that row alone (the weights know the
rest), so chunks add up.

Next: losses.py, the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import Divergence
from sdsearch_lightning.policy.head import Chunk, Outcome, Read, Reading
from sdsearch_lightning.policy.lora import Reference
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.step.credit import CreditRows
from sdsearch_lightning.step.metrics import distillation_sums
from sdsearch_lightning.step.policy_terms import PolicyObjective, log_softmax, wide
from sdsearch_lightning.step.teacher_rows import TeacherRows, divergence_to_teacher


@dataclass(frozen=True, slots=True)
class StepSums:
    """One micro-batch's share of a step: weights are applied, so shares add up to the step's losses."""

    policy_loss: Tensor
    jsd_loss: Tensor
    kl: Tensor
    metrics: dict[str, Tensor]
    """Sums over tokens, and the counts to divide them by; detached."""
    entropy_loss: Tensor
    credit: CreditRows | None = None


_Kept = tuple[dict[str, Tensor], CreditRows | None]
"""Metrics of a chunk, and the teacher's verdict on it."""


class Student:
    """Reads one micro-batch.

    Args:
        batch: with `query_row` aligned to `teacher`.
        objective: of the policy's tokens.
        divergence: from the teacher at query tokens.
        teacher: its rows; None leaves the JSD out.
        environment_ids: [E] tokens that only the environment writes.
    """

    def __init__(
        self,
        batch: SearchBatch,
        objective: PolicyObjective,
        divergence: Divergence,
        teacher: TeacherRows | None,
        environment_ids: Tensor,
    ) -> None:
        self._batch, self._objective, self._divergence = batch, objective, divergence
        self._teacher, self._environment_ids = teacher, environment_ids
        self._queries = batch.query_row if teacher is not None else batch.query_row[:0]
        is_other = batch.policy_weight != 0
        is_other[self._queries] = False
        self._others = is_other.nonzero()[:, 0]

    def step(
        self,
        policy: Policy,
        jsd_weight: float,
        reference: Policy | Reference | None = None,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> StepSums:
        """All terms from one forward pass.

        Args:
            policy: who learns.
            jsd_weight: of the JSD in the loss that will be trained on; see `head.read_rows`.
            reference: the initial policy, for the KL; None without one.
            project: head of a teacher that is a copy; None for the policy itself, whose rows share its pass.
        """
        known = [None, None] if reference is None else self._reference_logprobs(reference)
        taught, others = (
            partial(self._read, targets, logprobs)
            for targets, logprobs in zip((self._queries, self._others), known, strict=True)
        )
        hidden = None
        if self._teacher is not None:
            taught = partial(self._read_taught, self._teacher, project, taught)
            hidden = self._teacher.hidden if project is None else None
        readings = [Reading(self._queries, taught, hidden), Reading(self._others, others)]
        mixture = *self._objective.mixture, jsd_weight if self._teacher is not None else 0.0
        return self._sums(policy(self._batch.sequences, readings, mixture))

    @torch.no_grad()
    def _reference_logprobs(self, reference: Policy | Reference) -> list[Tensor]:
        """[R] log-probs of the policy's tokens, for each reading."""

        def read(targets: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
            logprobs = log_softmax(chunk.logits, self._objective.temperature)
            return logprobs.new_zeros(0), _at(logprobs, self._batch.token_ids[targets[chunk.rows]])

        parts = (self._queries, self._others)
        outcome: Outcome = reference(self._batch.sequences, [Reading(part, partial(read, part)) for part in parts])
        return [torch.cat(kept) for kept in outcome.kept]

    def _read(self, targets: Tensor, reference: Tensor | None, chunk: Chunk) -> tuple[Tensor, _Kept]:
        """The policy's own terms; the JSD's is 0."""
        known = None if reference is None else reference[chunk.rows]
        sums = self._objective.sums(chunk.logits, known, self._batch, targets[chunk.rows])
        terms = (sums.policy_loss, sums.kl, sums.entropy_loss, torch.zeros_like(sums.kl))
        return torch.stack(terms), (sums.metrics, None)

    def _read_taught(
        self, rows: TeacherRows, project: Callable[[Tensor], Tensor] | None, read: Read, chunk: Chunk
    ) -> tuple[Tensor, _Kept]:
        """The policy's own terms from `read`, and the JSD."""
        terms, (metrics, _) = read(chunk)
        teacher, paired, logits = rows.at(chunk.rows), chunk.paired, wide(chunk.logits)
        if project is not None and teacher.hidden is not None:
            with torch.no_grad():
                paired = project(teacher.hidden)
        jsd = divergence_to_teacher(self._divergence, logits, teacher, paired)
        weight, tokens = self._batch.query_weight[chunk.rows], self._batch.token_ids[self._queries[chunk.rows]]
        with torch.no_grad():
            student, found = logits.log_softmax(-1), jsd.detach()
            chosen = _at(student, tokens)
            metrics = metrics | distillation_sums(found, student, chosen, teacher, self._environment_ids)
        credit = CreditRows(found, chosen, teacher.logprob, teacher.top_ids, teacher.top_probs)
        return torch.cat([terms[:-1], (jsd * weight).sum()[None]]), (metrics, credit)

    def _sums(self, outcome: Outcome) -> StepSums:
        policy_loss, kl, entropy_loss, jsd_loss = outcome.terms.unbind()
        metrics: dict[str, Tensor] = {}
        for more, _ in chain(*outcome.kept):
            for name, value in more.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        credit = [rows for _, rows in outcome.kept[0] if rows is not None]
        joined = CreditRows.join(credit) if credit else None
        return StepSums(policy_loss, jsd_loss, kl, metrics, entropy_loss, joined)


def _at(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """[R] from [R, V]."""
    return logprobs.gather(1, tokens[:, None])[:, 0]
