r"""A checksum at the end of each file of a checkpoint: what a disk changed afterwards is not believed.

    <what torch wrote> sdsearch-crc32:<8 hex digits>\n

It lies in the file, so that it goes where the file goes: a second name, a copy. Readers of zip files look for their
table from the end, those of shards go by offsets, those of pickles stop where the pickle does; none minds a line more.
CRC-32 finds every flipped bit and all but one in 2^32 of other changes, at twice the speed of SHA-256; against intent
it does nothing.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import BinaryIO

from sdsearch_lightning.errors import DataError

_MARK, _DIGITS = b" sdsearch-crc32:", 8
_LENGTH = len(_MARK) + _DIGITS + 1


def seal(path: Path) -> None:
    """Append the checksum of a file that is wholly written, and flush both to the disk."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(_MARK + _checksum(file, size) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: Path) -> bool:
    """Whether a file has a checksum.

    Raises:
        DataError: it has one, of other contents.
    """
    with path.open("rb") as file:
        size = max(0, file.seek(0, os.SEEK_END) - _LENGTH)
        file.seek(size)
        seal = file.read()
        if not seal.startswith(_MARK):
            return False
        if seal != _MARK + (found := _checksum(file, size)) + b"\n":
            kept = seal[len(_MARK) : -1].decode(errors="replace")
            raise DataError(
                f"{path.name} is not what was written (checksum {kept} there, {found.decode()} of its bytes)"
            )
    return True


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Of the first `size` bytes; the file then stands behind them."""
    file.seek(0)
    value = 0
    while size and (chunk := file.read(min(size, 1 << 20))):
        value, size = zlib.crc32(chunk, value), size - len(chunk)
    return b"%08x" % value
