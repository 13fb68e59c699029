import json
import sys

import pytest
from jsonargparse import ArgumentParser

from helpers.paths import ROOT
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever

SOURCE = ROOT / "examples" / "custom_retriever.py"


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"Rome": "The capital of Italy.", "Paris": "The capital of France.", "Tea": "A drink."}))
    return path


def datamodule(*arguments):
    """The data module as LightningCLI makes it: subclasses by name, and untyped parameters allowed."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(SearchDataModule, "data", fail_untyped=False)
    return parser.instantiate(parser.parse_args(["--data=SearchDataModule", *arguments])).data


def test_an_unannotated_class_is_named_by_class_path(facts):
    retriever = datamodule(
        "--data.retriever=examples.custom_retriever.KeywordRetriever", f"--data.retriever.path={facts}"
    ).retriever
    assert type(retriever).__mro__[1] is object
    check_retriever(retriever, k=2)
    found = retriever.search(["the capital of Italy", "drink", "nothing known"], 2)
    assert [[passage.id for passage in hits] for hits in found] == [["Rome", "Paris"], ["Tea"], []]
    assert found[1][0].contents == '"Tea"\nA drink.'


def test_a_file_on_the_path_will_do(facts, tmp_path, monkeypatch):
    (tmp_path / "my_search.py").write_text(SOURCE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    retriever = datamodule("--data.retriever=my_search.KeywordRetriever", f"--data.retriever.path={facts}").retriever
    assert sys.modules[type(retriever).__module__].__file__ == str(tmp_path / "my_search.py")
    check_retriever(retriever, k=1)


def test_the_example_is_short_and_unannotated():
    text = SOURCE.read_text()
    assert len(text.splitlines()) < 60 and "->" not in text and "class KeywordRetriever:" in text


def test_ours_go_by_short_name(tmp_path):
    retriever = datamodule(
        "--data.retriever=DenseRetriever", f"--data.retriever.corpus={tmp_path / 'c.jsonl'}"
    ).retriever
    assert isinstance(retriever, DenseRetriever) and retriever.corpus_path == tmp_path / "c.jsonl"
    assert retriever.index_path == tmp_path / "c.jsonl.index"


def test_a_class_without_search_is_refused(tmp_path, monkeypatch):
    (tmp_path / "no_search.py").write_text("class Nothing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SearchDataModule, "data")
    with pytest.raises(Exception, match="no_search.Nothing"):
        parser.parse_args(["--data.retriever=no_search.Nothing"])
