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
    max_request_passages: int = 16_384
    """Queries times `topk` of one request; more is answered with 413. It also bounds one call of the retriever, where
    requests with few queries and a large `topk` meet requests with many queries."""
    max_passages: int = 65_536
    """Queries times `topk` of all requests whose answers are asked for, made, or not read yet by their clients; more is
    answered with 429. It bounds the server's memory: a passage of 100 words takes some 3.4 KB until it is written."""
    max_query_chars: int = 32_768
    """Of one query; more is answered with 413."""
    max_queued_queries: int = 4096
    """While so many wait, new requests are answered with 429. A request is let in whole, so that a large one can get
    in at all: up to `max_queued_queries + max_request_queries - 1` may wait."""
    max_batch: int = 512
    """Queries of one call of the retriever; a single request with more is still one call."""
    max_bodies_bytes: int = 256 * 2**20
    """Of the bodies that are arriving at one time; more is answered with 429."""
    head_seconds: float = 10.0
    """Within which the head of a request has to arrive; later the connection is closed."""
    body_seconds: float = 30.0
    """Within which the body of a request has to arrive; later is answered with 408."""
    answer_seconds: float = 60.0
    """Within which a client has to read its answer; later the connection is closed."""
    max_connections: int = 1024
    """Of all clients together; one more is answered with 429."""
    max_client_connections: int = 512
    """Of one address; one more is answered with 429. Clients behind one proxy are one address."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"ServerLimits.{name} is {value!r}: expected a number above 0.")
