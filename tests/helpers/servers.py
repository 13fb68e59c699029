"""Servers and retrievers for the tests of the HTTP protocol: ours in this process, and fakes of everybody else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import FastAPI

from helpers.passages import ToyRetriever
from sdsearch_lightning.retrieval.server.app import create_app
from sdsearch_lightning.retrieval.server.limits import ServerLimits
from sdsearch_lightning.types import Passage


class GatedRetriever(ToyRetriever):
    """Waits in every call until `gate` is set; notices a call within a call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.ks: list[int] = []
        self._alone = threading.Semaphore(1)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert self._alone.acquire(blocking=False), "called concurrently"
        try:
            self.ks.append(k)
            self.entered.set()
            assert self.gate.wait(10)
            return super().search(queries, k)
        finally:
            self._alone.release()


def toy_app(retriever: Any = None, token: str | None = None, **limits: Any) -> FastAPI:
    """The server over six passages."""
    return create_app(retriever or ToyRetriever(), top_k=3, token=token, limits=ServerLimits(**limits))


def connect(app: FastAPI) -> httpx.AsyncClient:
    """A client inside this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def send(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, start to end."""

    async def go() -> httpx.Response:
        async with connect(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def post(app: FastAPI, body: Any, **options: Any) -> httpx.Response:
    """POST /retrieve with a JSON body."""
    return send(app, "POST", "/retrieve", json=body, **options)
