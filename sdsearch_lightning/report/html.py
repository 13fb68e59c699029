"""report.html: one self-contained page: curves, the rollouts and the credit of each query to explore, the settings.

The page loads nothing. Templates escape what they are given; rollouts travel as one JSON island, which the page's own
scripts show as text; a content policy names these scripts by their hashes, so no other one runs, whatever got in.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.charts import LEFT, RIGHT, SMOOTHING, WIDTH, Figure
from sdsearch_lightning.report.console import comparison, duration, number, self_distillation_line, verdict_of
from sdsearch_lightning.report.curves import figures
from sdsearch_lightning.report.example import LABELS, Example, is_correct, printable, rows
from sdsearch_lightning.report.island import island
from sdsearch_lightning.report.metrics import Metrics
from sdsearch_lightning.report.rollouts import Rollouts
from sdsearch_lightning.report.settings import Settings, differences
from sdsearch_lightning.report.summary import Summary
from sdsearch_lightning.report.trajectories import Record
from sdsearch_lightning.report.views import MAX_OTHER_TEXT, UNRELIABLE, View, opening

MAX_PAGE = 5_000_000
"""Bytes that a page stays under."""
OBSERVATION_LENGTH = 300
"""Characters of an observation in the example."""
PHASES = {
    "train": "training",
    "skipped": "training, update skipped",
    "val": "validation",
    "test": "test",
    "predict": "prediction",
}
SCRIPTS = ("dom.js", "credit.js", "explorer.js", "charts.js")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Run:
    """All that a page shows of one run."""

    name: str
    summary: Summary
    metrics: Metrics
    rollouts: Rollouts = Rollouts()
    settings: Settings = Settings()


def write_page(path: Path, runs: Sequence[Run]) -> None:
    """Write the page of one run or of several, in place of an older one."""
    write_text(path, page(runs))


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document: of one run, or of several in the same axes."""
    scripts = [Markup((_FOLDER / name).read_text(encoding="utf-8")) for name in SCRIPTS]
    charts = figures([(run.name, run.metrics) for run in runs])
    is_single = len(runs) == 1
    groups = [group | {"run": index} for index, run in enumerate(runs) for group in run.rollouts.groups]
    html = _environment().get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        is_single=is_single,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(map(_hash, scripts))}; "
        "base-uri 'none'; form-action 'none'",
        css=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        scripts=scripts,
        island=Markup(island({
            "runs": [run.name for run in runs],
            "openings": [opening(run.rollouts.groups) for run in runs],
            "phases": PHASES,
            "labels": LABELS,
            "unreliable": UNRELIABLE,
            "groups": groups,
            "charts": [_points(figure) for figure in charts],
        })),
        charts=charts,
        plot={"left": LEFT, "width": WIDTH - LEFT - RIGHT},
        smoothing=SMOOTHING,
        tiles=comparison(runs[0].summary),
        compared=_compared(runs),
        example=_example(runs[0].rollouts.example) if is_single else None,
        has_groups=bool(groups),
        has_verdicts=any("tokens" in query for query in _queries(groups)),
        has_credit=any("credit" in query for query in _queries(groups)),
        left_out=[line for run in runs for line in _left_out(run, is_single)],
        changed=differences([run.settings for run in runs]) if not is_single else [],
        footers=[(run.name, _facts(run.summary)) for run in runs],
    )  # fmt: skip
    return html.encode("utf-8", "replace").decode()  # half a surrogate, as the name of a folder may hold


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "sd_line": self_distillation_line,
        "svg": Markup,  # of charts.py, which escapes the one text that it is given
    }
    return environment


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _points(figure: Figure) -> View:
    curves = [[[point.step, float(f"{point.value:.5g}")] for point in curve.points] for curve in figure.legend]
    return {"last": figure.last_step, "curves": curves}


def _queries(groups: Sequence[View]) -> list[View]:
    return [row["query"] for group in groups for view in group["rollouts"] for row in view["rows"] if "query" in row]


def _example(example: Example) -> View | None:
    if not example.after:
        return None
    question = example.after[0]["question"]
    return {
        "choice": example.choice,
        "question": printable(question["text"]),
        "gold": printable(" | ".join(question["answers"])),
        "columns": [
            [_shown(record, when) for record in records]
            for when, records in (("before", example.before), ("after", example.after))
            if records
        ],
    }


def _shown(record: Record, when: str) -> View:
    return {
        "title": f"{when}, {'sampled' if record['phase'] == 'val_sampled' else 'greedy'}",
        "step": record["step"],
        "verdict": verdict_of(record)[0],
        "outcome": "right" if is_correct(record) else "wrong",
        "rows": [(row.label, row.kind, _cut(row.kind, row.text)) for row in rows(record)],
    }  # fmt: skip


def _cut(kind: str, text: str) -> str:
    limit = OBSERVATION_LENGTH if kind == "OBSERVATION" else MAX_OTHER_TEXT
    return text if len(text) <= limit else text[:limit] + " ..."


def _left_out(run: Run, is_single: bool) -> list[str]:
    """What the page does not hold, a sentence per phase."""
    told = []
    for part in run.rollouts.left_out:
        if part.shown < part.groups:
            whose = "" if is_single else f"{run.name}: "
            told.append(
                f"{whose}{part.shown:,} of {part.groups:,} {PHASES.get(part.phase, part.phase)} groups are in this "
                f"page, from {part.shown_steps:,} of {part.steps:,} steps."
            )
    return told


def _compared(runs: Sequence[Run]) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
    """The measured quantities, each with before and after of every run."""
    names = [name for name, _ in comparison(runs[0].summary)]
    columns = [[(values["before"], values["after"]) for _, values in comparison(run.summary)] for run in runs]
    return [(name, [column[index] for column in columns]) for index, name in enumerate(names)]


def _facts(summary: Summary) -> str:
    facts = [
        summary["seed"] is not None and f"seed {summary['seed']}",
        summary["seconds"] is not None and duration(summary["seconds"]),
        summary["decoding"]["max_searches"] is not None and f"at most {summary['decoding']['max_searches']} searches",
        *(f"{package} {version}" for package, version in summary["versions"].items()),
    ]
    return ", ".join(str(fact) for fact in facts if fact)
