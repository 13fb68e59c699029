import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.index_folder import (
    CorpusFile,
    IndexFolder,
    choose_manifest,
    finished_folders,
    read_manifest,
)


def visible(folder):
    """All but the locks."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def filled(folder):
    (folder / "data").write_text("x")
    return {"told": 1}


def test_a_folder_is_named_by_its_identity(tmp_path):
    one, same, other = (IndexFolder(tmp_path, {"a": 1, "b": b}) for b in (2, 2, 3))
    assert one.path == same.path != other.path and not one.is_finished
    one.build(filled)
    assert same.is_finished and not other.is_finished
    assert same.manifest == {"a": 1, "b": 2, "told": 1}
    assert sorted(path.name for path in one.path.iterdir()) == ["data", "manifest.json"]
    assert finished_folders(tmp_path) == finished_folders(one.path) == [one.path]
    one.build(lambda _: pytest.fail("built twice"))


def test_a_failed_build_is_gone_on_with(tmp_path):
    folder = IndexFolder(tmp_path, {})

    def torn(path):
        (path / "half").write_text("h")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.build(torn)
    assert not folder.is_finished and finished_folders(tmp_path) == []
    folder.build(lambda path: {"found": (path / "half").read_text()})
    assert folder.manifest == {"found": "h"}


def test_bad_data_leaves_nothing_behind_but_earlier_work(tmp_path):
    folder = IndexFolder(tmp_path, {})

    def bad(path):
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        folder.build(bad)
    assert visible(tmp_path) == []
    (tmp_path / f".{folder.path.name}.unfinished").mkdir()
    (tmp_path / f".{folder.path.name}.unfinished" / "hours").touch()
    with pytest.raises(DataError, match="bad row"):
        folder.build(bad)
    assert (tmp_path / f".{folder.path.name}.unfinished" / "hours").exists()


def test_two_builders_build_once(tmp_path):
    built, errors = [], []

    def slowly(path):
        built.append(path)
        time.sleep(0.2)
        return filled(path)

    def work():
        try:
            IndexFolder(tmp_path, {}).build(slowly)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(built) == 1 and not errors and visible(tmp_path) == [IndexFolder(tmp_path, {}).path]


def test_the_lock_of_a_killed_builder_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from sdsearch_lightning.retrieval.index_folder import IndexFolder\n"
        "def hang(path):\n    (path / 'part').write_text('kept'); print('in', flush=True); time.sleep(99)\n"
        f"IndexFolder(Path({str(tmp_path)!r}), {{}}).build(hang)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as builder:
        builder.stdout.readline()
        os.kill(builder.pid, signal.SIGKILL)
    folder = IndexFolder(tmp_path, {})
    folder.build(lambda path: {"part": (path / "part").read_text()})
    assert folder.manifest == {"part": "kept"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"index_path: expected a folder to write to, found .*file"):
        IndexFolder(tmp_path / "file" / "below", {}).build(filled)


def test_a_damaged_manifest_is_named(tmp_path):
    for text in ("{", "[1]", ""):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json: expected a JSON object.*Delete the folder"):
            read_manifest(tmp_path)


def test_manifests_of_other_programs_are_passed_over(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text("[1]")
    assert finished_folders(tmp_path) == []


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("one\n")
    corpus = CorpusFile.read(tmp_path / "corpus.jsonl", tmp_path)
    corpus.check()
    with corpus.path.open("a") as file:
        file.write("two\n")
    with pytest.raises(DataError, match="expected a file that stays as it is, but it changed while it was indexed"):
        corpus.check()


@pytest.mark.slow
def test_many_processes_prepare_at_once(tmp_path):
    """The second opens what the first is about to move: a lock inside the folder would be moved with it."""
    code = (
        "import sys; from pathlib import Path\n"
        "from sdsearch_lightning.retrieval.index_folder import IndexFolder\n"
        f"for i in range(300): IndexFolder(Path({str(tmp_path)!r}), {{'i': i}}).build(lambda path: {{}})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(visible(tmp_path)) == 300


def test_a_large_corpus_is_digested_once(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("one\n")
    digest = CorpusFile.read(corpus, tmp_path / "index").digest
    told = {"corpus_stamp": CorpusFile.read(corpus, tmp_path).stamp}
    IndexFolder(tmp_path / "index", {"corpus": "as the manifest says"}).build(lambda _: told)
    assert CorpusFile.read(corpus, tmp_path / "index").digest == "as the manifest says" != digest
    times = corpus.stat().st_atime_ns, corpus.stat().st_mtime_ns
    corpus.write_text("two\n")
    os.utime(corpus, ns=times)  # the time of the last write can be set back, that of the last change cannot
    assert CorpusFile.read(corpus, tmp_path / "index").digest not in (digest, "as the manifest says")


def test_the_one_index_that_fits(tmp_path):
    corpus, other = tmp_path / "corpus.jsonl", tmp_path / "other.jsonl"
    corpus.write_text("one\n")
    other.write_text("other\n")
    root = tmp_path / "index"

    def built(path, encoder):
        identity = {
            "corpus": CorpusFile.read(path, root).digest,
            "encoder": encoder,
            "factory": "Flat",
            "backend": "faiss",
        }
        IndexFolder(root, identity).build(lambda _: {"encoder_name": encoder, "corpus_file": str(path)})

    with pytest.raises(ConfigError, match=r"found none\. Build it: sdsearch index --corpus_path .* --index_path"):
        choose_manifest(root, corpus, None)
    built(other, "a")
    with pytest.raises(ConfigError, match=r"found .*other.jsonl \(other contents\) by 'a', Flat, for faiss\. Build it"):
        choose_manifest(root, corpus, None)
    built(corpus, "a")
    assert choose_manifest(root, corpus, None)["corpus_file"] == str(corpus)
    built(corpus, "b")
    assert choose_manifest(root, corpus, "b")["encoder_name"] == "b"
    with pytest.raises(ConfigError, match=r"found 2: .*Name one of their folders"):
        choose_manifest(root, corpus, None)
    assert json.loads(json.dumps(choose_manifest(root, other, "a")))["encoder"] == "a"


def test_a_manifest_that_lost_a_key_is_told(tmp_path):
    folder = IndexFolder(tmp_path, {"corpus": "digest"})
    folder.build(filled)
    (folder.path / "manifest.json").write_text('{"cor\ufffdus": "digest"}')
    with pytest.raises(DataError, match=r"manifest\.json: expected the key 'corpus', found .*Delete the folder"):
        read_manifest(folder.path)["corpus"]
