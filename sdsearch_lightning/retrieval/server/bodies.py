"""What goes over the wire: Search-R1's request and answer, and those of the clients that differ from it.

    {"queries": [str, ...] | "query": str, "topk": int | null, "return_scores": bool}
    {"result": [[{"document": {"id", "contents", ...}, "score": float | null}, ...], ...]}     return_scores true
    {"result": [[{"id", "contents", ...}, ...], ...]}                                         return_scores false

Whatever bytes arrive, reading them ends with a request or with a refusal of 4xx. What is written is pure ASCII and
strict JSON: a lone surrogate or a score that is not finite must not break a client that was asking for something else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdsearch_lightning.retrieval.server.limits import ServerLimits
from sdsearch_lightning.types import Passage

_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, skipkeys=True, default=str, separators=(",", ":"))


class RefusedError(Exception):
    """A request that is not served: HTTP status and message."""

    @property
    def status(self) -> int:
        """HTTP status, from 400 to 499."""
        return int(self.args[0])

    @property
    def message(self) -> str:
        """What was expected and what was found."""
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that can be served: its queries and how much of them to return."""

    queries: tuple[str, ...]
    k: int
    with_scores: bool


def read_request(body: bytes, top_k: int, limits: ServerLimits) -> Asked:
    """The request in `body`.

    Args:
        body: as it arrived.
        top_k: passages per query where the request names no number, or 0.
        limits: of the server.

    Raises:
        RefusedError: 400 not a JSON object, 413 more than the limits allow, 422 a value of another kind.
    """
    try:
        values = json.loads(body)
    except RecursionError:
        raise RefusedError(400, "expected a JSON object, found one that is nested too deep to read") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of more digits than Python reads
        raise RefusedError(400, f"expected a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise RefusedError(400, f"expected a JSON object with the key 'queries', found {_shown(values)}")
    queries, k = _queries(values, limits), _top_k(values.get("topk"), top_k, limits)
    if len(queries) * k > limits.max_request_passages:
        raise RefusedError(
            413,
            f"queries x topk: expected at most {limits.max_request_passages} (max_request_passages), found "
            f"{len(queries)} x {k} = {len(queries) * k}. Send several requests.",
        )
    return Asked(queries, k, _with_scores(values.get("return_scores")))


def encode_answer(answers: Sequence[Sequence[Passage]], with_scores: bool) -> bytes:
    """The body of a 200. It is put together hit by hit: one call over megabytes would hold up all other threads."""
    lists = (",".join(_hit(passage, with_scores) for passage in passages) for passages in answers)
    return f'{{"result":[{",".join(f"[{hits}]" for hits in lists)}]}}'.encode("ascii")


def encode(value: Any) -> bytes:
    """`value` as strict JSON in ASCII; numbers that are not finite become null."""
    return _strict(value).encode("ascii")


def _queries(values: dict[str, Any], limits: ServerLimits) -> tuple[str, ...]:
    many, one = values.get("queries"), values.get("query")
    if (many is None) == (one is None):
        found = "neither" if many is None else "both"
        raise RefusedError(422, f"expected 'queries' (a list of strings) or 'query' (a string), found {found}")
    queries, name = ([one], "query") if many is None else (many, "queries")
    if not isinstance(queries, list):
        raise RefusedError(422, f"queries: expected a list of strings, found {_shown(queries)}")
    if len(queries) > limits.max_request_queries:
        raise RefusedError(
            413, f"{name}: expected at most {limits.max_request_queries}, found {len(queries)}. Send several requests."
        )
    for index, query in enumerate(queries):
        if not isinstance(query, str):
            raise RefusedError(422, f"{name}: expected strings, found at {index} {_shown(query)}")
        if len(query) > limits.max_query_chars:
            raise RefusedError(
                413, f"{name}: expected at most {limits.max_query_chars} characters, found {len(query)} at {index}"
            )
        if not _is_text(query):
            raise RefusedError(422, f"{name}: expected text, found a lone surrogate at {index}")
    return tuple(queries)


def _with_scores(found: object) -> bool:
    if found in (None, 0, 1):
        return bool(found)
    if isinstance(found, str) and found.lower() in ("true", "false"):
        return found.lower() == "true"
    raise RefusedError(422, f"return_scores: expected true or false, found {_shown(found)}")


def _top_k(found: object, top_k: int, limits: ServerLimits) -> int:
    if isinstance(found, str) and found.isascii() and found.isdecimal() and len(found) <= 18:
        found = int(found)  # "3": Search-R1's server takes what can be read as a number, and so its clients send it
    if isinstance(found, float) and found.is_integer():
        found = int(found)  # 3.0: JSON has one kind of number
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise RefusedError(422, f"topk: expected a whole number or null, found {_shown(found)}")
    if not 0 <= (found or 0) <= limits.max_top_k:
        raise RefusedError(422, f"topk: expected 0 (the default, {top_k}) to {limits.max_top_k}, found {_shown(found)}")
    return found or top_k


def _is_text(query: str) -> bool:
    """Whether it can be written as UTF-8, which every tokenizer and every index will want."""
    try:
        query.encode()
    except UnicodeEncodeError:
        return False
    return True


def _hit(passage: Passage, with_scores: bool) -> str:
    row = {"id": passage.id, "contents": passage.contents}
    row |= {key: value for key, value in passage.fields.items() if key not in row}
    if not with_scores:
        return _strict(row)
    return _strict({"document": row, "score": float(passage.score)})


def _strict(value: Any) -> str:
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(_finite(value))


def _finite(value: Any) -> Any:
    """NaN and the infinities have no place in JSON; null says that there is no number, and 0 would not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: object) -> str:
    """Short and printable. What is in a list or an object stays out: it may be nested deeper than `repr` can go."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else text[:60] + "..."
