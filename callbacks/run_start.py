"""RunStart: the moment at which a command takes over its run folder, and QuestionsFirst, what `fit` looks at before.

Invariant: nothing in a run folder is touched before the configuration, the model, the checkpoint and the training
questions have proved to fit together.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.callbacks.credit_diagnostics import CreditDiagnostics
from sdsearch_lightning.callbacks.rollout_grouping import RolloutGrouping
from sdsearch_lightning.checkpoints.reading import StoredCheckpoint
from sdsearch_lightning.checkpoints.writing import told_by_all
from sdsearch_lightning.errors import ConfigError, SDSearchError, StorageError


class RunStart(pl.Callback):
    """Takes the run folder when the first step, or the evaluation before it, is about to begin.

    Args:
        take: does so, on rank 0; all ranks wait for it before they write.
        given: the checkpoint that the user named, where one was named.
        step: that the run goes on after, as this rank found it in the folder; None: from the start.
    """

    def __init__(
        self, take: Callable[[], None], given: StoredCheckpoint | None = None, step: int | None = None
    ) -> None:
        self.take, self.given, self.step = take, given, step
        self.is_taken = False
        self._rates: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(self.step)
        if trainer.strategy.reduce_boolean_decision(first != self.step, all=False):
            raise ConfigError(
                f"run.root: rank 0 goes on after step {first}, rank {trainer.global_rank} after {self.step}: they see "
                "different folders. All nodes need one that they share."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rates = _learning_rates(trainer)  # the checkpoint's optimizers are not yet loaded

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.given is not None and not self.is_taken:
            check_optimizers(self.given, trainer)
            if self._rates != (now := _learning_rates(trainer)):
                rank_zero_warn(
                    f"The learning rates of the checkpoint, {now}, go on, not those of model: {self._rates}. For these "
                    "start from its weights: `export` the checkpoint and give the folder as model.model_name_or_path."
                )
        self._begin(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that goes on after its last step has no step to begin, and may have what a cut left.
        self._begin(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        if self.is_taken:
            return
        self.is_taken = True
        if self.given is not None and trainer.state.fn != TrainerFn.FITTING:
            # Lightning loads weights alone for an evaluation; whatever is logged belongs to the checkpoint's step.
            trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.given.step
        failure: Exception | None = None
        if trainer.is_global_zero:
            try:
                self.take()
            except (OSError, SDSearchError) as error:
                failure = error
        if (told := told_by_all(trainer, None if failure is None else str(failure))) is not None:
            raise failure or StorageError(told)


class QuestionsFirst(pl.Callback):
    """Reads the training questions before the evaluation that `fit` begins with, which may take hours."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "validate":  # fitting does so by itself
            return
        questions = trainer.datamodule.training_questions  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RolloutGrouping) and callback.credit is not None:
                callback.credit.check_questions(questions)
            if isinstance(callback, CreditDiagnostics) and callback.evidence is not None:
                callback.evidence.check_questions(questions)


def _learning_rates(trainer: pl.Trainer) -> list[float]:
    return [
        group.get("initial_lr", group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups
    ]


def check_optimizers(saved: StoredCheckpoint, trainer: pl.Trainer) -> None:
    """Raises ConfigError where the run has other optimizers than the checkpoint: Lightning would load what it can."""
    if saved.num_optimizers != len(trainer.optimizers):
        raise ConfigError(
            f"ckpt_path: the checkpoint holds {saved.num_optimizers} optimizers, model: makes "
            f"{len(trainer.optimizers)}. Give those it was trained with, or `export` it and start from its weights."
        )
