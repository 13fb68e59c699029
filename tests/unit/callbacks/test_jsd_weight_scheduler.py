"""The weight of the teacher by step: when it starts, what it follows, and what is refused."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from sdsearch_lightning.callbacks import JSDWeightScheduler
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.schedules import Constant, Linear, StepWarmup
from sdsearch_lightning.types import StepBatch


def weights(scheduler: JSDWeightScheduler, steps: range) -> list[float]:
    found = []
    for step in steps:
        module: Any = SimpleNamespace(jsd_weight=-1.0)
        scheduler.on_train_batch_start(SimpleNamespace(global_step=step), module, StepBatch([]), 0)  # type: ignore[arg-type]
        found.append(module.jsd_weight)
    return found


def start(scheduler: JSDWeightScheduler, max_steps: int) -> None:
    scheduler.on_fit_start(SimpleNamespace(max_steps=max_steps), None)  # type: ignore[arg-type]


def test_the_first_taught_step_is_the_one_after_the_warm_up() -> None:
    assert weights(JSDWeightScheduler(0.3, warmup_steps=4), range(7)) == [0, 0, 0, 0, 0.3, 0.3, 0.3]
    assert weights(JSDWeightScheduler(0.3, warmup_steps=0), range(2)) == [0.3, 0.3]


def test_the_defaults_are_the_papers() -> None:
    assert weights(JSDWeightScheduler(), range(48, 52)) == [0, 0, 1e-3, 1e-3]


def test_a_resumed_run_goes_on_where_it_stood() -> None:
    assert weights(JSDWeightScheduler(0.3, warmup_steps=4), range(6, 8)) == [0.3, 0.3]


def test_a_schedule_takes_the_place_of_the_warm_up() -> None:
    scheduler = JSDWeightScheduler(2.0, warmup_steps=50, schedule=Linear(total_steps=4))
    assert weights(scheduler, range(6)) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("weight", [-1e-9, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=f"jsd.weight: expected a finite number of at least 0, found {weight}"):
        JSDWeightScheduler(weight)


def test_a_warm_up_of_negative_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="jsd.warmup_steps: expected 0 or more, found -1"):
        JSDWeightScheduler(warmup_steps=-1)


@pytest.mark.parametrize(
    ("scheduler", "max_steps"),
    [(JSDWeightScheduler(0.3, 40), 40), (JSDWeightScheduler(), 2), (JSDWeightScheduler(1.0, 0, StepWarmup(9)), 9)],
)
def test_a_warm_up_that_outlasts_the_run_warns(scheduler: JSDWeightScheduler, max_steps: int) -> None:
    with pytest.warns(UserWarning, match=rf"the weight stays 0 for all {max_steps} steps.*nothing will be distilled"):
        start(scheduler, max_steps)


@pytest.mark.parametrize(
    ("scheduler", "max_steps"),
    [
        (JSDWeightScheduler(0.3, 39), 40),
        (JSDWeightScheduler(0.0, 40), 40),  # GRPO alone is meant
        (JSDWeightScheduler(0.3, 40), -1),  # without an end
        (JSDWeightScheduler(0.3, 40, Constant()), 40),
    ],
)
def test_a_run_that_will_be_taught_does_not_warn(scheduler: JSDWeightScheduler, max_steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(scheduler, max_steps)
