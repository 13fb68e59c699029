"""An evaluation that one can publish: a row per source of questions, their macro average, and how sure each number is.

Intervals are percentiles of a bootstrap over questions: those of a source are drawn anew with replacement, each source
by itself, by a seed of its name alone. They tell how much scores would move on other questions of the same kind, and
nothing of other training seeds. EM and F1 of a question are means over its rollouts, one where decoding is greedy.

    runs/<name>/<command>/<weights>/evaluation.json     everything; schema 1
    runs/<name>/<command>/<weights>/evaluation.md       the table
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.example import printable

SCHEMA = 1
FILE, TABLE = "evaluation.json", "evaluation.md"
RESAMPLES, LEVEL = 2000, 0.95
_CHUNK = 4_000_000
"""Counts that are held in memory at once."""
Evaluation = dict[str, Any]


class Scored(NamedTuple):
    """One question and what its rollouts were worth."""

    position: int
    """In the evaluation; a question is counted once, whichever process answered it."""
    source: str
    exact_match: float
    f1: float
    searches: float
    answered: float
    failed: float
    """Share of rollouts that a failed search ended."""


def summarize(rows: Iterable[Scored], resamples: int = RESAMPLES) -> Evaluation:
    """Scores by source, in the order of the questions, and their macro average.

    Args:
        rows: of all processes.
        resamples: of the bootstrap.

    Returns:
        `questions`, `sources` and `macro`; a source has exact_match and f1 as {value, low, high}.
    """
    import numpy as np

    ordered = sorted({row.position: row for row in rows}.values())
    names = list(dict.fromkeys(row.source for row in ordered))
    sources: list[Evaluation] = []
    draws = []
    for name in names:
        values = np.array([row[2:] for row in ordered if row.source == name], dtype=np.float64)
        drawn = _bootstrap(values[:, :2], resamples, zlib.crc32(name.encode()))
        sources.append({"source": name, "questions": len(values)} | _scores(values.mean(axis=0), drawn))
        draws.append(drawn)
    macro = None
    if sources:
        rates = ("searches_per_question", "answered_rate", "retrieval_error_rate")
        columns = [[s["exact_match"]["value"], s["f1"]["value"], *(s[key] for key in rates)] for s in sources]
        macro = _scores(np.mean(columns, axis=0), np.mean(draws, axis=0))
    return {"questions": len(ordered), "sources": sources, "macro": macro}


def _bootstrap(values: Any, resamples: int, seed: int) -> Any:
    """[R, M] means of resampled rows of `values` [N, M]."""
    import numpy as np

    # Rows that are equal are drawn together, as a multinomial count: few questions differ in both scores.
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    generator, share, step = np.random.default_rng(seed), counts / counts.sum(), max(1, _CHUNK // len(distinct))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    drawn = [generator.multinomial(len(values), share, size) @ distinct for size in sizes]
    return np.concatenate(drawn) / len(values)


def _scores(means: Any, draws: Any) -> Evaluation:
    import numpy as np

    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    em, f1 = (
        {"value": round(float(means[i]), 6), "low": round(float(low[i]), 6), "high": round(float(high[i]), 6)}
        for i in (0, 1)
    )
    names = ("searches_per_question", "answered_rate", "retrieval_error_rate")
    rest = {name: round(float(value), 6) for name, value in zip(names, means[2:], strict=True)}
    return {"exact_match": em, "f1": f1} | rest


def interval_facts(resamples: int = RESAMPLES) -> Evaluation:
    """How the intervals were made, for the file."""
    return {"level": LEVEL, "method": "percentile bootstrap over questions, by source", "resamples": resamples}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write evaluation.json and evaluation.md into the folder."""
    write_text(folder / FILE, json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / TABLE, to_markdown(evaluation))


