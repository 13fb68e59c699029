"""A module with a tiny policy, micro-batches of one update, and what a step makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.models import tiny_model
from helpers.training_rollouts import TRAINING_CODEC, TRAINING_PROTOCOL, TRAINING_TOKENIZER, blocks_of, three_groups
from sdsearch_lightning.module import SDSearchModule, StepSums
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.step.collate import SearchBatch, collate, split_groups, weigh
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, Trajectory


def make_module(model: Any = None, **options: Any) -> SDSearchModule:
    """A module with a ready model, without a Trainer; float64 unless the model says otherwise."""
    module = SDSearchModule(scratch=ScratchModel(), protocol=TRAINING_PROTOCOL, **{"kl_coef": 0.0} | options)
    module.attach(model or tiny_model(), TRAINING_TOKENIZER)
    return module


def micro_batches(
    module: SDSearchModule,
    groups: Sequence[RolloutGroup],
    blocks: Sequence[HindsightBlock | None] | None = None,
    max_tokens: int = 100_000,
    **options: Any,
) -> list[SearchBatch]:
    """The micro-batches of one update; without `blocks`, those of GRPO alone."""

    def prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
        return TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, trajectory.question.text, block_text)

    options.setdefault("mode", module.aggregation)
    weighed = weigh(groups, blocks or [None] * len(groups), dtype=module.policy.dtype, **options)
    layout, dtype = module.policy.layout, module.policy.dtype
    shares = split_groups(weighed, max_tokens, layout.size)
    return [
        collate(share, prompt if blocks else None, dtype=dtype, cut_teacher=layout.cuts_teacher) for share in shares
    ]


def taught_batch(
    module: SDSearchModule, groups: Sequence[RolloutGroup] | None = None, rule: str = "all"
) -> SearchBatch:
    """One micro-batch of all rollouts, the teacher's side included."""
    groups = groups or three_groups()
    (batch,) = micro_batches(module, groups, blocks_of(groups, rule))
    return batch


def drifted(model: Any = None, **options: Any) -> SDSearchModule:
    """A policy that has moved away from its reference."""
    module = make_module(model, kl_coef=0.1, **options)
    with torch.no_grad():
        for i, weight in enumerate(module.policy.parameters()):
            weight.add_(0.05 * torch.sin(torch.arange(weight.numel()).view_as(weight) + i))
    return module


def step(module: SDSearchModule, batch: SearchBatch) -> StepSums:
    return module.student_step(batch, module.teacher_step(batch) if batch.teacher is not None else None)


def gradient(module: SDSearchModule, loss: Tensor) -> Tensor:
    """[P] gradient of `loss` in all weights, one after the other."""
    weights = list(module.policy.parameters())
    grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in zip(grads, weights, strict=True)])


def weights_of(module: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.policy.parameters()])
