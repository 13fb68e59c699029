"""The study: its statistics and its commands; that it resumes, chooses, pairs and hides nothing. No run is real."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package
    sys.path.append(str(ROOT))

from benchmarks import study_core  # noqa: E402
from benchmarks.measures import (  # noqa: E402
    T_975,
    area_under,
    mean,
    measure,
    paired_difference,
    step_reaching,
    t_quantile,
)
from benchmarks.study_core import Outcome, Processes, Study, StudyError, main  # noqa: E402
from benchmarks.study_plan import COLD_START, FULL, SMOKE, Run  # noqa: E402
from benchmarks.study_table import render  # noqa: E402
from sdsearch_lightning import commands  # noqa: E402
from sdsearch_lightning.errors import DataError  # noqa: E402
from sdsearch_lightning.report.metrics import Point  # noqa: E402

BEST_RATE, GAIN = 1e-3, {"grpo": 0.0, "entropy_penalty": 0.05, "sd_all": -0.02, "sd_mixed": 0.06}
BEST_WEIGHT = {"grpo": 0.0, "entropy_penalty": -0.05, "sd_all": 0.1, "sd_mixed": 0.3}
SPREAD = (0.00, 0.01, -0.01, 0.02)
"""What a paired seed adds to the gain of SD-Search."""


class Fake:
    """Writes the metrics.csv of a run with a planted area under its curves; some runs fail."""

    def __init__(self, failing: Sequence[str] = (), stop_at: int | None = None) -> None:
        self.failing, self.stop_at = failing, stop_at
        self.names: list[str] = []
        self.stopped = False

    def __call__(self, arguments: Sequence[str], log: Path) -> Outcome:
        options = dict(a.removeprefix("--").split("=", 1) for a in arguments[1:] if not a.startswith("--config"))
        name, root, seed = options["run.name"], Path(options["run.root"]), int(options["seed_everything"])
        self.names.append(name)
        log.write_text(f"first line\n{name} ends here\n")
        if self.stop_at is not None and len(self.names) >= self.stop_at:
            return Outcome(130, 1.0, 1.0)
        if any(part in name for part in self.failing):
            return Outcome(1, 2.0, 2.5)
        folder = root / name
        if arguments[0] == "supervise":
            (folder / "model").mkdir(parents=True, exist_ok=True)
            return Outcome(0, 80.0, 81.0)
        folder.mkdir(parents=True, exist_ok=True)
        arm = Path(arguments[3].removeprefix("--config=")).stem
        key = "model.entropy_coef.query" if arm == "entropy_penalty" else "jsd.weight"
        off = float(options["model.optimizer.init_args.lr"]) != BEST_RATE
        off += float(options[key]) != BEST_WEIGHT[arm]
        start, level = (
            0.1 + 0.002 * seed,
            0.4 + GAIN[arm] - 0.1 * off + 0.002 * seed + (SPREAD[seed] if arm == "sd_mixed" and seed < 4 else 0),
        )
        last = int(options.get("trainer.max_steps", 40))
        between = level + (level - start) / 2 / (last - 1)  # so that the area is the level
        curve = [start, *[between] * (last - 1), level]
        rows = [f"{step},{value},{value + 0.2},{0.9 - 0.01 * step}" for step, value in enumerate(curve)]
        header = "step,val/sampled_exact_match,val/exact_match,train/query_entropy"
        (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
        return Outcome(0, 36.0 + (9.0 if arm == "sd_mixed" else 0.0), 40.0)

    def stop(self) -> None:
        self.stopped = True


def run(folder: Path, execute: Fake, *options: str) -> int:
    return main(["--root", str(folder), *options], execute)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def row(table: str, *cells: str) -> list[str]:
    """The first row that starts with `cells`."""
    start = f"| {' | '.join(cells)} | "
    return next(line for line in table.splitlines() if line.startswith(start))[2:-2].split(" | ")


def test_t_quantiles_hold_95_percent_of_the_distribution() -> None:
    for degrees in range(1, len(T_975) + 1):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        for shift, holds in ((0.0, True), (0.02, False), (-0.02, False)):
            bound, parts = t_quantile(degrees) + shift * t_quantile(degrees), 4000
            xs = [-bound + 2 * bound * (i + 0.5) / parts for i in range(parts)]
            share = sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) for x in xs) * 2 * bound / parts
            assert (abs(share - 0.95) < 2e-4) is holds, (degrees, share)
    assert t_quantile(3) == pytest.approx(3.182, abs=5e-4)
    for degrees in (0, len(T_975) + 1):
        with pytest.raises(ValueError, match=f"found {degrees}"):
            t_quantile(degrees)


def test_a_paired_difference_is_of_pairs() -> None:
    found = paired_difference([0.5, 0.7, 0.6, 0.9], [0.4, 0.6, 0.4, 0.7])  # differences .1 .1 .2 .2
    assert found is not None and found.n == 4
    assert found.mean == pytest.approx(0.15)
    assert found.half_width == pytest.approx(3.1824 * math.sqrt(0.01 / 3) / 2)
    reordered = paired_difference([0.5, 0.7, 0.6, 0.9], [0.7, 0.4, 0.6, 0.4])
    assert reordered is not None and reordered.half_width is not None
    assert reordered.half_width > 2 * found.half_width, "other pairs, another spread"
    single = paired_difference([0.5], [0.4])
    assert single is not None and single.half_width is None
    assert paired_difference([0.5, None], [0.4, 0.3]) is paired_difference([], []) is None
    assert mean([1.0, None]) is mean([]) is None and mean([1.0, 2.0]) == 1.5


def test_the_area_is_a_mean_height_over_uneven_steps() -> None:
    curve = [Point(0, 0.0), Point(10, 0.4), Point(40, 1.0)]
    assert area_under(curve, 40) == pytest.approx((10 * 0.2 + 30 * 0.7) / 40)
    for broken in (curve[1:], curve[:2], curve[:1], [], [curve[0], curve[1], *curve[1:]]):
        with pytest.raises(DataError, match="expected evaluations from step 0 to step 40"):
            area_under(broken, 40)


def test_the_step_that_reaches_a_level_is_read_off_a_line() -> None:
    curve = [Point(0, 0.1), Point(5, 0.3), Point(10, 0.7), Point(15, 0.4)]
    assert step_reaching(curve, 0.5) == pytest.approx(7.5)
    assert step_reaching(curve, 0.3) == 5 and step_reaching(curve, 0.1) == 0
    assert step_reaching(curve, 0.71) is None and step_reaching([], 0.5) is None


def test_the_entropy_is_of_the_last_steps_and_may_be_missing(tmp_path: Path) -> None:
    rows = ["step,val/sampled_exact_match,val/exact_match,train/query_entropy", "0,0.1,0.2,"]
    rows += [f"{step},,,{9 if step < 6 else step / 10}" for step in range(1, 11)] + ["10,0.6,0.8,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    found = measure(tmp_path, 10)
    assert found["query_entropy"] == pytest.approx(0.8)  # of steps 6 to 10
    assert (found["sampled_start"], found["sampled_end"], found["greedy_end"]) == (0.1, 0.6, 0.8)
    assert found["sampled_area"] == pytest.approx(0.35) and found["greedy_area"] == pytest.approx(0.5)
    (tmp_path / "metrics.csv").write_text("\n".join(line.rpartition(",")[0] for line in rows) + "\n")
    without = measure(tmp_path, 10)
    assert without == found | {"query_entropy": None}


def test_the_study_tunes_on_seeds_of_its_own_and_compares_what_it_chose(tmp_path: Path) -> None:
    fake = Fake()
    assert run(tmp_path, fake) == 0
    assert len(fake.names) == len(set(fake.names)) == FULL.num_runs == 41
    assert fake.names[0] == "cold_start"
    assert set(FULL.tuning_seeds).isdisjoint(FULL.seeds)
    assert all(name.startswith("tuning/grpo") for name in fake.names[1:9]), "the learning rate first, for GRPO"
    compared = [line for line in lines(tmp_path) if line["stage"] == "comparison"]
    assert len(compared) == 16 and {line["lr"] for line in compared} == {BEST_RATE}
    assert {line["arm"]: line["weight"] for line in compared} == BEST_WEIGHT
    assert all(sum(line["seed"] == seed for line in compared) == 4 for seed in range(4))


def test_the_table_holds_means_intervals_and_every_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, Fake())
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "smoke test of the evidence" in table and "n = 4 paired seeds, one world, one cold start" in table
    assert "p of 0.125" in table
    assert row(table, "GRPO")[1:6] == ["0.001", "0", "4", "0.403", "0.603"]
    mixed = row(table, "SD-Search, mixed groups")
    # gains .06 .07 .05 .08: mean .065, standard deviation .01291, half of the interval 3.1824 * .01291 / 2
    assert mixed[1:5] == ["0.001", "0.3", "4", "0.468 (+0.065 ± 0.021)"]
    assert mixed[10] == "45.0 (+9.0 ± 0.0)"
    assert mixed[8] == "–", "sampled EM never reached a half in seed 0"
    pairs = [row(table, "SD-Search, mixed groups", str(seed))[2] for seed in range(4)]
    assert pairs == ["+0.060", "+0.070", "+0.050", "+0.080"]
    assert row(table, "SD-Search, all groups", "2")[2:4] == ["-0.020", "-0.020"]
    assert row(table, "GRPO", "0.001", "0", "0.600")[3:] == ["0.600", "0.602", "0.601", "chosen"]
    assert row(table, "SD-Search, all groups", "0.001", "0.1", "0.580")[-1] == "chosen, at the edge of the grid"
    assert table.count("python -m sdsearch_lightning") == 5 and "torch" in table
    assert "Failed runs: none. Runs not done: none." in table and "several" not in table and "Not paired" not in table


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    run(tmp_path, Fake())
    whole = (tmp_path / "results.jsonl").read_text()
    table = (tmp_path / "table.md").read_text()
    again = Fake()
    assert run(tmp_path, again) == 0 and again.names == []
    kept = whole.splitlines(keepends=True)[:20]
    (tmp_path / "results.jsonl").write_text("".join(kept) + '{"stage": "comp')  # killed while it wrote a line
    more = Fake()
    assert run(tmp_path, more) == 0 and len(more.names) == 21
    strip = [{k: v for k, v in line.items() if k != "date"} for line in lines(tmp_path)]
    known = [{k: v for k, v in json.loads(line).items() if k != "date"} for line in whole.splitlines()]
    assert sorted(strip, key=str) == sorted(known, key=str)
    assert row((tmp_path / "table.md").read_text(), "GRPO") == row(table, "GRPO")
    (tmp_path / "cold_start" / "model").rmdir()
    cold = Fake()
    assert run(tmp_path, cold) == 0 and cold.names == ["cold_start"]


def test_a_failed_run_is_kept_told_and_done_again_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "comparison/sd_mixed-lr0.001-weight0.3-seed2"
    assert run(tmp_path, Fake([bad])) == 1
    (failed,) = [line for line in lines(tmp_path) if line["status"] == "failed"]
    assert failed["seed"] == 2 and failed["exit_code"] == 1 and failed["last_lines"][-1] == f"{bad} ends here"
    table = (tmp_path / "table.md").read_text()
    assert "Failed runs: 1." in table and f"{bad} ends here" in table
    assert row(table, "SD-Search, mixed groups")[3] == "3", "the others are still compared, and counted"
    assert row(table, "SD-Search, mixed groups")[4] == "0.473 (+0.070 ± 0.025)"  # pairs of seeds 0, 1, 3
    assert row(table, "SD-Search, mixed groups", "2")[2] == "–"
    assert f"{bad} ends here" in capsys.readouterr().out
    idle = Fake()
    assert run(tmp_path, idle) == 1 and idle.names == []
    retry = Fake()
    assert run(tmp_path, retry, "--retry-failed") == 0 and retry.names == [bad]
    assert len(lines(tmp_path)) == 42, "both lines stay"
    assert row((tmp_path / "table.md").read_text(), "SD-Search, mixed groups")[3] == "4"


def test_a_setting_that_failed_on_a_seed_is_not_chosen(tmp_path: Path) -> None:
    run(tmp_path, Fake([f"tuning/grpo-lr{BEST_RATE:g}-weight0-seed101"]))
    compared = {line["lr"] for line in lines(tmp_path) if line["stage"] == "comparison"}
    assert compared == {5e-4}, "the first of the others, which are alike"
    assert row((tmp_path / "table.md").read_text(), "GRPO", "0.001", "0")[3:] == ["0.600", "–", "–", ""]


@pytest.mark.parametrize(
    ("failing", "message", "count"), [("cold_start", "the cold start failed", 1), ("tuning/grpo", "tuning grpo", 9)]
)
def test_the_study_ends_where_nothing_is_left_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str, message: str, count: int
) -> None:
    fake = Fake([failing])
    assert run(tmp_path, fake) == 1 and len(fake.names) == count
    assert message in capsys.readouterr().out
    assert f"{fake.names[-1]} ends here" in (tmp_path / "table.md").read_text()


def test_a_run_that_ends_well_without_its_evaluations_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_core, "FULL", replace(FULL, max_steps=41))
    assert run(tmp_path, Fake()) == 1
    failed = [line for line in lines(tmp_path) if line["status"] == "failed"]
    assert len(failed) == 8 and "from step 0 to step 41" in failed[0]["last_lines"][-1]


def test_a_stopped_study_goes_on(tmp_path: Path) -> None:
    fake = Fake(stop_at=6)
    assert run(tmp_path, fake, "--workers", "1") == 130 and fake.stopped
    assert len(lines(tmp_path)) == 5, "a stopped run has not failed: it has no line"
    assert "Runs not done: tuning/grpo" in (tmp_path / "table.md").read_text()
    rest = Fake()
    assert run(tmp_path, rest, "--workers", "1") == 0
    assert len(rest.names) == 36 and rest.names[0] == fake.names[5]


def test_runs_of_other_commands_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Fake())
    monkeypatch.setattr(study_core, "FULL", replace(FULL, overrides=("--rollout.group_size=8",)))
    fake = Fake()
    assert run(tmp_path, fake) == 1 and fake.names == []
    out = capsys.readouterr().out
    assert "by another command" in out and "--rollout.group_size=8" in out and "--root" in out
    records = lines(tmp_path)
    records[-1]["code"] = "other"
    study = Study(FULL, str(tmp_path), Fake())
    runs = [Run(*(record[name] for name in Run.__slots__)) for record in records]
    table = render(dict(zip((run.key for run in runs), records, strict=True)), runs, FULL)
    assert "Code **(several: do not compare)**" in table
    assert study.records.keys() == {run.key for run in runs}


def test_arms_that_do_not_start_alike_are_told(tmp_path: Path) -> None:
    run(tmp_path, Fake())
    records = {Run(*(line[name] for name in Run.__slots__)): line for line in lines(tmp_path)}
    compared = [run for run in records if run.stage == "comparison"]
    for run_ in compared:
        records[run_]["measures"]["sampled_start"] = 0.09 if run_.seed != 3 or run_.arm != "sd_all" else 0.1
    table = render({run.key: record for run, record in records.items()}, compared, FULL)
    assert "**Not paired:** the arms start from different sampled EM at seed 3." in table


def test_smoke_runs_the_same_stages_at_two_steps(tmp_path: Path) -> None:
    fake = Fake()
    assert run(tmp_path, fake, "--smoke") == 0
    assert len(fake.names) == SMOKE.num_runs == 13
    assert {name.split("/")[0] for name in fake.names} == {"cold_start", "tuning", "comparison"}
    commands = [line["command"] for line in lines(tmp_path)]
    assert all("--trainer.max_steps=2" in command for command in commands)
    assert "n = 2 paired seeds" in (tmp_path / "table.md").read_text()


def test_each_command_is_printed_before_it_runs_and_sets_all_that_is_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Watching(Fake):
        def __call__(self, arguments: Sequence[str], log: Path) -> Outcome:
            told = capsys.readouterr().out
            assert f"$ OMP_NUM_THREADS=1 python -m sdsearch_lightning {' '.join(arguments)}\n" in told
            return super().__call__(arguments, log)

    assert run(tmp_path, Watching(), "--smoke", "--workers", "1") == 0


def parsed(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The configuration that the command line makes of a run's command."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_:
        commands.run([*arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


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


def test_processes_tell_exit_code_output_and_their_own_cpu_time(tmp_path: Path) -> None:
    execute = Processes()
    outcome = execute(["--version"], tmp_path / "log")
    assert outcome.exit_code == 0 and (tmp_path / "log").read_text().startswith("sdsearch ")
    assert 0 < outcome.cpu_seconds < 20 and outcome.wall_seconds > 0
    assert execute(["nonsense"], tmp_path / "log").exit_code == 2
    assert "nonsense" in (tmp_path / "log").read_text(), "errors go to the log too"


def test_processes_stop_with_the_study(tmp_path: Path) -> None:
    execute, outcomes = Processes(), []
    command = ["validate", "--help"]  # imports for seconds
    thread = threading.Thread(target=lambda: outcomes.append(execute(command, tmp_path / "log")))
    thread.start()
    while not execute._running:
        time.sleep(0.01)
    execute.stop()
    thread.join(20)
    assert [outcome.exit_code for outcome in outcomes] == [-15]
    assert execute(command, tmp_path / "log").exit_code == -15, "nothing starts after a stop"


def test_without_a_setting_that_ran_nothing_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="a run of every setting failed"):
        Study(FULL, str(tmp_path), Fake(["tuning"])).best(FULL.rate_runs())
