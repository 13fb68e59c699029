"""MetricsLogger: the rows of metrics.csv.

Invariant: a resumed run cuts the file at the restored step and grows it on from there, so that a run killed at any
moment and started again leaves the rows of the uninterrupted one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.files import append_lines, written_whole
from sdsearch_lightning.report.metrics import read_rows


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
        self.failure: str | None = None
        """Why rows are missing: rank 0 alone is here, so all ranks raise it when they meet, see `StepBoundary`."""
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the run, which is that of its folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """There is one version: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Path of the run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row; a metric that is new adds its column, for which the file is written anew."""
        row = {"step": self.trainer.global_step if self.trainer else step, **metrics}
        try:
            self._append(row)
        except OSError as error:
            self.failure = self.failure or f"{self.path} could not be written: {error.strerror or error}"

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._columns is None:
            self._columns = list(read_rows(self.path).columns)
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._write(self._columns, [*read_rows(self.path).rows, row])
        else:
            line = io.StringIO(newline="")
            csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
            append_lines(self.path, [line.getvalue()])

    def cut_after(self, step: int) -> list[str]:
        """Drops the rows of steps after `step`, the columns that only they had, and lines that are no rows.

        Returns:
            What is missing afterwards, a line for each; for rank 0 only.
        """
        found = read_rows(self.path)
        rows = [row for row in found.rows if int(row["step"]) <= step]
        self._columns = [key for key in found.columns if any(row[key] for row in rows)]
        self._write(self._columns, rows)
        told = [f"{self.path} {place}: no row of numbers (a power cut?), cut out." for place in found.damaged]
        last = max((int(row["step"]) for row in rows), default=0)
        every: int | None = getattr(self.trainer, "log_every_n_steps", None)
        if self.trainer is not None and every and self in self.trainer.loggers and step - last >= every:
            told.append(f"{self.path} ends with step {last}, the run goes on after step {step}: rows are lost.")
        return told

    def has(self, prefix: str, step: int) -> bool:
        """Whether some metric that starts with `prefix` is logged for `step`."""
        rows = [row for row in read_rows(self.path).rows if row["step"] == str(step)]
        return any(cell and key.startswith(prefix) for row in rows for key, cell in row.items())

    def _write(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the whole file anew."""
        with written_whole(self.path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
