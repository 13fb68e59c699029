"""Folders are read whole by one process, as what they were; nothing in them is ever run."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from sdsearch_lightning.checkpoints.shards import META, AnyCheckpointIO, read_into, read_metadata, read_whole
from sdsearch_lightning.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized")

A, B = "policy.a", "policy.b"


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this was run",))


def state(value: Any = 0.5) -> dict[str, Any]:
    kept = {A: {"step": torch.tensor(3.0), "exp_avg": torch.arange(4.0)}, B: {"step": torch.tensor(2.0)}}
    groups = [{"params": [B], "lr": 0.1, "betas": (0.9, 0.99)}, {"params": [A], "lr": value, "betas": (0.9, 0.99)}]
    weights = {A: torch.arange(4.0) + 1, B: torch.ones(2, 3, dtype=torch.bfloat16)}
    return {"state_dict": weights, "optimizer_0": {"state": kept, "param_groups": groups}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step_00000003.ckpt"
    save(state(), checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3, "callbacks": {}}, path / META)
    return path


def test_one_process_reads_what_it_would_have_saved(folder: Path) -> None:
    read = AnyCheckpointIO().load_checkpoint(folder)
    assert read["global_step"] == 3
    assert {name: (w.dtype, w.tolist()) for name, w in read["state_dict"].items()} == {
        name: (w.dtype, w.tolist()) for name, w in state()["state_dict"].items()
    }
    (optimizer,) = read["optimizer_states"]
    assert [group["params"] for group in optimizer["param_groups"]] == [[0], [1]]
    assert [group["lr"] for group in optimizer["param_groups"]] == [0.1, 0.5]
    assert optimizer["state"][1]["exp_avg"].tolist() == [0, 1, 2, 3] and optimizer["state"][0]["step"] == 2


def test_a_part_is_read_in_place(folder: Path) -> None:
    weights = {A: torch.zeros(4)}
    read_into({"state_dict": weights}, folder, alone=True)
    assert weights[A].tolist() == [1, 2, 3, 4]


def test_an_index_that_would_run_something_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=re.escape("builtins.print has no place in a checkpoint")):
        read_metadata(folder)
    assert "this was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "torch.hub.os.system"),
        ("torch.distributed.checkpoint.metadata", "field"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo.__init__"),
        ("torch", "Size.__init__"),
        ("pathlib", "PosixPath.unlink"),
        ("os", "system"),
    ],
)
def test_no_name_leads_out_of_the_list(folder: Path, tmp_path: Path, module: str, name: str) -> None:
    """In protocol 4 a name may have dots: with whole modules let in, `os.system` of one that imports os would run."""
    marker = tmp_path / "marker"
    text = [pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name, f"touch {marker}")]
    call = pickle.STACK_GLOBAL + text[2] + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    (folder / ".metadata").write_bytes(pickle.PROTO + b"\x04" + text[0] + text[1] + call)
    with pytest.raises(DataError, match=re.escape(f"{module}.{name} has no place in a checkpoint")):
        read_metadata(folder)
    assert not marker.exists()


def test_a_shard_is_a_file_of_the_folder(folder: Path) -> None:
    index = read_metadata(folder)
    (place, _), *_ = index.storage_data.items()
    index.storage_data[place] = replace(index.storage_data[place], relative_path="../elsewhere")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match=r"'\.\./elsewhere' is no file of the folder"):
        read_metadata(folder)


def test_a_value_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(state(Evil()), checkpoint_id=tmp_path / "c", no_dist=True)
    torch.save({}, tmp_path / "c" / META)
    with pytest.raises(DataError, match="Weights only load failed"):
        read_whole(tmp_path / "c")
    assert "this was run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04"])
def test_a_folder_without_an_index_is_told(folder: Path, content: bytes | None) -> None:
    (folder / ".metadata").unlink()
    if content is not None:
        (folder / ".metadata").write_bytes(content)
    with pytest.raises(DataError, match="is not a whole sharded checkpoint"):
        read_metadata(folder)
