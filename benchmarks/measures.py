"""What a study measures of a run, and how paired runs are compared: plain functions of numbers.

Invariant: what was not measured is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.metrics import Point, read_metrics

SAMPLED, GREEDY, QUERY_ENTROPY = "val/sampled_exact_match", "val/exact_match", "train/query_entropy"
LAST_STEPS = 5
"""`query_entropy` is a mean over this many steps: one training batch is noisy."""
HALF = 0.5

T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604)
"""0.975 quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""

Measures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of paired differences."""

    mean: float
    half_width: float | None
    """Half of the 95 % t interval; None for a single pair."""
    n: int


def area_under(curve: Sequence[Point], last_step: int) -> float:
    """Area under a curve from step 0 to `last_step` by the trapezoid rule, divided by `last_step`.

    Raises:
        DataError: the curve does not reach from 0 to `last_step`, or does not go forward.
    """
    steps = [point.step for point in curve]
    if len(steps) < 2 or steps[0] != 0 or steps[-1] != last_step or steps != sorted(set(steps)):
        raise DataError(f"expected evaluations from step 0 to step {last_step}, each once, found those of {steps}.")
    pairs = zip(curve[:-1], curve[1:], strict=True)
    return sum((b.step - a.step) * (a.value + b.value) / 2 for a, b in pairs) / last_step


def step_reaching(curve: Sequence[Point], level: float) -> float | None:
    """The step at which a curve first reaches `level`, on a line between its points; None where it never does."""
    before: Point | None = None
    for point in curve:
        if point.value >= level:
            if before is None:
                return float(point.step)
            share = (level - before.value) / (point.value - before.value)
            return before.step + share * (point.step - before.step)
        before = point
    return None


def measure(run_folder: Path, last_step: int) -> Measures:
    """The measures of a finished run, from its metrics.csv.

    Raises:
        ConfigError: there is no metrics.csv.
        DataError: the run was not evaluated from step 0 to `last_step`.
    """
    metrics = read_metrics(run_folder)
    sampled, greedy = metrics.get(SAMPLED, []), metrics.get(GREEDY, [])
    entropies = [point.value for point in metrics.get(QUERY_ENTROPY, []) if math.isfinite(point.value)]
    return {
        "sampled_area": area_under(sampled, last_step),
        "greedy_area": area_under(greedy, last_step),
        "sampled_start": sampled[0].value,
        "sampled_end": sampled[-1].value,
        "greedy_end": greedy[-1].value,
        "steps_to_half": step_reaching(sampled, HALF),
        "query_entropy": fmean(entropies[-LAST_STEPS:]) if entropies else None,
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where any value is missing, since the mean of the others would be of something else."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def paired_difference(values: Sequence[float | None], controls: Sequence[float | None]) -> Difference | None:
    """Mean of `values - controls`, pair by pair, with half of its 95 % t interval; None where any value is missing."""
    pairs = list(zip(values, controls, strict=True))
    differences = [value - control for value, control in pairs if value is not None and control is not None]
    if not differences or len(differences) < len(pairs):
        return None
    n = len(differences)
    half_width = t_quantile(n - 1) * stdev(differences) / math.sqrt(n) if n > 1 else None
    return Difference(fmean(differences), half_width, n)


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t distribution.

    Raises:
        ValueError: the table does not hold it.
    """
    if not 1 <= degrees <= len(T_975):
        raise ValueError(f"expected 1 to {len(T_975)} degrees of freedom, found {degrees}")
    return T_975[degrees - 1]
