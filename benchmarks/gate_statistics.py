"""What the teacher's gate concludes: means and paired differences with intervals over groups, and a verdict.

Invariant: answers of one group share its luck, so intervals come from drawing whole groups; a difference is of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from sdsearch_lightning.types import InstanceId

RESAMPLES = 9999
Values = Mapping[tuple[InstanceId, int], float]
"""One number for each answer, by group and sample."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over answers, or over pairs of them."""

    mean: float
    low: float | None
    """Of the 95 % interval; None, as `high`, for a single group."""
    high: float | None
    n: int
    groups: int


def mean_over_groups(values: Values, seed: int = 0) -> Estimate | None:
    """Mean of all values with its 95 % percentile interval, by bootstrap over groups; None without a value.

    Args:
        values: of answers; a group may have fewer than others, and then weighs less.
        seed: of the resampling.
    """
    if not values:
        return None
    groups: dict[InstanceId, list[float]] = {}
    for (group, _), value in values.items():
        groups.setdefault(group, []).append(value)
    sums, counts = np.array([[sum(row), len(row)] for row in groups.values()], dtype=float).T
    low = high = None
    if len(groups) > 1:
        found = stats.bootstrap(
            (sums, counts),
            lambda total, count, axis: total.sum(axis) / count.sum(axis),
            n_resamples=RESAMPLES,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Estimate(fmean(values.values()), low, high, len(values), len(groups))


def paired_over_groups(values: Values, controls: Values, seed: int = 0) -> Estimate | None:
    """`values - controls` over the answers that both have; see `mean_over_groups`."""
    shared = [key for key in values if key in controls]
    return mean_over_groups({key: values[key] - controls[key] for key in shared}, seed)


def is_above(difference: Estimate | None, least: int) -> str:
    """Whether the first of a pair is better, in the words of the verdict.

    Args:
        difference: of the two; None where no answer has a partner.
        least: pairs below which nothing is claimed.
    """
    n = 0 if difference is None else difference.n
    if difference is None or n < least:
        return f"n too small ({n} of {least})"
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "not told apart"
    return "yes" if difference.low > 0 else "no"
