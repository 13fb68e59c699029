"""The commands of the study, as the library's own command line takes them: arms differ in what they say only."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.study_plan import COLD_START, FULL, SMOKE, Run
from helpers.commands import parsed


@pytest.mark.parametrize("arm", FULL.arms, ids=lambda arm: arm.name)
def test_the_command_line_takes_each_arm(
    arm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = arm.weights[-1]
    config = parsed(FULL.arguments(Run("tuning", arm.name, 101, 0.0014, weight), "r"), monkeypatch, capsys)
    is_taught = arm.name.startswith("sd_")
    assert config["seed_everything"] == 101 and config["data"]["init_args"]["world_seed"] == COLD_START.seed
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.0014
    assert config["model"]["model_name_or_path"] == "r/cold_start/model"
    assert config["jsd"]["weight"] == (weight if is_taught else 0)
    assert config["model"]["entropy_coef"]["query"] == (weight if arm.name == "entropy_penalty" else 0)
    assert config["hindsight"]["groups"] == ("all" if arm.name == "sd_all" else "mixed")
    trainer = config["trainer"]
    assert trainer["max_steps"] == FULL.max_steps and FULL.max_steps % trainer["val_check_interval"] == 0
    assert config["rollout"]["eval_samples"] == 2
    assert trainer["callbacks"][0]["class_path"].endswith("TrajectoryLog")
    assert config["run"]["root"] == "r" and config["run"]["overwrite"] is True


def test_arms_differ_in_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    configs = []
    for arm in FULL.arms:
        config = parsed(FULL.arguments(Run("comparison", arm.name, 0, 1e-3, arm.weights[0]), "r"), monkeypatch, capsys)
        del config["run"]["name"], config["jsd"]["weight"], config["model"]["entropy_coef"]["query"]
        del config["hindsight"]["groups"]
        configs.append(config)
    assert all(config == configs[0] for config in configs)


def test_the_command_line_takes_the_cold_start_and_the_smoke_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parsed(FULL.arguments(COLD_START, "r"), monkeypatch, capsys)
    assert config["seed_everything"] == 0 and config["run"]["name"] == "cold_start"
    run_ = Run("tuning", "grpo", 100, 5e-4, 0.0)
    config = parsed(SMOKE.arguments(run_, "r"), monkeypatch, capsys)
    assert config["trainer"]["max_steps"] == 2 and config["data"]["init_args"]["batch_size"] == 4
    assert config["data"]["init_args"]["world_seed"] == 0
