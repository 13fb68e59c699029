"""The losses that the benchmark compares are the same ones, at a small vocabulary."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import loss_head_variants as variants
from benchmarks.loss_head_variants import OURS, PARTS, PLAIN, REFERENCES, TOP, Inputs, Loss


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr(variants, "VOCABULARY", 301)
    return Inputs.make(hidden_size=16, device="cpu")


def pull(loss: Loss, inputs: Inputs) -> list[Tensor]:
    value = loss(inputs)
    return [value.detach(), *torch.autograd.grad(value, [inputs.student, inputs.weight])]


@pytest.mark.parametrize("part", list(PARTS))
def test_variants_agree(part: str, inputs: Inputs) -> None:
    expected = pull(REFERENCES[part], inputs)
    for name in (OURS, PLAIN):
        for one, other in zip(pull(PARTS[part][name], inputs), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    limited = pull(PARTS[part][TOP], inputs)[0]
    assert limited.isfinite() and abs(limited - expected[0]) > 1e-4, "of the teacher's 50 best tokens: another loss"


def test_another_divergence_is_told_apart(inputs: Inputs) -> None:
    skewed = partial(variants.our_jsd, divergence=variants.JensenShannon(beta=0.4, top_k=None))
    assert abs(pull(skewed, inputs)[0] - pull(REFERENCES["jsd"], inputs)[0]) > 1e-4
