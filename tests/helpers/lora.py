"""Policies with adapters that have learned something, and three ragged sequences to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.training import make_module
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.lora import LoRA, is_learned
from sdsearch_lightning.policy.packing import PackedSequences

RAGGED_SEQUENCES = [(3, 4, 5, 6, 7, 8, 9, 10, 11), (14, 0, 1, 2, 18), (19, 20, 3, 5, 1, 9)]
RAGGED_PACKED = PackedSequences.pack(RAGGED_SEQUENCES)
RAGGED_TARGETS = (RAGGED_PACKED.position_ids > 0).nonzero()[:, 0]


def adapted(model: Any = None, lora: LoRA | None = None, **options: Any) -> SDSearchModule:
    return make_module(model, lora=lora or LoRA(r=4), **options)


def move_adapter(module: Any, size: float = 0.05) -> Any:
    """Move the adapter as training would, far enough to see."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.policy.named_parameters():
            if is_learned(name):
                weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight.dtype))
    return module


def ragged_logits(policy: Any) -> Tensor:
    with torch.no_grad():
        return policy.logits(RAGGED_PACKED, RAGGED_TARGETS)  # type: ignore[no-any-return]


def named_gradients(module: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of `loss` in all that learns, by name."""
    weights = {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
    return dict(zip(weights, found, strict=True))


def base_weights(module: Any) -> dict[str, Tensor]:
    return {n: w.detach().clone() for n, w in module.policy.named_parameters() if "lora_" not in n}
