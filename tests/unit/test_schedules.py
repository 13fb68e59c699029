"""Schedules as tables of factors; steps are 0-based."""

from __future__ import annotations

import math

import pytest
import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.schedules import Constant, Cosine, Linear, Schedule, StepWarmup, WarmupHoldDecay


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [1, 1, 1]),
        (StepWarmup(0), [1, 1]),
        (StepWarmup(2), [0, 0, 1, 1]),
        (WarmupHoldDecay(2, 4, 8), [1 / 2, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        (WarmupHoldDecay(0, 1, 3, final=0.5), [1, 1, 0.75, 0.5, 0.5]),
        (WarmupHoldDecay(3, 3, 3), [1 / 3, 2 / 3, 1, 1]),  # nothing left to decay over: one step at 1, then final
        (Linear(4), [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        (Linear(4, warmup_steps=2, final=0.2), [1 / 2, 1, 1, 0.6, 0.2]),
        (Cosine(4), [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0, 0]),
        (Cosine(4, final=0.5), [1, 0.75 + math.sqrt(0.125) / 2, 0.75, 0.75 - math.sqrt(0.125) / 2, 0.5]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_factors(schedule: Schedule, expected: list[float]) -> None:
    actual = [schedule.factor(step) for step in range(len(expected))]
    assert actual == pytest.approx(expected, abs=1e-15)
    assert actual != pytest.approx([expected[0] + 1e-12, *expected[1:]], abs=1e-15)
    assert actual != pytest.approx([schedule.factor(step + 1) for step in range(len(expected))], abs=1e-15) or (
        len(set(expected)) == 1
    )


def test_the_paper_starts_at_step_50() -> None:
    assert [StepWarmup(50).factor(step) for step in (0, 49, 50, 51)] == [0, 0, 1, 1]


@pytest.mark.parametrize("schedule", [Constant(), WarmupHoldDecay(3, 10, 40, 0.05), Linear(40, 3), Cosine(40, 3)])
def test_every_step_of_a_run_learns(schedule: Schedule) -> None:
    factors = [schedule.factor(step) for step in range(40)]
    assert all(0 < factor <= 1 for factor in factors)
    assert all(0 <= schedule.factor(step) <= 1 for step in range(40, 100))


def test_a_schedule_drives_lambda_lr() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Linear(4, warmup_steps=2).factor)
    rates = []
    for _ in range(4):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StepWarmup(-1), r"StepWarmup: expected 0 <= warmup_steps, got warmup_steps=-1"),
        (lambda: WarmupHoldDecay(5, 3, 9), r"0 <= warmup_steps <= hold_until <= total_steps, got warmup_steps=5"),
        (lambda: WarmupHoldDecay(1, 9, 8), r"hold_until=9, total_steps=8"),
        (lambda: Linear(3, warmup_steps=4), r"Linear: expected .* total_steps=3"),
        (lambda: Cosine(3, final=1.5), r"Cosine: expected final in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_schedules_are_refused(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_look_alike_class_counts_as_a_schedule() -> None:
    class Mine:
        def factor(self, step):  # type: ignore[no-untyped-def]
            return 1.0

    assert issubclass(Mine, Schedule)
    assert not issubclass(int, Schedule)
