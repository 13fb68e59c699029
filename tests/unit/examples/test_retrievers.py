"""The examples keep the contract and are named in YAML."""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from examples.hybrid_retriever import HybridRetriever
from helpers.corpora import FOUR_TEXTS, ids_of, write_four_texts
from helpers.paths import ROOT
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.retrieval import check_retriever
from sdsearch_lightning.types import Passage

BM25 = "sdsearch_lightning.retrieval.bm25.BM25Retriever"
DENSE = "sdsearch_lightning.retrieval.dense.DenseRetriever"


@pytest.fixture
def corpus(tmp_path):
    return str(write_four_texts(tmp_path))


@pytest.fixture
def from_yaml(tmp_path):
    """The retriever of a data module as LightningCLI makes it of a file."""

    def build(class_path, **options):
        data = {"class_path": "SearchDataModule", "init_args": {"retriever": entry(class_path, **options)}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": data}))
        parser = ArgumentParser()
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(SearchDataModule, "data", fail_untyped=False)
        return parser.instantiate(parser.parse_args(["--config", str(tmp_path / "run.yaml")])).data.retriever

    return build


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A BERT with random weights and one output."""
    folder = tmp_path_factory.mktemp("models") / "cross"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "capital", "france", "italy", "play", "drink", "leaves"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=60, initializer_range=0.5, num_labels=1, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def entry(class_path, **options):
    return {"class_path": class_path, "init_args": options}


def check(retriever, queries, k):
    """The contract, and its answer."""
    check_retriever(retriever, k)
    assert retriever.search([], k) == []
    found = retriever.search(queries, k)
    for hits in found:
        assert len(hits) <= k and len({hit.id for hit in hits}) == len(hits)
        assert all(better.score >= worse.score for better, worse in pairwise(hits))
    assert [ids_of(retriever.search([query], k))[0] for query in queries] == ids_of(found)
    return ids_of(found)


class Fixed:
    """Answers everything with the same ids; has neither prepare nor close."""

    def __init__(self, *names):
        self.names = names

    def search(self, queries, k):
        return [[Passage(name, name) for name in self.names[:k]] for _ in queries]


def test_hybrid_by_hand():
    retriever = HybridRetriever([Fixed("a", "b", "c"), Fixed("c", "d"), Fixed()], depth=1)
    retriever.prepare()
    (hits,) = retriever.search(["q"], 4)
    assert [(hit.id, hit.score) for hit in hits] == [
        ("c", pytest.approx(1 / 63 + 1 / 61)),
        ("a", pytest.approx(1 / 61)),
        ("b", pytest.approx(1 / 62)),
        ("d", pytest.approx(1 / 62)),
    ]
    assert ids_of(retriever.search(["q"], 1)) == [["a"]]  # depth 1: c is third, and not seen
    assert ids_of(HybridRetriever(retriever.retrievers).search(["q", "r"], 1)) == [["c"], ["c"]]
    retriever.close()


def test_hybrid_in_yaml(corpus, from_yaml):
    retriever = from_yaml(
        "examples.hybrid_retriever.HybridRetriever",
        retrievers=[entry(BM25, corpus=corpus), entry(DENSE, corpus=corpus)],
        rank_constant=10,
    )
    retriever.prepare()
    found = check(retriever, ["capital of Italy", "Shakespeare", "nothing known"], 2)
    assert found[0] == ["rome", "paris"] and found[1][0] == "hamlet"
    assert retriever.search(["Shakespeare"], 1)[0][0].score == pytest.approx(2 / 11)
    retriever.close()
    assert all(inner._opened is None for inner in retriever.retrievers)


def test_reranking(corpus, cross_encoder, from_yaml):
    retriever = from_yaml(
        "examples.reranking_retriever.RerankingRetriever",
        retriever=entry(DENSE, corpus=corpus),
        model=cross_encoder,
        device="cpu",
    )
    retriever.prepare()
    queries = ["capital of France", "drink play"]
    found = check(retriever, queries, 3)
    assert found != ids_of(retriever.retriever.search(queries, 3))
    from sentence_transformers import CrossEncoder

    for query, names in zip(queries, found, strict=True):
        pairs = [(query, text) for text in FOUR_TEXTS.values()]
        scores = dict(zip(FOUR_TEXTS, CrossEncoder(cross_encoder, device="cpu").predict(pairs), strict=True))
        assert names == sorted(FOUR_TEXTS, key=scores.get, reverse=True)[:3]
        assert retriever.search([query], 1)[0][0].score == pytest.approx(scores[names[0]], abs=1e-5)
    retriever.depth = 2
    assert sorted(ids_of(retriever.search(["capital of Italy"], 2))[0]) == ["paris", "rome"]  # what the search had
    retriever.retriever = Fixed()
    assert retriever.search(["a", "b"], 2) == [[], []]
    retriever.close()
    assert retriever.encoder is None


TRIPLES = [
    ("Marie Curie", "born in", "Warsaw"),
    ("Warsaw", "capital of", "Poland"),
    ("Marie", "is", "a given name"),
    ("Poland", "borders", "Germany"),
    ("Pierre Curie", "married", "Marie Curie"),
    ("Tea", "made of", "leaves"),
]


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_knowledge_graph(tmp_path, from_yaml, kind):
    path = tmp_path / f"triples.{kind}"
    rows = [dict(zip(("subject", "relation", "object"), triple, strict=True)) for triple in TRIPLES]
    lines = ["\t".join(triple) for triple in TRIPLES] if kind == "tsv" else [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    name = "examples.knowledge_graph_retriever.KnowledgeGraphRetriever"
    retriever = from_yaml(name, path=str(path))
    queries = ["Where was MARIE CURIE born?", "marie", "tea, Warsaw", "unknown", ""]
    assert check(retriever, queries, 9) == [["0", "4", "2"], ["2"], ["0", "1", "5"], [], []]
    hit = retriever.search(queries, 1)[0][0]
    assert hit.contents == '"Marie Curie"\nMarie Curie born in Warsaw' and hit.title == '"Marie Curie"'
    assert hit.score == 1 + 3  # marie, curie, born
    two = from_yaml(name, path=str(path), hops=2)
    assert check(two, ["Where was Marie Curie born?"], 9) == [["0", "4", "2", "1"]]  # Warsaw's, not Poland's
    assert two.search(["Where was Marie Curie born?"], 9)[0][3].score == 0.5
    assert check(from_yaml(name, path=str(path), max_triples=1), ["of Marie Curie"], 9) == [["0", "2"]]


def test_the_examples_are_short():
    for name in ("hybrid", "reranking", "knowledge_graph"):
        text = (ROOT / "examples" / f"{name}_retriever.py").read_text()
        assert len(text.splitlines()) < 60 and "Cost: " in text and "Memory: " in text and f"examples.{name}" in text
