"""JSON lines, plain or gzipped: rows that know the place which an error about them has to name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.text import is_whole


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a file, and where it stands."""

    values: dict[str, Any]
    where: str
    """File and line or row (counted from 1), as every message about the row begins."""
    offset: int
    """Byte at which the line starts in the (unpacked) file; of a file without lines, the rows before this one."""


def require_file(path: Path) -> None:
    """Nothing, where there is a file.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataError(f"Expected a file at {path}, found {found}. Relative paths start at {Path.cwd()}.")


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, unpacking .gz on the way.

    Raises:
        DataError: there is no such file.
    """
    require_file(path)
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_jsonl(path: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .jsonl.gz file in order; blank lines are passed over.

    Raises:
        DataError: a missing file, a damaged archive, or a line that is not one JSON object; file and line are named.
    """
    offset = line = 0
    with open_file(path) as file:
        try:
            for line, raw in enumerate(file, start=1):
                if raw.strip():
                    where = f"{path} line {line}"
                    yield Row(parse_object(raw, where), where, offset)
                offset += len(raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} line {line + 1}: the archive is damaged ({error}). Download it again.") from error


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object on one line.

    Raises:
        DataError: it is something else; the message begins with `where`.
    """
    shown = raw[:60].decode(errors="replace").strip()
    try:
        values = json.loads(raw)
    except ValueError as error:  # bad JSON, or bytes that are no UTF-8
        raise DataError(f"{where}: expected one JSON object, found {shown!r} ({error}).") from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected one JSON object, found the {type(values).__name__} {shown!r}.")
    if b"\\u" in raw and not is_whole(values):  # only an escape can bring it
        bad = next((key for key, value in values.items() if not is_whole(value)), "a key")
        raise DataError(f"{where}: expected text, found half a character (a lone surrogate) under {ascii(bad)}.")
    return values
