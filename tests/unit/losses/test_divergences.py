"""Every formula on every support against plain-Python sums, in float64 to 1e-12; what else each option promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor

from helpers.divergences import CASES, FORMULAS, INF, PLACES, Q, V, by_hand, each_case, matches, randn
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    Support,
    SupportedDivergence,
)
from sdsearch_lightning.losses.terms import jensen_shannon

# Values and gradients


@each_case
@pytest.mark.parametrize("top_k", [1, 3, 7, V - 1, V, 50])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_closed_form(name: str, options: dict[str, str], top_k: int, scale: float) -> None:
    student, teacher = randn(Q, V, seed=1, scale=scale), randn(Q, V, seed=2, scale=scale)
    actual = FORMULAS[name](top_k=top_k, **options).divergence(student, teacher)
    expected = by_hand(name, student, teacher, top_k, **options)
    assert actual.dtype == torch.float64 and (actual >= 0).all()
    assert matches(actual, expected)
    assert not matches(actual + 1e-11, expected)
    if top_k > 1:
        moved = teacher + 1e-4 * randn(Q, V, seed=3)
        assert not matches(FORMULAS[name](top_k=top_k, **options).divergence(student, moved), expected)


@each_case
@pytest.mark.parametrize("top_k", [1, 3, V - 1, V])
def test_the_gradient_is_that_of_finite_differences(name: str, options: dict[str, str], top_k: int) -> None:
    student, teacher = randn(3, V, seed=4).requires_grad_(), randn(3, V, seed=5).requires_grad_()
    divergence, weights = FORMULAS[name](top_k=top_k, **options), torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        return (divergence.divergence(logits, teacher) * weights).sum()

    (actual,) = torch.autograd.grad(loss(student), student)
    slopes = torch.zeros_like(student)
    for index in range(student.numel()):
        nudge = torch.zeros(student.numel(), dtype=torch.float64).index_fill(0, torch.tensor(index), 1e-5)
        up, down = (loss(student.detach() + sign * nudge.view_as(student)).item() for sign in (1, -1))
        slopes.view(-1)[index] = (up - down) / 2e-5
    assert matches(actual, slopes, 1e-8)
    assert not matches(actual * (1 + 1e-6) + 1e-7, slopes, 1e-8)
    # One token that both have in their support is certain on both sides; else something has to move.
    certain = top_k == 1 and "tail" in options and options["tail"] == "renormalize" and options["support"] != "union"
    assert actual.any() != (certain or (top_k == 1 and name == "centered mse" and options["support"] != "union"))


@each_case
def test_no_gradient_reaches_the_teacher(name: str, options: dict[str, str]) -> None:
    student, teacher = randn(Q, V, seed=1).requires_grad_(), randn(Q, V, seed=2).requires_grad_()
    FORMULAS[name](top_k=3, **options).divergence(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.any()


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [None, 4])
def test_equal_rows_are_exactly_zero(name: str, options: dict[str, str], dtype: torch.dtype, top_k: int | None) -> None:
    if top_k is None:
        options = {}
    logits = randn(64, 33, seed=7, scale=4).to(dtype)
    logits[0, :] = 0.0
    logits[1, 3:] = -INF  # fewer tokens than the support
    student = logits.clone().requires_grad_()
    values = FORMULAS[name](top_k=top_k, **options).divergence(student, logits)
    values.sum().backward()
    assert torch.equal(values, torch.zeros(64, dtype=dtype)), "exactly, not nearly"
    assert student.grad is not None and student.grad.abs().max() <= (1e-6 if name == "forward" else 0)
    nudged = logits + randn(64, 33, seed=8).to(dtype)
    assert (FORMULAS[name](top_k=top_k, **options).divergence(nudged, logits)[2:] > 0).all()


@pytest.mark.parametrize(("support", "tail"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_jensen_shannon_divergence_is_at_most_ln_2(
    support: Any, tail: Any, dtype: torch.dtype, scale: float
) -> None:
    student, teacher = randn(500, 40, seed=8, scale=scale).to(dtype), randn(500, 40, seed=9, scale=scale).to(dtype)
    options = {"top_k": 5, "support": support, "tail": tail}
    values = JensenShannon(**options).divergence(student, teacher)
    assert (values >= 0).all() and (values <= math.log(2) + 2 * torch.finfo(dtype).eps).all()
    if scale == 1e4:
        assert values.max() > math.log(2) - 1e-6, "the bound is met"
        assert max(kind(**options).divergence(student, teacher).max() for kind in (ForwardKL, ReverseKL)) > 1e3
    if support == "union":
        assert matches(values, JensenShannon(**options).divergence(teacher, student).double(), 1e-6), "symmetric"


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_minus_infinity_is_finite_and_carries_no_gradient(
    name: str, options: dict[str, str], dtype: torch.dtype
) -> None:
    ours = [[1.0, -INF, 0.0, 2.0, -1.0], [-INF, -INF, -INF, 0.0, -INF], [3.0, 0.0, 1.0, -INF, -INF]]
    theirs = [[0.0, -INF, 0.5, -INF, 3.0], [5.0, 1.0, -INF, 0.0, -INF], [0.0, 2.0, 1.0, -INF, -INF]]
    student, teacher = torch.tensor(ours, dtype=dtype), torch.tensor(theirs, dtype=dtype)
    student.requires_grad_()
    values = FORMULAS[name](top_k=2, **options).divergence(student, teacher)
    values.sum().backward()
    assert values.dtype == dtype and values.isfinite().all() and (values >= 0).all() and values[2] > 0
    assert student.grad is not None and student.grad.isfinite().all()
    assert (student.grad[student.isneginf()] == 0).all()


@each_case
def test_nan_is_not_hidden_and_no_rows_are_no_loss(name: str, options: dict[str, str]) -> None:
    divergence = FORMULAS[name](top_k=2, **options)
    assert divergence.divergence(torch.full((1, 4), math.nan), torch.zeros(1, 4)).isnan().all()
    assert divergence.divergence(torch.zeros(1, 4), torch.full((1, 4), math.nan)).isnan().all()
    none = torch.zeros(0, V, requires_grad=True)
    values = divergence.divergence(none, torch.zeros(0, V))
    assert values.shape == (0,)
    values.sum().backward()


@each_case
def test_half_precision_is_computed_in_float32(name: str, options: dict[str, str]) -> None:
    student, teacher = randn(32, 100, seed=10).bfloat16(), randn(32, 100, seed=11).bfloat16()
    divergence = FORMULAS[name](top_k=20, **options)
    wide = divergence.divergence(student.float(), teacher.float())
    assert torch.equal(divergence.divergence(student, teacher), wide.bfloat16())
    assert not torch.equal(divergence.divergence(student, teacher), (wide * 1.02).bfloat16())


# Each option does something


def test_no_two_settings_are_the_same_loss() -> None:
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2)
    settings = {f"{name} full": FORMULAS[name](top_k=None) for name in FORMULAS}
    settings |= {f"{name} {k} {o}": FORMULAS[name](top_k=k, **o) for (name, o) in CASES for k in (3, 4)}
    values = {name: divergence.divergence(student, teacher) for name, divergence in settings.items()}
    assert len(values) == 6 + 2 * len(CASES)
    for (one, a), (other, b) in itertools.combinations(values.items(), 2):
        assert not torch.allclose(a, b, rtol=0, atol=1e-4), (one, other)


def test_the_defaults_are_the_papers() -> None:
    student, teacher = randn(3, 80, seed=12), randn(3, 80, seed=13)
    assert torch.equal(JensenShannon().divergence(student, teacher), jensen_shannon(student, teacher, 0.5, 50))
    assert not torch.equal(JensenShannon().divergence(student, teacher), jensen_shannon(student, teacher))
    for kind, beta in ((ForwardKL, 0), (ReverseKL, 1)):
        assert torch.equal(kind().divergence(student, teacher), jensen_shannon(student, teacher, beta, 50))
        assert torch.equal(kind().divergence(student, teacher), JensenShannon(beta).divergence(student, teacher))


@each_case
def test_a_support_as_large_as_the_vocabulary_is_the_vocabulary(name: str, options: dict[str, str]) -> None:
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2)
    full = FORMULAS[name](top_k=None).divergence(student, teacher)
    for top_k in (V, V + 1, 50):
        assert torch.equal(FORMULAS[name](top_k=top_k, **options).divergence(student, teacher), full)
    if options.get("tail") == "bucket":  # the last token alone in the bucket, or nothing where the union holds all
        assert matches(FORMULAS[name](top_k=V - 1, **options).divergence(student, teacher), full)
    else:
        below = FORMULAS[name](top_k=V - 2, **options).divergence(student, teacher)
        assert not matches(below, full) or options["support"] == "union"


# MSE on logits


def test_a_constant_counts_unless_rows_are_centered() -> None:
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2)
    for options in ({}, {"top_k": 4, "support": "union"}):
        plain, centered = LogitMSE(**options), LogitMSE(**options, centered=True)  # type: ignore[arg-type]
        assert matches(plain.divergence(teacher + 3.0, teacher), [9.0] * Q)
        assert matches(centered.divergence(teacher + 3.0, teacher), [0.0] * Q)
        moved = centered.divergence(student + 3.0, teacher), centered.divergence(student, teacher)
        assert matches(*moved) and (moved[0] > 0.1).all()
    assert JensenShannon().divergence(teacher + 3.0, teacher).max() < 1e-15, "no probability has moved"


def test_centered_mse_is_kl_at_high_temperature() -> None:
    student, teacher, temperature = randn(Q, V, seed=1), randn(Q, V, seed=2), 1e4
    soft = ForwardKL(top_k=None).divergence(student / temperature, teacher / temperature)
    centered = LogitMSE(top_k=None, centered=True).divergence(student, teacher)
    torch.testing.assert_close(2 * temperature**2 * soft, centered, rtol=1e-3, atol=0)


def test_logits_of_minus_infinity_are_left_out_of_the_mean() -> None:
    student = torch.tensor([[1.0, -INF, 4.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 3.0, 1.0, -INF]], dtype=torch.float64)
    assert matches(LogitMSE().divergence(student, teacher), [(1 + 9) / 2])
    assert matches(LogitMSE(centered=True).divergence(student, teacher), [1.0])


# What is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JensenShannon(beta=1.5), r"beta in \[0, 1\], got 1.5"),
        (lambda: JensenShannon(beta=math.nan), r"beta in \[0, 1\], got nan"),
        (lambda: ForwardKL(top_k=0), "top_k of at least 1, got 0"),
        (lambda: ReverseKL(support="both"), "Unknown support 'both': expected one of teacher, student, union"),  # type: ignore[arg-type]
        (lambda: JensenShannon(tail="drop"), "Unknown tail 'drop': expected one of renormalize, bucket"),  # type: ignore[arg-type]
        (lambda: JensenShannon(top_k=None, support="student"), "support 'student' has no meaning with top_k null"),
        (lambda: LogitMSE(top_k=None, support="union"), "support 'union' has no meaning with top_k null"),
        (lambda: ReverseKL(top_k=None, tail="bucket"), "tail 'bucket' has no meaning with top_k null"),
    ],
)
def test_options_without_meaning_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_support_beyond_the_vocabulary_is_refused_unless_it_is_the_default() -> None:
    with pytest.raises(ConfigError, match=r"divergence.top_k: expected 1 to 99 .* or null for all of it, found 100"):
        JensenShannon(top_k=100, support="student", tail="bucket").check(99)
    for top_k, size in ((100, 100), (None, 3), (50, 3), (7, 7)):
        JensenShannon(top_k=top_k).check(size)


def parse(*arguments: str) -> Any:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--divergence", type=Divergence)
    return parser.instantiate(parser.parse_args(arguments)).divergence


def test_a_config_names_class_and_options() -> None:
    options = ("--divergence.support=student", "--divergence.tail=bucket", "--divergence.top_k=100")
    made = parse("--divergence=JensenShannon", *options)
    assert isinstance(made, JensenShannon) and made.support == Support(100, "student", "bucket")
    assert parse("--divergence=LogitMSE", "--divergence.top_k=null").support.top_k is None
    for wrong in (
        ["JensenShannon", "support=both"],
        ["LogitMSE", "tail=bucket"],
        ["Jensen"],
        ["ForwardKL", "beta=0.1"],
    ):
        with pytest.raises(jsonargparse.ArgumentError):
            parse(f"--divergence={wrong[0]}", *(f"--divergence.{option}" for option in wrong[1:]))


# Your own


class Hellinger(SupportedDivergence):
    """Squared Hellinger distance."""

    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return 1 - (student_logits.softmax(-1) * teacher_logits.softmax(-1)).sqrt().sum(-1)


class Mine:
    def divergence(self, student_logits, teacher_logits):  # type: ignore[no-untyped-def]
        return (student_logits - teacher_logits).abs().amax(-1)


def test_a_formula_of_your_own_has_every_support() -> None:
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2)
    values = [Hellinger(4, support, tail).divergence(student, teacher) for support, tail in PLACES]  # type: ignore[arg-type]
    assert all(((0 < value) & (value < 1)).all() for value in values)
    assert all(not matches(a, b, 1e-6) for a, b in itertools.combinations(values, 2))
    assert Hellinger(4).teacher_top_k == 4


def test_a_look_alike_class_counts() -> None:
    assert issubclass(Mine, Divergence) and not issubclass(int, Divergence)
    assert isinstance(parse(f"--divergence={__name__}.Mine"), Mine)
