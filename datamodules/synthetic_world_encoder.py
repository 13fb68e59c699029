"""How the world is searched: a sentence-transformers encoder of seeded random word vectors, and its plain twin.

A passage or query is the sum of its word vectors: subjects and terms weigh 1, objects `OBJECT_WEIGHT`, all other
words 0. A static embedding knows no positions, so the encoder's own tokenizer makes `is e12` one word, whose vector is
that of `e12` scaled down. The right query finds its document first; a wrong or missing term finds some of the
entity's documents; a term alone finds documents of any entity.
Invariant: `WorldSearch` ranks as DenseRetriever does over the saved encoder; only the speed differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdsearch_lightning.datamodules.synthetic_world_generation import WorldShape

OBJECT_WEIGHT = 0.35
DIMENSION = 128
_WORD = r"is e\d+|\S+"
_UNKNOWN = "[UNK]"

Vectors = Mapping[str, NDArray[np.float32]]


def word_vectors(shape: WorldShape, seed: int) -> Vectors:
    """A random [128] unit vector per entity and term, and `is e12` for each object; other words have none."""
    words = (*shape.entities, *shape.all_terms)
    rows = np.random.default_rng(seed).standard_normal((len(words), DIMENSION))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = dict(zip(words, rows.astype(np.float32), strict=True))
    objects = {f"is {entity}": vectors[entity] * np.float32(OBJECT_WEIGHT) for entity in shape.entities}
    return vectors | objects


def save_encoder(vectors: Vectors, folder: Path) -> None:
    """Write `vectors` as a sentence-transformers folder (StaticEmbedding, then unit length)."""
    # Here, not above: the import takes seconds, and only the process that builds the folder needs it.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    vocabulary = {word: index for index, word in enumerate((_UNKNOWN, *vectors))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(_WORD), behavior="removed", invert=True)
    weights = np.stack([np.zeros(DIMENSION, np.float32), *vectors.values()])
    modules = [StaticEmbedding(tokenizer, embedding_weights=weights), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="dot").save(str(folder))


class WorldSearch:
    """Top-k search over one world's documents in plain numpy: the scores of a query are sums of cached word scores.

    Unlike the encoder it does not scale a query to unit length, which changes no order.
    """

    def __init__(self, vectors: Vectors, documents: Sequence[str]) -> None:
        matrix = np.stack([_embed(vectors, document) for document in documents])
        self._matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        self._vectors = vectors
        self._word_scores: dict[str, NDArray[np.float32]] = {}

    def search(self, query: str, k: int) -> list[int]:
        """Indices of the k best documents, best first."""
        scores = np.zeros(len(self._matrix), np.float32)
        for word in _words(query):
            if word in self._vectors:
                scores += self._scores(word)
        return _top(scores, k)

    def _scores(self, word: str) -> NDArray[np.float32]:
        if word not in self._word_scores:
            self._word_scores[word] = self._matrix @ self._vectors[word]
        return self._word_scores[word]


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text)


def _embed(vectors: Vectors, text: str) -> NDArray[np.float32]:
    zero = np.zeros(DIMENSION, np.float32)
    return np.sum([vectors.get(word, zero) for word in _words(text)], axis=0, dtype=np.float32)


def _top(scores: NDArray[np.float32], k: int) -> list[int]:
    # k times argmax: sorting 2 400 scores would cost more than the rest of a scripted rollout. Overwrites `scores`.
    best: list[int] = []
    for _ in range(min(k, len(scores))):
        best.append(int(scores.argmax()))
        scores[best[-1]] = -np.inf
    return best
