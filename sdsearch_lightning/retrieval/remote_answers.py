"""What retrieval servers answer, as passages: Search-R1's server and the ones that grew out of it differ in details.

    dense               {"document": {"id", "contents", ...}, "score"}
    BM25                {"document": {"title", "text", "contents"}, "score"}          no id
    online              {"document": {"contents"}}                                    no id, no score, more than k
    rerank              {"document": "...", "score"}                                  a string
    without scores      {"id", "contents", ...}

FAISS fills up with row -1 where a corpus has fewer than k passages; a stock server turns that into its last passage,
again and again, with a score of -3.4e38. Such rows are not results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.types import Passage

_NO_RESULT = -1e38


def read_answer(body: bytes, num_queries: int, k: int) -> list[list[Passage]]:
    """The passages in the body of a 200: `num_queries` lists of at most `k`, none twice in a list.

    Raises:
        RetrievalError: the body is not JSON, or of another shape; the message says which.
    """
    wanted = f'expected {{"result": [...]}} with {num_queries} lists (one per query)'
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RetrievalError(f"{wanted}, found no JSON ({error}): {body[:80]!r}") from error
    result = values.get("result") if isinstance(values, dict) else None
    if not isinstance(result, list) or not all(isinstance(hits, list) for hits in result):
        raise RetrievalError(f"{wanted}, found {_shown(values)}")
    if len(result) != num_queries:
        raise RetrievalError(
            f"{wanted}, found {len(result)} of lengths {[len(hits) for hits in result][:20]}. "
            "Which list belongs to which query is unknown: Search-R1's rerank server leaves out queries without hits."
        )
    return [_read_hits(hits, k) for hits in result]


def _read_hits(hits: Sequence[Any], k: int) -> list[Passage]:
    passages: dict[str, Passage] = {}
    for passage in map(_read_hit, hits):
        if passage.score > _NO_RESULT:
            passages.setdefault(passage.id, passage)
    return list(passages.values())[:k]


def _read_hit(hit: Any) -> Passage:
    is_scored = isinstance(hit, dict) and "document" in hit
    document, score = (hit["document"], hit.get("score")) if is_scored else (hit, None)
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, dict) or not isinstance(score, int | float | None):
        raise RetrievalError(f'expected hits of the form {{"document": ..., "score": number}}, found {_shown(hit)}')
    contents, identity = _contents(document), document.get("id")
    if identity is None:  # the same text is the same passage
        identity = "sha256:" + sha256(contents.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    fields = {key: value for key, value in document.items() if key not in ("id", "contents")}
    return Passage(str(identity), contents, _finite(score), fields)


def _contents(document: dict[str, Any]) -> str:
    contents, title, text = (document.get(key) for key in ("contents", "title", "text"))
    if isinstance(contents, str):
        return contents
    if isinstance(text, str):
        return f'"{title}"\n{text}' if isinstance(title, str) else text
    raise RetrievalError(f"expected a document with the key 'contents' (or 'text'), found {_shown(document)}")


def _finite(score: float | None) -> float:
    """0 says "unknown", as it does where a server sends no scores; minus infinity stays, and is no result."""
    return float(score) if score is not None and (math.isfinite(score) or score < 0) else 0.0


def _shown(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 120 else text[:120] + "..."
