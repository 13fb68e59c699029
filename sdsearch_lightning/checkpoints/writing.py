"""Checkpoints are written whole or not at all, named a second time for free, and removed at once.

A checkpoint is a file (one process, DDP) or a folder of shards (fsdp2). Disks fail all the same: each file ends in its
checksum (seals.py), and reading.py finds out what was changed, cut or lost afterwards.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException

from sdsearch_lightning.checkpoints.seals import seal
from sdsearch_lightning.checkpoints.shards import META, AnyCheckpointIO
from sdsearch_lightning.errors import CheckpointError, StorageError
from sdsearch_lightning.files import GO_ON, draft_of, remove, sync_names, telling_full_disk, written_whole


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
    draft = draft_of(path)
    if trainer.is_global_zero:
        remove(draft)  # of a run that was killed here; torch would mix its shards with these
    failure = _write(trainer, draft, path) or _seal(trainer, draft, path)
    failure = told_by_all(trainer, failure)
    if failure is None:
        failure = told_by_all(trainer, _publish(draft, path) if trainer.is_global_zero else None)
    if failure is not None:
        if trainer.is_global_zero:
            with suppress(OSError):
                remove(draft)
        raise CheckpointError(
            f"the checkpoint of step {trainer.global_step} could not be saved in {path.parent}: {failure}.\n{intact}"
        )


def told_by_all(trainer: Trainer, told: str | None) -> str | None:
    """What the first rank that tells something tells, on all ranks; None where none does. A collective."""
    if not trainer.strategy.reduce_boolean_decision(told is not None, all=False):
        return None
    texts = [told]
    if distributed.is_available() and distributed.is_initialized():
        texts = [None] * distributed.get_world_size()
        distributed.all_gather_object(texts, told)
    return next(text for text in texts if text is not None)


def by_rank_0(trainer: Trainer, write: Callable[[], None]) -> None:
    """Has rank 0 call `write`. A collective.

    Raises:
        StorageError: on all ranks, if it could not write a file.
    """
    failure = None
    if trainer.is_global_zero:
        try:
            write()
        except OSError as error:
            path = Path(error.filename or "a file")
            if path.suffix == ".draft":  # a user knows the file that it was to become
                path = path.with_name(path.stem.removeprefix("."))
            failure = f"{path} could not be written: {error.strerror or error}"
    if (told := told_by_all(trainer, failure)) is not None:
        raise StorageError(f"{told}. {GO_ON}")


def _write(trainer: Trainer, draft: Path, path: Path) -> str | None:
    """Has this rank write its part of a draft; tells why it could not."""
    try:
        with telling_full_disk(path, draft):
            try:
                trainer.save_checkpoint(draft, weights_only=False)
            except CheckpointException as error:  # no Exception, by torch's choice
                first: BaseException = next(iter(error.failures.values()))[0]
                raise first if isinstance(first, OSError) else OSError(str(first).partition("\n")[0]) from error
    except OSError as error:
        trainer.strategy.barrier()  # the one at the end of save_checkpoint, where the ranks without an error wait
        return error.strerror or str(error)
    return None


def _seal(trainer: Trainer, draft: Path, path: Path) -> str | None:
    """Gives the files that this rank wrote their checksums; tells why it could not."""
    own = [draft] if trainer.is_global_zero else []
    if draft.is_dir():
        own = [*draft.glob(f"__{trainer.global_rank}_*")]
        own += [draft / name for name in (".metadata", META)] if trainer.is_global_zero else []
    try:
        with telling_full_disk(path, draft):
            for file in own:
                seal(file)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _publish(draft: Path, path: Path) -> str | None:
    """Gives a draft its name, for good; tells why it could not."""
    try:
        remove(path)  # a folder does not replace another; only an unpublished one of this step can be here
        if draft.is_dir():
            sync_names(draft)
        os.replace(draft, path)
        sync_names(path.parent)
        sync_names(path.parent.parent)  # where the folder of checkpoints may be new
    except OSError as error:
        return error.strerror or str(error)
    return None


def name_again(path: Path, name: Path) -> None:
    """Makes `name` a second name of the checkpoint `path`, in place of what it named before.

    It outlives the first name and takes no space where the file system has hard links.
    """
    if not path.is_dir():
        with written_whole(name) as draft:
            _link(path.resolve(), draft)
        return
    # Folders have no second names and cannot replace each other: one of its own with linked files, and a link to it.
    twin = name.with_name(f"{name.stem}_{path.resolve().name.removeprefix('step_')}")
    if not twin.exists():
        with written_whole(twin) as draft:
            shutil.copytree(path.resolve(), draft, copy_function=_link)
    with written_whole(name) as draft:
        draft.symlink_to(twin.name)
    for old in name.parent.glob(f"{name.stem}_*"):
        if old != twin:
            remove(old)


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)  # a file system without links


def retire(path: Path) -> None:
    """Removes a checkpoint; half removed, it does not have its name any more."""
    if path.is_dir() and not path.is_symlink():
        gone = path.rename(draft_of(path))
        remove(gone)
    else:
        remove(path)
