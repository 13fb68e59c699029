"""The report in a terminal: a before/after table, one question's rollouts, where the files are.

At most 100 columns; coloured only on a terminal; every text from a rollout is wrapped in `Text`, never read as markup.
"""

from __future__ import annotations

import shutil
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sdsearch_lightning.report.example import Example, Row, harmless, is_correct, printable, rows
from sdsearch_lightning.report.summary import Summary
from sdsearch_lightning.report.trajectories import Record

WIDTH = 100
STYLES = {"REASONING": "dim", "QUERY": "bold cyan", "OBSERVATION": "blue", "REFINE": "magenta", "ANSWER": "bold"}
RIGHT, WRONG = "green", "red"
OBSERVATION_LENGTH = 160
"""Characters of an observation that are shown: enough to see whether the search found the fact."""
FILES = {
    "summary.json": "these numbers",
    "report.html": "curves and rollouts, for a browser",
    "metrics.csv": "every metric at every step",
    "trajectories.jsonl": "every logged rollout, one JSON line each",
    "checkpoints": "to resume from",
    "model": "weights and tokenizer, a Hugging Face folder",
}


def make_console() -> Console:
    """A console on standard output that is never wider than 100 columns, and plain where that is no terminal."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal lacks must not end a finished run
    console = Console(highlight=False)
    console.width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH) if console.is_terminal else WIDTH
    return console


def print_console_report(run_folder: Path, summary: Summary, example: Example, console: Console | None = None) -> None:
    """Prints the whole report of a run."""
    console = console or make_console()
    console.print()
    console.print(_heading(run_folder, summary))
    console.print()
    console.print(Padding(_table(summary), (0, 0, 0, 2), expand=False))
    console.print(Padding(Text(printable(self_distillation_line(summary["sd"])), "dim"), (1, 0, 1, 2), expand=False))
    if example.after:
        _print_example(console, example)
    _print_files(console, run_folder)


def _heading(run_folder: Path, summary: Summary) -> Text:
    """`quickstart  200 held-out questions, 40 steps, seed 0, 3 min 12 s`."""
    facts = [
        summary["questions"] is not None and f"{summary['questions']} held-out questions",
        summary["sd"]["steps"] and f"{summary['sd']['steps']} steps",
        summary["seed"] is not None and f"seed {summary['seed']}",
        summary["seconds"] is not None and duration(summary["seconds"]),
    ]
    told = printable(", ".join(str(fact) for fact in facts if fact))
    return Text(printable(run_folder.resolve().name), "bold").append(f"  {told}", "not bold")


def duration(seconds: float) -> str:
    """`45 s`, `3 min 12 s` or `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def comparison(summary: Summary) -> list[tuple[str, dict[str, float | None]]]:
    """The measured quantities of a report, each with its values before and after."""
    return [
        ("exact match, greedy", summary["exact_match"]),
        ("exact match, sampled", summary["sampled"]["exact_match"]),
        ("F1, greedy", summary["f1"]),
        ("F1, sampled", summary["sampled"]["f1"]),
        ("searches per question", summary["searches_per_question"]),
        ("valid-action rate", summary["valid_action_rate"]),
    ]


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals, or `-` for what was not measured."""
    return "-" if value is None else f"{value:{'+' if signed else ''}.3f}"


def _table(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("on held-out questions")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name, values in comparison(summary):
        before, after = values["before"], values["after"]
        change = None if before is None or after is None else after - before
        table.add_row(name, number(before), Text(number(after), "bold"), number(change, signed=True))
    return table


def self_distillation_line(sd: dict[str, Any]) -> str:
    """What the JSD term did, in a sentence."""
    if not sd["active_steps"]:
        return "self-distillation: off (weight 0)"
    line = f"self-distillation: weight {sd['weight']:g} in {sd['active_steps']} of {sd['steps']} steps"
    if sd["jsd_first"] is not None:
        line += f", JSD {number(sd['jsd_first'])} to {number(sd['jsd_last'])} nats"
    return line + f", {sd['teacher_rows']:,} teacher rows"


def _print_example(console: Console, example: Example) -> None:
    question = example.after[0]["question"]
    console.print(Text("One held-out question", "bold").append(f"  {example.choice}", "not bold dim"))
    console.print()
    fields = {"question": question["text"], "gold": " | ".join(question["answers"])}
    _print_fields(console, [(label, Text(printable(text))) for label, text in fields.items()])
    for record in (*example.before, *example.after):
        console.print()
        console.print(_rollout_heading(record, "before" if record in example.before else "after"))
        _print_fields(console, [(row.label, _row_text(row, record)) for row in rows(record)], labelled=True)
    console.print()


def _rollout_heading(record: Record, when: str) -> Text:
    decoding = "sampled" if record["phase"] == "val_sampled" else "greedy"
    heading = Text(f"  {when}, {decoding}", "bold").append(f"  step {printable(str(record['step']))}  ", "not bold dim")
    verdict, style = verdict_of(record)
    return heading.append(verdict, f"not bold {style}")


def verdict_of(record: Record) -> tuple[str, str]:
    """How a rollout ended, and the colour that says so."""
    if is_correct(record):
        return "right", RIGHT
    if record["answer"] is not None:
        return "wrong", WRONG
    return "no answer: " + printable(record["stop_reason"].lower().replace("_", " ")), WRONG


def _row_text(row: Row, record: Record) -> Text:
    style = STYLES[row.kind]
    if row.kind == "ANSWER":
        style += f" {RIGHT if is_correct(record) else WRONG}"
    text = row.text
    if row.kind == "OBSERVATION" and len(text) > OBSERVATION_LENGTH:
        text = text[:OBSERVATION_LENGTH].rstrip() + " ..."
    return Text(text, style)


def _print_fields(console: Console, fields: list[tuple[str, Text]], *, labelled: bool = False) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=8, style="dim")
    grid.add_column(overflow="fold")
    for label, text in fields:
        grid.add_row(label, text)
    console.print(Padding(grid, (0, 0, 0, 4 if labelled else 2), expand=False))


def _print_files(console: Console, run_folder: Path) -> None:
    present = {name: meaning for name, meaning in FILES.items() if (run_folder / name).exists()}
    width = max((len(str(run_folder / name)) for name in present), default=0)
    for name, meaning in present.items():
        # A path is never wrapped: it is there to be copied.
        line = Text("  ").append(f"{harmless(str(run_folder / name)):<{width}}").append(f"  {meaning}", "dim")
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
