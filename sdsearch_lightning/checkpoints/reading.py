"""Checkpoints as they lie on disk, opened without a trainer and without a process group, whichever kind they are.

    runs/<name>/checkpoints/step_<n>.ckpt   one process, or DDP: a file
    runs/<name>/checkpoints/step_<n>.ckpt/  sharded over ranks: `.metadata`, a file per rank, and `meta.pt`

Either may be reached through a link, such as last.ckpt. Tensors are read when they are asked for; nothing is unpickled.

Invariant: what was not wholly written, or is not any more what was written, is refused when it is opened.
"""

from __future__ import annotations

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sdsearch_lightning.checkpoints.seals import check_seal
from sdsearch_lightning.checkpoints.shards import META, read_into, read_metadata
from sdsearch_lightning.errors import ConfigError, DataError

WEIGHTS = "state_dict"


class StoredCheckpoint(ABC):
    """A checkpoint on disk, opened: what it holds is known, its tensors are not yet read."""

    path: Path
    facts: Mapping[str, Any]
    """What it holds besides weights and optimizer states: `global_step` and more."""
    shapes: Mapping[str, torch.Size]
    """Shape of each weight, by the module's name for it."""
    num_optimizers: int
    is_sealed: bool
    """Whether its files have proved to be what was written; those of version 0.1 have no checksum."""

    @property
    def step(self) -> int:
        """The step (rollout batch) after which it was saved."""
        return int(self.facts["global_step"])

    @property
    def note(self) -> str | None:
        """What a user has to know of it."""
        return None if self.is_sealed else f"{self.path} has no checksums, so only its form was checked"

    @abstractmethod
    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copy the weights of these names into these tensors, which have the shapes of `shapes`."""


class CheckpointFile(StoredCheckpoint):
    """A checkpoint of one process or of DDP: one file that holds everything."""

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):  # the table of a zip file stands at its end
            path.open("rb").close()
            raise ValueError("cut off, or something else")
        self.is_sealed = _has_seal(path)
        if not self.is_sealed and not _ends_as_zip(path):
            raise ValueError("its end is not what was written")
        # Mapped, not read: optimizer states stay on disk.
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(stored, dict) or WEIGHTS not in stored or "global_step" not in stored:
            found = ", ".join(map(str, list(stored)[:4])) if isinstance(stored, dict) else type(stored).__name__
            raise ValueError(f"expected state_dict and global_step in it, found {found}")
        self.path, self.weights = path, stored.pop(WEIGHTS)
        self.facts = stored
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}
        self.num_optimizers = len(stored.get("optimizer_states", ()))

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copy weights out of the mapped file, see `StoredCheckpoint.read`."""
        for name, tensor in into.items():
            tensor.copy_(self.weights[name])


class CheckpointFolder(StoredCheckpoint):
    """A checkpoint of fsdp2: shards, as torch.distributed.checkpoint writes them."""

    def __init__(self, path: Path) -> None:
        if missing := [name for name in (".metadata", META) if not (path / name).is_file()]:
            raise ValueError(
                f"found no {' and no '.join(missing)} in the folder: its save was cut off, or it is another"
            )
        files = [path / ".metadata", path / META, *sorted(path.glob("*.distcp"))]
        bare = [file.name for file in files if not _has_seal(file)]
        if 0 < len(bare) < len(files):
            raise ValueError(f"{bare[0]} has lost its end, where its checksum was")
        self.is_sealed = not bare
        index = read_metadata(path)
        _check_shards(path, index)
        self.path = path
        self.facts = torch.load(path / META, map_location="cpu", weights_only=True)
        if "global_step" not in self.facts:
            raise ValueError(f"expected global_step in {META}, found {', '.join(self.facts)}")
        prefix = f"{WEIGHTS}."
        self.shapes = {
            name.removeprefix(prefix): entry.size
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        optimizers = {found[0] for name in index.state_dict_metadata if (found := re.match(r"optimizer_\d+", name))}
        self.num_optimizers = len(optimizers)

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Copy weights out of whichever shards hold them, see `StoredCheckpoint.read`."""
        with _naming(self.path):
            read_into({WEIGHTS: dict(into)}, self.path, alone=True)


def _has_seal(path: Path) -> bool:
    """Whether a file has a checksum, which then is right; its bytes are read once, whoever asks again."""
    status = path.stat()
    return _has_seal_as_it_is(path.resolve(), status.st_ino, status.st_size, status.st_ctime_ns)


@cache
def _has_seal_as_it_is(path: Path, *stamp: int) -> bool:
    return check_seal(path)


def _ends_as_zip(path: Path) -> bool:
    """Whether the end of a zip file's table is that of the file: nothing was ever written behind it."""
    with path.open("rb") as file:
        file.seek(-22, os.SEEK_END)
        return file.read(4) == b"PK\5\6"


def _check_shards(path: Path, index: Metadata) -> None:
    """Raise ValueError where a shard is not there, or shorter than the index says."""
    ends: dict[str, int] = defaultdict(int)
    for place in (index.storage_data or {}).values():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise ValueError(f"lacks {name}, one of its shards")
        if size < end:
            raise ValueError(f"{name} has {size} of {end} bytes")


def open_checkpoint(path: Path) -> StoredCheckpoint:
    """The checkpoint at `path`, a file, a folder or a link to one.

    Raises:
        DataError: it is cut, changed, incomplete or no checkpoint; the message is the bare reason.
    """
    try:
        return CheckpointFolder(path) if path.is_dir() else CheckpointFile(path)
    except Exception as found:  # a damaged file may hold anything, and so raise anything
        error = found.__cause__ if isinstance(found, DataError) and found.__cause__ else found
        raise DataError(str(error).strip().partition("\n")[0][:100] or type(error).__name__) from error


def named_checkpoint(path: Path) -> StoredCheckpoint:
    """The checkpoint that a user named as `ckpt_path`.

    Raises:
        ConfigError: nothing there, no checkpoint, or one that was not wholly written.
    """
    if not path.exists():
        where = f"{path}, a link to {path.readlink()} which is gone" if path.is_symlink() else path
        raise ConfigError(f"ckpt_path: expected a checkpoint (a file, or a folder of shards), found none at {where}.")
    with _naming(path):
        return open_checkpoint(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ConfigError(
            f"ckpt_path: {path} cannot be read as a checkpoint of this library: {error}.\nTake that of another step."
        ) from error
