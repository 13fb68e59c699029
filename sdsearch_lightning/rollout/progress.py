"""What a rollout window has done so far: rollouts, searches, tokens."""

from __future__ import annotations

import time
from collections.abc import Callable


class RolloutProgress:
    """Counts while one rollout window runs.

    Args:
        total: rollouts to run.
        watch: called with these counts after each change; a progress bar, for instance.
    """

    def __init__(self, total: int, watch: Callable[[RolloutProgress], None] | None = None) -> None:
        self.total, self._watch = total, watch
        self._started = time.perf_counter()
        self.done = self.searches = self.tokens = 0

    @property
    def seconds(self) -> float:
        """Seconds since the window opened."""
        return time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second since the window opened."""
        return self.tokens / max(self.seconds, 1e-9)

    def report(self, done: int, searches: int, tokens: int) -> None:
        """Add what happened since the last call."""
        self.done += done
        self.searches += searches
        self.tokens += tokens
        if self._watch is not None:
            self._watch(self)
