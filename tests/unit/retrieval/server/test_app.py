"""The protocol, as its clients use it. Each client here does what the project of that name does, bugs included."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fastapi import FastAPI

from helpers.passages import PASSAGES, ToyRetriever
from helpers.servers import GatedRetriever, post, send, toy_app
from sdsearch_lightning.types import Passage

QUERIES = ["river of Rome", "capital of France", "Italy"]


class Answers:
    """Returns the same passages for every query."""

    def __init__(self, *passages: Passage) -> None:
        self.passages = list(passages)

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        return [self.passages[:k] for _ in queries]


def ids(result: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[hit.get("document", hit)["id"] for hit in hits] for hits in result]


def expected(queries: list[str], k: int) -> list[list[str]]:
    return [[passage.id for passage in hits] for hits in ToyRetriever().search(queries, k)]


@pytest.fixture
def app() -> FastAPI:
    return toy_app()


# Other people's clients


@pytest.mark.parametrize("num_queries", [0, 1, 2, 3])
def test_search_r1(app: FastAPI, num_queries: int) -> None:
    """It posts even an empty list, looks at no status, and reads document.contents."""
    payload = {"queries": QUERIES[:num_queries], "topk": 2, "return_scores": True}
    result = post(app, payload).json()["result"]
    texts = [[hit["document"]["contents"] for hit in hits] for hits in result]
    assert texts == [[p.contents for p in hits] for hits in ToyRetriever().search(QUERIES[:num_queries], 2)]
    assert all(isinstance(hit["score"], float) for hits in result for hit in hits)


def test_verl(app: FastAPI) -> None:
    """Its payload says everything; it needs status 200 and a list under "result"."""
    response = post(app, {"queries": QUERIES, "topk": 3, "return_scores": True})
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    assert ids(response.json()["result"]) == expected(QUERIES, 3)


def test_skyrl(app: FastAPI) -> None:
    """It sends one string as "query", and reads the first list."""
    result = post(app, {"query": QUERIES[0], "topk": 2, "return_scores": True}).json()["result"]
    assert ids(result) == expected(QUERIES[:1], 2) and len(result) == 1


@pytest.mark.parametrize("num_queries", [0, 1, 2, 3])
def test_slime(app: FastAPI, num_queries: int) -> None:
    """It wants no scores and reads `contents` of the rows themselves; the stock servers fail, or mix up two queries."""
    result = post(app, {"queries": QUERIES[:num_queries], "topk": 2, "return_scores": False}).json()["result"]
    assert [[hit["contents"].split("\n")[0] for hit in hits] for hits in result] == [
        [p.title for p in hits] for hits in ToyRetriever().search(QUERIES[:num_queries], 2)
    ]
    assert all("document" not in hit and "score" not in hit for hits in result for hit in hits)


def test_clients_of_the_online_servers(app: FastAPI) -> None:
    """They send the queries and nothing else."""
    assert ids(post(app, {"queries": QUERIES}).json()["result"]) == expected(QUERIES, 3)


def test_clients_of_the_rerank_server(app: FastAPI) -> None:
    """What is not known is not read."""
    body = {"queries": QUERIES[:1], "topk_retrieval": 10, "topk_rerank": 1, "return_scores": True}
    assert ids(post(app, body).json()["result"]) == expected(QUERIES[:1], 3)


# What is asked


@pytest.mark.parametrize(("topk", "k"), [(None, 3), (0, 3), (1, 1), (2.0, 2), ("2", 2), (1000, 6)])
def test_topk(app: FastAPI, topk: float | str | None, k: int) -> None:
    """More than the corpus has gives what it has, none twice."""
    (hits,) = ids(post(app, {"queries": ["Paris"], "topk": topk}).json()["result"])
    assert len(hits) == len(set(hits)) == k


@pytest.mark.parametrize(
    ("given", "has_scores"), [(1, True), ("true", True), ("True", True), (0, False), ("false", False), (None, False)]
)
def test_return_scores_as_search_r1s_server_reads_it(app: FastAPI, given: Any, has_scores: bool) -> None:
    ((hit, *_),) = post(app, {"queries": ["Paris"], "return_scores": given}).json()["result"]
    assert ("score" in hit) == has_scores


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": ["a"], "topk": -1}, 422, "topk: expected 0 (the default, 3) to 1000, found -1"),
        ({"queries": ["a"], "topk": 1001}, 422, "found 1001"),
        ({"queries": ["a"], "topk": True}, 422, "topk: expected a whole number or null, found True"),
        ({"queries": ["a"], "topk": 1.5}, 422, "found 1.5"),
        ({"queries": ["a"], "topk": "three"}, 422, "found 'three'"),
        ({"queries": ["a"], "topk": "1001"}, 422, "found 1001"),
        ({"queries": ["a"], "topk": "9" * 5000}, 422, "found '9"),
        ({"queries": ["a"], "return_scores": 2}, 422, "return_scores: expected true or false, found 2"),
        ({"queries": ["a"], "return_scores": "yes?"}, 422, "return_scores: expected true or false, found 'yes?'"),
        ({"queries": "a"}, 422, "queries: expected a list of strings, found 'a'"),
        ({"queries": ["a", None]}, 422, "found at 1 None"),
        ({"queries": [["a"]]}, 422, "found at 0 a list of 1"),
        ({"query": ["a"]}, 422, "found at 0 a list of 1"),
        ({"queries": ["a"], "query": "a"}, 422, "found both"),
        ({"topk": 3}, 422, "found neither"),
        (["a"], 400, "expected a JSON object with the key 'queries', found a list of 1"),
        (
            {"queries": ["a"] * 200, "topk": 1000},
            413,
            "16384 (max_request_passages), found 200 x 1000 = 200000.",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(app: FastAPI, body: Any, status: int, message: str) -> None:
    response = post(app, body)
    error = response.json()["error"]
    assert response.status_code == error["status"] == status and message in error["message"]


def test_a_lone_surrogate_is_refused_before_the_retriever_sees_it() -> None:
    retriever = ToyRetriever()
    response = send(toy_app(retriever), "POST", "/retrieve", content=b'{"queries": ["fine", "\\ud800"]}')
    assert response.status_code == 422 and "lone surrogate at 1" in response.text
    assert retriever.calls == []


def test_other_verbs_and_paths(app: FastAPI) -> None:
    for method, path, status in [("GET", "/retrieve", 405), ("POST", "/health", 405), ("GET", "/docs", 404)]:
        response = send(app, method, path)
        assert response.status_code == response.json()["error"]["status"] == status


# What is answered


def test_the_document_is_the_row_of_the_corpus() -> None:
    passage = Passage("7", '"T"\nx', 0.5, {"url": "u", "tags": ["a"], "id": "never", "when": PASSAGES[0]})
    ((hit,),) = post(toy_app(Answers(passage)), {"queries": ["q"], "return_scores": True}).json()["result"]
    row = {"id": "7", "contents": '"T"\nx', "url": "u", "tags": ["a"], "when": str(PASSAGES[0])}
    assert hit == {"document": row, "score": 0.5} and list(hit["document"])[:2] == ["id", "contents"]


def test_what_json_cannot_say_is_null_and_the_rest_is_ascii() -> None:
    passages = [
        Passage(str(i), "\ud800 ü", score, {"x": [score]}) for i, score in enumerate((math.nan, -math.inf, 1.0))
    ]
    response = post(toy_app(Answers(*passages)), {"queries": ["q"], "return_scores": True})
    assert response.content.isascii()
    (hits,) = json.loads(response.content, parse_constant=lambda name: pytest.fail(name))["result"]
    assert [hit["score"] for hit in hits] == [hit["document"]["x"][0] for hit in hits] == [None, None, 1.0]
    assert hits[0]["document"]["contents"] == "� ü"


def test_a_large_answer_is_complete(app: FastAPI) -> None:
    queries = [f"{PASSAGES[i % 6].text} {i}" for i in range(300)]
    assert ids(post(app, {"queries": queries, "topk": 2}).json()["result"]) == expected(queries, 2)


# What else is asked


def test_health_answers_while_the_retriever_is_busy() -> None:
    class Sized(GatedRetriever):
        def __len__(self) -> int:
            return 6

    retriever = Sized()
    app = toy_app(retriever)
    health = send(app, "GET", "/health").json()
    assert health["uptime_seconds"] >= 0 and health["version"]
    assert {key: health[key] for key in ("status", "retriever", "passages", "top_k")} == {
        "status": "ok",
        "retriever": "Sized",
        "passages": 6,
        "top_k": 3,
    }
    assert send(toy_app(), "GET", "/health").json()["passages"] is None


def test_metrics_count_what_was_done(app: FastAPI) -> None:
    assert send(app, "GET", "/metrics").json()["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    post(app, {"queries": ["a", "b", "a"]})
    post(app, {"queries": ["a"]})
    post(app, {"queries": []})
    post(app, {"queries": [1]})
    send(app, "GET", "/nowhere")
    found = send(app, "GET", "/metrics").json()
    latency = found.pop("latency_ms")
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"] < 1e4
    assert found.pop("uptime_seconds") > 0
    assert found == {
        "requests": 4,
        "errors": {"404": 1, "422": 1},
        "queries": 4,
        "unique_queries": 3,
        "batches": 2,
        "failed_batches": 0,
        "batch_size_mean": 1.5,
        "queued_queries": 0,
    }
