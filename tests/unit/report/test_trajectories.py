from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.reports import REPORT_TOKENIZER, city_rollout, credit, write_records
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.trajectories import (
    append_records,
    cut_after,
    cut_torn_line,
    make_record,
    rank_file,
    read_trajectories,
    token_texts,
)
from sdsearch_lightning.types import Passage, Question, Trajectory

FIELDS = """schema phase step rank question instance_id rollout_index spans stop_reason queries passages answer reward
advantage label block credit query_credit query_advantages""".split()


def test_a_record_has_the_fields_of_schema_1() -> None:
    trajectory = city_rollout()
    record = json.loads(
        json.dumps(
            make_record(trajectory, REPORT_TOKENIZER.decode, phase="train", step=3, rank=1, credit=credit(trajectory))
        )
    )
    assert list(record) == FIELDS
    assert record["question"] == {"id": "q0", "text": "where is Rome ?", "answers": ["Rome"], "source": "toy"}
    assert (record["schema"], record["step"], record["rank"], record["instance_id"]) == (1, 3, 1, [0, 0])
    assert record["spans"][2] == {
        "kind": "QUERY",
        "text": "capital of Italy",
        "token_ids": list(REPORT_TOKENIZER.encode("capital of Italy")),
        "sampled": True,
        "logprobs": [-0.5, -0.5, -0.5],
    }
    assert record["spans"][0]["logprobs"] is None and not record["spans"][0]["sampled"]
    assert record["passages"] == [
        [{"id": "d1", "contents": "Rome is capital of Italy", "score": 0.75, "fields": {"url": "x"}}]
    ]
    assert (record["reward"], record["advantage"], record["label"]) == (1.0, 0.5, "CORRECT")


def test_a_question_with_support_keeps_it() -> None:
    asked = Question("q0", "where is Rome ?", ("Rome",), "toy", support=("Rome", "Italy"))
    record = make_record(city_rollout(question=asked), REPORT_TOKENIZER.decode, phase="train", step=0)
    assert json.loads(json.dumps(record))["question"] == {
        "id": "q0",
        "text": "where is Rome ?",
        "answers": ["Rome"],
        "source": "toy",
        "support": ["Rome", "Italy"],
    }


def test_credit_is_per_token_and_infinity_becomes_null() -> None:
    trajectory = city_rollout()
    record = make_record(
        trajectory, REPORT_TOKENIZER.decode, phase="train", step=0, credit=credit(trajectory), top_tokens=2
    )
    (entry,) = record["credit"]
    assert entry["tokens"] == ["capital", " of", " Italy"]
    assert entry["teacher_logprob"] == [-0.25, -0.25, None]
    assert entry["teacher_top"][0] == [["Italy", 0.6], ["capital", 0.3]]
    json.dumps(entry, allow_nan=False)


def test_no_teacher_is_null_and_no_query_is_an_empty_list() -> None:
    silent = city_rollout(queries=())
    assert make_record(silent, REPORT_TOKENIZER.decode, phase="train", step=0)["credit"] is None
    assert make_record(silent, REPORT_TOKENIZER.decode, phase="train", step=0, credit=())["credit"] == []


def test_token_texts_join_to_the_text_when_a_character_spans_tokens() -> None:
    pieces = {1: b"caf", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b" au"}

    def decode(token_ids: list[int]) -> str:
        return b"".join(pieces[token] for token in token_ids).decode(errors="replace")

    assert token_texts([1, 2, 3, 4], decode) == ["caf", "", "é", " au"]


