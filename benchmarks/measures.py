"""What a study measures of a run, and how paired runs are compared: plain functions of numbers.

Invariant: what was not measured is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.metrics import Point, read_metrics

SAMPLED, GREEDY, QUERY_ENTROPY = "val/sampled_exact_match", "val/exact_match", "train/query_entropy"
TRAIN, VALID_ACTIONS = "rollout/exact_match", "rollout/valid_action_rate"
LAST_STEPS = 5
"""`query_entropy` is a mean over this many steps: one training batch is noisy."""
HALF = 0.5

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


def training_curves(run_folder: Path, num_steps: int) -> dict[str, Any]:
    """What a finished run did in training, a value a step, and how it was evaluated.

    Returns:
        `train_em`, `valid_action_rate` and `query_entropy` (None at a step without a query) of steps 1 to `num_steps`;
        `sampled_em` as [step, exact match] pairs; `final_greedy_em`.

    Raises:
        ConfigError: there is no metrics.csv.
        DataError: a step is missing, or the run was not evaluated at its end.
    """
    metrics = read_metrics(run_folder)
    sampled, greedy = metrics.get(SAMPLED, []), metrics.get(GREEDY, [])
    area_under(sampled, num_steps)  # refuses a curve with a gap at either end
    train_em, valid = (_per_step(metrics.get(key, []), key, num_steps) for key in (TRAIN, VALID_ACTIONS))
    entropies = {p.step: _rounded(p.value) for p in metrics.get(QUERY_ENTROPY, []) if math.isfinite(p.value)}
    return {
        "train_em": train_em,
        "sampled_em": [[point.step, _rounded(point.value)] for point in sampled],
        "final_greedy_em": _rounded(greedy[-1].value),
        "valid_action_rate": valid,
        "query_entropy": [entropies.get(step) for step in range(1, num_steps + 1)],
    }


def _per_step(curve: Sequence[Point], name: str, num_steps: int) -> list[float]:
    steps = [point.step for point in curve]
    if steps != list(range(1, num_steps + 1)):
        raise DataError(f"expected {name} at each step from 1 to {num_steps}, found it at {steps}.")
    return [_rounded(point.value) for point in curve]


def _rounded(value: float) -> float:
    return round(value, 6)  # of what was logged in float32


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
    half_width = float(stats.t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n) if n > 1 else None
    return Difference(fmean(differences), half_width, n)
