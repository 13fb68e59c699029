"""A second command in a run folder that one is using: refused, with nothing touched; readers go on."""

import pytest

from sdsearch_lightning.runs.lock import held_alone

pytestmark = pytest.mark.slow


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("more", [(), ("--run.overwrite", "true")])
def test_a_second_run_is_refused_in_one_line(workplace, more):
    before = files_of(workplace.run("rl"))
    with held_alone(workplace.run("rl")):
        done = workplace.sdsearch("fit", "--config", "fit.yaml", *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: runs/rl is in use by process ")
        assert files_of(workplace.run("rl")) == before
        assert workplace.sdsearch("report", "runs/rl").returncode == 0
        assert workplace.sdsearch("validate", "--config", "fit.yaml", "--ckpt_path", "last").returncode == 0
    assert workplace.sdsearch("fit", "--config", "fit.yaml").returncode == 0, "the lock is given up"


def test_two_evaluations_of_one_kind_do_not_mix(workplace):
    command = ("validate", "--config", "fit.yaml", "--run.name", "twice")
    with held_alone(workplace.run("twice") / "validate"):
        done = workplace.sdsearch(*command)
    assert done.returncode == 2 and "validate is in use by process" in done.stderr
    assert workplace.sdsearch(*command).returncode == 0
