"""What one training step reports: sums while it runs, means when it is logged.

Sums and counts travel together, so that means are those of the joint batch over micro-batches and ranks. The keys are
explained in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdsearch_lightning.losses.logprobs import entropy
from sdsearch_lightning.losses.terms import Terms
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.teacher_rows import TeacherRows, Verdict

POLICY_SUMS = ("policy_tokens", "entropy", "clipped", "logprob_gap", "searched_tokens", "query_entropy")
DISTILLATION_SUMS = (
    "query_tokens",
    "jsd",
    "student_logprob",
    "teacher_logprob",
    "student_entropy",
    "teacher_entropy",
    "environment_mass_student",
    "environment_mass_teacher",
    "policy_tag_mass_student",
    "policy_tag_mass_teacher",
    "abs_log_ratio",
    "changed_advantages",
    "gate",
)


@dataclass(slots=True)
class StepTally:
    """What adds up over the micro-batches of a step on this rank."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    jsd: list[Tensor] = field(default_factory=list)
    """[Q] divergences per token, for the quantile."""
    skipped: int = 0
    """Updates left out because their gradient was not finite."""

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Count the sums of one micro-batch in."""
        for name, value in sums.items():
            self.sums[name] += float(value.detach())

    def count(self, norm: float, ratio: float) -> bool:
        """Count an update in, by its gradient's norm and the ratio to the weights; whether it was applied."""
        if not math.isfinite(norm):
            self.skipped += 1
            return False
        self.sums["grad_norm"] += norm
        self.sums["update_ratio"] += ratio
        return True

    def means(
        self, num_updates: int, masses: Sequence[str], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Metric keys and values of the step, over all ranks; the 95th percentile of the divergence is this rank's.

        Args:
            num_updates: of the step, those that were skipped included.
            masses: see `step_means`.
            sum_over_ranks: sums a tensor over processes; called once.
        """
        names = ["loss", *Terms._fields, *POLICY_SUMS, *DISTILLATION_SUMS]
        values = sum_over_ranks(torch.tensor([self.sums[name] for name in names], dtype=torch.float64))
        means = step_means(dict(zip(names, values.tolist(), strict=True)), num_updates, masses)
        applied = max(num_updates - self.skipped, 1)
        means |= {f"train/{name}": self.sums[name] / applied for name in ("grad_norm", "update_ratio")}
        means["train/skipped_updates"] = float(self.skipped)
        if found := [part for part in self.jsd if len(part)]:
            means["distill/jsd_p95"] = float(torch.cat(found).float().quantile(0.95))
        return means


@torch.no_grad()
def policy_sums(
    logprobs: Tensor,
    chosen: Tensor,
    sampled: Tensor,
    old: Tensor,
    is_query: Tensor,
    clip_low: float,
    clip_high: float,
) -> dict[str, Tensor]:
    """Sums over the R policy tokens of a micro-batch.

    Args:
        logprobs: [R, V] of the current policy.
        chosen: [R] of the sampled tokens.
        sampled: [R] as the engine recorded them.
        old: [R] denominator of the ratio.
        is_query: [R] bool, True at tokens of executed queries.
        clip_low: see `losses.clipped_surrogate`.
        clip_high: see there.
    """
    ratio = (chosen - old).exp()
    entropies = entropy(logprobs)
    return {
        "policy_tokens": torch.tensor(len(chosen)),
        "entropy": entropies.sum(),
        "searched_tokens": is_query.sum(),
        "query_entropy": entropies[is_query].sum(),
        "clipped": ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).sum(),
        "logprob_gap": (chosen - sampled).abs().sum(),
    }


@torch.no_grad()
def distillation_sums(
    jsd: Tensor,
    student_logprobs: Tensor,
    chosen: Tensor,
    teacher: TeacherRows,
    controls: ControlTokens,
    verdict: Verdict,
) -> dict[str, Tensor]:
    """Sums over the Q taught query tokens of a micro-batch.

    Args:
        jsd: [Q].
        student_logprobs: [Q, V].
        chosen: [Q] of the sampled tokens.
        teacher: its rows.
        controls: tokens that steer a rollout.
        verdict: on the tokens.
    """
    environment_mass, policy_tag_mass = controls.masses(student_logprobs.exp())
    return {
        "query_tokens": torch.tensor(len(jsd)),
        "jsd": jsd.sum(),
        "student_logprob": chosen.sum(),
        "teacher_logprob": teacher.logprob.sum(),
        "student_entropy": entropy(student_logprobs).sum(),
        "teacher_entropy": teacher.entropy.sum(),
        "environment_mass_student": environment_mass.sum(),
        "environment_mass_teacher": teacher.environment_mass.sum(),
        "policy_tag_mass_student": policy_tag_mass.sum(),
        "policy_tag_mass_teacher": teacher.policy_tag_mass.sum(),
        "abs_log_ratio": verdict.log_ratio.abs().sum(),
        "changed_advantages": verdict.is_changed.sum(),
        "gate": verdict.gate.sum(),
    }


def step_means(
    totals: Mapping[str, float], num_updates: int, masses: Sequence[str] = ("environment", "policy_tag")
) -> dict[str, float]:
    """Metric keys and values of a step from its sums over all micro-batches and ranks.

    Args:
        totals: sums by the names above. Losses are sums of weighted terms, so their totals are the losses themselves,
            once per update.
        num_updates: updates the totals cover.
        masses: of which tokens the probability says something: the environment's, where a tag of it is one token; the
            policy's, where it may not write them.
    """
    tokens = max(totals["policy_tokens"], 1.0)
    means = {f"train/{name}": totals[name] / num_updates for name in ("loss", "policy_loss", "kl", "entropy_loss")}
    means |= {
        "train/entropy": totals["entropy"] / tokens,
        "train/clip_fraction": totals["clipped"] / tokens,
        "train/logprob_gap": totals["logprob_gap"] / tokens,
        "train/policy_tokens": totals["policy_tokens"],
        "distill/teacher_rows": totals["query_tokens"],
    }
    if searched := totals["searched_tokens"]:
        means["train/query_entropy"] = totals["query_entropy"] / searched
    if queries := totals["query_tokens"]:
        means |= {
            "distill/loss": totals["jsd_loss"] / num_updates,
            "distill/jsd": totals["jsd"] / queries,
            "distill/student_logprob": totals["student_logprob"] / queries,
            "distill/teacher_logprob": totals["teacher_logprob"] / queries,
            "distill/student_entropy": totals["student_entropy"] / queries,
            "distill/teacher_entropy": totals["teacher_entropy"] / queries,
            "distill/abs_log_ratio": totals["abs_log_ratio"] / queries,
            "distill/changed_advantages": totals["changed_advantages"] / queries,
            "distill/gate": totals["gate"] / queries,
            "distill/entropy_gap": (totals["student_entropy"] - totals["teacher_entropy"]) / queries,
        }
        for name in (f"{of}_mass_{side}" for of in masses for side in ("student", "teacher")):
            means[f"distill/{name}"] = totals[name] / queries
    return means
