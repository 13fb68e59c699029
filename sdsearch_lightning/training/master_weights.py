"""Master weights: an optimizer that steps in float32 on weights that are kept in bfloat16.

A bfloat16 weight of 0.02 has neighbours at a distance of 1e-4, so an update of 1e-6 would leave it where it is, step
after step. The optimizer therefore gets a float32 copy of each such weight; the weight itself is the copy, rounded.

Invariant: after each step weight == master.to(bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class BFloat16Weights(Precision):
    """`bf16-true` as it is done here: the module has converted its weights, and nothing else is."""

    precision = "bf16-true"


class MasterWeights:
    """Float32 copies of the weights that are narrower; what is wide enough is its own master.

    Args:
        weights: what an optimizer is to train, in order.
    """

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self.weights = weights
        self.masters = [w if w.dtype.itemsize >= 4 else nn.Parameter(w.detach().float()) for w in weights]
        self._pairs = [(w, m) for w, m in zip(weights, self.masters, strict=True) if w is not m]

    def optimizer(self, make: MakeOptimizer) -> torch.optim.Optimizer:
        """The optimizer that `make` makes of the masters; they are part of its state dict."""
        optimizer = make(self.masters)
        if self._pairs:
            optimizer.register_step_post_hook(lambda *_: self._round())
            optimizer.register_state_dict_post_hook(lambda _, state: state | {"master_weights": self._kept()})
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self._restore(state))
        return optimizer

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the weights' gradients to their masters."""
        for weight, master in self._pairs:
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None

    @torch.no_grad()
    def _round(self) -> None:
        for weight, master in self._pairs:
            weight.copy_(master)

    def _kept(self) -> list[Tensor]:
        return [master.detach() for _, master in self._pairs]

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        for (_, master), kept in zip(self._pairs, state.pop("master_weights"), strict=True):
            master.copy_(kept)
        return state
