import gzip
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever
from sdsearch_lightning.retrieval.bm25 import BM25Retriever

TEXTS = {
    "paris": '"Paris"\nthe capital of France on the Seine',
    "rome": '"Rome"\nthe capital of Italy on the Tiber',
    "hamlet": '"Hamlet"\na play by Shakespeare',
    "tea": '"Tea"\na drink of leaves',
}


def write(path, texts):
    path.write_text("".join(json.dumps({"id": key, "contents": text}) + "\n" for key, text in texts.items()))
    return path


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl", TEXTS)


def ids(results):
    return [[passage.id for passage in found] for found in results]


def by_hand(texts, query, k1, b):
    """Scores of all texts by the formula, in float64 (Robertson & Zaragoza 2009, with Lucene's idf)."""
    words = [text.lower().split() for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for known in words:
        counts, score = Counter(known), 0.0
        for word in query.lower().split():
            df = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(known) / mean))
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.5, 1.0)])
def test_scores_are_those_of_the_formula(tmp_path, k1, b):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.zipf(1.5, rng.integers(3, 40)) % 90) for _ in range(200)]
    path = write(tmp_path / "c.jsonl", dict(zip(map(str, range(200)), texts, strict=True)))
    queries = ["w1 w2 w2 w7", "w30", "w5 w89 nowhere"]
    found = BM25Retriever(path, k1=k1, b=b, stopwords=None).search(queries, 200)
    for query, hits in zip(queries, found, strict=True):
        expected = by_hand(texts, query, k1, b)
        assert len(hits) == (expected > 0).sum()
        assert [hit.score for hit in hits] == pytest.approx(sorted(expected[expected > 0])[::-1], rel=1e-5)
        assert [hit.score for hit in hits] == pytest.approx([expected[int(hit.id)] for hit in hits], rel=1e-5)
        wrong = by_hand(texts, query, k1 + 0.05, b)
        assert [hit.score for hit in hits] != pytest.approx([wrong[int(hit.id)] for hit in hits], rel=1e-5)


def test_only_passages_that_share_a_word_are_found(corpus):
    retriever = BM25Retriever(corpus)
    found = retriever.search(["capital of Italy", "Shakespeare", "unknown words", "", "the of", "TEA!"], 9)
    assert ids(found) == [["rome", "paris"], ["hamlet"], [], [], [], ["tea"]]
    assert found[0][0].contents == TEXTS["rome"] and found[0][0].score > found[0][1].score > 0
    assert retriever.search([], 3) == [] and len(retriever) == 4
    check_retriever(retriever, 3)
    retriever.close()
    assert ids(retriever.search(["Shakespeare"], 1)) == [["hamlet"]]  # opens again


def test_ties_keep_the_order_of_the_corpus(tmp_path):
    path = write(tmp_path / "c.jsonl", {f"{i}": "same words" if i % 3 else "other words" for i in range(50)})
    retriever = BM25Retriever(path)
    tied = [str(i) for i in range(50) if i % 3]
    assert ids(retriever.search(["same"], 7)) == [tied[:7]]
    assert ids(retriever.search(["words"], 50)) == [[str(i) for i in range(50)]]
    assert ids(retriever.search(["other same"], 20))[0][:17] == [str(i) for i in range(0, 50, 3)]


def test_words_of_one_character_and_other_alphabets_count(tmp_path):
    path = write(tmp_path / "c.jsonl", {"x": "Malcolm X", "y": "Malcolm Y", "ru": "Война и мир", "e": "Ésope"})
    assert ids(BM25Retriever(path).search(["malcolm y", "МИР", "éSOPE"], 1)) == [["y"], ["ru"], ["e"]]


def test_stop_words_may_be_kept_or_named(corpus):
    assert ids(BM25Retriever(corpus, stopwords=None).search(["the"], 4)) == [["paris", "rome"]]
    assert ids(BM25Retriever(corpus, stopwords=["capital"]).search(["capital the"], 4)) == [["paris", "rome"]]
    with pytest.raises(ConfigError, match="stopwords: expected a language that bm25s knows.*'klingon'"):
        BM25Retriever(corpus, stopwords="klingon").prepare()


