"""One step in every layout: the same losses and gradients on ragged groups, whatever the micro-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import tiny_model
from helpers.training import drifted, gradient, micro_batches, step
from helpers.training_rollouts import TRAINING_WORDS, blocks_of, group, rollout
from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import Terms, total_loss
from sdsearch_lightning.losses.weights import EntropyCoefs
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.packing import LAYOUTS
from sdsearch_lightning.policy.teachers import EMATeacher, LiveTeacher
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.training.options import Compute
from sdsearch_lightning.types import Label, RolloutGroup

TERMS = ("policy_loss", "jsd_loss", "kl", "entropy_loss")
JSD_WEIGHT = 0.5


def ragged_groups(seed: int) -> list[RolloutGroup]:
    """Groups of one to four rollouts with up to two searches of any length; now and then one fails."""
    dice = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(dice.choices(TRAINING_WORDS[:8], k=dice.randint(1, most)))

    def text() -> str:
        turns = [f"<think> {words(9)} </think> <search> {words(5)} </search>" for _ in range(dice.randint(0, 2))]
        return " ".join([*turns, f"<think> {words(6)} </think> <answer> {words(4)} </answer>"])

    def any_rollout(index: int, position: int) -> Any:
        label = None if dice.random() < 0.1 else dice.choice([Label.CORRECT, Label.INCORRECT])
        return rollout(text(), index, dice.uniform(-1, 1), label, position)

    groups = [group(*(any_rollout(i, position) for i in range(dice.randint(1, 4)))) for position in range(4)]
    # A group that asks the same as the one before it: their prompts lie back to back.
    return [*groups, group(*(any_rollout(i, 3) for i in range(2)))]


@dataclass(frozen=True)
class Found:
    """What a step came to."""

    terms: Tensor
    """[4]."""
    pulls: dict[str, Tensor]
    """[P] gradient of each term, and of the loss."""
    jsd: Tensor
    """[Q] by size."""
    metrics: dict[str, float]


def make(family: str, dtype: torch.dtype, layout: Any, **options: Any) -> SDSearchModule:
    defaults = {"divergence": JensenShannon(top_k=9), "entropy_coef": EntropyCoefs(reasoning=0.02, answer=-0.1)}
    compute = Compute(layout=layout)
    module = drifted(tiny_model(family, dtype), compute=compute, **{**defaults, "teacher": LiveTeacher()} | options)
    module.jsd_weight = JSD_WEIGHT
    return module


def run(module: SDSearchModule, batches: Sequence[SearchBatch], terms: Sequence[str] = TERMS) -> Found:
    sums = [step(module, batch) for batch in batches]
    values = {term: torch.stack([getattr(s, term) for s in sums]).sum() for term in TERMS}
    loss = total_loss(Terms(**values), module.policy_terms.coefficients(JSD_WEIGHT))
    pulls = {term: gradient(module, values[term]) for term in terms} | {"loss": gradient(module, loss)}
    credit = [s.credit.jsd for s in sums if s.credit is not None]
    metrics: dict[str, float] = {}
    for s in sums:
        for name, value in s.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return Found(torch.stack(list(values.values())).detach(), pulls, torch.cat(credit).sort().values, metrics)


def distance(one: Found, other: Found) -> float:
    """The largest difference, relative to the size of what differs."""

    def relative(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        return float((a - b).norm() / b.norm())

    assert one.metrics.keys() == other.metrics.keys()
    parts = [relative(one.pulls[name], other.pulls[name]) for name in one.pulls.keys() & other.pulls.keys()]
    metrics = [torch.tensor([x.metrics[name] for name in other.metrics]).double() for x in (one, other)]
    return max(relative(one.terms, other.terms), relative(one.jsd, other.jsd), relative(*metrics), *parts)


def found(module: SDSearchModule, seed: int, max_tokens: int = 10**6, terms: Sequence[str] = TERMS) -> Found:
    groups = ragged_groups(seed)
    return run(module, micro_batches(module, groups, blocks_of(groups), max_tokens), terms)


EXACT, ROUNDED = torch.float64, torch.float32
FAMILIES = [
    ("phi", EXACT, 1e-10),
    ("gpt_neox", EXACT, 1e-10),
    ("llama", EXACT, 1e-6),  # norms of both are in float32
    ("qwen3", EXACT, 1e-6),
    ("phi", ROUNDED, 1e-5),
    ("llama", ROUNDED, 1e-5),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "dtype", "tolerance"), FAMILIES)
def test_every_layout_and_split_is_the_same_step(family: str, dtype: torch.dtype, tolerance: float, seed: int) -> None:
    reference, groups = found(make(family, dtype, "padded"), seed), ragged_groups(seed)
    assert reference.terms.abs().min() > 1e-4 and len(reference.jsd) > 20, "everything is at work"
    sizes = []
    for layout in LAYOUTS:
        module = make(family, dtype, layout)
        for max_tokens, terms in ((1, ()), (300, TERMS), (10**6, ())):
            batches = micro_batches(module, groups, blocks_of(groups), max_tokens)
            sizes.append(len(batches))
            assert distance(run(module, batches, terms), reference) <= tolerance
    assert len(set(sizes)) >= 3, "several ways to split"
    with torch.no_grad():  # embeddings that are a little longer
        next(module.policy.parameters()).mul_(1 + 30 * tolerance)
    assert distance(run(module, batches, ()), reference) > tolerance


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": JensenShannon(top_k=None)},
        {"teacher": EMATeacher(0.3)},
        {"divergence": JensenShannon(top_k=None), "teacher": EMATeacher(0.3)},
        {"tis_cap": 0.8, "temperature": 0.7},
        {"aggregation": "seq-mean-token-mean"},
        {"policy_coef": 0.0},
    ],
    ids=["whole", "copied teacher", "whole, copied teacher", "tis", "means", "distils only"],
)
def test_every_setting_of_the_loss_is_the_same_step(options: dict[str, Any], layout: Any) -> None:
    found_by = [found(make("gpt_neox", EXACT, name, **options), 7, 300, ()) for name in ("padded", layout)]
    assert distance(found_by[1], found_by[0]) <= 1e-10
    default = found(make("gpt_neox", EXACT, layout), 7, 300, ())
    assert distance(default, found_by[0]) > 1e-6, "the setting shows"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exchanged_token_shows(layout: Any) -> None:
    """In its own sequence only where none shares it."""
    groups = ragged_groups(0)
    module = make("gpt_neox", EXACT, layout)
    (batch,) = micro_batches(module, groups, blocks_of(groups))
    before = run(module, [batch], ())
    tokens = batch.token_ids.clone()
    tokens[-1] = (tokens[-1] + 1) % 20
    other = replace(batch, sequences=replace(batch.sequences, token_ids=tokens))
    assert distance(run(module, [other], ()), before) > 1e-6


def test_shared_prompts_are_read_once() -> None:
    """What the layouts differ in."""
    groups = ragged_groups(1)
    read = {}
    for layout in LAYOUTS:
        module = make("phi", EXACT, layout)
        (batch,) = micro_batches(module, groups, blocks_of(groups))
        read[layout] = [module.policy.layout.arrange(x).token_ids.numel() for x in (batch.sequences, batch.teacher)]
        assert sum(batch.sequences.shared) > 0
    for shared, packed, padded in zip(*(read[name] for name in ("shared_prefix", "packed", "padded")), strict=True):
        assert shared < packed < padded
