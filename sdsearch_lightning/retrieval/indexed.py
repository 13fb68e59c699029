"""What retrievers over a corpus file and an index folder have in common: when they open, and when they forget."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

from sdsearch_lightning.retrieval.base import Retriever
from sdsearch_lightning.retrieval.index_folder import CorpusFile, IndexFolder


class IndexedRetriever(Retriever):
    """Opens its index at the first search, and never keeps one that belongs to another corpus.

    Args:
        corpus: the file.
        index_path: folder that keeps indexes; None: `<corpus>.index` beside the corpus.
    """

    def __init__(self, corpus: str | Path, index_path: str | Path | None) -> None:
        self.corpus_path = Path(corpus)
        self.index_path = Path(f"{corpus}.index" if index_path is None else index_path)
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open: a copy in another process opens its own."""
        return self.__dict__ | {"_opened": None}

    def __len__(self) -> int:
        """Number of passages in the corpus."""
        return len(self._open().corpus)

    @property
    def folder(self) -> Path:
        """The folder of this index, named by its fingerprint."""
        return self._folder.path

    @property
    def is_built(self) -> bool:
        """Whether a finished index of this corpus, as it is now, is there."""
        return self._folder.is_finished

    def close(self) -> None:
        """Lets go of index and corpus; the next search opens them again."""
        if self._opened is not None:
            self._opened.corpus.close()
            self._opened = None
        for cached in ("_source", "_folder"):  # the corpus may be another by then
            self.__dict__.pop(cached, None)

    @property
    def _root(self) -> Path:
        """The folder that keeps this index among others."""
        return self.index_path

    @cached_property
    def _source(self) -> CorpusFile:
        return CorpusFile.read(self.corpus_path, self._root)

    @cached_property
    @abstractmethod
    def _folder(self) -> IndexFolder:
        """The index folder, named by a hash of all that the index depends on."""

    @abstractmethod
    def _open(self) -> Any:
        """`_opened`, made where it is None; its `corpus` is a `Corpus`."""
