"""What clients may hold: connections that never say anything, answers that nobody reads, more than one's share."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from helpers.server_process import Server

Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(**limits: float) -> Server:
        servers.append(Server(**limits))
        return servers[-1]

    yield start
    for server in servers:
        server.end(signal.SIGKILL)


def ask(server: Server, source: str = "127.0.0.1", **body: object) -> httpx.Response:
    """One request of a client with that address."""
    transport = httpx.HTTPTransport(local_address=source)
    with httpx.Client(transport=transport, timeout=5) as client:
        return client.post(server.url, json=body or {"query": "Rome"})


def connect(server: Server, stack: ExitStack, sent: bytes) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
    connection.sendall(sent)
    connection.settimeout(5)
    return connection


def post(body: object) -> bytes:
    text = json.dumps(body).encode()
    return b"POST /retrieve HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(text) + text


def resident(server: Server) -> float:
    """MB."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_thousand_half_heads_lock_nobody_else_out_and_their_own_address_for_seconds(serve: Serve) -> None:
    server = serve(head_seconds=2.0)
    with ExitStack() as stack:
        held = [connect(server, stack, b"POST /retrieve HTTP/1.1\r\nHost: 127.") for _ in range(1024)]
        assert ask(server, "127.0.0.2").status_code == 200
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                status = ask(server).status_code
            except httpx.TransportError:
                status = 0
            if status == 200:
                break
            assert status in (0, 429)
            time.sleep(0.2)
        assert status == 200
        assert all(map(is_closed, held))


@pytest.mark.parametrize("before", [b"", post({"query": "Rome"})], ids=["first", "second"])
def test_bytes_that_trickle_do_not_set_the_clock_back(serve: Serve, before: bytes) -> None:
    server = serve(head_seconds=0.5)
    with ExitStack() as stack:
        connection = connect(server, stack, before)
        if before:
            assert connection.recv(100_000).startswith(b"HTTP/1.1 200")
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < started + 5:
                connection.sendall(b"P")
                time.sleep(0.05)
        assert 0.4 < time.monotonic() - started < 3


def test_slow_work_is_no_slow_head(serve: Serve) -> None:
    """The clock stands while a request is searched for, and an idle connection keeps its own, longer one."""
    server = serve(head_seconds=0.2)
    with httpx.Client(trust_env=False) as client:
        for _ in range(2):
            assert client.post(server.url, json={"query": "0.6"}).status_code == 200
            time.sleep(0.4)


def test_one_address_has_its_share_and_is_told_so(serve: Serve) -> None:
    server = serve(max_client_connections=3, max_connections=4)
    with ExitStack() as stack:
        held = [connect(server, stack, b"P") for _ in range(3)]
        refused = ask(server)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["message"].startswith("expected fewer connections, found the limit reached")
        assert ask(server, "127.0.0.2").status_code == 200
        stack.enter_context(socket.create_connection(("127.0.0.1", server.port), source_address=("127.0.0.3", 0)))
        assert ask(server, "127.0.0.2").status_code == 429
        held[0].close()
        time.sleep(0.1)
        assert ask(server, "127.0.0.2").status_code == 200


def test_an_answer_that_nobody_reads_is_given_up(serve: Serve) -> None:
    """It counts among the passages of all requests until then, and others are turned away, not answered from memory."""
    server = serve(answer_seconds=1.5, max_passages=20_000)
    with ExitStack() as stack:
        hoarder = connect(server, stack, post({"queries": ["long"] * 16, "topk": 1000}))
        time.sleep(1)
        turned_away = ask(server, queries=["long"] * 5, topk=1000)
        assert turned_away.status_code == 429 and "max_passages" in turned_away.text
        assert ask(server).status_code == 200
        time.sleep(1.5)
        assert ask(server, queries=["long"] * 5, topk=1000).status_code == 200
        answer = b"".join(iter(lambda: hoarder.recv(2**20), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert 0 < len(body) < int(head.split(b"content-length: ")[1].split()[0]), "cut where its time was over"


def test_the_largest_answers_take_the_memory_that_is_documented(serve: Serve) -> None:
    """A hundred clients ask for as much as one may and read nothing."""
    server = serve()
    before = resident(server)
    with ExitStack() as stack:
        for _ in range(100):
            connect(server, stack, post({"queries": ["long"] * 16, "topk": 1000}))
        most, deadline = 0.0, time.monotonic() + 8
        while time.monotonic() < deadline:
            most = max(most, resident(server))
            time.sleep(0.02)
        assert most - before < 250, f"{most - before:.0f} MB"
