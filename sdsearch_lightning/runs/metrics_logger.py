"""MetricsLogger: the rows of metrics.csv.

Invariant: a resumed run cuts the file at the restored step and grows it on from there, so that a run killed at any
moment and started again leaves the rows of the uninterrupted one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.files import written_whole


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
        """Write the whole file anew."""
        with written_whole(self.path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
