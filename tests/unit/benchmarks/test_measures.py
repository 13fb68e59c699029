"""What the study measures, and its statistics: each number against one worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import stdev

import pytest

from benchmarks.measures import (
    area_under,
    mean,
    measure,
    paired_difference,
    step_reaching,
    training_curves,
)
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.metrics import Point


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (4, 3.1824), (16, 2.1314), (36, 2.0301)])
def test_the_interval_of_a_difference_holds_95_percent(n: int, quantile: float) -> None:
    """Quantiles from a printed table of Student's t."""
    values = [float(index) for index in range(n)]
    found = paired_difference(values, [0.0] * n)
    assert found is not None and found.half_width is not None
    assert found.half_width / (stdev(values) / math.sqrt(n)) == pytest.approx(quantile, abs=1e-4)


def test_a_paired_difference_is_of_pairs() -> None:
    found = paired_difference([0.5, 0.7, 0.6, 0.9], [0.4, 0.6, 0.4, 0.7])  # differences .1 .1 .2 .2
    assert found is not None and found.n == 4
    assert found.mean == pytest.approx(0.15)
    assert found.half_width == pytest.approx(3.182446 * math.sqrt(0.01 / 3) / 2)
    reordered = paired_difference([0.5, 0.7, 0.6, 0.9], [0.7, 0.4, 0.6, 0.4])
    assert reordered is not None and reordered.half_width is not None
    assert reordered.half_width > 2 * found.half_width, "other pairs, another spread"
    single = paired_difference([0.5], [0.4])
    assert single is not None and single.half_width is None
    assert paired_difference([0.5, None], [0.4, 0.3]) is paired_difference([], []) is None
    assert mean([1.0, None]) is mean([]) is None and mean([1.0, 2.0]) == 1.5


def test_the_area_is_a_mean_height_over_uneven_steps() -> None:
    curve = [Point(0, 0.0), Point(10, 0.4), Point(40, 1.0)]
    assert area_under(curve, 40) == pytest.approx((10 * 0.2 + 30 * 0.7) / 40)
    for broken in (curve[1:], curve[:2], curve[:1], [], [curve[0], curve[1], *curve[1:]]):
        with pytest.raises(DataError, match="expected evaluations from step 0 to step 40"):
            area_under(broken, 40)


def test_the_step_that_reaches_a_level_is_read_off_a_line() -> None:
    curve = [Point(0, 0.1), Point(5, 0.3), Point(10, 0.7), Point(15, 0.4)]
    assert step_reaching(curve, 0.5) == pytest.approx(7.5)
    assert step_reaching(curve, 0.3) == 5 and step_reaching(curve, 0.1) == 0
    assert step_reaching(curve, 0.71) is None and step_reaching([], 0.5) is None


def test_the_entropy_is_of_the_last_steps_and_may_be_missing(tmp_path: Path) -> None:
    rows = ["step,val/sampled_exact_match,val/exact_match,train/query_entropy", "0,0.1,0.2,"]
    rows += [f"{step},,,{9 if step < 6 else step / 10}" for step in range(1, 11)] + ["10,0.6,0.8,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = measure(tmp_path, 10)
    assert found["query_entropy"] == pytest.approx(0.8)  # of steps 6 to 10
    assert (found["sampled_start"], found["sampled_end"], found["greedy_end"]) == (0.1, 0.6, 0.8)
    assert found["sampled_area"] == pytest.approx(0.35) and found["greedy_area"] == pytest.approx(0.5)
    (tmp_path / "metrics.csv").write_text("\n".join(line.rpartition(",")[0] for line in rows) + "\n")
    without = measure(tmp_path, 10)
    assert without == found | {"query_entropy": None}


def write_metrics(folder: Path, num_steps: int = 4, missing: str = "") -> None:
    """Training EM of a tenth per step; no query in step 2; `missing` empties a column."""
    keys = ("rollout/exact_match", "rollout/valid_action_rate", "train/query_entropy")
    keys += ("val/sampled_exact_match", "val/exact_match")
    rows = [
        f"{step},{step / 10},{1 - step / 100},{'' if step == 2 else 2 - step / 10},,"
        for step in range(1, num_steps + 1)
    ]
    rows = ["0,,,,0.1,0.2", *rows, f"{num_steps},,,,0.5,0.9"]
    header = ",".join(["step", *("" if key == missing else key for key in keys)])
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")


def test_the_curves_of_a_run_have_a_value_for_each_step(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    assert training_curves(tmp_path, 4) == {
        "train_em": [0.1, 0.2, 0.3, 0.4],
        "sampled_em": [[0, 0.1], [4, 0.5]],
        "final_greedy_em": 0.9,
        "valid_action_rate": [0.99, 0.98, 0.97, 0.96],
        "query_entropy": [1.9, None, 1.7, 1.6],
    }
    with pytest.raises(DataError, match="evaluations from step 0 to step 5"):
        training_curves(tmp_path, 5)
    write_metrics(tmp_path, missing="rollout/exact_match")
    with pytest.raises(DataError, match="expected rollout/exact_match at each step from 1 to 4, found it at \\[\\]"):
        training_curves(tmp_path, 4)
