"""Connections with an end: uvicorn bounds how long one may idle, this what a client may do without ever finishing.

A head has to arrive within `head_seconds` of its first byte (of the connection, for the first one), and an answer has
to be taken within `answer_seconds`; else the connection is closed. A client, which is an address, has at most
`max_client_connections`, and all have `max_connections`; one more is answered with 429 to whatever it asks and closed,
and of those only so many are kept at a time that file descriptors cannot run out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sdsearch_lightning.retrieval.server.limits import ServerLimits

_MAX_TURNED_AWAY = 256
_TURNED_AWAY = object()
"""Counts connections that are above a limit, beside the addresses of those that are not."""
_BODY = b'{"error":{"status":429,"message":"expected fewer connections, found the limit reached. Try again in 1 s."}}'
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
    (b"retry-after", b"1"),
    (b"connection", b"close"),
]


def bounded_protocol(bounds: ServerLimits) -> type[H11Protocol]:
    """The protocol of a server with these limits; its connections share one count."""

    class Bounded(_BoundedProtocol):
        limits, crowd = bounds, Counter[object]()

    return Bounded


class _BoundedProtocol(H11Protocol):
    limits: ServerLimits
    crowd: Counter[object]
    """Open connections by address."""
    _counted: object = None
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        address: object = self.client and self.client[0]
        is_full = self.crowd.total() - self.crowd[_TURNED_AWAY] >= self.limits.max_connections
        if is_full or self.crowd[address] >= self.limits.max_client_connections:
            address, self.app = _TURNED_AWAY, _turn_away
            if self.crowd[_TURNED_AWAY] >= _MAX_TURNED_AWAY:
                transport.abort()
        self._counted = address
        self.crowd[address] += 1
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd[self._counted] -= 1
        if not self.crowd[self._counted]:
            del self.crowd[self._counted]  # addresses are many
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # it also begins the next request, where that is here already
        self._expect_head(has_begun=False)

    def _expect_head(self, has_begun: bool = True) -> None:
        """Sees to the clock of the next head: none while a request is under way, and one that is never set back."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if self._late is not None and is_busy:
            self._late.cancel()
            self._late = None
        elif self._late is None and has_begun and not is_busy:
            self._late = self.loop.call_later(self.limits.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.answer_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


async def _turn_away(scope: Any, receive: Any, send: Any) -> None:
    """Answers 429; first the client writes what it has, or the close that follows would cost it the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.start", "status": 429, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})
