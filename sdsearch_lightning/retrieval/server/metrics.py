"""What a server tells about itself, in constant memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

_LAST_REQUESTS = 1024
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


class Metrics:
    """Requests by outcome, and how long the last 1024 answered ones took. Used from one thread, the event loop's."""

    def __init__(self) -> None:
        self.requests = 0
        """Asked of /retrieve, whatever became of them."""
        self._errors: Counter[int] = Counter()
        self._milliseconds: deque[float] = deque(maxlen=_LAST_REQUESTS)

    def answered(self, seconds: float) -> None:
        """A request was answered with 200, `seconds` after its head had arrived."""
        self._milliseconds.append(1e3 * seconds)

    def failed(self, status: int) -> None:
        """A request was answered with another status."""
        self._errors[status] += 1

    def snapshot(self) -> dict[str, Any]:
        """All figures, ready for JSON. A quantile is null before the first answer."""
        return {
            "requests": self.requests,
            "errors": {str(status): count for status, count in sorted(self._errors.items())},
            "latency_ms": {name: quantile(self._milliseconds, share) for name, share in QUANTILES.items()},
        }


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of `values` does not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
