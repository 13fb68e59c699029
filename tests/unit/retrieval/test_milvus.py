import json
import logging
import socket
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("pymilvus")
milvus_lite = pytest.importorskip("milvus_lite")

from sdsearch_lightning.errors import ConfigError, DataError, RetrievalError  # noqa: E402
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever, milvus  # noqa: E402
from sdsearch_lightning.retrieval.milvus import MilvusRetriever  # noqa: E402
from sdsearch_lightning.retrieval.static_encoder import save_static_encoder  # noqa: E402


@pytest.fixture
def corpus(tmp_path):
    """Sixty passages of random words, with fields, and one in another alphabet."""
    rng = np.random.default_rng(0)
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"id": f"p{row}", "contents": " ".join(f"w{word}" for word in rng.integers(0, 40, 9)), "year": row + 0.5}
        for row in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "мир", "title": "Мир", "text": "мир é"}]))
    return path


@pytest.fixture
def make(tmp_path):
    """A retriever of `tmp_path`/m.db by default; all are closed in the end."""
    made = []

    def build(*arguments, uri=f"{tmp_path}/m.db", **options):
        made.append(MilvusRetriever(uri, *arguments, **options))
        return made[-1]

    yield build
    for retriever in made:
        retriever.close()
    assert not +milvus._lite_users


@pytest.fixture
def encoder(tmp_path):
    save_static_encoder({f"w{word}": 1.0 + word % 3 for word in range(40)}, tmp_path / "e", dimension=32, seed=0)
    return str(tmp_path / "e")


def ids(results):
    return [[passage.id for passage in found] for found in results]


def upserted(monkeypatch, stop_after=None):
    """Counts the rows of each request to write, and breaks the line after some."""
    ask, sizes = MilvusRetriever._ask, []

    def counting(self, client, request, *values, **options):
        if request == "upsert":
            if len(sizes) == stop_after:
                raise KeyboardInterrupt
            sizes.append(len(values[0]))
        return ask(self, client, request, *values, **options)

    monkeypatch.setattr(MilvusRetriever, "_ask", counting)
    return sizes


QUERIES = ["w1 w2", "w30 w7 w7", "мир", "w5 w11 w12 w13"]


@pytest.mark.parametrize("index", ["AUTOINDEX", "FLAT"])
def test_it_finds_what_a_dense_index_finds(corpus, make, index, monkeypatch, caplog):
    monkeypatch.setattr(milvus, "_MAX_QUERIES", 3)  # the batch goes in two requests
    retriever, dense = make(corpus, index=index), DenseRetriever(corpus).search(QUERIES, 5)
    found = retriever.search(QUERIES, 5)
    assert ids(found) == ids(dense) and ids(found)[2][0] == "мир"
    for hits, expected in zip(found, dense, strict=True):
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-5)
        assert [(hit.contents, hit.fields) for hit in hits] == [(hit.contents, hit.fields) for hit in expected]
    assert retriever.search([], 3) == [] and len(retriever.search(["w1"], 99)[0]) == 61
    check_retriever(retriever, 3)
    assert not [record for record in caplog.records if record.name.startswith(("pymilvus", "milvus_lite", "grpc"))]


def test_it_is_filled_once_and_opens_again(corpus, make, monkeypatch):
    sizes = upserted(monkeypatch)
    first = make(corpus)
    first.prepare()
    assert sizes == [61]
    first.close()
    for thread in threading.enumerate():
        if "_serve" in thread.name:  # the embedded server's; it may still be on its way out
            thread.join(10)
            assert not thread.is_alive()
    found = first.search(["w3 w4"], 3)
    second = make(corpus, index="HNSW")  # while the other is open; the kind counts when a collection is made
    assert second.search(["w3 w4"], 3) == found and sizes == [61]
    first.close()
    assert second.search(["w3 w4"], 3) == found  # the last one stops the server


