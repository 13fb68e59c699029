"""Weights against plain-Python sums: no split of a batch, empty row or dropped group may change what a loss means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.weights import StepTotals, aggregate, group_weight, query_weights, token_weights
from sdsearch_lightning.types import Label

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def matches(actual: Tensor, expected: Tensor | float | list, tolerance: float = 1e-12) -> bool:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return torch.allclose(actual.double(), expected, rtol=0, atol=tolerance)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# token_weights and aggregate

MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)


def aggregate_by_hand(values: Tensor, mask: Tensor, mode: str, norm: float | None = None) -> float:
    rows = [
        [v for v, counted in zip(row, counts, strict=True) if counted]
        for row, counts in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    if mode == "token-mean":
        return math.fsum(sum(rows, [])) / len(sum(rows, []))
    if mode == "seq-mean-token-mean":
        return math.fsum(math.fsum(row) / len(row) if row else 0.0 for row in rows) / len(rows)
    return math.fsum(math.fsum(row) / (norm or values.shape[1]) for row in rows) / len(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", [None, 7.5])
def test_aggregate_by_hand(mode: str, norm: float | None) -> None:
    values = randn(4, 5, seed=19)
    expected = aggregate_by_hand(values, MASK, mode, norm)
    actual = aggregate(values, MASK, mode, norm)  # type: ignore[arg-type]
    weights = token_weights(MASK, mode, norm)  # type: ignore[arg-type]
    assert actual.shape == () and actual.dtype == torch.float64
    assert matches(actual, expected)
    assert matches((values * weights).sum(), expected)
    assert not matches(actual + 1e-11, expected)
    assert not matches(aggregate(values, ~MASK, mode, norm), expected)  # type: ignore[arg-type]
    for other in set(MODES) - {mode}:
        assert not matches(aggregate(values, MASK, other, norm), expected)  # type: ignore[arg-type]
    assert (weights[~MASK] == 0).all() and (weights[MASK] > 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
def test_an_empty_mask_is_zero_with_finite_gradients(mode: str, shape: tuple[int, int]) -> None:
    values = torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True)
    loss = aggregate(values, torch.zeros(shape, dtype=torch.bool), mode)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None and torch.equal(values.grad, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_uncounted_values_do_not_matter(mode: str) -> None:
    clean = randn(4, 5, seed=20)
    dirty = clean.masked_fill(~MASK, math.nan).requires_grad_()
    loss = aggregate(dirty, MASK, mode)  # type: ignore[arg-type]
    loss.backward()
    assert torch.equal(loss, aggregate(clean, MASK, mode))  # type: ignore[arg-type]
    assert dirty.grad is not None
    assert torch.equal(dirty.grad, token_weights(MASK, mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_of_the_values_is_kept(mode: str, dtype: torch.dtype) -> None:
    values = randn(4, 5, seed=21).to(dtype)
    loss = aggregate(values, MASK, mode)  # type: ignore[arg-type]
    assert loss.dtype == dtype
    exact = aggregate_by_hand(values.double(), MASK, mode)
    assert matches(loss, exact, torch.finfo(dtype).eps)
    assert not matches(loss * 1.1, exact, torch.finfo(dtype).eps)
    assert token_weights(MASK, mode, dtype=torch.float32).dtype == torch.float32  # type: ignore[arg-type]


def test_half_precision_weights_are_computed_in_float32() -> None:
    for length in range(1000, 1020):
        ones = torch.ones(1, length, dtype=torch.bfloat16)
        assert aggregate(ones, ones.bool(), "token-mean").item() == 1.0
        assert aggregate(ones * 1.01, ones.bool(), "token-mean").item() != 1.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (1, 1, 1, 1), (0, 3, 1)])
def test_no_split_over_micro_batches_or_ranks_changes_the_loss(mode: str, sizes: tuple[int, ...]) -> None:
    values, norm = randn(4, 5, seed=22), 5.0
    whole = aggregate(values, MASK, mode, norm)  # type: ignore[arg-type]
    totals = StepTotals(rows=4, tokens=int(MASK.sum()))
    total, mean_of_means = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for share, mask in zip(values.split(sizes), MASK.split(sizes), strict=True):
        widest = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any() else 0  # each share is padded to its own width
        share, mask = share[:, :widest], mask[:, :widest]
        total += (share * token_weights(mask, mode, norm, totals=totals)).sum()  # type: ignore[arg-type]
        mean_of_means += aggregate(share, mask, mode, norm) / len(sizes)  # type: ignore[arg-type]
    assert matches(total, whole.item())
    assert matches(mean_of_means, whole.item()) == (len(sizes) == 1 or (mode != "token-mean" and len(set(sizes)) == 1))


def test_impossible_aggregations_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="'mean': expected one of token-mean, seq-mean-token-mean, seq-mean-token-sum"
    ):
        token_weights(MASK, "mean")  # type: ignore[arg-type]
    for norm in (0, -1.0):
        with pytest.raises(ConfigError, match=f"norm above 0, got {norm}"):
            token_weights(MASK, "seq-mean-token-sum-norm", norm)
    with pytest.raises(ConfigError, match="needs norm"):
        token_weights(MASK, "seq-mean-token-sum-norm", totals=StepTotals(4, 9))


# The JSD term's weights


def test_query_weights_by_hand() -> None:
    counts = torch.tensor([4, 0, 2, 1])
    groups = torch.tensor([1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    weights = query_weights(counts, groups)
    # 3 trajectories have queries; the untaught one (group weight 0) stays in the denominator
    assert matches(weights, [1 / 4 / 3, 0.0, 0.5 / 2 / 3, 0.0])
    assert not matches(weights, [1 / 4 / 2, 0.0, 0.5 / 2 / 2, 0.0])
    shares = [query_weights(c, g, num_trajectories=3) for c, g in zip(counts.split(1), groups.split(1), strict=True)]
    assert torch.equal(torch.cat(shares), weights)


def test_the_jsd_term_is_a_mean_over_trajectories_of_means_over_query_tokens() -> None:
    counts = torch.tensor([3, 0, 5, 1])
    values = randn(9, seed=23).abs()
    loss = (values * query_weights(counts, torch.ones(4, dtype=torch.float64)).repeat_interleave(counts)).sum()
    expected = sum(math.fsum(part) / len(part) for part in map(Tensor.tolist, values.split([3, 5, 1]))) / 3
    assert matches(loss, expected)
    assert not matches(values.mean(), expected)  # token-mean is another loss


def test_no_queries_anywhere_weigh_nothing() -> None:
    assert torch.equal(query_weights(torch.zeros(3, dtype=torch.long), torch.ones(3)), torch.zeros(3))
    assert query_weights(torch.zeros(0, dtype=torch.long), torch.ones(0), num_trajectories=0).shape == (0,)


@pytest.mark.parametrize(
    ("labels", "all_", "any_correct", "mixed", "sqrt"),
    [
        ("CCCC", 1, 1, 0, 0),
        ("IIII", 1, 0, 0, 0),
        ("CIII", 1, 1, 1, math.sqrt(3) / 2),
        ("CCII", 1, 1, 1, 1),
        ("C", 1, 1, 0, 0),
        ("CI?", 1, 1, 1, 1),  # a rollout without a label is left out
        ("CC?", 1, 1, 0, 0),
        ("??", 1, 0, 0, 0),
        ("", 1, 0, 0, 0),
    ],
)
def test_group_weight(labels: str, all_: float, any_correct: float, mixed: float, sqrt: float) -> None:
    known = [{"C": Label.CORRECT, "I": Label.INCORRECT, "?": None}[letter] for letter in labels]
    assert group_weight(known) == group_weight(known, "all") == all_
    assert group_weight(known, "any_correct") == any_correct
    assert group_weight(known, "mixed") == mixed
    assert group_weight(known, "sqrt") == pytest.approx(sqrt, abs=1e-15)


def test_an_unknown_groups_rule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'some': expected one of all, any_correct, mixed, sqrt"):
        group_weight([Label.CORRECT], "some")  # type: ignore[arg-type]
