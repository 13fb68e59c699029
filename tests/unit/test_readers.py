import gzip
import json

import pytest

from sdsearch_lightning.datamodules.readers import read_demonstrations, read_questions
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.types import Label, Question, SiblingRecord, SpanKind

GOOD = {"question": "who ?", "answers": ["A"]}


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_flashrag_rows(tmp_path):
    row = {"id": "test_0", "question": "who ?", "golden_answers": ["A", "B"], "metadata": {"type": "bridge"}}
    assert read_questions(write(tmp_path / "nq.jsonl", row)) == [Question("test_0", "who ?", ("A", "B"), "nq")]


def test_simple_rows_and_sources(tmp_path):
    rows = [GOOD, GOOD | {"answers": "B"}, GOOD | {"id": 7, "answers": ["", "C"], "data_source": "hotpotqa"}]
    path = write(tmp_path / "my.set.jsonl.gz", *rows)
    assert read_questions(str(path)) == [
        Question("1", "who ?", ("A",), "my.set"),  # without an id, its line
        Question("2", "who ?", ("B",), "my.set"),
        Question("7", "who ?", ("C",), "hotpotqa"),  # an empty string is no answer
    ]


def test_limit_stops_reading(tmp_path):
    path = write(tmp_path / "nq.jsonl", GOOD, GOOD, {"question": "broken"})
    assert len(read_questions(path, limit=2)) == 2
    with pytest.raises(DataError):
        read_questions(path, limit=3)


@pytest.mark.parametrize("gold", [[], "", " ", None, [""], [1998], {"target": ["A"]}])
@pytest.mark.parametrize("key", ["answers", "golden_answers"])
def test_a_row_without_answers_is_named(tmp_path, key, gold):
    path = write(tmp_path / "nq.jsonl", GOOD, {"question": "who ?", key: gold})
    with pytest.raises(DataError) as error:
        read_questions(path)
    assert str(error.value) == (
        f"{path} line 2: expected a non-empty list under '{key}', found {gold!r}. "
        "Every question needs at least one gold answer."
    )


def test_other_faults_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nq\.jsonl line 1: expected a text under 'question', found None"):
        read_questions(write(tmp_path / "nq.jsonl", {"prompt": "who ?", "answers": ["A"]}))
    with pytest.raises(DataError, match=r"nq\.jsonl: expected at least one row, found an empty file"):
        read_questions(write(tmp_path / "nq.jsonl"))
    with pytest.raises(DataError, match=r"nq\.csv: expected a file that ends in \.jsonl or \.jsonl\.gz"):
        read_questions(write(tmp_path / "nq.csv", GOOD))
    with pytest.raises(DataError, match=r"nowhere\.jsonl, found nothing"):
        read_questions(tmp_path / "nowhere.jsonl")


def test_demonstrations(tmp_path):
    turns = [["reasoning", "need x"], ["QUERY", "x"], ["OBSERVATION", "x is A"], ["REFINE", "A"], ["ANSWER", "A"]]
    siblings = [[["x", "x y"], "CORRECT"], [[], "incorrect"]]
    path = write(tmp_path / "demos.jsonl", GOOD | {"turns": turns}, GOOD | {"turns": turns, "siblings": siblings})
    plain, blocked = read_demonstrations(path)
    assert plain.question == Question("1", "who ?", ("A",), "demos") and plain.siblings == ()
    assert plain.turns[:2] == ((SpanKind.REASONING, "need x"), (SpanKind.QUERY, "x")) and len(plain.turns) == 5
    assert blocked.siblings == (
        SiblingRecord(0, ("x", "x y"), Label.CORRECT),
        SiblingRecord(1, (), Label.INCORRECT),
    )


@pytest.mark.parametrize(
    ("faulty", "shown"),
    [
        ({}, "expected a list under 'turns', found None"),
        (
            {"turns": [["THOUGHT", "x"]]},
            "a kind of REASONING, QUERY, REFINE, ANSWER, OBSERVATION, found ['THOUGHT', 'x']",
        ),
        ({"turns": [["PROMPT", "x"]]}, "found ['PROMPT', 'x']"),  # the prompt is made of the question
        ({"turns": [["QUERY", 3]]}, "found ['QUERY', 3]"),
        ({"turns": ["QUERY"]}, "found 'QUERY'"),
        ({"turns": [], "siblings": [["x", "CORRECT"]]}, "[[query, ...], label] with CORRECT or INCORRECT, found ['x',"),
        ({"turns": [], "siblings": [[["x"], "RIGHT"]]}, "found [['x'], 'RIGHT']"),
        ({"turns": [], "siblings": [[[1], "CORRECT"]]}, "found [[1], 'CORRECT']"),
        ({"turns": [], "siblings": {}}, "expected a list under 'siblings', found {}"),
    ],
)
def test_a_faulty_demonstration_is_named(tmp_path, faulty, shown):
    path = write(tmp_path / "demos.jsonl", GOOD | {"turns": []}, GOOD | faulty)
    with pytest.raises(DataError) as error:
        read_demonstrations(path)
    assert str(error.value).startswith(f"{path} line 2: ") and shown in str(error.value)
