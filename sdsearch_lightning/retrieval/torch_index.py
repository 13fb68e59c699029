"""Exact search by matrix products, on any device that torch knows: needs no FAISS, and half the time in bfloat16.

In bfloat16 the scores are wrong by up to a known bound. So the scan only picks candidates, which are scored again in
float32, and the bound tells whether a passage outside them could belong to the k best: where it could, the query is
scanned again in float32. The result is that of an exact search, always.
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

_BLOCK = 64
"""Scores that are passed over together where the largest of them is too small."""
PRECISIONS = ("auto", "float32", "bfloat16")


class TorchIndex:
    """An opened file of vectors.

    Args:
        path: a .npy file of [N, D] normalised float32 vectors; memory-mapped on the CPU, so that ranks share it.
        device: where it is searched.
        scan: "float32"; "bfloat16", which copies half the file into memory (of a GPU: 2 bytes a number, the float32
            rows stay on disk); "auto": bfloat16 on a GPU, else float32, which is faster on most CPUs.
    """

    chunk_rows = 1 << 13
    """Rows per matrix product: bounds the scores held at once to B x this, which then stay in the cache of a CPU."""

    def __init__(self, path: Path, device: Any, scan: str = "auto") -> None:
        import torch

        if scan not in PRECISIONS:
            raise ConfigError(f"scan: expected one of {', '.join(PRECISIONS)}, found {scan!r}.")
        mapped = load_array(path, "c")  # "c": torch wants writable memory; nothing is written
        self._device = torch.device(device)
        if self._device.type != "cpu":
            self.chunk_rows = 1 << 18  # few and large launches
        self._exact = torch.from_numpy(mapped)  # stays where it is: only candidates are read from it
        self._rounded: Tensor | None = None
        if scan == "bfloat16" or (scan == "auto" and self._device.type == "cuda"):
            self._round()
        elif self._device.type != "cpu":
            self._exact = self._exact.to(self._device)

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def dimension(self) -> int:
        """D of its vectors."""
        return int(self._exact.shape[1])

    def _round(self) -> None:
        """Copies the vectors in bfloat16, and keeps the largest length that rounding took from or gave to one."""
        import torch

        self._rounded = torch.empty(self._exact.shape, dtype=torch.bfloat16, device=self._device)
        self._error = 0.0
        for start in range(0, len(self), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            exact = self._exact[rows].to(self._device)
            self._rounded[rows] = exact
            self._error = max(self._error, float((self._rounded[rows].float() - exact).norm(dim=1).max()))

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best rows for each of [B, D] queries; fewer columns where there are fewer rows."""
        import torch

        asked = torch.from_numpy(queries).to(self._device)
        k = min(k, len(self))
        with torch.inference_mode():
            if self._rounded is None:
                scores, rows = self._scan(asked, self._exact, k)
            else:
                scores, rows = self._search_rounded(asked, self._rounded, k)
            rows[~asked.isfinite().all(1)] = -1
        return scores.cpu().numpy(), rows.cpu().numpy()

    def _scan(self, asked: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best of all rows, by products in the precision of `vectors`: scores and rows, [B, k].

        Sorting all scores would cost half as much as the products. Only blocks of them whose largest beats the k-th
        best so far are looked into: k in the first chunk, next to none later on.
        """
        import torch
        from torch.nn.functional import pad

        asked = asked.to(vectors.dtype)
        scores = torch.full((len(asked), k), -torch.inf, device=asked.device)
        rows = torch.full((len(asked), k), -1, device=asked.device)
        columns = torch.arange(_BLOCK, device=asked.device)
        for start in range(0, len(vectors), self.chunk_rows):
            product = (asked @ vectors[start : start + self.chunk_rows].to(asked.device).T).float()  # [B, C]
            if missing := -product.shape[1] % _BLOCK:  # the last chunk
                product = pad(product, (0, missing), value=-torch.inf)
            blocks = product.unflatten(1, (-1, _BLOCK))
            peaks = blocks.amax(-1)  # [B, C / _BLOCK]
            num_blocks = min(int((peaks > scores[:, -1:]).sum(1).max()), k)  # k scores lie in k blocks at most
            if num_blocks == 0:
                continue
            chosen = peaks.topk(num_blocks).indices.unsqueeze(-1)  # [B, num_blocks, 1]
            inside = blocks.gather(1, chosen.expand(-1, -1, _BLOCK)).flatten(1)
            found = (start + chosen * _BLOCK + columns).flatten(1)
            scores, order = torch.cat([scores, inside], 1).topk(k)
            rows = torch.cat([rows, found], 1).gather(1, order)
        return scores, rows

    def _search_rounded(self, asked: Tensor, rounded: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Candidates by bfloat16, their order by float32, and a second look wherever a bound leaves a doubt."""
        num_candidates = min(2 * k + 16, len(self))
        rough, candidates = self._scan(asked, rounded, num_candidates)
        vectors = self._exact[candidates.flatten().to(self._exact.device)].to(asked.device)
        exact = (vectors.view(*candidates.shape, -1) @ asked.unsqueeze(-1)).squeeze(-1)  # [B, candidates]
        scores, order = exact.topk(k)
        rows = candidates.gather(1, order)
        if num_candidates < len(self):
            doubtful = scores[:, -1] < rough[:, -1] + self._bound(asked)
            if doubtful.any():
                scores[doubtful], rows[doubtful] = self._scan(asked[doubtful], self._exact, k)
        return scores, rows

    def _bound(self, asked: Tensor) -> Tensor:
        """[B]: no exact score differs from its bfloat16 one by more.

        |q.x - q'.x'| <= |q - q'| |x'| + |q| |x - x'| for vectors q, x of length 1 and their rounded q', x'; the product
        itself is rounded to bfloat16 too, by at most 2^-8 of it.
        """
        lost = (asked.bfloat16().float() - asked).norm(dim=1)
        length = asked.norm(dim=1)
        return lost * (1 + self._error) + length * self._error + length * 2.0**-8


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
