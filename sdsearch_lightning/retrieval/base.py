"""The search engine that a rollout asks, and the check that a user's own class keeps the contract.

A retriever is any object with `search(queries, k)`; deriving from `Retriever` is a convenience, not a duty. What comes
from outside is checked here, once, where it enters: behind this file every result is a list of lists of `Passage`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from sdsearch_lightning.errors import ConfigError, RetrievalError, SDSearchError
from sdsearch_lightning.retrieval.text import is_whole, repaired
from sdsearch_lightning.types import Passage, Pluggable

_PROBE = ("What is the capital of France?", "Who wrote Hamlet?")  # two: one alone hides a result that is not nested


class Retriever(Pluggable):
    """Base class of retrievers. A class without it counts too, if it has `search`."""

    required: ClassVar[tuple[str, ...]] = ("search",)
    optional: ClassVar[tuple[str, ...]] = ("prepare", "close")

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query.

        Called from one worker thread, never concurrently.

        Args:
            queries: any number of queries; may be empty.
            k: passages per query, at least 1.

        Returns:
            One list per query, in the order of the queries, best passage first. It holds at most `k` passages: fewer
            where the corpus is smaller, never one twice.
        """

    def prepare(self) -> None:  # noqa: B027 - optional, not abstract
        """Builds or downloads what `search` needs; called by one process per node before the others start."""

    def close(self) -> None:  # noqa: B027 - optional, not abstract
        """Gives back files, memory and connections; a later `search` may open them again."""


def as_passages(found: object, num_queries: int, k: int) -> list[list[Passage]]:
    """`found`, as any retriever may return it, as `num_queries` lists of at most `k` `Passage`.

    Objects with `id` and `contents` (and `score`, if they have one) are turned into `Passage`.

    Raises:
        RetrievalError: the shape is another one; the message says which.
    """
    wanted = f"expected a list of {num_queries} lists (one per query) of at most {k} Passage"
    if not isinstance(found, list | tuple) or not all(isinstance(hits, list | tuple) for hits in found):
        raise RetrievalError(f"{wanted}, found {_describe(found)}")
    if len(found) != num_queries or any(len(hits) > k for hits in found):
        raise RetrievalError(f"{wanted}, found {len(found)} lists of length {[len(hits) for hits in found]}")
    return [[_as_passage(hit, wanted) for hit in hits] for hits in found]


def check_retriever(retriever: Retriever, k: int) -> None:
    """Runs one harmless search, so that a retriever that breaks the contract fails before training, not in it.

    Raises:
        ConfigError: `search` raised, or returned something else than lists of passages; the message shows the shape.
    """
    name = type(retriever).__name__
    try:
        as_passages(retriever.search(list(_PROBE), k), len(_PROBE), k)
    except RetrievalError as error:
        raise ConfigError(f"{name}.search(queries, k={k}) was tried with {len(_PROBE)} queries: {error}.") from error
    except SDSearchError:
        raise  # says already what is wrong
    except Exception as error:
        raise ConfigError(
            f"{name}.search(queries, k={k}) was tried with {len(_PROBE)} queries and raised "
            f"{type(error).__name__}: {error}. Expected a list of {len(_PROBE)} lists of Passage."
        ) from error


def _as_passage(hit: object, wanted: str) -> Passage:
    if isinstance(hit, Passage):
        return hit if is_whole((hit.id, hit.contents, hit.fields)) else _repaired(hit)
    identity, contents = getattr(hit, "id", None), getattr(hit, "contents", None)
    if not isinstance(identity, str) or not isinstance(contents, str):
        raise RetrievalError(f"{wanted}, each with a str id and str contents; found in place of one {_describe(hit)}")
    return _repaired(Passage(identity, contents, float(getattr(hit, "score", 0.0))))


def _repaired(passage: Passage) -> Passage:
    fields = {key: repaired(value) if isinstance(value, str) else value for key, value in passage.fields.items()}
    return replace(passage, id=repaired(passage.id), contents=repaired(passage.contents), fields=fields)


def _describe(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 120 else text[:120] + "..."
