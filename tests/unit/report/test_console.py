from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.reports import write_metrics, write_run
from sdsearch_lightning.cli.errors import fail
from sdsearch_lightning.report import finish_run, print_report
from sdsearch_lightning.report.console import duration, self_distillation_line
from sdsearch_lightning.report.summary import build_summary

FACTS = {"seed": 3, "seconds": 61.5, "max_searches": 4}


def test_the_report_is_plain_narrow_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("deep" * 30) / "quick"
    folder.mkdir(parents=True)
    finish_run(write_run(folder), FACTS)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 100
    assert "quick  2 held-out questions, 12 steps, seed 3, 1 min 02 s" in lines
    assert "  exact match, greedy      0.250   0.750   +0.500" in lines
    assert "  valid-action rate        0.250   0.750   +0.500" in lines
    assert "weight 0.3 in 10 of 12 steps, JSD 0.380 to 0.230 nats, 100 teacher rows" in text
    assert [line.strip() for line in lines if line.startswith(("  before", "  after"))] == [
        "before, greedy  step 0  wrong",
        "before, sampled  step 0  wrong",
        "after, greedy  step 12  right",
        "after, sampled  step 12  right",
    ]
    assert any(line.startswith(f"  {folder / 'report.html'}  ") for line in lines), "a path is on one line"
    assert str(folder / "checkpoints") not in text


def test_an_unfinished_run_is_reported_without_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, [{"step": 0, "val/exact_match": 0.5}])
    print_report(tmp_path)
    text = capsys.readouterr().out
    assert "exact match, greedy      0.500       -        -" in text
    assert "self-distillation: off" in text
    assert not (tmp_path / "summary.json").exists() and (tmp_path / "report.html").exists()


def test_a_finished_run_is_printed_from_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish_run(write_run(tmp_path), FACTS)
    first = capsys.readouterr().out
    print_report(tmp_path)
    assert capsys.readouterr().out == first


def test_text_is_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    path.write_text(path.read_text().replace("where is Rome ?", "[bold]where[/bold] [/x] is Rome ?"))
    print_report(tmp_path)
    assert "[bold]where[/bold] [/x] is Rome ?" in capsys.readouterr().out


def test_a_character_that_the_terminal_lacks_is_replaced(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    path.write_text(path.read_text().replace("Oslo", "Tromsø"), encoding="utf-8")
    command = "import sys, pathlib, sdsearch_lightning.report as r; r.print_report(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "answer    Troms?" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (192, "3 min 12 s"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_active_weight_without_jsd_is_told_without_it() -> None:
    sd = {"weight": 0.001, "active_steps": 2, "jsd_first": None, "jsd_last": None, "steps": 3, "teacher_rows": 0}
    assert self_distillation_line(sd) == "self-distillation: weight 0.001 in 2 of 3 steps, 0 teacher rows"


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b1m\r\u202e"


def test_no_text_drives_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a file of the run says: questions, golds, answers, reasons, steps, numbers of the summary."""
    write_run(tmp_path)
    path = tmp_path / "trajectories.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["question"] |= {"text": f"where{EVIL}?", "answers": [f"Rome{EVIL}", "Rome"]}
        record["stop_reason"], record["answer"] = f"ERROR{EVIL}", record["answer"] and f"{record['answer']}{EVIL}"
        for span in record["spans"]:
            span["text"] += EVIL
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print_report(tmp_path)
    summary = build_summary({}, {"seed": EVIL, "questions": EVIL})
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"sd": summary["sd"] | {"steps": EVIL}}))
    print_report(tmp_path)
    text = capsys.readouterr().out
    assert "where ]0;owned" in text and "Rome ]0;owned" in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    with pytest.raises(SystemExit):
        fail(f"data.jsonl line 3: {EVIL}")
    assert "\x1b" not in capsys.readouterr().err
