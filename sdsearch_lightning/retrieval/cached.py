"""Answers repeated queries from memory: rollouts of one question ask the same things again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.base import Retriever, as_passages
from sdsearch_lightning.types import Passage

_Key = tuple[str, int]


class CachedRetriever(Retriever):
    """Keeps the answers of another retriever, the least recently used of which make room for new ones.

    Two queries are the same where they differ only in the white space around and between words and, with `ignore_case`,
    in case; the one that was asked first is the one that was sent. So where the retriever tells them apart (a cased
    encoder does) an answer depends on what was asked before, and a resumed run, whose cache is empty, may differ from
    one that was never interrupted; `ignore_case=False` rules that out for case. An answer is as good as the corpus was
    when it was given: nothing expires.

    Cost: a look-up, about two microseconds. Memory: the text of the query and of its k passages, about k KB per entry
    with passages of 100 words, so some 300 MB where 100,000 entries keep 3 passages each; each process has a cache of
    its own.

    Args:
        retriever: anything with `search(queries, k)`.
        max_entries: keep this many answers, at least 1.
        ignore_case: whether "Rome" and "rome" are the same query.
    """

    def __init__(self, retriever: Retriever, max_entries: int = 100_000, ignore_case: bool = True) -> None:
        if max_entries < 1:
            raise ConfigError(f"max_entries: expected at least 1, found {max_entries}. Without a cache, leave it out.")
        self.retriever = Retriever.adopt(retriever)
        self.max_entries = max_entries
        self.ignore_case = ignore_case
        self.hits = 0
        """Queries answered without asking: known, or asked twice in one call."""
        self.misses = 0
        """Queries that the retriever answered."""
        self._answers: OrderedDict[_Key, tuple[Passage, ...]] = OrderedDict()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The answer to each query; those that are not known are sent on in one call, each once.

        Raises:
            RetrievalError: the retriever returned something else than lists of passages. What it raises itself passes
                through; nothing is kept of a call that failed.
        """
        keys = [self._key(query, k) for query in queries]
        unknown: dict[_Key, str] = {}
        for key, query in zip(keys, queries, strict=True):
            if key not in self._answers:
                unknown.setdefault(key, query)
        found: dict[_Key, tuple[Passage, ...]] = {}
        if unknown:
            answers = as_passages(self.retriever.search(list(unknown.values()), k), len(unknown), k)
            found = {key: tuple(hits) for key, hits in zip(unknown, answers, strict=True)}
        self.misses += len(unknown)
        self.hits += len(keys) - len(unknown)
        known = found | {key: self._answers[key] for key in keys if key not in found}
        for key in keys:
            self._answers[key] = known[key]
            self._answers.move_to_end(key)
        while len(self._answers) > self.max_entries:
            self._answers.popitem(last=False)
        return [list(known[key]) for key in keys]

    def prepare(self) -> None:
        """Build or download what the cached retriever needs."""
        self.retriever.prepare()

    def close(self) -> None:
        """Forgets all answers and closes the retriever; the counts stay."""
        self._answers.clear()
        self.retriever.close()

    def _key(self, query: str, k: int) -> _Key:
        text = " ".join(query.split())
        return text.casefold() if self.ignore_case else text, k
