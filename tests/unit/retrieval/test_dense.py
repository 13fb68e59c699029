import gzip
import json
import pickle
import shutil

import numpy as np
import pytest

from helpers.corpora import FOUR_TEXTS, ids_of, names_in, write_four_texts
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever, dense
from sdsearch_lightning.retrieval.static_encoder import save_static_encoder


@pytest.fixture
def corpus(tmp_path):
    return write_four_texts(tmp_path)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_search_finds_the_passage_that_shares_rare_words(corpus, backend):
    retriever = DenseRetriever(corpus, backend=backend)
    found = retriever.search(["capital of Italy", "Shakespeare"], 2)
    assert [hits[0] for hits in ids_of(found)] == ["rome", "hamlet"] and ids_of(found)[0][1] == "paris"
    assert found[0][0].contents == FOUR_TEXTS["rome"] and found[0][0].score > found[0][1].score > 0
    assert retriever.search([], 3) == []
    check_retriever(retriever, 3)
    retriever.close()
    assert ids_of(retriever.search(["Shakespeare"], 1)) == [["hamlet"]]  # opens again


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_asking_for_more_than_there_is_repeats_nothing(corpus, backend):
    """FAISS pads with row -1, which as a Python index is the last passage."""
    (found,) = ids_of(DenseRetriever(corpus, backend=backend).search(["leaves"], 9))
    assert found[0] == "tea" and sorted(found) == sorted(FOUR_TEXTS)


def test_rows_of_minus_one_never_surface(corpus, monkeypatch):
    retriever = DenseRetriever(corpus)
    retriever.search(["tea"], 1)
    padded = np.array([[0.9, -3.4e38]], dtype=np.float32), np.array([[3, -1]])
    monkeypatch.setattr(retriever._opened.vectors, "search", lambda queries, k: padded, raising=True)
    assert ids_of(retriever.search(["tea"], 2)) == [["tea"]]


def test_backends_agree_with_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 60, 12)) for _ in range(300)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": text}) + "\n" for i, text in enumerate(texts)))
    queries = [" ".join(text.split()[:4]) for text in texts[::10]]
    by_faiss, by_torch = (DenseRetriever(path, backend=backend) for backend in ("faiss", "torch"))
    found = by_faiss.search(queries, 4)
    encoder = by_faiss._opened.encoder
    passages = encoder.encode_passages(texts).astype(np.float64)
    asked = encoder.encode_queries(queries).astype(np.float64)
    expected = np.argsort(-(asked @ passages.T), axis=1)[:, :4].astype(str).tolist()
    assert ids_of(found) == ids_of(by_torch.search(queries, 4)) == expected
    assert ids_of(by_faiss.search(queries[:3], 4)) == expected[:3] != expected[1:4]


def test_a_finished_index_is_used_again(corpus, monkeypatch):
    DenseRetriever(corpus).prepare()
    monkeypatch.setattr(dense, "build_index", lambda *_: pytest.fail("built twice"))
    retriever = DenseRetriever(corpus)
    retriever.prepare()
    assert ids_of(retriever.search(["tea"], 1)) == [["tea"]]
    assert names_in(retriever.index_path) == [retriever.folder.name]
    manifest = json.loads((retriever.folder / "manifest.json").read_text())
    assert manifest["num_passages"] == 4 and manifest["encoder"] == "static"


def test_the_fingerprint_is_of_content(corpus, tmp_path):
    encoder = tmp_path / "encoder"
    save_static_encoder({"tea": 1.0}, encoder, dimension=4, seed=0)
    copy = shutil.copytree(encoder, tmp_path / "copy")
    renamed = shutil.copy(corpus, tmp_path / "same.jsonl")

    def name(path=corpus, **options):
        return DenseRetriever(path, **options).folder.name

    assert name() == name(renamed) and name(encoder=str(encoder)) == name(encoder=str(copy))
    assert name() == name(query_prompt="query: ")  # no passage depends on it
    hub = {"encoder": "intfloat/e5-base-v2"}  # a name: nothing is loaded for it
    names = [name(), name(encoder=str(encoder)), name(**hub), name(**hub, passage_prompt="passage: ")]
    names += [name(passage_prompt="passage: "), name(backend="torch"), name(factory="HNSW32"), name(dtype="bfloat16")]
    save_static_encoder({"tea": 2.0}, encoder, dimension=4, seed=0)
    names.append(name(encoder=str(encoder)))
    with corpus.open("a") as file:
        file.write('{"id": "new", "contents": "more"}\n')
    names.append(name())
    assert len(set(names)) == len(names)


def test_a_changed_corpus_is_searched_anew(corpus):
    index = corpus.parent / "index"
    assert ids_of(DenseRetriever(corpus, index_path=index).search(["zebra"], 1)) != [["zebra"]]
    with corpus.open("a") as file:
        file.write('{"id": "zebra", "contents": "zebra"}\n')
    assert ids_of(DenseRetriever(corpus, index_path=index).search(["zebra"], 1)) == [["zebra"]]


