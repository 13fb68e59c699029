"""Everybody's servers, as they answer: each form gives the same passages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.retrieval.remote_answers import read_answer
from sdsearch_lightning.types import Passage

PARIS, ROME = '"Paris"\nParis is the capital of France .', '"Rome"\nRome is the capital of Italy .'
BM25 = {"title": "Paris", "text": "Paris is the capital of France .", "contents": PARIS}


def read(result: Any, num_queries: int = 1, k: int = 3) -> list[list[Passage]]:
    return read_answer(json.dumps({"result": result}).encode(), num_queries, k)


@pytest.mark.parametrize(
    ("hit", "identity", "score"),
    [
        ({"document": {"id": "7", "contents": PARIS}, "score": 0.5}, "7", 0.5),
        ({"document": {"id": 7, "contents": PARIS}, "score": 1}, "7", 1.0),
        ({"document": BM25, "score": 0.5}, None, 0.5),
        ({"document": {"title": "Paris", "text": BM25["text"]}, "score": 0.5}, None, 0.5),
        ({"document": {"contents": PARIS}}, None, 0.0),
        ({"document": PARIS, "score": 0.5}, None, 0.5),
        ({"document": {"id": "7", "contents": PARIS}, "score": None}, "7", 0.0),
        ({"id": "7", "contents": PARIS}, "7", 0.0),
        (BM25, None, 0.0),
        (PARIS, None, 0.0),
    ],
    ids=["dense", "number as id", "bm25", "title and text", "online", "rerank", "null", "bare", "bare bm25", "text"],
)
def test_each_form_is_understood(hit: Any, identity: str | None, score: float) -> None:
    ((passage,),) = read([[hit]])
    assert (passage.contents, passage.score) == (PARIS, score)
    assert passage.title == '"Paris"' and passage.text == "Paris is the capital of France ."
    if identity is not None:
        assert passage.id == identity
    else:  # the same text has the same id, in every process
        assert passage.id == "sha256:52deab15a1f182aa"


def test_text_alone_and_other_fields() -> None:
    ((passage,),) = read([[{"document": {"id": "1", "text": "no title", "url": "u"}, "score": 1.0}]])
    assert passage == Passage("1", "no title", 1.0, {"text": "no title", "url": "u"})


def test_rows_that_faiss_filled_up_with_are_no_results() -> None:
    """A stock server over two passages, asked for five: the last passage again, with the lowest float."""
    rows = [("a", PARIS, 0.9), ("b", ROME, 0.8)] + [("b", ROME, -3.4028234663852886e38)] * 3
    hits = [{"document": {"id": i, "contents": c}, "score": s} for i, c, s in rows]
    assert [(p.id, p.score) for p in read([hits], k=5)[0]] == [("a", 0.9), ("b", 0.8)]
    assert read([hits[2:]]) == [[]]  # and where nothing else is there
    bare = [hit["document"] for hit in hits]
    assert [p.id for p in read([bare], k=5)[0]] == ["a", "b"]
    online = [{"document": {"contents": contents}} for contents in (PARIS, ROME, PARIS)]
    assert [p.contents for p in read([online])[0]] == [PARIS, ROME]


def test_more_than_k_are_cut_after_what_is_twice() -> None:
    hits = [{"document": f"text {i // 2}"} for i in range(9)]
    assert [p.contents for p in read([hits], k=3)[0]] == ["text 0", "text 1", "text 2"]


def test_scores_that_are_no_numbers_of_json() -> None:
    hits = ",".join(f'{{"document": "{name}", "score": {name}}}' for name in ("NaN", "Infinity", "-Infinity"))
    found = read_answer(f'{{"result": [[{hits}]]}}'.encode(), 1, 3)
    assert [(p.contents, p.score) for p in found[0]] == [("NaN", 0.0), ("Infinity", 0.0)]


def test_empty_lists_and_surrogates() -> None:
    assert read([[], []], num_queries=2) == [[], []] and read([], num_queries=0) == []
    assert read_answer(b'{"result": [["\\ud800"]]}', 1, 1)[0][0].contents == "\ud800"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "found no JSON"),
        (b"", "found no JSON"),
        (b"\xff", "found no JSON"),
        (b"[" * 99_999, "found no JSON"),
        (b"[]", "found list []"),
        (b'{"detail": "no"}', "found dict {'detail': 'no'}"),
        (b'{"result": null}', "found dict"),
        (b'{"result": [{"id": "1", "contents": "a"}, {"id": "2", "contents": "b"}]}', "found dict"),
        (b'{"result": [["a", "b"]]}', "with 2 lists (one per query), found 1 of lengths [2]"),
        (b'{"result": [["a"], [], ["b"]]}', "found 3 of lengths [1, 0, 1]"),
        (b'{"result": [["a"], [7]]}', "found int 7"),
        (b'{"result": [["a"], [{"document": null}]]}', "found dict {'document': None}"),
        (b'{"result": [["a"], [{"document": "b", "score": "high"}]]}', "'score': 'high'"),
        (b'{"result": [["a"], [{"document": {"title": "T"}, "score": 1}]]}', "key 'contents' (or 'text')"),
        (b'{"result": [["a"], [{"error": "x"}]]}', "key 'contents' (or 'text')"),
    ],
)
def test_other_shapes_say_what_they_are(body: bytes, message: str) -> None:
    with pytest.raises(RetrievalError) as raised:
        read_answer(body, 2, 3)
    assert message in str(raised.value) and len(str(raised.value)) < 400
