"""Rates of one core, from which docs/retrieval.md works out what 21 million passages take: times, for planning only.

    python -m benchmarks.retrieval_rates

An encoder of e5-base's shape (12 layers, width 768; random weights) reads passages of 140 tokens and queries of 16;
Flat and IVF indexes of 768 dimensions answer batches of 256.
"""

from __future__ import annotations

from benchmarks.harness import compare, environment, pin_threads

pin_threads()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from benchmarks.bench_retrieval import K, clustered  # noqa: E402
from sdsearch_lightning.retrieval.faiss_index import FaissIndex, write_faiss_index  # noqa: E402
from sdsearch_lightning.retrieval.torch_index import TorchIndex, write_vectors  # noqa: E402

BATCH = 16
VECTORS = 200_000


def main() -> int:
    """Prints milliseconds per text, and per query and million vectors."""
    print(json.dumps(environment()))
    for dtype in (torch.float32, torch.bfloat16):
        model = BertModel(BertConfig()).to(dtype).eval()
        for name, length in (("passage, 140 tokens", 140), ("query, 16 tokens", 16)):
            ids = torch.randint(1000, 30_000, (BATCH, length))
            with torch.inference_mode():
                seconds = compare({"it": lambda model=model, ids=ids: model(ids)}, 3)["it"].median
            print(f"encode a {name}, {str(dtype)[6:]}: {1e3 * seconds / BATCH:.1f} ms")
    vectors, queries = clustered(VECTORS, 768, 256)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = write_vectors(folder / "v.npy", *vectors.shape)
        file[:] = vectors
        file.flush()
        writing = {}
        for factory in ("Flat", "IVF1024,SQ8"):
            path = folder / factory
            timing = compare({"it": lambda path=path, kind=factory: write_faiss_index(path, vectors, kind)}, 1, 0)
            writing[factory] = timing["it"].median
        indexes: dict[str, FaissIndex | TorchIndex] = {
            "FAISS Flat": FaissIndex(folder / "Flat"),
            "FAISS IVF1024,SQ8": FaissIndex(folder / "IVF1024,SQ8"),
        }
        indexes["torch bfloat16"] = TorchIndex(folder / "v.npy", "cpu", "bfloat16")
        searches = {name: lambda index=index: index.search(queries, K) for name, index in indexes.items()}
        for name, searched in compare(searches, 3).items():
            each = 1e3 * searched.median / len(queries) * 1e6 / VECTORS
            print(f"search, {name}: {each:.2f} ms a query and million vectors")
        for factory, seconds in writing.items():
            print(f"build, {factory}: {1e6 * seconds / VECTORS:.0f} s a million vectors, once encoded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