def test_a_gzipped_corpus_is_unpacked_beside_its_index(corpus):
    packed = corpus.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    retriever = DenseRetriever(packed)
    assert retriever.search(["capital of Italy"], 1)[0][0].contents == FOUR_TEXTS["rome"]
    assert (retriever.folder / "corpus.jsonl").read_bytes() == corpus.read_bytes()
    packed.write_bytes(gzip.compress(b'{"id": "1", "contents": "c"}\n{"id": "2"}\n'))
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz line 2: expected 'id' and"):
        DenseRetriever(packed).prepare()


def test_an_encoder_folder_with_prompts(corpus, tmp_path):
    """A key "passage" is honoured, which encode_document alone would not find behind its default "document"."""
    from sentence_transformers import SentenceTransformer

    save_static_encoder({"tea": 1.0, "rome": 1.0, "marked": 9.0}, tmp_path / "plain", dimension=16, seed=0)
    model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    model.prompts = {"query": "rome ", "passage": "marked "}
    model.save(str(tmp_path / "encoder"))
    retriever = DenseRetriever(corpus, encoder=str(tmp_path / "encoder"))
    assert retriever.search(["marked"], 1)[0][0].score > 0.9  # every passage begins with it
    bare = DenseRetriever(corpus, encoder=str(tmp_path / "encoder"), passage_prompt="", query_prompt="")
    assert abs(bare.search(["marked"], 1)[0][0].score) < 0.9
    assert ids_of(retriever.search(["nothing"], 1)) == [["rome"]]  # by the query prompt alone
    assert bare.search(["nothing"], 1)[0][0].score == 0


def test_bad_arguments_and_files(corpus, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="k: expected at least 1 passage per query, found 0"):
        DenseRetriever(corpus).search(["q"], 0)
    with pytest.raises(DataError, match=r"no\.jsonl, found nothing"):
        DenseRetriever(tmp_path / "no.jsonl").prepare()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: expected at least one passage"):
        DenseRetriever(tmp_path / "empty.jsonl").prepare()
    assert names_in(tmp_path / "empty.jsonl.index") == []
    with pytest.raises(ConfigError, match=r"encoder: expected 'static', a sentence-transformers folder or a hub name"):
        DenseRetriever(corpus, encoder="./no/such/folder").prepare()


def test_an_index_of_another_length_is_refused(corpus):
    retriever = DenseRetriever(corpus)
    retriever.prepare()
    np.save(retriever.folder / "offsets.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(
        DataError,
        match=r"expected 3 vectors, one per passage of .*, found 4 in static_Flat.index .encoder .*Delete the folder",
    ):
        retriever.search(["tea"], 1)


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "HNSW8"])
def test_other_kinds_of_index(tmp_path, factory):
    path = tmp_path / "corpus.jsonl"
    words = [f"w{i % 97} u{i}" for i in range(600)]
    path.write_text("".join(json.dumps({"id": str(i), "contents": text}) + "\n" for i, text in enumerate(words)))
    retriever = DenseRetriever(path, factory=factory, nprobe=4)
    assert [hits[0] for hits in ids_of(retriever.search(words[::50], 3))] == [str(i) for i in range(0, 600, 50)]
    assert retriever.index_file.name == f"static_{factory}.index" and retriever.index_file.is_file()
    with pytest.raises(
        ConfigError, match="factory: expected a FAISS factory string that works for 256 dimensions.*found 'Nope'"
    ):
        DenseRetriever(path, factory="Nope").prepare()


