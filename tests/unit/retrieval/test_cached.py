import json
from types import SimpleNamespace

import pytest
from jsonargparse import ArgumentParser

from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, RetrievalError
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever
from sdsearch_lightning.retrieval.cached import CachedRetriever
from sdsearch_lightning.types import Passage


class Echo:
    """Answers with the query itself, k times, and notes what it was asked."""

    def __init__(self):
        self.calls = []

    def search(self, queries, k):
        self.calls.append((list(queries), k))
        return [[Passage(f"{query}/{rank}", query) for rank in range(k)] for query in queries]


def contents(results):
    return [hits[0].contents for hits in results]


def test_known_queries_are_not_asked_again_and_the_order_is_kept():
    inner = Echo()
    cached = CachedRetriever(inner)
    assert contents(cached.search(["b", "a", "b"], 2)) == ["b", "a", "b"]
    assert contents(cached.search(["c", "a", "d", "b"], 2)) == ["c", "a", "d", "b"]
    assert inner.calls == [(["b", "a"], 2), (["c", "d"], 2)]
    assert (cached.hits, cached.misses) == (3, 4)
    assert cached.search([], 2) == [] and cached.search(["d", "c"], 2) and len(inner.calls) == 2


def test_k_is_part_of_the_key():
    inner = Echo()
    cached = CachedRetriever(inner)
    assert [len(cached.search(["a"], k)[0]) for k in (1, 3, 1, 3)] == [1, 3, 1, 3] and len(inner.calls) == 2


def test_the_first_text_of_a_query_is_the_one_sent():
    inner = Echo()
    cached = CachedRetriever(inner)
    assert contents(cached.search(["  Rome  \n Italy ", "rome italy", "ROME\tITALY"], 1)) == ["  Rome  \n Italy "] * 3
    assert contents(cached.search(["Rome Italy", "romeitaly", "STRASSE", "straße"], 1))[1:] == [
        "romeitaly",
        "STRASSE",
        "STRASSE",
    ]
    strict = CachedRetriever(inner, ignore_case=False)
    assert contents(strict.search(["Rome", "rome", " Rome"], 1)) == ["Rome", "rome", "Rome"]


def test_the_least_recently_used_entry_goes_first():
    inner = Echo()
    cached = CachedRetriever(inner, max_entries=2)
    for query in ("a", "b", "a", "c"):  # b is the oldest now
        cached.search([query], 1)
    inner.calls.clear()
    cached.search(["a"], 1), cached.search(["c"], 1)
    assert inner.calls == []
    cached.search(["b"], 1)
    assert inner.calls == [(["b"], 1)]


def test_a_batch_larger_than_the_cache_is_answered():
    cached = CachedRetriever(Echo(), max_entries=1)
    cached.search(["a"], 1)
    assert contents(cached.search(["b", "a", "c", "b"], 1)) == ["b", "a", "c", "b"]
    assert len(cached._answers) == 1


def test_failures_propagate_and_are_not_kept():
    inner = Echo()
    cached = CachedRetriever(inner)
    working, answers = inner.search, [OSError("down"), [[]], "nonsense"]

    def failing(queries, k):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    inner.search = failing
    with pytest.raises(OSError, match="down"):
        cached.search(["a", "b"], 1)
    with pytest.raises(RetrievalError, match="expected a list of 2 lists"):
        cached.search(["a", "b"], 1)
    with pytest.raises(RetrievalError, match="found str"):
        cached.search(["a", "b"], 1)
    assert (cached.hits, cached.misses) == (0, 0)
    inner.search = working
    assert contents(cached.search(["a", "b"], 1)) == ["a", "b"]


def test_callers_cannot_change_what_is_kept():
    cached = CachedRetriever(Echo())
    for _ in range(3):  # the answer itself, then what the cache gave
        hits, again = cached.search(["a", "a"], 2)
        assert len(hits) == len(again) == 2
        hits.clear()


def test_a_duck_typed_retriever_will_do():
    inner = SimpleNamespace(search=lambda queries, k: [(SimpleNamespace(id="1", contents="c"),) for _ in queries])
    cached = CachedRetriever(inner)
    cached.prepare()  # it has neither
    cached.close()
    assert cached.search(["a"], 1) == [[Passage("1", "c")]]
    check_retriever(cached, 1)


def test_prepare_and_close_pass_through():
    calls = []
    inner = Echo()
    inner.prepare, inner.close = lambda: calls.append("prepare"), lambda: calls.append("close")
    cached = CachedRetriever(inner)
    cached.prepare()
    cached.search(["a"], 1)
    cached.close()
    assert calls == ["prepare", "close"] and cached.misses == 1
    cached.search(["a"], 1)
    assert len(inner.calls) == 2  # forgotten
    with pytest.raises(ConfigError, match="max_entries: expected at least 1, found 0"):
        CachedRetriever(inner, max_entries=0)


def test_nested_in_yaml(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "tea", "contents": "a drink of leaves"}) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"""
data:
  class_path: SearchDataModule
  init_args:
    retriever:
      class_path: sdsearch_lightning.retrieval.cached.CachedRetriever
      init_args:
        max_entries: 7
        retriever:
          class_path: sdsearch_lightning.retrieval.DenseRetriever
          init_args: {{corpus: {corpus}}}
"""
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(SearchDataModule, "data", fail_untyped=False)
    retriever = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "run.yaml")])).data.retriever
    assert isinstance(retriever, CachedRetriever) and isinstance(retriever.retriever, DenseRetriever)
    assert retriever.max_entries == 7 and retriever.retriever.corpus_path == corpus
    retriever.prepare()
    assert [hits[0].id for hits in retriever.search(["drink", "Drink "], 1)] == ["tea", "tea"]
    assert (retriever.hits, retriever.misses) == (1, 1)
