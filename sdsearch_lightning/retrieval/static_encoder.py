"""The embedded dense encoder: any text, deterministic, no download. Lexical only; it knows no synonyms.

Every word of a corpus gets a random direction times its inverse document frequency, and a text is the normalised mean
of its words: an idf-weighted bag of words, projected to `dimension`. Words outside the corpus have the zero vector. It
is an ordinary sentence-transformers folder (module StaticEmbedding), loaded by the same line as any other encoder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdsearch_lightning.files import written_whole
from sdsearch_lightning.retrieval.corpus import Corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNKNOWN = "[UNK]"


def write_static_encoder(source: Path, folder: Path) -> None:
    """The encoder of the corpus that stands ready in `folder`, in `folder`/encoder, unless it is there."""
    if (folder / "encoder").is_dir():
        return
    with written_whole(folder / "encoder") as draft, closing(Corpus.open(source, folder)) as corpus:
        build_static_encoder(corpus.contents(1024), draft)


def build_static_encoder(
    texts: Iterable[Sequence[str]], folder: Path, dimension: int = 256, max_words: int = 200_000, seed: int = 0
) -> None:
    """Writes the encoder of a corpus to `folder`.

    Args:
        texts: the corpus, in lists of any size.
        folder: where to; created if need be.
        dimension: D of the vectors. Two unrelated words have a cosine of about 1 / sqrt(D).
        max_words: keep this many, by document frequency.
        seed: of the random directions.
    """
    weights = inverse_document_frequencies(texts, max_words)
    save_static_encoder(weights, folder, dimension, seed)


def inverse_document_frequencies(texts: Iterable[Sequence[str]], max_words: int) -> dict[str, float]:
    """log(1 + N / n) for the words of N texts, n of which hold the word; the `max_words` with the largest n."""
    tokenizer = _word_tokenizer([])
    counts: Counter[str] = Counter()
    num_texts = 0
    for chunk in texts:
        num_texts += len(chunk)
        for text in chunk:
            counts.update({word for word, _ in _words(tokenizer, text)})
    kept = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_words]
    return {word: math.log1p(num_texts / count) for word, count in kept}


def save_static_encoder(weights: Mapping[str, float], folder: Path, dimension: int, seed: int) -> None:
    """Writes a sentence-transformers folder that embeds a text as the mean of `weight * direction` of its words.

    The same weights and seed give the same bytes on every machine: directions are drawn in the order of the words.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = sorted(weights)
    directions = np.random.default_rng(seed).standard_normal((len(words), dimension)) / math.sqrt(dimension)
    scaled = directions * np.array([weights[word] for word in words])[:, None]
    table = np.concatenate([np.zeros((1, dimension)), scaled]).astype(np.float32)  # row 0 is the unknown word
    module = StaticEmbedding(_word_tokenizer(words), embedding_weights=table)
    SentenceTransformer(modules=[module], device="cpu", similarity_fn_name="cosine").save(str(folder))


def _word_tokenizer(words: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate([_UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _words(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    words: list[tuple[str, tuple[int, int]]] = tokenizer.pre_tokenizer.pre_tokenize_str(
        tokenizer.normalizer.normalize_str(text)
    )
    return words
