"""Checkpoints as things on disk: written whole or not at all, read again without trust, named a second time for free.

A checkpoint is a file (one process, DDP) or a folder of shards (fsdp2). Invariant: whatever has a name that does not
begin with a dot was once wholly written; it is a draft before that. Disks fail all the same, so `read_contents` finds
out what was cut or lost afterwards. Next: run_folder.py, which checkpoint a run goes on from.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint.api import CheckpointException

from sdsearch_lightning.errors import CheckpointError, DataError
from sdsearch_lightning.sharded_checkpoints import META, AnyCheckpointIO, read_metadata

UNREADABLE = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError,
)  # fmt: skip
"""What reading a damaged or foreign file may raise."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, without its tensors."""

    step: int
    num_optimizers: int


def read_contents(path: Path) -> Contents:
    """What lies in `path`, file or folder.

    Raises:
        DataError: it is cut, incomplete or no checkpoint; the message is the bare reason.
    """
    try:
        return _read_folder(path) if path.is_dir() else _read_file(path)
    except UNREADABLE as found:
        error = found.__cause__ if isinstance(found, DataError) and found.__cause__ else found
        raise DataError(str(error).partition("\n")[0][:80] or type(error).__name__) from error


def _read_file(path: Path) -> Contents:
    if not zipfile.is_zipfile(path):  # the table of a zip file stands at its end
        path.open("rb").close()
        raise ValueError("cut off, or something else")
    # Mapped, not read: a cut file is found out without loading the tensors.
    found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return Contents(int(found["global_step"]), len(found.get("optimizer_states", ())))


def _read_folder(path: Path) -> Contents:
    metadata = read_metadata(path)
    ends: dict[str, int] = defaultdict(int)
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    for name, end in ends.items():
        if (size := (path / name).stat().st_size) < end:
            raise ValueError(f"{name} has {size} of {end} bytes")
    optimizers = {found[0] for name in metadata.state_dict_metadata if (found := re.match(r"optimizer_\d+", name))}
    plain = torch.load(path / META, map_location="cpu", mmap=True, weights_only=True)
    return Contents(int(plain["global_step"]), len(optimizers))


class PlainFiles(AnyCheckpointIO):
    """Writes where it is told to; Lightning would write to the system's temporary folder, perhaps a small one."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())


def save(trainer: Trainer, path: Path, intact: str) -> None:
    """Has all ranks save `path`: it is there whole, or it is not there and all ranks raise.

    Args:
        trainer: in a fit; all of its ranks have to come here.
        path: file or folder, as the strategy makes it.
        intact: what is left to go on from if this fails, for the message.

    Raises:
        CheckpointError: on all ranks, if one could not write.
    """
    draft, failure = draft_of(path), None
    if trainer.is_global_zero:
        remove(draft)  # of a run that was killed here; torch would mix its shards with these
    try:
        trainer.save_checkpoint(draft, weights_only=False)
    except (OSError, CheckpointException) as error:
        failure = _reason(error)
        trainer.strategy.barrier()  # the one at the end of save_checkpoint, where the ranks without an error wait
    if trainer.is_global_zero:
        failure = failure or _publish(draft, path)
    if trainer.strategy.reduce_boolean_decision(failure is not None, all=False):
        told = trainer.strategy.broadcast(failure) or failure or "see another rank"
        if trainer.is_global_zero:
            with suppress(OSError):
                remove(draft)
        raise CheckpointError(
            f"the checkpoint of step {trainer.global_step} could not be saved in {path.parent}: {told}.\n{intact}"
        )


def _publish(draft: Path, path: Path) -> str | None:
    """Gives a draft its name, or removes it and tells why it could not."""
    try:
        remove(path)  # a folder does not replace another; only an unpublished one of this step can be here
        os.replace(draft, path)
        return None
    except OSError as error:
        return _reason(error)


def _reason(error: OSError | CheckpointException) -> str:
    """`No space left on device`; of the first rank that failed."""
    if isinstance(error, CheckpointException):
        first: BaseException = next(iter(error.failures.values()))[0]
        return _reason(first) if isinstance(first, OSError) else str(first).partition("\n")[0]
    return error.strerror or str(error)


def draft_of(path: Path) -> Path:
    """The name that `path` has until it is whole."""
    return path.with_name(f".{path.name}.draft")


def name_again(path: Path, name: Path) -> None:
    """Makes `name` a second name of the checkpoint `path`, in place of what it named before.

    It outlives the first name and takes no space where the file system has hard links.
    """
    draft = draft_of(name)
    remove(draft)
    if not path.is_dir():
        _link(path.resolve(), draft)
        os.replace(draft, name)
        return
    # Folders have no second names and cannot replace each other: one of its own with linked files, and a link to it.
    twin = name.with_name(f"{name.stem}_{path.resolve().name.removeprefix('step_')}")
    if not twin.exists():
        half = draft_of(twin)
        remove(half)
        shutil.copytree(path.resolve(), half, copy_function=_link)
        half.rename(twin)
    draft.symlink_to(twin.name)
    if name.is_dir() and not name.is_symlink():
        remove(name)
    os.replace(draft, name)
    for old in name.parent.glob(f"{name.stem}_*"):
        if old != twin:
            remove(old)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)  # a file system without links


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder; nothing there is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def retire(path: Path) -> None:
    """Removes a checkpoint; half removed, it does not have its name any more."""
    if path.is_dir() and not path.is_symlink():
        gone = path.rename(draft_of(path))
        remove(gone)
    else:
        remove(path)
