"""Two processes: launched, stopped, killed and resumed; whatever happens, all end, one says why, and the run goes on.

`Workplace.start` sees to it that no process is left behind.
"""

import json
import shutil

import pytest

from benchmarks.kill_and_resume import differences

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
ROLLOUTS = "sdsearch_lightning.rollout.groups:GroupSampler.run"
FIT = ("fit", "--config", "fit.yaml", "--trainer.max_steps", "4")
TWO = (*FIT, "--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy")
TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--master_port",
    "29517",
    "-m",
    "sdsearch_lightning",
)


def errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(workplace):
    """A run on two processes that torchrun started and nothing interrupted."""
    done = workplace.start(*TORCHRUN, *TWO, "ddp", "--run.name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exact match, greedy") == 1
    return workplace.contents("two")


def test_torchrun_writes_what_a_run_leaves_and_reports_it_again(workplace, whole):
    assert {path.name for path in workplace.run("two").iterdir()} == {
        "config.yaml", "metrics.csv", "checkpoints", "trajectories.jsonl", "trajectories.rank1.jsonl", "report.html",
        "summary.json", "model",
    }  # fmt: skip
    again = workplace.start(*TORCHRUN, *TWO, "ddp", "--run.name", "two")
    assert again.returncode == 0 and again.stdout.count("holds this run, finished") == 1


def test_torchrun_tells_a_mistake_once(workplace):
    done = workplace.start(*TORCHRUN, *TWO, "ddp", "--run.name", "two", "--model.clip_low", "0.3")
    assert done.returncode == 1  # torchrun's own
    assert len(errors(done)) == 1 and "model.clip_low is 0.2 there, 0.3 now" in errors(done)[0]
    assert "exitcode  : 2" in done.stderr


def test_a_signal_to_both_ranks_stops_both_at_one_step(workplace, whole):
    command = (*TWO, "ddp", "--run.name", "stopped")
    stopped = workplace.interrupted("SIGTERM", ROLLOUTS, "4", "before", *command)
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("SIGTERM: stopping") == stopped.stderr.count("stopped after step 3") == 1
    resumed = workplace.start("-m", "sdsearch_lightning", *command)
    assert resumed.returncode == 0 and "after step 3" in resumed.stdout
    assert differences(workplace.contents("stopped"), whole) == ["file names"], "it has a checkpoint of step 3"


def test_a_rank_that_is_killed_is_named_and_the_run_goes_on(workplace, whole):
    command = (*TWO, "ddp", "--run.name", "killed")
    killed = workplace.interrupted("SIGKILL@1", ROLLOUTS, "5", "after", *command)
    (line,) = errors(killed)
    assert killed.returncode == 1 and "Traceback" not in killed.stderr
    assert "rank 1 (process " in line and "was killed by SIGKILL" in line
    assert line.endswith("Run the same command again: it goes on after step 2.")
    resumed = workplace.start("-m", "sdsearch_lightning", *command)
    assert resumed.returncode == 0 and "after step 2" in resumed.stdout
    assert workplace.contents("killed") == whole


def test_without_rank_0_the_others_end_and_one_process_goes_on_with_the_same_questions(workplace, whole):
    killed = workplace.interrupted("SIGKILL@0", ROLLOUTS, "5", "after", *TWO, "ddp", "--run.name", "alone")
    (line,) = errors(killed)
    assert killed.returncode == -9 and "Traceback" not in killed.stderr
    assert line.startswith("error: rank 0 (process ") and "died" in line

    resumed = workplace.sdsearch(*FIT, "--data.batch_size", "4", "--run.name", "alone")
    assert resumed.returncode == 0 and "after step 2" in resumed.stdout, resumed.stderr
    assert_close(workplace, "alone", "two")


def assert_close(workplace, name, other):
    """The same rollouts of the same questions, and equal metrics up to rounding: sums over ranks have another order."""
    for mine, theirs in zip(workplace.metrics(name), workplace.metrics(other), strict=True):
        names = ("train/loss", "rollout/reward", "val/exact_match")
        got, expected = ([float(row[name] or 0) for name in names] for row in (mine, theirs))
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert rollouts(workplace.run(name)) == rollouts(workplace.run(other))


def rollouts(folder):
    """All lines, of all ranks, by what they are."""
    lines = [json.loads(line) for path in folder.glob("trajectories*") for line in path.read_text().splitlines()]
    ids = [[line["phase"], line["step"], line["instance_id"], line["rollout_index"], line["answer"]] for line in lines]
    return sorted(ids, key=str)


def test_an_error_on_one_rank_is_shown_and_ends_both(workplace):
    target = "sdsearch_lightning.module:SDSearchModule.training_step"
    done = workplace.interrupted("ValueError@1", target, "1", "before", *TWO, "ddp", "--run.name", "broken")
    assert done.returncode == 1
    assert "ValueError: injected" in done.stderr and done.stderr.count("Traceback") == 1
    (line,) = errors(done)
    assert "rank 1" in line and "ended with exit code 1 (its error stands above)" in line and "starts anew" in line


def test_a_full_disk_of_rank_0_stops_both(workplace):
    target = "sdsearch_lightning.checkpoints.writing:PlainFiles.save_checkpoint"
    done = workplace.interrupted("ENOSPC@0", target, "2", "after", *TWO, "ddp", "--run.name", "full2")
    (line,) = errors(done)
    assert done.returncode == 1 and "the checkpoint of step 4 could not be saved" in line and "No space left" in line
    assert sorted(path.name for path in (workplace.run("full2") / "checkpoints").iterdir()) == [
        "last.ckpt", "step_00000002.ckpt",
    ]  # fmt: skip


def test_sharded_runs_resume_exactly_after_a_full_disk_and_so_does_one_process(workplace, whole):
    command = (*TWO, "fsdp2", "--run.name")
    target = "torch.distributed.checkpoint.filesystem:FileSystemWriter.write_data"
    full = workplace.interrupted("ENOSPC@1", target, "2", "after", *command, "shards-cut")
    (line,) = errors(full)
    assert full.returncode == 1 and "the checkpoint of step 4 could not be saved" in line and "No space left" in line
    folder = workplace.run("shards-cut")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "step_00000002.ckpt"]
    shutil.copytree(folder, workplace.run("shards-one"), symlinks=True)

    resumed = workplace.start("-m", "sdsearch_lightning", *command, "shards-cut")
    assert resumed.returncode == 0 and "after step 2" in resumed.stdout
    uninterrupted = workplace.start("-m", "sdsearch_lightning", *command, "shards")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert workplace.contents("shards-cut") == workplace.contents("shards")

    alone = workplace.sdsearch(*FIT, "--data.batch_size", "4", "--run.name", "shards-one")
    assert alone.returncode == 0 and "after step 2" in alone.stdout, alone.stderr
    assert_close(workplace, "shards-one", "shards")
