"""One thread for all clients: one call for what waits together, no duplicates, and nobody fails for another."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from helpers.passages import PASSAGES, ToyRetriever
from helpers.servers import GatedRetriever, connect, post, toy_app
from sdsearch_lightning.errors import RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval.server.batching import Batcher
from sdsearch_lightning.types import Passage


def gated(**options: int) -> tuple[Batcher, GatedRetriever, Any]:
    """A batcher whose thread is inside a first call, so that what is submitted now waits together."""
    retriever = GatedRetriever()
    batcher = Batcher(retriever, **({"max_batch": 100, "max_queued": 100, "max_passages": 1000} | options))  # type: ignore[arg-type]
    first = batcher.submit(["first"], 1)
    assert retriever.entered.wait(10)
    return batcher, retriever, first


def test_what_waits_is_one_call_with_the_largest_k_and_each_gets_its_own_k() -> None:
    batcher, retriever, _ = gated()
    asked = [(["Rome", "Seine"], 2), (["Seine", "Tiber", "Seine"], 4), (["Rome"], 1)]
    futures = [batcher.submit(queries, k) for queries, k in asked]
    assert batcher.num_waiting == 6
    retriever.gate.set()
    answers = [future.result(10) for future in futures]
    assert retriever.calls == [["first"], ["Rome", "Seine", "Tiber"]] and retriever.ks == [1, 4]
    assert answers == [ToyRetriever().search(queries, k) for queries, k in asked]
    counts = batcher.counts()
    assert (counts.batches, counts.queries, counts.unique_queries, counts.failed_batches) == (2, 7, 4, 0)
    assert batcher.num_waiting == 0


def test_a_batch_has_an_end_and_requests_stay_whole() -> None:
    batcher, retriever, _ = gated(max_batch=3)
    futures = [batcher.submit(list(queries), 1) for queries in ("ab", "c", "d", "efghi", "j")]
    retriever.gate.set()
    assert [len(future.result(10)) for future in futures] == [2, 1, 1, 5, 1]
    assert retriever.calls[1:] == [["a", "b", "c"], ["d"], ["e", "f", "g", "h", "i"], ["j"]]


def test_a_batch_is_bounded_by_its_passages_too() -> None:
    """All of a batch are searched with the largest k: one query with many passages must not meet many with few."""
    batcher, retriever, _ = gated(max_passages=12)
    asked = [(["a"], 5), (["b"], 1), (["c"], 1), (["d", "e", "f"], 2), (["g", "h"], 2), (["i"] * 13, 1)]
    futures = [batcher.submit(queries, k) for queries, k in asked]
    retriever.gate.set()
    assert [len(future.result(10)) for future in futures] == [1, 1, 1, 3, 2, 13]
    assert retriever.calls[1:] == [["a", "b"], ["c", "d", "e", "f", "g", "h"], ["i"]]


def test_requests_are_let_in_until_the_queue_is_full() -> None:
    batcher, retriever, _ = gated(max_queued=2)
    batcher.submit(["a"], 1)
    last = batcher.submit(["b", "c", "d"], 1)
    with pytest.raises(queue.Full):
        batcher.submit(["e"], 1)
    batcher.forget(last)
    batcher.submit(["e"], 1).add_done_callback(lambda _: None)
    retriever.gate.set()
    batcher.close(10)
    assert retriever.calls == [["first"], ["a", "e"]] and last.cancelled()


@pytest.mark.parametrize("error", [ValueError("cannot search that"), SystemExit(1)])
def test_a_poisonous_request_fails_alone(error: BaseException) -> None:
    class Poisoned(GatedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            found = super().search(queries, k)
            if "poison" in queries:
                raise error
            return found

    retriever = Poisoned()
    batcher = Batcher(retriever, 100, 100, 1000)
    first = batcher.submit(["first"], 1)
    assert retriever.entered.wait(10)
    futures = [batcher.submit([query], 1) for query in ("Rome", "poison", "Seine")]
    retriever.gate.set()
    assert [len(future.result(10)) for future in (first, futures[0], futures[2])] == [1, 1, 1]
    with pytest.raises(RetrievalError, match=type(error).__name__):
        futures[1].result(10)
    assert retriever.calls[1:] == [["Rome", "poison", "Seine"], ["Rome"], ["poison"], ["Seine"]]
    assert batcher.counts().failed_batches == 2
    assert batcher.submit(["Rome"], 1).result(10)  # the thread lives


def test_an_unavailable_retriever_is_not_asked_again_for_each_request() -> None:
    def fail(queries: Sequence[str]) -> None:
        if "first" not in queries:
            raise RetrieverUnavailableError("gone")

    batcher, retriever, _ = gated()
    retriever.fail = fail
    futures = [batcher.submit([query], 1) for query in "ab"]
    retriever.gate.set()
    for future in futures:
        with pytest.raises(RetrieverUnavailableError, match="gone"):
            future.result(10)
    assert retriever.calls == [["first"], ["a", "b"]]


def test_the_wait_is_estimated_from_the_pace() -> None:
    batcher, retriever, first = gated()
    assert batcher.seconds_to_wait() == 1  # nothing is known yet
    retriever.gate.set()
    first.result(10)
    batcher._recent.extend([(10, 5.0), (30, 15.0)] * 40)  # half a second per query; the first call is long forgotten
    retriever.gate.clear()
    retriever.entered.clear()
    batcher.submit(["running"], 1)
    assert retriever.entered.wait(10)
    for expected, num_queries in [(5, 10), (10, 10), (60, 99_999)]:
        batcher._max_queued = 10**6
        batcher.submit(["x"] * num_queries, 1)
        assert batcher.seconds_to_wait() == expected
    assert len(batcher._recent) == 64  # and does not grow
    retriever.gate.set()


def test_closing_answers_what_waits_and_takes_nothing_more() -> None:
    batcher, retriever, first = gated()
    second = batcher.submit(["a"], 1)
    closing = threading.Thread(target=batcher.close, args=(10,))
    closing.start()
    retriever.gate.set()
    closing.join(10)
    assert first.result(0) and second.result(0)
    with pytest.raises(RetrieverUnavailableError, match="shutting down"):
        batcher.submit(["b"], 1)
    Batcher(retriever, 1, 1, 1).close()  # one that was never used


# Through HTTP


def test_many_clients_share_calls_and_get_their_own_answers() -> None:
    """`GatedRetriever` fails if it is called concurrently."""
    retriever = GatedRetriever()
    asked = [([PASSAGES[i % 6].text, f"{PASSAGES[i % 3].text} {i}"], 1 + i % 5) for i in range(60)]

    async def go() -> list[httpx.Response]:
        async with connect(toy_app(retriever)) as client:
            tasks: list[asyncio.Task[httpx.Response]] = []
            for queries, k in asked:
                tasks.append(asyncio.create_task(client.post("/retrieve", json={"queries": queries, "topk": k})))
                await asyncio.to_thread(retriever.entered.wait, 10)  # only the first one finds the thread idle
            while (await client.get("/metrics")).json()["queued_queries"] < 118:
                await asyncio.sleep(0.01)
            retriever.gate.set()
            return await asyncio.gather(*tasks)

    for (queries, k), response in zip(asked, asyncio.run(go()), strict=True):
        found = [[hit["id"] for hit in hits] for hits in response.json()["result"]]
        assert found == [[passage.id for passage in hits] for hits in ToyRetriever().search(queries, k)]
    assert [len(call) for call in retriever.calls] == [2, 6 + 59]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("\ud800 " + "x" * 9999), 500, "the retriever failed: ValueError: "),
        (RetrieverUnavailableError("the index is elsewhere"), 503, "the index is elsewhere"),
    ],
)
def test_failures_of_the_retriever_are_json(error: Exception, status: int, message: str) -> None:
    def fail(queries: Sequence[str]) -> None:
        raise error

    response = post(toy_app(ToyRetriever(fail=fail)), {"queries": ["a"]})
    assert response.status_code == response.json()["error"]["status"] == status
    assert message in response.json()["error"]["message"] and len(response.content) < 2000
    assert ("retry-after" in response.headers) == (status == 503)


def test_a_retriever_that_breaks_the_contract_is_a_failure() -> None:
    class Broken:
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            return [list(PASSAGES)] * 2

    response = post(toy_app(Broken()), {"queries": ["a"]})
    assert response.status_code == 500 and "expected a list of 1 lists" in response.json()["error"]["message"]
