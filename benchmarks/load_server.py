"""The retrieval server under more load than it can carry: it answers what it can, turns the rest away, does not grow.

A real server process serves a retriever that takes a fixed time per query, so that its capacity is known. Clients first
ask one after the other (a closed loop), which measures the capacity; then requests arrive at random times at `load`
times that rate, whether or not earlier ones were answered (an open loop). Anything but 200 and 429 is a failure.

    python -m benchmarks.load_server [--clients 32] [--seconds 60] [--load 2.0]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.harness import ROOT, Bar, Report
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.server.limits import ServerLimits
from sdsearch_lightning.retrieval.server.metrics import quantile
from sdsearch_lightning.retrieval.server.process import serve
from sdsearch_lightning.types import Passage

HOST, TIMEOUT = "127.0.0.1", 30.0
QUERIES_PER_REQUEST, QUEUED_QUERIES = 4, 256
WARM_UP, CALIBRATION = 20.0, 5.0  # seconds
MAX_GROWTH, MIN_RATE = 8.0, 0.9  # MB after the warm-up; share of the capacity
TEXT = '"A title"\n' + "A sentence of the usual length, as an encyclopedia has it. " * 10


class PacedRetriever(Retriever):
    """Takes a fixed time for each query and finds passages of the usual length."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        time.sleep(len(queries) / self.rate)
        return [[Passage(str(rank), f"{TEXT}{query}", 1.0 / (1 + rank)) for rank in range(k)] for query in queries]


@dataclass
class Outcomes:
    """What became of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)
    """Of the 200s."""

    @property
    def num_failures(self) -> int:
        """Requests with any other end than 200 and 429."""
        return sum(count for status, count in self.statuses.items() if status not in ("200", "429"))


class Connections:
    """HTTP/1.1 in its plainest form. With hundreds of requests under way, a full client costs more than the server.

    Args:
        port: of the server.
        address: that the client has, one of loopback's.
    """

    def __init__(self, port: int, address: str) -> None:
        self._port, self._address = port, address
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer to POST /retrieve."""
        reader, writer = self._idle.pop() if self._idle else await self._open()
        try:
            head = f"POST /retrieve HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(answer.split("content-length:")[1].split("\r\n")[0])
            found = int(answer.split()[1]), await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        if "connection: close" in answer:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return found

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(HOST, self._port, local_addr=(self._address, 0))

    def close(self) -> None:
        """Closes what is idle."""
        for _, writer in self._idle:
            writer.close()


class Clients:
    """Requests to one server, each client from its own address; no query is asked twice: none is free."""

    def __init__(self, port: int, count: int) -> None:
        self.connections = [Connections(port, f"127.0.{1 + index // 250}.{1 + index % 250}") for index in range(count)]
        self._numbers = itertools.count()

    async def ask(self, outcomes: Outcomes, client: int) -> None:
        """Post one request of fresh queries, and count its status and seconds."""
        queries = [f"query {next(self._numbers)}" for _ in range(QUERIES_PER_REQUEST)]
        started = time.perf_counter()
        body = json.dumps({"queries": queries, "topk": 3, "return_scores": True}).encode()
        try:
            status, answer = await asyncio.wait_for(self.connections[client].post(body), TIMEOUT)
        except (OSError, EOFError, TimeoutError) as error:
            outcomes.statuses[type(error).__name__] += 1
            return
        is_right = status != 200 or answer.count(b'"score"') == 3 * QUERIES_PER_REQUEST
        outcomes.statuses[str(status) if is_right else "wrong answer"] += 1
        if status == 200:
            outcomes.milliseconds.append(1e3 * (time.perf_counter() - started))

    async def closed_loop(self, seconds: float) -> float:
        """Queries per second of clients that each wait for their answer."""
        outcomes, end = Outcomes(), time.perf_counter() + seconds

        async def ask_on(client: int) -> None:
            while time.perf_counter() < end:
                await self.ask(outcomes, client)

        await asyncio.gather(*map(ask_on, range(len(self.connections))))
        return outcomes.statuses["200"] * QUERIES_PER_REQUEST / seconds

    async def open_loop(self, seconds: float, requests_per_second: float) -> Outcomes:
        """Requests that arrive as a Poisson process, split between the clients."""
        outcomes, start = Outcomes(), time.perf_counter()
        running: set[asyncio.Task[None]] = set()

        async def arrive(client: int) -> None:
            due, chance = start, random.Random(client)
            while (due := due + chance.expovariate(requests_per_second / len(self.connections))) < start + seconds:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                running.add(task := asyncio.create_task(self.ask(outcomes, client)))
                task.add_done_callback(running.discard)

        await asyncio.gather(*map(arrive, range(len(self.connections))))
        await asyncio.gather(*running)
        return outcomes


