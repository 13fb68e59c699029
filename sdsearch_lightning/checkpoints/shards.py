"""Checkpoints that are folders (fsdp2), read by any number of processes, or by one without a process group.

    .metadata      which tensor lies where; written when all shards are
    __0_0.distcp   the shards of rank 0, and so on
    meta.pt        what is no tensor of a weight or an optimizer; written last

Torch would unpickle whatever `.metadata` and the shards hold, and a pickle can run anything. Here only what checkpoints
are made of is let in, as `torch.load(weights_only=True)` does for single files.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from sdsearch_lightning.errors import DataError

META = "meta.pt"
"""Lightning's name."""
_INDEX = "torch.distributed.checkpoint.metadata"
_DTYPES = (name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_ALLOWED = frozenset(
    {
        *((_INDEX, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
        *((_INDEX, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")),
        (_INDEX, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),  # a look-up by name
        *(("torch", name) for name in ("Size", "device", *_DTYPES)),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),  # the latter in Python 3.13
        ("collections", "OrderedDict"),
    }
)
"""All that `.metadata` may name. Never a whole module: a name may have dots, and reach what it imports."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads `.metadata` without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"{place.relative_path!r} is no file of the folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    """Reads what is no tensor without running anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        super().load_bytes(read_item, io.BytesIO(checked.getvalue()))


def read_metadata(path: Path) -> Metadata:
    """What the folder holds, and where.

    Raises:
        DataError: there is no readable index.
    """
    try:
        return _Reader(path).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise DataError(f"{path} is not a whole sharded checkpoint: {error}") from error


def read_into(state: dict[str, Any], path: Path, alone: bool = False) -> None:
    """Fill tensors and values of `state` in place; a collective unless `alone`.

    Args:
        state: a part of what the folder holds, under its names; a sharded tensor takes its own shard only.
        path: the folder.
        alone: this process reads by itself; there need not be others.

    Raises:
        DataError: something is not there, of another shape, or damaged; on all ranks.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is .*un", UserWarning)  # that is what `alone` means
        try:
            load(state, storage_reader=_Reader(path), planner=_Planner(), no_dist=alone)
        except CheckpointException as error:  # no Exception, by torch's choice
            cause = next(iter(error.failures.values()))[0]
            reason = str(cause).strip() or type(cause).__name__  # a file that ends too early has no message
            raise DataError(f"{path}: {reason.splitlines()[0]}") from cause


def read_whole(path: Path) -> dict[str, Any]:
    """All of it as a checkpoint of one process would be; in main memory, without a process group."""
    metadata = read_metadata(path)
    state: dict[str, Any] = {}
    for name, kept in metadata.state_dict_metadata.items():
        value = None
        if isinstance(kept, TensorStorageMetadata):
            value = torch.empty(kept.size, dtype=kept.properties.dtype)
        _set(state, (metadata.planner_data or {}).get(name, (name,)), value)
    read_into(state, path, alone=True)
    optimizers = [state.pop(f"optimizer_{i}") for i in range(sum(name.startswith("optimizer_") for name in state))]
    meta = torch.load(path / META, map_location="cpu", weights_only=True)
    return {**meta, "state_dict": state["state_dict"], "optimizer_states": [_by_index(o) for o in optimizers]}


def _set(state: Any, keys: Sequence[str | int], value: Any) -> None:
    """Put a value where it belongs in nested dicts and lists, which are made as they are met."""
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        if isinstance(key, int):
            state.extend([None] * (key + 1 - len(state)))
        empty = value if following is None else [] if isinstance(following, int) else {}
        present = state[key] if isinstance(key, int) else state.get(key)
        if following is None or present is None:
            state[key] = empty
        state = state[key]


def _by_index(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by position, as optimizers save it themselves, from one by weight name."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    order = {name: index for index, name in enumerate(names)}
    groups = [group | {"params": [order[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    state = {order[name]: kept for name, kept in optimizer.get("state", {}).items()}
    return {"state": state, "param_groups": groups}


class AnyCheckpointIO(TorchCheckpointIO):
    """Lightning's, which also reads a folder of fsdp2: for runs that go on in one process or under DDP."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """See Lightning; weights only, unless told otherwise."""
        if Path(path).is_dir():
            return read_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only is not False)
