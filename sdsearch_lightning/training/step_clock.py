"""StepClock: where the seconds of a training step go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
METRICS = {
    "teacher": "train/teacher_seconds",
    "student": "train/student_seconds",
    "optimizer": "train/optimizer_seconds",
}
"""The parts, and what their seconds are logged as."""


class StepClock:
    """Measures parts of a step, each without the parts inside it.

    On a CUDA device it sets events, and waits for the device once, in `take`.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._last: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the part `name`."""
        self._mark()
        self._parts.append(name)
        try:
            yield
        finally:
            self._mark()
            self._parts.pop()

    def timed(self, name: str, work: Callable[..., Result], *args: Any) -> Result:
        """`work(*args)`, as a part."""
        with self.part(name):
            return work(*args)

    def take(self) -> dict[str, float]:
        """Seconds of each part that ran since the last call, by its metric."""
        if any(isinstance(end, torch.cuda.Event) for _, _, end in self._spans):
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for part, start, end in self._spans:
            seconds[METRICS[part]] += _between(start, end)
        self._spans.clear()
        return dict(seconds)

    def _mark(self) -> None:
        now = _now()
        if self._parts:
            self._spans.append((self._parts[-1], self._last, now))
        self._last = now


def _now() -> Any:
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float) != isinstance(end, float):
        return 0.0  # CUDA was started in this very span
    return end - start if isinstance(start, float) else float(start.elapsed_time(end)) / 1000
