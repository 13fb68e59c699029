"""Exact inner-product search over normalised vectors, by FAISS or, where it is absent, by torch.

Both give the same results, up to float32 rounding and so the order of equal scores.

Each class writes its own file from chunks of vectors and opens it memory-mapped, so that neither building the torch
file nor opening either needs the vectors in memory, and ranks on one node share them.

Next: dense.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.errors import ConfigError

Vectors = NDArray[np.float32]
Found = tuple[Vectors, NDArray[np.int64]]
"""Scores and rows, each [B, k], best first; a row of -1 is no result."""


class FaissFlat:
    """A FAISS Flat index on the CPU."""

    name = "faiss"

    def __init__(self, folder: Path, device: Any) -> None:
        faiss = import_faiss()
        # Shipped as 128000, which makes batched search some twenty times slower than BLAS.
        faiss.cvar.distance_compute_blas_threshold = 20
        # IO_FLAG_MMAP maps inverted lists only and would read a Flat index into memory.
        self._index = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @staticmethod
    def write(folder: Path, chunks: Iterable[Vectors], num_vectors: int) -> None:
        """Writes `num_vectors` vectors, given in chunks of [C, D]."""
        faiss = import_faiss()
        index = None
        for chunk in chunks:
            index = index or faiss.IndexFlatIP(chunk.shape[1])
            index.add(chunk)
        faiss.write_index(index, str(folder / "index.faiss"))

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best rows for each of [B, D] queries."""
        scores, rows = self._index.search(queries, k)
        return scores, rows


class TorchFlat:
    """The same by matrix product, on the device of the encoder: also the way to search exactly on a GPU."""

    name = "torch"
    chunk_rows = 1 << 20
    """Rows per matrix product: bounds the scores held at once to B x this."""

    def __init__(self, folder: Path, device: Any) -> None:
        import torch

        mapped = np.load(folder / "vectors.npy", mmap_mode="c")  # "c": torch wants writable memory; nothing is written
        self._vectors = torch.from_numpy(mapped).to(device)

    def __len__(self) -> int:
        return len(self._vectors)

    @staticmethod
    def write(folder: Path, chunks: Iterable[Vectors], num_vectors: int) -> None:
        """Writes `num_vectors` vectors, given in chunks of [C, D]."""
        file, start = None, 0
        for chunk in chunks:
            if file is None:
                shape = (num_vectors, chunk.shape[1])
                file = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
            file[start : start + len(chunk)] = chunk
            start += len(chunk)
        assert file is not None and start == num_vectors, "the corpus and its vectors have the same length"
        file.flush()

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best rows for each of [B, D] queries; fewer columns where there are fewer rows."""
        import torch

        wanted = torch.from_numpy(queries).to(self._vectors.device)
        scores = wanted.new_empty(len(queries), 0)
        rows = wanted.new_empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self), self.chunk_rows):
            chunk = wanted @ self._vectors[start : start + self.chunk_rows].T  # [B, C]
            best = chunk.topk(min(k, chunk.shape[1]))
            scores, rows = torch.cat([scores, best.values], 1), torch.cat([rows, best.indices + start], 1)
            scores, order = scores.topk(min(k, scores.shape[1]))
            rows = rows.gather(1, order)
        return scores.cpu().numpy(), rows.cpu().numpy()


FLAT_INDEXES = {index.name: index for index in (FaissFlat, TorchFlat)}


def choose_backend(backend: str) -> type[FaissFlat] | type[TorchFlat]:
    """The index class for "faiss", "torch" or "auto": FAISS where it is installed.

    Raises:
        ConfigError: an unknown name, or "faiss" where it cannot be imported; the message holds the repair.
    """
    if backend == "auto":
        try:
            import_faiss()
        except ConfigError as error:
            if _installed_wheels():  # installed, but broken: say so
                warnings.warn(f"{error} Exact search by torch is used instead.", stacklevel=2)
            return TorchFlat
        return FaissFlat
    if backend not in FLAT_INDEXES:
        raise ConfigError(f"backend: expected 'auto', 'faiss' or 'torch', found {backend!r}.")
    if backend == "faiss":
        import_faiss()
    return FLAT_INDEXES[backend]


@cache
def import_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        ConfigError: it is not installed, or two wheels have overwritten each other; the message holds the repair.
    """
    reason: Exception | str
    try:
        import faiss

        if hasattr(faiss, "IndexFlatIP"):
            return faiss
        reason = "the package is an empty husk"  # what an uninstall of one of two wheels leaves
    except (ImportError, RuntimeError) as error:  # RuntimeError: faiss-gpu without the CUDA libraries
        reason = error
    wheels = _installed_wheels()
    if len(wheels) == 2:
        repair = "faiss-cpu and faiss-gpu overwrite each other; keep one: "
        repair += "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu"
    elif wheels:
        repair = f"Reinstall it: pip uninstall -y {wheels[0]} && pip install {wheels[0]}"
    else:
        repair = "Install it: pip install faiss-cpu (or faiss-gpu, never both)"
    raise ConfigError(f"FAISS cannot be used ({reason}). {repair}")


def _installed_wheels() -> list[str]:
    wheels = []
    for wheel in ("faiss-cpu", "faiss-gpu"):
        try:
            version(wheel)
        except PackageNotFoundError:
            continue
        wheels.append(wheel)
    return wheels
