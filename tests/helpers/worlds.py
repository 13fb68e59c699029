"""The embedded world: written rollouts of it, and searches by an HTTP server that is killed once in mid-run."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from helpers.players import ScriptedEngine
from sdsearch_lightning.datamodules import SyntheticWorldDataModule
from sdsearch_lightning.retrieval import DenseRetriever, RemoteRetriever
from sdsearch_lightning.types import Passage, RolloutRequest


def write_world_rollout(request: RolloutRequest) -> str:
    """A search or two, then the right answer from even rollouts of a group and a wrong one from odd ones."""
    _, entity, _, relation, *_ = request.question.text.split()
    drawn = random.Random(request.seed)
    answer = entity if request.rollout_index % 2 else request.question.answers[0]
    term = f"{relation}_{drawn.choice('abcd')}"
    search = f"<think> need {relation} of {entity} </think> <search> {entity} {term} </search>"
    return f"{search} {search if drawn.random() < 0.5 else ''} <think> found </think> <answer> {answer} </answer>"


class WorldEngine(ScriptedEngine):
    """What it plays depends on the request's seed alone."""

    def __init__(self) -> None:
        super().__init__(write_world_rollout, logprobs=lambda position: -1.0)


class MortalServer:
    """`sdsearch serve` of an index, on a port that stays the same."""

    def __init__(self, retriever: DenseRetriever) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        paths = ("--corpus_path", str(retriever.corpus_path), "--index_path", str(retriever.index_path))
        self._command = [sys.executable, "-m", "sdsearch_lightning", "serve", *paths, "--port", str(self.port)]
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class KillingRetriever(RemoteRetriever):
    """Kills its server before call number `fatal_call`; another one is started half a second later."""

    fatal_call = 7

    def __init__(self, server: MortalServer) -> None:
        super().__init__(f"http://127.0.0.1:{server.port}", timeout=5, patience=60)
        self.server, self.calls = server, 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.calls += 1
        if self.calls == self.fatal_call:
            self.server.kill()
            threading.Timer(0.5, self.server.start).start()
        return super().search(queries, k)


class RemoteWorld(SyntheticWorldDataModule):
    """Its searches go over HTTP."""

    used: list[KillingRetriever] = []
    """Those of this process, for the test to look at."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.retriever, DenseRetriever):
            self.retriever = KillingRetriever(MortalServer(self.retriever))
            self.used.append(self.retriever)