def test_a_finished_index_is_used_again_and_told_apart(corpus, monkeypatch):
    DenseRetriever(corpus).prepare()  # lives in the same folder
    BM25Retriever(corpus).prepare()
    names = {BM25Retriever(corpus, **options).folder.name for options in ({}, {"b": 0.5}, {"stopwords": None})}
    assert len(names) == 3
    monkeypatch.setattr(BM25Retriever, "_write", lambda *_: pytest.fail("built twice"))
    assert ids(BM25Retriever(str(corpus), k1=0.9).search(["tea"], 1)) == [["tea"]]
    assert not list(corpus.parent.rglob("tokens.bin"))


def test_a_changed_corpus_is_searched_anew(corpus):
    assert ids(BM25Retriever(corpus).search(["zebra"], 1)) == [[]]
    with corpus.open("a") as file:
        file.write('{"id": "zebra", "contents": "zebra"}\n')
    assert ids(BM25Retriever(corpus).search(["zebra"], 1)) == [["zebra"]]


def test_chunks_of_tokenising_change_nothing(corpus, monkeypatch):
    whole = BM25Retriever(corpus, index_path=corpus.parent / "a").search(["capital Seine leaves"], 4)
    monkeypatch.setattr("sdsearch_lightning.retrieval.bm25._CHUNK", 3)
    assert BM25Retriever(corpus, index_path=corpus.parent / "b").search(["capital Seine leaves"], 4) == whole


def test_a_gzipped_corpus_is_unpacked(corpus):
    packed = corpus.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    assert BM25Retriever(packed).search(["Italy"], 1)[0][0].contents == TEXTS["rome"]


def test_the_index_is_mapped_and_no_pickle_is_read(corpus):
    retriever = BM25Retriever(corpus)
    retriever.search(["tea"], 1)
    assert isinstance(retriever._opened.index.scores["data"], np.memmap)
    retriever.close()
    np.save(retriever.folder / "data.csc.index.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"expected a BM25 index: .*Python objects.*Delete the folder"):
        retriever.search(["tea"], 1)


def test_bad_arguments_and_files(corpus, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="k: expected at least 1 passage per query, found 0"):
        BM25Retriever(corpus).search(["q"], 0)
    with pytest.raises(ConfigError, match=r"expected k1 >= 0 and b in \[0, 1\], found k1=0.9 and b=4"):
        BM25Retriever(corpus, b=4)
    with pytest.raises(DataError, match=r"no\.jsonl, found nothing"):
        BM25Retriever(tmp_path / "no.jsonl").prepare()
    with pytest.raises(DataError, match="found none but stop words in 1 passages"):
        BM25Retriever(write(tmp_path / "stop.jsonl", {"a": "the of ..."})).prepare()
    assert [path.suffix for path in (tmp_path / "stop.jsonl.index").iterdir()] == [".lock"]
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r'pip install "sdsearch-lightning\[bm25\]"'):
        BM25Retriever(corpus).prepare()


SCRIPTS = [
    '"东京"\n东京是日本的首都。',
    '"กรุงเทพ"\nกรุงเทพเป็นเมืองหลวงของประเทศไทย',
    '"Malcolm X"\nMalcolm X was born in Omaha.',
]


@pytest.mark.parametrize(("query", "first"), [("日本的首都", "0"), ("เมืองหลวงของประเทศไทย", "1"), ("who is X", "2")])
def test_text_without_spaces_is_found(tmp_path: Path, query: str, first: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": text}) + "\n" for i, text in enumerate(SCRIPTS)))
    assert BM25Retriever(path).search([query], 1)[0][0].id == first
    assert BM25Retriever(path, word=r"\b\w+\b").search(["日本的首都"], 1) == [[]], "as one word, it is found nowhere"
    with pytest.raises(ConfigError, match=r"word: expected a regular expression, found '\(': "):
        BM25Retriever(path, word="(")
