"""Retrieval against the default FAISS setting, and against itself: exact scans, kinds of index, caching, the server.

    python -m benchmarks.bench_retrieval [--parts flat,kinds,unique,server]

All parts count CPU time of one thread, but for the server's: it runs beside its client, so there it is wall time.
"""

from __future__ import annotations

from benchmarks.harness import Bar, Report, compare, pin_threads

pin_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from sdsearch_lightning.retrieval import CachedRetriever, DenseRetriever, RemoteRetriever  # noqa: E402
from sdsearch_lightning.retrieval.faiss_index import (  # noqa: E402
    FaissIndex,
    Found,
    Vectors,
    bytes_per_vector,
    write_faiss_index,
)
from sdsearch_lightning.retrieval.faiss_library import import_faiss  # noqa: E402
from sdsearch_lightning.retrieval.torch_index import TorchIndex, write_vectors  # noqa: E402
from sdsearch_lightning.types import Passage  # noqa: E402

K = 3
DEFAULT_THRESHOLD = 128_000
"""`faiss.cvar.distance_compute_blas_threshold` as FAISS ships it."""


def main() -> int:
    """Runs the parts; 1 where a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="flat,kinds,unique,server", help="comma-separated")
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=384, help="of the flat part")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    import_faiss().omp_set_num_threads(1)
    report = Report("bench_retrieval", vars(options))
    parts = {"flat": flat, "kinds": kinds, "unique": unique, "server": server}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts.split(","):
            parts[name](report, Path(folder), options)
    return report.finish()


# Exact search


def flat(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """FAISS as it ships, FAISS as we set it, and torch in float32 and bfloat16, on the same vectors."""
    vectors, queries = clustered(options.vectors, options.dimension, 256)
    write_faiss_index(folder / "flat.index", vectors, "Flat")
    file = write_vectors(folder / "vectors.npy", *vectors.shape)
    file[:] = vectors
    file.flush()
    default = import_faiss().read_index(str(folder / "flat.index"))
    indexes: dict[str, FaissIndex | TorchIndex] = {
        "faiss": FaissIndex(folder / "flat.index"),
        "torch float32": TorchIndex(folder / "vectors.npy", "cpu", "float32"),
        "torch bfloat16": TorchIndex(folder / "vectors.npy", "cpu", "bfloat16"),
    }
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :K]
    for name, index in indexes.items():
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(index.search(queries, K)[1], exact, strict=True)])
        report.add("flat", Bar.counted(f"recall@{K} of {name}", float(recall), at_least=1.0))

    def as_shipped(asked: Vectors) -> Found:
        import_faiss().cvar.distance_compute_blas_threshold = DEFAULT_THRESHOLD
        return default.search(asked, K)

    for batch in (1, 16, 256):
        asked = queries[:batch]
        variants = {"default": lambda asked=asked: as_shipped(asked)}
        variants |= {name: lambda asked=asked, index=index: index.search(asked, K) for name, index in indexes.items()}
        timings = compare(variants, options.repetitions)
        for name in indexes:
            bar = {"at_least": 10.0} if batch == 256 and name == "torch bfloat16" else {}
            report.add(
                "flat", Bar.of(f"default FAISS / {name}, batch {batch}", timings["default"], timings[name], **bar)
            )


# Kinds of index


def kinds(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """What approximate kinds give up and gain, batch 256, against Flat at its best."""
    dimension, num_vectors = 256, min(options.vectors, 50_000)
    vectors, queries = clustered(num_vectors, dimension, 256)
    write_faiss_index(folder / "kinds.index", vectors, "Flat")
    exact = FaissIndex(folder / "kinds.index")
    truth = exact.search(queries, K)[1]
    lists = int(4 * num_vectors**0.5)
    tried: list[tuple[str, dict[str, Any]]] = [(f"IVF{lists},SQ8", {"nprobe": 8}), (f"IVF{lists},SQ8", {"nprobe": 32})]
    tried += [(f"IVF{lists},PQ32", {"nprobe": 32}), ("HNSW32", {"ef_search": 64})]
    for number, (factory, searched) in enumerate(tried):
        path = folder / f"{number}.index"
        build = compare({"it": lambda path=path, factory=factory: write_faiss_index(path, vectors, factory)}, 1, 0)[
            "it"
        ]
        index = FaissIndex(path, **searched)
        timings = compare(
            {"flat": lambda: exact.search(queries, K), "it": lambda index=index: index.search(queries, K)},
            options.repetitions,
        )
        found = index.search(queries, K)[1]
        recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)])
        share = bytes_per_vector(dimension, factory) / (4 * dimension)
        note = f"recall@{K} {recall:.3f}, {share:.2f} of the bytes, build {build.median / timings['flat'].median:.0f} x"
        report.add("kinds", Bar.of(f"Flat / {factory} {searched}", timings["flat"], timings["it"]), note)


# Queries that repeat


def unique(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """The cost of a batch goes with the number of its distinct queries."""
    retriever = corpus_retriever(folder, min(options.vectors, 50_000))
    queries = corpus_queries(512)

    def batch(share: float) -> list[str]:
        distinct = round(len(queries) * (1 - share))
        return [queries[index % distinct] for index in range(len(queries))]

    def run(texts: list[str]) -> list[list[Passage]]:
        return CachedRetriever(retriever).search(texts, K)

    shares = (0.0, 0.5, 0.8)
    for share in shares:
        cached, distinct = CachedRetriever(retriever), len(set(batch(share)))
        expected = dict(zip(queries, retriever.search(queries, K), strict=True))
        found = cached.search(batch(share), K)
        same = [
            [p.id for p in hits] == [p.id for p in expected[q]] for q, hits in zip(batch(share), found, strict=True)
        ]
        assert np.mean(same) > 0.99, "all but ties in float32"
        report.add(
            "unique", Bar.counted(f"queries sent / distinct ones, {share:.0%} repeated", cached.misses / distinct, 1, 1)
        )
    timings = compare({str(share): lambda share=share: run(batch(share)) for share in shares}, options.repetitions)
    for share in shares[1:]:
        bar = Bar.of(
            f"{share:.0%} repeated / none, of 512", timings[str(share)], timings["0.0"], at_most=1.35 * (1 - share)
        )
        report.add("unique", bar, "a smaller batch costs more a query")


# The server


def server(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """The same retriever in this process and behind HTTP on loopback, 64 queries a call."""
    retriever = corpus_retriever(folder, options.vectors)
    queries = corpus_queries(64)
    retriever.prepare()
    with serving(retriever) as url:
        remote = RemoteRetriever(url)
        near, far = retriever.search(queries, K), remote.search(queries, K)
        assert [[p.id for p in hits] for hits in near] == [[p.id for p in hits] for hits in far]
        timings = compare(
            {"near": lambda: retriever.search(queries, K), "far": lambda: remote.search(queries, K)},
            3 * options.repetitions,
            wall=True,
        )
        remote.close()
    report.add("server", Bar.of("throughput of HTTP / in process, batch 64", timings["near"], timings["far"], 0.8))


@contextmanager
def serving(retriever: DenseRetriever) -> Iterator[str]:
    """A `sdsearch serve` of the same index; its URL."""
    paths = ("--corpus_path", str(retriever.corpus_path), "--index_path", str(retriever.index_path))
    command = [
        sys.executable,
        "-m",
        "sdsearch_lightning",
        "serve",
        *paths,
        "--port",
        "0",
        "--backend",
        retriever.backend,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split(" at ")[1].strip()
        finally:
            process.terminate()


# Data


def clustered(num_vectors: int, dimension: int, num_queries: int) -> tuple[Vectors, Vectors]:
    """Unit vectors in clusters, as those of passages about the same things, and queries near some of them."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(num_vectors // 100, 1), dimension), dtype=np.float32)
    vectors = centres[rng.integers(0, len(centres), num_vectors)]
    vectors += 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
    queries = vectors[rng.integers(0, num_vectors, num_queries)]
    queries = queries + 0.5 * rng.standard_normal(queries.shape, dtype=np.float32)
    return _unit(vectors), _unit(queries)


