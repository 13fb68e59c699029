"""The flags of Search-R1's build_index.sh and retrieval_launch.sh, on the embedded encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdsearch_lightning.cli.retrieval import _encoder_options, _index_parser, _opened, _serve_parser, index
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import BM25Retriever, DenseRetriever
from sdsearch_lightning.retrieval.imported import index_embeddings

ROWS = [{"id": str(i), "contents": f'"t{i}"\n{text}'} for i, text in enumerate(("paris france", "rome italy", "tea"))]
BUILD_INDEX = (
    "--retrieval_method e5 --model_path static --corpus_path corpus.jsonl --save_dir indexes --use_fp16 "
    "--max_length 256 --batch_size 512 --pooling_method mean --faiss_type Flat --save_embedding --faiss_gpu"
)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("corpus.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def serve_options(*flags: str) -> object:
    return _serve_parser().parse_args(["--corpus_path", "corpus.jsonl", *flags])


def test_build_index_sh_builds_and_retrieval_launch_sh_serves(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index(BUILD_INDEX.split())
    told = capsys.readouterr().out
    assert "note: --save_embedding changes nothing: " in told and "note: --faiss_gpu changes nothing: " in told
    found = _opened(serve_options("--index_path", "indexes", "--retriever_name", "e5", "--topk", "3"))
    assert isinstance(found, DenseRetriever) and found.is_built
    assert [hit.id for hit in found.search(["rome"], 1)[0]] == ["1"]
    found.close()
    with pytest.raises(ConfigError, match="Name the folder, which holds indexes: --index_path indexes"):
        _opened(serve_options("--index_path", "indexes/e5_Flat.index", "--retriever_name", "e5"))


@pytest.mark.parametrize(
    ("name", "family"),
    [("e5", "e5"), ("e5-base-v2", "e5"), ("bge", "bge"), ("contriever", "contriever"), ("dense", None), ("be5t", None)],
)
def test_a_retriever_name_sets_the_convention(name: str, family: str | None) -> None:
    for parser, folder in ((_index_parser(), "--save_dir"), (_serve_parser(), "--index_path")):
        options = parser.parse_args(["--corpus_path", "c", folder, "i", "--retriever_name", name])
        assert _encoder_options(options) == ({} if family is None else {"convention": family})


def test_serve_never_builds_and_leaves_lucene_alone(corpus: Path) -> None:
    Path("bm25").mkdir()
    options = serve_options("--index_path", "bm25", "--retriever_name", "bm25")
    with pytest.raises(ConfigError, match="expected a BM25 index of corpus.jsonl, as that is now, in bm25, found none"):
        _opened(options)
    assert list(Path("bm25").iterdir()) == []
    index(["--corpus_path", "corpus.jsonl", "--index_path", "bm25", "--retriever_name", "bm25"])
    assert isinstance(_opened(options), BM25Retriever)
    Path("lucene").mkdir()
    Path("lucene/segments_2").touch()
    for call in (
        lambda: _opened(serve_options("--index_path", "lucene", "--retriever_name", "bm25")),
        lambda: index(["--corpus_path", "corpus.jsonl", "--save_dir", "lucene", "--retriever_name", "bm25"]),
        lambda: BM25Retriever("corpus.jsonl", "lucene").search(["tea"], 1),
    ):
        with pytest.raises(ConfigError, match="found Lucene's in lucene, which needs Java"):
            call()
    assert [path.name for path in Path("lucene").iterdir()] == ["segments_2"]


def test_an_index_of_another_encoder_is_named(corpus: Path) -> None:
    index(["--corpus_path", "corpus.jsonl", "--index_path", "indexes", "--max_length", "9"])
    with pytest.raises(ConfigError) as error:
        _opened(serve_options("--index_path", "indexes", "--max_length", "8"))
    told = str(error.value)
    assert "by encoder 'static'" in told and "found corpus.jsonl by 'static', Flat, for faiss" in told


def unit_vectors(rows: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_that_are_there_become_an_index(tmp_path: Path) -> None:
    import faiss

    vectors = unit_vectors(5, 8)
    vectors.tofile(tmp_path / "emb_e5.memmap")
    assert index_embeddings(tmp_path / "emb_e5.memmap", 8, tmp_path / "new/e5_Flat.index") == 5
    read = faiss.read_index(str(tmp_path / "new/e5_Flat.index"))
    np.testing.assert_array_equal(read.reconstruct_n(0, 5), vectors)
    with pytest.raises(ConfigError, match="of 7 numbers, so of a multiple of 28 bytes, found 160 bytes"):
        index_embeddings(tmp_path / "emb_e5.memmap", 7, tmp_path / "x.index")
    (3 * vectors).tofile(tmp_path / "long.memmap")
    with pytest.raises(ConfigError, match="expected vectors of length 1, .* found lengths from 3 to 3"):
        index_embeddings(tmp_path / "long.memmap", 8, tmp_path / "x.index")
    with pytest.raises(ConfigError, match="found 0 bytes"):
        index_embeddings(tmp_path / "nowhere", 8, tmp_path / "x.index")


def test_embeddings_of_another_corpus_are_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        dimension = 8

        def __init__(self, *_: object, **__: object) -> None: ...

        def encode_queries(self, texts: list[str]) -> np.ndarray:
            return unit_vectors(len(texts), 8)

        def encode_passages(self, texts: list[str]) -> np.ndarray:
            return unit_vectors(3, 8)[: len(texts)]

        is_folder = False

    monkeypatch.setattr("sdsearch_lightning.cli.retrieval.TextEncoder", Encoder)
    monkeypatch.setattr("sdsearch_lightning.retrieval.dense.TextEncoder", Encoder)
    flags = ["--corpus_path", "corpus.jsonl", "--save_dir", "indexes", "--model_path", "my-e5", "--embedding_path"]
    unit_vectors(4, 8).tofile("four.memmap")
    with pytest.raises(DataError, match="expected 3 vectors, .* found 4 in my-e5_Flat.index .encoder 'my-e5'."):
        index([*flags, "four.memmap"])
    assert not Path("indexes/my-e5_Flat.index").exists()
    unit_vectors(3, 8).tofile("three.memmap")
    index([*flags, "three.memmap"])
    assert Path("indexes/my-e5_Flat.index").is_file()
