"""A protocol, a question and six passages about cities, and a retriever that ranks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.types import Passage, Question

PROTOCOL = Protocol(
    "question: {question} ", documents_tag="documents", question_mark=False, invalid_message=" invalid action "
)
QUESTION = Question("q0", "where is Paris ?", ("Paris", "City of Light"), "toy")
PASSAGES = tuple(
    Passage(str(i), text)
    for i, text in enumerate(
        (
            '"Paris"\nParis is the capital of France .',
            '"Rome"\nRome is the capital of Italy .',
            '"France"\nFrance is where Paris is .',
            '"Italy"\nItaly is where Rome is .',
            '"Seine"\na river of Paris',
            '"Tiber"\na river of Rome',
        )
    )
)


class ToyRetriever:
    """Six passages, ranked by the words they share with the query; remembers what it was asked.

    Args:
        passages: others than the six.
        fail: sees each batch of queries first, and may raise.
    """

    def __init__(
        self, passages: Sequence[Passage] = PASSAGES, fail: Callable[[Sequence[str]], None] = lambda queries: None
    ) -> None:
        self.passages, self.fail = passages, fail
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.calls.append(list(queries))
        self.fail(queries)
        return [sorted(self.passages, key=lambda p: -self._shared(query, p))[:k] for query in queries]

    @staticmethod
    def _shared(query: str, passage: Passage) -> int:
        return len(set(query.lower().split()) & set(passage.contents.lower().split()))
