"""The boundary to the retriever: batched, without duplicates, and nothing that it raises gets through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from helpers.passages import PASSAGES, ToyRetriever
from sdsearch_lightning.errors import RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.rollout import SearchPool, search_pool
from sdsearch_lightning.types import Passage


class Answers:
    """A retriever that returns whatever `answer(queries, k)` does."""

    def __init__(self, answer: Callable[[Sequence[str], int], Any]) -> None:
        self.search = answer


def test_results_come_in_the_order_of_the_queries(retriever: ToyRetriever) -> None:
    pool = SearchPool(retriever, 2)
    results = pool.submit(["river of Rome", "capital of France", "river of Rome"]).result()
    ids = [[passage.id for passage in result] for result in results]  # type: ignore[union-attr]
    assert [found[0] for found in ids] == ["5", "0", "5"] and ids[0] == ids[2]
    assert all(len(found) == 2 for found in ids)


def test_duplicates_are_searched_once(retriever: ToyRetriever) -> None:
    pool = SearchPool(retriever, 2)
    pool.submit(["b", "a", "b", "b"]).result()
    assert retriever.calls == [["b", "a"]]
    counts = pool.take_counts()
    assert (counts.queries, counts.unique, counts.calls, counts.errors) == (4, 2, 1, 0)
    assert counts.seconds > 0
    assert pool.take_counts().queries == 0


def test_nothing_asked_is_no_call(retriever: ToyRetriever) -> None:
    pool = SearchPool(retriever, 2)
    assert pool.submit([]).result() == [] and retriever.calls == []


def test_more_passages_than_there_are(retriever: ToyRetriever) -> None:
    (found,) = SearchPool(ToyRetriever(PASSAGES[:2]), 5).submit(["Rome"]).result()
    assert [passage.id for passage in found] == ["1", "0"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda queries, k: 1 / 0, "ZeroDivisionError: division by zero (query 'a')"),
        (lambda queries, k: [], "found 0 lists of length [] (query 'a')"),
        (lambda queries, k: [PASSAGES[:1]] * 9, "found 9 lists of length"),
        (lambda queries, k: [PASSAGES] * len(queries), "found 1 lists of length [6]"),
        (lambda queries, k: None, "found NoneType None"),
        (lambda queries, k: [["text"] for _ in queries], "found in place of one str 'text'"),
        (lambda queries, k: {query: [] for query in queries}, "found dict"),
        (lambda queries, k: PASSAGES[: len(queries)], "found tuple (Passage("),
    ],
    ids=["raises", "too few", "too many", "more than k", "none", "no passages", "dict", "not nested"],
)
def test_a_broken_retriever_gives_errors_as_data(answer: Callable[[Sequence[str], int], Any], message: str) -> None:
    pool = SearchPool(Answers(answer), 2)  # type: ignore[arg-type]
    results = pool.submit(["a", "b", "a"]).result()
    assert all(isinstance(result, RetrievalError) for result in results)
    assert message in str(results[0]) and results[0] is results[2]
    counts = pool.take_counts()
    assert (counts.queries, counts.unique, counts.errors) == (3, 2, 3)
    assert counts.last_error == str(results[1])


def test_a_poisonous_query_fails_alone() -> None:
    def fail(queries: Sequence[str]) -> None:
        if "poison" in queries:
            raise ValueError("cannot search that")

    retriever = ToyRetriever(fail=fail)
    pool = SearchPool(retriever, 1)
    results = pool.submit(["Rome", "poison", "Seine"]).result()
    assert [isinstance(result, RetrievalError) for result in results] == [False, True, False]
    assert "ValueError: cannot search that (query 'poison')" in str(results[1])
    assert retriever.calls == [["Rome", "poison", "Seine"], ["Rome"], ["poison"], ["Seine"]]
    assert pool.take_counts().errors == 1


def test_an_unavailable_retriever_is_asked_once_per_batch() -> None:
    """Splitting would wait for it once per query."""

    def fail(queries: Sequence[str]) -> None:
        raise RetrieverUnavailableError("nobody answers at http://127.0.0.1:1")

    retriever = ToyRetriever(fail=fail)
    pool = SearchPool(retriever, 1)
    results = pool.submit(["Rome", "Seine", "Rome"]).result()
    assert retriever.calls == [["Rome", "Seine"]]
    assert [type(result) for result in results] == [RetrieverUnavailableError] * 3
    expected = "RetrieverUnavailableError: nobody answers at http://127.0.0.1:1 (a batch of 2 queries)"
    counts = pool.take_counts()
    assert (counts.calls, counts.errors, counts.last_error, str(results[0])) == (1, 3, expected, expected)
    retriever.fail = lambda queries: None  # what failed is not remembered
    assert isinstance(pool.submit(["Rome"]).result()[0], tuple)


def test_objects_that_look_like_passages_are_taken() -> None:
    class Hit:
        id, contents, score = "7", "T\nx", 0.5

    pool = SearchPool(Answers(lambda queries, k: [[Hit()] for _ in queries]), 1)  # type: ignore[arg-type]
    assert pool.submit(["a"]).result() == [(Passage("7", "T\nx", 0.5),)]


def test_one_worker_thread_off_the_main_one_and_never_two_calls_at_once() -> None:
    threads, running = set(), threading.Semaphore(1)

    def answer(queries: Sequence[str], k: int) -> list[list[Passage]]:
        assert running.acquire(blocking=False), "called concurrently"
        threads.add(threading.get_ident())
        running.release()
        return [[] for _ in queries]

    pool = SearchPool(Answers(answer), 1)  # type: ignore[arg-type]
    futures = [pool.submit([str(i)]) for i in range(20)]
    assert [future.result() for future in futures] == [[()]] * 20
    assert len(threads) == 1 and threading.get_ident() not in threads
    pool.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(["late"])


def test_a_search_that_hangs_is_told_of_and_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for it: neither closing, nor the end of the process."""
    monkeypatch.setattr(search_pool, "SLOW", 0.02)
    monkeypatch.setattr(search_pool, "LEAVING", 0.1)
    asked, release = threading.Event(), threading.Event()

    def answer(queries: Sequence[str], k: int) -> list[list[Passage]]:
        asked.set()
        release.wait(30)
        return [[] for _ in queries]

    pool = SearchPool(Answers(answer), 1)  # type: ignore[arg-type]
    future = pool.submit(["a", "b"])
    assert asked.wait(5)
    time.sleep(0.1)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 2 and not future.done()
    assert "Answers has not answered 2 queries for 0 s. The run goes on once it does" in capsys.readouterr().err
    assert pool._worker.is_alive() and pool._worker.daemon
    release.set()
    assert future.result(5) == [(), ()]


def test_a_quick_search_is_not_told_of(capsys: pytest.CaptureFixture[str], retriever: ToyRetriever) -> None:
    pool, before = SearchPool(retriever, 1), threading.active_count()
    for word in ("Rome", "Paris", "Italy"):
        pool.submit([word]).result()
    pool.close()
    assert capsys.readouterr().err == "" and threading.active_count() <= before
