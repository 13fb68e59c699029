"""The policy's own terms of the loss: clipped surrogate, KL to the reference, entropy by kind of token.

GRPO, Dr. GRPO and DAPO differ only in values given here, in `losses.token_weights` and in
`scoring.advantages.group_relative`; configs/experiment/preset/ spells each out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import at_tokens, entropy, log_softmax
from sdsearch_lightning.losses.terms import Terms, clipped_surrogate, kl_k3
from sdsearch_lightning.losses.weights import EntropyCoefs
from sdsearch_lightning.step.collate import SPAN_KINDS, SearchBatch
from sdsearch_lightning.step.metrics import policy_sums
from sdsearch_lightning.types import SpanKind


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Clipped surrogate, KL to the reference and entropy terms at the tokens the policy sampled."""

    clip_low: float
    clip_high: float
    policy_coef: float
    kl_coef: float
    entropy_coef: EntropyCoefs
    tis_cap: float | None
    temperature: float

    def __post_init__(self) -> None:
        for name, value in (("policy_coef", self.policy_coef), ("kl_coef", self.kl_coef)):
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"model.{name}: expected a finite number of at least 0, found {value}.")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ConfigError(f"model.tis_cap: expected a number above 0, found {self.tis_cap}.")

    def coefficients(self, jsd_weight: float) -> Terms[float]:
        """What the terms of a step are added up with."""
        return Terms(self.policy_coef, self.kl_coef, float(not self.entropy_coef.is_zero), jsd_weight)

    def read(
        self,
        logits: Tensor,
        reference: Tensor | None,
        batch: SearchBatch,
        rows: Tensor,
        advantages: Tensor | None = None,
    ) -> tuple[Terms[Tensor], dict[str, Tensor]]:
        """The terms of some of a micro-batch's tokens, and the sums of their metrics; those of its parts add up.

            min(pi_old / pi_engine, tis_cap) * clipped_surrogate(pi, pi_old, A)

        pi_old is the trainer's own policy before the first update: the policy itself in that update, and what the batch
        remembers of it in later ones; where it remembers nothing, the engine's log-probs stand for it. The first factor
        is there only with `tis_cap`, and carries no gradient (truncated importance sampling: it corrects for an engine
        whose numerics differ from the trainer's; where both agree it is 1, in every update).

        Args:
            logits: [R, V] of the current policy, with gradient.
            reference: [R] log-probs of the tokens under the reference, at the temperature; None without one.
            batch: the micro-batch.
            rows: [R] indices of the policy's tokens into it.
            advantages: [R] what stands for the batch's, see `losses.TeacherUse`; None = the batch's own.

        Returns:
            Weighted sums; the JSD's is 0.
        """
        logprobs = log_softmax(logits, self.temperature)
        weight, engine = batch.policy_weight[rows], batch.sampled_logprobs[rows]
        current = at_tokens(logprobs, batch.token_ids[rows])
        old = current.detach() if batch.on_policy else engine
        if not batch.on_policy and batch.old_logprobs is not None:
            old = batch.old_logprobs[rows]
        advantages = batch.advantages[rows] if advantages is None else advantages
        values = clipped_surrogate(current, old, advantages, self.clip_low, self.clip_high)
        if self.tis_cap is not None:
            values = values * (old - engine).exp().clamp(max=self.tis_cap)
        nothing = current.new_zeros(())
        terms = Terms(policy_loss=(values * weight).sum(), kl=nothing, entropy_loss=nothing, jsd_loss=nothing)
        if reference is not None:
            terms = terms._replace(kl=(kl_k3(current, reference) * weight).sum())
        if not self.entropy_coef.is_zero:
            by_kind = self.entropy_coef.by_kind()
            coefs = current.new_tensor([by_kind[kind] for kind in SPAN_KINDS])
            bonus = (entropy(logprobs) * coefs[batch.span_kind[rows]] * weight).sum()
            terms = terms._replace(entropy_loss=-bonus)
        is_query = batch.span_kind[rows] == SPAN_KINDS.index(SpanKind.QUERY)
        return terms, policy_sums(logprobs, current, engine, old, is_query, self.clip_low, self.clip_high)
