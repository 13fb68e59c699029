"""The server process: a listening socket, one line when it is ready, and an end that loses no answer."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.base import Retriever, check_retriever
from sdsearch_lightning.retrieval.remote import is_loopback
from sdsearch_lightning.retrieval.server.app import create_app
from sdsearch_lightning.retrieval.server.limits import ServerLimits

try:
    import uvicorn

    from sdsearch_lightning.retrieval.server.connections import bounded_protocol
except ImportError as error:
    raise ConfigError(
        f'The retrieval server needs uvicorn ({error}). Install it: pip install "sdsearch-lightning[serve]"'
    ) from error

_LOGGER = logging.getLogger(__name__)
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection, so that none is closed as it is used again


def serve(
    retriever: Retriever,
    top_k: int = 3,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: ServerLimits | None = None,
    grace_seconds: int = 10,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serves `retriever` over HTTP until SIGTERM or SIGINT, then answers what it has begun and returns.

    Args:
        retriever: anything with `search(queries, k)`; it is prepared here and stays open afterwards.
        top_k: passages per query where a request names no number.
        host: to listen on. Search-R1's server listens on all interfaces (0.0.0.0); this one on loopback.
        port: to listen on; 0 takes a free one, and the line that is printed says which.
        token: if given, requests need the header `Authorization: Bearer <token>`.
        limits: what is refused.
        grace_seconds: after a signal, until requests that are still without an answer are given up.
        allowed_hosts: names that a request's `Host` may have beside those of loopback; `*`: any. Without it, a server
            on loopback takes loopback's names only, and one that listens elsewhere takes any.

    Raises:
        ConfigError: the address cannot be had, an option cannot work, or a first search fails.
    """
    if hasattr(retriever, "prepare"):
        retriever.prepare()
    limits = limits or ServerLimits()
    is_open = "*" in allowed_hosts or not (allowed_hosts or is_loopback(host))
    with _listen(host, port) as listener:
        check_retriever(retriever, top_k)  # also loads what a first search loads: ready means ready
        app = create_app(retriever, top_k, token, limits, None if is_open else allowed_hosts)
        if token is None and not is_loopback(host):
            _LOGGER.warning("%s can be reached from other machines, and no token is set: anyone may search.", host)
        config = uvicorn.Config(
            app,
            http=bounded_protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=grace_seconds,
        )
        server = _Server(config)
        shown = f"[{host}]" if ":" in host else host
        server.ready_line = (
            f"sdsearch: serving {type(retriever).__name__} at http://{shown}:{listener.getsockname()[1]}"
        )
        with _signals_end_calmly():
            server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says when it is ready; uvicorn's own line is among others at level INFO."""

    ready_line = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"{self.ready_line}/retrieve", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. It does not listen yet: until the server is ready, clients are refused and try again."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart needs no pause
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port} ({error}). Is a server running there already? Choose another port or host."
        ) from error
    return listener


@contextmanager
def _signals_end_calmly() -> Iterator[None]:
    """Uvicorn raises the signal that ended it once more when it is done; here that has nothing left to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
