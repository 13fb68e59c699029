"""What the study does next follows from its records; the library's command line takes its commands."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import study_protocol
from benchmarks.processes import Outcome
from benchmarks.runner import Record
from benchmarks.study import main
from benchmarks.study_protocol import FULL, SMOKE, Protocol, Run, beyond
from helpers.commands import parsed
from helpers.paths import ROOT

PART = replace(FULL, families=FULL.families[:1], arms=FULL.arms[:2])


def finished(protocol: Protocol, area: Any, failed: Any = lambda run: False) -> dict[Run, Record]:
    """The records of a whole study, where a run of (arm, lr, weight) has `area` under its train EM."""
    records: dict[Run, Record] = {}
    while True:
        wanted = [run for run in protocol.wanted(records, records.__contains__) if run not in records]
        if not wanted:
            return records
        for run in wanted:
            status = "failed" if failed(run) else "ok"
            records[run] = {"status": status, "train_em": [] if run.is_cold_start else [area(run)] * 3}


def peak(rate: float, weight: float) -> Any:
    def area(run: Run) -> float:
        at = -abs(run.lr - rate) - (0.01 * abs(run.weight - weight) if run.arm != "grpo" else 0)
        return 0.5 + at

    return area


def chosen(records: dict[Run, Record], arm: str) -> set[tuple[Any, Any]]:
    return {(run.lr, run.weight) for run in records if run.arm == arm and run.phase == "report"}


def tried(records: dict[Run, Record], arm: str) -> list[tuple[Any, Any]]:
    return list(dict.fromkeys((run.lr, run.weight) for run in records if run.arm == arm and run.phase == "tuning"))


def test_the_arms_are_tuned_and_compared_on_paired_worlds_and_seeds() -> None:
    records = finished(PART, peak(1e-3, -0.05))
    assert sum(run.is_cold_start for run in records) == 3
    assert chosen(records, "grpo") == {(1e-3, 0.0)}
    assert tried(records, "grpo") == [(rate, 0.0) for rate in FULL.rates], "an interior optimum needs no more"
    grid = [(rate, weight) for rate in (8.4e-4, 1.2e-3) for weight in (-0.02, -0.05, -0.1)]
    assert tried(records, "entropy_penalty")[:6] == grid
    pairs = {(run.world_seed, run.seed) for run in records if run.phase == "report"}
    assert pairs == {(world, seed) for world in (0, 1, 2) for seed in (100, 101, 102, 103)}
    assert sum(run.phase == "report" for run in records) == 24
    assert {(run.world_seed, run.seed) for run in records if run.phase == "tuning"} == {(0, 0), (0, 1)}


@pytest.mark.parametrize(
    ("peak_at", "rates", "best"),
    [(2.9e-3, [2.9e-3, 4.2e-3], 2.9e-3), (1e-2, [2.9e-3, 4.2e-3], 4.2e-3), (1e-5, [2.4e-4, 1.6e-4], 1.6e-4)],
)
def test_a_best_rate_at_the_edge_extends_the_grid_as_far_as_allowed(
    peak_at: float, rates: list[float], best: float
) -> None:
    records = finished(PART, peak(peak_at, -0.05))
    assert [rate for rate, _ in tried(records, "grpo")[6:]] == rates
    assert chosen(records, "grpo") == {(best, 0.0)}


def test_every_arm_has_the_same_budget() -> None:
    protocol = replace(FULL, families=FULL.families[:1])
    records = finished(protocol, lambda run: run.lr - abs(run.weight or 0))  # always at an edge
    counts = {arm.name: len(tried(records, arm.name)) for arm in protocol.arms}
    assert set(counts.values()) == {8}
    assert len([run for run in records if run.phase == "tuning"]) == 8 * 2 * len(protocol.arms)


def test_the_grid_goes_on_past_the_edge_of_the_best() -> None:
    grid = [(lr, weight) for lr in (1e-3, 2e-3) for weight in (0.1, 0.3, 1.0)]
    assert beyond(grid, (1e-3, 1.0)) == (1e-3, 3.3) and beyond(grid, (1e-3, 0.1)) == (1e-3, 0.033)
    assert beyond(grid, (2e-3, 0.3)) == (4e-3, 0.3) and beyond(grid, (1e-3, 0.3)) == (5e-4, 0.3)
    assert beyond([(1e-3, -0.05), (1e-3, -0.1)], (1e-3, -0.1)) == (1e-3, -0.2)
    assert beyond([*grid, (4e-3, 0.3)], (2e-3, 0.3)) is None


def test_a_setting_that_failed_on_a_seed_is_not_chosen() -> None:
    records = finished(
        PART, peak(1e-3, -0.05), failed=lambda run: run.phase == "tuning" and run.lr == 1e-3 and run.seed
    )
    assert chosen(records, "grpo") == {(7e-4, 0.0)} and chosen(records, "entropy_penalty")
    lost = finished(PART, peak(1e-3, -0.05), failed=lambda run: run.phase == "tuning" and run.arm == "entropy_penalty")
    assert chosen(lost, "grpo") and not chosen(lost, "entropy_penalty")


def test_nothing_starts_from_a_cold_start_that_is_not_there() -> None:
    assert all(run.is_cold_start for run in FULL.wanted({}, lambda run: False))
    assert len(set(FULL.wanted({}, lambda run: False))) == 6, "sparse and dense share theirs"
    only = FULL.cold_start(FULL.families[0], 1)
    assert {run.world_seed for run in FULL.wanted({}, lambda run: run == only) if not run.is_cold_start} == set()


def test_the_command_line_takes_each_arm_and_arms_differ_in_what_they_say_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs = {}
    for arm in FULL.arms:
        run = Run("sparse", arm.name, 2, 101, "report", 0.0014, arm.weights[-1])
        config = configs[arm.name] = parsed(FULL.arguments(run, "r"), monkeypatch, capsys)
        data = config["data"]["init_args"]
        assert (config["seed_everything"], data["world_seed"], data["batch_size"]) == (101, 2, 16)
        assert data["hop_mix"] == [0, 0, 1] and config["model"]["optimizer"]["init_args"]["lr"] == 0.0014
        assert config["model"]["model_name_or_path"] == "r/cold_start/dense-world2/model"
        assert config["trainer"]["max_steps"] == 30 and config["trainer"]["val_check_interval"] == 5
        assert config["rollout"]["group_size"] == 5
        is_taught = arm.name.startswith("sd")
        assert config["jsd"]["weight"] == (arm.weights[-1] if is_taught else arm.name == "rlsd")
        assert config["model"]["entropy_coef"]["query"] == (-0.1 if arm.name == "entropy_penalty" else 0)
        has_credit = arm.name in ("evidence_credit", "information_gain")
        assert ("LexicalEvidence" in str(config["rollout"]["credit"])) == (arm.name == "evidence_credit")
        assert ("InformationGain" in str(config["rollout"]["credit"])) == (arm.name == "information_gain")
        assert config["credit"]["weight"] == (arm.weights[-1] if has_credit else 1)
        has_share = arm.name == "evidence_reward"
        assert config["rollout"]["reward"].get("init_args", {}).get("share") == (arm.weights[-1] if has_share else None)
        assert config["hindsight"]["groups"] == ("all" if arm.name == "sd_all" else "mixed")
        assert ("ShuffledLabels" in str(config["hindsight"]["block"])) == (arm.name == "sd_shuffled")
    for config in configs.values():
        del (
            config["credit"],
            config["rollout"]["credit"],
            config["rollout"]["credit_scale"],
            config["rollout"]["reward"],
        )
        del config["run"], config["jsd"]["weight"], config["model"]["entropy_coef"], config["hindsight"]
    dapo, rlsd, sdar = (configs.pop(name) for name in ("dapo", "rlsd", "sdar"))
    assert rlsd["model"]["teacher_use"]["init_args"]["mix"] == 1.0
    assert "SDAR" in str(sdar["model"]["teacher_use"]) and "ReverseKL" in str(sdar["model"]["divergence"])
    assert all(config == configs["grpo"] for config in configs.values())
    assert dapo["rollout"]["refill_attempts"] == 3 and dapo["model"]["clip_high"] == 0.28


@pytest.mark.parametrize("family", FULL.families, ids=lambda family: family.name)
def test_the_command_line_takes_each_family(
    family: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = parsed(FULL.arguments(FULL.cold_start(family, 1), "r"), monkeypatch, capsys)
    fit = parsed(FULL.arguments(Run(family.name, "grpo", 1, 0, "tuning", 1e-3, 0.0), "r"), monkeypatch, capsys)
    data, own = cold["data"]["init_args"], fit["data"]["init_args"]
    assert cold["seed_everything"] == data["world_seed"] == own["world_seed"] == 1
    shared = ("num_relations", "terms_per_relation", "demonstration_top_k", "missing_share")
    assert {key: data[key] for key in shared} == {key: own[key] for key in shared}
    mixes = [options["demonstration_hop_mix"] or options["hop_mix"] for options in (data, own)]
    assert mixes[0] == mixes[1] and fit["rollout"]["top_k"] == own["demonstration_top_k"]
    smoke = next(part for part in SMOKE.families if part.name == family.name)
    small = parsed(SMOKE.arguments(Run(smoke.name, "grpo", 0, 0, "tuning", 1e-3, 0.0), "r"), monkeypatch, capsys)
    assert small["trainer"]["max_steps"] == 2 and small["data"]["init_args"]["batch_size"] == 4


class Fake:
    """Writes what a run leaves behind."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, arguments: list[str], log: Path) -> Outcome:
        options = dict(a.removeprefix("--").split("=", 1) for a in arguments[1:] if not a.startswith("--config"))
        folder = Path(options["run.root"]) / options["run.name"]
        self.names.append(options["run.name"])
        (folder / "model").mkdir(parents=True)
        if arguments[0] == "fit":
            header = "step,rollout/exact_match,rollout/valid_action_rate,val/sampled_exact_match,val/exact_match"
            rows = ["0,,,0.1,0.1", "1,0.1,1,,", "2,0.3,1,,", "2,,,0.5,0.6"]
            (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
        return Outcome(0, 30.0, 31.0)

    def stop(self) -> None: ...


def test_the_study_runs_what_is_asked_for_and_keeps_a_line_of_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    execute = Fake()
    options = ["--smoke", "--root", str(tmp_path), "--families", "sparse", "--arms", "sd", "--workers", "2"]
    assert main(options, execute) == 0
    assert len(execute.names) == 8  # a cold start, 1 setting of GRPO, 4 of SD, 2 report runs
    assert "8 runs are done, 0 of them failed" in capsys.readouterr().out
    records = [yaml.safe_load(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    report = next(record for record in records if record["phase"] == "report" and record["arm"] == "sd")
    fields = ("family", "arm", "world_seed", "seed", "phase", "steps", "train_em", "sampled_em", "final_greedy_em")
    assert [report[name] for name in fields] == [
        "sparse",
        "sd",
        0,
        100,
        "report",
        2,
        [0.1, 0.3],
        [[0, 0.1], [2, 0.5]],
        0.6,
    ]
    assert report["cpu_seconds"] == 30.0 and report["status"] == "ok" and report["query_entropy"] == [None, None]
    assert {"lr", "weight", "valid_action_rate", "commit", "date", "command"} <= set(report)
    again = Fake()
    assert main(options, again) == 0 and again.names == []


def test_results_of_the_study_can_be_kept_by_git() -> None:
    path = study_protocol.__file__.replace("study_protocol.py", "study/results.jsonl")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode != 0
