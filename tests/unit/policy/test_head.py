"""The fused output layer against plain autograd: terms, gradients, chunks, and how often a row meets the layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.models import tiny_model
from sdsearch_lightning.policy import head
from sdsearch_lightning.policy.head import Chunk, Head, Outcome, Reading, common_factor, keep_logits, read_rows
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy

V, H = 13, 6
SIZES = (10, 0, 7)
MIXTURE = (1.0, 0.25, -0.5)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Layer:
    """A linear output layer that remembers what it was given.

    Args:
        dtype: of weights and rows.
        learns: whether the weights do.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, learns: bool = True) -> None:
        self.weight = nn.Parameter(randn(V, H, seed=0, dtype=dtype), requires_grad=learns)
        self.bias = nn.Parameter(randn(V, seed=1, dtype=dtype), requires_grad=learns)
        self.rows = [randn(size, H, seed=2 + i, dtype=dtype).requires_grad_() for i, size in enumerate(SIZES)]
        self.products: list[tuple[int, bool]] = []
        """Rows of each product, and whether a gradient was asked for."""

    @property
    def head(self) -> Head:
        weights = tuple(weight for weight in (self.weight, self.bias) if weight.requires_grad)
        return Head(self.project, weights, V)

    def project(self, rows: Tensor) -> Tensor:
        self.products.append((len(rows), torch.is_grad_enabled()))
        return nn.functional.linear(rows, self.weight, self.bias)

    def read(self, mixture: Sequence[float] | None, chunks: list[Chunk] | None = None) -> Outcome:
        """Three readings; the last one has pairs."""
        paired = randn(SIZES[2], H, seed=9, dtype=self.weight.dtype)
        pairs = [None, None, paired]
        readings = [
            Reading(torch.arange(size), Terms(10 * i, [] if chunks is None else chunks), pair)
            for i, (size, pair) in enumerate(zip(SIZES, pairs, strict=True))
        ]
        return read_rows(self.head, self.rows, readings, mixture)

    def pull(self, loss: Tensor) -> list[Tensor]:
        """Gradients in rows and weights."""
        inputs = [*self.rows, *(w for w in (self.weight, self.bias) if w.requires_grad)]
        return list(torch.autograd.grad(loss, inputs, retain_graph=True))


