"""`sdsearch index` and `sdsearch serve`, as a user calls them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from helpers.disks import small_disk
from helpers.worlds import RemoteWorld
from sdsearch_lightning.__main__ import main
from sdsearch_lightning.retrieval import DenseRetriever, RemoteRetriever

ROWS = [
    {"id": "paris", "contents": '"Paris"\nthe capital of France'},
    {"id": "rome", "title": "Rome", "text": "the capital of Italy"},
    {"id": "tea", "contents": '"Tea"\na drink of leaves'},
]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def index(*options):
    return main(["index", "--corpus_path", "corpus.jsonl", "--index_path", "index", *options])


@contextmanager
def server(*options, **environment):
    command = [sys.executable, "-m", "sdsearch_lightning", "serve", "--corpus_path", "corpus.jsonl", "--port", "0"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        line = process.stdout.readline()
        assert " at http" in line, process.stderr.read()
        try:
            yield process, line.split(" at ")[1].strip()
        finally:
            process.send_signal(signal.SIGTERM)


def test_an_index_is_built_once_and_told(corpus, capsys):
    assert index() == 0
    told = capsys.readouterr().out
    assert told.startswith("built: index/") and "static_Flat.index" in told
    assert "serve it: sdsearch serve --corpus_path corpus.jsonl --index_path index" in told
    assert index() == 0
    assert capsys.readouterr().out.startswith("there already: index/")
    assert index("--faiss_type", "HNSW8", "--use_fp16") == 0  # Search-R1's names
    assert "static_HNSW8.index" in capsys.readouterr().out
    assert len(list((corpus.parent / "index").glob("*/manifest.json"))) == 2


def test_a_full_disk_is_told_in_a_line(corpus, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdsearch_lightning.retrieval.index_build.write_vectors", full)
    assert index() == 1
    told = capsys.readouterr().err
    assert "error: index/." in told and "No space left on device (" in told
    monkeypatch.undo()
    monkeypatch.chdir(corpus.parent)
    assert index() == 0


@pytest.mark.parametrize("kilobytes", [16, 64, 200, 1000])
def test_a_full_disk_is_told_whatever_was_being_written(corpus, capsys, kilobytes):
    corpus.write_text("".join(f'{{"id": "{i}", "contents": "passage {i} of a corpus"}}\n' for i in range(20_000)))
    with small_disk(corpus.parent / "index", kilobytes):
        assert index("--retriever_name", "bm25") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "index/." in line and "No space left on device (" in line


@pytest.mark.slow
def test_an_index_is_served(corpus):
    index()
    with server("--index_path", "index", "--topk", "2") as (process, url):
        remote = RemoteRetriever(url)
        near = DenseRetriever(corpus, index_path="index").search(["capital of Italy", "leaves"], 2)
        far = remote.search(["capital of Italy", "leaves"], 2)
        assert [[p.id for p in hits] for hits in far] == [[p.id for p in hits] for hits in near]
        assert far[0][0].fields["title"] == "Rome" and far[0][0].contents == '"Rome"\nthe capital of Italy'
        answer = httpx.post(url, json={"queries": ["leaves"]}).json()
        assert len(answer["result"][0]) == 2 and answer["result"][0][0]["contents"] == ROWS[2]["contents"]
        assert httpx.get(url.replace("/retrieve", "/health")).json()["passages"] == 3
        remote.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stderr.read() == ""


@pytest.mark.slow
def test_a_token_from_the_environment_closes_the_door(corpus):
    index()
    (file,) = (corpus.parent / "index").glob("*/*.index")
    with server("--index_path", str(file), "--cache_entries", "9", SDSEARCH_TOKEN="secret") as (_, url):
        assert httpx.post(url, json={"queries": ["tea"]}).status_code == 401
        remote = RemoteRetriever(url, token="secret")
        assert remote.search(["leaves"], 1)[0][0].id == "tea"
        remote.close()


@pytest.mark.slow
def test_bm25_by_search_r1s_flags(corpus, capsys):
    assert main(["index", "--corpus_path", "corpus.jsonl", "--save_dir", "bm25", "--retrieval_method", "bm25"]) == 0
    assert "BM25 index of corpus.jsonl is in bm25" in capsys.readouterr().out
    with server("--index_path", "bm25", "--retriever_name", "bm25") as (_, url):
        assert httpx.post(url, json={"query": "italy", "return_scores": True}).json()["result"][0][0]["score"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "--corpus_path", "no.jsonl", "--index_path", "index"], "Expected a file at no.jsonl, found nothing"),
        (["index", "--corpus_path", "corpus.jsonl"], "'index_path' is required, but was not given."),
        (
            ["index", "--corpus_path", "corpus.jsonl", "--index_path", "i", "--factory", "Fl"],
            "factory: expected a FAISS",
        ),
        (["index", "--corpus_path", "corpus.jsonl", "--index_path", "i", "--encodr", "e"], "unknown key 'encodr'"),
        (["index", "--corpus_path", "empty.jsonl", "--index_path", "i"], "empty.jsonl: expected at least one passage"),
        (
            ["index", "--corpus_path", "corpus.jsonl", "--index_path", "i", "--encoder", "./no"],
            "encoder: expected 'static",
        ),
        (
            ["serve", "--corpus_path", "corpus.jsonl", "--index_path", "no"],
            "expected an index at no, found nothing. Build",
        ),
        (["serve", "--corpus_path", "corpus.jsonl", "--index_path", "."], "expected one index of corpus.jsonl in ."),
        (["serve", "--corpus_path", "corpus.jsonl", "--index_path", "empty.jsonl"], "was built with, found none given"),
    ],
)
def test_mistakes_are_told_in_a_few_lines(corpus, capsys, arguments, message):
    (corpus.parent / "empty.jsonl").touch()
    code = main(arguments)
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and len(told.splitlines()) <= 3
    assert code in (1, 2)


@pytest.mark.slow
def test_a_server_that_dies_in_mid_training_costs_retries_only(workplace):
    """The run is the one that searched in its own process, to the last bit of every metric and every rollout."""
    done = workplace.sdsearch(
        "fit", "--config", "fit.yaml", "--data", "helpers.worlds.RemoteWorld", "--run.name", "remote"
    )
    (retriever,) = RemoteWorld.used
    retriever.server.kill()
    assert (done.returncode, done.stderr) == (0, "")
    assert retriever.server.starts == 2 and retriever.calls > retriever.fatal_call
    assert workplace.metrics("remote") == workplace.metrics("rl")
    near, far = (workplace.run(name) / "trajectories.jsonl" for name in ("rl", "remote"))
    assert far.read_text() == near.read_text()
