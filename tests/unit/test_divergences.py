"""Every formula on every support against plain-Python sums over named tokens, in float64 to 1e-12."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jsonargparse
import pytest
import torch
from torch import Tensor

from sdsearch_lightning.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    Support,
    SupportedDivergence,
)
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses import jensen_shannon

Q, V, INF = 5, 11, math.inf
SUPPORTS = ["teacher", "student", "union"]
PLACES = list(itertools.product(SUPPORTS, ["renormalize", "bucket"]))
FORMULAS: dict[str, Callable[..., SupportedDivergence]] = {
    "jsd": JensenShannon,
    "jsd .1": lambda **options: JensenShannon(0.1, **options),
    "forward": ForwardKL,
    "reverse": ReverseKL,
    "mse": LogitMSE,
    "centered mse": lambda **options: LogitMSE(centered=True, **options),
}
CASES = [
    (name, {"support": support} | ({} if "mse" in name else {"tail": tail}))
    for name, (support, tail) in itertools.product(FORMULAS, PLACES)
    if tail == "renormalize" or "mse" not in name
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v.values()))  # fmt: skip


def randn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def matches(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return torch.allclose(actual.double(), expected, rtol=0, atol=tolerance)


# By hand


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def supported_tokens(student: list[float], teacher: list[float], top_k: int | None, support: str) -> set[int]:
    def top(row: list[float]) -> set[int]:
        return set(sorted(range(len(row)), key=lambda token: -row[token])[:top_k])

    return {"teacher": top(teacher), "student": top(student), "union": top(student) | top(teacher)}[support]


def one_row(name: str, s_row: list[float], t_row: list[float], k: int | None, support: str, tail: str) -> float:
    tokens = supported_tokens(s_row, t_row, k, support)
    if "mse" in name:
        gaps = [s_row[token] - t_row[token] for token in tokens]
        mean = math.fsum(gaps) / len(gaps) if name == "centered mse" else 0
        return math.fsum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    if tail == "renormalize":
        s, t = (softmax([row[token] for token in tokens]) for row in (s_row, t_row))
    else:
        whole = softmax(s_row), softmax(t_row)
        s, t = ([p[i] for i in tokens] + [math.fsum(p[i] for i in range(len(p)) if i not in tokens)] for p in whole)
    beta = {"jsd": 0.5, "jsd .1": 0.1}.get(name)
    if beta is None:
        return kl(t, s) if name == "forward" else kl(s, t)
    m = [(1 - beta) * a + beta * b for a, b in zip(s, t, strict=True)]
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def by_hand(name: str, student: Tensor, teacher: Tensor, k: int | None, support: str, tail: str = "") -> list[float]:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return [one_row(name, s, t, k, support, tail or "renormalize") for s, t in rows]


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
@pytest.mark.parametrize("top_k", [1, 3, V])
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
    student = torch.tensor([[1.0, -INF, 0.0, 2.0, -1.0], [-INF, -INF, -INF, 0.0, -INF], [3.0, 0, 1, -INF, -INF]], dtype=dtype)  # fmt: skip
    teacher = torch.tensor([[0.0, -INF, 0.5, -INF, 3.0], [5.0, 1.0, -INF, 0.0, -INF], [0.0, 2, 1, -INF, -INF]], dtype=dtype)  # fmt: skip
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


# Supports


@pytest.mark.parametrize(("support", "tail"), PLACES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_the_support_holds_the_tokens_it_says(support: Any, tail: Any, top_k: int) -> None:
    student, teacher = randn(40, V, seed=1), randn(40, V, seed=2)
    sides = Support(top_k, support, tail).narrow(student, teacher)
    width = top_k * (2 if support == "union" else 1) + (tail == "bucket")
    sizes = set()
    for row in range(40):
        tokens = supported_tokens(student[row].tolist(), teacher[row].tolist(), top_k, support)
        sizes.add(len(tokens))
        for narrow, whole in zip(sides, (student, teacher), strict=True):
            assert narrow.shape == (40, width)
            held = narrow[row, : width - 1] if tail == "bucket" else narrow[row]
            wanted = whole[row].log_softmax(-1) if tail == "bucket" else whole[row]
            assert matches(held[held.isfinite()].sort().values, wanted[sorted(tokens)].sort().values)
    assert sizes == {top_k} if support != "union" else {top_k} < sizes and max(sizes) > top_k


def test_a_union_pairs_its_places_and_pads_them_together() -> None:
    student, teacher = randn(40, V, seed=1), randn(40, V, seed=2)
    ours, theirs = Support(4, "union").narrow(student, teacher)
    assert torch.equal(ours.isneginf(), theirs.isneginf()) and ours.isneginf().any()
    for row in range(40):
        pairs = set(zip(student[row].tolist(), teacher[row].tolist(), strict=True))
        there = ours[row].isfinite()
        assert set(zip(ours[row, there].tolist(), theirs[row, there].tolist(), strict=True)) <= pairs
    same = JensenShannon(0.5, 4, "union").divergence(student, student * 0.5)  # one order of tokens, so one top 4
    assert matches(same, JensenShannon(0.5, 4, "teacher").divergence(student, student * 0.5))


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_bucket_holds_all_the_remaining_mass(support: Any) -> None:
    student, teacher = randn(40, V, seed=1), randn(40, V, seed=2)
    for narrow, whole in zip(Support(3, support, "bucket").narrow(student, teacher), (student, teacher), strict=True):
        assert matches(narrow.exp().sum(-1), torch.ones(40, dtype=torch.float64), 1e-14)
        assert matches(narrow.softmax(-1), narrow.exp()), "already a distribution"
        for row in range(40):
            p = softmax(whole[row].tolist())
            tokens = supported_tokens(student[row].tolist(), teacher[row].tolist(), 3, support)
            rest = math.fsum(p[i] for i in range(V) if i not in tokens)
            assert narrow[row, -1].exp().item() == pytest.approx(rest, rel=1e-12)
    dropped, _ = Support(3, support).narrow(student, teacher)
    assert (dropped.log_softmax(-1).exp().sum(-1) - 1).abs().max() < 1e-14, "renormalised instead"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tiny_tail_keeps_its_digits_and_its_gradient(dtype: torch.dtype) -> None:
    """exp(-60) is far below what 1 - (the mass inside) can tell from 0."""
    logits = torch.tensor([[0.0, -1.0, -60.0, -61.0]], dtype=dtype, requires_grad=True)
    (tail,) = Support(2, "teacher", "bucket").narrow(logits, logits)[0][:, -1]
    expected = math.log(math.exp(-60) + math.exp(-61)) - math.log(1 + math.exp(-1))
    assert tail.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-14)
    tail.backward()
    share = 1 / (1 + math.exp(-1))
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([-share, share - 1, share, 1 - share], rel=1e-5)


def test_only_a_bucket_sees_mass_that_leaves_the_support() -> None:
    teacher = torch.tensor([[3.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[3.0, 2.0, 5.0, 0.0]], dtype=torch.float64)  # most of its mass is on the third token
    dropped, counted = (JensenShannon(0.5, 2, "teacher", tail).divergence(student, teacher) for tail in ("renormalize", "bucket"))  # type: ignore[arg-type]  # fmt: skip
    assert dropped.item() == 0 and counted.item() > 0.2


@each_case
def test_a_teacher_that_kept_its_top_k_is_enough_where_it_says_so(name: str, options: dict[str, str]) -> None:
    divergence = FORMULAS[name](top_k=3, **options)
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2)
    kept = teacher.topk(3).indices
    narrow = divergence.divergence(student.gather(1, kept), teacher.gather(1, kept))
    whole = divergence.divergence(student, teacher)
    if options in ({"support": "teacher"}, {"support": "teacher", "tail": "renormalize"}):
        assert divergence.teacher_top_k == 3
        assert torch.equal(narrow, whole)
    else:
        assert divergence.teacher_top_k is None
        assert not matches(narrow, whole)
    assert FORMULAS[name](top_k=None).teacher_top_k is None


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
    made = parse("--divergence=JensenShannon", "--divergence.support=student", "--divergence.tail=bucket", "--divergence.top_k=100")  # fmt: skip
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