def test_a_killed_fill_goes_on(corpus, make, monkeypatch):
    monkeypatch.setattr(milvus, "_ROWS", 10)
    whole = make(corpus, uri=str(corpus.parent / "whole.db")).search(QUERIES, 61)
    with monkeypatch.context() as patch:
        upserted(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            make(corpus).prepare()
    sizes = upserted(monkeypatch)
    retriever = make(corpus, batch_size=1)  # 16 texts at a time: the limits between requests have moved
    assert retriever.search(QUERIES, 61) == whole
    assert sum(sizes) == 31  # from row 30 of 61: the last request may have been torn
    assert retriever._count(retriever._opened[0]) == 61


def test_a_torn_request_leaves_no_hole(corpus, make, monkeypatch):
    """A cluster splits a request over its shards, and a kill may leave any of its rows."""
    monkeypatch.setattr(milvus, "_ROWS", 10)
    retriever = make(corpus)
    retriever.prepare()
    client = retriever._opened[0]
    client.delete("passages", filter="row >= 29 or row in [20, 22, 23, 27]")
    assert retriever._count(client) == 25
    retriever.close()
    assert sorted(ids(retriever.search(["w1"], 61))[0]) == sorted(f"p{row}" for row in range(60)) + ["мир"]


def test_a_collection_of_something_else_is_refused(corpus, encoder, make):
    make(corpus, encoder=encoder).prepare()
    make(corpus, "other", encoder=encoder).prepare()  # one file holds several
    with pytest.raises(
        ConfigError, match=r"'passages' at .*m\.db: expected encoder \{.*'static'.*, found \{.*dimension"
    ):
        make(corpus).prepare()
    with pytest.raises(ConfigError, match="passage_prompt': 'p: '.*Name another collection, or drop this one"):
        make(encoder=encoder, passage_prompt="p: ").search(["w1"], 1)
    with corpus.open("a") as file:
        file.write('{"id": "new", "contents": "more"}\n')
    with pytest.raises(ConfigError, match=r"expected corpus '\w+', found '\w+'; num_passages 62, found 61\. Name"):
        make(corpus, encoder=encoder).prepare()
    retriever = make(encoder=encoder)
    retriever.prepare()
    retriever._opened[0].create_collection("foreign", dimension=32)
    with pytest.raises(ConfigError, match="found None. Something else than MilvusRetriever made it"):
        make(encoder=encoder, collection="foreign").prepare()


def test_no_corpus_is_needed_once_it_is_full(corpus, encoder, make, monkeypatch):
    with pytest.raises(ConfigError, match="'passages' at .* is not there, and no corpus was named"):
        make(encoder=encoder).prepare()
    monkeypatch.setattr(milvus, "_ROWS", 10)
    with monkeypatch.context() as patch:
        upserted(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            make(corpus, encoder=encoder).prepare()
    with pytest.raises(ConfigError, match=r"expected 61 passages, found 20\. Is it being filled\? Name the corpus"):
        make(encoder=encoder).prepare()
    filled = make(corpus, encoder=encoder)
    found = filled.search(QUERIES, 4)
    filled.close()
    corpus.unlink()
    assert make(encoder=encoder).search(QUERIES, 4) == found
    with pytest.raises(ConfigError, match="'static' is made from the corpus, found none"):
        make()


def test_one_server_for_several_clients(corpus, encoder, make):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(corpus.parent / "served"), host="127.0.0.1", port=0)
    uri = f"http://user:secret@127.0.0.1:{port}"
    writer, reader = make(corpus, uri=uri, encoder=encoder), make(uri=uri, encoder=encoder)
    assert writer.search(QUERIES, 4) == reader.search(QUERIES, 4)
    server.stop(grace=None).wait()
    database.close()
    reader._timeout = 0.5
    started = time.monotonic()
    with pytest.raises(RetrievalError, match=r"at http://127\.0\.0\.1:\d+: search failed: "):  # without the password
        reader.search(["w1"], 1)
    assert time.monotonic() - started < 5


def test_an_unreachable_server_is_told_soon_and_quietly(encoder, make, capfd):
    with pytest.raises(RetrievalError, match=r"at http://127\.0\.0\.1:1: connecting failed: .*server unavailable"):
        make(uri="http://127.0.0.1:1", encoder=encoder).search(["q"], 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers
        started = time.monotonic()
        with pytest.raises(RetrievalError, match="connecting failed"):
            make(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", encoder=encoder, timeout=0.5).prepare()
        assert time.monotonic() - started < 5
    assert capfd.readouterr() == ("", "") and logging.getLogger("pymilvus").level != logging.CRITICAL + 1


def test_a_file_in_use_and_bad_options(corpus, make, tmp_path, caplog):
    with (
        milvus_lite.MilvusLite(str(tmp_path / "m.db")),
        pytest.raises(RetrievalError, match="Only one process at a time"),
    ):
        make(corpus).prepare()
    with pytest.raises(RetrievalError, match="_collection failed: .*collection_name"):
        make(corpus, collection="").prepare()
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"expected http://host:port or a local path that ends in \.db, found 'm\.sq"):
        make(corpus, uri="m.sqlite")
    with pytest.raises(ConfigError, match="k: expected at least 1"):
        make(corpus).search(["q"], 0)


def test_texts_that_milvus_cannot_hold(tmp_path, make):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "a", "contents": "é" * 32_768}) + "\n")
    with pytest.raises(
        DataError, match=r"long\.jsonl passage 0 \('a'\): expected at most 65,535 bytes of contents, .*6"
    ):
        make(path).prepare()
    path.write_text(json.dumps({"id": "a", "contents": "é" * 32_767}) + "\n")
    assert len(make(path, uri=f"{tmp_path}/n.db").search(["é"], 1)[0][0].contents) == 32_767


@pytest.mark.parametrize("missing", ["pymilvus", "milvus_lite"])
def test_a_missing_package_is_named(corpus, make, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf'needs {missing}, found none.*pip install "sdsearch-lightning\[milvus\]"'):
        make(corpus).prepare()
