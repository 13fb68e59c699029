"""RunCheckpoint: which steps are saved, and which one a run goes on from.

Invariant: `last.ckpt` names a step only when everything that this step writes (its rows, its validation, its
rollouts) is on disk. So a run killed at any moment and started again writes what the uninterrupted run writes. A
checkpoint is therefore saved at the end of a batch, when the data loader's position and all callback states belong to
it, and published at the start of the next.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from sdsearch_lightning.checkpoints.writing import retire, save, told_by_all
from sdsearch_lightning.errors import StorageError
from sdsearch_lightning.files import GO_ON, sync_names, written_whole
from sdsearch_lightning.runs.folder import RunFolder, RunOptions
from sdsearch_lightning.runs.metrics_logger import MetricsLogger
from sdsearch_lightning.trust.secrets import without_secrets


class RunCheckpoint(Checkpoint):
    """Saves `step_<n>.ckpt` every few steps, at the end of an epoch and of the run, and points `last.ckpt` at it.

    The newest are kept, two by default: should one prove damaged, the run goes on from the one before.

    Args:
        folder: where to save.
        options: how often, and which ones stay.
    """

    def __init__(self, folder: Path, options: RunOptions) -> None:
        self.folder = folder
        self.options = options
        self.is_requested = False
        self._saved: Path | None = None
        self._seconds = 0.0
        self._clock = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, those before a resume included."""
        return self._seconds + time.monotonic() - self._clock

    def request(self) -> None:
        """Asks for a checkpoint at the end of this batch, whatever its step; on all ranks alike."""
        self.is_requested = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_due = step % self.options.checkpoint_every == 0 or step == trainer.max_steps or trainer.is_last_batch
        if is_due or self.is_requested:
            self._saved = self.folder / f"step_{step:08d}.ckpt"
            save(trainer, self._saved, self._intact())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish(trainer)

    def publish(self, trainer: Trainer) -> None:
        """Points last.ckpt at the checkpoint saved last, now that its step is wholly written."""
        if self._saved is not None and trainer.is_global_zero:
            with written_whole(self.folder / "last.ckpt") as link:
                link.symlink_to(self._saved.name)
            for old in self.options.outdated(sorted(self.folder.glob("step_*.ckpt"))):
                retire(old)
                sync_names(self.folder)
        self._saved, self.is_requested = None, False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Hyperparameters that a class of the user's saves are there by now."""
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if key in checkpoint:
                checkpoint[key] = without_secrets(checkpoint[key])

    def _intact(self) -> str:
        step = RunFolder(self.folder.parent).published_step
        left = "No checkpoint was saved before" if step is None else f"The checkpoint of step {step} is intact"
        return f"{left}. Free some space (or allow writing) and run the same command again: it goes on from there."

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._clock = state_dict["seconds"], time.monotonic()


class StepBoundary(Callback):
    """First in the list of callbacks: closes the step before, ahead of the long rollouts of the next.

    It publishes the checkpoint, which `RunCheckpoint` cannot do in time: Lightning moves checkpoint callbacks to the
    end. And it forgets the logged values: Lightning would log them again in each step of the epoch that has none of
    its own, so that a quantity that did not occur would look as if it had, and a resumed run would differ. Where a row
    could not be written it ends the run, on all ranks and before a checkpoint that counts on the row is published.
    """

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise_lost_rows(trainer)
        self.checkpoint.publish(trainer)
        for metric in trainer.fit_loop._results.values():
            if not metric.meta.on_epoch:  # a mean over the epoch is still being taken
                metric.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise_lost_rows(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise_lost_rows(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise_lost_rows(trainer)


def raise_lost_rows(trainer: Trainer) -> None:
    """Raises StorageError on all ranks where rank 0 could not write a row of metrics.csv."""
    failures = [logger.failure for logger in trainer.loggers if isinstance(logger, MetricsLogger)]
    if (told := told_by_all(trainer, next(filter(None, failures), None))) is not None:
        raise StorageError(f"{told}. {GO_ON}")
