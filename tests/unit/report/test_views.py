from __future__ import annotations

import json
import math
from typing import Any

import pytest

from helpers.reports import REPORT_TOKENIZER, city_rollout, credit
from sdsearch_lightning.report.trajectories import Record, make_record
from sdsearch_lightning.report.views import UNRELIABLE, group_head, is_unreliable, outcome, rollout_view, token_view


def record(answer: str | None = "Rome", phase: str = "train", **options: Any) -> Record:
    trajectory = city_rollout(answer, queries=("capital of Italy", "Rome"))
    made = make_record(
        trajectory, REPORT_TOKENIZER.decode, phase=phase, step=3, block="siblings", credit=credit(trajectory)
    )
    return json.loads(json.dumps(made | options))


def token_credit(student: list[float | None], teacher: list[float | None]) -> dict[str, Any]:
    count = len(student)
    lists = {"tokens": list("abcdef"[:count]), "jsd": [0.1] * count, "teacher_top": [[["a", 0.5]]] * count}
    return token_view({"student_logprob": student, "teacher_logprob": teacher} | lists)


def test_the_verdict_is_the_mean_of_teacher_minus_student_over_what_both_know() -> None:
    view = token_credit([-1.0, -2.0, -0.5], [-0.5, -3.0, None])
    assert view["verdict"] == pytest.approx((0.5 - 1.0) / 2)
    assert view["outside"] == 1 and view["mean_jsd"] == 0.1
    assert token_credit([-1.0], [None])["verdict"] is None  # not 0: nothing was measured


def test_what_nobody_expected_is_unreliable_and_may_make_a_verdict_doubtful() -> None:
    small = math.log(UNRELIABLE) - 1
    assert is_unreliable(small, small) and is_unreliable(small, None)
    assert not is_unreliable(small, -0.1) and not is_unreliable(-0.1, None)
    view = token_credit([-0.5, small], [-0.4, small - 2])
    assert view["unreliable"] == [1] and view["doubtful"] is True
    assert "doubtful" not in token_credit([-3.0, small], [-0.4, small - 2])
    assert "unreliable" not in token_credit([-0.5], [-0.4])


def test_a_rollout_keeps_what_its_line_says() -> None:
    line = record() | {"query_credit": [0.25, 0.5], "query_advantages": [-1.5, 1.5]}
    view = rollout_view(line)
    queries = [row["query"] for row in view["rows"] if row["kind"] == "QUERY"]
    assert [query["credit"] for query in queries] == [-1.5, 1.5]
    assert [query["value"] for query in queries] == [0.25, 0.5]
    assert queries[0]["tokens"] == line["credit"][0]["tokens"] and queries[0]["jsd"] == line["credit"][0]["jsd"]
    assert (view["reward"], view["advantage"], view["block"], view["right"]) == (1.0, 0.5, "siblings", True)
    assert [row["text"] for row in view["rows"] if row["kind"] == "ANSWER"] == ["Rome"]


def test_right_is_what_the_label_says_and_exact_match_where_there_is_none() -> None:
    assert rollout_view(record("Oslo", label="CORRECT"))["verdict"] == "right, no exact match"
    assert rollout_view(record("Rome", label="INCORRECT"))["verdict"] == "wrong, though an exact match"
    assert rollout_view(record("Rome", label=None))["right"] is True
    assert rollout_view(record(None))["verdict"] == "no answer: max searches"
    assert [outcome(rights) for rights in ([True], [False, False], [True, False])] == ["right", "wrong", "mixed"]


def test_greedy_and_sampled_rollouts_of_an_evaluation_share_a_group() -> None:
    greedy, sampled = record(phase="val"), record(phase="val_sampled")
    assert group_head(greedy)["phase"] == group_head(sampled)["phase"] == "val"
    assert (rollout_view(greedy)["decoding"], rollout_view(sampled)["decoding"]) == ("greedy", "sampled")


def test_text_is_without_control_characters_and_numbers_are_numbers() -> None:
    line = record(reward="<b>", advantage=math.nan, block="a\x1b[31m\nb\u2028c\ud800")
    line["spans"][0]["text"] = line["question"]["text"] = "where\x1b]0;x\x07 is"
    line["credit"][0]["tokens"][0] = "\x1b[0m"
    text = json.dumps([rollout_view(line), group_head(line)], ensure_ascii=False, allow_nan=False)
    assert not {"\x1b", "\x07", "\u2028", "\ud800"} & set(text) and "<b>" not in text
    assert rollout_view(line)["block"] == "a [31m\nb c "


def test_long_text_is_cut_and_says_how_much() -> None:
    line = record()
    place = next(span for span in line["spans"] if span["kind"] == "OBSERVATION")
    place["text"] = "x" * 2000
    cut = next(row for row in rollout_view(line)["rows"] if row["kind"] == "OBSERVATION")
    assert len(cut["text"]) + cut["cut"] == 2000
