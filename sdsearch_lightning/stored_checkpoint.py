"""Weights out of a checkpoint, without a trainer and without a process group, whichever kind it is.

    runs/<name>/checkpoints/step_<n>.ckpt   one process, or DDP: a file
    runs/<name>/checkpoints/step_<n>.ckpt/  sharded over ranks: `.metadata`, a file per rank, and `meta.pt`

Either may be reached through a link, such as last.ckpt. Optimizer states are never read.

Invariant: what was not wholly written is refused, not read in part. Next: export_command.py.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.sharded_checkpoints import META, read_into, read_metadata

INDEX = ".metadata"
"""Of a folder: which shard holds what."""
WEIGHTS = "state_dict"
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError)


class StoredCheckpoint(ABC):
    """One checkpoint on disk."""

    facts: Mapping[str, Any]
    """What it holds besides weights and optimizer states: `global_step` and more."""
    shapes: Mapping[str, torch.Size]
    """Shape of each weight, by the module's name for it."""

    @abstractmethod
    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copy the weights of these names into these tensors, which have the shapes of `shapes`."""


class CheckpointFile(StoredCheckpoint):
    """Everything in one file."""

    def __init__(self, path: Path) -> None:
        with _readable(path, "Is it the file of a run, wholly written?"):
            # Mapped, not read: a cut file is found out at once, and optimizer states stay on disk.
            stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(stored, dict) or WEIGHTS not in stored or "global_step" not in stored:
            found = ", ".join(map(str, list(stored)[:4])) if isinstance(stored, dict) else type(stored).__name__
            raise ConfigError(f"ckpt_path: expected a checkpoint with state_dict and global_step at {path}: {found}.")
        self.weights = stored.pop(WEIGHTS)
        self.facts = stored
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}

    def read(self, into: Mapping[str, Tensor]) -> None:
        """See `StoredCheckpoint.read`."""
        for name, tensor in into.items():
            tensor.copy_(self.weights[name])


class CheckpointFolder(StoredCheckpoint):
    """Shards, as torch.distributed.checkpoint writes them."""

    def __init__(self, path: Path) -> None:
        if missing := [name for name in (INDEX, META) if not (path / name).is_file()]:
            raise ConfigError(
                f"ckpt_path: expected a sharded checkpoint with {INDEX} and {META}, found no "
                f"{' and no '.join(missing)} in {path}: not a checkpoint, or its save was cut off. Take another step."
            )
        self.path = path
        with _readable(path, "Take another step."):
            self.facts = torch.load(path / META, map_location="cpu", weights_only=True)
            index = read_metadata(path)
        shards = {place.relative_path for place in (index.storage_data or {}).values()}
        if torn := sorted(name for name in shards if not (path / name).is_file()):
            raise ConfigError(f"ckpt_path: {path} lacks {torn[0]}, one of its shards: it is torn. Take another step.")
        prefix = f"{WEIGHTS}."
        self.shapes = {
            name.removeprefix(prefix): entry.size
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, into: Mapping[str, Tensor]) -> None:
        """See `StoredCheckpoint.read`."""
        with _readable(self.path, "Take another step."):
            read_into({WEIGHTS: dict(into)}, self.path, alone=True)


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """The checkpoint at `path`, a file, a folder or a link to one.

    Raises:
        ConfigError: nothing there, no checkpoint, or one that was not wholly written.
    """
    if not path.exists():
        where = f"{path}, a link to {path.readlink()} which is gone" if path.is_symlink() else path
        raise ConfigError(f"ckpt_path: expected a checkpoint (a file, or a folder of shards), found none at {where}.")
    return CheckpointFolder(path) if path.is_dir() else CheckpointFile(path)


@contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ConfigError(f"ckpt_path: {path} cannot be read as a checkpoint: {reason}\n{remedy}") from error
