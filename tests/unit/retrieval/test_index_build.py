"""Builds of an index that end early, or meet a corpus that changes, and the space they take."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from helpers.corpora import ids_of, names_in, write_four_texts
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import DenseRetriever
from sdsearch_lightning.retrieval.encoder import TextEncoder
from sdsearch_lightning.retrieval.torch_index import write_vectors


@pytest.fixture
def corpus(tmp_path):
    return write_four_texts(tmp_path)


def test_a_build_that_failed_goes_on(corpus, monkeypatch):
    """The disk fills up while the index is written; what was encoded by then is not encoded again."""
    retriever = DenseRetriever(corpus)
    with monkeypatch.context() as patch:

        def torn(path, vectors, factory):
            path.write_text("half")
            raise OSError("disk full")

        patch.setattr("sdsearch_lightning.retrieval.index_build.write_faiss_index", torn)
        with pytest.raises(OSError, match="disk full"):
            retriever.prepare()
    assert not retriever.is_built
    (unfinished,) = retriever.index_path.glob(".*.unfinished")
    (unfinished / "static_Flat.index").unlink()  # the real writer renames: what has the name is whole
    monkeypatch.setattr(TextEncoder, "encode_passages", lambda *_: pytest.fail("encoded twice"))
    assert ids_of(retriever.search(["tea"], 1)) == [["tea"]]
    assert names_in(retriever.index_path) == [retriever.folder.name]
    assert sorted(path.name for path in retriever.folder.iterdir()) == [
        "encoder", "manifest.json", "offsets.npy", "static_Flat.index",
    ]  # fmt: skip


def test_a_disk_that_is_too_small_is_told_before_the_work(corpus, monkeypatch):
    usage = shutil.disk_usage(corpus.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(TextEncoder, "encode_passages", lambda *_: pytest.fail("started all the same"))
    with pytest.raises(ConfigError, match=r"expected 0\.0 GB of free disk for 4 vectors of 256 numbers, found 0\.0 GB"):
        DenseRetriever(corpus).prepare()


def test_space_for_vectors_is_taken_before_they_are_made(tmp_path):
    """A sparse file would let the disk fill up in the middle of a write into mapped memory, which is a signal."""
    vectors = write_vectors(tmp_path / "v.npy", 5000, 64)
    assert vectors.shape == (5000, 64) and (tmp_path / "v.npy").stat().st_blocks * 512 >= vectors.nbytes


def test_a_killed_build_goes_on_and_gives_the_same_index(tmp_path):
    """SIGKILL while encoding: the next run starts at the note, and its index is that of a whole run, bit for bit."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": f"w{i % 97} u{i}"}) + "\n" for i in range(3000)))
    code = f"""
import os, signal
from sdsearch_lightning.retrieval import DenseRetriever, index_build
from sdsearch_lightning.retrieval.encoder import TextEncoder
index_build._CHECKPOINT_SECONDS = 0.0
encode, calls = TextEncoder.encode_passages, []
def counted(self, texts):
    calls.append(len(texts))
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)
TextEncoder.encode_passages = counted
DenseRetriever({str(path)!r}, index_path={str(tmp_path / "killed")!r}, batch_size=32).prepare()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "killed").glob(".*.unfinished")
    assert json.loads((unfinished / "encoded.json").read_text()) == {"rows": 3 * 16 * 32}
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        encode = TextEncoder.encode_passages
        patch.setattr(TextEncoder, "encode_passages", lambda self, texts: encoded.extend(texts) or encode(self, texts))
        resumed = DenseRetriever(path, index_path=tmp_path / "killed", batch_size=32)
        resumed.prepare()
    assert len(encoded) == 3000 - 3 * 16 * 32
    whole = DenseRetriever(path, index_path=tmp_path / "whole", batch_size=32)
    whole.prepare()
    assert resumed.index_file.read_bytes() == whole.index_file.read_bytes()


def test_a_corpus_that_changes_before_it_is_indexed_is_noticed(corpus):
    """Its digest was taken, the lock was waited for, and meanwhile the file was still being copied."""
    retriever = DenseRetriever(corpus)
    assert not retriever.is_built  # takes the digest
    with corpus.open("a") as file:
        file.write('{"id": "zebra", "contents": "zebra"}\n')
    with pytest.raises(DataError, match="changed while it was indexed"):
        retriever.prepare()
    retriever.close()
    assert ids_of(retriever.search(["zebra"], 1)) == [["zebra"]]
