"""Which tokens a support holds, what becomes of the rest, and what of the teacher is enough for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from helpers.divergences import FORMULAS, PLACES, SUPPORTS, Q, V, each_case, matches, randn, softmax, supported_tokens
from sdsearch_lightning.losses.divergences import JensenShannon, Support


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
    dropped = JensenShannon(0.5, 2, "teacher", "renormalize").divergence(student, teacher)
    counted = JensenShannon(0.5, 2, "teacher", "bucket").divergence(student, teacher)
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
