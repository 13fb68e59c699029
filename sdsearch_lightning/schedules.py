"""Schedules: a factor in [0, 1] per step, for the JSD weight and (through LambdaLR) for the learning rate.

Invariant: `factor` is a pure function of the step, so a resumed run needs no schedule state. Steps are rollout batches,
counted from 0; past `total_steps` the last value stays.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Pluggable


class Schedule(Pluggable):
    """Base of schedules. Any class with a `factor` method is accepted in its place."""

    required = ("factor",)

    @abstractmethod
    def factor(self, step: int) -> float:
        """Multiplier in [0, 1] of the configured value at `step` (0 is the first)."""


class Constant(Schedule):
    """A factor of 1 at every step."""

    def factor(self, step: int) -> float:
        """1.0, whatever the step."""
        return 1.0


class StepWarmup(Schedule):
    """0 for the first `warmup_steps` steps, then 1: a step function, not a ramp (the paper's alpha_SD, T_warm = 50).

    Args:
        warmup_steps: number of steps at 0; the first active step has this index.
    """

    def __init__(self, warmup_steps: int) -> None:
        _ordered("StepWarmup", warmup_steps=warmup_steps)
        self.warmup_steps = warmup_steps

    def factor(self, step: int) -> float:
        """0.0 before `warmup_steps`, and 1.0 from there on."""
        return float(step >= self.warmup_steps)


class WarmupHoldDecay(Schedule):
    """Linear up to 1, constant, linear down to `final`.

    Args:
        warmup_steps: steps of the ramp 1/warmup_steps, 2/warmup_steps, ..., 1: step 0 already learns.
        hold_until: first step of the decay (factor still 1 there).
        total_steps: step at which `final` is reached, one after the last of the run: no step of the run is wasted at 0.
        final: factor at the end, in [0, 1].
    """

    def __init__(self, warmup_steps: int, hold_until: int, total_steps: int, final: float = 0.0) -> None:
        name = type(self).__name__
        _ordered(name, warmup_steps=warmup_steps, hold_until=hold_until, total_steps=total_steps)
        if not 0.0 <= final <= 1.0:
            raise ConfigError(f"{name}: expected final in [0, 1], got {final}. It is a share of the configured value.")
        self.warmup_steps, self.hold_until, self.total_steps, self.final = warmup_steps, hold_until, total_steps, final

    def factor(self, step: int) -> float:
        """In (0, 1] while the run lasts."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.hold_until:
            return 1.0
        decayed = min((step - self.hold_until) / max(self.total_steps - self.hold_until, 1), 1.0)
        return self.final + (1.0 - self.final) * self._shape(decayed)

    def _shape(self, decayed: float) -> float:
        """From 1 at `decayed` 0 to 0 at `decayed` 1."""
        return 1.0 - decayed


class Linear(WarmupHoldDecay):
    """Linear warm-up, then linear decay.

    Args:
        total_steps: step at which `final` is reached.
        warmup_steps: steps of the ramp; 0 starts at 1.
        final: factor at the end, in [0, 1].
    """

    def __init__(self, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> None:
        super().__init__(warmup_steps, warmup_steps, total_steps, final)


class Cosine(Linear):
    """Linear warm-up, then half a cosine down; arguments as `Linear`."""

    def _shape(self, decayed: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * decayed))


def _ordered(owner: str, **steps: int) -> None:
    values = list(steps.values())
    if values[0] < 0 or values != sorted(values):
        found = ", ".join(f"{name}={value}" for name, value in steps.items())
        raise ConfigError(f"{owner}: expected 0 <= {' <= '.join(steps)}, got {found}.")


def checked_schedule(group: str, weight: float, warmup_steps: int, schedule: Schedule | None) -> Schedule:
    """The course of a weight: `schedule`, or 0 for `warmup_steps` steps and then 1.

    Args:
        group: of the configuration, for messages.
        weight: what the schedule is a factor of.
        warmup_steps: see above.
        schedule: None = the step function.

    Raises:
        ConfigError: a weight that is negative or not finite, or a negative number of steps.
    """
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"{group}.weight: expected a finite number of at least 0, found {weight}.")
    if warmup_steps < 0:
        raise ConfigError(f"{group}.warmup_steps: expected 0 or more, found {warmup_steps}.")
    return schedule or StepWarmup(warmup_steps)
