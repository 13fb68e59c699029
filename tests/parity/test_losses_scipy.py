"""jensen_shannon against scipy's Jensen-Shannon distance and relative entropies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdsearch_lightning.losses.terms import jensen_shannon

distance = pytest.importorskip("scipy.spatial.distance")
special = pytest.importorskip("scipy.special")


def logits(seed: int, scale: float) -> torch.Tensor:
    return torch.randn(40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def probabilities(values: torch.Tensor) -> np.ndarray:
    return special.softmax(values.numpy(), axis=-1)


def close(actual: torch.Tensor, expected: np.ndarray) -> bool:
    return np.allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_symmetric_jensen_shannon_is_scipys_distance_squared(scale: float) -> None:
    student, teacher = logits(0, scale), logits(1, scale)
    expected = distance.jensenshannon(probabilities(student), probabilities(teacher), axis=-1) ** 2
    for top_k in (None, 64, 100):
        assert close(jensen_shannon(student, teacher, top_k=top_k), expected)
    assert not close(jensen_shannon(student, teacher + 1e-6 * logits(2, scale)), expected)
    assert not close(jensen_shannon(student, teacher, beta=0.51), expected)


@pytest.mark.parametrize("beta", [0, 0.1, 0.3, 0.9, 1])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_skewed_jensen_shannon_is_scipys_relative_entropies(beta: float, scale: float) -> None:
    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return special.rel_entr(p, q).sum(-1)

    student, teacher = logits(3, scale), logits(4, scale)
    s, t = probabilities(student), probabilities(teacher)
    m = (1 - beta) * s + beta * t
    expected = {0: kl(t, s), 1: kl(s, t)}.get(beta, beta * kl(t, m) + (1 - beta) * kl(s, m))
    assert close(jensen_shannon(student, teacher, beta), expected)
    assert not close(jensen_shannon(teacher, student, beta), expected)


def test_banned_tokens_are_scipys_zero_probabilities() -> None:
    student, teacher = logits(5, 2.0), logits(6, 2.0)
    student[:, ::3], teacher[:, ::2] = -np.inf, -np.inf
    expected = distance.jensenshannon(probabilities(student), probabilities(teacher), axis=-1) ** 2
    assert np.isfinite(expected).all()
    assert close(jensen_shannon(student, teacher), expected)
    assert not close(jensen_shannon(student, teacher.nan_to_num(neginf=0.0)), expected)
