"""The charts of a report: which metrics stand together, for one run or for several in the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sdsearch_lightning.report.charts import Curve, Figure, figure
from sdsearch_lightning.report.metrics import Metrics

COLORS = 8
"""Colours of the page, `--c0` and so on: the most runs that one page can tell apart."""
WEIGHT = "JSD weight"


class Plotted(NamedTuple):
    """One quantity of a chart."""

    label: str
    key: str
    is_noisy: bool = False
    """Measured on a few rollouts per step."""


class Chart(NamedTuple):
    """A title, the unit, and what is drawn."""

    title: str
    unit: str
    quantities: tuple[Plotted, ...]


CHARTS = (
    Chart(
        "Exact match",
        "held-out questions",
        (Plotted("greedy", "val/exact_match"), Plotted("sampled", "val/sampled_exact_match")),
    ),
    Chart("Reward", "training rollouts", (Plotted("mean", "rollout/reward", True),)),
    Chart(
        "Groups",
        "share of a step's",
        (
            Plotted("mixed", "rollout/mixed_groups", True),
            Plotted("all right", "rollout/all_correct_groups", True),
            Plotted("all wrong", "rollout/all_incorrect_groups", True),
        ),
    ),
    Chart(
        "Searches",
        "per rollout",
        (
            Plotted("training", "rollout/searches_per_question", True),
            Plotted("held-out, greedy", "val/searches_per_question"),
        ),
    ),
    Chart(
        "Valid actions",
        "share",
        (Plotted("training", "rollout/valid_action_rate", True), Plotted("held-out, greedy", "val/valid_action_rate")),
    ),
    Chart("Student-teacher JSD", "nats at query tokens", (Plotted("mean", "distill/jsd", True),)),
    Chart(WEIGHT, "in the loss", (Plotted("weight", "distill/weight"),)),
    Chart(
        "Entropy, student and teacher",
        "nats at query tokens",
        (Plotted("student", "distill/student_entropy", True), Plotted("teacher", "distill/teacher_entropy", True)),
    ),
    Chart(
        "Entropy of the policy",
        "nats",
        (Plotted("all its tokens", "train/entropy", True), Plotted("query tokens", "train/query_entropy", True)),
    ),
    Chart("KL from the reference", "nats per token", (Plotted("k3 estimate", "train/kl", True),)),
    Chart("Throughput", "policy tokens per second", (Plotted("rollouts", "rollout/tokens_per_second", True),)),
    Chart(
        "Seconds",
        "per step",
        (
            Plotted("rollouts", "rollout/seconds", True),
            Plotted("of them searching", "search/seconds", True),
            Plotted("teacher", "train/teacher_seconds", True),
            Plotted("student", "train/student_seconds", True),
            Plotted("optimizer", "train/optimizer_seconds", True),
        ),
    ),
)
SHARES = ("Exact match", "Groups", "Valid actions")
"""Charts whose axis ends at 1."""


def figures(runs: Sequence[tuple[str, Metrics]]) -> list[Figure]:
    """Every chart that has a curve.

    Args:
        runs: name and metrics. One run has a colour per quantity. Of several each has its own, and a second quantity is
            dashed; where they are many, the first one alone is drawn.
    """
    last_step = max((points[-1].step for _, metrics in runs for points in metrics.values()), default=0)
    drawn = (_figure(chart, runs, last_step) for chart in CHARTS)
    return [one for one in drawn if one is not None]


def _figure(chart: Chart, runs: Sequence[tuple[str, Metrics]], last_step: int) -> Figure | None:
    if len(runs) > 1:
        kept = chart.quantities[: 2 if len(runs) <= 3 and len(chart.quantities) == 2 else 1]
        alone = f", {kept[0].label}" if len(kept) < len(chart.quantities) else ""
        chart = chart._replace(quantities=kept, unit=chart.unit + alone)
    curves = _curves(chart, runs)
    if chart.title == WEIGHT and not any(point.value for curve in curves for point in curve.points):
        return None  # off: the first line of the page says so
    top = 1.0 if chart.title in SHARES else None
    return figure(chart.title, chart.unit, curves, last_step=last_step, top=top)


def _curves(chart: Chart, runs: Sequence[tuple[str, Metrics]]) -> list[Curve]:
    if len(runs) == 1:
        return [
            Curve(quantity.label, runs[0][1].get(quantity.key, []), f"--c{index}", quantity.is_noisy)
            for index, quantity in enumerate(chart.quantities)
        ]
    return [
        Curve(
            name if len(chart.quantities) == 1 else f"{name}, {quantity.label}",
            metrics.get(quantity.key, []),
            f"--c{index}",
            quantity.is_noisy,
            dash=place,
        )
        for index, (name, metrics) in enumerate(runs)
        for place, quantity in enumerate(chart.quantities)
    ]
