"""A line that moves while a rollout window runs: rollouts done, searches, tokens per second."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class RolloutProgress:
    """Shows progress of one rollout window, once it has run for a while.

    Args:
        total: rollouts to run.
        enabled: False on ranks other than 0 and where progress bars are off.
        stream: where to write; a terminal gets one line that is rewritten, anything else a line now and then.
    """

    def __init__(self, total: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._total, self._enabled = total, enabled
        self._stream = stream or sys.stderr
        self._interval = 0.5 if self._stream.isatty() else 30.0
        self._started = time.perf_counter()
        self._shown = self._started + 2.0 - self._interval  # short windows stay silent
        self._drew = False
        self.done = self.searches = self.tokens = 0

    @property
    def seconds(self) -> float:
        """Seconds since the window opened."""
        return time.perf_counter() - self._started

    def report(self, done: int, searches: int, tokens: int) -> None:
        """Add what happened since the last call; draw where it is time."""
        self.done += done
        self.searches += searches
        self.tokens += tokens
        now = time.perf_counter()
        if self._enabled and now - self._shown >= self._interval:
            self._shown = now
            self._draw()

    def _draw(self) -> None:
        rate = self.tokens / max(self.seconds, 1e-9)
        line = f"rollouts {self.done}/{self._total}, {self.searches} searches, {rate:.0f} tokens/s"
        terminal = self._stream.isatty()
        self._stream.write(f"\r\x1b[K{line}" if terminal else f"{line}\n")
        self._stream.flush()
        self._drew = terminal

    def close(self) -> None:
        """Wipe the line from the terminal, where one was drawn."""
        if self._drew:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
