from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.reports import validation, write_metrics, write_run
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.report import finish_run
from sdsearch_lightning.report.metrics import Metrics, Point, read_metrics
from sdsearch_lightning.report.summary import build_summary, read_summary

FACTS = {"seed": 3, "seconds": 61.5, "max_searches": 4}


def test_the_summary_is_the_contract(tmp_path: Path) -> None:
    finish_run(write_run(tmp_path), FACTS)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == read_summary(tmp_path)
    change = {"before": 0.25, "after": 0.75}
    versions = summary.pop("versions")
    assert summary == {
        "exact_match": change,
        "f1": change,
        "sampled": {"exact_match": change, "f1": change},
        "questions": 2,
        "searches_per_question": change,
        "valid_action_rate": change,
        "sd": {
            "weight": 0.3,
            "active_steps": 10,
            "jsd_first": 0.38,  # mean of 0.5 - 0.03 * step over steps 2 to 6
            "jsd_last": 0.23,  # over steps 7 to 11
            "steps": 12,
            "teacher_rows": 100,
        },
        "seconds": 61.5,
        "seed": 3,
        "decoding": {"greedy": True, "max_searches": 4},
    }
    assert {"python", "torch", "sdsearch_lightning"} <= versions.keys()


def test_what_was_not_measured_is_null() -> None:
    summary = build_summary({}, {})
    assert summary["exact_match"] == {"before": None, "after": None}
    assert summary["sd"] == {
        "weight": 0.0,
        "active_steps": 0,
        "jsd_first": None,
        "jsd_last": None,
        "steps": 0,
        "teacher_rows": 0,
    }
    assert summary["seed"] is None and summary["decoding"] == {"greedy": True, "max_searches": None}


def test_before_needs_step_0_and_after_a_later_row() -> None:
    only_first: Metrics = {"val/f1": [Point(0, 0.1)]}
    assert build_summary(only_first, {})["f1"] == {"before": 0.1, "after": None}
    no_first: Metrics = {"val/f1": [Point(5, 0.4), Point(10, 0.6)]}
    assert build_summary(no_first, {})["f1"] == {"before": None, "after": 0.6}


def test_few_active_steps_do_not_overlap() -> None:
    metrics: Metrics = {
        "distill/weight": [Point(step, 0.1) for step in range(4)],
        "distill/jsd": [Point(step, jsd) for step, jsd in enumerate((0.4, 0.2, 0.1, float("nan")))],
    }
    sd = build_summary(metrics, {})["sd"]
    assert (sd["jsd_first"], sd["jsd_last"], sd["active_steps"]) == (0.4, 0.1, 4)


def test_steps_without_teacher_rows_do_not_count_as_jsd() -> None:
    metrics: Metrics = {
        "distill/weight": [Point(0, 0.1), Point(1, 0.1)],
        "distill/jsd": [Point(0, 0.0), Point(1, 0.3)],
        "distill/teacher_rows": [Point(0, 0.0), Point(1, 8.0)],
    }
    assert build_summary(metrics, {})["sd"]["jsd_first"] == 0.3


def test_facts_win_over_metrics_and_other_facts_are_kept() -> None:
    metrics: Metrics = {"val/questions": [Point(0, 50.0)]}
    assert build_summary(metrics, {})["questions"] == 50
    summary = build_summary(metrics, {"questions": 70, "device": "cpu", "decoding": {"temperature": 0}})
    assert (summary["questions"], summary["device"]) == (70, "cpu")
    assert summary["decoding"] == {"greedy": True, "max_searches": None, "temperature": 0}


def test_metrics_are_sparse(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 0, "epoch": 0} | validation(0.5), {"step": 1, "rollout/reward": 0.25}])
    metrics = read_metrics(tmp_path)
    assert metrics["rollout/reward"] == [Point(1, 0.25)]
    assert metrics["val/f1"] == [Point(0, 0.5)]
    assert "epoch" not in metrics


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.csv, found none in {tmp_path}"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("text", ["step,val/f1\n0,0.1\n1,high\n", "val/f1\n0.1\n0.2\n"])
def test_a_bad_row_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.csv line (3, '1,high|1: expected the columns, 'step' among)"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"\xff", bytes(40), b"[1]", b"3"])
def test_a_damaged_summary_is_named(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(contents)
    with pytest.raises(DataError, match=r"summary\.json: expected a JSON object"):
        read_summary(tmp_path)


def test_a_report_needs_neither_torch_nor_lightning() -> None:
    command = "import sys, sdsearch_lightning.report; print({'torch', 'lightning', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
