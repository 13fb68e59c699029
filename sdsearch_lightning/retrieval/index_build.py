"""Building a dense index: corpus -> vectors -> index, each step finished on disk before the next one starts.

Encoding takes the hours, so it is the step that goes on where a killed build stopped: vectors are written in place, and
a note says how many are there. What the build will need is told, and its disk space checked, before it starts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import write_text
from sdsearch_lightning.retrieval.corpus import Corpus, say
from sdsearch_lightning.retrieval.encoder import TextEncoder
from sdsearch_lightning.retrieval.faiss_index import bytes_per_vector, write_faiss_index
from sdsearch_lightning.retrieval.torch_index import MappedVectors, reopen_vectors, write_vectors

VECTORS = "vectors.npy"
_ENCODED = "encoded.json"
_LARGE = 100_000
"""Passages from which a build talks: below, it is seconds."""
_CHECKPOINT_SECONDS = 5.0


def build_index(source: Path, folder: Path, encoder: TextEncoder, factory: str | None, index_name: str) -> int:
    """Fills `folder`; returns the number of passages.

    Args:
        source: the corpus file, which `write_corpus` has made ready in `folder`.
        folder: may hold what a killed call left.
        encoder: of the passages.
        factory: of the FAISS index; None keeps the vectors, which torch searches.
        index_name: file name of the FAISS index.

    Raises:
        ConfigError: the disk is too small, or the factory string or the encoder cannot be used.
        DataError: a corpus row that cannot be used, or vectors that are not finite.
    """
    with closing(Corpus.open(source, folder)) as corpus:
        if factory is None:
            check_space(folder, len(corpus), encoder.dimension, 0)
            encode_corpus(corpus, encoder, folder)
        elif not (folder / index_name).is_file():
            per_vector = bytes_per_vector(encoder.dimension, factory)  # also: is it a factory string?
            check_space(folder, len(corpus), encoder.dimension, per_vector)
            vectors = encode_corpus(corpus, encoder, folder)
            if len(corpus) >= _LARGE:
                say(f"building the index {factory} of {len(corpus):,} vectors")
            write_faiss_index(folder / index_name, vectors, factory)
    if factory is not None:
        (folder / VECTORS).unlink(missing_ok=True)
    (folder / _ENCODED).unlink(missing_ok=True)
    return len(corpus)


def check_space(folder: Path, num_passages: int, dimension: int, bytes_per_vector: int) -> None:
    """Tells what a large build is going to take, and stops one that the disk cannot hold.

    Raises:
        ConfigError: the disk is too small.
    """
    raw, index = 4 * dimension * num_passages, bytes_per_vector * num_passages
    there = (folder / VECTORS).stat().st_size if (folder / VECTORS).is_file() else 0
    free = shutil.disk_usage(folder).free
    if raw + index - there > free:
        raise ConfigError(
            f"index_path: expected {(raw + index - there) / 1e9:.1f} GB of free disk for {num_passages:,} vectors of "
            f"{dimension} numbers, found {free / 1e9:.1f} GB at {folder.parent}. Free some, name another index_path, "
            "or use a smaller factory (IVF4096,PQ64)."
        )
    if num_passages >= _LARGE:
        say(
            f"{num_passages:,} passages, {dimension} dimensions: {raw / 1e9:.2f} GB of disk while encoding, "
            f"{(index or raw) / 1e9:.2f} GB in the end; {max(index, 5e8) / 1e9:.2f} GB of memory to build, "
            f"{(index or raw) / 1e9:.2f} GB, shared and mapped, to search"
        )


def encode_corpus(corpus: Corpus, encoder: TextEncoder, folder: Path) -> MappedVectors:
    """[N, D] vectors of all passages, in `folder`/vectors.npy, from where the note says that a killed call stopped."""
    note, file = folder / _ENCODED, folder / VECTORS
    done = json.loads(note.read_text())["rows"] if note.is_file() and file.is_file() else 0
    if done:
        vectors = reopen_vectors(file)
        say(f"going on at passage {done:,} of {len(corpus):,}")
    else:
        vectors = write_vectors(file, len(corpus), encoder.dimension)
    noted = time.monotonic()
    for texts in _progress(corpus, 16 * encoder.batch_size, done):
        vectors[done : done + len(texts)] = encoder.encode_passages(texts)
        done += len(texts)
        if time.monotonic() - noted > _CHECKPOINT_SECONDS or done == len(corpus):
            vectors.flush()  # before the note: it must not promise what a power cut can take
            write_text(note, json.dumps({"rows": done}))
            noted = time.monotonic()
    assert done == len(corpus), "every passage has its vector"
    return vectors


def _progress(corpus: Corpus, size: int, start: int) -> Iterator[Sequence[str]]:
    """`corpus.contents`, with a bar where that is minutes of work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("encoding", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=len(corpus) < _LARGE) as bar:
        task = bar.add_task("", total=len(corpus), completed=start)
        for texts in corpus.contents(size, start):
            yield texts
            bar.advance(task, len(texts))
