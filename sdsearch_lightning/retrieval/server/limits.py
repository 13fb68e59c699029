"""What a server takes before it refuses: every buffer of it has a bound, and each bound stands here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sdsearch_lightning.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of a retrieval server. A Search-R1 step of 512 questions, 5 rollouts each, fits one request."""

    max_top_k: int = 1000
    """Largest `topk`; more is answered with 422."""
    max_body_bytes: int = 8 * 2**20
    """Of one request; more is answered with 413 as soon as it is seen."""
    max_request_queries: int = 4096
    """Of one request; more is answered with 413."""
    max_query_chars: int = 32_768
    """Of one query; more is answered with 413."""
    max_queued_queries: int = 4096
    """While so many wait, new requests are answered with 429. A request is let in whole, so that a large one can get
    in at all: up to `max_queued_queries + max_request_queries - 1` may wait."""
    max_batch: int = 512
    """Queries of one call of the retriever; a single request with more is still one call."""
    body_seconds: float = 30.0
    """Within which a request has to arrive; later is answered with 408."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"ServerLimits.{name} is {value!r}: expected a number above 0.")
