"""The commands from end to end: what they write, how they start again, how they end."""

import json
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SAVING = "sdsearch_lightning.callbacks.run_checkpoint:RunCheckpoint.on_train_batch_end"
LOGGING = "sdsearch_lightning.runs.metrics_logger:MetricsLogger.log_metrics"
ROLLOUTS = "sdsearch_lightning.rollout.groups:GroupSampler.run"
VALIDATION = "sdsearch_lightning.module:SDSearchModule.validation_step"


def test_the_cold_start_leaves_a_model_a_summary_and_two_lines(workplace):
    assert {path.name for path in workplace.run("cold").iterdir()} == {
        "config.yaml", "metrics.csv", "checkpoints", "model", "summary.json",
    }  # fmt: skip
    summary = json.loads((workplace.run("cold") / "summary.json").read_text())
    assert (summary["steps"], summary["seed"]) == (96, 0)
    assert summary["train_loss"]["last"] < summary["train_loss"]["first"]
    assert len((workplace.path / "supervise.out").read_text().splitlines()) == 2


def test_fit_writes_the_run_folder_of_the_contract(workplace):
    assert {path.name for path in workplace.run("rl").iterdir()} == {
        "config.yaml", "metrics.csv", "checkpoints", "trajectories.jsonl", "report.html", "summary.json", "model",
    }  # fmt: skip
    assert "exact match, greedy" in (workplace.path / "fit.out").read_text()
    summary = json.loads((workplace.run("rl") / "summary.json").read_text())
    assert summary["decoding"] == {"greedy": True, "max_searches": 2}
    assert (summary["seed"], summary["questions"]) == (0, 4)
    assert None not in summary["exact_match"].values(), "measured before the first and after the last step"


def test_it_validates_at_step_0_each_interval_and_once_at_the_end(workplace):
    rows = workplace.metrics("rl")
    assert [row["step"] for row in rows if row["val/exact_match"]] == list("0368")
    assert [row["step"] for row in rows if row["train/loss"]] == list("12345678")


