"""The manual step: as many passes on every rank, one exchange of gradients, clip, skip what is not finite, count once.

Invariant: no collective stands behind a condition that can differ between ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.training.master_weights import MasterWeights
from sdsearch_lightning.training.step_clock import StepClock

MicroBatch = TypeVar("MicroBatch")


SAMPLE = 256
"""Numbers of each weight that tell how far an update moves it; a copy of all would cost as much memory as they do."""


class Update(NamedTuple):
    """What one update did: the gradient it saw, and how far it went."""

    norm: float
    """Of the gradient before clipping; where it is not finite nothing else happened."""
    ratio: float
    """Length of the way that the weights went, as a share of their own length; 1e-3 is usual, 1 overwrites them."""


class ManualStep(pl.LightningModule):
    """Backward passes and updates of a module that optimises by hand."""

    master_weights: Sequence[MasterWeights] = ()
    """What each optimizer trains; set where optimizers are made."""
    policy: Policy
    gradient_clip_val: float | None

    @cached_property
    def clock(self) -> StepClock:
        """Measures the parts of a step; what `train/*_seconds` say."""
        return StepClock()

    def equalize(self, micro_batches: Sequence[MicroBatch], filler: MicroBatch) -> list[MicroBatch]:
        """`micro_batches` and as many `filler` as it takes to have at least one and the same number on every rank."""
        most = len(micro_batches)
        if self.trainer.world_size > 1:
            count = torch.tensor(most, device=self.device)
            most = int(self.trainer.strategy.reduce(count, reduce_op="max"))  # type: ignore[arg-type]
        return [*micro_batches, *[filler] * (max(most, 1) - len(micro_batches))]

    def backward_all(self, micro_batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], Tensor]) -> None:
        """Backward through every micro-batch, one graph at a time; gradients are exchanged at the last one only.

        Args:
            micro_batches: as many as on every other rank.
            loss: the micro-batch's share of the loss over all ranks.
        """
        for position, micro_batch in enumerate(micro_batches):
            with self.clock.part("student"), self._no_sync(enabled=position < len(micro_batches) - 1):
                # Strategies average gradients over ranks, while our token weights already are those of the joint batch.
                self.manual_backward(loss(micro_batch) * self.trainer.world_size)

    def apply_gradients(self, last: bool = True) -> Update:
        """Clip, step every optimizer, zero the gradients.

        Where the gradient is not finite the update is skipped: no weight and no optimizer state changes. The norm is
        that of the exchanged gradient, so all ranks skip together; a step still counts as a step.

        Args:
            last: whether this is the batch's last update: it alone advances `global_step` and the schedules.
        """
        optimizers = self._optimizers()
        for masters in self.master_weights:
            masters.take_gradients()
        masters_of = {w: m for part in self.master_weights for w, m in zip(part.weights, part.masters, strict=True)}
        trained = [masters_of[weight] for weight in self.policy.parameters() if weight in masters_of]
        norm = nn.utils.get_total_norm([weight.grad for weight in trained if weight.grad is not None])
        if isinstance(norm, DTensor):  # each rank has the norm of its shards
            norm = norm.full_tensor()
        before = _sample(trained)
        if not torch.isfinite(norm):
            for optimizer in optimizers:
                optimizer.zero_grad()  # parameters without a gradient are passed over, weight decay included
        elif self.gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(trained, self.gradient_clip_val, norm)
        for position, optimizer in enumerate(optimizers):
            counts = last and position == len(optimizers) - 1
            with contextlib.nullcontext() if counts else _uncounted(optimizer):
                optimizer.step()
            optimizer.zero_grad()
        if last:
            for schedule in self._schedules():
                schedule.step()
        return Update(float(norm), self._ratio(before, _sample(trained)))

    def _ratio(self, before: Tensor, after: Tensor) -> float:
        """How far an update moved the weights, relative to their size; see `Update.ratio`."""
        squares = torch.stack([(after - before).square().sum(), before.square().sum()])
        if self.policy.is_sharded:
            squares = self.sum_over_ranks(squares)
        moved, size = squares.sqrt().tolist()
        return moved / size if size else math.inf

    @property
    def learning_rate(self) -> float:
        """That of the first optimizer, as its next step will use it."""
        rate: float = self._optimizers()[0].param_groups[0]["lr"]
        return rate

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]  # type: ignore[list-item,return-value]

    def _schedules(self) -> list[LambdaLR]:
        schedules: Any = self.lr_schedulers()
        return schedules if isinstance(schedules, list) else [schedules]

    @contextlib.contextmanager
    def _no_sync(self, enabled: bool) -> Iterator[None]:
        """Keep DDP from exchanging gradients in the backward passes inside.

        FSDP2 goes on exchanging them: it would have to keep whole gradients meanwhile, instead of shards.
        """
        strategy = self.trainer.strategy
        if enabled and isinstance(strategy, DDPStrategy):
            with strategy.block_backward_sync():
                yield
        else:
            yield

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks; a collective: every rank calls it."""
        total: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        return total.to(values.device)


@torch.no_grad()
def _sample(weights: Sequence[Tensor]) -> Tensor:
    """Up to SAMPLE evenly spaced numbers of each weight, or of this rank's shards."""
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    flat = [part.detach().flatten() for part in parts]
    return torch.cat([part[:: max(1, len(part) // SAMPLE)][:SAMPLE].double() for part in flat])


@contextlib.contextmanager
def _uncounted(optimizer: LightningOptimizer) -> Iterator[None]:
    """Steps of `optimizer` inside do not advance `trainer.global_step`, which counts batches here."""
    hooks = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks
