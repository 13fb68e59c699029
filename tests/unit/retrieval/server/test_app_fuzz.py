"""A thousand bodies that nobody should send: none is the server's fault, and what is valid is still answered."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from helpers.passages import ToyRetriever
from helpers.servers import connect, toy_app

NUM_BODIES = 1000
ODD: list[Any] = [
    *(None, True, False, 0, -1, 3, 10**30, -(10**400), 1e308, 0.5, float("inf"), float("nan")),
    *("", "Paris", "\ud800", "\udc00x", "\x00", "日本", "x" * 3000),
    *([], {}, [[]], [None], ["a", 1], {"queries": ["a"]}),
]
"""Values for any place."""
RAW = [
    b"",
    b"null",
    b"{",
    b'{"queries": ["a"],}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00",
    b'{"queries": ["\xff"]}',
    b'{"queries": ["\xed\xa0\x80"]}',
    b'{"topk": 1e999, "queries": ["a"]}',
    b'{"topk": ' + b"9" * 5000 + b', "queries": ["a"]}',
    b'{"queries": ["a"], "topk": Infinity}',
    b'{"queries": ["a"], "topk": -Infinity, "topk": NaN}',
    b'{"queries": ["\\ud800"]}',
    b'{"queries": ["a"], "query": "b"}',
    b"[" * 100_000,
    b'{"queries": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"queries": ["a"], "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"a":' * 20_000,
    b'"' + b"\\u" * 999,
    bytes(range(256)),
]
"""Known to be no request."""


def random_bytes(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(200))


def odd_values(chance: random.Random) -> bytes:
    keys = ["queries", "query", "topk", "return_scores", "x", "\ud800"]
    return json.dumps({key: chance.choice(ODD) for key in chance.sample(keys, chance.randrange(1, 5))}).encode()


def odd_queries(chance: random.Random) -> bytes:
    queries = [chance.choice(ODD) for _ in range(chance.randrange(1, 4))]
    return json.dumps({"queries": queries, "topk": chance.choice([*ODD, 3, 3, 3])}).encode()


def mutated(chance: random.Random) -> bytes:
    body = bytearray(b'{"queries": ["river of Rome", "Italy"], "topk": 2, "return_scores": true}')
    for _ in range(chance.randrange(1, 4)):
        position = chance.randrange(len(body))
        match chance.randrange(4):
            case 0:
                body[position] = chance.randrange(256)
            case 1:
                del body[position : position + chance.randrange(1, 9)]
            case 2:
                body[position:position] = chance.choice([b"[", b"]", b"{", b'"', b",", b"-", b"\\", b"e9", b"Infinity"])
            case _:
                body += body[position:]
    return bytes(body)


MAKERS: list[Callable[[random.Random], bytes]] = [random_bytes, odd_values, odd_queries, mutated]


def is_request(body: bytes) -> bool:
    """The rules once more, written as one sentence each."""
    try:
        values = json.loads(body)
        if not isinstance(values, dict):
            return False
        queries = values.get("queries") if values.get("query") is None else [values["query"]]
        is_one = (values.get("queries") is None) != (values.get("query") is None)
        is_text = isinstance(queries, list) and all(isinstance(q, str) and len(q) <= 2000 for q in queries)
        is_utf8 = is_text and all(q.encode("utf-8") is not None for q in queries)
        k = values.get("topk")
        k = int(k) if isinstance(k, str) and k.isascii() and k.isdecimal() else k
        is_k = k is None or (type(k) in (int, float) and k == k // 1 and 0 <= k <= 1000)
        return is_one and is_utf8 and is_k and values.get("return_scores") in (None, 0, 1)
    except (ValueError, RecursionError, OverflowError):
        return False


def test_no_body_is_the_servers_fault() -> None:
    chance = random.Random(0)
    bodies = RAW + [chance.choice(MAKERS)(chance) for _ in range(NUM_BODIES - len(RAW))]
    retriever = ToyRetriever()
    outcomes: Counter[tuple[bool, int]] = Counter()

    async def go() -> None:
        async with connect(toy_app(retriever, max_query_chars=2000)) as client:
            for body in bodies:
                response = await client.post("/retrieve", content=body)
                outcomes[is_request(body), response.status_code] += 1
                assert (response.status_code == 200) == is_request(body), (body[:300], response.text[:300])
                assert response.status_code in (200, 400, 413, 422), (body[:300], response.text[:300])
                values = json.loads(response.content, parse_constant=lambda name: pytest.fail(name))
                assert set(values) == ({"result"} if response.status_code == 200 else {"error"})

    asyncio.run(go())
    assert not any(is_request(body) for body in RAW)
    assert outcomes[True, 200] > 20 and outcomes[False, 400] > 200 and outcomes[False, 422] > 200, outcomes
    assert all(query.encode() is not None for call in retriever.calls for query in call)


def test_bodies_in_pieces_are_read_as_one() -> None:
    async def go() -> int:
        async def pieces() -> Any:
            for byte in '{"queries": ["日本"]}'.encode():
                yield bytes([byte])

        async with connect(toy_app()) as client:
            return (await client.post("/retrieve", content=pieces())).status_code

    assert asyncio.run(go()) == 200