def read_evaluations(run_folder: Path) -> list[tuple[Path, Evaluation]]:
    """Folder and content of each evaluation of a run, by command and step.

    Raises:
        DataError: a file that cannot be read.
    """
    found = []
    for path in run_folder.glob(f"*/*/{FILE}"):
        try:
            evaluation = json.loads(path.read_bytes())
            assert evaluation["schema"] == SCHEMA
            found.append((path.parent, dict(evaluation)))
        except (OSError, ValueError, TypeError, LookupError, AssertionError) as error:
            raise DataError(f"{path}: expected an evaluation of schema {SCHEMA} ({error}). Delete it.") from error
    return sorted(found, key=lambda pair: (pair[1]["command"], pair[1]["step"], pair[0].name))


def tables(evaluation: Evaluation) -> list[tuple[str, Evaluation]]:
    """The tables of an evaluation by their decoding: greedy, and sampled where there is one."""
    sampled = evaluation.get("sampled")
    drawn = f"sampled decoding, {sampled['samples']} per question" if sampled else ""
    return [("greedy decoding", evaluation), *([(drawn, sampled)] if sampled else [])]


def cells(scores: Evaluation) -> tuple[str, ...]:
    """A row's EM, F1 and searches as they are shown."""
    shown = [
        f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
        for score in (scores["exact_match"], scores["f1"])
    ]
    return (*shown, f"{scores['searches_per_question']:.2f}")


COLUMNS = ("source", "questions", "EM [95 %]", "F1 [95 %]", "searches")


def rows_of(table: Evaluation) -> list[tuple[str, ...]]:
    """Rows of a table, the macro average last where there are several sources."""
    rows = [(str(source["source"]), str(source["questions"]), *cells(source)) for source in table["sources"]]
    if len(rows) > 1:
        rows.append(("macro average", str(table["questions"]), *cells(table["macro"])))
    return rows


def caption(evaluation: Evaluation, decoding: str) -> str:
    """How the numbers came about, in a sentence."""
    limits = evaluation["decoding"]
    bounds = [f"at most {limits['max_searches']} searches", f"{limits['top_k']} passages each"]
    part = evaluation.get("limit_per_source")
    subset = f", {part} drawn questions per source at most" if part else ""
    return f"{decoding}, {', '.join(bounds)}{subset}; intervals: bootstrap over questions"


def heading(evaluation: Evaluation) -> str:
    """What was evaluated, such as `test of quickstart, step 40`."""
    return f"{evaluation['command']} of {evaluation['weights']}, step {evaluation['step']}"


def to_markdown(evaluation: Evaluation, level: str = "#") -> str:
    """The evaluation as a page or a section of one."""
    parts = [f"{level} {heading(evaluation)}"]
    for decoding, table in tables(evaluation):
        rows = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows_of(table)]
        parts.append("\n".join([f"| {' | '.join(COLUMNS)} |", "|---|--:|--:|--:|--:|", *rows]))
        parts.append(f"{caption(evaluation, decoding).capitalize()}.")
    return "\n\n".join(parts) + "\n"


def _escaped(cell: str) -> str:
    return printable(cell).replace("|", "\\|").replace("<", "&lt;")


def print_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Print the tables of an evaluation."""
    console.print(Text(printable(heading(evaluation)), "bold"))
    for decoding, shown in tables(evaluation):
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        for index, column in enumerate(COLUMNS):
            table.add_column(Text(column), justify="right" if index else "left", no_wrap=bool(index))
        for row in rows_of(shown):
            style = "bold" if row[0] == "macro average" else ""
            table.add_row(*(Text(printable(cell)) for cell in row), style=style)
        console.print(table)
        console.print(Text(printable(caption(evaluation, decoding)), "dim"))


def print_evaluations(console: Console, found: Sequence[tuple[Path, Evaluation]]) -> None:
    """Print a line for each evaluation of a run."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("evaluations", "step", "questions", "EM, macro [95 %]", "F1, macro [95 %]"):
        table.add_column(Text(name), justify="left" if name == "evaluations" else "right")
    for folder, evaluation in found:
        shown = cells(evaluation["macro"])[:2] if evaluation["macro"] else ("-", "-")
        name = printable(f"{folder.parent.name}/{folder.name}")
        cell = (name, str(evaluation["step"]), str(evaluation["questions"]), *shown)
        table.add_row(*(Text(printable(text)) for text in cell))
    console.print(table)
