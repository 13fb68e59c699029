"""A second command in a run folder that one is using: refused, with nothing touched; readers go on."""

import shutil

import pytest

from sdsearch_lightning.runs.lock import held_alone

pytestmark = pytest.mark.slow


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("more", [(), ("--run.overwrite", "true")])
def test_a_second_run_is_refused_in_one_line(workplace, more):
    name = ("--run.name", f"locked{len(more)}")
    folder = shutil.copytree(workplace.run("rl"), workplace.run(name[1]), symlinks=True)
    before = files_of(folder)
    with held_alone(folder):
        done = workplace.sdsearch("fit", "--config", "fit.yaml", *name, *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"error: runs/{name[1]} is in use by process ")
        assert files_of(folder) == before
        assert workplace.sdsearch("report", f"runs/{name[1]}").returncode == 0
        assert workplace.sdsearch("validate", "--config", "fit.yaml", *name, "--ckpt_path", "last").returncode == 0
    assert workplace.sdsearch("fit", "--config", "fit.yaml", *name).returncode == 0, "the lock is given up"


def test_two_evaluations_of_one_kind_do_not_mix(workplace):
    command = ("validate", "--config", "fit.yaml", "--run.name", "twice")
    with held_alone(workplace.run("twice") / "validate/runs-cold-model"):
        done = workplace.sdsearch(*command)
    assert done.returncode == 2 and "validate/runs-cold-model is in use by process" in done.stderr
    assert workplace.sdsearch(*command).returncode == 0


@pytest.mark.distributed
def test_torchrun_is_refused_too_and_told_once(workplace):
    two = ("--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy", "ddp", "--run.name", "held")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29519")
    with held_alone(workplace.run("held")):
        done = workplace.start(*torchrun, "-m", "sdsearch_lightning", "fit", "--config", "fit.yaml", *two)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and "held is in use by process" in errors[0]
    assert not workplace.run("held").exists()
