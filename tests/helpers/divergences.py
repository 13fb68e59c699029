"""Every formula on every support once more, as plain-Python sums over named tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import ForwardKL, JensenShannon, LogitMSE, ReverseKL, SupportedDivergence

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
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda part: part if isinstance(part, str) else "-".join(part.values())
)


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
