"""Checkpoints, whole and sharded, and what plain transformers makes of an exported folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sdsearch_lightning.checkpoints.seals import seal

EXPORT_TOKENS = torch.tensor([[5, 9, 3, 14, 8, 20, 11, 6]])


def exported_logits(folder: Path) -> Tensor:
    """What plain transformers makes of a folder."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(EXPORT_TOKENS).logits  # type: ignore[no-any-return]


def stored(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def shard(facts: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint as a run under fsdp2 leaves it, from one process."""
    from torch.distributed.checkpoint.state_dict_saver import save

    facts = dict(facts)
    state = {"state_dict": facts.pop("state_dict")}
    state |= {f"optimizer_{i}": optimizer for i, optimizer in enumerate(facts.pop("optimizer_states"))}
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, checkpoint_id=folder, no_dist=True)
    torch.save(facts, folder / "meta.pt")
    for file in folder.iterdir():
        seal(file)


def export(workplace: Any, checkpoint: object, output: object, *more: str) -> Any:
    return workplace.sdsearch("export", "--ckpt_path", str(checkpoint), "--output", str(output), *more)
