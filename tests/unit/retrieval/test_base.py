import subprocess
import sys
from types import SimpleNamespace

import pytest

from sdsearch_lightning.errors import ConfigError, DataError, RetrievalError
from sdsearch_lightning.retrieval import Retriever, as_passages, check_retriever
from sdsearch_lightning.types import Passage

PASSAGE = Passage("1", "one")


def retriever(answer):
    """A duck-typed retriever that returns `answer(queries)`, or raises it."""

    class Fake:
        def search(self, queries, k):
            found = answer(queries)
            if isinstance(found, Exception):
                raise found
            return found

    return Fake()


def test_importing_retrieval_is_cheap():
    heavy = "torch faiss sentence_transformers transformers lightning"
    code = f"import sys, sdsearch_lightning.retrieval; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_any_class_with_search_is_a_retriever():
    assert isinstance(retriever(list), Retriever)
    assert not isinstance(SimpleNamespace(search=None), Retriever)


def test_a_good_retriever_passes_and_objects_become_passages():
    check_retriever(retriever(lambda queries: [[PASSAGE] for _ in queries]), k=1)
    check_retriever(retriever(lambda queries: [() for _ in queries]), k=1)  # nothing found is fine
    duck = SimpleNamespace(id="7", contents="seven", score=0.5)
    assert as_passages([[duck], [PASSAGE]], 2, 1) == [[Passage("7", "seven", 0.5)], [PASSAGE]]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (lambda queries: None, "found NoneType None"),
        (lambda queries: [PASSAGE for _ in queries], "found list [Passage("),
        (lambda queries: [[PASSAGE]], "found 1 lists of length [1]"),
        (lambda queries: [[PASSAGE] * 3 for _ in queries], "found 2 lists of length [3, 3]"),
        (lambda queries: [["text"] for _ in queries], "found in place of one str 'text'"),
        (lambda queries: [[{"id": "1", "contents": "c"}] for _ in queries], "found in place of one dict"),
        (
            lambda queries: [[SimpleNamespace(id=1, contents="c")] for _ in queries],
            "found in place of one SimpleNamespace",
        ),
        (lambda queries: KeyError("no index"), "raised KeyError: 'no index'"),
    ],
)
def test_a_wrong_shape_is_named(answer, shown):
    with pytest.raises(ConfigError) as error:
        check_retriever(retriever(answer), k=2)
    assert shown in str(error.value) and "xpected a list of 2 lists" in str(error.value)
    assert "Fake.search" in str(error.value) and "\n" not in str(error.value)


def test_our_own_errors_keep_their_class():
    with pytest.raises(DataError, match="empty"):
        check_retriever(retriever(lambda queries: DataError("corpus is empty")), k=2)


def test_results_in_the_middle_of_a_run_are_retrieval_errors():
    with pytest.raises(RetrievalError, match="list of 1 lists"):
        as_passages([[PASSAGE], [PASSAGE]], 1, 3)
