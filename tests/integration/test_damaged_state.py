"""Damaged files and full disks under the command line: one line each, and what is intact goes on."""

import pytest

from helpers.disks import small_disk
from helpers.workplace import ROOT

pytestmark = pytest.mark.slow
STOP = ("SIGTERM", "sdsearch_lightning.rollout.groups:GroupSampler.run", "8", "before")


def flip(path, position=-2000):
    contents = bytearray(path.read_bytes())
    contents[position] ^= 1
    path.write_bytes(contents)


def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before_and_one_warning(workplace):
    command = ("fit", "--config", "fit.yaml", "--run.name", "flipped")
    assert workplace.interrupted(*STOP, *command).returncode == 143
    *_, before, newest = sorted((workplace.run("flipped") / "checkpoints").glob("step_*.ckpt"))
    flip(newest, newest.stat().st_size // 2)
    resumed = workplace.sdsearch(*command)
    (warning,) = resumed.stderr.splitlines()
    assert resumed.returncode == 0 and f"after step {int(before.stem[5:])}" in resumed.stdout
    assert warning.startswith(f"warning: runs/flipped/checkpoints/{newest.name} is damaged and passed over: ")
    assert workplace.contents("flipped") == workplace.contents("rl")


NEW_RUN = ("fit", "--config", "fit.yaml", "--run.name", "new")


@pytest.mark.parametrize("command", [NEW_RUN, ("export", "--output", "out")])
def test_a_named_checkpoint_that_is_damaged_is_refused(workplace, tmp_path, command):
    path = workplace.run("rl") / "checkpoints" / "last.ckpt"
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    (place / "copy.ckpt").write_bytes(path.read_bytes())
    flip(place / "copy.ckpt")
    done = workplace.sdsearch(*command, "--ckpt_path", str(place / "copy.ckpt"))
    first, *_ = done.stderr.splitlines()
    assert done.returncode == 2 and "copy.ckpt is not what was written" in first
    assert not workplace.run("new").exists() and not (workplace.path / "out").exists()


def test_rows_that_a_power_cut_took_are_said_and_the_run_goes_on(workplace):
    command = ("fit", "--config", "fit.yaml", "--run.name", "cut")
    assert workplace.interrupted(*STOP, *command).returncode == 143
    for name in ("metrics.csv", "trajectories.jsonl"):
        path = workplace.run("cut") / name
        *lines, last = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines) + bytes(len(last) - 1) + b"\n" + bytes(5000))
    resumed = workplace.sdsearch(*command)
    warnings = resumed.stderr.splitlines()
    assert resumed.returncode == 0 and all(line.startswith("warning: runs/cut/") for line in warnings)
    assert all(any(name in line for line in warnings) for name in ("metrics.csv", "trajectories.jsonl"))


@pytest.mark.parametrize("kilobytes", [4, 40, 400, 1200])
def test_a_full_disk_ends_a_run_in_one_line_whatever_it_was_writing(workplace, kilobytes):
    with small_disk(workplace.path / f"disk{kilobytes}", kilobytes) as disk:
        command = ("fit", "--config", "fit.yaml", "--run.root", disk.name, "--run.name", "full")
        done = workplace.sdsearch(*command)
        assert done.returncode == 1, done.stderr
        assert "No space left on device" in done.stderr and "MB are free" in done.stderr.splitlines()[0]
        assert f"{disk.name}/full" in done.stderr and "Free some space" in done.stderr
        assert len(done.stderr.splitlines()) <= 2 and not list(disk.rglob("*.draft"))


def test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing(workplace):
    with small_disk(workplace.path / "small", 40) as disk:
        last = str(workplace.run("rl") / "checkpoints" / "last.ckpt")
        done = workplace.sdsearch("export", "--ckpt_path", last, "--output", "small/model")
        (line,) = done.stderr.splitlines()
        assert done.returncode == 1 and "small/model could not be written: No space left on device (" in line
        assert not list(disk.iterdir())


TWO = ("fit", "--config", "fit.yaml", "--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy", "ddp")


def test_a_disk_that_is_full_for_the_final_model_ends_both_ranks(workplace):
    command = (*TWO, "--run.name", "no_model", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0")
    done = workplace.interrupted("ENOSPC", "sdsearch_lightning.runs.model_card:write_card", "1", "before", *command)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith("MB are free). Free some space and run the same command again.")
    assert "runs/no_model/model could not be written: No space left on device (" in line
    left = workplace.run("no_model")
    assert not list(left.glob("*model*")) and not list(left.glob(".*")) and not (left / "summary.json").exists()
    assert sorted(path.name for path in (left / "checkpoints").iterdir()) == ["last.ckpt", "step_00000002.ckpt"]


def test_a_disk_that_is_full_for_one_rank_ends_both(workplace):
    command = (*TWO, "--run.name", "one_rank")
    writes = "sdsearch_lightning.callbacks.trajectory_log:append_records"
    done = workplace.interrupted("ENOSPC@1", writes, "5", "before", *command)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and str(ROOT) not in line
    assert line.startswith(
        "error: runs/one_rank/trajectories.rank1.jsonl could not be written: No space left on device"
    )
