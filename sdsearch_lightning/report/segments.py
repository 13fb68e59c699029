"""Closed segments of a growing file: `trajectories.00001.jsonl.gz` and so on, beside `trajectories.jsonl`.

A file that has become large enough is packed into the next segment and begins anew, always between two batches, so a
segment ends at a line. Invariant: the segments in order and then the file are the same lines, whatever was killed. They
are plain gzip files (`zcat`), and equal lines make equal bytes.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import remove, written_whole

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
            file.flush()
            os.fsync(file.fileno())
    os.truncate(path, 0)


def reopen_after(path: Path, step: int) -> None:
    """Makes `path` hold every line of a step after `step`, so that it can be cut; segments that held some are gone.

    A run that goes on from a step then has the segments that it had when it was there.
    """
    segments = segments_of(path)
    if segments and path.is_file() and _first(path) == next(_unpacked(segments[-1]), b""):
        remove(segments.pop())  # killed as it was closed: the file is still whole
    while segments and json.loads(deque(_unpacked(segments[-1]), maxlen=1)[0])["step"] > step:
        newest = segments.pop()
        with written_whole(path) as draft, draft.open("wb") as file:
            file.writelines(_unpacked(newest))
        remove(newest)


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
        with gzip.open(segment, "rb") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{segment}: expected a whole gzip file, found damage ({error}). Move it elsewhere.") from error


def _first(path: Path) -> bytes:
    with path.open("rb") as lines:
        return lines.readline()


def _number(path: Path, segment: Path) -> int:
    return int(segment.name.removeprefix(f"{path.stem}.").partition(".")[0])