def test_the_last_line_of_a_rollout_wins(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    write_records(path, [city_rollout("Oslo"), city_rollout("Oslo", index=1)], "train", 4)
    write_records(path, [city_rollout("Oslo")], "val", 4)
    write_records(path, [city_rollout("Rome")], "train", 4)  # the step was run again after a resume
    answers = {(r["phase"], r["rollout_index"]): r["answer"] for r in read_trajectories(path)}
    assert answers == {("train", 0): "Rome", ("train", 1): "Oslo", ("val", 0): "Oslo"}
    assert len(list(read_trajectories(path))) == 3


def test_other_ranks_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    write_records(path, [city_rollout()], "train", 0)
    assert rank_file(path, 0) == path
    write_records(rank_file(path, 1), [city_rollout(instance_id=(0, 1))], "train", 0, rank=1)
    assert (tmp_path / "trajectories.rank1.jsonl").exists()
    assert [record["rank"] for record in read_trajectories(path)] == [0, 1]


@pytest.mark.parametrize("torn", [b'{"schema": 1, "pha', b"x" * 200_000, b""])
def test_a_torn_last_line_is_ignored_and_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "trajectories.jsonl"
    write_records(path, [city_rollout(), city_rollout(index=1)], "train", 0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(list(read_trajectories(path))) == 2
    cut_torn_line(path)
    assert path.read_bytes() == whole


def test_a_resumed_run_begins_where_the_checkpoint_stands(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    for rank, file in ((0, path), (1, rank_file(path, 1))):  # rank 1 may be gone in the resumed run
        write_records(file, [city_rollout()], "val", 0)
        for step in (1, 2, 3):
            write_records(file, [city_rollout(), city_rollout(index=1)], "train", step, rank=rank)
            write_records(file, [city_rollout()], "val", step)
        write_records(file, [city_rollout()], "skipped", 4)
        file.write_bytes(file.read_bytes() + b'{"schema": 1, "pha')
    cut_after(path, 2)
    for file in (path, rank_file(path, 1)):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        told = [(line["phase"], line["step"]) for line in lines]
        assert told == [
            ("val", 0), ("train", 1), ("train", 1), ("val", 1), ("train", 2), ("train", 2), ("val", 2),
        ]  # fmt: skip
        whole = file.read_bytes()
        cut_after(path, 2)
        assert file.read_bytes() == whole
    cut_after(path, -1)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "none.jsonl", 2)


@pytest.mark.parametrize(
    "tail", [bytes(5000) + b"\n", b'{"step": 9, "pha\n', b"\xff\xfe\n", b"[1]\n", b"{}\n", bytes(9) + b'{"step": 9}\n']
)
def test_lines_that_a_power_cut_left_are_cut_and_said(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "trajectories.jsonl"
    for step in (1, 2, 3):
        write_records(path, [city_rollout()], "train", step)
    whole = path.read_bytes()
    path.write_bytes(whole + tail + tail + bytes(70_000))
    (told,) = cut_after(path, 4)
    assert path.read_bytes() == whole
    assert told.startswith(f"{path} ends with step 3, the run goes on after step 4") and "(2 lines were no" in told


def test_rows_that_are_missing_are_said(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.jsonl"
    for step in (1, 3, 5):
        write_records(path, [city_rollout()], "train", step)
    assert not cut_after(path, 6, 2) and not cut_after(path, 7)
    assert [line.split(":")[0] for line in cut_after(path, 7, 2)] == [
        f"{path} ends with step 5, the run goes on after step 7"
    ]


def test_a_file_of_one_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"x" * 70_000)
    cut_torn_line(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"t\.jsonl line 2: expected a JSON object, got b'\{broken"),
        ('{"schema": 7}', r"t\.jsonl line 2: expected schema 1, got 7"),
        ("[1]", r"t\.jsonl line 2: expected schema 1, got 'list'"),
    ],
)
def test_a_bad_complete_line_is_an_error_that_names_it(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [city_rollout()], "train", 0)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_trajectories(path))


def test_passage_fields_of_any_type_are_written(tmp_path: Path) -> None:
    values = {name: getattr(city_rollout(), name) for name in Trajectory.__dataclass_fields__}
    odd = Trajectory(**values | {"passages": ((Passage("d", "é\n\u2028", 0.0, {"where": Path("a/b")}),),)})
    append_records(tmp_path / "t.jsonl", [make_record(odd, REPORT_TOKENIZER.decode, phase="val", step=0)])
    (record,) = read_trajectories(tmp_path / "t.jsonl")
    assert record["passages"][0][0]["fields"] == {"where": "a/b"}
    assert record["passages"][0][0]["contents"] == "é\n\u2028"
