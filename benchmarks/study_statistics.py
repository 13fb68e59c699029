"""What the study concludes from pairs of runs: measures of a run, comparisons with a control, tests and corrections.

Invariant: only pairs of the same family, world and seed are compared, both of which ended well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import numpy as np

from benchmarks.measures import HALF, LAST_STEPS, Difference, area_under, paired_difference
from benchmarks.runner import Record
from benchmarks.study_protocol import Run
from sdsearch_lightning.report.metrics import Point

PRIMARY = ("train_area", "sampled_area")
VALID_ACTION_FLOOR, FIRST_STEPS = 0.8, 5
"""A run whose valid-action rate falls below the floor after the first steps has collapsed."""
SMOOTHED_STEPS = 3
EXACT_PAIRS = 16
"""Up to so many pairs every pattern of signs is tried, beyond it as many drawn ones."""


def measures_of(record: Record) -> dict[str, float]:
    """The measures of docs/study.md for one run; what was not measured is not in it."""
    train = record["train_em"]
    entropies = [value for value in record["query_entropy"] if value is not None]
    return {
        "train_area": fmean(train),
        "sampled_area": area_under([Point(*pair) for pair in record["sampled_em"]], record["steps"]),
        "steps_to_half": steps_to(train, HALF),
        "final_greedy": record["final_greedy_em"],
        "collapsed": float(min(record["valid_action_rate"][FIRST_STEPS:], default=1.0) < VALID_ACTION_FLOOR),
        "cpu_seconds": record["cpu_seconds"],
    } | ({"query_entropy": fmean(entropies[-LAST_STEPS:])} if entropies else {})


def steps_to(values: Sequence[float], level: float) -> float:
    """The first step at which the mean of it and the two before reaches `level`; the last step where none does."""
    for step in range(SMOOTHED_STEPS, len(values) + 1):
        if fmean(values[step - SMOOTHED_STEPS : step]) >= level - 1e-9:
            return float(step)
    return float(len(values))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against a control, by one measure."""

    difference: Difference
    p: float
    """Two-sided, of the sign-flip test; not corrected."""


Measured = Mapping[Run, Mapping[str, float]]
"""Measures of the report runs of one family that ended well."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The same measure of two arms, in one world and with one seed."""

    world_seed: int
    value: float
    control: float


def pairs_of(measured: Measured, arm: str, control: str, name: str) -> list[Pair]:
    """One for each world and seed that both arms have, in their order."""
    own, other = (
        {(run.world_seed, run.seed): values[name] for run, values in measured.items() if run.arm == side}
        for side in (arm, control)
    )
    return [Pair(key[0], own[key], other[key]) for key in sorted(own.keys() & other.keys())]


def compare(measured: Measured, arm: str, control: str, name: str) -> Comparison | None:
    """`arm` minus `control`; None where they have no pair."""
    pairs = pairs_of(measured, arm, control, name)
    difference = paired_difference([pair.value for pair in pairs], [pair.control for pair in pairs])
    if difference is None:
        return None
    worlds: dict[int, list[float]] = {}
    for pair in pairs:
        worlds.setdefault(pair.world_seed, []).append(pair.value - pair.control)
    return Comparison(difference, sign_flip_p(list(worlds.values())))


def ratio(measured: Measured, arm: str, control: str, name: str) -> float | None:
    """Mean of `arm` over the mean of `control`, of their pairs; None where they have none."""
    pairs = pairs_of(measured, arm, control, name)
    return sum(pair.value for pair in pairs) / sum(pair.control for pair in pairs) if pairs else None


def sign_flip_p(worlds: Sequence[Sequence[float]]) -> float:
    """Two-sided p of paired differences, grouped by world: the share of sign patterns that are as extreme.

    The statistic is the mean of the worlds' means, so that a world with fewer pairs counts as much.
    """
    weighted = np.concatenate([np.asarray(world) / len(world) for world in worlds]) / len(worlds)
    n = len(weighted)
    if n <= EXACT_PAIRS:
        signs = np.array(list(product((1, -1), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1, -1), size=(2**EXACT_PAIRS, n))
        signs[0] = 1  # what was seen is one of the patterns, so that p is never 0
    observed = abs(weighted.sum())
    return float(np.mean(np.abs(signs @ weighted) >= observed - 1e-12))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values corrected by Holm's step-down method for how many there are."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return corrected
