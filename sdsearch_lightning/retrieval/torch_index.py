"""Exact search by matrix products, on any device that torch knows: needs no FAISS, and half the time in bfloat16.

In bfloat16 the scores are wrong by up to a known bound. So the scan only picks candidates, which are scored again in
float32; where more passages than were looked at could belong to the k best, the query is scanned again in float32.
The result is that of an exact search, always.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.corpus import load_array
from sdsearch_lightning.retrieval.faiss_index import Found, Vectors

if TYPE_CHECKING:
    from torch import Tensor

    from sdsearch_lightning.retrieval.scan import Rounded

_ROWS = 1 << 14
"""Vectors that are rounded together."""
PRECISIONS = ("auto", "float32", "bfloat16")


class TorchIndex:
    """An opened file of vectors.

    Args:
        path: a .npy file of [N, D] normalised float32 vectors; memory-mapped on the CPU, so that ranks share it.
        device: where it is searched.
        scan: "float32"; "bfloat16", which copies half the file into memory (of a GPU: 2 bytes a number, the float32
            rows stay on disk); "auto": bfloat16 on a GPU, else float32, which is faster on most CPUs.
    """

    def __init__(self, path: Path, device: Any, scan: str = "auto") -> None:
        import torch

        from sdsearch_lightning.retrieval.scan import Rounded

        if scan not in PRECISIONS:
            raise ConfigError(f"scan: expected one of {', '.join(PRECISIONS)}, found {scan!r}.")
        mapped = load_array(path, "c")  # "c": torch wants writable memory; nothing is written
        self._device = torch.device(device)
        self._exact = torch.from_numpy(mapped)  # stays where it is: only candidates are read from it
        self._rounded: Rounded | None = None
        if scan == "bfloat16" or (scan == "auto" and self._device.type == "cuda"):
            self._rounded = Rounded.of(self._exact.split(_ROWS), len(self), self.dimension, self._device)
        elif self._device.type != "cpu":
            self._exact = self._exact.to(self._device)

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def dimension(self) -> int:
        """D of its vectors."""
        return int(self._exact.shape[1])

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best rows for each of [B, D] queries, B > 0; fewer columns where there are fewer rows."""
        import torch

        from sdsearch_lightning.retrieval.scan import best_rows, queries_at_once

        largest = np.abs(queries).max(axis=1, keepdims=True)
        is_known, zero = np.isfinite(largest), np.float32(0)
        # A power of two takes nothing from a query, and keeps the squares that bounds are made of within float32.
        power = np.frexp(np.where(is_known, largest, zero))[1]
        asked = torch.from_numpy(np.ldexp(np.where(is_known, queries, zero), -power)).to(self._device)
        k = min(k, len(self))
        found = []
        with torch.inference_mode():
            for some in asked.split(queries_at_once(len(self), k)):
                if self._rounded is None:
                    scores, rows = best_rows(some, self._exact, k)
                else:
                    scores, rows = self._search_rounded(some, self._rounded, k)
                found.append((scores, rows))
            best, which = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        with np.errstate(over="ignore"):
            return np.ldexp(best, power), np.where(is_known, which, -1)

    def _search_rounded(self, asked: Tensor, rounded: Rounded, k: int) -> tuple[Tensor, Tensor]:
        """Candidates by bfloat16, their order by float32, and a second scan where a bound leaves a doubt."""
        import torch

        from sdsearch_lightning.retrieval.scan import best_rows, score_rows

        found = rounded.candidates(asked, k)
        query, place = found.near_mask.nonzero(as_tuple=True)
        exact = torch.full(found.rows.shape, -torch.inf, device=asked.device)
        exact[query, place] = score_rows(asked, self._exact, query, found.rows[query, place, None])[:, 0]
        scores, order = exact.topk(k)
        rows = found.rows.gather(1, order)
        if (doubtful := found.is_doubtful).any():
            scores[doubtful], rows[doubtful] = best_rows(asked[doubtful], self._exact, k)
        return scores, rows


MappedVectors = np.memmap[tuple[int, int], np.dtype[np.float32]]
"""[N, D] in a .npy file; nothing of it is held in memory."""


def write_vectors(path: Path, num_vectors: int, dimension: int) -> MappedVectors:
    """A new file of [N, D] float32 vectors, mapped, to be filled."""
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_vectors, dimension))
    with path.open("r+b") as file:  # a disk that is full is an error now, not a signal in the middle of a write
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return vectors


def reopen_vectors(path: Path) -> MappedVectors:
    """A file of vectors that a killed build has begun, mapped, to be filled further."""
    return np.lib.format.open_memmap(path, mode="r+")
