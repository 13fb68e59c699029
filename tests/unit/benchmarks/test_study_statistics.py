"""Tests, corrections and measures of the study: each number against one worked out by hand or by scipy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.runner import Record
from benchmarks.study_protocol import Run
from benchmarks.study_statistics import compare, holm, measures_of, ratio, sign_flip_p, steps_to


def record(train: list[float], **changes: Any) -> Record:
    """A run of as many steps as it has values of train EM."""
    steps = len(train)
    return {
        "train_em": train,
        "sampled_em": [[0, 0.0], [steps, 0.4]],
        "final_greedy_em": 0.9,
        "valid_action_rate": [0.95] * steps,
        "query_entropy": [1.0] * (steps - 5) + [None, 0.1, 0.2, 0.3, 0.4],
        "cpu_seconds": 40.0,
        "steps": steps,
    } | changes


def test_the_measures_of_a_run() -> None:
    train = [0.0, 0.1, 0.2, 0.4, 0.6, 0.5, 0.8, 0.9]
    found = measures_of(record(train))
    assert found["train_area"] == pytest.approx(3.5 / 8) and found["sampled_area"] == pytest.approx(0.2)
    assert found["steps_to_half"] == 6, "the mean of .4, .6 and .5"
    assert found["query_entropy"] == pytest.approx((1.0 + 0.1 + 0.2 + 0.3 + 0.4) / 5), "the last five that have queries"
    assert (found["final_greedy"], found["cpu_seconds"], found["collapsed"]) == (0.9, 40.0, 0.0)
    assert steps_to([0.9, 0.1, 0.1, 0.1], 0.5) == 4, "censored: one lucky step is not enough"
    assert "query_entropy" not in measures_of(record(train, query_entropy=[None] * 8))


@pytest.mark.parametrize(("step", "rate", "collapsed"), [(5, 0.1, 0.0), (6, 0.1, 1.0), (6, 0.8, 0.0), (8, 0.79, 1.0)])
def test_a_collapse_is_a_low_rate_after_the_fifth_step(step: int, rate: float, collapsed: float) -> None:
    rates = [0.95] * 8
    rates[step - 1] = rate
    assert measures_of(record([0.1] * 8, valid_action_rate=rates))["collapsed"] == collapsed


def test_the_sign_flip_test_counts_patterns_of_signs() -> None:
    assert sign_flip_p([[1.0, 2.0, 3.0]]) == 2 / 8
    assert sign_flip_p([[1.0, 2.0, -3.0]]) == 1.0, "no pattern lies nearer to 0"
    assert sign_flip_p([[0.1] * 4] * 3) == 2 / 4096
    differences = [0.3, -0.1, 0.25, 0.02, 0.4, -0.2, 0.15, 0.33]
    data = (np.array(differences), np.zeros(8))
    reference = stats.permutation_test(
        data, lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p([differences]) == pytest.approx(reference.pvalue)
    assert sign_flip_p([differences]) != pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=1e-3)


def test_a_world_with_fewer_pairs_counts_as_much() -> None:
    # Parts of the statistic: 2 / 2, -3 / 4 and .5 / 4, together .375; of |1 +- .75 +- .125| three in four reach that.
    assert sign_flip_p([[2.0], [-3.0, 0.5]]) == 6 / 8
    # In one world |2 - 3 + .5| / 3: all of |2 +- 3 +- .5| reach it.
    assert sign_flip_p([[2.0, -3.0, 0.5]]) == 1.0


def test_many_pairs_are_tested_by_drawn_patterns() -> None:
    rng = random.Random(0)
    differences = [rng.gauss(0.3, 1.0) for _ in range(30)]
    assert sign_flip_p([differences]) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)
    assert sign_flip_p([[1.0] * 30]) == pytest.approx(2**-16), "what was seen is always one of them"


def test_holm_corrects_step_by_step() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.5, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0}) and holm({}) == {}


def test_only_runs_of_one_world_and_seed_are_paired() -> None:
    measured = {
        Run("sparse", arm, world, seed, "report", 1e-3, 0.0): {"x": value}
        for arm, world, seed, value in (
            ("grpo", 0, 100, 1.0),
            ("grpo", 0, 101, 2.0),
            ("grpo", 1, 100, 5.0),
            ("sd", 1, 100, 5.5),
            ("sd", 0, 100, 2.5),
            ("sd", 2, 100, 9.0),
        )
    }
    found = compare(measured, "sd", "grpo", "x")
    assert found is not None and found.difference.n == 2 and found.difference.mean == pytest.approx(1.0)
    assert ratio(measured, "sd", "grpo", "x") == pytest.approx(8 / 6)
    assert compare(measured, "sd", "dapo", "x") is ratio(measured, "sd", "dapo", "x") is None
