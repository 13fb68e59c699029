"""The world's search engine: what which query finds, and that the plain twin ranks as the saved encoder does."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sdsearch_lightning.datamodules.synthetic_world_encoder import (
    OBJECT_WEIGHT,
    WorldSearch,
    save_encoder,
    word_vectors,
)
from sdsearch_lightning.datamodules.synthetic_world_generation import WorldShape, generate_world

SHAPE = WorldShape(num_entities=120, num_relations=8, terms_per_relation=4, facts_per_entity=6)
WORLD = generate_world(SHAPE, SHAPE.groups(), random.Random("world"))
VECTORS = word_vectors(SHAPE, seed=0)
SEARCH = WorldSearch(VECTORS, WORLD.documents)


def wrong_term(relation: str) -> str:
    return next(term for term in SHAPE.terms(relation) if term != WORLD.terms[relation])


def test_the_right_query_finds_its_document_first() -> None:
    first = [SEARCH.search(f"{fact.subject} {fact.term}", 2)[0] for fact in WORLD.facts]
    assert sum(index == position for position, index in enumerate(first)) >= 0.99 * len(WORLD.facts)


def test_a_wrong_term_finds_documents_of_the_entity_by_luck_only() -> None:
    found, of_entity = 0, 0
    for position, fact in enumerate(WORLD.facts):
        top = SEARCH.search(f"{fact.subject} {wrong_term(fact.relation)}", 2)
        found += position in top
        of_entity += sum(WORLD.facts[index].subject == fact.subject for index in top)
    assert of_entity >= 0.95 * 2 * len(WORLD.facts)
    assert 0.1 < found / len(WORLD.facts) < 0.5, "two of six documents: about a third by luck"


def test_a_term_alone_finds_documents_with_that_term() -> None:
    top = SEARCH.search(WORLD.terms["rel3"], 2)
    assert all(WORLD.facts[index].relation == "rel3" for index in top)


def test_word_vectors_are_seeded_unit_vectors_and_scaled_objects() -> None:
    assert np.linalg.norm(VECTORS["e7"]) == pytest.approx(1, abs=1e-6)
    assert np.array_equal(VECTORS["is e7"], VECTORS["e7"] * np.float32(OBJECT_WEIGHT))
    assert "is" not in VECTORS and "rel3" not in VECTORS
    again = word_vectors(SHAPE, seed=0)
    assert all(np.array_equal(again[word], vector) for word, vector in VECTORS.items())
    assert not np.array_equal(word_vectors(SHAPE, seed=1)["e7"], VECTORS["e7"])


def test_unknown_words_and_a_large_k_are_harmless() -> None:
    assert SEARCH.search("e5 nonsense", 2) == SEARCH.search("e5", 2)
    assert len(SEARCH.search("nonsense", 2)) == 2
    small = WorldSearch(VECTORS, WORLD.documents[:3])
    assert sorted(small.search("e0", 9)) == [0, 1, 2]


def test_saved_encoder_embeds_as_the_word_vectors_say(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    save_encoder(VECTORS, tmp_path / "encoder")
    encoder = SentenceTransformer(str(tmp_path / "encoder"), device="cpu", local_files_only=True)
    expected = VECTORS["e5"] + VECTORS["rel3_a"] + np.float32(OBJECT_WEIGHT) * VECTORS["e9"]
    (row,) = encoder.encode(["e5 rel3_a is e9 ."])
    np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-6)
    swapped = VECTORS["e9"] + VECTORS["rel3_a"] + np.float32(OBJECT_WEIGHT) * VECTORS["e5"]
    assert not np.allclose(row, swapped / np.linalg.norm(swapped), atol=1e-2), "the object must weigh less"
    assert not encoder.encode(["nothing known"]).any()


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        save_encoder(VECTORS, folder)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
    assert files[0] == files[1] and len(files[0]) > 3
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in files[0])
