"""BM25: exact lexical retrieval, no encoder, no model weights.

    score(q, d) = sum over words t of q of  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / avgdl))
    idf(t) = ln(1 + (N - df + 0.5) / (df + 0.5))

which is the variant that Lucene 8 and later compute, but with the exact length |d| where Lucene rounds it to one byte
(Kamphuis et al., ECIR 2020, "lucene (accurate)"). A word that a query holds twice counts twice.

    <index_path>/<fingerprint>/  manifest.json  offsets.npy  [corpus.jsonl]
                                 data|indices|indptr.csc.index.npy  vocab|params.index.json

Cost: a query adds up the lists of its words, which hold every passage with that word, on one thread: 0.2 ms for 10,000
passages of 80 words, 3 ms for 200,000. Memory to search: the lists, 8 bytes per distinct word of each passage, are
mapped and shared between processes; each process holds the vocabulary (some 200 bytes per word) and, while it searches,
4 bytes per passage. To build: about 40 bytes per distinct word of each passage (55 without scipy), and 4 bytes of disk
per word while it lasts; 0.13 ms per passage. A killed build starts anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.enums import UNSPACED
from sdsearch_lightning.errors import ConfigError, DataError, reading_foreign
from sdsearch_lightning.retrieval.corpus import Corpus, write_corpus
from sdsearch_lightning.retrieval.index_folder import IndexFolder
from sdsearch_lightning.retrieval.indexed import IndexedRetriever
from sdsearch_lightning.types import Passage

_FORMAT = 1  # of the folder; another number makes other fingerprints
WORD = rf"(?u)[{UNSPACED}]|[^\W{UNSPACED}]+"
"""A run of letters and digits; in scripts without spaces a character. One character is a word: "Malcolm X"."""
_TOKENS = "tokens.bin"
_CHUNK = 10_000
"""Passages that are tokenised at a time."""


class _Opened(NamedTuple):
    index: Any
    corpus: Corpus


class BM25Retriever(IndexedRetriever):
    """Searches the passages of a corpus file for the words of the query.

    Only passages that share a word with the query are found, so there may be fewer than k, or none. Words are
    lower-cased runs of letters and digits, and single characters in scripts without spaces; nothing is stemmed.

    Args:
        corpus: .jsonl, .jsonl.gz or .parquet with rows {id, contents} or {id, title, text}.
        index_path: folder that keeps indexes, of any retriever; null: `<corpus>.index` beside the corpus.
        k1: how slowly repeated words saturate, at least 0.
        b: how much long passages are held back, in [0, 1]. The defaults of k1 and b are those of Pyserini.
        word: regular expression of a word; null: runs of letters and digits, and characters of scripts without spaces.
        stopwords: words to leave out: a language that bm25s knows ("en": Lucene's 33 English ones), a list, or null.
    """

    def __init__(
        self,
        corpus: str | Path,
        index_path: str | Path | None = None,
        k1: float = 0.9,
        b: float = 0.4,
        stopwords: str | list[str] | None = "en",
        word: str | None = None,
    ) -> None:
        if k1 < 0 or not 0 <= b <= 1:
            raise ConfigError(f"k1 and b: expected k1 >= 0 and b in [0, 1], found k1={k1} and b={b}.")
        super().__init__(corpus, index_path)
        self.k1, self.b, self.stopwords, self.word = k1, b, stopwords, word or WORD
        try:
            re.compile(self.word)
        except re.error as error:
            raise ConfigError(f"word: expected a regular expression, found {word!r}: {error}.") from error

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages for each query, equal scores in the order of the corpus; builds the index if need be.

        Raises:
            ConfigError: k below 1, or bm25s is not installed.
            DataError: a corpus or an index that cannot be used.
        """
        if k < 1:
            raise ConfigError(f"k: expected at least 1 passage per query, found {k}.")
        if not queries:
            return []
        index, corpus = self._open()
        return [
            [replace(corpus[int(row)], score=float(scores[row])) for row in _best_rows(scores, k)]
            for scores in (self._score(index, words) for words in self._tokenize(queries))
        ]

    def prepare(self) -> None:
        """Builds the index unless a finished one is there; safe to call from several processes at once.

        Raises:
            ConfigError: as `is_built`, or bm25s is not installed.
        """
        _bm25s()
        refuse_lucene(self.index_path)
        self._folder.build(self._write)

    @property
    def is_built(self) -> bool:
        """Whether a finished index of this corpus, with these options, is there.

        Raises:
            ConfigError: the folder is one of Lucene's, which has to stay as it is.
        """
        refuse_lucene(self.index_path)
        return super().is_built

    @cached_property
    def _folder(self) -> IndexFolder:
        identity = {"format": _FORMAT, "corpus": self._source.digest, "retriever": "bm25"}
        parameters = {"k1": float(self.k1), "b": float(self.b), "stopwords": self.stopwords, "word": self.word}
        return IndexFolder(self.index_path, identity | parameters)

    def _write(self, folder: Path) -> dict[str, Any]:
        told = write_corpus(self._source, folder)
        with closing(Corpus.open(self.corpus_path, folder)) as corpus:
            tokens = self._write_tokens(corpus, folder / _TOKENS)
        index = _bm25s().BM25(k1=self.k1, b=self.b, method="lucene", csc_backend="auto", backend="numpy")
        index.index(tokens, create_empty_token=False, show_progress=False)
        index.save(str(folder), show_progress=False)
        (folder / _TOKENS).unlink()
        return told

    def _write_tokens(self, corpus: Corpus, path: Path) -> _Tokens:
        """Word numbers of all passages, on disk: as Python lists they would take ten times the corpus in memory."""
        vocabulary: dict[str, int] = {}
        ends = [0]
        with path.open("wb") as file:
            for texts in corpus.contents(_CHUNK):
                for words in self._tokenize(texts):
                    numbers = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
                    file.write(np.array(numbers, dtype=np.int32).tobytes())
                    ends.append(ends[-1] + len(numbers))
        if not vocabulary:
            raise DataError(
                f"{self.corpus_path}: expected words to search for, found none but stop words in {len(corpus)} "
                "passages. Check the file, or set stopwords to null."
            )
        return _Tokens(_PassageWords(path, np.array(ends)), vocabulary)

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        options: dict[str, Any] = {"return_ids": False, "show_progress": False, "stopwords": self.stopwords}
        try:
            return _bm25s().tokenize(list(texts), token_pattern=self.word, **options)
        except ValueError as error:
            raise ConfigError(
                f"stopwords: expected a language that bm25s knows (en, de, fr, ...), a list of words or null, found "
                f"{self.stopwords!r}."
            ) from error

    def _score(self, index: Any, words: list[str]) -> NDArray[np.float32]:
        """[N] scores; bm25s itself stops at a query none of whose words is known."""
        known = [word for word in words if word in index.vocab_dict]
        return index.get_scores(known) if known else np.zeros(0, dtype=np.float32)

    def _open(self) -> _Opened:
        if self._opened is None:
            self.prepare()
            advice = "Delete the folder; it is built again."
            with reading_foreign(f"{self.folder}: expected a BM25 index", DataError, advice):
                # Arrays and JSON only: a pickle is refused.
                index = _bm25s().BM25.load(str(self.folder), mmap=True, allow_pickle=False, show_progress=False)
            self._opened = _Opened(index, Corpus.open(self.corpus_path, self.folder))
        return self._opened


class _Tokens(NamedTuple):
    """What `BM25.index` takes: word numbers of each passage, and the number of each word."""

    ids: _PassageWords
    vocab: dict[str, int]


class _PassageWords:
    """The word numbers of each passage, as often as one asks; only one list at a time is in memory."""

    def __init__(self, path: Path, ends: NDArray[np.int64]) -> None:
        self._numbers = np.memmap(path, dtype=np.int32, mode="r")
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in zip(self._ends[:-1], self._ends[1:], strict=True):
            yield self._numbers[start:end].tolist()


def _best_rows(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """At most k rows with a score above 0, best first, equal ones in order.

    bm25s cuts ties where `argpartition` happens to, and fills up with passages of score 0.
    """
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        least = np.partition(scores[rows], -k)[-k]
        rows = rows[scores[rows] >= least]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def refuse_lucene(folder: Path) -> None:
    """Raises ConfigError where `folder` is an index of Lucene (Pyserini, Search-R1's wiki-18-bm25-index)."""
    if any(folder.glob("segments_*")):
        raise ConfigError(
            f"index_path: expected a folder of indexes by `sdsearch index`, found Lucene's in {folder}, which needs "
            "Java. Build one elsewhere: sdsearch index --retriever_name bm25 --corpus_path ... --index_path OTHER"
        )


def _bm25s() -> ModuleType:
    try:
        import bm25s
    except ImportError as error:
        raise ConfigError(
            'BM25Retriever needs bm25s, found none. Install it: pip install "sdsearch-lightning[bm25]"'
        ) from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    return bm25s
