"""Cells and lines of the Markdown tables of the studies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.measures import Difference


def header(names: Sequence[str]) -> Iterator[str]:
    """The first two lines of a table."""
    yield row(names)
    yield row(["---"] * len(names))


def row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def number(value: float | None, digits: int) -> str:
    """A cell; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def difference(found: Difference | None, digits: int) -> str:
    """A cell: the mean of differences with its sign, and half of its interval where there is one."""
    if found is None:
        return "–"
    spread = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:+.{digits}f}{spread}"
