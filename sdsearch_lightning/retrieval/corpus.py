"""The passages of a corpus file, read on demand: row i of the index is passage i of the file, and nothing else is kept.

File and byte offsets are both memory-mapped, so a corpus of any size opens at once and ranks share its memory.

Next: flat_index.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.jsonl import parse_object, read_jsonl
from sdsearch_lightning.types import Passage


class Corpus:
    r"""A plain .jsonl corpus with random access.

    Args:
        path: rows {id, contents}, or {id, title, text}, which reads as '"title"\ntext' (the Search-R1 convention).
        offsets: [N] byte at which each row starts, from `scan_corpus`.
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

    def contents(self, size: int) -> Iterator[Sequence[str]]:
        """What an encoder reads: the contents of all passages in order, in lists of at most `size`."""
        for start in range(0, len(self), size):
            yield [self[index].contents for index in range(start, min(start + size, len(self)))]

    def close(self) -> None:
        """Unmaps the file."""
        self._bytes.close()


def scan_corpus(path: Path) -> NDArray[np.int64]:
    """Reads a whole corpus once, checks every row, and returns the byte offset of each, [N].

    Raises:
        DataError: an empty corpus, or a row without the keys it needs; file and line are named.
    """
    offsets = [row.offset for row in read_jsonl(path) if parse_passage(row.values, row.where)]
    if not offsets:
        raise DataError(f"{path}: expected at least one passage, found an empty file. A search needs a corpus.")
    return np.array(offsets, dtype=np.int64)


def parse_passage(values: dict[str, Any], where: str) -> Passage:
    """The passage that a corpus row describes; keys beyond id and contents go to its `fields`.

    Raises:
        DataError: neither id and contents nor id, title and text are there; the message begins with `where`.
    """
    contents = values.get("contents")
    if contents is None and isinstance(values.get("title"), str) and isinstance(values.get("text"), str):
        contents = f'"{values["title"]}"\n{values["text"]}'
    if not isinstance(contents, str) or not isinstance(values.get("id"), str | int):
        raise DataError(
            f"{where}: expected the keys 'id' and 'contents' (or 'id', 'title' and 'text'), found {sorted(values)}."
        )
    fields = {key: value for key, value in values.items() if key not in ("id", "contents")}
    return Passage(str(values["id"]), contents, fields=fields)
