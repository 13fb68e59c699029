"""Files and folders that are there whole or not at all, rows that stay, and disks that are full.

Invariant: what has a name that does not begin with a dot was once wholly written, and is on the disk before it has the
name; before that it is a draft beside it. So a power cut takes no more than a kill.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that is full."""
GO_ON = "Free some space and run the same command again."
"""What is told after them."""


class DiskFullError(OSError):
    """A disk, or a user's share of it, that is full: `filename` could not be written."""


def draft_of(path: Path) -> Path:
    """The name that `path` has until it is whole."""
    return path.with_name(f".{path.name}.draft")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A draft to write inside the block; at its end it takes the name `path`, in place of what has it until then.

    After an error there is no draft, and `path` is what it was. A killed process leaves one; the next removes it.

    Args:
        path: of a file, a link or a folder; folders above it are made.
    """
    path = path.absolute()
    draft = draft_of(path)
    remove(draft)
    make_folder(path.parent)
    try:
        with telling_full_disk(path, draft):
            yield draft
            sync(draft)
            if path.is_dir() and not path.is_symlink():
                remove(path)  # a folder does not replace another
            os.replace(draft, path)
            sync_names(path.parent)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a UTF-8 file, all or none; they are on the disk when it returns."""
    size = path.stat().st_size if path.exists() else None
    try:
        with telling_full_disk(path), path.open("a", newline="", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        if size is None:
            sync_names(path.parent)
    except BaseException:
        with suppress(OSError):
            os.truncate(path, size or 0)
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder with all that is in it, to the disk; a link is part of its folder."""
    if path.is_symlink():
        return
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        sync_names(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Flush the names in a folder to the disk: a new one, or one that was moved."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps names by itself
            raise
    finally:
        os.close(descriptor)


@contextmanager
def telling_full_disk(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Around what writes `path`: an error that a full disk caused becomes one error, whatever a library made of it.

    Args:
        path: for the message.
        draft: where it is being written; None: there.

    Raises:
        DiskFullError: `filename` is the path, and `strerror` tells how much was written and is free.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or (number := _full(error, path.parent)) is None:
            raise
        place = draft or path
        files = [place, *place.rglob("*")] if place.is_dir() else [place]
        written = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(path.parent).free
        told = f"{os.strerror(number)} ({written / 1e6:.1f} MB of it are written, {free / 1e6:.1f} MB are free)"
        raise DiskFullError(number, told, str(path)) from error


def _full(error: BaseException, folder: Path) -> int | None:
    """The number of a full disk's error that `error` is, came of or tells: torch, faiss and safetensors hide it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in FULL else None
    if os.strerror(errno.ENOSPC) in str(error):
        return errno.ENOSPC
    is_unexplained = isinstance(error, OSError) or "inline_container.cc" in str(error)  # of numpy and torch
    if is_unexplained and shutil.disk_usage(folder).free < 1 << 20:
        return errno.ENOSPC
    return None if (cause := error.__cause__ or error.__context__) is None else _full(cause, folder)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, whose names are on the disk when it returns; one there is fine too."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_names(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
