"""The engine and the training step do the work they have to, and next to no other: pure counting, so without noise."""

from __future__ import annotations

import pytest

from benchmarks.bench_work_counters import BARS, Bounds, count_rollouts, count_training
from sdsearch_lightning.rollout import GenerateEngine


def holds(ratio: float, bounds: Bounds) -> bool:
    least, most = bounds
    return (least is None or ratio >= least) and (most is None or ratio <= most)


def test_rollouts_of_a_large_batch() -> None:
    ratios = count_rollouts()
    assert len(ratios) == 5
    assert {name: ratio for name, ratio in ratios.items() if not holds(ratio, BARS[name])} == {}
    assert ratios["decode rows / policy token"] == 1, "one row for each token of the policy"


@pytest.mark.parametrize("group_size", [5, 8])
def test_the_training_step_of_a_taught_group(group_size: int) -> None:
    ratios = count_training(group_size)
    assert len(ratios) == 4
    assert {name: ratio for name, ratio in ratios.items() if not holds(ratio, BARS[name])} == {}


def test_the_bars_can_fail() -> None:
    ratios = count_rollouts(num_questions=8, engine=GenerateEngine())
    missed = {name for name, ratio in ratios.items() if not holds(ratio, BARS[name])}
    assert {"prefill tokens / ideal", "decode rows / policy token", "steps / longest rollout"} <= missed
