"""Several runs in a terminal: a row of numbers for each, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.console import duration, make_console, number
from sdsearch_lightning.report.example import harmless, printable
from sdsearch_lightning.report.html import Run
from sdsearch_lightning.report.settings import differences
from sdsearch_lightning.report.summary import Summary

MAX_SETTINGS = 12
"""Settings that differ and are listed; the page has all."""
VALUE_LENGTH = 24


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many of the folders above as tell the runs apart.

    Raises:
        ConfigError: a folder that is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"report: expected different runs, got {path} twice.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def print_comparison(runs: Sequence[Run], page: Path, console: Console | None = None) -> None:
    """Prints the comparison of several runs and where its page is."""
    console = console or make_console()
    console.print()
    console.print(Padding(_scores(runs), (0, 0, 1, 2), expand=False))
    changed = differences([run.settings for run in runs])
    if changed:
        console.print(Padding(_settings(runs, changed[:MAX_SETTINGS]), (0, 0, 1, 2), expand=False))
    if len(changed) > MAX_SETTINGS:
        console.print(Text(f"  and {len(changed) - MAX_SETTINGS} more settings, in the page\n", "dim"))
    print_page(page, console)


def print_page(page: Path, console: Console | None = None) -> None:
    """Prints where a page is, on one line: it is there to be copied."""
    line = Text("  ").append(harmless(str(page))).append("  curves and rollouts, for a browser", "dim")
    (console or make_console()).print(line, no_wrap=True, overflow="ignore", crop=False)


def _scores(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("on held-out questions", overflow="fold")
    for name in ("EM before", "EM after", "sampled", "F1", "searches", "valid", "steps", "time"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(Text(printable(run.name)), *_cells(run.summary))
    return table


def _cells(summary: Summary) -> list[Text]:
    seconds, steps = summary["seconds"], summary["sd"]["steps"]
    values = [
        number(summary["exact_match"]["before"]),
        number(summary["exact_match"]["after"]),
        number(summary["sampled"]["exact_match"]["after"]),
        number(summary["f1"]["after"]),
        number(summary["searches_per_question"]["after"]),
        number(summary["valid_action_rate"]["after"]),
        str(steps) if steps else "-",
        "-" if seconds is None else duration(seconds),
    ]
    return [Text(printable(value), "bold" if index == 1 else "") for index, value in enumerate(values)]


def _settings(runs: Sequence[Run], changed: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("settings that differ", overflow="fold")
    for run in runs:
        table.add_column(Text(printable(run.name)), overflow="fold")
    for key, values in changed:
        table.add_row(Text(printable(key)), *(Text(_cut(value)) for value in values))
    return table


def _cut(value: str) -> str:
    return value if len(value) <= VALUE_LENGTH else value[: VALUE_LENGTH - 1] + "…"
