"""The study resumes, chooses, pairs and hides nothing. No run is real here: a fake writes planted curves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study_core
from benchmarks.processes import Outcome, Processes
from benchmarks.runner import StudyError
from benchmarks.study_core import Study, main
from benchmarks.study_plan import FULL, SMOKE, Run
from benchmarks.study_table import render

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
    records[-1]["commit"] = "other"
    study = Study(FULL, str(tmp_path), Fake())
    runs = [Run(*(record[name] for name in Run.__slots__)) for record in records]
    table = render(dict(zip(runs, records, strict=True)), runs, FULL)
    assert "Code **(several: do not compare)**" in table
    assert study.runner.records.keys() == set(runs)


def test_arms_that_do_not_start_alike_are_told(tmp_path: Path) -> None:
    run(tmp_path, Fake())
    records = {Run(*(line[name] for name in Run.__slots__)): line for line in lines(tmp_path)}
    compared = [run for run in records if run.stage == "comparison"]
    for run_ in compared:
        records[run_]["measures"]["sampled_start"] = 0.09 if run_.seed != 3 or run_.arm != "sd_all" else 0.1
    table = render(records, compared, FULL)
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
