"""Gumbel-max on hashed numbers: frequencies are the distribution's, and rounding seldom decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.rollout.sampling import Draws, derive_seed, exponentials, sample
from sdsearch_lightning.types import Sampling

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25], dtype=torch.float64)
LOGITS = PROBS.log()
SAMPLED = Sampling()
NUM_DRAWS = 100_000
NOISE = 5 * math.sqrt(0.25 / NUM_DRAWS)
"""Five standard errors of a frequency."""


def draw(logits: Tensor, count: int, sampling: Sampling = SAMPLED, seed: int = 0) -> tuple[Tensor, Tensor]:
    return sample(logits.expand(count, -1), [sampling] * count, [Draws(seed + i) for i in range(count)])


def frequencies(sampling: Sampling) -> list[float]:
    tokens, _ = draw(LOGITS, NUM_DRAWS, sampling)
    return (tokens.bincount(minlength=5) / NUM_DRAWS).tolist()


def power(exponent: float) -> Tensor:
    weights = PROBS**exponent
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_follow_the_distribution(temperature: float) -> None:
    found = frequencies(Sampling(temperature))
    assert found == pytest.approx(power(1 / temperature).tolist(), abs=NOISE)
    assert found != pytest.approx(power(0.9 / temperature).tolist(), abs=NOISE)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.94, [1, 3, 4]), (0.96, [0, 1, 3, 4]), (1.0, None)],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int] | None) -> None:
    mass = PROBS.clone()
    if kept is not None:
        mass[[i for i in range(5) if i not in kept]] = 0.0
    found = frequencies(Sampling(1.0, top_p))
    assert found == pytest.approx((mass / mass.sum()).tolist(), abs=NOISE)
    assert [i for i, share in enumerate(found) if share] == [i for i, share in enumerate(mass.tolist()) if share]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(2.0, 0.5), Sampling(0.0)])
def test_logprobs_are_before_the_cut_and_at_the_temperature(sampling: Sampling) -> None:
    tokens, logprobs = draw(LOGITS, 20, sampling)
    expected = (LOGITS / (sampling.temperature or 1.0)).log_softmax(-1)[tokens]
    assert torch.allclose(logprobs, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(logprobs * (1 + 1e-9), expected, rtol=0, atol=1e-12)


def test_greedy_takes_the_most_probable_token_whatever_was_drawn() -> None:
    tokens, _ = draw(LOGITS, 100, Sampling(0.0))
    assert set(tokens.tolist()) == {1}


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    assert frequencies(Sampling())[2] == 0
    banned = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    assert set(draw(banned, 200)[0].tolist()) == {1, 2}


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(), Sampling(0.0), Sampling(0.5, 0.9), Sampling(2.0), Sampling(1.0, 0.3), Sampling()]

    def run(rows: Sequence[int]) -> list[tuple[int, float]]:
        found = sample(logits[list(rows)], [samplings[i] for i in rows], [Draws(i) for i in rows])
        return list(zip(*(tensor.tolist() for tensor in found), strict=True))

    together = run(range(6))
    assert [run([i])[0] for i in range(6)] == together
    assert run([5, 2, 0]) == [together[i] for i in (5, 2, 0)]


def test_greedy_and_sampled_rows_consume_alike() -> None:
    """A row that was greedy at first draws later as one that never was."""
    one, other = Draws(3), Draws(3)
    sample(LOGITS[None], [Sampling(0.0)], [one])
    sample(LOGITS[None], [Sampling()], [other])
    assert one.next_key() == other.next_key() != Draws(3).next_key()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logprobs_are_float32_or_float64(dtype: torch.dtype) -> None:
    logprobs = draw(LOGITS.to(dtype), 1)[1]
    assert logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_rounding_seldom_decides_at_a_real_vocabulary() -> None:
    """Two engines differ by 1e-5 in their logits; by inversion, some twentieth of these draws would differ."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 49_152, generator=generator)
    rounded = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    other = logits + 0.1 * torch.randn(logits.shape, generator=generator)
    tokens, by_rounded, by_other = (
        sample(x, [Sampling()] * 300, [Draws(i) for i in range(300)])[0] for x in (logits, rounded, other)
    )
    assert int((tokens != by_rounded).sum()) <= 1 < int((tokens != by_other).sum())


def test_numbers_are_exponential_and_independent() -> None:
    numbers = exponentials(torch.arange(2000) * 7919 + 12345, 500).double()
    assert numbers.min() > 0 and numbers.isfinite().all()
    assert (numbers.mean().item(), numbers.var().item()) == pytest.approx((1, 1), abs=0.01)
    uniform = (1 - (-numbers).exp()).flatten().sort().values
    assert (uniform - torch.linspace(0, 1, len(uniform), dtype=torch.float64)).abs().max() < 2e-3  # Kolmogorov-Smirnov
    centred = numbers - 1
    for one, two in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs((one * two).mean().item()) < 0.01, "neither neighbouring keys nor neighbouring tokens are alike"
    assert torch.equal(exponentials(torch.tensor([7]), 9)[0, :5], exponentials(torch.tensor([7]), 5)[0])


def test_the_numbers_are_those_of_splitmix64() -> None:
    """Seed 0 of the published generator, whose first outputs are known; the upper halves of them."""
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    expected = [-math.log1p(-(((value >> 32) + 0.5) * 2.0**-32)) for value in known]
    assert exponentials(torch.tensor([0]), 3)[0].tolist() == pytest.approx(expected, rel=1e-6)


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
