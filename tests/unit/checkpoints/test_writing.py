import errno
import os
from types import SimpleNamespace

import pytest
import torch

from helpers.checkpoints import STEP, sharded, single
from sdsearch_lightning import files
from sdsearch_lightning.checkpoints import writing as checkpoints
from sdsearch_lightning.checkpoints.reading import open_checkpoint
from sdsearch_lightning.checkpoints.writing import PlainFiles, by_rank_0, name_again, retire
from sdsearch_lightning.errors import CheckpointError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("make", [sharded, single])
def test_a_second_name_takes_no_space_and_outlives_the_first(tmp_path, make):
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    for step in (2, 4):
        path = make(tmp_path / f"step_{step:08d}.ckpt", step)
        last.unlink(missing_ok=True)
        last.symlink_to(path.name)
        name_again(last, best)
        name_again(last, best)
        assert open_checkpoint(best).step == step
        inner = "__0_0.distcp" if path.is_dir() else ""
        assert (path / inner).stat().st_ino == (best / inner).resolve().stat().st_ino
        retire(path)
        assert not path.exists() and open_checkpoint(best).step == step
    assert len(list(tmp_path.glob("*best*"))) <= 2, "the best one before is gone"


def test_a_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuses(*args):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuses)
    for make, name in ((sharded, "step_00000002.ckpt"), (single, "step_00000004.ckpt")):
        name_again(make(tmp_path / name), tmp_path / "best.ckpt")
        assert open_checkpoint(tmp_path / "best.ckpt").step == STEP


class Ranks:
    """A trainer of one process that writes `make(path)` and then `fails`."""

    is_global_zero, global_rank, global_step = True, 0, 4

    def __init__(self, make, fails=None):
        self.make, self.fails, self.barriers = make, fails, 0
        self.strategy = SimpleNamespace(
            barrier=self.barrier, reduce_boolean_decision=lambda value, all: value, broadcast=lambda value: value
        )

    def barrier(self):
        self.barriers += 1

    def save_checkpoint(self, path, weights_only):
        self.make(path)
        if self.fails is not None:
            raise self.fails
        self.barrier()


@pytest.mark.parametrize("make", [sharded, single])
def test_a_checkpoint_has_its_name_when_it_is_whole(tmp_path, make):
    path, trainer = tmp_path / "checkpoints" / "step_00000004.ckpt", Ranks(make)
    for _ in range(2):  # the second replaces one of the same step that was never published
        checkpoints.save(trainer, path, "")
        stored = open_checkpoint(path)
        assert stored.step == STEP and stored.is_sealed and list(path.parent.iterdir()) == [path]
    assert trainer.barriers == 2


FULL = OSError(errno.ENOSPC, "No space left on device")
ENFORCE = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
"""What torch makes of a full disk."""


@pytest.mark.parametrize("make", [sharded, single])
@pytest.mark.parametrize(
    "error, told",
    [
        (FULL, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (checkpoints.CheckpointException("write", {1: (FULL, None)}), "No space left on device"),
        (ENFORCE, "No space left on device"),
        (checkpoints.CheckpointException("write", {1: (ENFORCE, None)}), "No space left on device"),
        (checkpoints.CheckpointException("write", {1: (RuntimeError("broken\nmore"), None)}), "broken"),
    ],
)
def test_a_disk_that_is_full_leaves_no_half_and_all_ranks_meet(tmp_path, monkeypatch, make, error, told):
    free = SimpleNamespace(free=1000 if "No space" in told else 10**9)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda place: free)
    path, trainer = tmp_path / "checkpoints" / "step_00000004.ckpt", Ranks(make, error)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(trainer, path, "The one of step 2 is intact.")
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"the checkpoint of step 4 could not be saved in {path.parent}: {told}")
    assert ("0.0 MB are free" in first) == ("No space" in told) and second == "The one of step 2 is intact."
    assert trainer.barriers == 1 and not list(path.parent.iterdir())


def test_an_error_that_is_not_of_the_disk_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(Ranks(single, ZeroDivisionError()), tmp_path / "step_00000004.ckpt", "")


def test_a_full_disk_is_an_oserror_whatever_torch_makes_of_it(tmp_path, monkeypatch):
    """`torch.save` to a path would make a RuntimeError of it."""
    with pytest.raises(OSError, match="No space left"):
        PlainFiles().save_checkpoint({"weights": torch.zeros(100_000)}, "/dev/full")


def full():
    raise OSError(errno.ENOSPC, "No space left on device", "runs/a/model")


def test_what_rank_0_cannot_write_ends_all_ranks_alike(monkeypatch):
    """The second rank is told by a gather; it writes nothing itself."""
    told = []
    with pytest.raises(StorageError) as raised:
        by_rank_0(Ranks(None), full)
    told.append(str(raised.value))
    other = Ranks(None)
    other.is_global_zero = False
    other.strategy.reduce_boolean_decision = lambda value, all: True

    def gather(texts, mine):
        assert mine is None
        texts[:] = [told[0].partition(". Free")[0], None]

    ranks = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=gather
    )
    monkeypatch.setattr(checkpoints, "distributed", ranks)
    with pytest.raises(StorageError) as raised:
        by_rank_0(other, full)
    told.append(str(raised.value))
    line = "runs/a/model could not be written: No space left on device. Free some space and run the same command again."
    assert told == [line] * 2


def test_what_rank_0_writes_is_written_once():
    calls, other = [], Ranks(None)
    other.is_global_zero = False
    for trainer in (Ranks(None), other):
        by_rank_0(trainer, lambda: calls.append(1))
    assert calls == [1]
