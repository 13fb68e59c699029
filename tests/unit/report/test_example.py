from __future__ import annotations

from pathlib import Path

from helpers.reports import REPORT_TOKENIZER, city_rollout, write_records, write_run
from sdsearch_lightning.report.example import Example, choose_example, printable, rows
from sdsearch_lightning.report.trajectories import make_record


def test_the_question_that_was_learnt_is_chosen(tmp_path: Path) -> None:
    example = choose_example(write_run(tmp_path) / "trajectories.jsonl")
    assert [(r["phase"], r["step"], r["instance_id"]) for r in example.before] == [
        ("val", 0, [0, 1]),
        ("val_sampled", 0, [0, 1]),
    ]
    assert [r["answer"] for r in example.after] == ["Rome", "Rome"]
    assert example.choice == "the first that turned from wrong to right"


def test_a_learnt_question_with_two_searches_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for step, answer in ((0, None), (9, "Rome")):
        first = city_rollout(answer, instance_id=(0, 0))
        second = city_rollout(answer, instance_id=(0, 1), queries=("Rome", "Italy"))
        write_records(path, [first, second], "val", step)
    assert choose_example(path).after[0]["instance_id"] == [0, 1]


def test_where_nothing_was_learnt_the_first_common_question_is_shown_and_said_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [city_rollout("Oslo", instance_id=(0, position)) for position in (1, 2)], "val", 0)
    write_records(path, [city_rollout("Oslo", instance_id=(0, position)) for position in (2, 3)], "val", 5)
    example = choose_example(path)
    assert example.after[0]["instance_id"] == [0, 2]
    assert "none turned" in example.choice


def test_one_validation_is_shown_as_after(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [city_rollout()], "val", 0)
    example = choose_example(path)
    assert example.before == () and len(example.after) == 1


def test_only_the_first_sampled_rollout_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [city_rollout()], "val", 0)
    write_records(path, [city_rollout("Oslo", index=2), city_rollout(index=1)], "val_sampled", 0)
    assert [(r["phase"], r["rollout_index"]) for r in choose_example(path).after] == [("val", 0), ("val_sampled", 1)]


def test_no_file_and_no_evaluation_give_nothing(tmp_path: Path) -> None:
    assert choose_example(tmp_path / "absent.jsonl") == Example()
    write_records(tmp_path / "t.jsonl", [city_rollout()], "test", 0)
    example = choose_example(tmp_path / "t.jsonl")
    assert (example.before, example.after) == ((), ())


def test_rows_leave_out_prompt_tags_and_blanks() -> None:
    record = make_record(city_rollout(), REPORT_TOKENIZER.decode, phase="val", step=0)
    record["spans"][4]["text"] = "\n<documents>Rome is\n capital</documents>\n\n"
    assert [(row.label, row.text) for row in rows(record)] == [
        ("search", "capital of Italy"),
        ("read", "Rome is capital"),
        ("answer", "Rome"),
    ]


def test_printable_takes_the_terminal_out_of_the_text_s_hands() -> None:
    assert printable("a\x1b[31m b\r\n\tc\u202e") == "a [31m b c"
