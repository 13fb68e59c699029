"""The losses of a step once more by hand, and that no split, order, rank or empty row changes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.closed_form import closed_form
from helpers.models import tiny_model
from helpers.training import drifted, gradient, micro_batches, step, taught_batch
from helpers.training_rollouts import DIRECT, ONE, TWO, blocks_of, group, rollout, three_groups
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.module import StepSums
from sdsearch_lightning.step.collate import filler
from sdsearch_lightning.training.options import Compute

WHOLE = JensenShannon(top_k=None)
TERMS = ("policy_loss", "jsd_loss", "kl")


def total(sums: Sequence[StepSums], term: str) -> Tensor:
    return torch.stack([getattr(s, term) for s in sums]).sum()


# The losses by hand

TEXTS = [
    "siblings CORRECT the river ; CORRECT Norway ; INCORRECT capital of Italy ; INCORRECT none ;",
    "siblings CORRECT capital of Italy ; CORRECT capital of Italy ; CORRECT none ;",
    "siblings CORRECT the river ; CORRECT Norway ; INCORRECT none ;",
]
RULES = {"all": [1, 1, 1], "mixed": [1, 0, 1], "any_correct": [1, 1, 1], "sqrt": [2 * (2 / 9) ** 0.5, 0, 1]}


@pytest.mark.parametrize(
    ("rule", "temperature", "on_policy"), [("all", 1.0, False), ("mixed", 0.7, True), ("sqrt", 1, 0)]
)
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "padded"),
        ("llama", "packed"),
        ("llama", "shared_prefix"),
        ("gpt_neox", "padded"),
        ("gpt_neox", "packed"),
        ("gpt_neox", "shared_prefix"),
    ],
)
def test_the_losses_by_hand(family: str, layout: Any, rule: str, temperature: float, on_policy: bool) -> None:
    module = drifted(
        tiny_model(family),
        divergence=WHOLE,
        temperature=temperature,
        clip_high=0.28,
        compute=Compute(layout=layout),
        exclude_tags=rule != "mixed",
    )
    groups = three_groups()
    wanted = closed_form(module, groups, RULES[rule], TEXTS, bool(on_policy))
    sums = step(module, replace(taught_batch(module, rule=rule), on_policy=bool(on_policy)))
    for term, value in zip(TERMS, wanted, strict=True):
        ours = getattr(sums, term)
        assert ours.item() == pytest.approx(value.item(), abs=1e-12)
        assert abs(value.item()) > 1e-3 or on_policy
        pull, expected = gradient(module, ours), gradient(module, value)
        # A llama's norms are in float32: they round the sum over siblings, where other layouts round its parts.
        rounds = (family, layout) == ("llama", "shared_prefix")
        tolerance = 1e-6 * expected.abs().max().item() if rounds else 1e-11
        torch.testing.assert_close(pull, expected, rtol=0, atol=tolerance)
        assert not torch.allclose(pull, expected * (1 + 1e-4), rtol=0, atol=tolerance)
    assert (sums.metrics["clipped"].item() == 0) == bool(on_policy)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_neither_split_nor_order_changes_a_loss_or_its_gradient(mode: str) -> None:
    module, groups = drifted(divergence=JensenShannon(top_k=9), aggregation=mode), three_groups()
    blocks = blocks_of(groups, "sqrt")

    def losses(order: Sequence[int], max_tokens: int, turn: int = 1) -> list[Tensor]:
        turned = [replace(groups[i], trajectories=groups[i].trajectories[::turn]) for i in order]
        batches = micro_batches(module, turned, [blocks[i] for i in order], max_tokens, norm=40.0)
        sums = [step(module, batch) for batch in batches]
        values = [total(sums, term) for term in TERMS]
        return [*(value.detach() for value in values), *(gradient(module, value) for value in values)]

    whole = losses([0, 1, 2], 100_000)
    assert all(part.abs().max() > 1e-4 for part in whole)
    for order, max_tokens, turn, num_batches in [
        ([0, 1, 2], 1, 1, 3),
        ([2, 0, 1], 100, 1, 3),
        ([1, 2, 0], 150, -1, 2),
        ([2, 1, 0], 10**6, -1, 1),
    ]:
        assert len(micro_batches(module, [groups[i] for i in order], max_tokens=max_tokens, norm=40.0)) == num_batches
        for one, other in zip(losses(order, max_tokens, turn), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_two_ranks_learn_as_one() -> None:
    module, groups = drifted(divergence=WHOLE), three_groups()
    blocks = blocks_of(groups)
    whole = [step(module, batch) for batch in micro_batches(module, groups, blocks)]
    counts: list[Tensor] = []
    for share in ([0], [1, 2]):  # what each rank would count
        micro_batches(
            module,
            [groups[i] for i in share],
            [blocks[i] for i in share],
            sum_over_ranks=lambda c: counts.append(c) or c,
        )  # type: ignore[func-returns-value]
    ranks = [
        step(module, batch)
        for share in ([0], [1, 2])
        for batch in micro_batches(
            module, [groups[i] for i in share], [blocks[i] for i in share], sum_over_ranks=lambda _: sum(counts)
        )
    ]
    for term in TERMS:
        one, two = total(whole, term), total(ranks, term)
        assert two.item() == pytest.approx(one.item(), abs=1e-13)
        torch.testing.assert_close(gradient(module, two), gradient(module, one), rtol=0, atol=1e-12)


# Nothing to learn from


def test_a_filler_and_rows_without_a_policy_token_weigh_nothing() -> None:
    module = drifted()
    prompt_only = replace(rollout(DIRECT), spans=rollout(DIRECT).spans[:1])
    (silent,) = micro_batches(module, [group(prompt_only, replace(prompt_only, rollout_index=1))], [None])
    for batch in (filler(torch.float64), silent):
        sums = step(module, batch)
        for term in TERMS:
            assert getattr(sums, term).item() == 0
        pull = gradient(module, sums.policy_loss + 0.1 * sums.kl)
        assert pull.isfinite().all() and not pull.any()


def test_a_rollout_that_the_retriever_failed_pulls_nowhere() -> None:
    module = drifted(divergence=WHOLE)
    kept = [rollout(TWO, 0, 0.5), rollout(ONE, 1, -0.5)]
    alone, beside = (
        step(module, taught_batch(module, [group(*kept, *more)])) for more in ((), (rollout(ONE, 2, label=None),))
    )
    for term in TERMS:
        ours, theirs = getattr(beside, term), getattr(alone, term)
        assert ours.item() == theirs.item() != 0
        assert torch.equal(gradient(module, ours), gradient(module, theirs))
