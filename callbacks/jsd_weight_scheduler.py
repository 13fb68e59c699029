"""JSDWeightScheduler: how much the teacher counts at each step."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.schedules import Schedule, checked_schedule
from sdsearch_lightning.types import StepBatch


class JSDWeightScheduler(pl.Callback):
    """Sets `SDSearchModule.jsd_weight` before each step. A step is a rollout batch.

    Args:
        weight: weight of the self-distillation loss, alpha_SD of the paper (1e-3 there, with a learning rate of 1e-6
            and a large model).
        warmup_steps: steps for which the weight is 0, before it is `weight` (T_warm of the paper, 50 there): with 50,
            the first taught step is the 51st.
        schedule: another course of the weight, as a factor by step; then `warmup_steps` is left alone. null: the
            step function of `warmup_steps`.
    """

    sets_jsd_weight = True
    """For others, which look for such a callback."""

    def __init__(self, weight: float = 1e-3, warmup_steps: int = 50, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.weight, self.warmup_steps = weight, warmup_steps
        self.schedule = checked_schedule("jsd", weight, warmup_steps, schedule)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a weight that never counts: nobody writes what the teacher reads, or the warm-up never ends."""
        callbacks = trainer.callbacks if isinstance(pl_module, SDSearchModule) and self.weight > 0 else []  # type: ignore[attr-defined]
        if callbacks and not any(hasattr(callback, "writes_hindsight") for callback in callbacks):
            rank_zero_warn(
                f"jsd: the weight is {self.weight:g}, but no HindsightConstruction is among the trainer's callbacks, "
                "so the first taught step will have nothing to read. Add it before JSDWeightScheduler."
            )
        steps = trainer.max_steps
        if self.weight > 0 and steps > 0 and all(self.schedule.factor(step) == 0 for step in range(steps)):
            rank_zero_warn(
                f"jsd: the weight stays 0 for all {steps} steps of this run (jsd.warmup_steps is {self.warmup_steps}): "
                "nothing will be distilled. Lower jsd.warmup_steps, or set jsd.weight to 0 if GRPO alone is meant."
            )

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Set the weight of this step."""
        pl_module.jsd_weight = self.weight * self.schedule.factor(trainer.global_step)
