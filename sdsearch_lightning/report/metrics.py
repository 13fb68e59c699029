"""metrics.csv as rows and as curves: the cells are sparse, columns may be missing, and the order of the rows is kept.

A row is complete when it ends in a newline. A power cut may leave a block of zeros, or half a line that later rows were
written behind: such a line is no row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdsearch_lightning.errors import ConfigError, DataError


class Point(NamedTuple):
    """A value at a step."""

    step: int
    value: float


Metrics = dict[str, list[Point]]
"""Points of each metric key in file order; a key that was never logged is absent."""


@dataclass(frozen=True)
class Rows:
    """What a metrics.csv holds."""

    columns: list[str]
    rows: list[dict[str, str]]
    damaged: list[str]
    """Lines that end in a newline and are no rows: their numbers and beginnings."""


def read_rows(path: Path) -> Rows:
    """The rows of a metrics.csv; none where there is no file. What follows the last newline is not yet written.

    Raises:
        DataError: the columns cannot be read.
    """
    contents = path.read_bytes() if path.is_file() else b""
    whole = contents[: contents.rfind(b"\n") + 1]
    lines = io.StringIO(whole.decode(errors="replace"), newline="\n")
    first = next(_parsed(lines), [])
    if whole and ("step" not in first or len(set(first)) < len(first) or "\0" in "".join(first)):
        raise DataError(
            f"{path} line 1: expected the columns, 'step' among them, got {first[:3]}. Restore it or remove it."
        )
    header = "".join(first).count("\n") + 1
    rows, damaged = [], []
    for number, line in enumerate(lines, start=header + 1):
        row = dict(zip(first, cells, strict=True)) if len(cells := next(_parsed([line]), [])) == len(first) else None
        if row is not None and _is_row(row):
            rows.append(row)
        else:
            damaged.append(f"line {number}, {line[:40]!r}")
    return Rows(first, rows, damaged)


def _parsed(lines: Iterable[str]) -> Iterator[list[str]]:
    """What csv reads; nothing where it cannot."""
    with suppress(csv.Error):  # such as a field longer than it takes
        yield from csv.reader(lines)


def _is_row(row: dict[str, str]) -> bool:
    try:
        return int(row["step"]) >= 0 and all(isinstance(float(cell), float) for cell in row.values() if cell)
    except ValueError:
        return False


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
    found = read_rows(path)
    if found.damaged:
        raise DataError(f"{path} {found.damaged[0]}: expected a number or nothing in each column. Delete that line.")
    metrics: Metrics = {}
    for row in found.rows:
        for key, cell in row.items():
            if cell and "/" in key:
                metrics.setdefault(key, []).append(Point(int(row["step"]), float(cell)))
    return metrics
