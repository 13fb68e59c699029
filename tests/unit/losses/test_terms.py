"""Per-token losses against plain-Python closed forms and finite differences, in float64 to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.terms import clipped_surrogate, jensen_shannon, kl_k3

BETAS = [0, 0.1, 0.5, 0.9, 1]
INF = math.inf


def matches(actual: Tensor, expected: Tensor | float | list, tolerance: float = 1e-12) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return torch.allclose(actual.double(), expected, rtol=0, atol=tolerance)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a scalar function, one coordinate at a time."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        delta = torch.zeros_like(at).view(-1)
        delta[index] = step
        delta = delta.view_as(at)
        gradient.view(-1)[index] = (function(at + delta) - function(at - delta)) / (2 * step)
    return gradient


# jensen_shannon


def softmax_by_hand(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def jensen_shannon_by_hand(student: Tensor, teacher: Tensor, beta: float, top_k: int | None = None) -> list[float]:
    def kl(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    values = []
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        support = sorted(range(len(t_row)), key=lambda token: -t_row[token])[:top_k]
        s = softmax_by_hand([s_row[token] for token in support])
        t = softmax_by_hand([t_row[token] for token in support])
        m = [(1 - beta) * a + beta * b for a, b in zip(s, t, strict=True)]
        values.append(kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta * kl(t, m) + (1 - beta) * kl(s, m))
    return values


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 1, 3, 11, 50])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_jensen_shannon_is_the_closed_form(beta: float, top_k: int | None, scale: float) -> None:
    student, teacher = randn(6, 11, seed=1, scale=scale), randn(6, 11, seed=2, scale=scale)
    actual = jensen_shannon(student, teacher, beta, top_k)
    expected = jensen_shannon_by_hand(student, teacher, beta, top_k)
    assert actual.dtype == torch.float64
    assert matches(actual, expected)
    assert not matches(actual + 1e-11, expected)
    if top_k != 1:  # on one token both sides are certain
        nudged = teacher.clone()
        nudged[:, 0] += 1e-3
        assert not matches(jensen_shannon(student, nudged, beta, None), jensen_shannon_by_hand(student, teacher, beta))
        swapped = jensen_shannon(teacher, student, beta, None)
        assert matches(swapped, jensen_shannon_by_hand(student, teacher, beta)) == (beta == 0.5)


def test_the_support_is_the_teachers() -> None:
    student, teacher = randn(4, 9, seed=3, scale=3), randn(4, 9, seed=4, scale=3)
    students_support = jensen_shannon(teacher, student, 0.5, 3)  # symmetric in all but the support
    assert not matches(jensen_shannon(student, teacher, 0.5, 3), students_support)
    kept = teacher.topk(3).indices  # what a teacher that kept only its top k hands over
    gathered = jensen_shannon(student.gather(1, kept), teacher.gather(1, kept))
    assert matches(jensen_shannon(student, teacher, 0.5, 3), gathered)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_gradient_is_that_of_finite_differences_and_the_teacher_has_none(beta: float, top_k: int | None) -> None:
    student, teacher = randn(3, 7, seed=5).requires_grad_(), randn(3, 7, seed=6).requires_grad_()
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    (jensen_shannon(student, teacher, beta, top_k) * weights).sum().backward()
    expected = finite_differences(
        lambda logits: (jensen_shannon(logits, teacher.detach(), beta, top_k) * weights).sum(), student.detach()
    )
    assert teacher.grad is None
    assert student.grad is not None
    assert matches(student.grad, expected, 1e-9)
    assert not matches(student.grad * (1 + 1e-6) + 1e-8, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 5])
def test_equal_rows_give_exactly_zero_with_zero_gradient(dtype: torch.dtype, beta: float, top_k: int | None) -> None:
    logits = randn(64, 33, seed=7, scale=4).to(dtype)
    logits[0, :] = 0.0
    logits[1, 3:] = -INF
    student = logits.clone().requires_grad_()
    values = jensen_shannon(student, logits, beta, top_k)
    values.sum().backward()
    assert student.grad is not None
    assert torch.equal(values, torch.zeros(64, dtype=dtype))
    assert student.grad.abs().max() <= (1e-6 if beta == 0 else 0)
    nudged = logits.clone()
    nudged[:, 0] += 1.0
    assert (jensen_shannon(nudged, logits, beta)[2:] > 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_bounds_and_symmetry(dtype: torch.dtype, scale: float) -> None:
    student, teacher = randn(500, 40, seed=8, scale=scale).to(dtype), randn(500, 40, seed=9, scale=scale).to(dtype)
    eps = torch.finfo(dtype).eps
    for beta in BETAS:
        values = jensen_shannon(student, teacher, beta)
        assert (values >= 0).all()
        assert matches(values, jensen_shannon(teacher, student, 1 - beta), 50 * eps * max(1.0, scale))
    symmetric = jensen_shannon(student, teacher)
    assert (symmetric <= math.log(2) + 2 * eps).all()
    if scale == 1e4:  # disjoint: the bound is met, and the ends of beta are not bounded
        assert symmetric.max() > math.log(2) - 1e-6
        assert jensen_shannon(student, teacher, 0).max() > 1e3


def test_small_differences_keep_their_digits() -> None:
    """JSD is the square of a distance: at 1e-6 apart it is 1e-13, below the rounding of any formula that subtracts."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[1e-6, -1e-6]], dtype=torch.float64)
    assert jensen_shannon(student, teacher).item() == pytest.approx(1e-12 / 8, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [None, 2])
