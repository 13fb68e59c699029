"""What a checkpoint says of itself, and every way in which one can be damaged."""

import os

import pytest
import torch

from helpers.checkpoints import OPTIMIZERS, STEP, sharded, single
from sdsearch_lightning.checkpoints.reading import open_checkpoint
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.runs.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("make", [sharded, single])
def test_contents_are_read_without_tensors(tmp_path, make):
    stored = open_checkpoint(make(tmp_path / "step_00000004.ckpt"))
    assert (stored.step, stored.num_optimizers) == (STEP, OPTIMIZERS)


def tear_shard(path):
    shard = path / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)


@pytest.mark.parametrize(
    "damage, told",
    [
        (tear_shard, "__0_0.distcp has"),
        (lambda path: (path / "__0_0.distcp").unlink(), "lacks __0_0.distcp, one of its shards"),
        (lambda path: (path / ".metadata").unlink(), "found no .metadata in the folder"),
        (lambda path: (path / ".metadata").write_bytes(b""), "Ran out of input"),
        (lambda path: os.truncate(path / ".metadata", 100), "truncated"),
        (lambda path: (path / "meta.pt").unlink(), "found no meta.pt in the folder"),
        (lambda path: os.truncate(path / "meta.pt", 100), "."),
        (lambda path: torch.save({}, path / "meta.pt"), "global_step"),
    ],
)
def test_a_folder_that_lacks_anything_is_passed_over(tmp_path, capsys, damage, told):
    folder = RunFolder(tmp_path)
    paths = [sharded(folder.checkpoints / f"step_{step:08d}.ckpt", step) for step in (2, 4)]
    folder.last_checkpoint.symlink_to(paths[1].name)
    assert folder.resume_point() == (paths[1], 4)
    damage(paths[1])
    with pytest.raises(DataError, match=told):
        open_checkpoint(paths[1])
    assert folder.resume_point() == (paths[0], 2)
    assert capsys.readouterr().err.startswith(f"warning: {paths[1]} is damaged and passed over: ")


def test_what_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "notes").write_text("hello")
    with pytest.raises(DataError):
        open_checkpoint(tmp_path / "notes")
    with pytest.raises(DataError, match="global_step"):
        torch.save({"state_dict": {}}, tmp_path / "weights")
        open_checkpoint(tmp_path / "weights")
