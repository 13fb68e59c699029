"""One thread that searches for all clients: what waits together is one call, without duplicates.

A retriever is never called concurrently. While it works, requests gather; then the next call answers all of them, so a
busy server makes few large calls and an idle one answers at once. If a call fails, each of its requests is tried alone:
one that no retriever can answer costs the others time, not their answers. This thread, like `SearchPool`, catches
whatever a retriever raises: a server has to outlive it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple

from sdsearch_lightning.errors import RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval.base import Retriever, as_passages
from sdsearch_lightning.types import Passage

Answer = list[list[Passage]]
_RECENT_CALLS = 64
_LONGEST_WAIT = 60


class _Job(NamedTuple):
    queries: tuple[str, ...]
    k: int


@dataclass(slots=True)
class BatchCounts:
    """What the thread did since the start."""

    batches: int = 0
    """Calls of the retriever."""
    queries: int = 0
    """Of the requests in these calls."""
    unique_queries: int = 0
    """That the retriever saw."""
    failed_batches: int = 0


class Batcher:
    """Gathers requests and answers them from one thread, which starts with the first one.

    Args:
        retriever: anything with `search(queries, k)`.
        max_batch: queries of one call; a single larger request is one call.
        max_queued: while so many queries wait, no more requests are taken.
        max_passages: queries times k of one call; a single larger request is one call.
    """

    def __init__(self, retriever: Retriever, max_batch: int, max_queued: int, max_passages: int) -> None:
        self._retriever, self._max_batch, self._max_queued = retriever, max_batch, max_queued
        self._max_passages = max_passages
        self._changed = threading.Condition()  # guards everything below
        self._waiting: OrderedDict[Future[Answer], _Job] = OrderedDict()
        self._num_waiting = 0
        self._counts = BatchCounts()
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_CALLS)  # (queries, seconds) of calls
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_waiting(self) -> int:
        """Number of queries that wait for their call."""
        return self._num_waiting

    def counts(self) -> BatchCounts:
        """A copy of the counts."""
        with self._changed:
            return replace(self._counts)

    def submit(self, queries: Sequence[str], k: int) -> Future[Answer]:
        """Searches in the background. The future gives one list per query, or raises `RetrievalError`.

        Raises:
            queue.Full: too many queries wait; try again after `seconds_to_wait()`.
            RetrieverUnavailableError: after `close()`.
        """
        with self._changed:
            if self._is_closed:
                raise RetrieverUnavailableError("the server is shutting down")
            if self._num_waiting >= self._max_queued:
                raise queue.Full
            future: Future[Answer] = Future()
            self._waiting[future] = _Job(tuple(queries), k)
            self._num_waiting += len(queries)
            if self._thread is None:
                # A daemon: a retriever that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
                self._thread.start()
            self._changed.notify()
        return future

    def forget(self, future: Future[Answer]) -> None:
        """Nobody waits for this answer any more: it is not searched for, unless that has begun."""
        with self._changed:
            future.cancel()
            if (job := self._waiting.pop(future, None)) is not None:
                self._num_waiting -= len(job.queries)

    def seconds_to_wait(self) -> int:
        """How long what waits now will take at the pace of the last calls; from 1 to 60 s."""
        with self._changed:
            num_queries = sum(queries for queries, _ in self._recent)
            wanted = self._num_waiting * sum(seconds for _, seconds in self._recent) / max(num_queries, 1)
        return max(1, min(math.ceil(wanted), _LONGEST_WAIT))

    def close(self, seconds: float = 1.0) -> None:
        """Answers what waits, then ends the thread; waits up to `seconds` for it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._take():
            self._answer([(future, job) for future, job in batch if future.set_running_or_notify_cancel()])
            del batch  # its answers would stay in memory until the next request

    def _take(self) -> list[tuple[Future[Answer], _Job]]:
        """What waits, up to a batch; nothing only after `close()`."""
        batch: list[tuple[Future[Answer], _Job]] = []
        num_queries, k = 0, 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            while self._waiting:
                future, job = next(iter(self._waiting.items()))
                together, k = num_queries + len(job.queries), max(k, job.k)  # all are searched with the largest k
                if batch and (together > self._max_batch or together * k > self._max_passages):
                    break
                del self._waiting[future]
                num_queries = together
                batch.append((future, job))
            self._num_waiting -= num_queries
        return batch

    def _answer(self, batch: list[tuple[Future[Answer], _Job]]) -> None:
        """One call for the batch; where it fails, one call per request."""
        if not batch:
            return
        try:
            answers = self._search([job for _, job in batch])
        except RetrieverUnavailableError as error:
            for future, _ in batch:
                future.set_exception(error)
        except BaseException as error:  # also SystemExit: it would end this thread, and every client would wait forever
            if len(batch) > 1:
                for one in batch:
                    self._answer([one])
                return
            batch[0][0].set_exception(RetrievalError(f"{type(error).__name__}: {error}"))
        else:
            for (future, _), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _search(self, jobs: Sequence[_Job]) -> list[Answer]:
        """One call with the largest k; the best k passages of a query are the beginning of its best k + 1."""
        num_queries, k = sum(len(job.queries) for job in jobs), max(job.k for job in jobs)
        unique = list(dict.fromkeys(query for job in jobs for query in job.queries))
        started, is_done = time.perf_counter(), False
        try:
            found = dict(zip(unique, as_passages(self._retriever.search(unique, k), len(unique), k), strict=True))
            is_done = True
        finally:
            with self._changed:
                self._recent.append((num_queries, time.perf_counter() - started))
                self._counts.batches += 1
                self._counts.queries += num_queries
                self._counts.unique_queries += len(unique)
                self._counts.failed_batches += not is_done
        return [[found[query][: job.k] for query in job.queries] for job in jobs]
