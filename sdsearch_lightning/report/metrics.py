"""metrics.csv as curves: the cells are sparse, columns may be missing, and the order of the rows is kept."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from sdsearch_lightning.errors import ConfigError, DataError


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


Metrics = dict[str, list[Point]]
"""Points of each metric key in file order; a key that was never logged is absent."""


def read_metrics(run_folder: Path) -> Metrics:
    """All curves of a run.

    Raises:
        ConfigError: no metrics.csv in `run_folder`.
        DataError: a cell that is no number.
    """
    path = run_folder / "metrics.csv"
    if not path.is_file():
        raise ConfigError(
            f"expected a run folder with metrics.csv, found none in {run_folder}. "
            "Give a folder such as runs/quickstart."
        )
    metrics: Metrics = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = int(float(row["step"]))
                for key, cell in row.items():
                    if cell and "/" in key:
                        metrics.setdefault(key, []).append(Point(step, float(cell)))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} line {number}: expected numbers and a column 'step', got {row}.") from error
    return metrics
