"""What a rollout window counts, with a clock that the test turns."""

from __future__ import annotations

import pytest

from sdsearch_lightning.rollout import progress
from sdsearch_lightning.rollout.progress import RolloutProgress


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_a_window_counts_and_tells_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    seen: list[tuple[int, int, int, int]] = []
    window = RolloutProgress(8, lambda window: seen.append((window.done, window.total, window.searches, window.tokens)))
    clock.now += 2.0
    window.report(3, 1, 50)
    window.report(1, 0, 30)
    assert seen == [(3, 8, 1, 50), (4, 8, 1, 80)]
    assert (window.seconds, window.tokens_per_second) == (2.0, 40.0)


def test_nobody_has_to_watch() -> None:
    window = RolloutProgress(8)
    window.report(3, 1, 50)
    assert (window.done, window.searches, window.tokens) == (3, 1, 50)
