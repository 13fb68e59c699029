"""One worker thread between rollouts and the retriever: batched, without duplicates, and the boundary of its failures.

This is the one place in training that catches whatever a user's retriever raises. A failed search becomes a
`RetrievalError` for the rollouts that asked for it; the run goes on, and the failures are counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

from sdsearch_lightning.errors import RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval.base import Retriever, as_passages
from sdsearch_lightning.types import Passage

LEAVING, SLOW = 1.0, 60.0
"""Seconds: that leaving waits for a search, and after which one that goes on is told of."""
SearchResult = tuple[Passage, ...] | RetrievalError


@dataclass(slots=True)
class SearchCounts:
    """What the pool did since `take_counts` was last called."""

    queries: int = 0
    unique: int = 0
    """Queries that reached the retriever: one that was answered since the counts were taken is not sent again."""
    calls: int = 0
    errors: int = 0
    seconds: float = 0.0
    last_error: str = ""


class SearchPool:
    """Sends batches of queries to a retriever, one call at a time, off the main thread.

    Args:
        retriever: anything with `search(queries, k)`.
        top_k: passages per query.
    """

    def __init__(self, retriever: Retriever, top_k: int) -> None:
        self._retriever, self._top_k = retriever, top_k
        self._jobs: SimpleQueue[tuple[Future[list[SearchResult]], list[str]] | None] = SimpleQueue()
        # Not an executor, whose threads the interpreter waits for: a search that hangs would keep a process alive.
        self._worker = threading.Thread(target=self._work, name="search", daemon=True)
        self._worker.start()
        self._is_closed = False
        self._counts = SearchCounts()
        self._answered: dict[str, SearchResult] = {}  # of one window: siblings ask the same things at different times

    def submit(self, queries: Sequence[str]) -> Future[list[SearchResult]]:
        """Search in the background; the future holds one result per query, same order, and never raises."""
        if self._is_closed:
            raise RuntimeError("a search after shutdown of its pool")
        answer: Future[list[SearchResult]] = Future()
        self._jobs.put((answer, list(queries)))
        return answer

    def take_counts(self) -> SearchCounts:
        """Counts since the last call; answers are forgotten. Call it while no search is under way."""
        counts, self._counts = self._counts, SearchCounts()
        self._answered.clear()
        return counts

    def close(self) -> None:
        """Stop the worker; one that is in a search is waited for no longer than `LEAVING` seconds, then left behind."""
        self._is_closed = True
        self._jobs.put(None)
        self._worker.join(LEAVING)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            answer, queries = job
            try:
                answer.set_result(self._search(queries))
            except BaseException as error:  # of this class itself: whoever waits is told
                answer.set_exception(error)

    def _search(self, queries: list[str]) -> list[SearchResult]:
        started = time.perf_counter()
        unknown = [query for query in dict.fromkeys(queries) if query not in self._answered]
        found = self._answered | dict(zip(unknown, self._call(unknown), strict=True))
        results = [found[query] for query in queries]
        # A failed search may succeed the next time.
        self._answered |= {query: found[query] for query in unknown if not isinstance(found[query], RetrievalError)}
        self._counts.queries += len(queries)
        self._counts.unique += len(unknown)
        self._counts.errors += sum(isinstance(result, RetrievalError) for result in results)
        self._counts.seconds += time.perf_counter() - started
        return results

    @contextmanager
    def _watched(self, num_queries: int) -> Iterator[None]:
        """Say every `SLOW` seconds that a search has not come back."""
        done, name, started = threading.Event(), type(self._retriever).__name__, time.monotonic()

        def watch() -> None:
            while not done.wait(SLOW):
                waited = time.monotonic() - started
                print(
                    f"{name} has not answered {num_queries} queries for {waited:.0f} s. The run goes on once it does; "
                    "Ctrl-C twice ends it.",
                    file=sys.stderr,
                    flush=True,
                )

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _call(self, queries: list[str]) -> list[SearchResult]:
        """One batched call; where it fails, one call per query, so that a poisonous query fails alone.

        A retriever that is unavailable as a whole is not asked again: every query would wait for it in turn.
        """
        if not queries:
            return []
        self._counts.calls += 1
        try:
            with self._watched(len(queries)):
                found = self._retriever.search(queries, self._top_k)
            return [tuple(passages) for passages in as_passages(found, len(queries), self._top_k)]
        except RetrieverUnavailableError as error:
            self._counts.last_error = f"{type(error).__name__}: {error} (a batch of {len(queries)} queries)"
            return [RetrieverUnavailableError(self._counts.last_error)] * len(queries)
        except Exception as error:
            if len(queries) > 1:
                return [result for query in queries for result in self._call([query])]
            self._counts.last_error = f"{type(error).__name__}: {error} (query {queries[0]!r})"
            return [RetrievalError(self._counts.last_error)]
