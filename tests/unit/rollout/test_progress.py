"""The moving line of a rollout window, with a clock that the test turns."""

from __future__ import annotations

import io

import pytest

from sdsearch_lightning.rollout import progress
from sdsearch_lightning.rollout.progress import RolloutProgress


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_short_window_stays_silent(clock: Clock) -> None:
    stream = Terminal()
    window = RolloutProgress(8, stream=stream)
    clock.now += 1.9
    window.report(3, 1, 50)
    window.close()
    assert stream.getvalue() == ""
    assert (window.done, window.searches, window.tokens) == (3, 1, 50)
    assert window.seconds == pytest.approx(1.9)


def test_a_terminal_gets_one_line_that_is_wiped(clock: Clock) -> None:
    stream = Terminal()
    window = RolloutProgress(8, stream=stream)
    for _ in range(10):  # one second: two drawings at most, however often it is told
        clock.now += 0.25
        window.report(0, 0, 100)
    window.report(5, 2, 0)
    clock.now += 0.5
    window.report(1, 0, 0)
    window.close()
    drawn = stream.getvalue().split("\r\x1b[K")
    assert drawn == [
        "",
        "rollouts 0/8, 0 searches, 400 tokens/s",
        "rollouts 0/8, 0 searches, 400 tokens/s",
        "rollouts 6/8, 2 searches, 333 tokens/s",
        "",
    ]


def test_anything_else_gets_a_line_every_thirty_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    window = RolloutProgress(4, stream=stream)
    for _ in range(40):
        clock.now += 1
        window.report(0, 1, 10)
    window.close()
    assert stream.getvalue() == "rollouts 0/4, 2 searches, 10 tokens/s\nrollouts 0/4, 32 searches, 10 tokens/s\n"


def test_other_ranks_count_and_do_not_draw(clock: Clock) -> None:
    stream = Terminal()
    window = RolloutProgress(4, enabled=False, stream=stream)
    clock.now += 60
    window.report(4, 2, 10)
    window.close()
    assert (stream.getvalue(), window.done) == ("", 4)
