"""Connections and a clock for the client of the HTTP protocol, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx

from helpers.passages import ToyRetriever

Step = int | Exception | httpx.Response


def toy_answer(request: httpx.Request) -> httpx.Response:
    """A server over six passages."""
    asked = json.loads(request.content)
    found = ToyRetriever().search(asked["queries"], asked["topk"])
    rows = [[{"document": {"id": p.id, "contents": p.contents}, "score": 0.5} for p in hits] for hits in found]
    return httpx.Response(200, json={"result": rows})


class Network:
    """Stands in for all connections and the clock; time passes only while the client sleeps.

    `script` is what happens to one request after another; when it is used up, requests are answered.
    """

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.transports: list[httpx.HTTPTransport] = []
        self.script: Iterator[Step] = iter(())
        self.answer: Callable[[httpx.Request], httpx.Response] = toy_answer
        self.slept: list[float] = []

    def handle(self, transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.transports.append(transport)
        step = next(self.script, None)
        if isinstance(step, Exception):
            raise step
        if isinstance(step, int):
            return httpx.Response(step, text=f"says {step}")
        return step or self.answer(request)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def monotonic(self) -> float:
        return 1000.0 + sum(self.slept)
