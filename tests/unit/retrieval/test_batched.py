"""Many queries outside of rollouts: each once, in batches; a failure is one line that names where it happened."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from helpers.passages import PASSAGES, ToyRetriever
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.retrieval.batched import BATCH, search_all
from sdsearch_lightning.types import Passage


def test_each_query_is_sent_once_in_batches() -> None:
    engine = ToyRetriever()
    found = search_all(engine, ["Paris", "Rome", "Paris", "Paris river", "Rome"], 2, batch_size=2)
    assert engine.calls == [["Paris", "Rome"], ["Paris river"]] and list(found) == ["Paris", "Rome", "Paris river"]
    assert [found["Paris river"][0], found["Rome"][0]] == [PASSAGES[4], PASSAGES[1]] and len(found["Rome"]) == 2
    assert search_all(engine, [], 2) == {} and len(engine.calls) == 2 and BATCH == 256


def test_a_search_that_fails_is_told_with_its_first_query() -> None:
    def fail(queries: Sequence[str]) -> None:
        if "Rome" in queries:
            raise ConnectionError("no such host")

    with pytest.raises(RetrievalError) as error:
        search_all(ToyRetriever(fail=fail), ["Paris", "Seine", "Rome"], 2, batch_size=2)
    told = "ToyRetriever.search of 1 queries from 'Rome' on: raised ConnectionError: no such host"
    assert str(error.value) == told


def test_what_is_no_list_of_passages_is_refused() -> None:
    class Flat:
        def search(self, queries: Sequence[str], k: int) -> list[Passage]:
            return list(PASSAGES[:k])

    with pytest.raises(RetrievalError, match=r"Flat.search of 1 queries from 'x' on: expected a list of 1 lists"):
        search_all(Flat(), ["x"], 2)  # type: ignore[arg-type]
