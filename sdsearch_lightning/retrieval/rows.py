"""Rows of a data file, streamed: corpora, questions and demonstrations all come through `read_rows`.

Invariant: a file is never held in memory, and no more of it is read than is asked for. A new suffix is a line of
`_READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.jsonl import Row, read_jsonl, require_file

_ROWS_AT_ONCE = 1024
_READ_AHEAD = 1 << 20  # bytes per column; without it a whole row group is read, however few rows are wanted


def read_rows(path: Path, limit: int | None = None, without: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, in order, as plain Python values.

    Args:
        path: the file; its suffix says what it is.
        limit: stop after this many rows, and read no further.
        without: columns that a .parquet file leaves packed, for speed; lines of JSON come whole.

    Raises:
        DataError: an unknown suffix, a missing or damaged file, or a row that is no object; file and row are named.
        ConfigError: a .parquet file without pyarrow.
    """
    reader = next((read for suffix, read in _READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        known = ", ".join(_READERS)
        raise DataError(f"{path}: expected a file that ends in one of {known}, found {path.name!r}.")
    return islice(reader(path, limit, without), limit)


def _read_parquet(path: Path, limit: int | None, without: Collection[str]) -> Iterator[Row]:
    require_file(path)
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped]
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped]
    except ImportError as error:
        raise ConfigError(
            f'{path}: reading .parquet needs pyarrow, found none ({error}). pip install "sdsearch-lightning[data]".'
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_READ_AHEAD) as file:
            columns = [name for name in file.schema_arrow.names if name not in without] if without else None
            for batch in file.iter_batches(min(limit or _ROWS_AT_ONCE, _ROWS_AT_ONCE), columns=columns):
                for values in batch.to_pylist():
                    yield Row(values, f"{path} row {number + 1}", number)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        shown = str(error).splitlines()[0]
        raise DataError(f"{path} row {number + 1}: the file is damaged ({shown}). Download it again.") from error


_READERS: dict[str, Callable[[Path, int | None, Collection[str]], Iterator[Row]]] = {
    ".jsonl": lambda path, limit, without: read_jsonl(path),
    ".jsonl.gz": lambda path, limit, without: read_jsonl(path),
    ".parquet": _read_parquet,
}
