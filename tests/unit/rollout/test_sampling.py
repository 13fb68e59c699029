"""Inversion of the cumulative distribution: a grid of uniform numbers must give back the distribution itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.rollout.sampling import derive_seed, sample
from sdsearch_lightning.types import Sampling

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25], dtype=torch.float64)
LOGITS = PROBS.log()
SAMPLED = Sampling()


class Uniform(random.Random):
    """Gives the number it was made with."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.drawn = value, 0

    def random(self) -> float:
        self.drawn += 1
        return self.value


def draw(logits: Tensor, uniforms: Sequence[float], sampling: Sampling = SAMPLED) -> tuple[Tensor, Tensor]:
    rows = logits.expand(len(uniforms), -1)
    return sample(rows, [sampling] * len(uniforms), [Uniform(u) for u in uniforms])


GRID = [(i + 0.5) / 10_000 for i in range(10_000)]


def frequencies(sampling: Sampling) -> list[float]:
    tokens, _ = draw(LOGITS, GRID, sampling)
    return (tokens.bincount(minlength=5) / len(GRID)).tolist()


def power(exponent: float) -> Tensor:
    weights = PROBS**exponent
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    expected = power(1 / temperature)
    assert frequencies(Sampling(temperature)) == pytest.approx(expected.tolist(), abs=1e-4)
    assert frequencies(Sampling(temperature)) != pytest.approx(power(0.9 / temperature).tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.94, [1, 3, 4]), (0.96, [0, 1, 3, 4]), (1.0, None)],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int] | None) -> None:
    mass = PROBS.clone()
    if kept is not None:
        mass[[i for i in range(5) if i not in kept]] = 0.0
    assert frequencies(Sampling(1.0, top_p)) == pytest.approx((mass / mass.sum()).tolist(), abs=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(2.0, 0.5), Sampling(0.0)])
def test_logprobs_are_before_the_cut_and_at_the_temperature(sampling: Sampling) -> None:
    tokens, logprobs = draw(LOGITS, [0.1, 0.6, 0.9], sampling)
    expected = (LOGITS / (sampling.temperature or 1.0)).log_softmax(-1)[tokens]
    assert torch.allclose(logprobs, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(logprobs * (1 + 1e-9), expected, rtol=0, atol=1e-12)


def test_greedy_takes_the_most_probable_token_whatever_was_drawn() -> None:
    tokens, _ = draw(LOGITS, GRID[::100], Sampling(0.0))
    assert set(tokens.tolist()) == {1}


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    assert frequencies(Sampling())[2] == 0
    banned = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert draw(banned, [0.0, 1 - 2**-53])[0].tolist() == [1, 2]


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(), Sampling(0.0), Sampling(0.5, 0.9), Sampling(2.0), Sampling(1.0, 0.3), Sampling()]

    def run(rows: Sequence[int]) -> list[tuple[int, float]]:
        found = sample(logits[list(rows)], [samplings[i] for i in rows], [random.Random(i) for i in rows])
        return list(zip(*(tensor.tolist() for tensor in found), strict=True))

    together = run(range(6))
    assert [run([i])[0] for i in range(6)] == together
    assert run([5, 2, 0]) == [together[i] for i in (5, 2, 0)]


def test_greedy_and_sampled_rows_consume_alike() -> None:
    generators = [Uniform(0.5), Uniform(0.5)]
    sample(LOGITS.expand(2, -1), [Sampling(0.0), Sampling()], generators)
    assert [generator.drawn for generator in generators] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logprobs_are_float32_or_float64(dtype: torch.dtype) -> None:
    logprobs = draw(LOGITS.to(dtype), [0.5])[1]
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_seeds_are_the_same_on_any_machine_and_differ_in_every_part() -> None:
    assert derive_seed(0, "train", 3, (1, 2), 4) == 146677348856882455
    parts = [
        (seed, phase, step, (0, p), i)
        for seed in (0, 1)
        for phase in "te"
        for step in (0, 1)
        for p in (0, 1)
        for i in (0, 1)
    ]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
