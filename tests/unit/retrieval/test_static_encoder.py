import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from sdsearch_lightning.retrieval.static_encoder import (
    build_static_encoder,
    inverse_document_frequencies,
    save_static_encoder,
)

TEXTS = [["The cat sat.", "the dog"], ["the Zürich train, the train"]]


def load(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def test_words_are_weighted_by_how_few_texts_hold_them():
    weights = inverse_document_frequencies(TEXTS, max_words=100)
    assert weights["the"] == pytest.approx(math.log(2), abs=1e-12)  # in 3 of 3 texts; twice in one counts once
    assert weights["train"] == weights["zürich"] == pytest.approx(math.log(4), abs=1e-12)
    assert "The" not in weights and "cat" in weights
    assert list(inverse_document_frequencies(TEXTS, max_words=2)) == ["the", ","]  # then by name


def test_vectors_are_the_weighted_mean_of_seeded_directions(tmp_path):
    save_static_encoder({"b": 2.0, "a": 1.0}, tmp_path, dimension=8, seed=3)
    directions = np.random.default_rng(3).standard_normal((2, 8)) / math.sqrt(8)  # of a, then b
    expected = (directions[0] + 2 * directions[1]) / 2
    found = load(tmp_path).encode_document(["b A unheard"], show_progress_bar=False)[0]
    np.testing.assert_allclose(found * 3 / 2, expected, atol=1e-6)  # the unknown word counts as a zero vector
    assert np.abs(found - expected).max() > 1e-3


def test_unknown_and_empty_texts_are_zero_not_nan(tmp_path):
    build_static_encoder(TEXTS, tmp_path)
    vectors = load(tmp_path).encode_query(["xyzzy", "", "cat"], normalize_embeddings=True, show_progress_bar=False)
    assert np.abs(vectors[:2]).max() == 0 and np.linalg.norm(vectors[2]) == pytest.approx(1, abs=1e-6)


def test_two_processes_write_the_same_bytes(tmp_path):
    code = (
        "import sys, pathlib; from sdsearch_lightning.retrieval.static_encoder import build_static_encoder as build;"
        f"build({TEXTS!r}, pathlib.Path(sys.argv[1]))"
    )
    build_static_encoder(TEXTS, tmp_path / "here")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    build_static_encoder(TEXTS, tmp_path / "other", seed=1)
    for name, same in (("model.safetensors", False), ("tokenizer.json", True)):
        here, there, other = (
            hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest() for folder in ("here", "there", "other")
        )
        assert here == there and (here == other) is same
