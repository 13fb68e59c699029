"""CreditWeightScheduler: the weight of each step, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdsearch_lightning.callbacks import CreditWeightScheduler
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.schedules import WarmupHoldDecay
from sdsearch_lightning.step.token_advantages import CreditPlacement


def course(scheduler: CreditWeightScheduler, steps: int) -> list[CreditPlacement]:
    found = []
    for step in range(steps):
        module: Any = SimpleNamespace()
        scheduler.on_train_batch_start(SimpleNamespace(global_step=step), module, None, 0)  # type: ignore[arg-type]
        found.append(module.credit)
    return found


def test_the_weight_of_each_step() -> None:
    assert course(CreditWeightScheduler(), 2) == [CreditPlacement(1.0)] * 2
    placed = course(CreditWeightScheduler(0.3, warmup_steps=2, tokens="turn", shared=True), 3)
    assert placed == [CreditPlacement(0.0, "turn", True)] * 2 + [CreditPlacement(0.3, "turn", True)]
    schedule = WarmupHoldDecay(warmup_steps=2, hold_until=2, total_steps=4, final=0.0)
    weights = [p.weight for p in course(CreditWeightScheduler(2.0, schedule=schedule), 4)]
    assert weights == [2 * schedule.factor(step) for step in range(4)] and len(set(weights)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "credit.weight: expected a finite number of at least 0, found -1.0"),
        ({"weight": float("inf")}, "credit.weight"),
        ({"warmup_steps": -1}, "credit.warmup_steps: expected 0 or more, found -1"),
        ({"tokens": "answer"}, "credit.tokens: expected one of query, turn, found 'answer'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CreditWeightScheduler(**options)
