"""What a run leaves on disk as it goes: rows of metrics.csv and checkpoints.

Invariant: `last.ckpt` names a step only when everything that this step writes (its rows, its validation, its
rollouts) is on disk. So a run killed at any moment and started again writes what the uninterrupted run writes:
metrics.csv is cut at the restored step and grows on from there. A checkpoint is therefore saved at the end of a batch,
when the data loader's position and all callback states belong to it, and published at the start of the next.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.checkpoints.writing import retire, save
from sdsearch_lightning.run_folder import RunFolder


class MetricsLogger(Logger):
    """Appends a row to a CSV file each time something is logged; cells that were not logged are empty.

    The column `step` is the trainer's `global_step`: a training row and the validation after it share their step.

    Args:
        path: the CSV file; what it holds is kept.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.trainer: Trainer | None = None
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one version: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row; a metric that is new adds its column, for which the file is written anew."""
        row = {"step": self.trainer.global_step if self.trainer else step, **metrics}
        if self._columns is None:
            self._columns = list(self._read()[0])
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._write(self._columns, [*self._read()[1], row])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    @rank_zero_only
    def cut_after(self, step: int) -> None:
        """Drops the rows of steps after `step`, and the columns that only they had."""
        rows = [row for row in self._read()[1] if int(row["step"]) <= step]
        self._columns = [key for key in self._read()[0] if any(row[key] for row in rows)]
        self._write(self._columns, rows)

    def has(self, prefix: str, step: int) -> bool:
        """Whether some metric that starts with `prefix` is logged for `step`."""
        rows = [row for row in self._read()[1] if row["step"] == str(step)]
        return any(cell and key.startswith(prefix) for row in rows for key, cell in row.items())

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and rows; a last line that a kill cut off is left out."""
        if not self.path.is_file():
            return [], []
        lines = [
            line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
        ]
        reader = csv.DictReader(lines)
        return list(reader.fieldnames or ()), list(reader)

    def _write(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f".{self.path.name}.draft")
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(draft, self.path)


class RunCheckpoint(Checkpoint):
    """Saves `step_<n>.ckpt` every few steps, at the end of an epoch and of the run, and points `last.ckpt` at it.

    Two checkpoints are kept: should the newest prove damaged, the run goes on from the one before.

    Args:
        folder: where to save.
        every_n_steps: steps between two checkpoints.
    """

    def __init__(self, folder: Path, every_n_steps: int = 10) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
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
        is_due = step % self.every_n_steps == 0 or step == trainer.max_steps or trainer.is_last_batch
        if is_due or self.is_requested:
            self._saved = self.folder / f"step_{step:08d}.ckpt"
            save(trainer, self._saved, self._intact())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.publish(trainer)

    def publish(self, trainer: Trainer) -> None:
        """Points last.ckpt at the checkpoint saved last, now that its step is wholly written."""
        if self._saved is not None and trainer.is_global_zero:
            link = self.folder / ".last.ckpt.draft"
            link.unlink(missing_ok=True)
            link.symlink_to(self._saved.name)
            os.replace(link, self.folder / "last.ckpt")
            for old in sorted(self.folder.glob("step_*.ckpt"))[:-2]:
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
