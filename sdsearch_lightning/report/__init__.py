"""Reports of a run: summary.json, report.html and the table in the terminal.

Everything is made from the files of the run folder, so a report can be made again at any time; nothing here imports
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdsearch_lightning.report.console import make_console, print_console_report
from sdsearch_lightning.report.evaluation import print_evaluation, print_evaluations, read_evaluations
from sdsearch_lightning.report.example import choose_example
from sdsearch_lightning.report.html import write_html_report
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.report.summary import build_summary, read_summary, write_summary
from sdsearch_lightning.report.trajectories import read_trajectories

__all__ = ["finish_run", "print_report", "read_trajectories"]


def finish_run(run_folder: Path, facts: dict[str, Any]) -> None:
    """Writes summary.json and report.html of a finished run, then prints the report. For rank 0 only.

    Args:
        run_folder: runs/<name>, with metrics.csv and, if rollouts were logged, trajectories.jsonl.
        facts: what metrics.csv cannot know: seconds, seed, max_searches; see `build_summary`.

    Raises:
        ConfigError: no metrics.csv in `run_folder`.
        DataError: a line of metrics.csv or trajectories.jsonl that cannot be read.
    """
    metrics = read_metrics(run_folder)
    summary = build_summary(metrics, facts)
    write_summary(run_folder, summary)
    example = choose_example(run_folder / "trajectories.jsonl")
    write_html_report(run_folder, summary, metrics, example)
    print_console_report(run_folder, summary, example)


def print_report(run_folder: Path) -> None:
    """Prints the report of a run and writes report.html anew.

    Evaluations of the run are listed below it; where there is nothing else, they are shown.

    A run without summary.json is not finished: its report is made from what is there, and no summary.json is written.

    Raises:
        ConfigError, DataError: as `finish_run`.
    """
    evaluations = read_evaluations(run_folder)
    if evaluations and not (run_folder / "metrics.csv").is_file():  # of a model that was not trained here
        for _, evaluation in evaluations:
            print_evaluation(make_console(), evaluation)
        return
    metrics = read_metrics(run_folder)
    summary = read_summary(run_folder) or build_summary(metrics, {})
    example = choose_example(run_folder / "trajectories.jsonl")
    write_html_report(run_folder, summary, metrics, example)
    print_console_report(run_folder, summary, example)
    if evaluations:
        console = make_console()
        console.print()
        print_evaluations(console, evaluations)
