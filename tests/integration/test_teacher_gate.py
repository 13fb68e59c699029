"""The teacher's gate from a run folder to its file: the run's own groups, data and weights, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import teacher_gate
from helpers.players import ScriptedEngine
from sdsearch_lightning.types import RolloutRequest

pytestmark = pytest.mark.slow


def first_one_right(request: RolloutRequest) -> str:
    """A search, then the gold answer from the first rollout or sample alone, whatever the prompt holds."""
    _, entity, _, relation, *_ = request.question.text.split()
    (gold,) = request.question.answers
    wrong = "e1" if gold != "e1" else "e2"
    answer = gold if request.rollout_index == 0 else wrong
    return f"<think> need </think> <search> {entity} {relation}_a </search> <answer> {answer} </answer>"


def test_a_run_is_measured_with_its_own_settings(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = type("Played", (ScriptedEngine,), {"__init__": lambda self: ScriptedEngine.__init__(self, script)})
    script = first_one_right
    monkeypatch.setattr("sdsearch_lightning.inference.opening.SlotEngine", engine)
    monkeypatch.chdir(workplace.path)
    room = ("--data.num_val_questions=12", "--rollout.max_turn_tokens", "40", "--rollout.max_tokens", "400")
    options = ("--run", "rl", "--questions", "8", "--samples", "2", "--least", "16", "--out", "gate.json", *room)
    assert teacher_gate.main(options) == 0
    shown, told = capsys.readouterr(), json.loads((workplace.path / "gate.json").read_text())
    assert (
        shown.out.splitlines()[-1]
        == told["verdict"]
        == (
            "teacher above student: not told apart; above shuffled labels: not told apart; "
            "groups: 8 (8 mixed, 0 all right, 0 all wrong)"
        )
    )
    assert shown.err.splitlines()[0] == "runs/rl/model: 8 questions of val"
    assert (told["group_size"], told["temperature"], told["weights"]) == (3, 1.0, "runs/rl/model"), "those of the run"
    assert len(set(told["questions"])) == 8 and told["searched"] == {"mixed": 8, "all wrong": 0}
    assert all(arm["exact_match"]["n"] == 16 for arm in told["mixed"].values()), "five arms"
    assert told["mixed"]["student"]["exact_match"]["mean"] == 0.5 and told["logprobs"]["queries"] == 24
    assert told["command"].endswith("--data.num_val_questions=12 --rollout.max_turn_tokens=40 --rollout.max_tokens=400")
    assert teacher_gate.main((*options, "--rollout.group_size", "1")) == 2
    assert "rollout.group_size: expected at least 2" in capsys.readouterr().err
