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

from sdsearch_lightning.checkpoints.writing import retire, save
from sdsearch_lightning.files import written_whole
from sdsearch_lightning.runs.folder import RunFolder, RunOptions


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
            every = self.options.checkpoint_keep_every
            for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.options.checkpoint_keep]:
                if every is None or int(old.stem.removeprefix("step_")) % every:
                    retire(old)
        self._saved, self.is_requested = None, False

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
    its own, so that a quantity that did not occur would look as if it had, and a resumed run would differ.
    """

    def __init__(self, checkpoint: RunCheckpoint) -> None:
        self.checkpoint = checkpoint

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.checkpoint.publish(trainer)
        for metric in trainer.fit_loop._results.values():
            if not metric.meta.on_epoch:  # a mean over the epoch is still being taken
                metric.reset()
