"""CreditWeightScheduler: how much the credit of a search counts at each step, and at which tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import lightning.pytorch as pl

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.schedules import Schedule, checked_schedule
from sdsearch_lightning.step.token_advantages import CreditPlacement, CreditTokens
from sdsearch_lightning.types import StepBatch


class CreditWeightScheduler(pl.Callback):
    """Sets `SDSearchModule.credit` before each step. Without `rollout.credit` there is none, whatever the weight.

    Args:
        weight: of a search's standardised credit, beside the advantage of its rollout; 0 is GRPO.
        warmup_steps: steps for which the weight is 0, before it is `weight`.
        schedule: another course of the weight, as a factor by step; then `warmup_steps` is left alone. null: the step
            function of `warmup_steps`.
        tokens: which tokens get it: query, those strictly inside the query, or turn, also the thought before it.
        shared: divide a query's credit among its tokens, as IG-Search does (arXiv:2604.15148).
    """

    def __init__(
        self,
        weight: float = 1.0,
        warmup_steps: int = 0,
        schedule: Schedule | None = None,
        tokens: CreditTokens = "query",
        shared: bool = False,
    ) -> None:
        super().__init__()
        if tokens not in get_args(CreditTokens):
            raise ConfigError(f"credit.tokens: expected one of {', '.join(get_args(CreditTokens))}, found {tokens!r}.")
        self.placement = CreditPlacement(weight, tokens, shared)
        self.schedule = checked_schedule("credit", weight, warmup_steps, schedule)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Set the weight of this step."""
        factor = self.schedule.factor(trainer.global_step)
        pl_module.credit = replace(self.placement, weight=self.placement.weight * factor)
