"""Many queries to one retriever, outside of rollouts: each once, in batches, and its failures in one line."""

from __future__ import annotations

from collections.abc import Iterable

from sdsearch_lightning.errors import RetrievalError, SDSearchError
from sdsearch_lightning.retrieval.base import Retriever, as_passages
from sdsearch_lightning.types import Passage

BATCH = 256


def search_all(
    retriever: Retriever, queries: Iterable[str], k: int, batch_size: int = BATCH
) -> dict[str, tuple[Passage, ...]]:
    """What each query finds; one that occurs twice is searched once.

    Args:
        retriever: what is asked.
        queries: in the order in which they are sent.
        k: passages per query.
        batch_size: queries of one call.

    Raises:
        RetrievalError: a search failed, or found something else than passages; the message names its first query.
    """
    asked, found = list(dict.fromkeys(queries)), dict[str, tuple[Passage, ...]]()
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        try:
            hits = as_passages(retriever.search(batch, k), len(batch), k)
        except Exception as error:
            told = str(error) if isinstance(error, SDSearchError) else f"raised {type(error).__name__}: {error}"
            raise RetrievalError(
                f"{type(retriever).__name__}.search of {len(batch)} queries from {batch[0]!r} on: {told}"
            ) from error
        found |= {query: tuple(passages) for query, passages in zip(batch, hits, strict=True)}
    return found
