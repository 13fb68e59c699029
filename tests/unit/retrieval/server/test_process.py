"""The real process on loopback: how it starts, how it ends, and that being killed costs its clients time only."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from helpers.passages import ToyRetriever
from helpers.paths import ROOT
from helpers.server_process import Server
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.remote import RemoteRetriever
from sdsearch_lightning.retrieval.server import process


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(max_body_bytes=100_000)
    yield server
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


def test_an_answer_that_has_begun_is_given_before_the_end(server: Server) -> None:
    """An idle connection does not hold it up, and the end is an ordinary one."""
    idle = RemoteRetriever(server.url)
    (hits,) = idle.search(["Rome"], 2)
    assert [(hit.id, hit.contents) for hit in hits] == [("0", "Rome 0"), ("1", "Rome 1")]
    with ThreadPoolExecutor(1) as pool, httpx.Client(trust_env=False) as client:
        running = pool.submit(client.post, server.url, json={"query": "1.0"})
        while not client.get(f"http://127.0.0.1:{server.port}/metrics").json()["requests"] == 2:
            time.sleep(0.01)
        time.sleep(0.1)
        started = time.monotonic()
        code, out, err = server.end(signal.SIGTERM)
        assert (code, out, err) == (0, "ended\n", "")
        assert running.result().json()["result"][0][0]["contents"] == "1.0 0"
    assert 0.5 < time.monotonic() - started < 5
    idle.close()


def test_ctrl_c_is_an_ordinary_end(server: Server) -> None:
    assert server.end(signal.SIGINT) == (0, "ended\n", "")


def test_a_body_that_is_too_large_gets_its_answer_over_a_real_connection(server: Server) -> None:
    """The server answers while the client is still writing; the connection can be used again."""
    with httpx.Client(trust_env=False) as client:
        pieces = (b"x" * 50_000 for _ in range(200))
        assert client.post(server.url, content=pieces).status_code == 413
        assert client.post(server.url, content=b"x" * 10_000_000).status_code == 413
        assert client.post(server.url, json={"query": "Rome"}).status_code == 200


def test_a_server_on_loopback_takes_loopbacks_names_only(server: Server) -> None:
    """A page in a browser could make its own name mean 127.0.0.1, and then read what it searches for."""
    for host, status in (("evil.example", 421), ("localhost:1", 200)):
        answer = httpx.post(server.url, json={"query": "Rome"}, headers={"Host": host}, trust_env=False)
        assert answer.status_code == status


@pytest.mark.parametrize(
    ("host", "allowed", "expected"),
    [
        ("127.0.0.1", (), ()),
        ("127.0.0.1", ("a.example",), ("a.example",)),
        ("127.0.0.1", ("*",), None),
        ("0.0.0.0", (), None),
        ("0.0.0.0", ("a.example",), ("a.example",)),
    ],
)
def test_which_names_a_server_takes(monkeypatch: pytest.MonkeyPatch, host: str, allowed: Any, expected: Any) -> None:
    seen: list[Any] = []
    create = process.create_app
    monkeypatch.setattr(process._Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(process, "create_app", lambda *args: seen.append(args[4]) or create(*args))
    process.serve(ToyRetriever(), host=host, port=0, token="t", allowed_hosts=allowed)  # type: ignore[arg-type]
    assert seen == [expected]


def test_bytes_that_are_no_http_are_not_the_servers_end(server: Server) -> None:
    for noise in (b"\x00\xff\r\n\r\n", b"POST /retrieve HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"GET"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(noise)
    retriever = RemoteRetriever(server.url, patience=0)
    assert len(retriever.search(["Rome"], 1)) == 1
    retriever.close()


def test_killed_and_started_again_costs_time_only(server: Server) -> None:
    """A client searches on without a pause; the server is killed, is away for a second, and comes back."""
    retriever = RemoteRetriever(server.url, timeout=5.0, patience=30.0)
    answered: list[float] = []
    failures: list[Exception] = []
    is_over = threading.Event()

    def search_on() -> None:
        number = 0
        while not is_over.is_set():
            queries = [f"query {number}", f"other {number}"]
            try:
                found = retriever.search(queries, 2)
                assert [[hit.contents for hit in hits] for hits in found] == [[f"{q} 0", f"{q} 1"] for q in queries]
            except Exception as error:
                failures.append(error)
                return
            answered.append(time.monotonic())
            number += 1

    client = threading.Thread(target=search_on)
    client.start()
    wait_for(lambda: len(answered) >= 20)
    server.end(signal.SIGKILL)
    num_before = len(answered)
    time.sleep(1.0)
    assert len(answered) <= num_before + 1 and client.is_alive()
    again = Server(port=server.port)
    try:
        wait_for(lambda: len(answered) >= num_before + 20 or not client.is_alive())
    finally:
        is_over.set()
        client.join(40)
        again.end(signal.SIGKILL)
        retriever.close()
    assert not failures and len(answered) >= num_before + 20
    assert max(b - a for a, b in zip(answered, answered[1:], strict=False)) > 1.0, "it was never away"


def wait_for(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


# In this process


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port} .*Choose another port") as raised:
            process.serve(ToyRetriever(), port=port)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70_000), ("192.0.2.1", 0)])
def test_an_address_that_cannot_be_had(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="Cannot listen on"):
        process.serve(ToyRetriever(), host=host, port=port)  # type: ignore[arg-type]


def test_a_retriever_that_does_not_work_is_not_served() -> None:
    class Broken:
        def search(self, queries: list[str], k: int) -> None: ...

    with pytest.raises(ConfigError, match="was tried with 2 queries"):
        process.serve(Broken(), port=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "token", "warns"), [("0.0.0.0", None, True), ("0.0.0.0", "s3cret", False), ("127.0.0.1", None, False)]
)
def test_open_to_other_machines_without_a_token_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, token: str | None, warns: bool
) -> None:
    monkeypatch.setattr(process._Server, "run", lambda self, sockets: None)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.WARNING):
        process.serve(ToyRetriever(), host=host, port=0, token=token)  # type: ignore[arg-type]
    assert ("no token is set" in caplog.text) == warns == bool(caplog.records)
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize(("module", "name"), [("app", "fastapi"), ("process", "uvicorn")])
def test_without_the_extra_it_says_what_to_install(module: str, name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import sdsearch_lightning.retrieval.server.{module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith("sdsearch_lightning.errors.ConfigError: The retrieval server needs ")
    assert 'pip install "sdsearch-lightning[serve]"' in done.stderr
