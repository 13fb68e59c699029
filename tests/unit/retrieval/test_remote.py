"""The client: what it sends, how long it is patient, and that a retry changes nothing but time."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from helpers.network import Network, Step, toy_answer
from helpers.passages import PASSAGES, ToyRetriever
from sdsearch_lightning.errors import ConfigError, RetrievalError, RetrieverUnavailableError
from sdsearch_lightning.retrieval import check_retriever, remote
from sdsearch_lightning.retrieval.remote import RemoteRetriever

URL = "http://127.0.0.1:8000/retrieve"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda *arguments: network.handle(*arguments))
    monkeypatch.setattr(remote, "time", network)
    return network


@pytest.fixture
def longest_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longest:
        def uniform(self, low: float, high: float) -> float:
            assert low == 0.0, "full jitter"
            return high

    monkeypatch.setattr(remote, "_JITTER", Longest())


def found_ids(retriever: RemoteRetriever, queries: Sequence[str] = ("Rome",), k: int = 2) -> list[list[str]]:
    return [[passage.id for passage in hits] for hits in retriever.search(queries, k)]


EXPECTED = [[passage.id for passage in hits] for hits in ToyRetriever().search(["Rome"], 2)]


# What is sent


def test_what_every_server_understands_is_sent(network: Network) -> None:
    RemoteRetriever(URL, token="s3cret").search(["\ud800 日本"], 5)
    (request,) = network.requests
    assert (request.method, str(request.url)) == ("POST", URL)
    assert request.content.isascii()
    assert json.loads(request.content) == {"queries": ["\ud800 日本"], "topk": 5, "return_scores": True}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == "Bearer s3cret"
    RemoteRetriever(URL).search(["a"], 1)
    assert "authorization" not in network.requests[1].headers


def test_many_queries_are_several_requests_in_order(network: Network) -> None:
    retriever = RemoteRetriever(max_queries_per_request=2)
    queries = [passage.text for passage in PASSAGES[:5]]
    assert retriever.search(queries, 1) == [
        [p.__class__(p.id, p.contents, 0.5) for p in hits] for hits in ToyRetriever().search(queries, 1)
    ]
    assert [json.loads(request.content)["queries"] for request in network.requests] == [
        queries[:2],
        queries[2:4],
        queries[4:],
    ]
    assert retriever.search([], 3) == [] and len(network.requests) == 3


def test_it_keeps_the_contract(network: Network) -> None:
    check_retriever(RemoteRetriever(), 3)


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("http://server:9000", "http://server:9000/retrieve"),
        ("https://server/", "https://server/retrieve"),
        ("http://[::1]:8000/search/v1", "http://[::1]:8000/search/v1"),
    ],
)
def test_a_url_without_a_path_means_retrieve(url: str, used: str) -> None:
    assert RemoteRetriever(url).url == used


# Patience


def test_what_passes_is_tried_again(network: Network) -> None:
    """A restart and an overload, in one request; 500 and the others are counted apart."""
    request = httpx.Request("POST", URL)
    network.script = iter(
        [
            httpx.ConnectError("refused"),
            httpx.RemoteProtocolError("closed", request=request),
            httpx.ReadTimeout("late", request=request),
            *(408, 429, 502, 503, 504, 500, 503, 500),
        ]
    )
    retriever = RemoteRetriever()
    assert found_ids(retriever) == EXPECTED
    assert len(network.requests) == 12 and len(network.slept) == 11
    assert len({request.content for request in network.requests}) == 1


def test_waits_grow_up_to_a_bound_and_end_with_patience(network: Network, longest_waits: None) -> None:
    network.script = iter([httpx.ConnectError("refused")] * 99)
    with pytest.raises(RetrieverUnavailableError) as raised:
        RemoteRetriever(patience=40.0).search(["a", "b"], 1)
    assert network.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 7.3])
    assert f"{URL}: no answer in 40 s and 11 tries, at last ConnectError: refused" in str(raised.value)
    assert isinstance(pickle.loads(pickle.dumps(raised.value)), RetrieverUnavailableError)


def test_the_jitter_is_full(network: Network) -> None:
    network.script = iter([503] * 200)
    with pytest.raises(RetrieverUnavailableError):
        RemoteRetriever(patience=300.0).search(["a"], 1)
    late = network.slept[7:-1]
    assert min(late) < 4.0 and max(late) > 6.0 and all(0 <= wait <= 10 for wait in late)


def test_no_patience_is_one_try(network: Network) -> None:
    network.script = iter([503])
    with pytest.raises(RetrieverUnavailableError, match="503 Service Unavailable: says 503"):
        RemoteRetriever(patience=0).search(["a"], 1)
    assert network.slept == []


@pytest.mark.parametrize(
    ("header", "expected"),
    [("7", 7.1), ("0", 0.1), ("soon", 0.1), ("-5", 0.1), ("inf", 0.1), ("", 0.1), ("99999999999999999999", 60.0)],
)
def test_retry_after_is_honoured_within_patience(
    network: Network, longest_waits: None, header: str, expected: float
) -> None:
    network.script = iter([httpx.Response(429, headers={"Retry-After": header})])
    assert found_ids(RemoteRetriever(patience=60.0)) == EXPECTED
    assert network.slept == pytest.approx([expected])


def test_retry_after_may_be_a_date(network: Network, longest_waits: None) -> None:
    moments = [datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (20, -20)]
    network.script = iter(
        [httpx.Response(503, headers={"Retry-After": format_datetime(m, usegmt=True)}) for m in moments]
    )
    assert found_ids(RemoteRetriever()) == EXPECTED
    assert 15 < network.slept[0] < 21 and network.slept[1] < 1


def test_patience_begins_anew_with_every_request(network: Network, longest_waits: None) -> None:
    steps: list[Step] = [503] * 8
    network.script = iter([*steps, toy_answer(httpx.Request("POST", URL, json={"queries": ["a"], "topk": 1})), *steps])
    RemoteRetriever(patience=25.0, max_queries_per_request=1).search(["a", "b"], 1)
    assert sum(network.slept) > 40


def test_500_may_be_the_query_and_is_tried_three_times(network: Network) -> None:
    network.script = iter([500] * 3)
    with pytest.raises(RetrievalError, match=r"expected 200, found 500 .*says 500 \(3 tries\)") as raised:
        RemoteRetriever().search(["a"], 1)
    assert type(raised.value) is RetrievalError and len(network.requests) == 3 and sum(network.slept) < 1
    network.script = iter([500, 500])
    assert found_ids(RemoteRetriever()) == EXPECTED


@pytest.mark.parametrize("status", [201, 204, 301, 307, 400, 401, 403, 404, 405, 413, 422, 501])
def test_what_cannot_pass_is_not_tried_again(network: Network, status: int) -> None:
    headers = {"Location": "http://elsewhere/retrieve"} if status in (301, 307) else {}
    network.script = iter([httpx.Response(status, headers=headers)])
    with pytest.raises(RetrievalError, match=f"expected 200, found {status}") as raised:
        RemoteRetriever(token="s3cret").search(["a"], 1)
    assert not isinstance(raised.value, RetrieverUnavailableError)
    assert len(network.requests) == 1, "a redirect would carry the token elsewhere"
    assert ("elsewhere" in str(raised.value)) == bool(headers) and "s3cret" not in str(raised.value)


def test_a_body_that_cannot_be_unpacked(network: Network) -> None:
    network.answer = lambda request: httpx.Response(
        200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip")
    )
    with pytest.raises(RetrievalError, match="DecodingError"):
        RemoteRetriever().search(["a"], 1)


def test_a_retry_leaves_seeded_randomness_alone(network: Network) -> None:
    random.seed(0)
    before = random.getstate()
    network.script = iter([503] * 20)
    RemoteRetriever().search(["a"], 1)
    assert random.getstate() == before and len(set(network.slept)) == 20


# The beginning and the end


def test_prepare_waits_for_the_server(network: Network) -> None:
    network.script = iter([httpx.ConnectError("refused")] * 5)
    RemoteRetriever().prepare()
    assert len(network.requests) == 6


@pytest.mark.parametrize(("step", "tries"), [(httpx.ConnectError("refused"), None), (401, 1), (404, 1)])
def test_prepare_says_what_is_wrong_and_how_to_start(network: Network, step: Step, tries: int | None) -> None:
    network.script = iter([step] * 99)
    with pytest.raises(ConfigError) as raised:
        RemoteRetriever(patience=30.0).prepare()
    last = "ConnectError: refused" if tries is None else f"says {step}"
    assert all(part in str(raised.value) for part in (URL, last, "sdsearch serve"))
    assert tries in (None, len(network.requests))


def test_closed_and_opened_again(network: Network) -> None:
    retriever = RemoteRetriever()
    retriever.close()
    for _ in range(2):
        assert found_ids(retriever) == EXPECTED
        client = retriever._client
        retriever.close()
        assert client is not None and client.is_closed


def test_a_copy_in_another_process_opens_its_own_connections(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = RemoteRetriever(token="s3cret")
    retriever.search(["a"], 1)
    sent = pickle.loads(pickle.dumps(retriever))
    assert sent._client is None and found_ids(sent) == EXPECTED
    assert network.requests[-1].headers["authorization"] == "Bearer s3cret"
    parents = retriever._client
    monkeypatch.setattr(remote.os, "getpid", lambda: -1)  # as after a fork
    assert found_ids(retriever) == EXPECTED and retriever._client is not parents
    retriever._client, childs = parents, retriever._client
    retriever._client_process = 0
    retriever.close()
    assert childs is not None and parents is not None and not parents.is_closed, (
        "closing it would end the parent's connection"
    )
    parents.close()
    childs.close()


@pytest.mark.parametrize(
    ("url", "is_proxied"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://localhost:8000", False),
        ("http://[::1]:8000", False),
        ("http://retrieval.lab:8000", True),
        ("http://skipped.lab:8000", False),
    ],
)
def test_this_machine_is_not_asked_through_a_proxy(
    network: Network, monkeypatch: pytest.MonkeyPatch, url: str, is_proxied: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.lab:3128")
    monkeypatch.setenv("http_proxy", "http://proxy.lab:3128")
    monkeypatch.setenv("NO_PROXY", "skipped.lab")
    monkeypatch.setenv("no_proxy", "skipped.lab")
    RemoteRetriever(url).search(["a"], 1)
    assert ("Proxy" in type(network.transports[0]._pool).__name__) == is_proxied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000/retrieve"}, "url has the scheme"),
        ({"url": "ftp://server/retrieve"}, "scheme 'ftp'"),
        ({"url": "http:///retrieve"}, "the host ''"),
        ({"url": "http://me:s3cret@server"}, "a password: expected one such as"),
        ({"url": "http://server:port"}, "expected one such as http://127.0.0.1:8000/retrieve"),
        ({"timeout": 0}, "expected timeout > 0 s"),
        ({"patience": -1}, "expected timeout > 0 s"),
        ({"patience": float("nan")}, "expected timeout > 0 s"),
        ({"max_queries_per_request": 0}, "max_queries_per_request >= 1"),
        ({"token": "two words"}, "token: expected"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        RemoteRetriever(**options)
    assert "s3cret" not in str(raised.value)
