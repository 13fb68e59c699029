"""Dense retrieval: a sentence-transformers encoder and an index over its normalised passage vectors.

    <index_path>/<fingerprint>/  manifest.json  offsets.npy  <encoder>_<factory>.index | vectors.npy
                                 [encoder/]  [corpus.jsonl]

`index_path` may also be a file that plain FAISS wrote in Search-R1's layout (`e5_Flat.index`: row i is line i of the
corpus); what random access to the corpus needs is then kept in the folder `<file>.corpus/`.

Cost: encoding a query (milliseconds on a CPU), then a product with every vector (Flat) or with those of some lists.
Memory: the index, mapped and shared between processes; the corpus stays on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.backends import choose_backend
from sdsearch_lightning.retrieval.corpus import Corpus, write_corpus
from sdsearch_lightning.retrieval.encoder import STATIC, TextEncoder
from sdsearch_lightning.retrieval.faiss_index import FaissIndex
from sdsearch_lightning.retrieval.index_build import VECTORS, build_index
from sdsearch_lightning.retrieval.index_folder import IndexFolder, choose_manifest, is_finished
from sdsearch_lightning.retrieval.indexed import IndexedRetriever
from sdsearch_lightning.retrieval.static_encoder import write_static_encoder
from sdsearch_lightning.retrieval.torch_index import TorchIndex
from sdsearch_lightning.types import Passage

_FORMAT = 3  # of the folder; another number makes other fingerprints
_LOGGER = logging.getLogger(__name__)


class _Opened(NamedTuple):
    encoder: TextEncoder
    vectors: FaissIndex | TorchIndex
    corpus: Corpus


class DenseRetriever(IndexedRetriever):
    """Searches the passages of a corpus file by the inner product of normalised sentence embeddings.

    Args:
        corpus: .jsonl, .jsonl.gz or .parquet with rows {id, contents} or {id, title, text}.
        encoder: a sentence-transformers folder or hub name, or "static": the embedded one.
        index_path: folder that keeps indexes, or a file in Search-R1's layout; null: `<corpus>.index` beside it.
        backend: "faiss", "faiss-gpu" (on all GPUs that FAISS sees), "torch" (exact, on the device of the encoder), or
            "auto": faiss where it is installed.
        factory: kind of the FAISS index: Flat (exact), IVF4096,SQ8, IVF4096,PQ64, HNSW32, ...; torch knows Flat only.
        nprobe: inverted lists that a query visits (IVF).
        ef_search: candidates that a query keeps (HNSW).
        scan: arithmetic of torch's scan, "float32", "bfloat16" (half the memory, and still exact) or "auto".
        query_prompt: text put before every query; null: as the encoder wants it.
        passage_prompt: text put before every passage; null: as the encoder wants it.
        batch_size: texts per forward pass of the encoder.
        device: where the encoder runs; null: a GPU if there is one ("static" always runs on the CPU).
        dtype: of the encoder's weights, "float32", "bfloat16" or "float16".
        convention: family whose prompts and pooling it gets where it states none: e5, bge, contriever or gte; null: the
            one that its name tells.
        pooling: of a plain transformers folder, "mean" or "cls"; null: by the convention.
        max_length: tokens of a text that the encoder reads; null: as many as it can.
    """

    def __init__(
        self,
        corpus: str | Path,
        encoder: str = "static",
        index_path: str | Path | None = None,
        backend: Literal["auto", "faiss", "faiss-gpu", "torch"] = "auto",
        factory: str = "Flat",
        nprobe: int = 32,
        ef_search: int = 128,
        scan: Literal["auto", "float32", "bfloat16"] = "auto",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        batch_size: int = 256,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        convention: Literal["e5", "bge", "contriever", "gte"] | None = None,
        pooling: Literal["mean", "cls"] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(corpus, index_path)
        if is_finished(self.index_path):  # one index, named itself
            self.index_path = self.index_path.parent
        self.encoder = encoder
        self.backend = backend
        self.factory = factory
        self._search_options = {"nprobe": nprobe, "ef_search": ef_search}
        self._scan = scan
        self._told = {"convention": convention, "pooling": pooling, "max_length": max_length}
        self._encoder_options: dict[str, Any] = self._told | {
            "query_prompt": query_prompt,
            "passage_prompt": passage_prompt,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
        }
        self._text_encoder = self._make_encoder(encoder)  # loads nothing; says now what is wrong with an option

    @classmethod
    def from_index(
        cls, corpus: str | Path, index_path: str | Path, encoder: str | None = None, **options: Any
    ) -> DenseRetriever:
        """A retriever of an index that is there already, with the encoder and the kind that its manifest tells.

        Args:
            corpus: file that it was built from.
            index_path: as above.
            encoder: where indexes by several encoders are there, or one in Search-R1's layout, which tells none.
            options: as above, of the search: nprobe, ef_search, device, ...

        Raises:
            ConfigError: there is none, or more than one.
        """
        index_path = Path(index_path)
        if index_path.is_file() and not is_finished(index_path.parent):
            if encoder is None:
                raise ConfigError(f"encoder: expected the one that {index_path} was built with, found none given.")
            return cls(corpus, encoder, index_path, **options)
        root = index_path.parent if index_path.is_file() else index_path
        by = None if encoder is None else TextEncoder(encoder).identity["encoder"]
        backend = options.get("backend")
        manifest = choose_manifest(root, Path(corpus), by, "faiss" if backend == "faiss-gpu" else backend)
        told: dict[str, Any] = {name: manifest[name] for name in ("factory", "passage_prompt", "dtype", "backend")}
        told |= manifest.get("encoder_options", {})  # not in indexes from before there were any
        return cls(corpus, encoder or manifest["encoder_name"], root, **told | options)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query; builds the index if `prepare` has not.

        Raises:
            ConfigError: k below 1, or an encoder that cannot be loaded.
            DataError: a corpus or an index that cannot be used.
        """
        if k < 1:
            raise ConfigError(f"k: expected at least 1 passage per query, found {k}.")
        if not queries:
            return []
        encoder, index, corpus = self._open()
        scores, rows = index.search(encoder.encode_queries(queries), k)
        return [
            [replace(corpus[int(row)], score=float(score)) for score, row in zip(*found, strict=True) if row >= 0]
            for found in zip(scores, rows, strict=True)
        ]

    def prepare(self) -> None:
        """Builds the index unless a finished one is there; safe to call from several processes at once."""
        self._folder.build(self._write_rows if self._is_file else self._write_index)

    @property
    def index_file(self) -> Path:
        """The vectors: of a finished index, or the file that was given."""
        return self.index_path if self._is_file else self.folder / self._folder.manifest["index_file"]

    @property
    def is_built(self) -> bool:
        """Whether a finished index of this corpus, encoder and kind is there."""
        return self._is_file or self._folder.is_finished

    @property
    def _is_file(self) -> bool:
        return self.index_path.is_file()

    @cached_property
    def _folder(self) -> IndexFolder:
        identity = {"format": _FORMAT, "corpus": self._source.digest}
        if self._is_file:  # holds no vectors of ours: only what the corpus and a static encoder need
            return IndexFolder(self._root, identity | {"encoder": STATIC if self.encoder == STATIC else None})
        backend = choose_backend(self.backend, self.factory)
        kind = {"backend": backend, "factory": self.factory}
        return IndexFolder(self._root, identity | self._text_encoder.identity | kind)

    @property
    def _root(self) -> Path:
        return Path(f"{self.index_path}.corpus") if self._is_file else self.index_path

    def _write_index(self, folder: Path) -> dict[str, Any]:
        told = self._write_rows(folder)
        factory = None if choose_backend(self.backend, self.factory) == "torch" else self.factory
        file = f"{Path(self.encoder).name}_{factory}.index" if factory else VECTORS
        build_index(self.corpus_path, folder, self._load_encoder(folder), factory, file)
        return told | {"index_file": file}

    def _write_rows(self, folder: Path) -> dict[str, Any]:
        told = write_corpus(self._source, folder)
        if self.encoder == STATIC:
            write_static_encoder(self.corpus_path, folder)
        name = str(Path(self.encoder).absolute()) if self._text_encoder.is_folder else self.encoder
        return told | {"encoder_name": name, "encoder_options": self._told}

    def _open(self) -> _Opened:
        if self._opened is None:
            self.prepare()
            encoder = self._load_encoder(self.folder)
            corpus = Corpus.open(self.corpus_path, self.folder)
            index = self._open_index(encoder)
            self._check_fit(encoder, index, corpus)
            self._opened = _Opened(encoder, index, corpus)
        return self._opened

    def _open_index(self, encoder: TextEncoder) -> FaissIndex | TorchIndex:
        if not self._is_file and choose_backend(self.backend, self.factory) == "torch":
            return TorchIndex(self.index_file, encoder.device, self._scan)
        return FaissIndex(self.index_file, **self._search_options, gpus=self.backend == "faiss-gpu")

    def _check_fit(self, encoder: TextEncoder, index: FaissIndex | TorchIndex, corpus: Corpus) -> None:
        """A foreign index has no fingerprint: what can be told from the outside is told."""
        where = self.index_path if self._is_file else self.folder
        repair = "Name the corpus it was built from." if self._is_file else "Delete the folder; it is built again."
        if len(index) != len(corpus):
            raise DataError(
                f"{where}: expected {len(corpus)} vectors, one per passage of {self.corpus_path}, found {len(index)} "
                f"in {self.index_file.name} (encoder {self.encoder!r}). {repair}"
            )
        if index.dimension != encoder.dimension:
            raise DataError(
                f"{where}: expected vectors of {encoder.dimension} numbers, as encoder {self.encoder!r} makes them, "
                f"found {index.dimension} in {self.index_file.name}. Name the encoder that it was built with."
            )
        if self._is_file and isinstance(index, FaissIndex):
            rows = np.unique([0, len(corpus) // 2, len(corpus) - 1])
            if (stored := index.stored(rows)) is not None:
                fresh = encoder.encode_passages([corpus[int(row)].contents for row in rows])
                if (worst := float((stored * fresh).sum(axis=1).min())) < 0.99:
                    _LOGGER.warning(
                        "%s: its vectors are not those that encoder %r gives the passages of %s (cosine %.3f). "
                        "Was it built with another encoder, passage prompt or corpus?",
                        where, self.encoder, self.corpus_path, worst,
                    )  # fmt: skip

    def _load_encoder(self, folder: Path) -> TextEncoder:
        return self._make_encoder(str(folder / "encoder"), "cpu") if self.encoder == STATIC else self._text_encoder

    def _make_encoder(self, name: str, device: str | None = None) -> TextEncoder:
        return TextEncoder(name, **(self._encoder_options | ({"device": device} if device else {})))
