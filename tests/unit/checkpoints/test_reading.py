"""What a checkpoint says of itself, and every way in which one can be damaged."""

import os
import random
from unittest.mock import Mock

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
    warned = [line for line in capsys.readouterr().err.splitlines() if "no checksums" not in line]
    assert len(warned) == 1 and warned[0].startswith(f"warning: {paths[1]} is damaged and passed over: ")


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def flip(file, position, bit=0):
    with file.open("r+b") as bytes_:
        bytes_.seek(position)
        (value,) = bytes_.read(1)
        bytes_.seek(position)
        bytes_.write(bytes([value ^ 1 << bit]))


@pytest.mark.parametrize("make", [sharded, single])
def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_is_taken(tmp_path, capsys, make):
    folder, dice = RunFolder(tmp_path), random.Random(0)
    before = make(folder.checkpoints / "step_00000002.ckpt", 2, is_sealed=True)
    path = make(folder.checkpoints / "step_00000004.ckpt", 4, is_sealed=True)
    folder.last_checkpoint.symlink_to(path.name)
    assert folder.resume_point() == (path, 4) and not capsys.readouterr().err
    for file in files_of(path):
        for position in [0, file.stat().st_size - 1, *(dice.randrange(file.stat().st_size) for _ in range(20))]:
            flip(file, position, bit := dice.randrange(8))
            assert folder.resume_point() == (before, 2), (file, position, bit)
            (told,) = capsys.readouterr().err.splitlines()
            assert told.startswith(f"warning: {path} is damaged and passed over: ") and file.name in told
            flip(file, position, bit)
    assert folder.resume_point() == (path, 4)


@pytest.mark.parametrize("make", [sharded, single])
def test_a_zeroed_page_is_found_whatever_it_takes(tmp_path, make):
    path = make(tmp_path / "step_00000004.ckpt", is_sealed=True)
    for file in files_of(path):
        whole = file.read_bytes()
        for start in range(0, len(whole), 512):
            end = min(start + 512, len(whole))
            if any(whole[start:end]):
                file.write_bytes(whole[:start] + bytes(end - start) + whole[end:])
                with pytest.raises(DataError):
                    open_checkpoint(path)
        file.write_bytes(whole)
    assert open_checkpoint(path).is_sealed


@pytest.mark.parametrize("make", [sharded, single])
def test_one_without_checksums_is_read_with_a_note(tmp_path, capsys, make):
    folder = RunFolder(tmp_path)
    path = make(folder.checkpoints / "step_00000004.ckpt")
    folder.last_checkpoint.symlink_to(path.name)
    assert folder.resume_point() == (path, 4)
    assert capsys.readouterr().err == f"warning: {path} has no checksums, so only its form was checked\n"


def test_any_exception_of_a_damaged_file_is_a_reason(tmp_path, monkeypatch):
    """Pickles that are damaged raise whatever they name: 36 of 60 zeroed pages ended a run in a traceback."""
    path = single(tmp_path / "step_00000004.ckpt")
    for error in (AssertionError("odd"), OverflowError("large"), ImportError("no such"), RecursionError("deep")):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(DataError, match=str(error)):
            open_checkpoint(path)


def test_what_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "notes").write_text("hello")
    with pytest.raises(DataError):
        open_checkpoint(tmp_path / "notes")
    with pytest.raises(DataError, match="global_step"):
        torch.save({"state_dict": {}}, tmp_path / "weights")
        open_checkpoint(tmp_path / "weights")
