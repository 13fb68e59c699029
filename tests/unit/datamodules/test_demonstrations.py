"""Demonstrations as files: every form of a turn, what is refused in which words, and passages searched on the way."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from helpers.passages import PASSAGES, ToyRetriever
from helpers.paths import ROOT
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.datamodules.demonstrations import (
    TAGS,
    parse_demonstration,
    read_demonstrations,
    row_of,
    write_demonstrations,
)
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.types import Demonstration, Label, Passage, Question, SiblingRecord, SpanKind

ASKED = {"question": "who ?", "answers": ["A"]}
ANSWER = ["answer", "A"]
GOOD = ASKED | {"turns": [ANSWER]}
FOUND = (Passage("7", '"T"\nx is A'), Passage("1", "nothing"))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, *turns: Any, retriever: Any = None, **more: Any) -> Demonstration:
    """The only demonstration of a file."""
    (one,) = read_demonstrations(
        write(folder / "demos.jsonl", ASKED | {"turns": [*turns, ANSWER]} | more), None, retriever
    )
    return one


def test_texts_in_lists(tmp_path: Path) -> None:
    """The oldest form, whose texts stay as they are."""
    turns = [["reasoning", "need x"], ["QUERY", " x"], ["OBSERVATION", "x is A\n"], ["REFINE", "A"], ["ANSWER", "A"]]
    siblings = [[["x", "x y"], "CORRECT"], [[], "incorrect"]]
    path = write(tmp_path / "demos.jsonl", ASKED | {"turns": turns}, ASKED | {"turns": turns, "siblings": siblings})
    plain, blocked = read_demonstrations(path)
    assert plain.question == Question("1", "who ?", ("A",), "demos") and plain.siblings == ()
    assert plain.turns == tuple((SpanKind(kind), text) for kind, text in turns)
    assert blocked.siblings == (SiblingRecord(0, ("x", "x y"), Label.CORRECT), SiblingRecord(1, (), Label.INCORRECT))
    assert blocked.turns == plain.turns


@pytest.mark.parametrize(
    "turn",
    [
        ["observation", [{"id": "7", "contents": '"T"\nx is A'}, {"id": 1, "contents": "nothing"}]],
        {
            "kind": "observation",
            "passages": [{"id": "7", "title": "T", "text": "x is A"}, {"id": 1, "text": "nothing"}],
        },
        {"kind": "Observation", "text": [{"id": "7", "contents": '"T"\nx is A'}, {"id": 1, "contents": "nothing"}]},
        {"kind": "observation", "text": None, "passages": ['"T"\nx is A', "nothing"]},
    ],
)
def test_passages_in_every_form(tmp_path: Path, turn: Any) -> None:
    query, observation, _ = read(tmp_path, {"kind": "query", "text": "x"}, turn).turns
    assert query == (SpanKind.QUERY, "x") and observation[0] is SpanKind.OBSERVATION
    assert [passage.contents for passage in observation[1]] == [passage.contents for passage in FOUND]
    if not isinstance(turn, dict) or "title" in str(turn):
        assert [passage.id for passage in observation[1]] == ["7", "1"]
    assert read(tmp_path, ["query", "x"], ["observation", []]).turns[1] == (SpanKind.OBSERVATION, ())


def test_a_table_of_parquet_holds_the_same(tmp_path: Path) -> None:
    """Where every turn has the same columns, and what is not there is null."""
    turns = [
        {"kind": "query", "text": "x", "passages": None},
        {"kind": "observation", "text": None, "passages": [{"id": "7", "contents": FOUND[0].contents}]},
        {"kind": "answer", "text": "A", "passages": None},
    ]
    rows = [ASKED | {"turns": turns, "siblings": [{"queries": ["x"], "label": "CORRECT"}]}, GOOD | {"siblings": None}]
    rows[1] = ASKED | {"turns": turns, "siblings": None}
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "demos.parquet")
    first, second = read_demonstrations(tmp_path / "demos.parquet")
    assert first.turns == second.turns == read(tmp_path, *turns[:2]).turns
    assert first.siblings == (SiblingRecord(0, ("x",), Label.CORRECT),) and second.siblings == ()


@pytest.mark.parametrize(
    ("faulty", "shown"),
    [
        ({"turns": None}, "expected a list under 'turns', found None"),
        (
            {"turns": [["THOUGHT", "x"]]},
            "a kind of REASONING, QUERY, REFINE, ANSWER, OBSERVATION (an observation may have a list of passages in "
            "place of its text), found ['THOUGHT', 'x']",
        ),
        ({"turns": [["PROMPT", "x"]]}, "found ['PROMPT', 'x']"),  # the prompt is made of the question
        ({"turns": [["QUERY", 3]]}, "found ['QUERY', 3]"),
        ({"turns": [["QUERY", ["x"]]]}, "found ['QUERY', ['x']]"),
        ({"turns": ["QUERY"]}, "found 'QUERY'"),
        ({"turns": [{"kind": "query"}]}, "found {'kind': 'query'}"),
        ({"turns": [["query", "x"], ["observation", [3]]]}, "expected passages as texts or {id, contents}, found 3"),
        ({"turns": [["query", "x"], ["observation", [{"contents": "c"}]]]}, "expected 'id' and a text 'contents'"),
        ({"turns": []}, "expected turns with one answer, which ends them, found none."),
        ({"turns": [["query", "x"]]}, "expected turns with one answer, which ends them, found QUERY."),
        ({"turns": [ANSWER, ["reasoning", "x"]]}, "which ends them, found ANSWER, REASONING."),
        ({"turns": [ANSWER, ANSWER]}, "which ends them, found ANSWER, ANSWER."),
        ({"turns": [["observation", "x"], ANSWER]}, "expected a query before an observation, found nothing."),
        ({"turns": [["reasoning", "x"], ["observation", []], ANSWER]}, "before an observation, found REASONING."),
        (
            {"turns": [["query", "x"], ["observation", "y"], ["observation", "z"], ANSWER]},
            "before an observation, found OBSERVATION.",
        ),
        ({"turns": [["query", " "], ANSWER]}, "expected a query with some text in it, found none."),
        (
            {"turns": [["query", "a</search>b"], ANSWER]},
            "expected a query without tags of the protocol, found </search> in 'a</search>b'.",
        ),
        ({"siblings": [["x", "CORRECT"]]}, "[[query, ...], label] with CORRECT or INCORRECT, found ['x',"),
        ({"siblings": [[["x"], "RIGHT"]]}, "found [['x'], 'RIGHT']"),
        ({"siblings": [[[1], "CORRECT"]]}, "found [[1], 'CORRECT']"),
        ({"siblings": [[["x"]]]}, "found [['x']]"),
        ({"siblings": ["who ?"]}, "found 'who ?'"),
        ({"siblings": [{"queries": ["x"], "label": None}]}, "found {'queries': ['x'], 'label': None}"),
        ({"siblings": {}}, "expected a list under 'siblings', found {}"),
    ],
)
def test_what_is_faulty_is_named(tmp_path: Path, faulty: dict[str, Any], shown: str) -> None:
    path = write(tmp_path / "demos.jsonl", GOOD, GOOD | faulty)
    with pytest.raises(DataError) as error:
        read_demonstrations(path, None, ToyRetriever())
    assert str(error.value).startswith(f"{path} line 2: ") and shown in str(error.value)


# Observations that are left out


def test_left_out_observations_are_searched_each_query_once(tmp_path: Path) -> None:
    engine, given = ToyRetriever(), ["observation", "as it was"]
    first = ASKED | {"turns": [["query", " Seine river "], ["reasoning", "so"], ["query", "Rome"], given, ANSWER]}
    second = ASKED | {"turns": [["query", "Seine river"], ["query", "Tiber"], ANSWER]}
    one, two = read_demonstrations(write(tmp_path / "demos.jsonl", first, second), None, engine, 2)
    assert engine.calls == [["Seine river", "Tiber"]]
    wanted, other = (tuple(found) for found in ToyRetriever().search(["Seine river", "Tiber"], 2))
    assert one.turns == (
        (SpanKind.QUERY, " Seine river "),
        (SpanKind.OBSERVATION, wanted),
        (SpanKind.REASONING, "so"),
        (SpanKind.QUERY, "Rome"),
        (SpanKind.OBSERVATION, "as it was"),
        (SpanKind.ANSWER, "A"),
    )
    assert two.turns[1] == (SpanKind.OBSERVATION, wanted) and two.turns[3] == (SpanKind.OBSERVATION, other)
    assert wanted != other and len(wanted) == 2


def test_without_a_retriever_they_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "demos.jsonl", GOOD, ASKED | {"turns": [["query", "x"], ANSWER]})
    with pytest.raises(DataError) as error:
        read_demonstrations(path)
    assert str(error.value) == (
        f"{path} line 2: expected an observation after the query 'x', or a data.retriever that finds its passages, "
        "found neither. Set data.retriever, or write the passages into the file."
    )
    assert len(read_demonstrations(path, limit=1)) == 1


def test_the_data_module_gives_its_retriever_and_the_tags_of_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "demos.jsonl", ASKED | {"turns": [["query", "Seine </call>"], ANSWER]})
    data = SearchDataModule(demonstration_files=str(path), demonstration_top_k=4, retriever=ToyRetriever())
    ((_, observation, _),) = (one.turns for one in data.demonstrations())
    assert len(observation[1]) == 4
    module = SimpleNamespace(protocol=SimpleNamespace(tags=("<call>", "</call>")))
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"line 1: expected a query without tags of the protocol, found </call>"):
        data.demonstrations()
    write(path, ASKED | {"turns": [["refine", "x"], ANSWER]})
    with pytest.raises(DataError, match=r"line 1: expected a model.protocol with a refine tag"):
        data.demonstrations()
    module.protocol.tags = TAGS
    assert len(data.demonstrations()) == 1
    with pytest.raises(ConfigError, match=r"data.demonstration_top_k: expected at least 1, found 0"):
        SearchDataModule(demonstration_top_k=0)
    assert "</search>" in TAGS and "<documents>" in TAGS and "<information>" in TAGS


# Writing


DEMONSTRATION = Demonstration(
    Question("q7", "wo ist Zürich ?", ("A", "B"), "demos"),
    ((SpanKind.REASONING, "é"), (SpanKind.QUERY, "x"), (SpanKind.OBSERVATION, FOUND), (SpanKind.ANSWER, "A")),
    (SiblingRecord(0, ("x", "y"), Label.CORRECT), SiblingRecord(1, (), Label.INCORRECT)),
)


@pytest.mark.parametrize("name", ["demos.jsonl", "demos.jsonl.gz"])
def test_what_is_written_reads_as_it_was(tmp_path: Path, name: str) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_demonstrations(folder / name, iter([DEMONSTRATION] * 2))
    first, second = ((folder / name).read_bytes() for folder in folders)
    assert first == second and "Zürich".encode() in (gzip.decompress(first) if name.endswith("gz") else first)
    assert read_demonstrations(folders[0] / name) == [DEMONSTRATION] * 2
    write_demonstrations(folders[0] / name, [DEMONSTRATION], with_observations=False)
    (again,) = read_demonstrations(folders[0] / name, None, ToyRetriever(FOUND), 2)
    assert again == replace(DEMONSTRATION, turns=again.turns) and again.turns[2][0] is SpanKind.OBSERVATION
    assert "passages" not in str(row_of(DEMONSTRATION, with_observations=False))


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "demos.jsonl"
    write_demonstrations(path, [DEMONSTRATION])
    before = path.read_bytes()

    def broken() -> Any:
        yield DEMONSTRATION
        raise ConfigError("stop")

    with pytest.raises(ConfigError, match="stop"):
        write_demonstrations(path, broken())
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["demos.jsonl"]
    with pytest.raises(
        ConfigError, match=r"output: expected a file that ends in .jsonl or .jsonl.gz, found 'd.parquet'"
    ):
        write_demonstrations(tmp_path / "d.parquet", [DEMONSTRATION])


# The documentation

PAGE = (ROOT / "docs" / "data.md").read_text()


def rows_of_the_page() -> Sequence[str]:
    return re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", rows_of_the_page())
def test_a_row_of_the_documentation_can_be_read(tmp_path: Path, text: str) -> None:
    (one,) = read_demonstrations(write(tmp_path / "demos.jsonl", json.loads(text)), None, ToyRetriever(PASSAGES))
    assert one.turns[-1][1] in one.question.answers and {sibling.label for sibling in one.siblings}
    assert all(isinstance(content, tuple) for kind, content in one.turns if kind is SpanKind.OBSERVATION)


def test_a_row_that_cannot_be_read_would_be_noticed() -> None:
    first, second = rows_of_the_page()
    for wrong in (first.replace('"answer"', '"reply"'), second.replace("INCORRECT", "WRONG")):
        with pytest.raises(DataError):
            parse_demonstration(json.loads(wrong), "row 1", "s")