class Terms:
    """Three terms that no row shares with another: likelihood, entropy, and a distance to the pair."""

    def __init__(self, first: int, chunks: list[Chunk]) -> None:
        self.first, self.chunks = first, chunks

    def __call__(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        self.chunks.append(chunk)
        row = torch.arange(chunk.rows.start, chunk.rows.stop) + self.first
        weight = (1 + row % 5).to(torch.float32 if chunk.logits.dtype != torch.float64 else torch.float64)
        logprobs = chunk.logits.to(weight.dtype).log_softmax(-1)
        likelihood = logprobs.gather(1, (row % V)[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        distance = (logprobs - (0 if chunk.paired is None else chunk.paired.to(weight.dtype))).square().sum(-1)
        terms = torch.stack([(term * weight).sum() for term in (likelihood, entropy, distance)])
        return terms, likelihood.detach()


def total(outcome: Outcome, mixture: Sequence[float] = MIXTURE) -> Tensor:
    return (outcome.terms * outcome.terms.new_tensor(mixture)).sum()


@pytest.fixture(params=[(2**26, 256), (3 * V, 1), (1, 1), (4 * V + 1, 2)], ids=["one", "three", "single", "four"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a chunk."""
    most, least = request.param
    monkeypatch.setattr(head, "MAX_LOGITS", most)
    monkeypatch.setattr(head, "MIN_ROWS", least)
    return max(least, most // V)


# Fused is plain


@pytest.mark.parametrize("mixture", [MIXTURE, (0.0, 1.0, 0.0), (3.0, 0.75, -1.5), (1.0, 0.25, 0.5), (0.0, 0.0, 0.0)])
def test_fused_terms_and_gradients_are_those_of_autograd(chunk_rows: int, mixture: tuple[float, ...]) -> None:
    """Announced is MIXTURE; a multiple of it costs nothing, any other is found in the backward pass."""
    fused, plain = Layer(), Layer()
    ours, theirs = fused.read(MIXTURE), plain.read(None)
    torch.testing.assert_close(ours.terms, theirs.terms, rtol=1e-13, atol=0)
    assert ours.terms.abs().min() > 1
    kept = [list(part) for part in ours.kept]
    assert [sum(map(len, part)) for part in kept] == list(SIZES)
    pairs = list(zip(fused.pull(total(ours, mixture)), plain.pull(total(theirs, mixture)), strict=True))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    for part, other, left in zip(kept, theirs.kept, ours.kept, strict=True):
        torch.testing.assert_close(torch.cat(part), torch.cat(other), rtol=0, atol=1e-13)
        assert all(a is b for a, b in zip(part, left, strict=True)), "a second pass leaves nothing behind"
    if any(mixture):
        perturbed = plain.pull(total(theirs, [part + 1e-6 for part in mixture]))
        assert not all(torch.allclose(a, b, rtol=0, atol=1e-11) for (a, _), b in zip(pairs, perturbed, strict=True))


def test_each_term_alone_has_its_own_gradient(chunk_rows: int) -> None:
    fused, plain = Layer(), Layer()
    ours, theirs = fused.read(MIXTURE), plain.read(None)
    for term in range(3):
        pulls = [layer.pull(outcome.terms[term]) for layer, outcome in ((fused, ours), (plain, theirs))]
        for one, other in zip(*pulls, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
            assert not other.numel() or other.abs().max() > 1e-3


def test_a_term_times_a_tensor_is_still_differentiable_once() -> None:
    """As a scaled loss is, or a loss divided by a number of accumulated passes."""
    fused, plain = Layer(), Layer()
    factor = torch.tensor(0.125, dtype=torch.float64)
    pulls = [layer.pull(total(layer.read(mixture)) * factor) for layer, mixture in ((fused, MIXTURE), (plain, None))]
    for one, other in zip(*pulls, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_no_row_is_a_term_of_zero_and_still_a_graph() -> None:
    layer = Layer()
    nothing = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    outcome = read_rows(layer.head, [nothing], [Reading(torch.zeros(0, dtype=torch.long), Terms(0, []))], MIXTURE)
    assert outcome.terms.tolist() == [0, 0, 0] and [len(part) for part in outcome.kept[0]] == [0]
    gradients = torch.autograd.grad(total(outcome), [nothing, layer.weight, layer.bias])
    assert [g.shape for g in gradients] == [(0, H), (V, H), (V,)] and not any(g.any() for g in gradients)


def test_a_frozen_layer_passes_gradients_on_and_gets_none() -> None:
    fused, plain = Layer(learns=False), Layer(learns=False)
    assert fused.head.weights == ()
    for mixture in (MIXTURE, (1.0, 0.0, 0.0)):
        ours, theirs = fused.pull(total(fused.read(MIXTURE), mixture)), plain.pull(total(plain.read(None), mixture))
        assert len(ours) == 3
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert fused.weight.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_layer_learns_from_both_ends(tied: bool, chunk_rows: int) -> None:
    policy = Policy(tiny_model(tie_word_embeddings=tied))
    weight = policy.model.get_input_embeddings().weight
    assert (weight is policy.model.get_output_embeddings().weight) == tied
    packed, targets = PackedSequences.pack([[3, 4, 5, 6], [7, 8, 9]]), torch.tensor([1, 2, 3, 5, 6])

    def read(chunk: Chunk) -> tuple[Tensor, None]:
        tokens = packed.token_ids[targets[chunk.rows]]
        return -chunk.logits.log_softmax(-1).gather(1, tokens[:, None]).sum()[None], None

    pulls = []
    for mixture in ((1.0,), None):
        (loss,) = policy(packed, [Reading(targets, read)], mixture).terms
        pulls.append(torch.autograd.grad(loss, list(policy.parameters())))
    for one, other in zip(*pulls, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    rows = pulls[0][0].abs().sum(1).nonzero()[:, 0].tolist()
    assert (len(rows) == len(weight)) == tied, "the output layer's gradient is everywhere, the input's at its tokens"


def test_autocast_is_in_force_going_back_too() -> None:
    exact, seen = Layer(torch.float32), []
    wanted = {mixture: exact.pull(total(exact.read(None), mixture)) for mixture in (MIXTURE, (1.0, 0.0, 0.0))}
    for mixture, expected in wanted.items():
        layer, chunks = Layer(torch.float32), []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcome = layer.read(MIXTURE, chunks)
        assert outcome.terms.dtype == torch.float32 and outcome.terms.isfinite().all()
        torch.testing.assert_close(outcome.terms, exact.read(None).terms, rtol=2e-2, atol=0)
        found = layer.pull(total(outcome, mixture))  # outside of the context, as a Trainer does it
        assert {chunk.logits.dtype for chunk in chunks} == {torch.bfloat16}
        seen.append(len(chunks))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float32 and one.isfinite().all()
            assert (one - other).norm() <= 3e-2 * other.norm()
            assert not other.numel() or (one * 1.1 - other).norm() > 3e-2 * other.norm()
    assert seen == [3, 6], "the second one was found by reading again"


# What it costs


def test_readings_see_their_rows_once_and_never_more_than_a_chunk(chunk_rows: int) -> None:
    layer, chunks = Layer(), []
    layer.read(MIXTURE, chunks)
    for i, size in enumerate(SIZES):
        steps = [slice(start, min(start + chunk_rows, size)) for start in range(0, max(size, 1), chunk_rows)]
        mine, chunks = chunks[: len(steps)], chunks[len(steps) :]
        assert [chunk.rows for chunk in mine] == steps
        for chunk in mine:
            where = layer.rows[i][chunk.rows]
            assert len(chunk.logits) == len(where) <= chunk_rows and torch.equal(chunk.hidden, where)
            assert (chunk.paired is None) == (i < 2)
            assert chunk.paired is None or (chunk.paired.shape == (len(where), V) and not chunk.paired.requires_grad)
    assert chunks == []


@pytest.mark.parametrize("scale", [1.0, 8.0, 0.3])
def test_a_row_meets_the_layer_once(chunk_rows: int, scale: float) -> None:
    """Its pair once more, without a gradient; a backward pass of the announced mixture, or of a multiple, adds none."""
    layer = Layer()
    outcome = layer.read(MIXTURE)
    layer.pull(scale * total(outcome))
    assert sum(rows for rows, learns in layer.products if learns) == sum(SIZES)
    assert sum(rows for rows, learns in layer.products if not learns) == SIZES[2]
    layer.pull(outcome.terms[0])
    assert sum(rows for rows, learns in layer.products if learns) == 2 * sum(SIZES), "another mixture reads again"


@pytest.mark.parametrize(("mixture", "most"), [((1.0,), 1), (None, 5)], ids=["fused", "plain"])
def test_logits_do_not_outlive_their_chunk(
    mixture: Sequence[float] | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain autograd keeps those of all five until the backward pass."""
    monkeypatch.setattr(head, "MAX_LOGITS", 2 * V)
    monkeypatch.setattr(head, "MIN_ROWS", 1)
    layer, logits, alive = Layer(), [], []

    def read(chunk: Chunk) -> tuple[Tensor, None]:
        logits.append(weakref.ref(chunk.logits))
        alive.append(sum(ref() is not None for ref in logits))
        return chunk.logits.square().sum()[None], None

    outcome = read_rows(layer.head, layer.rows[:1], [Reading(torch.arange(SIZES[0]), read)], mixture)
    assert len(alive) == 5 and max(alive) == most
    assert outcome.terms.requires_grad


def test_without_gradients_nothing_is_prepared() -> None:
    layer = Layer()
    with torch.no_grad():
        outcome = layer.read(MIXTURE)
    assert not outcome.terms.requires_grad
    torch.testing.assert_close(outcome.terms, layer.read(None).terms, rtol=1e-13, atol=0)


def test_logits_that_are_kept_have_a_graph() -> None:
    layer = Layer()
    outcome = read_rows(layer.head, layer.rows[:1], [Reading(torch.arange(10), keep_logits)], None)
    (logits,) = outcome.kept[0]
    assert outcome.terms.shape == (0,) and logits.requires_grad
    assert torch.equal(logits, layer.project(layer.rows[0]))


@pytest.mark.parametrize(
    ("values", "mixture", "factor"),
    [
        ([2.0, 0.5], [4.0, 1.0], 0.5),
        ([0.0, 0.0], [4.0, 1.0], 0.0),
        ([1.0, 0.0], [1.0, 0.0], 1.0),
        ([-3.0, 0.0, 1.5], [2.0, 0.0, -1.0], -1.5),
        ([1.0, 1e-3 * (1 + 1e-7)], [1.0, 1e-3], 1.0),  # float32 of a coefficient
        ([1.0, 0.0], [1.0, 1e-9], None),
        ([1.0, 1e-9], [1.0, 0.0], None),
        ([1.0, 1.1e-3], [1.0, 1e-3], None),
        ([1.0, 1.0], [0.0, 1.0], None),
        ([1.0], [0.0], None),
        ([float("nan"), 1.0], [1.0, 1.0], None),
    ],
)
def test_a_common_factor(values: list[float], mixture: list[float], factor: Any) -> None:
    assert common_factor(values, mixture) == (factor if factor is None else pytest.approx(factor, rel=1e-12))