def test_a_parquet_corpus(corpus, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    found = DenseRetriever(tmp_path / "corpus.parquet").search(["capital of Italy"], 4)
    assert found == DenseRetriever(corpus).search(["capital of Italy"], 4)


def search_r1_index(corpus, encoder, path):
    """As plain faiss writes it: an inner-product Flat index, row i being line i."""
    import faiss
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder), device="cpu")
    texts = [json.loads(line)["contents"] for line in corpus.read_text().splitlines()]
    vectors = model.encode(["passage: " + text for text in texts], normalize_embeddings=True)
    index = faiss.index_factory(vectors.shape[1], "Flat", faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return model, index


@pytest.fixture
def e5(tmp_path):
    save_static_encoder({w: 1.0 for t in FOUR_TEXTS.values() for w in t.lower().split()}, tmp_path / "e5", 32, seed=0)
    return tmp_path / "e5"


def test_an_index_in_search_r1s_layout(corpus, e5, tmp_path):
    model, index = search_r1_index(corpus, e5, tmp_path / "e5_Flat.index")
    queries = ["capital of Italy", "a play", "tea leaves"]
    scores, rows = index.search(model.encode(["query: " + q for q in queries], normalize_embeddings=True), 3)
    retriever = DenseRetriever(corpus, str(e5), tmp_path / "e5_Flat.index")
    found = retriever.search(queries, 3)
    assert ids_of(found) == [[list(FOUR_TEXTS)[row] for row in hits] for hits in rows]
    np.testing.assert_allclose([[p.score for p in hits] for hits in found], scores, atol=1e-5)
    assert retriever.is_built and (tmp_path / "e5_Flat.index.corpus").is_dir()
    (everything,) = retriever.search(["a play"], 50)
    assert sorted(p.id for p in everything) == sorted(FOUR_TEXTS)


def test_an_index_of_another_corpus_or_encoder_is_told(corpus, e5, tmp_path, caplog):
    path = tmp_path / "e5_Flat.index"
    search_r1_index(corpus, e5, path)
    bare = DenseRetriever(corpus, str(e5), path, passage_prompt="hamlet shakespeare ")
    bare.search(["tea"], 1)
    assert "its vectors are not those that encoder" in caplog.text
    caplog.clear()
    DenseRetriever(corpus, str(e5), path).search(["tea"], 1)
    assert not caplog.records
    save_static_encoder({"tea": 1.0}, tmp_path / "small", dimension=4, seed=0)
    with pytest.raises(DataError, match=r"expected vectors of 4 numbers, as encoder .*small.* makes them, found 32"):
        DenseRetriever(corpus, str(tmp_path / "small"), path).search(["tea"], 1)
    with corpus.open("a") as file:
        file.write('{"id": "new", "contents": "more"}\n')
    with pytest.raises(
        DataError, match=r"expected 5 vectors, one per passage of .*found 4 in e5_Flat.index .encoder .*Name the corpus"
    ):
        DenseRetriever(corpus, str(e5), path).search(["tea"], 1)


def test_ours_is_in_search_r1s_layout(corpus, e5):
    import faiss

    retriever = DenseRetriever(corpus, str(e5))
    found = retriever.search(["capital of Italy"], 4)
    assert retriever.index_file.name == "e5_Flat.index"
    index = faiss.read_index(str(retriever.index_file))
    assert index.ntotal == 4 and index.metric_type == faiss.METRIC_INNER_PRODUCT
    assert DenseRetriever(corpus, str(e5), retriever.index_file).search(["capital of Italy"], 4) == found


def test_a_finished_index_is_opened_by_what_it_tells(corpus, e5, tmp_path):
    DenseRetriever(corpus, str(e5), tmp_path / "index", factory="HNSW8", passage_prompt="p ").prepare()
    retriever = DenseRetriever.from_index(corpus, tmp_path / "index", ef_search=7)
    assert retriever.is_built and (retriever.encoder, retriever.factory) == (str(e5), "HNSW8")
    assert ids_of(retriever.search(["tea leaves"], 1)) == [["tea"]]
    for path in (retriever.folder, retriever.index_file):
        assert DenseRetriever.from_index(corpus, path).folder == retriever.folder
    assert DenseRetriever.from_index(corpus, tmp_path / "index", str(e5)).folder == retriever.folder
    with pytest.raises(ConfigError, match=r"expected one index of .* by encoder 'static' in .*Build it"):
        DenseRetriever.from_index(corpus, tmp_path / "index", "static")
    shutil.copy(retriever.index_file, tmp_path / "foreign.index")
    with pytest.raises(ConfigError, match=r"expected the one that .*foreign\.index was built with, found none given"):
        DenseRetriever.from_index(corpus, tmp_path / "foreign.index")
    assert DenseRetriever.from_index(corpus, tmp_path / "foreign.index", str(e5)).search(["tea leaves"], 1)


def test_a_copy_for_another_process_opens_its_own(corpus):
    retriever = DenseRetriever(corpus)
    found = retriever.search(["tea"], 2)
    assert pickle.loads(pickle.dumps(retriever)).search(["tea"], 2) == found


def test_a_folder_called_static_is_not_the_embedded_encoder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "static").mkdir()
    DenseRetriever(corpus, index_path="index").prepare()
    assert DenseRetriever.from_index(corpus, "index").encoder == "static"


def test_an_index_for_torch_beside_one_for_faiss(corpus, tmp_path):
    retrievers = {
        backend: DenseRetriever(corpus, index_path=tmp_path / "i", backend=backend) for backend in ("faiss", "torch")
    }
    for retriever in retrievers.values():
        retriever.prepare()
    for backend, retriever in retrievers.items():
        found = DenseRetriever.from_index(corpus, tmp_path / "i", backend=backend)
        assert found.folder == retriever.folder and found.is_built
        named = DenseRetriever(corpus, index_path=retriever.folder, backend=backend)
        assert named.folder == retriever.folder
    with pytest.raises(ConfigError, match=r"found 2: (?=.*for faiss)(?=.*for torch).*Name one of their folders"):
        DenseRetriever.from_index(corpus, tmp_path / "i")


@pytest.mark.parametrize("size", [0, -1])
def test_no_batch_is_no_vectors(corpus, size):
    with pytest.raises(ConfigError, match=f"batch_size: expected at least 1 text per forward pass, found {size}"):
        DenseRetriever(corpus, batch_size=size)


def test_half_a_character_in_a_query_is_searched_for_without_it(corpus):
    assert ids_of(DenseRetriever(corpus).search(["tea \ud83d leaves"], 1)) == [["tea"]]
