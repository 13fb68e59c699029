"""The policy's side of the loss beyond plain GRPO: truncated importance sampling and entropy terms by span kind.

GRPO, Dr. GRPO and DAPO differ only in values given here, in `losses.token_weights` and in `advantages.group_relative`;
configs/experiment/preset/ spells each out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.terms import clipped_surrogate, kl_k3
from sdsearch_lightning.step.collate import SPAN_KINDS, SearchBatch
from sdsearch_lightning.step.metrics import policy_sums
from sdsearch_lightning.step.teacher_rows import entropy
from sdsearch_lightning.types import SpanKind


@dataclass(frozen=True)
class EntropyCoefs:
    """Weight of the policy's entropy at each kind of token: above 0 a bonus, below 0 a penalty (sharpening)."""

    reasoning: float = 0.0
    query: float = 0.0
    refine: float = 0.0
    answer: float = 0.0
    scaffold: float = 0.0
    """Tags."""

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in self.by_kind().values()):
            raise ConfigError(f"model.entropy_coef: expected finite numbers, found {self}.")

    def by_kind(self) -> Mapping[SpanKind, float]:
        """The coefficients by span kind."""
        return {SpanKind(field.name): float(getattr(self, field.name)) for field in fields(self)}

    @property
    def is_zero(self) -> bool:
        """Whether there is no entropy term at all; then none is computed."""
        return not any(self.by_kind().values())


@dataclass(frozen=True, slots=True)
class PolicySums:
    """One micro-batch's share of the policy's terms; weights are applied, coefficients are not."""

    policy_loss: Tensor
    kl: Tensor
    entropy_loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """Clipped surrogate, KL to the reference and entropy terms at the tokens the policy sampled."""

    clip_low: float
    clip_high: float
    policy_coef: float
    kl_coef: float
    entropy_coef: EntropyCoefs
    tis_cap: float | None
    temperature: float

    def __post_init__(self) -> None:
        for name in ("policy_coef", "kl_coef"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"model.{name}: expected a finite number of at least 0, found {value}.")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ConfigError(f"model.tis_cap: expected a number above 0, found {self.tis_cap}.")

    def sums(self, logits: Tensor, reference: Tensor | None, batch: SearchBatch, rows: Tensor) -> PolicySums:
        """The terms of some of a micro-batch's tokens; sums over parts of them add up.

            min(pi_now / pi_engine, tis_cap) * clipped_surrogate(pi, pi_old, A)

        The first factor is there only with `tis_cap`, and carries no gradient (truncated importance sampling: it
        corrects for an engine whose numerics differ from the trainer's; in one process both agree and it is 1).

        The ratio's denominator is the policy itself while it is the one that sampled, else the engine's log-probs.

        Args:
            logits: [R, V] of the current policy, with gradient.
            reference: [R] log-probs of the tokens under the reference, at the temperature; None without one.
            batch: the micro-batch.
            rows: [R] indices of the policy's tokens into it.
        """
        logprobs = log_softmax(logits, self.temperature)
        tokens, weight, engine = batch.token_ids[rows][:, None], batch.policy_weight[rows], batch.sampled_logprobs[rows]
        chosen = logprobs.gather(1, tokens)[:, 0]
        old = chosen.detach() if batch.on_policy else engine
        values = clipped_surrogate(chosen, old, batch.advantages[rows], self.clip_low, self.clip_high)
        if self.tis_cap is not None:
            values = values * (chosen.detach() - engine).exp().clamp(max=self.tis_cap)
        kl = entropy_loss = chosen.new_zeros(())
        if reference is not None:
            kl = (kl_k3(chosen, reference) * weight).sum()
        if not self.entropy_coef.is_zero:
            by_kind = self.entropy_coef.by_kind()
            coefs = chosen.new_tensor([by_kind.get(kind, 0.0) for kind in SPAN_KINDS])
            entropy_loss = -(entropy(logprobs) * coefs[batch.span_kind[rows]] * weight).sum()
        is_query = batch.span_kind[rows] == SPAN_KINDS.index(SpanKind.QUERY)
        metrics = policy_sums(logprobs, chosen, engine, old, is_query, self.clip_low, self.clip_high)
        return PolicySums((values * weight).sum(), kl, entropy_loss, metrics)

    @property
    def mixture(self) -> tuple[float, float, float]:
        """Coefficients of policy loss, KL and entropy loss, as `total` uses them."""
        return self.policy_coef, self.kl_coef, float(not self.entropy_coef.is_zero)

    def total(self, policy_loss: Tensor, kl: Tensor, entropy_loss: Tensor) -> Tensor:
        """The terms with their coefficients; a term that is off is left out, not multiplied by 0."""
        loss = policy_loss if self.policy_coef == 1 else self.policy_coef * policy_loss
        if self.kl_coef > 0:
            loss = loss + self.kl_coef * kl
        return loss if self.entropy_coef.is_zero else loss + entropy_loss


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs at a temperature, in float32, or float64 where the logits are."""
    logits = wide(logits)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def wide(logits: Tensor) -> Tensor:
    """In float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
