"""Reports of a run: summary.json, report.html and the table in the terminal.

Everything is made from the files of the run folder, so a report can be made again at any time; nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.console import make_console, print_console_report
from sdsearch_lightning.report.curves import COLORS
from sdsearch_lightning.report.evaluation import print_evaluation, print_evaluations, read_evaluations
from sdsearch_lightning.report.html import MAX_PAGE, Run, write_page
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.report.rollouts import read_rollouts
from sdsearch_lightning.report.settings import read_settings
from sdsearch_lightning.report.summary import Summary, build_summary, read_summary, write_summary
from sdsearch_lightning.report.trajectories import read_trajectories
from sdsearch_lightning.report.versus import names_of, print_comparison, print_page

OTHERS = 350_000
"""Bytes of a page for what each run has beside its rollouts: curves above all."""

__all__ = ["compare_runs", "finish_run", "print_report", "read_trajectories"]


def finish_run(run_folder: Path, facts: dict[str, Any]) -> None:
    """Writes summary.json and report.html of a finished run, then prints the report. For rank 0 only.

    Args:
        run_folder: runs/<name>, with metrics.csv and, if rollouts were logged, trajectories.jsonl.
        facts: what metrics.csv cannot know: seconds, seed, max_searches; see `build_summary`.

    Raises:
        ConfigError: no metrics.csv in `run_folder`.
        DataError: a line of metrics.csv or trajectories.jsonl that cannot be read.
    """
    summary = build_summary(read_metrics(run_folder), facts)
    write_summary(run_folder, summary)
    _report(run_folder, summary)


def print_report(run_folder: Path, path: Path | None = None) -> None:
    """Prints the report of a run and writes its page anew.

    Evaluations of the run are listed below it; where there is nothing else, they are shown.

    A run without summary.json is not finished: its report is made from what is there, and no summary.json is written.

    Args:
        run_folder: runs/<name>.
        path: of the page; None: report.html in the run folder.

    Raises:
        ConfigError, DataError: as `finish_run`.
    """
    evaluations = read_evaluations(run_folder)
    if evaluations and not (run_folder / "metrics.csv").is_file():  # of a model that was not trained here
        for _, evaluation in evaluations:
            print_evaluation(make_console(), evaluation)
        return
    _report(run_folder, read_summary(run_folder), path)
    if evaluations:
        console = make_console()
        console.print()
        print_evaluations(console, evaluations)


def compare_runs(run_folders: Sequence[Path], path: Path) -> None:
    """Prints a table of several runs and writes one page with the curves and rollouts of all.

    Args:
        run_folders: two to eight of them.
        path: of the page.

    Raises:
        ConfigError, DataError: as `finish_run`; too many runs, or one of them twice.
    """
    if len(run_folders) > COLORS:
        raise ConfigError(f"report: expected at most {COLORS} runs, one for each colour, got {len(run_folders)}.")
    check_page(path)
    names = names_of(run_folders)
    runs = [read_run(folder, name, len(names)) for folder, name in zip(run_folders, names, strict=True)]
    write_page(path, runs)
    print_comparison(runs, path)


def check_page(path: Path) -> None:
    """Refuses a name that a page would replace something else by.

    Raises:
        ConfigError: it does not end in .html, or is a folder.
    """
    if path.suffix != ".html" or path.is_dir():
        found = "a folder" if path.is_dir() else "another name"
        raise ConfigError(f"--output: expected a file that ends in .html, got {path}, {found}.")


def read_run(run_folder: Path, name: str, num_runs: int = 1, summary: Summary | None = None) -> Run:
    """All that a page shows of a run.

    Args:
        run_folder: runs/<name>.
        name: that it has on the page.
        num_runs: on the page, which share its bytes.
        summary: of the run; None reads or builds it.
    """
    metrics = read_metrics(run_folder)
    summary = summary or read_summary(run_folder) or build_summary(metrics, {})
    rollouts = read_rollouts(run_folder / "trajectories.jsonl", MAX_PAGE // num_runs - OTHERS)
    return Run(name, summary, metrics, rollouts, read_settings(run_folder))


def _report(run_folder: Path, summary: Summary | None, path: Path | None = None) -> None:
    if path is not None:
        check_page(path)
    run = read_run(run_folder, run_folder.resolve().name, summary=summary)
    write_page(path or run_folder / "report.html", [run])
    print_console_report(run_folder, run.summary, run.rollouts.example)
    if path is not None:
        print_page(path)
