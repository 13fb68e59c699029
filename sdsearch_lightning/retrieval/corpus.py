"""The passages of a corpus file, read on demand: row i of the index is passage i of the file, and nothing else is kept.

File and byte offsets are both memory-mapped, so a corpus of any size opens at once and ranks share its memory.
"""

from __future__ import annotations

import json
import mmap
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import written_whole
from sdsearch_lightning.retrieval.index_folder import CorpusFile
from sdsearch_lightning.retrieval.jsonl import parse_object
from sdsearch_lightning.retrieval.rows import read_rows
from sdsearch_lightning.types import Passage

_OFFSETS, _UNPACKED = "offsets.npy", "corpus.jsonl"
_LARGE = 100_000_000  # bytes, from which reading takes long enough to be told


class Corpus:
    r"""A plain .jsonl corpus with random access.

    Args:
        path: rows {id, contents}, or {id, title, text}, which reads as '"title"\ntext' (the Search-R1 convention).
        offsets: [N] byte at which each row starts.
    """

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        self.path = path
        self._offsets = offsets
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Passage:
        start = int(self._offsets[index])
        end = self._bytes.find(b"\n", start)
        where = f"{self.path} passage {index}"
        return parse_passage(parse_object(self._bytes[start : end if end >= 0 else None], where), where)

    def contents(self, size: int, start: int = 0) -> Iterator[Sequence[str]]:
        """What an encoder reads: the contents of all passages from `start` on, in lists of at most `size`."""
        for first in range(start, len(self), size):
            yield [self[index].contents for index in range(first, min(first + size, len(self)))]

    def close(self) -> None:
        """Give the memory maps of file and offsets back."""
        self._bytes.close()

    @classmethod
    def open(cls, source: Path, folder: Path) -> Corpus:
        """The corpus that `write_corpus` has made ready in `folder`."""
        offsets = load_array(folder / _OFFSETS)
        return cls(folder / _UNPACKED if (folder / _UNPACKED).is_file() else source, offsets)


def write_corpus(source: CorpusFile, folder: Path) -> dict[str, Any]:
    """Reads a whole corpus once, checks every row, and writes to `folder` what random access needs.

    That is the offset table; and, since rows of a packed file cannot be reached by offset, a plain copy of a .gz or
    .parquet one. Returned is what a manifest tells of the corpus.

    Raises:
        DataError: an empty corpus, a row without the keys it needs (file and line are named), or a file that changes
            while it is read.
    """
    if not (folder / _OFFSETS).is_file():  # else an earlier, killed call has come further
        if (size := source.path.stat().st_size) >= _LARGE:
            packed = (
                "" if source.path.suffix == ".jsonl" else "; its plain copy beside the index takes 3 to 4 times that"
            )
            say(f"reading {source.path} ({size / 1e9:.1f} GB{packed})")
        offsets = _offsets(source.path, folder)
        source.check()
        with written_whole(folder / _OFFSETS) as draft, draft.open("wb") as file:
            np.save(file, np.frombuffer(offsets, dtype=np.int64))
    num_passages = len(load_array(folder / _OFFSETS))
    return {"corpus_file": str(source.path), "corpus_stamp": source.stamp, "num_passages": num_passages}


def load_array(path: Path, mode: Literal["r", "c"] = "r") -> NDArray[Any]:
    """An array of an index, mapped.

    Raises:
        DataError: the file is lost, cut or no array.
    """
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
        len(array)
        return array
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:100] or type(error).__name__
        told = f"{path}: expected an array ({reason}). Delete the folder {path.parent}; it is built again."
        raise DataError(told) from error


def say(line: str) -> None:
    """Tells whoever waits for a long build what it is doing."""
    print(f"index: {line}", file=sys.stderr, flush=True)


def _offsets(source: Path, folder: Path) -> array[int]:
    """Where each row starts: in the file, or in its plain copy, which is written."""
    offsets = array("q")
    if source.suffix == ".jsonl":
        for row in read_rows(source):
            parse_passage(row.values, row.where)
            offsets.append(row.offset)
    else:
        with (folder / _UNPACKED).open("wb") as unpacked:
            for row in read_rows(source):
                parse_passage(row.values, row.where)
                offsets.append(unpacked.tell())
                unpacked.write(json.dumps(row.values, default=str).encode() + b"\n")
    if not offsets:
        raise DataError(f"{source}: expected at least one passage, found an empty file. A search needs a corpus.")
    return offsets


def parse_passage(values: dict[str, Any], where: str) -> Passage:
    """The passage that a corpus row describes; keys beyond id and contents go to its `fields`.

    Raises:
        DataError: neither id and contents nor id and text (a title goes before it) are there, or not as text; the
            message begins with `where`.
    """
    contents, title, text = (values.get(key) for key in ("contents", "title", "text"))
    if contents is None and isinstance(text, str):
        contents = f'"{title}"\n{text}' if isinstance(title, str) else text
    if not isinstance(contents, str) or not isinstance(values.get("id"), str | int):
        shown = {key: type(value).__name__ for key, value in sorted(values.items())}
        raise DataError(f"{where}: expected 'id' and a text 'contents' (or 'id', 'title' and 'text'), found {shown}.")
    fields = {key: value for key, value in values.items() if key not in ("id", "contents")}
    return Passage(str(values["id"]), contents, fields=fields)
