"""A FAISS index over normalised vectors, by factory string: Flat, IVF4096,SQ8, IVF4096,PQ64, HNSW32, ...

The file is what `faiss.write_index` writes, row i being passage i: what Search-R1 reads and writes as `e5_Flat.index`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.files import written_whole
from sdsearch_lightning.retrieval.faiss_library import import_faiss

Vectors = NDArray[np.float32]
Found = tuple[Vectors, NDArray[np.int64]]
"""Scores and rows, each [B, k], best first; a row of -1 is no result."""

_BLAS_QUERIES = 4
_SLACK = 1 << 20
"""Bytes, as FAISS compares rounded sizes, and smaller than it."""
_ROWS = 1 << 16
"""Vectors copied from disk at once."""


class FaissIndex:
    """An opened index.

    Args:
        path: a file of `faiss.write_index`; it is memory-mapped where FAISS can (Flat, IVF), so ranks share it.
        nprobe: inverted lists that a query visits (IVF): more find more and take longer.
        ef_search: candidates that a query keeps (HNSW): likewise.
        gpus: put it on all GPUs that FAISS sees, each holding a part, in half precision.
    """

    def __init__(self, path: Path, nprobe: int = 32, ef_search: int = 128, gpus: bool = False) -> None:
        faiss = import_faiss()
        try:
            # IO_FLAG_MMAP maps inverted lists only and would read a Flat index into memory. The table of IVF,PQ serves
            # distances, not products, and is larger than the file where vectors are few.
            flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
            with _believing(path.stat().st_size):
                self._index = faiss.read_index(str(path), flags)
        except (RuntimeError, MemoryError, OSError) as error:
            reason = str(error).rpartition("Error: ")[2] or str(error)
            raise DataError(f"{path}: expected a FAISS index, found a file that it cannot read ({reason}).") from error
        if self._index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise DataError(
                f"{path}: expected an index of inner products (METRIC_INNER_PRODUCT), found metric "
                f"{self._index.metric_type}. Build it anew: sdsearch index --corpus_path ... --index_path ..."
            )
        if (lists := faiss.try_extract_index_ivf(self._index)) is not None:  # also behind a transform: OPQ64,IVF...
            lists.nprobe = min(nprobe, lists.nlist)
        if hasattr(base := _behind_transforms(self._index), "hnsw"):
            base.hnsw.efSearch = ef_search
        if gpus:
            self._index = _on_gpus(self._index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """D of its vectors."""
        return int(self._index.d)

    def search(self, queries: Vectors, k: int) -> Found:
        """The k best rows for each of [B, D] queries."""
        # Shipped so that BLAS is hardly ever used, which makes a large batch several times slower. For up to three
        # queries it is BLAS that is up to four times slower.
        import_faiss().cvar.distance_compute_blas_threshold = 1 if len(queries) >= _BLAS_QUERIES else 1 << 30
        scores, rows = self._index.search(queries, min(k, len(self)))
        return scores, rows

    def stored(self, rows: NDArray[np.int64]) -> Vectors | None:
        """[n, D] vectors of some rows; None where the kind of index does not keep them one by one."""
        try:
            return np.stack([self._index.reconstruct(int(row)) for row in rows])
        except RuntimeError:
            return None


@contextmanager
def _believing(num_bytes: int) -> Iterator[None]:
    """FAISS makes room for what a header claims before it reads on: let that be no more than the file has."""
    faiss = import_faiss()
    before = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(num_bytes + _SLACK)
    try:
        yield
    finally:
        faiss.set_deserialization_vector_byte_limit(before)


def write_faiss_index(path: Path, vectors: Vectors, factory: str, seed: int = 0) -> None:
    """Trains an index where its kind needs that, adds all [N, D] vectors in order, and writes it.

    Raises:
        ConfigError: a factory string that FAISS does not know, or that needs more vectors to train on.
    """
    faiss = import_faiss()
    index = make_faiss_index(vectors.shape[1], factory)
    with _explained(factory, vectors.shape[1]):
        if not index.is_trained:
            index.train(_training_sample(vectors, index, factory, seed))
        for start in range(0, len(vectors), _ROWS):
            index.add(np.ascontiguousarray(vectors[start : start + _ROWS]))
    with written_whole(path) as draft:
        faiss.write_index(index, str(draft))


def make_faiss_index(dimension: int, factory: str) -> Any:
    """An empty index of inner products.

    Raises:
        ConfigError: a factory string that FAISS does not know.
    """
    faiss = import_faiss()
    with _explained(factory, dimension):
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
        if index.is_trained:  # some kinds cannot add vectors by their order: better now than after the encoding
            index.add(np.zeros((1, dimension), np.float32))
            index.reset()
        return index


@contextmanager
def _explained(factory: str, dimension: int) -> Iterator[None]:
    """Turns what FAISS says into an error of the option."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].strip() or str(error)
        raise ConfigError(
            f"factory: expected a FAISS factory string that works for {dimension} dimensions, such as Flat, "
            f"'IVF4096,SQ8', 'IVF4096,PQ64' or HNSW32, found {factory!r} ({reason.splitlines()[0]})."
        ) from error


def bytes_per_vector(dimension: int, factory: str) -> int:
    """What a vector takes in the index, in the file and in memory alike."""
    faiss = import_faiss()
    index = make_faiss_index(dimension, factory)
    if hasattr(base := _behind_transforms(index), "hnsw"):  # links of the lowest layer, and of the few above it
        return int(base.storage.sa_code_size() + 4 * 1.1 * base.hnsw.nb_neighbors(0))
    if (lists := faiss.try_extract_index_ivf(index)) is not None:
        return int(lists.code_size) + 8  # its id
    with _explained(factory, dimension):
        return int(index.sa_code_size())


def _behind_transforms(index: Any) -> Any:
    """The index that holds the vectors: of "PCA64,HNSW32" the HNSW."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def _training_sample(vectors: Vectors, index: Any, factory: str, seed: int) -> Vectors:
    """Random rows: FAISS asks for 39 to 256 a centroid, and is slow with more."""
    lists = import_faiss().try_extract_index_ivf(index)
    num_lists = int(lists.nlist) if lists is not None else 0
    if len(vectors) < max(num_lists, 256):  # 256: the centroids of a product quantizer's byte
        raise ConfigError(
            f"factory: {factory!r} expects at least {max(num_lists, 256)} passages to train on, found {len(vectors)}. "
            f"Use fewer lists (4 x the square root of the passages is usual), or Flat."
        )
    size = min(len(vectors), max(128 * num_lists, 1 << 16))
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), size, replace=False))
    return np.ascontiguousarray(vectors[rows])


def _on_gpus(index: Any) -> Any:
    faiss = import_faiss()
    # index_cpu_to_all_gpus gives an empty index where there are none.
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ConfigError(
            "backend: expected a GPU for 'faiss-gpu', found none that FAISS sees. It needs the wheel faiss-gpu "
            "(pip uninstall -y faiss-cpu && pip install faiss-gpu) and a device; 'torch' searches on a GPU without it."
        )
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.useFloat16 = True, True
    return faiss.index_cpu_to_all_gpus(index, co=options)