def test_the_seed_reaches_every_group_and_the_configuration_can_be_used_again(workplace):
    config = yaml.safe_load((workplace.run("rl") / "config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert config["trainer"]["inference_mode"] is False
    done = workplace.sdsearch("fit", "--config", "runs/rl/config.yaml")
    assert done.returncode == 0 and "finished" in done.stdout


@pytest.mark.parametrize(
    "signal, target, nth, when, code, step",
    [
        ("SIGKILL", SAVING, 4, "after", -9, 2),  # saved, but not yet its row
        ("SIGKILL", LOGGING, 6, "after", -9, 2),  # with its row, but not yet published
        ("SIGKILL", VALIDATION, 3, "after", -9, 5),  # in the validation of the step that was saved
        ("SIGKILL", ROLLOUTS, 10, "before", -9, 6),  # in the long work of the next step
        ("SIGKILL", VALIDATION, 4, "before", -9, 8),  # trained, but not yet evaluated
        ("SIGKILL", "sdsearch_lightning.module:SDSearchModule.save_pretrained", 1, "after", -9, 8),
        ("SIGKILL", ROLLOUTS, 2, "after", -9, None),  # before the first checkpoint
        ("SIGTERM", ROLLOUTS, 4, "after", 143, 3),  # a validation is due at this step
        ("SIGINT", ROLLOUTS, 6, "after", 130, 4),
        ("SIGTERM", ROLLOUTS, 1, "after", 143, None),  # in the validation at step 0
    ],
)
def test_a_run_that_is_killed_and_started_again_equals_one_that_is_not(
    workplace, signal, target, nth, when, code, step
):
    name = f"{signal}-{target.rpartition('.')[2]}-{nth}"
    arguments = ("fit", "--config", "fit.yaml", "--run.name", name)
    stopped = workplace.interrupted(signal, target, str(nth), when, *arguments)
    assert stopped.returncode == code, stopped.stderr
    if signal != "SIGKILL":
        assert "stop" in stopped.stderr and len([line for line in stopped.stderr.splitlines() if line]) <= 2
    resumed = workplace.sdsearch(*arguments)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert (f"resuming runs/{name} after step {step}" in resumed.stdout) == (step is not None)
    assert workplace.contents(name) == workplace.contents("rl")


def test_the_comparison_above_can_fail(workplace):
    done = workplace.sdsearch("fit", "--config", "fit.yaml", "--run.name", "seed1", "--seed_everything", "1")
    assert done.returncode == 0
    assert workplace.metrics("seed1") != workplace.metrics("rl")


def test_a_finished_run_is_reported_not_redone(workplace):
    before = (workplace.run("rl") / "summary.json").stat().st_mtime_ns
    done = workplace.sdsearch("fit", "--config", "fit.yaml")
    assert done.returncode == 0
    assert "runs/rl holds this run, finished" in done.stdout and "exact match, greedy" in done.stdout
    assert (workplace.run("rl") / "summary.json").stat().st_mtime_ns == before
    again = workplace.sdsearch("supervise", "--config", "cold.yaml")
    assert again.returncode == 0 and "train/loss" in again.stdout


def test_another_seed_in_the_same_folder_is_refused(workplace):
    done = workplace.sdsearch("fit", "--config", "fit.yaml", "--seed_everything", "5")
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert "seed_everything is 0 there, 5 now" in first and "--run.name" in second


def test_overwrite_starts_anew_and_fast_dev_run_leaves_the_folder_alone(workplace):
    short = (
        "fit",
        "--config",
        "fit.yaml",
        "--run.name",
        "short",
        "--trainer.max_steps",
        "1",
        "--jsd.warmup_steps",
        "0",
    )
    assert workplace.sdsearch(*short).returncode == 0
    again = workplace.sdsearch(*short, "--jsd.weight", "0", "--run.overwrite", "true")
    assert again.returncode == 0 and "resuming" not in again.stdout
    assert workplace.metrics("short")[1]["distill/weight"] == "0.0"
    files = {path: path.stat().st_mtime_ns for path in workplace.run("short").rglob("*")}
    assert workplace.sdsearch(*short, "--trainer.fast_dev_run", "1").returncode == 0
    assert files == {path: path.stat().st_mtime_ns for path in workplace.run("short").rglob("*")}


def test_configurations_compose_and_the_later_one_wins(workplace):
    (workplace.path / "more.yaml").write_text("rollout: {group_size: 2}\ndata: {num_val_questions: 3}\n")
    done = workplace.sdsearch(
        "fit", "--config", "fit.yaml", "--config", "more.yaml", "--jsd.warmup_steps", "7", "--print_config"
    )
    config = yaml.safe_load(done.stdout)
    assert config["rollout"]["group_size"] == 2 and config["rollout"]["max_searches"] == 2
    assert config["data"]["init_args"]["num_val_questions"] == 3 and config["data"]["init_args"]["batch_size"] == 4
    assert config["jsd"] == {"weight": 0.1, "warmup_steps": 7, "schedule": None}


def test_validations_come_every_so_many_steps_also_where_an_epoch_has_fewer(workplace):
    done = workplace.sdsearch(
        "fit", "--config", "fit.yaml", "--trainer.check_val_every_n_epoch", "1", "--run.name", "by_steps"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert workplace.metrics("by_steps") == workplace.metrics("rl")


@pytest.mark.parametrize("command, rows", [("validate", "val/exact_match"), ("test", "test/"), ("predict", None)])
def test_evaluation_takes_the_weights_that_are_asked_for_and_keeps_out_of_the_run(workplace, command, rows):
    before = workplace.metrics("rl")
    done = workplace.sdsearch(command, "--config", "fit.yaml", "--ckpt_path", "last")
    assert (done.returncode, done.stderr) == (0, "")
    assert workplace.metrics("rl") == before
    assert (workplace.run("rl") / command / "step_00000008/trajectories.jsonl").stat().st_size > 0
    if rows is not None:
        (row,) = workplace.metrics(f"rl/{command}/step_00000008")
        assert any(key.startswith(rows) for key in row) and row["step"] == "8"


def test_validate_of_the_last_checkpoint_equals_the_last_validation_of_the_run(workplace):
    assert workplace.sdsearch("validate", "--config", "fit.yaml", "--ckpt_path", "last").returncode == 0
    (row,) = workplace.metrics("rl/validate/step_00000008")
    last = workplace.metrics("rl")[-1]
    scores = {key: value for key, value in row.items() if key.startswith("val/")}
    assert scores == {key: last[key] for key in scores}


def test_without_a_checkpoint_it_says_whose_weights_these_are(workplace):
    done = workplace.sdsearch("validate", "--config", "fit.yaml")
    assert "initial weights" in done.stdout.splitlines()[0] and "--ckpt_path last" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("run", ["rl", "cold"])
def test_export_equals_the_model_folder(workplace, tmp_path, run):
    output = tmp_path / "model"
    done = workplace.sdsearch("export", "--ckpt_path", f"runs/{run}/checkpoints/last.ckpt", "--output", str(output))
    assert (done.returncode, done.stderr) == (0, "")
    exported, saved = load_file(output / "model.safetensors"), load_file(workplace.run(run) / "model/model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[key], saved[key]) for key in saved)
    assert (output / "tokenizer.json").read_text() == (workplace.run(run) / "model/tokenizer.json").read_text()
    again = workplace.sdsearch("export", "--ckpt_path", f"runs/{run}/checkpoints/last.ckpt", "--output", str(output))
    assert again.returncode == 2 and "exists already" in again.stderr


def test_report_prints_a_run_again(workplace):
    done = workplace.sdsearch("report", "runs/rl")
    assert done.returncode == 0 and "exact match, greedy" in done.stdout


def test_help_and_version_are_fast_and_import_nothing_heavy(workplace):
    for option in ("--help", "--version"):
        started = time.perf_counter()
        done = workplace.start("-m", "sdsearch_lightning", option)
        assert time.perf_counter() - started < 0.5
        assert (done.returncode, done.stderr) == (0, "") and done.stdout
    loaded = workplace.start("-c", "import sys, sdsearch_lightning.__main__; print('torch' in sys.modules)")
    assert loaded.stdout.strip() == "False"


def test_a_checkpoint_path_does_not_overrule_the_configuration(workplace):
    """Lightning's own `_parse_ckpt_path` would; a private hook, so its place in this version is pinned here."""
    from lightning.pytorch.cli import LightningCLI

    from sdsearch_lightning.cli.training import RunCLI

    assert RunCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path
    done = workplace.sdsearch(
        "fit", "--config", "fit.yaml", "--run.name", "more", "--trainer.max_steps", "9", "--model.clip_low", "0.1",
        "--ckpt_path", "runs/rl/checkpoints/last.ckpt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((workplace.run("more") / "config.yaml").read_text())["model"]["clip_low"] == 0.1
    assert [row["step"] for row in workplace.metrics("more") if row["train/loss"]] == ["9"]
