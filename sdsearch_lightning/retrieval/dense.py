"""Dense retrieval: a sentence-transformers encoder and an exact index over its normalised passage vectors.

An index is a folder named by a fingerprint of all that its vectors depend on, so it can be neither stale nor half
written: other passages, another encoder or another prompt make another folder, and a folder appears by one rename.

    <index_path>/<fingerprint>/  manifest.json  offsets.npy  index.faiss | vectors.npy  [encoder/]  [corpus.jsonl]
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.corpus import Corpus, scan_corpus
from sdsearch_lightning.retrieval.flat_index import FaissFlat, TorchFlat, Vectors, choose_backend
from sdsearch_lightning.retrieval.jsonl import open_file
from sdsearch_lightning.retrieval.static_encoder import build_static_encoder
from sdsearch_lightning.types import Passage

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_FORMAT = 1  # of the folder; another number makes other fingerprints


class _Opened(NamedTuple):
    encoder: SentenceTransformer
    vectors: FaissFlat | TorchFlat
    corpus: Corpus


class DenseRetriever(Retriever):
    """Searches the passages of a corpus file by the inner product of normalised sentence embeddings.

    Args:
        corpus: .jsonl or .jsonl.gz with rows {id, contents} or {id, title, text}.
        encoder: a sentence-transformers folder or hub name, or "static": the embedded one (static_encoder.py).
        index_path: folder that keeps indexes; None: `<corpus>.index` beside the corpus.
        backend: "faiss", "torch" (exact too, on the device of the encoder), or "auto": faiss where it is installed.
        query_prompt: text put before every query; None: the encoder's own. E5 models want "query: ".
        passage_prompt: text put before every passage; None: the encoder's own. E5 models want "passage: ".
        batch_size: texts per forward pass of the encoder.
        device: where the encoder runs; None: a GPU if there is one ("static" always runs on the CPU).
    """

    def __init__(
        self,
        corpus: str | Path,
        encoder: str = "static",
        index_path: str | Path | None = None,
        backend: Literal["auto", "faiss", "torch"] = "auto",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
    ) -> None:
        self.corpus_path = Path(corpus)
        self.encoder = encoder
        self.index_path = Path(f"{corpus}.index" if index_path is None else index_path)
        self.backend = backend
        self.query_prompt = query_prompt
        self.passage_prompt = passage_prompt
        self.batch_size = batch_size
        self.device = device
        self._opened: _Opened | None = None

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query; builds the index if `prepare` has not.

        Raises:
            ConfigError: k below 1, or an encoder that cannot be loaded.
            DataError: a corpus that cannot be used.
        """
        if k < 1:
            raise ConfigError(f"k: expected at least 1 passage per query, found {k}.")
        if not queries:
            return []
        encoder, vectors, corpus = self._open()
        scores, rows = vectors.search(self._encode_queries(encoder, queries), k)
        return [
            [replace(corpus[int(row)], score=float(score)) for score, row in zip(*found, strict=True) if row >= 0]
            for found in zip(scores, rows, strict=True)
        ]

    def prepare(self) -> None:
        """Builds the index unless a finished one is there; safe to call from several processes at once."""
        if (self.folder / "manifest.json").is_file():
            return
        unfinished = self.index_path / f".{self.folder.name}.{uuid4().hex}"
        unfinished.mkdir(parents=True)
        try:
            self._build(unfinished)
            unfinished.rename(self.folder)
        except OSError:
            if not (self.folder / "manifest.json").is_file():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        """Lets go of encoder, index and corpus; the next search opens them again."""
        if self._opened is not None:
            self._opened.corpus.close()
            self._opened = None

    @cached_property
    def folder(self) -> Path:
        """The folder of this index under `index_path`, named by its fingerprint."""
        return self.index_path / _digest(json.dumps(self._identity, sort_keys=True).encode())[:16]

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """All that the vectors depend on: content where there are files, the name where a hub keeps them."""
        with open_file(self.corpus_path):  # the error names the file
            corpus = _digest_file(self.corpus_path)
        encoder = _digest_folder(Path(self.encoder)) if Path(self.encoder).is_dir() else self.encoder
        backend = choose_backend(self.backend).name
        prompt = self.passage_prompt
        return {"format": _FORMAT, "corpus": corpus, "encoder": encoder, "passage_prompt": prompt, "backend": backend}

    def _build(self, folder: Path) -> None:
        offsets = scan_corpus(self.corpus_path)
        plain = self.corpus_path
        if plain.suffix == ".gz":  # rows are read by offset, which a packed file cannot
            plain = folder / "corpus.jsonl"
            with open_file(self.corpus_path) as packed, plain.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        corpus = Corpus(plain, offsets)
        if self.encoder == "static":
            build_static_encoder(corpus.contents(self.batch_size), folder / "encoder")
        choose_backend(self.backend).write(folder, self._encode_corpus(corpus, folder), len(corpus))
        np.save(folder / "offsets.npy", offsets)
        names = {"corpus_file": str(self.corpus_path), "encoder_name": self.encoder, "num_passages": len(corpus)}
        (folder / "manifest.json").write_text(json.dumps(self._identity | names, indent=2) + "\n")
        corpus.close()

    def _open(self) -> _Opened:
        if self._opened is None:
            self.prepare()
            unpacked = self.folder / "corpus.jsonl"
            offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
            corpus = Corpus(unpacked if unpacked.is_file() else self.corpus_path, offsets)
            encoder = self._load_encoder(self.folder)
            index = choose_backend(self.backend)(self.folder, encoder.device)
            if len(index) != len(corpus):
                raise DataError(
                    f"{self.folder}: expected {len(corpus)} vectors, one per passage, found {len(index)}. "
                    "Delete the folder; it is built again."
                )
            self._opened = _Opened(encoder, index, corpus)
        return self._opened

    def _load_encoder(self, folder: Path) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        if self.encoder == "static":
            return SentenceTransformer(str(folder / "encoder"), device="cpu", local_files_only=True)
        try:
            return SentenceTransformer(self.encoder, device=self.device)
        except (OSError, ValueError) as error:
            first_line = next(iter(str(error).splitlines()), "no reason given")
            raise ConfigError(
                f"encoder: expected 'static', a sentence-transformers folder or a hub name, found {self.encoder!r}, "
                f"which cannot be loaded: {first_line}"
            ) from error

    def _encode_queries(self, encoder: SentenceTransformer, queries: Sequence[str]) -> Vectors:
        vectors = encoder.encode_query(
            list(queries),
            prompt=self.query_prompt,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _encode_corpus(self, corpus: Corpus, folder: Path) -> Iterator[Vectors]:
        """[C, D] vectors of all passages in order, chunk by chunk."""
        encoder = self._load_encoder(folder)
        own = [encoder.prompts.get(key) for key in ("document", "passage", "corpus")]  # encode_document stops at ""
        prompt = self.passage_prompt if self.passage_prompt is not None else next(filter(None, own), "")
        for texts in _progress(corpus, 16 * self.batch_size):
            vectors = encoder.encode_document(
                list(texts),
                prompt=prompt,
                batch_size=self.batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if not np.isfinite(vectors).all():
                raise DataError(f"encoder {self.encoder!r} made vectors that are not finite. Try it in float32.")
            yield np.ascontiguousarray(vectors, dtype=np.float32)


def _progress(corpus: Corpus, size: int) -> Iterable[Sequence[str]]:
    """`corpus.contents(size)`, with a bar where that is minutes of work."""
    from rich.progress import track

    total, small = -(-len(corpus) // size), len(corpus) < 100_000
    return track(corpus.contents(size), f"Encoding {len(corpus)} passages", total, disable=small)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_folder(folder: Path) -> str:
    """Of the names and contents of all its files but hidden ones."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [name for name in files if not any(part.startswith(".") for part in name.parts)]
    return _digest("".join(f"{name.as_posix()} {_digest_file(folder / name)}\n" for name in visible).encode())
