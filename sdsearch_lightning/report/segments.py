"""Closed segments of a growing file: `trajectories.00001.jsonl.gz` and so on, beside `trajectories.jsonl`.

A file that has become large enough is packed into the next segment and begins anew, always between two batches, so a
segment ends at a line. Invariant: the segments in order and then the file are the same lines, whatever was killed and
whenever the power was cut: a segment is on the disk before the file is emptied, and the other way round when it is
opened again; the two of them together are recognised. They are plain gzip files (`zcat`), and equal lines make equal
bytes.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import remove, sync, sync_names, written_whole

_LEVEL = 3  # on English, 80 MB/s to 34 % of the bytes; level 6 takes 30 MB/s to 31 %


def segments_of(path: Path) -> list[Path]:
    """The closed segments of `path`, oldest first."""
    return sorted(path.parent.glob(f"{path.stem}.[0-9]*{path.suffix}.gz"))


def close_segment(path: Path) -> None:
    """Packs what `path` holds into its next segment, and empties it."""
    number = 1 + (_number(path, segments[-1]) if (segments := segments_of(path)) else 0)
    with written_whole(path.with_suffix(f".{number:05d}{path.suffix}.gz")) as draft:
        with path.open("rb") as lines, draft.open("wb") as file:
            with gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed:  # neither name nor time: equal bytes
                shutil.copyfileobj(lines, packed)
    os.truncate(path, 0)
    sync(path)


def reopen_after(path: Path, step: int) -> tuple[int, list[str]]:
    """Makes `path` hold every line of a step after `step`, so that it can be cut; segments that held some are gone.

    A run that goes on from a step then has the segments that it had when it was there. One that is read for this and
    proves damaged is set aside, under its name and `.damaged`.

    Returns:
        The step that the segments then end with, 0 where there are none; and what is lost, a line each.
    """
    lost: list[str] = []
    for newest in reversed(segments_of(path)):
        try:
            lines = [*_unpacked(newest)]
        except DataError as error:
            os.replace(newest, aside := newest.with_name(f"{newest.name}.damaged"))
            lost.append(
                f"{newest} is damaged and set aside as {aside.name}: its rollouts are lost ({error.__cause__})."
            )
            continue
        if not (path.is_file() and _first(path) == lines[0]):  # else it was being closed: the file is still whole
            last = next((found for line in reversed(lines) if (found := step_of(line)) is not None), 0)
            if last <= step:
                return last, lost
            with written_whole(path) as draft, draft.open("wb") as file:
                file.writelines(lines)
        remove(newest)
        sync_names(path.parent)
    return 0, lost


def step_of(line: bytes) -> int | None:
    """The step of a line; None where it is no record."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return None


def numbered_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """All lines of `path`, those of its segments first, and the place of each for a message.

    Raises:
        DataError: a segment that a disk has damaged.
    """
    for segment in segments_of(path):
        for number, line in enumerate(_unpacked(segment), start=1):
            yield line, f"{segment} line {number}"
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield line, f"{path} line {number}"


def _unpacked(segment: Path) -> Iterator[bytes]:
    try:
        if not segment.stat().st_size:
            raise EOFError("it is empty")  # gzip takes that for a file of no lines
        with gzip.open(segment, "rb") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{segment}: expected a whole gzip file, found damage ({error}). Move it elsewhere.") from error


def _first(path: Path) -> bytes:
    with path.open("rb") as lines:
        return lines.readline()


def _number(path: Path, segment: Path) -> int:
    return int(segment.name.removeprefix(f"{path.stem}.").partition(".")[0])
