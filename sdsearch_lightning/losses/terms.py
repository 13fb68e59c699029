"""The terms of the loss: their names, once, and the arithmetic of each per token.

    L = policy_coef * policy_loss + kl_coef * kl + entropy_loss + jsd_weight * jsd_loss               (arXiv:2605.18299)

Losses are nouns, to be minimised. Invariant: a value says nothing of the batch it sits in; every normaliser lives in a
weight (weights.py), so that packing, micro-batches and ranks cannot change a loss.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import floored_log_softmax

Value = TypeVar("Value")


class Terms(NamedTuple, Generic[Value]):
    """One value per term of the loss: a sum of weighted values over tokens, or the coefficient of that sum.

    The output layer hands terms on as one tensor [K]; `stack_terms` and `unstack_terms` are the only places where their
    order means anything.

    Example:
        >>> terms = Terms(policy_loss=torch.tensor(2.0), kl=torch.tensor(3.0), entropy_loss=torch.tensor(0.0),
        ...               jsd_loss=torch.tensor(0.5))
        >>> total_loss(terms, Terms(policy_loss=1.0, kl=0.1, entropy_loss=0.0, jsd_loss=2.0))
        tensor(3.3000)
    """

    policy_loss: Value
    """Of `clipped_surrogate`, at every token that the policy sampled."""
    kl: Value
    """Of `kl_k3`, at the same tokens."""
    entropy_loss: Value
    """The policy's entropy by kind of token, its coefficients applied."""
    jsd_loss: Value
    """The divergence from the teacher, at the JSD positions."""


def stack_terms(terms: Terms[Tensor]) -> Tensor:
    """The terms as one tensor [K], in the order of the fields."""
    return torch.stack(tuple(terms))


def unstack_terms(values: Tensor) -> Terms[Tensor]:
    """The terms again, from what `stack_terms` made of them [K]."""
    return Terms(*values.unbind())


def total_loss(terms: Terms[Tensor], coefficients: Terms[float]) -> Tensor:
    """The loss: the terms with their coefficients. One of 0 is left out, so that not even a NaN of it counts.

    The policy's own term always stays: it ties the loss to the weights, where nothing else does.
    """
    loss = coefficients.policy_loss * terms.policy_loss
    for value, coefficient in zip(terms[1:], coefficients[1:], strict=True):
        if coefficient:
            loss = loss + coefficient * value
    return loss


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


def check_beta(beta: float) -> None:
    """Raise ConfigError unless `beta` is a share of a mixture."""
    if not 0 <= beta <= 1:
        raise ConfigError(f"Expected beta in [0, 1], got {beta}. 0 is KL(teacher || student), 0.5 the symmetric JSD.")


def check_top_k(top_k: int | None) -> None:
    """Raise ConfigError unless `top_k` is a number of tokens, or None."""
    if top_k is not None and top_k < 1:
        raise ConfigError(f"Expected top_k of at least 1, got {top_k}. null takes the full vocabulary.")
