"""Parts of a step are measured apart, with a clock that the test turns."""

from __future__ import annotations

import pytest

from sdsearch_lightning.training import step_clock
from sdsearch_lightning.training.step_clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(step_clock, "_now", lambda: now[0])
    return now


def test_a_part_inside_another_is_not_counted_twice(now: list[float]) -> None:
    clock = StepClock()
    for _ in range(2):
        with clock.part("student"):
            now[0] += 1
            with clock.part("teacher"):
                now[0] += 2
            now[0] += 4
        now[0] += 8  # nobody's
    assert clock.take() == {"train/student_seconds": 10.0, "train/teacher_seconds": 4.0}


def test_what_did_not_run_has_no_figure_and_each_step_its_own(now: list[float]) -> None:
    clock = StepClock()

    def work(seconds: float) -> str:
        now[0] += seconds
        return "done"

    assert clock.timed("optimizer", work, 3.0) == "done"
    assert clock.take() == {"train/optimizer_seconds": 3.0}
    assert clock.take() == {}


def test_a_part_that_fails_ends(now: list[float]) -> None:
    clock = StepClock()
    with pytest.raises(ZeroDivisionError), clock.part("student"):
        now[0] += 1
        raise ZeroDivisionError
    with clock.part("optimizer"):
        now[0] += 1
    assert clock.take() == {"train/student_seconds": 1.0, "train/optimizer_seconds": 1.0}