def _unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def corpus_retriever(folder: Path, num_passages: int) -> DenseRetriever:
    """Over passages of 40 words, with the embedded encoder."""
    path = folder / f"corpus{num_passages}.jsonl"
    if not path.is_file():
        write_corpus(path, num_passages)
    return DenseRetriever(path, backend="torch", index_path=folder / f"index{num_passages}")


def write_corpus(path: Path, num_passages: int, num_words: int = 50_000) -> None:
    """Passages of 40 words drawn by Zipf's law."""
    rng = np.random.default_rng(0)
    weights = 1 / (np.arange(num_words) + 10)
    with path.open("w") as file:
        for start in range(0, num_passages, 10_000):
            drawn = rng.choice(num_words, (min(10_000, num_passages - start), 40), p=weights / weights.sum())
            for row, words in enumerate(drawn.tolist(), start):
                text = " ".join(f"w{word}" for word in words)
                file.write(json.dumps({"id": str(row), "contents": f'"T{row}"\n{text}'}) + "\n")


def corpus_queries(number: int, num_words: int = 50_000) -> list[str]:
    """Queries of six words that the corpus may hold; equal for equal arguments."""
    rng = np.random.default_rng(1)
    return [" ".join(f"w{word}" for word in rng.integers(0, num_words, 6)) for _ in range(number)]


if __name__ == "__main__":
    sys.exit(main())