def test_minus_infinity_is_probability_zero(dtype: torch.dtype, beta: float, top_k: int | None) -> None:
    student = torch.tensor(
        [[1.0, -INF, 0.0, 2.0], [-INF, -INF, -INF, 0.0], [6e4, -6e4, -INF, 0.0], [0.0, 1.0, -INF, -INF]], dtype=dtype
    )
    teacher = torch.tensor(
        [[1.0, -INF, 0.5, 2.0], [5.0, 1.0, -INF, -INF], [-6e4, 6e4, 0.0, -INF], [2.0, 1.0, -INF, -INF]], dtype=dtype
    )
    student.requires_grad_()
    values = jensen_shannon(student, teacher, beta, top_k)
    values.sum().backward()
    assert student.grad is not None
    assert values.dtype == dtype
    assert values.isfinite().all() and (values >= 0).all()
    assert student.grad.isfinite().all()
    assert (student.grad[student.isinf()] == 0).all()
    kept = jensen_shannon(student[3:, :2], teacher[3:, :2], beta)  # tokens banned on both sides are as if absent
    assert torch.equal(values[3:], kept)
    assert kept > 0.01


def test_extreme_logits_are_not_cut() -> None:
    student = torch.tensor([[1e5, -1e5]], dtype=torch.float64, requires_grad=True)
    forward = jensen_shannon(student, -student.detach(), beta=0)
    forward.sum().backward()
    assert matches(forward, [2e5]) and matches(jensen_shannon(student, -student.detach(), beta=1), [2e5])
    assert student.grad is not None
    assert matches(student.grad, [[1.0, -1.0]])  # S - T


def test_nan_is_not_hidden() -> None:
    assert jensen_shannon(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = randn(32, 100, seed=10).to(dtype), randn(32, 100, seed=11).to(dtype)
    wide = jensen_shannon(student.float(), teacher.float())
    assert torch.equal(jensen_shannon(student, teacher), wide.to(dtype))
    assert not torch.equal(jensen_shannon(student, teacher), (wide * 1.02).to(dtype))


@pytest.mark.parametrize("top_k", [None, 2])
def test_no_query_tokens_are_no_loss_and_no_nan(top_k: int | None) -> None:
    student = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    values = jensen_shannon(student, torch.zeros(0, 5, dtype=torch.float64), top_k=top_k)
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None and student.grad.shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": beta}, rf"beta in \[0, 1\], got {beta}") for beta in (-0.01, 1.01, math.nan)]
    + [({"top_k": 0}, "top_k of at least 1, got 0")],
)
def test_impossible_divergences_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), **options)  # type: ignore[arg-type]


# clipped_surrogate and kl_k3


def test_clipped_surrogate_by_hand() -> None:
    sampled, policy, advantages = randn(4, 6, seed=14), randn(4, 6, seed=15, scale=0.3), randn(4, 1, seed=16)
    policy += sampled
    expected = []
    for p_row, s_row, (advantage,) in zip(policy.tolist(), sampled.tolist(), advantages.tolist(), strict=True):
        ratios = [math.exp(p - s) for p, s in zip(p_row, s_row, strict=True)]
        expected.append([-min(r * advantage, min(max(r, 0.8), 1.3) * advantage) for r in ratios])
    actual = clipped_surrogate(policy, sampled, advantages, 0.2, 0.3)
    assert actual.dtype == torch.float64
    assert matches(actual, expected)
    assert not matches(clipped_surrogate(policy, sampled, advantages, 0.2, 0.2), expected)
    assert not matches(clipped_surrogate(policy, sampled, advantages, 0.3, 0.3), expected)
    assert not matches(actual + 1e-11, expected)


def test_clipped_surrogate_gradient() -> None:
    """A on policy; r * A inside the clip; none where the clip binds, which depends on the sign of A."""
    sampled = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    ratios = torch.tensor([1.0, 1.1, 0.5, 2.0], dtype=torch.float64)
    policy = ratios.log().expand(2, 4).clone().requires_grad_()
    advantages = torch.tensor([[2.0], [-2.0]], dtype=torch.float64, requires_grad=True)
    clipped_surrogate(policy, sampled, advantages, 0.2, 0.2).sum().backward()
    assert policy.grad is not None
    expected = [[-2.0, -2.2, -1.0, 0.0], [2.0, 2.2, 0.0, 4.0]]
    assert matches(policy.grad, expected)
    assert not matches(policy.grad, (torch.tensor(expected) * 1.001).tolist())
    assert sampled.grad is None and advantages.grad is None


def test_kl_k3_by_hand_and_its_gradient() -> None:
    policy, reference = randn(3, 5, seed=17), randn(3, 5, seed=18)
    expected = [
        [math.exp(r - p) - (r - p) - 1 for p, r in zip(p_row, r_row, strict=True)]
        for p_row, r_row in zip(policy.tolist(), reference.tolist(), strict=True)
    ]
    actual = kl_k3(policy, reference)
    assert matches(actual, expected) and (actual >= 0).all()
    assert not matches(kl_k3(reference, policy), expected)
    assert not matches(actual + 1e-11, expected)
    live, still = policy.clone().requires_grad_(), reference.clone().requires_grad_()
    kl_k3(live, still).sum().backward()
    assert live.grad is not None and still.grad is None
    assert matches(live.grad, (1 - (reference - policy).exp()).tolist())


def test_kl_k3_keeps_the_digits_of_a_small_difference() -> None:
    close = kl_k3(torch.zeros(1), torch.full((1,), 1e-3))
    assert close.item() == pytest.approx(0.5e-6, rel=1e-3)
    assert torch.equal(kl_k3(close, close), torch.zeros(1))
