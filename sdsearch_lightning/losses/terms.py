"""The losses (clipped surrogate, KL, hindsight JSD) per token, and the weights that turn them into one number.

Invariant: a value says nothing of the batch it sits in. Every normaliser lives in a weight that is computed once per
optimizer step from counts over the whole step (all micro-batches, all ranks); a loss is then a plain weighted sum, so
packing, micro-batches and ranks cannot change it. Losses are nouns, to be minimised; nothing here averages on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Label

AggregationMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
GroupsRule = Literal["all", "any_correct", "mixed", "sqrt"]


# Values per token


def clipped_surrogate(
    policy_logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's clipped objective per token, negated.

        -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A),   r = exp(policy - sampled)  (arXiv:1707.06347, eq. 7)

    Args:
        policy_logprobs: [N, T] of the sampled tokens under the current policy.
        sampled_logprobs: [N, T] under the policy that sampled them; no gradient flows here.
        advantages: [N, T] or broadcastable ([N, 1]: one per rollout); no gradient flows here.
        clip_low: how far below 1 the ratio still counts.
        clip_high: how far above 1 the ratio still counts; above `clip_low` it is DAPO's clip-higher (arXiv:2503.14476).

    Returns:
        [N, T] loss per token, not averaged.
    """
    ratio = (policy_logprobs - sampled_logprobs.detach()).exp()
    advantages = advantages.detach()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def kl_k3(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) per sampled token, >= 0 and unbiased on policy.

        exp(d) - d - 1,   d = reference - policy                                 (http://joschu.net/blog/kl-approx.html)

    Args:
        policy_logprobs: [N, T] of the sampled tokens under the current policy.
        reference_logprobs: [N, T] under the reference; no gradient flows here.

    Returns:
        [N, T] nats, not averaged.
    """
    difference = reference_logprobs.detach() - policy_logprobs
    return difference.expm1() - difference  # expm1 keeps the digits that exp(d) - 1 loses at small d


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, top_k: int | None = None
) -> Tensor:
    """Generalised Jensen-Shannon divergence between teacher T and student S, per row.

        beta * KL(T || M) + (1 - beta) * KL(S || M),   M = (1 - beta) * S + beta * T        (arXiv:2306.13649, eq. 1)

    At beta 0.5 symmetric and at most ln 2. The ends are the limits of JSD / (beta * (1 - beta)): beta 0 is forward
    KL(T || S), beta 1 is reverse KL(S || T). Rows that are equal bit for bit give exactly 0. A logit of -inf is a
    token of probability 0, on either side; where KL would be infinite it is huge and finite. NaN stays NaN.

    Args:
        student_logits: [Q, V] current policy at query positions.
        teacher_logits: [Q, V] same positions under hindsight; no gradient flows here.
        beta: teacher's share of the mixture.
        top_k: support: the teacher's k most probable tokens, both sides renormalised on it; None or >= V is all of V.
            A teacher that kept only its top k is the same as both sides gathered at those ids, with `top_k` None.

    Returns:
        [Q] nats, not averaged, in the student's dtype; half precision is computed in float32.

    Raises:
        ConfigError: `beta` outside [0, 1] or `top_k` below 1.
    """
    check_beta(beta)
    check_top_k(top_k)
    assert student_logits.shape == teacher_logits.shape, "student and teacher rows are paired, over one vocabulary"
    teacher_logits = teacher_logits.detach()
    if top_k is not None and top_k < teacher_logits.shape[-1]:
        support = teacher_logits.topk(top_k, dim=-1).indices  # [Q, k]
        student_logits, teacher_logits = student_logits.gather(-1, support), teacher_logits.gather(-1, support)
    student, teacher = floored_log_softmax(student_logits), floored_log_softmax(teacher_logits)
    gap = teacher - student.detach()  # log T/S
    if beta == 0:
        divergence = (teacher.exp() * (teacher - student)).sum(-1)
    elif beta == 1:
        divergence = (student.exp() * -gap).sum(-1)
    else:
        # log M - max(log S, log T), from the side where the exponential is at most 1: no overflow, exactly 0 at gap 0.
        lower_share = torch.full_like(gap, beta).masked_fill(gap > 0, 1 - beta)
        mixture = (lower_share * torch.expm1(-gap.abs())).log1p()
        student_term = (1 - beta) * student.exp() * (-mixture - gap.clamp(min=0))  # S log S/M
        teacher_term = beta * teacher.exp() * (-mixture - (-gap).clamp(min=0))  # T log T/M
        divergence = (student_term + teacher_term).sum(-1)
    # Where log-ratios carry no graph (beta > 0) they need none: their derivatives add up to 0 over a row. The gradient
    # through the S in front of them is the whole one, without the rounding noise of what cancels.
    return divergence.clamp(min=0).to(student_logits.dtype)


def floored_log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities, never -inf: 0 * log 0 has to be 0. At this floor a probability is 0 in any float.

    Args:
        logits: [Q, V] in any float dtype.

    Returns:
        [Q, V] in float32, or in float64 where the logits are.
    """
    floor = torch.finfo(logits.dtype).min / 2
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.clamp(min=torch.finfo(logits.dtype).min).log_softmax(-1).clamp(min=floor)


def check_beta(beta: float) -> None:
    """Raise ConfigError unless `beta` is a share of a mixture."""
    if not 0 <= beta <= 1:
        raise ConfigError(f"Expected beta in [0, 1], got {beta}. 0 is KL(teacher || student), 0.5 the symmetric JSD.")


def check_top_k(top_k: int | None) -> None:
    """Raise ConfigError unless `top_k` is a number of tokens, or None."""
    if top_k is not None and top_k < 1:
        raise ConfigError(f"Expected top_k of at least 1, got {top_k}. null takes the full vocabulary.")


# Weights, computed once per optimizer step


class StepTotals(NamedTuple):
    """Counts over one whole optimizer step: all micro-batches of all ranks."""

    rows: int
    """Rollouts, empty ones included."""
    tokens: int
    """Counted tokens."""


def token_weights(
    mask: Tensor,
    mode: AggregationMode,
    norm: float | None = None,
    *,
    totals: StepTotals | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Weight of each token, so that a loss is `(values * weights).sum()`.

        token-mean                mask / tokens
        seq-mean-token-mean       mask / tokens of the row / rows
        seq-mean-token-sum-norm   mask / norm / rows

    Without `totals` the mask is the whole step. With them it is any share of the step that holds whole rows: every rank
    counts its own, the counts are summed over ranks once, and the weights of all shares are those of the joint mask.

    Args:
        mask: [N, T] bool, True = counted. An empty row is a row: it counts as 0 in both seq-means.
        mode: one of the three above.
        norm: seq-mean-token-sum-norm only; T unless given, and required with `totals` (T of a share is an accident).
        totals: counts over the whole step, where `mask` is only a part of it.
        dtype: of the weights; a mask has no float dtype to keep.

    Returns:
        [N, T], 0 where not counted; all 0 for an empty mask.

    Raises:
        ConfigError: unknown `mode`; `norm` not above 0, or missing beside `totals`.
    """
    if mode not in get_args(AggregationMode):
        raise ConfigError(f"Unknown aggregation mode {mode!r}: expected one of {', '.join(get_args(AggregationMode))}.")
    counted = mask.to(dtype)
    rows, tokens = totals or StepTotals(mask.shape[0], int(mask.sum()))
    if mode == "token-mean":
        return counted / max(tokens, 1)
    if mode == "seq-mean-token-mean":
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1) / max(rows, 1)
    if norm is None and totals is not None:
        raise ConfigError("seq-mean-token-sum-norm over several ranks needs norm: the width of a mask differs by rank.")
    if norm is not None and norm <= 0:
        raise ConfigError(f"Expected norm above 0, got {norm}. It is the length that a row sum is divided by.")
    return counted / (norm or max(mask.shape[1], 1)) / max(rows, 1)


def aggregate(values: Tensor, mask: Tensor, mode: AggregationMode, norm: float | None = None) -> Tensor:
    """One loss from per-token values: `(values * token_weights(mask, mode, norm)).sum()`.

    Args:
        values: [N, T]; what stands at uncounted positions does not matter, be it NaN.
        mask: [N, T] bool, True = counted.
        mode: see `token_weights`.
        norm: see `token_weights`.

    Returns:
        Scalar in the dtype of `values`; 0 for an empty mask.
    """
    assert values.shape == mask.shape, f"one mask entry per value, got {tuple(mask.shape)} for {tuple(values.shape)}"
    weights = token_weights(mask, mode, norm, dtype=torch.promote_types(values.dtype, torch.float32))
    return (values.masked_fill(mask.logical_not(), 0) * weights).sum().to(values.dtype)


def query_weights(num_query_tokens: Tensor, group_weights: Tensor, num_trajectories: int | None = None) -> Tensor:
    """JSD weight of each query token of a trajectory.

        group_weight / |Q_tau| / number of trajectories with queries in the whole step

    The denominator counts every trajectory that has queries, taught or not: a rule that drops groups then lowers the
    loss, instead of raising the weight of those that stay.

    Args:
        num_query_tokens: [N] |Q_tau|; 0 for a trajectory without queries.
        group_weights: [N] `group_weight` of the trajectory's group; 0 where nothing is taught.
        num_trajectories: the denominator, where these N are only a share of the step (summed over ranks).

    Returns:
        [N] in the dtype of `group_weights`: what each of the trajectory's query tokens weighs; 0 without queries.
    """
    has_queries = num_query_tokens > 0
    if num_trajectories is None:
        num_trajectories = int(has_queries.sum())
    return group_weights * has_queries / num_query_tokens.clamp(min=1) / max(num_trajectories, 1)


def group_weight(labels: Sequence[Label | None], rule: GroupsRule = "all") -> float:
    """How much the JSD loss of a group counts, from the share p of its rollouts that are CORRECT.

        all           1
        any_correct   1 if p > 0, else 0
        mixed         1 if 0 < p < 1, else 0
        sqrt          2 * sqrt(p * (1 - p)): 1 at p = 1/2, 0 for a group without contrast

    Args:
        labels: hindsight labels of the group; None (a rollout that must not be judged) is left out.
        rule: one of the four above.

    Returns:
        In [0, 1].

    Raises:
        ConfigError: unknown `rule`.
    """
    known = [label for label in labels if label is not None]
    correct = sum(label is Label.CORRECT for label in known) / max(len(known), 1)
    match rule:
        case "all":
            return 1.0
        case "any_correct":
            return float(correct > 0)
        case "mixed":
            return float(0 < correct < 1)
        case "sqrt":
            return 2 * math.sqrt(correct * (1 - correct))
    raise ConfigError(f"Unknown groups rule {rule!r}: expected one of {', '.join(get_args(GroupsRule))}.")