async def load(url: str, process_id: int, options: argparse.Namespace, report: Report) -> None:
    """Measures the capacity, drives the load and adds what was found to the report."""
    memory = [resident(process_id)]
    clients = Clients(httpx.URL(url).port or 80, options.clients)
    capacity = await clients.closed_loop(CALIBRATION)

    async def watch() -> None:
        await asyncio.sleep(min(WARM_UP, options.seconds / 3))
        memory.append(resident(process_id))

    watching = asyncio.create_task(watch())
    rate = options.load * capacity / QUERIES_PER_REQUEST
    outcomes = await clients.open_loop(options.seconds, rate)
    await watching
    memory.append(resident(process_id))
    for connections in clients.connections:
        connections.close()
    own = httpx.get(url.replace("/retrieve", "/metrics"), trust_env=False).json()
    answered = outcomes.statuses["200"] * QUERIES_PER_REQUEST / options.seconds
    note = f"{QUERIES_PER_REQUEST} queries each"
    report.add("capacity", Bar.counted("queries per s, closed loop", capacity), f"{options.rate:g} by design")
    report.add("load", Bar.counted("requests per s, offered", sum(outcomes.statuses.values()) / options.seconds), note)
    for status, count in sorted(outcomes.statuses.items()):
        report.add("load", Bar.counted(f"requests with {status}", count))
    report.add("load", Bar.counted("failures: neither 200 nor 429", outcomes.num_failures, at_most=0))
    enough = MIN_RATE if options.load >= 1 else None
    report.add("load", Bar.counted("queries answered per s / capacity", answered / capacity, at_least=enough))
    for name, share in {"p50": 0.5, "p99": 0.99}.items():
        report.add("load", Bar.counted(f"{name} of the 200s, ms", quantile(outcomes.milliseconds, share) or 0.0))
    report.add("load", Bar.counted("queries per call of the retriever, mean", own["batch_size_mean"]))
    report.add("memory", Bar.counted("server before, MB", memory[0]))
    report.add("memory", Bar.counted("server at the end, MB", memory[2]))
    report.add("memory", Bar.counted("growth after the warm-up, MB", memory[2] - memory[1], at_most=MAX_GROWTH))


@contextmanager
def server_process(rate: float) -> Iterator[tuple[str, int]]:
    """URL and process id of a server with `PacedRetriever`."""
    command = [sys.executable, "-m", "benchmarks.load_server", "--serve", "--rate", str(rate)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "asked for"
    try:
        yield process.stdout.readline().split()[-1], process.pid
    finally:
        process.terminate()
        process.communicate(timeout=30)
    if process.returncode != 0:
        raise RuntimeError(f"the server ended with {process.returncode}; expected 0 after SIGTERM")


def resident(process_id: int) -> float:
    """Resident memory in MB."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024 / 1e6


def main() -> int:
    """The command line; the exit code is 1 where a bar was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_server", description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--load", type=float, default=2.0, help="offered rate over measured capacity")
    parser.add_argument("--rate", type=float, default=400.0, help="queries per second that the retriever can answer")
    parser.add_argument("--serve", action="store_true", help="be the server (what this script starts)")
    options = parser.parse_args()
    if options.serve:
        serve(PacedRetriever(options.rate), port=0, limits=ServerLimits(max_queued_queries=QUEUED_QUERIES))
        return 0
    report = Report("load_server", vars(options))
    with server_process(options.rate) as (url, process_id):
        asyncio.run(load(url, process_id, options, report))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
