"""The web application: three routes around one retriever.

    POST /retrieve   Search-R1's protocol, see bodies.py; behind the token
    GET  /health     is it up, and what does it serve; open, so that a load balancer needs no secret
    GET  /metrics    how it is doing; behind the token

Every refusal and every failure is JSON, {"error": {"status", "message"}}: 4xx where asking again the same way cannot
help, 429 (with Retry-After) where waiting does, 500 where the retriever failed, 503 where it is unavailable.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from sdsearch_lightning import __version__
from sdsearch_lightning.errors import ConfigError, RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.remote import check_token, is_loopback
from sdsearch_lightning.retrieval.server.batching import Answer, Batcher
from sdsearch_lightning.retrieval.server.bodies import Asked, RefusedError, encode, encode_answer, read_request
from sdsearch_lightning.retrieval.server.limits import ServerLimits
from sdsearch_lightning.retrieval.server.metrics import Metrics

try:
    from fastapi import Depends, FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise ConfigError(
        f'The retrieval server needs FastAPI ({error}). Install it: pip install "sdsearch-lightning[serve]"'
    ) from error

_LOGGER = logging.getLogger(__name__)
_SMALL_ANSWER = 192  # passages; more are encoded off the event loop
_CLIENT_CLOSED = 499  # nginx's number for it; nobody reads that answer, the count is what matters


def create_app(
    retriever: Retriever,
    top_k: int = 3,
    token: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        retriever: anything with `search(queries, k)`; called from one thread, never concurrently. It is not closed.
        top_k: passages per query where a request names no number.
        token: if given, `/retrieve` and `/metrics` ask for `Authorization: Bearer <token>`.
        limits: what is refused.
        allowed_hosts: names by which a request may call the server, beside those of loopback; None: any.

    Raises:
        ConfigError: a `top_k` outside the limits, or a token that no client could send.
    """
    limits = limits or ServerLimits()
    most = min(limits.max_top_k, limits.max_request_passages)
    if not 1 <= top_k <= most:
        raise ConfigError(f"top_k is {top_k}: expected 1 to {most} (max_top_k) passages per query.")
    check_token(token)
    service = _Service(retriever, top_k, token, limits, allowed_hosts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.batcher.close()

    app = FastAPI(
        title="sdsearch retrieval",
        lifespan=lifespan,
        dependencies=[Depends(service.check_host)],
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_api_route("/retrieve", service.retrieve, methods=["POST"], response_model=None)
    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(HTTPException, service.on_http_error)
    app.add_exception_handler(Exception, service.on_bug)
    return app


class _Service:
    """The routes and what they share."""

    def __init__(
        self,
        retriever: Retriever,
        top_k: int,
        token: str | None,
        limits: ServerLimits,
        allowed_hosts: Sequence[str] | None,
    ) -> None:
        self.batcher = Batcher(retriever, limits.max_batch, limits.max_queued_queries, limits.max_request_passages)
        self._top_k, self._limits = top_k, limits
        self._hosts = None if allowed_hosts is None else frozenset(name.lower() for name in allowed_hosts)
        self._num_passages_asked, self._bodies_bytes = 0, 0
        self._token = None if token is None else token.encode()
        self._metrics = Metrics()
        self._started = time.monotonic()
        self._retriever_name = type(retriever).__name__
        self._num_passages = len(retriever) if hasattr(retriever, "__len__") else None

    async def retrieve(self, request: Request) -> Response:
        """Answers one request of any number of queries."""
        started = time.perf_counter()
        self._metrics.requests += 1
        self._authorize(request)
        try:
            asked = read_request(await self._read(request), self._top_k, self._limits)
        except RefusedError as error:
            raise HTTPException(error.status, error.message) from None
        release = self._reserve(len(asked.queries) * asked.k)
        try:
            answer = await self._search(request, asked) if asked.queries else []
            if len(answer) * asked.k <= _SMALL_ANSWER:
                body = encode_answer(answer, asked.with_scores)
            else:
                body = await asyncio.to_thread(encode_answer, answer, asked.with_scores)
        except BaseException:
            release()
            raise
        self._metrics.answered(time.perf_counter() - started)
        return _Delivered(body, release)

    async def health(self) -> Response:
        """Answers at once, whatever the retriever is doing."""
        return _json(
            encode(
                {
                    "status": "ok",
                    "retriever": self._retriever_name,
                    "passages": self._num_passages,
                    "top_k": self._top_k,
                    "uptime_seconds": round(time.monotonic() - self._started, 3),
                    "version": __version__,
                }
            )
        )

    async def metrics(self, request: Request) -> Response:
        """Counts since the start; `batch_size_mean` is in queries that the retriever saw."""
        self._authorize(request)
        counts = self.batcher.counts()
        mean = counts.unique_queries / counts.batches if counts.batches else None
        figures = {
            "queries": counts.queries,
            "unique_queries": counts.unique_queries,
            "batches": counts.batches,
            "failed_batches": counts.failed_batches,
            "batch_size_mean": mean,
            "queued_queries": self.batcher.num_waiting,
            "uptime_seconds": round(time.monotonic() - self._started, 3),
        }
        return _json(encode(self._metrics.snapshot() | figures))

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """A refusal, ours or the framework's (404, 405)."""
        assert isinstance(error, HTTPException), "registered for this class only"
        return self._failure(error.status_code, str(error.detail), error.headers)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """Something that is not foreseen; the traceback goes to the log."""
        return self._failure(500, f"internal error, {type(error).__name__}; the server's log has more")

    def _failure(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
        self._metrics.failed(status)
        return _json(encode({"error": {"status": status, "message": message[:1000]}}), status, headers)

    async def check_host(self, request: Request) -> None:
        """Refuses a foreign name: a page in somebody's browser may have made its own name mean this machine."""
        if self._hosts is None:
            return
        given = request.headers.get("host", "")
        try:
            name = urlsplit(f"//{given}").hostname or ""
        except ValueError:
            name = ""
        if name not in self._hosts and not is_loopback(name):
            raise HTTPException(421, f"Host: expected a name of --allowed_hosts or of loopback, found {given[:100]!r}")

    def _reserve(self, num_passages: int) -> Callable[[], None]:
        """Room for an answer of that many passages; what it returns gives the room back, and is called once."""
        limit, others = self._limits.max_passages, self._num_passages_asked
        if others and others + num_passages > limit:
            message = f"expected at most {limit} passages (max_passages) for all requests, found {others} asked for."
            raise HTTPException(429, f"{message} Try again in 1 s.", {"Retry-After": "1"})
        self._num_passages_asked += num_passages

        def release() -> None:
            self._num_passages_asked -= num_passages

        return release

    def _authorize(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1, which gives the bytes back; `==` would tell by its time how much is right.
        is_right = secrets.compare_digest(given.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise HTTPException(
                401, "expected the header Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"}
            )

    async def _read(self, request: Request) -> bytes:
        """The body, as long as it keeps to the limits."""
        limit, all_limit, body = self._limits.max_body_bytes, self._limits.max_bodies_bytes, bytearray()
        # The connection stays: what still comes is thrown away, and a client that is writing gets to read the answer.
        too_large = HTTPException(413, f"expected a body of at most {limit} bytes. Send several requests.")
        announced = request.headers.get("content-length", "")
        if announced.isascii() and announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise too_large
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._bodies_bytes += len(chunk)
                    if self._bodies_bytes > all_limit and self._bodies_bytes > len(body):
                        message = f"expected bodies of at most {all_limit} bytes at one time. Try again in 1 s."
                        raise HTTPException(429, message, {"Retry-After": "1"})
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            late = f"expected the whole body within {self._limits.body_seconds:g} s"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise HTTPException(_CLIENT_CLOSED, "the client closed the connection") from None
        finally:
            self._bodies_bytes -= len(body)
        return bytes(body)

    async def _search(self, request: Request, asked: Asked) -> Answer:
        try:
            future = self.batcher.submit(asked.queries, asked.k)
            return await self._wait(request, future)
        except queue.Full:
            seconds = self.batcher.seconds_to_wait()
            message = f"{self.batcher.num_waiting} queries are waiting already. Try again in {seconds} s."
            raise HTTPException(429, message, {"Retry-After": str(seconds)}) from None
        except RetrieverUnavailableError as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except RetrievalError as error:
            _LOGGER.warning("a request of %d queries failed: %s", len(asked.queries), str(error)[:1000])
            raise HTTPException(500, f"the retriever failed: {error}") from None

    async def _wait(self, request: Request, future: Future[Answer]) -> Answer:
        """The answer; if the client goes away first, nothing is searched for it."""
        answered: asyncio.Future[Answer] = asyncio.wrap_future(future)
        gone = asyncio.create_task(_disconnected(request))
        try:
            waiting: set[asyncio.Future[Any]] = {answered, gone}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise HTTPException(_CLIENT_CLOSED, "the client closed the connection")
            return answered.result()
        finally:
            gone.cancel()
            answered.cancel()
            self.batcher.forget(future)


class _Delivered(Response):
    """A 200 that says when its client has read it: until then the answer is in this process's memory."""

    def __init__(self, body: bytes, when_read: Callable[[], None]) -> None:
        super().__init__(body, media_type="application/json")
        self._when_read = when_read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # waits until nearly all is read, or nobody is left
        finally:
            self._when_read()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, dict(headers or {}), media_type="application/json")
