"""Checkpoints of step 4, of one file and of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from sdsearch_lightning.checkpoints.seals import seal

STEP, OPTIMIZERS = 4, 1


def checkpoint_state() -> dict[str, Any]:
    return {
        "state_dict": {"policy.weight": torch.ones(300, 10), "policy.bias": torch.zeros(10)},
        "optimizer_0": {"state": {"policy.weight": {"exp_avg": torch.zeros(300, 10)}}},
    }


def sharded(path: Path, step: int = 4, is_sealed: bool = False) -> Path:
    """As fsdp2 leaves it; the trainer's save then seals it."""
    dcp.save(checkpoint_state(), checkpoint_id=path, no_dist=True)
    torch.save({"global_step": step, "loops": {}}, path / "meta.pt")
    return _sealed(path) if is_sealed else path


def single(path: Path, step: int = 4, is_sealed: bool = False) -> Path:
    """As every other strategy leaves it; the trainer's save then seals it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"global_step": step, "optimizer_states": [{}], "state_dict": checkpoint_state()["state_dict"]}
    torch.save(state, path)
    return _sealed(path) if is_sealed else path


def _sealed(path: Path) -> Path:
    for file in path.iterdir() if path.is_dir() else [path]:
        seal(file)
    return path
