"""An index of vectors that another program has encoded: Search-R1's `emb_<name>.memmap`, float32 numbers by rows.

What comes of it is a plain FAISS file, as Search-R1's builder writes it; `DenseRetriever` reads it with the checks of
any file that is not its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import telling_full_disk
from sdsearch_lightning.retrieval.faiss_index import write_faiss_index

_SAMPLE = 1000


def index_embeddings(embeddings: Path, dimension: int, index_file: Path, factory: str = "Flat") -> int:
    """Writes a FAISS index of all vectors in a file, in their order; returns how many there are.

    Args:
        embeddings: [N, D] float32 numbers and nothing else.
        dimension: D, of the encoder that made them.
        index_file: where to; its folder is made.
        factory: kind of the index.

    Raises:
        ConfigError: no such file, one of another size, or vectors that are not of length 1.
    """
    row = 4 * dimension
    size = embeddings.stat().st_size if embeddings.is_file() else 0
    if size == 0 or size % row:
        raise ConfigError(
            f"embedding_path: expected a file of float32 vectors of {dimension} numbers, so of a multiple of {row} "
            f"bytes, found {size} bytes in {embeddings}. Name the encoder (--model_path) that made them."
        )
    vectors = np.memmap(embeddings, dtype=np.float32, mode="r", shape=(size // row, dimension))
    sample = vectors[np.unique(np.linspace(0, len(vectors) - 1, _SAMPLE).astype(int))]
    lengths = np.linalg.norm(sample, axis=1)
    if not (np.abs(lengths - 1) < 0.01).all():  # also where one is no number
        raise ConfigError(
            f"embedding_path: expected vectors of length 1, as Search-R1 saves them, found lengths from "
            f"{lengths.min():.3g} to {lengths.max():.3g} in {embeddings}. Divide each by its length."
        )
    index_file.parent.mkdir(parents=True, exist_ok=True)
    with telling_full_disk(index_file):
        write_faiss_index(index_file, vectors, factory)
    return len(vectors)
