"""Evaluations: macro averages and intervals against closed forms, one row a source, and text that drives nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import NormalDist

import pytest
from rich.console import Console

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report import print_report
from sdsearch_lightning.report.evaluation import (
    Evaluation,
    Scored,
    print_evaluation,
    read_evaluations,
    rows_of,
    summarize,
    to_markdown,
    write_evaluation,
)


def scores(source: str, matches: list[int], start: int = 0, searches: float = 2.0) -> list[Scored]:
    return [Scored(start + i, source, float(em), em / 2, searches, 1.0, 0.0) for i, em in enumerate(matches)]


ROWS = [*scores("nq", [1] * 30 + [0] * 70), *scores("mine", [1] * 8 + [0] * 2, 100, 4.0)]


def whole(rows: list[Scored] = ROWS, **facts: object) -> Evaluation:
    decoding = {"greedy": True, "max_searches": 4, "top_k": 3}
    told = {"schema": 1, "command": "test", "weights": "step_00000008", "step": 8, "decoding": decoding}
    return told | summarize(rows) | {"sampled": None} | facts


def test_a_row_per_source_in_the_order_of_the_questions_and_a_macro_average() -> None:
    found = summarize(ROWS[::-1])
    assert [(s["source"], s["questions"]) for s in found["sources"]] == [("nq", 100), ("mine", 10)]
    assert [s["exact_match"]["value"] for s in found["sources"]] == [0.3, 0.8]
    assert found["macro"]["exact_match"]["value"] == 0.55 and found["macro"]["f1"]["value"] == 0.275
    assert found["macro"]["searches_per_question"] == 3.0 and found["questions"] == 110


def test_the_interval_is_that_of_the_binomial() -> None:
    rows = scores("nq", ([1] * 3 + [0] * 7) * 100)
    score = summarize(rows)["sources"][0]["exact_match"]
    half = NormalDist().inv_cdf(0.975) * (0.3 * 0.7 / 1000) ** 0.5
    assert (score["low"], score["high"]) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)
    narrow = summarize(rows + scores("nq", ([1] * 3 + [0] * 7) * 300, 1000))["sources"][0]["exact_match"]
    assert narrow["high"] - narrow["low"] == pytest.approx(half, abs=0.004), "four times the questions, half the width"


def test_the_macro_averages_interval_is_narrower_than_its_widest_source() -> None:
    found = summarize(ROWS)
    width = [s["exact_match"]["high"] - s["exact_match"]["low"] for s in (*found["sources"], found["macro"])]
    assert width[1] / 2 < width[2] < width[1]


def test_the_same_rows_give_the_same_numbers_whatever_stands_beside_them() -> None:
    alone, beside = summarize(scores("nq", [1, 0, 1])), summarize([*scores("nq", [1, 0, 1]), *scores("b", [0, 1], 3)])
    assert alone["sources"][0] == beside["sources"][0]
    assert summarize(ROWS) == summarize(ROWS)
    assert summarize([*ROWS, *ROWS[:7]]) == summarize(ROWS), "a question that two processes answered counts once"
    assert summarize([]) == {"questions": 0, "sources": [], "macro": None}


def test_a_page_and_a_table() -> None:
    text = to_markdown(whole(limit_per_source=100))
    assert "# test of step_00000008, step 8" in text
    assert "| nq | 100 | 0.300 [" in text and text.count("| macro average | 110 | 0.550 [") == 1
    assert "Greedy decoding, at most 4 searches, 3 passages each, 100 drawn questions per source at most;" in text
    assert len(rows_of(summarize(scores("nq", [1])))) == 1, "one source is its own average"
    out = io.StringIO()
    print_evaluation(Console(file=out, width=100, highlight=False), whole())
    assert "\nmacro average" in out.getvalue() and all(len(line) <= 100 for line in out.getvalue().splitlines())


def test_sampled_rollouts_have_a_table_of_their_own() -> None:
    text = to_markdown(whole(sampled={"samples": 4, **summarize(ROWS)}))
    assert text.count("| nq | 100 |") == 2 and "Sampled decoding, 4 per question, at most" in text


def test_a_sources_name_drives_neither_terminal_nor_table() -> None:
    evaluation = whole(scores("a|b\x1b[2J<script>", [1]))
    assert "| a\\|b [2J&lt;script> | 1 |" in to_markdown(evaluation)
    out = io.StringIO()
    print_evaluation(Console(file=out, width=100), evaluation)
    assert "\x1b" not in out.getvalue()


def test_evaluations_of_a_run_are_found_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (8, 2):
        name = f"step_{step:08d}"
        write_evaluation(tmp_path / "test" / name, whole(step=step, weights=name))
    assert [found["step"] for _, found in read_evaluations(tmp_path)] == [2, 8]
    print_report(tmp_path)  # of a model that was not trained here
    assert capsys.readouterr().out.count("macro average") == 2
    (tmp_path / "metrics.csv").write_text("step,val/exact_match\n0,0.5\n")
    print_report(tmp_path)
    shown = capsys.readouterr().out
    assert "test/step_00000002" in shown and "test/step_00000008" in shown and shown.count("0.550 [") == 2
    (tmp_path / "test/step_00000002/evaluation.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(DataError, match=r"step_00000002/evaluation.json: expected an evaluation of schema 1"):
        read_evaluations(tmp_path)
