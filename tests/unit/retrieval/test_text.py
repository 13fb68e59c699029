r"""Half a character ("\ud83d") is refused in files, and repaired in what a search returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.base import as_passages
from sdsearch_lightning.retrieval.jsonl import parse_object
from sdsearch_lightning.retrieval.remote_answers import read_answer
from sdsearch_lightning.retrieval.text import is_whole, repaired
from sdsearch_lightning.types import Passage, Question

HALF = "half \ud83d of a pair"


def test_what_is_whole() -> None:
    assert is_whole({"a": ["plain", "\U0001f600", 3, None], "b": {"c": ()}})
    assert not any(map(is_whole, (HALF, [HALF], {"a": {"b": [HALF]}}, {HALF: 1})))
    assert repaired(HALF) == "half \ufffd of a pair" and repaired("\U0001f600") == "\U0001f600"
    assert repaired("\ud83d\ude00") == "\U0001f600", "two halves that belong together are one"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"id": 1, "contents": "fine", "url": "\ud83d"}, "url"),
        ({"id": 2, "contents": HALF}, "contents"),
        ({"question": "who?", "golden_answers": ["Bo", HALF]}, "golden_answers"),
    ],
)
def test_a_row_with_half_a_character_is_refused_where_it_enters(row: dict[str, Any], key: str) -> None:
    message = rf"f line 1: expected text, found half a character \(a lone surrogate\) under '{key}'"
    with pytest.raises(DataError, match=message):
        parse_object(json.dumps(row).encode(), "f line 1")
    assert parse_object(json.dumps({"contents": "\U0001f600"}).encode(), "f") == {"contents": "\U0001f600"}


def test_a_search_that_returns_half_a_character_is_repaired() -> None:
    class Hit:
        id, contents = HALF, HALF

    for hit in (Passage(HALF, HALF, fields={"url": HALF, "rank": 3}), Hit()):
        ((passage,),) = as_passages([[hit]], 1, 1)
        assert is_whole((passage.id, passage.contents, passage.fields)) and passage.contents == repaired(HALF)
    body = json.dumps({"result": [[{"document": {"id": "1", "contents": HALF}, "score": 1.0}]]}).encode()
    ((passage,),) = as_passages(read_answer(body, 1, 1), 1, 1)
    assert passage.contents == repaired(HALF)
    whole = Passage("1", "\U0001f600", fields={"a": 1})
    assert as_passages([[whole]], 1, 1)[0][0] is whole, "nothing is copied where nothing is wrong"


def test_questions_of_a_users_own_are_looked_at_before_a_model_is_loaded(tmp_path: Path) -> None:
    class Mine(SearchDataModule):
        def questions(self, split: str) -> list[Question]:
            return [Question("q1", "who?", ("Bo",)), Question("q2", HALF, ("Bo",))]

    with pytest.raises(DataError, match="train question 'q2': expected text, found half a character in it"):
        Mine(batch_size=1).setup("fit")
