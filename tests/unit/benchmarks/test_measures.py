"""What the study measures, and its statistics: each number against one worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.measures import (
    T_975,
    area_under,
    mean,
    measure,
    paired_difference,
    step_reaching,
    t_quantile,
)
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.metrics import Point


def test_t_quantiles_hold_95_percent_of_the_distribution() -> None:
    for degrees in range(1, len(T_975) + 1):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        for shift, holds in ((0.0, True), (0.02, False), (-0.02, False)):
            bound, parts = t_quantile(degrees) + shift * t_quantile(degrees), 4000
            xs = [-bound + 2 * bound * (i + 0.5) / parts for i in range(parts)]
            share = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in xs) * 2 * bound / parts
            assert (abs(share - 0.95) < 2e-4) is holds, (degrees, share)
    assert t_quantile(3) == pytest.approx(3.182, abs=5e-4)
    for degrees in (0, len(T_975) + 1):
        with pytest.raises(ValueError, match=f"found {degrees}"):
            t_quantile(degrees)


def test_a_paired_difference_is_of_pairs() -> None:
    found = paired_difference([0.5, 0.7, 0.6, 0.9], [0.4, 0.6, 0.4, 0.7])  # differences .1 .1 .2 .2
    assert found is not None and found.n == 4
    assert found.mean == pytest.approx(0.15)
    assert found.half_width == pytest.approx(3.1824 * math.sqrt(0.01 / 3) / 2)
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
