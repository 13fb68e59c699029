"""report.html: one self-contained page of curves, one question before and after, and what the teacher said.

The page loads nothing and runs no script; whatever came from data is escaped; a section whose data is missing is left
out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.charts import SMOOTHING, Curve, chart
from sdsearch_lightning.report.console import comparison, duration, number, self_distillation_line, verdict_of
from sdsearch_lightning.report.example import Example, is_correct, printable, rows
from sdsearch_lightning.report.metrics import Metrics
from sdsearch_lightning.report.style import CSS
from sdsearch_lightning.report.summary import Summary
from sdsearch_lightning.report.trajectories import Record

OBSERVATION_LENGTH = 300
"""Characters of an observation that are shown."""
CHARTS = (
    (
        "Exact match",
        "held-out questions",
        ("greedy", "val/exact_match", "--first", False),
        ("sampled", "val/sampled_exact_match", "--second", False),
    ),
    ("Reward", "training rollouts", ("mean", "rollout/reward", "--first", True)),
    (
        "Searches",
        "per rollout",
        ("training", "rollout/searches_per_question", "--first", True),
        ("held-out, greedy", "val/searches_per_question", "--second", False),
    ),
    ("Student-teacher JSD", "nats at query tokens", ("mean", "distill/jsd", "--first", True)),
    ("JSD weight", "in the loss", ("weight", "distill/weight", "--first", False)),
    (
        "Entropy",
        "nats at query tokens",
        ("student", "distill/student_entropy", "--first", True),
        ("teacher", "distill/teacher_entropy", "--second", True),
    ),
)
"""Title, unit and curves of each chart; a curve is a label, a metric key, a colour and whether it is noisy."""


def write_html_report(run_folder: Path, summary: Summary, metrics: Metrics, example: Example) -> None:
    """Write the page `run_folder/report.html`, in place of an older one."""
    write_text(run_folder / "report.html", page(run_folder.resolve().name, summary, metrics, example))


def page(name: str, summary: Summary, metrics: Metrics, example: Example) -> str:
    """The whole HTML document."""
    sections = (_opening(name, summary), _curves(metrics), _example(example), _taught(example), _footer(summary))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{CSS}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _opening(name: str, summary: Summary) -> str:
    tiles = "".join(
        f"<div>{escape(label)}<b>{number(values['after'])}</b>before: {number(values['before'])}</div>"
        for label, values in comparison(summary)
    )
    questions = "" if summary["questions"] is None else f"{escape(str(summary['questions']))} held-out questions; "
    return (
        f"<h1>{escape(name)}</h1><p>{questions}{escape(self_distillation_line(summary['sd']))}</p>"
        f'<div class="tiles">{tiles}</div>'
    )


def _curves(metrics: Metrics) -> str:
    last_step = max((points[-1].step for points in metrics.values()), default=0)
    charts = [
        chart(
            title,
            unit,
            [Curve(label, metrics.get(key, []), color, is_noisy) for label, key, color, is_noisy in curves],
            last_step=last_step,
            top=1.0 if title == "Exact match" else None,
        )
        for title, unit, *curves in CHARTS
    ]
    if not any(charts):
        return "<h2>Curves</h2><p>metrics.csv holds none of the curves that are shown here.</p>"
    return (
        f"<h2>Curves</h2><p>By rollout batch. Faint: each batch; bold: mean of {SMOOTHING}. "
        f'The legend gives the last value.</p><div class="charts">{"".join(charts)}</div>'
    )


def _example(example: Example) -> str:
    if not example.after:
        return ""
    columns = "".join(
        f'<div class="columns">{_validation_rollouts(records, when)}</div>'
        for when, records in (("before", example.before), ("after", example.after))
        if records
    )
    return (
        "<h2>One held-out question</h2>"
        f"<p>{escape(example.choice.capitalize())}. Tags are left out.</p>"
        f'{_question(example.after[0])}<div class="columns">{columns}</div>'
    )


def _validation_rollouts(records: Sequence[Record], when: str) -> str:
    return "".join(
        _rollout(record, f"{when}, {'sampled' if record['phase'] == 'val_sampled' else 'greedy'}") for record in records
    )


def _question(record: Record) -> str:
    text = escape(printable(record["question"]["text"]))
    gold = escape(printable(" | ".join(record["question"]["answers"])))
    return f'<div class="question">{text}<small>gold: {gold}</small></div>'


def _rollout(record: Record, title: str) -> str:
    verdict, _ = verdict_of(record)
    outcome = "right" if is_correct(record) else "wrong"
    return (
        f'<div class="rollout"><h3>{escape(title)} <span>{_details(record)}</span>'
        f'<span class="{outcome}">{escape(verdict)}</span></h3><dl>{_rows(record, outcome)}</dl></div>'
    )


def _details(record: Record) -> str:
    if record["phase"] != "train":
        return escape(f"step {record['step']}")
    return ", ".join(f"{name} {record[name]:.2f}" for name in ("reward", "advantage") if record[name] is not None)


def _rows(record: Record, outcome: str) -> str:
    credit = {entry["span"]: entry for entry in record["credit"] or ()}
    parts = []
    searches = iter(zip(record.get("query_credit") or (), record.get("query_advantages") or (), strict=True))
    for row in rows(record):
        text = row.text
        if row.kind == "OBSERVATION" and len(text) > OBSERVATION_LENGTH:
            text = text[:OBSERVATION_LENGTH] + " ..."
        shown = _shaded(credit[row.span]) if row.span in credit else escape(text)
        if row.kind == "QUERY" and (search := next(searches, None)) is not None:
            shown += f"<small> credit {search[1]:+.2f} (value {search[0]:.2f})</small>"
        kind = f"{row.kind} {outcome}" if row.kind == "ANSWER" else row.kind
        parts.append(f'<dt>{row.label}</dt><dd class="{kind}">{shown}</dd>')
    return "".join(parts)


def _shaded(credit: Record) -> str:
    """Query tokens on a background: its strength is the JSD, its hue whether the teacher wants the token more."""
    marks = []
    for index, token in enumerate(credit["tokens"]):
        jsd, student, teacher = (credit[key][index] for key in ("jsd", "student_logprob", "teacher_logprob"))
        hue = "--agree" if (teacher or 0.0) >= (student or 0.0) and teacher is not None else "--differ"
        marks.append(
            f'{escape(token[: len(token) - len(token.lstrip())])}<mark style="background:{_tint(hue, jsd or 0.0)}" '
            f'title="{escape(_told(token, jsd, student, teacher, credit["teacher_top"][index]))}">'
            f"{escape(token.lstrip())}</mark>"
        )
    return "".join(marks)


def _tint(hue: str, jsd: float) -> str:
    # Square root: most of the JSD lies far below its maximum ln 2, and would all look white.
    strength = min(1.0, max(0.0, jsd) / math.log(2)) ** 0.5
    return f"color-mix(in srgb, var({hue}) {80 * strength:.0f}%, transparent)"


def _told(
    token: str, jsd: float | None, student: float | None, teacher: float | None, top: list[tuple[str, float]]
) -> str:
    """The text that hovering over a token shows."""

    def probability(logprob: float | None) -> str:
        return "0" if logprob is None else f"{math.exp(logprob):.3f}"

    wanted = ", ".join(f"{printable(candidate)} {p:.2f}" for candidate, p in top)
    return (
        f"{token.strip()}: student {probability(student)}, teacher {probability(teacher)}, JSD {number(jsd)} nats"
        + (f". Teacher's first: {wanted}" if wanted else "")
    )


def _taught(example: Example) -> str:
    groups = "".join(_group(group) for group in example.taught if group)
    if not groups:
        return ""
    records = [record for group in example.taught for record in group]
    told = "<h2>Which query earned what</h2><p>An early and a late training group.</p>"
    if any(record["credit"] for record in records):
        key = "".join(
            f'<mark style="background:{_tint(hue, 0.25)}">{text}</mark> '
            for hue, text in (("--agree", "the teacher wants it more"), ("--differ", "the teacher wants it less"))
        )
        told += (
            "<p>The teacher is the policy itself after the hindsight block. The background of a query token is "
            "stronger where student and teacher differ more (JSD); hover over it for numbers.</p>"
            f'<p class="key">{key}</p>'
        )
    if any(record.get("query_credit") for record in records):
        told += (
            "<p>Behind a query stands its own credit: how far what it found is above the step's mean, in standard "
            "deviations, and in brackets the value that `rollout.credit` gave it.</p>"
        )
    return told + groups


def _group(group: tuple[Record, ...]) -> str:
    first = group[0]
    rollouts = "".join(_rollout(record, f"rollout {record['rollout_index'] + 1}") for record in group)
    block = f"<pre>{escape(first['block'])}</pre>" if first["block"] else ""
    return (
        f'<div class="taught"><h3>Step {escape(str(first["step"]))}</h3>{_question(first)}{block}'
        f'<div class="columns">{rollouts}</div></div>'
    )


def _footer(summary: Summary) -> str:
    facts = [
        summary["seed"] is not None and f"seed {summary['seed']}",
        summary["seconds"] is not None and duration(summary["seconds"]),
        summary["decoding"]["max_searches"] is not None and f"at most {summary['decoding']['max_searches']} searches",
        *(f"{package} {version}" for package, version in summary["versions"].items()),
    ]
    return f"<footer>{escape(', '.join(str(fact) for fact in facts if fact))}</footer>"
