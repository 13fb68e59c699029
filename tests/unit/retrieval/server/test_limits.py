"""What the server refuses to take: too much, too many, too late, and from whom it does not know."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from helpers.passages import ToyRetriever
from helpers.servers import GatedRetriever, connect, post, send, toy_app
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.server.app import create_app
from sdsearch_lightning.retrieval.server.limits import ServerLimits

# Size


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": ["a"] * 5}, 413, "queries: expected at most 4, found 5"),
        ({"queries": ["a"] * 4}, 200, ""),
        ({"queries": ["a", "b" * 11]}, 413, "expected at most 10 characters, found 11 at 1"),
        ({"query": "b" * 10}, 200, ""),
        ({"queries": ["a"] * 4, "topk": 5}, 200, ""),
        ({"queries": ["a"] * 3, "topk": 7}, 413, "at most 20 (max_request_passages), found 3 x 7 = 21. Send several"),
        ({"queries": ["a"], "x": "y" * 100}, 413, "expected a body of at most 100 bytes"),
    ],
)
def test_too_large(body: Any, status: int, message: str) -> None:
    response = post(
        toy_app(max_request_queries=4, max_query_chars=10, max_body_bytes=100, max_request_passages=20), body
    )
    assert response.status_code == status and message in response.text


def test_a_body_of_unknown_length_is_cut_off_as_soon_as_it_is_too_large() -> None:
    """Without Content-Length; the client would send for ever."""
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b" " * 100

    async def go() -> httpx.Response:
        async with connect(toy_app(max_body_bytes=1000)) as client:
            return await client.post("/retrieve", content=endless())

    assert asyncio.run(go()).status_code == 413
    assert num_sent == 11  # 10 fit


def test_a_length_that_is_announced_is_believed_and_nothing_read() -> None:
    async def unread() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    async def go(length: str) -> httpx.Response:
        async with connect(toy_app()) as client:
            return await client.post("/retrieve", content=unread(), headers={"Content-Length": length})

    for length in (str(2**30), "9" * 5000):
        assert asyncio.run(go(length)).status_code == 413


def test_a_body_that_does_not_end_is_too_late() -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async def go() -> httpx.Response:
        async with connect(toy_app(body_seconds=0.05)) as client:
            return await client.post("/retrieve", content=stalled())

    response = asyncio.run(go())
    assert response.status_code == 408 and response.headers["connection"] == "close"


# Number


def test_a_full_queue_turns_away_and_says_when_to_come_back() -> None:
    async def go() -> None:
        retriever = GatedRetriever()
        async with connect(toy_app(retriever, max_queued_queries=3)) as client:

            async def ask(*queries: str) -> httpx.Response:
                return await client.post("/retrieve", json={"queries": queries})

            running = asyncio.create_task(ask("a"))
            await asyncio.to_thread(retriever.entered.wait)
            waiting = [asyncio.create_task(ask("b", "c")), asyncio.create_task(ask("d", "e", "f"))]  # let in whole
            while (await client.get("/metrics")).json()["queued_queries"] < 5:
                await asyncio.sleep(0.01)
            refused = await ask("g")
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert "5 queries are waiting" in refused.json()["error"]["message"]
            assert (await ask()).status_code == 200  # asks for nothing
            retriever.gate.set()
            assert [(await task).status_code for task in (running, *waiting)] == [200, 200, 200]
            assert (await ask("g")).status_code == 200
            assert (await client.get("/metrics")).json()["errors"] == {"429": 1}

    asyncio.run(go())


def test_passages_of_all_requests_are_bounded_together() -> None:
    async def go() -> None:
        retriever = GatedRetriever()
        async with connect(toy_app(retriever, max_passages=100)) as client:

            async def ask(topk: int) -> httpx.Response:
                return await client.post("/retrieve", json={"query": "a", "topk": topk})

            running = asyncio.create_task(ask(90))
            await asyncio.to_thread(retriever.entered.wait)
            refused = await ask(11)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert "at most 100 passages (max_passages) for all requests, found 90 asked" in refused.text
            waiting = asyncio.create_task(ask(10))
            retriever.gate.set()
            assert [(await task).status_code for task in (running, waiting)] == [200, 200]
            assert (await ask(100)).status_code == 200, "what is answered counts no more"
            retriever.fail = lambda queries: 1 / 0
            assert [(await ask(100)).status_code for _ in range(2)] == [500, 500], "nor what failed"

    asyncio.run(go())


def test_bodies_of_all_requests_are_bounded_together() -> None:
    async def go() -> None:
        read, end = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b" " * 90
            read.set()
            await end.wait()
            yield b'{"query": "a"}'

        async with connect(toy_app(max_bodies_bytes=100)) as client:
            running = asyncio.create_task(client.post("/retrieve", content=slow()))
            await read.wait()
            refused = await client.post("/retrieve", json={"query": "a"})
            assert refused.status_code == 429 and "bodies of at most 100 bytes at one time" in refused.text
            end.set()
            assert (await running).status_code == 200
            assert (await client.post("/retrieve", json={"query": "a" * 200})).status_code == 200, "one alone is let in"

    asyncio.run(go())


def test_nothing_is_searched_for_a_client_that_went_away() -> None:
    async def go() -> None:
        retriever = GatedRetriever()
        app = toy_app(retriever)
        async with connect(app) as client:
            running = asyncio.create_task(client.post("/retrieve", json={"queries": ["a"]}))
            await asyncio.to_thread(retriever.entered.wait)
            body = iter([{"type": "http.request", "body": b'{"queries": ["b", "c"]}'}])

            async def receive() -> Any:  # the body, and then the end of the connection
                if (message := next(body, None)) is None:
                    while (await client.get("/metrics")).json()["queued_queries"] < 2:
                        await asyncio.sleep(0.01)
                return message or {"type": "http.disconnect"}

            async def sent(message: Any) -> None:
                pass

            await app(request_scope(), receive, sent)
            assert (await client.get("/metrics")).json()["queued_queries"] == 0
            retriever.gate.set()
            await running
            assert retriever.calls == [["a"]]
            assert (await client.get("/metrics")).json()["errors"] == {"499": 1}

    asyncio.run(go())


def test_a_failure_that_nobody_waits_for_is_not_reported_as_a_bug() -> None:
    """The client goes away while its search runs, and the search then fails."""

    def fail(queries: Sequence[str]) -> None:
        raise ValueError("cannot search that")

    async def go() -> list[Any]:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["message"]))
        retriever = GatedRetriever()
        retriever.fail = fail
        app = toy_app(retriever)
        body = iter([{"type": "http.request", "body": b'{"query": "b"}'}])

        async def receive() -> Any:
            if (message := next(body, None)) is None:
                await asyncio.to_thread(retriever.entered.wait, 10)
            return message or {"type": "http.disconnect"}

        async def sent(message: Any) -> None:
            pass

        await app(request_scope(), receive, sent)
        retriever.gate.set()
        async with connect(app) as client:
            while (await client.get("/metrics")).json()["failed_batches"] < 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        gc.collect()
        return reported

    assert asyncio.run(go()) == []


def request_scope() -> dict[str, Any]:
    """Of POST /retrieve, for an application that is called without a client."""
    return {"type": "http", "method": "POST", "path": "/retrieve", "query_string": b"", "headers": []}


# Token


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer s3cret!", 401),
        ("Bearer s3cre", 401),
        ("Basic s3cret", 401),
        ("s3cret", 401),
        (b"Bearer s3cr\xe9t", 401),
        ("Bearer s3cret", 200),
        ("bearer  s3cret", 200),
    ],
)
def test_a_token_is_asked_for_everywhere_but_for_health(header: Any, status: int) -> None:
    retriever = ToyRetriever()
    app = toy_app(retriever, token="s3cret")
    headers = {} if header is None else {"Authorization": header}
    response = post(app, {"queries": ["a"]}, headers=headers)
    assert response.status_code == status == send(app, "GET", "/metrics", headers=headers).status_code
    assert send(app, "GET", "/health", headers=headers).status_code == 200
    assert len(retriever.calls) == (status == 200)
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ü"])
def test_a_token_that_nobody_could_send(token: str) -> None:
    with pytest.raises(ConfigError, match="^token: expected"):
        toy_app(token=token)


# Host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000")),
        *((name, 200) for name in ("search.example", "Search.Example:80")),
        *((name, 421) for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io")),
        *((name, 421) for name in ("", "[::1", "10.0.0.5:8000", "evil@", "search.example.evil.example", "0.0.0.0")),
    ],
)
@pytest.mark.parametrize("path", ["/retrieve", "/health", "/metrics"])
def test_a_foreign_host_is_refused_everywhere(host: str, status: int, path: str) -> None:
    app = create_app(ToyRetriever(), allowed_hosts=["Search.example"])  # type: ignore[arg-type]
    method = "POST" if path == "/retrieve" else "GET"
    response = send(app, method, path, json={"query": "a"}, headers={"Host": host})
    assert response.status_code == status
    if status == 421:
        told = response.json()["error"]["message"]
        assert told == f"Host: expected a name of --allowed_hosts or of loopback, found {host!r}"


# Options


@pytest.mark.parametrize("name", ["max_top_k", "max_body_bytes", "max_queued_queries", "body_seconds", "head_seconds"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"ServerLimits.{name} is 0: expected a number above 0"):
        ServerLimits(**{name: 0})


def test_top_k_is_within_the_limits() -> None:
    for top_k in (0, 1001):
        with pytest.raises(ConfigError, match=f"top_k is {top_k}: expected 1 to 1000"):
            create_app(ToyRetriever(), top_k=top_k)  # type: ignore[arg-type]
