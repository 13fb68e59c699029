import gzip
import json
import shutil

import numpy as np
import pytest

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import DenseRetriever, check_retriever
from sdsearch_lightning.retrieval.static_encoder import save_static_encoder

TEXTS = {
    "paris": '"Paris"\nthe capital of France on the Seine',
    "rome": '"Rome"\nthe capital of Italy on the Tiber',
    "hamlet": '"Hamlet"\na play by Shakespeare',
    "tea": '"Tea"\na drink of leaves',
}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": key, "contents": text}) + "\n" for key, text in TEXTS.items()))
    return path


def ids(results):
    return [[passage.id for passage in found] for found in results]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_search_finds_the_passage_that_shares_rare_words(corpus, backend):
    retriever = DenseRetriever(corpus, backend=backend)
    found = retriever.search(["capital of Italy", "Shakespeare"], 2)
    assert [hits[0] for hits in ids(found)] == ["rome", "hamlet"] and ids(found)[0][1] == "paris"
    assert found[0][0].contents == TEXTS["rome"] and found[0][0].score > found[0][1].score > 0
    assert retriever.search([], 3) == []
    check_retriever(retriever, 3)
    retriever.close()
    assert ids(retriever.search(["Shakespeare"], 1)) == [["hamlet"]]  # opens again


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_asking_for_more_than_there_is_repeats_nothing(corpus, backend):
    """FAISS pads with row -1, which as a Python index is the last passage."""
    (found,) = ids(DenseRetriever(corpus, backend=backend).search(["leaves"], 9))
    assert found[0] == "tea" and sorted(found) == sorted(TEXTS)


def test_rows_of_minus_one_never_surface(corpus, monkeypatch):
    retriever = DenseRetriever(corpus)
    retriever.search(["tea"], 1)
    padded = np.array([[0.9, -3.4e38]], dtype=np.float32), np.array([[3, -1]])
    monkeypatch.setattr(retriever._opened.vectors, "search", lambda queries, k: padded, raising=True)
    assert ids(retriever.search(["tea"], 2)) == [["tea"]]


def test_backends_agree_with_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 60, 12)) for _ in range(300)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "contents": text}) + "\n" for i, text in enumerate(texts)))
    queries = [" ".join(text.split()[:4]) for text in texts[::10]]
    by_faiss, by_torch = (DenseRetriever(path, backend=backend) for backend in ("faiss", "torch"))
    found = by_faiss.search(queries, 4)
    encoder = by_faiss._opened.encoder
    passages = encoder.encode_document(texts, normalize_embeddings=True, show_progress_bar=False).astype(np.float64)
    asked = encoder.encode_query(queries, normalize_embeddings=True, show_progress_bar=False).astype(np.float64)
    expected = np.argsort(-(asked @ passages.T), axis=1)[:, :4].astype(str).tolist()
    assert ids(found) == ids(by_torch.search(queries, 4)) == expected
    assert ids(by_faiss.search(queries[:3], 4)) == expected[:3] != expected[1:4]


def test_a_finished_index_is_used_again(corpus, monkeypatch):
    DenseRetriever(corpus).prepare()
    monkeypatch.setattr(DenseRetriever, "_build", lambda *_: pytest.fail("built twice"))
    retriever = DenseRetriever(corpus)
    retriever.prepare()
    assert ids(retriever.search(["tea"], 1)) == [["tea"]]
    assert [path.name for path in retriever.index_path.iterdir()] == [retriever.folder.name]
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
    names.append(name(backend="torch"))
    save_static_encoder({"tea": 2.0}, encoder, dimension=4, seed=0)
    names.append(name(encoder=str(encoder)))
    with corpus.open("a") as file:
        file.write('{"id": "new", "contents": "more"}\n')
    names.append(name())
    assert len(set(names)) == len(names)


def test_a_changed_corpus_is_searched_anew(corpus):
    index = corpus.parent / "index"
    assert ids(DenseRetriever(corpus, index_path=index).search(["zebra"], 1)) != [["zebra"]]
    with corpus.open("a") as file:
        file.write('{"id": "zebra", "contents": "zebra"}\n')
    assert ids(DenseRetriever(corpus, index_path=index).search(["zebra"], 1)) == [["zebra"]]


def test_a_failed_build_leaves_nothing_behind(corpus, monkeypatch):
    def torn(folder, chunks, num_vectors):
        (folder / "index.faiss").write_text("half")
        raise OSError("disk full")

    retriever = DenseRetriever(corpus)
    with monkeypatch.context() as patch:
        patch.setattr("sdsearch_lightning.retrieval.flat_index.FaissFlat.write", staticmethod(torn))
        with pytest.raises(OSError, match="disk full"):
            retriever.prepare()
    assert list(retriever.index_path.iterdir()) == []
    assert ids(retriever.search(["tea"], 1)) == [["tea"]]


def test_the_faster_of_two_builders_wins(corpus, monkeypatch):
    """Both build; the second finds the finished folder in its place and keeps it."""
    retriever, build = DenseRetriever(corpus), DenseRetriever._build

    def slowly(self, folder):
        build(self, folder)
        monkeypatch.setattr(DenseRetriever, "_build", build)
        DenseRetriever(corpus).prepare()

    monkeypatch.setattr(DenseRetriever, "_build", slowly)
    retriever.prepare()
    assert [path.name for path in retriever.index_path.iterdir()] == [retriever.folder.name]


def test_a_gzipped_corpus_is_unpacked_beside_its_index(corpus):
    packed = corpus.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    retriever = DenseRetriever(packed)
    assert retriever.search(["capital of Italy"], 1)[0][0].contents == TEXTS["rome"]
    assert (retriever.folder / "corpus.jsonl").read_bytes() == corpus.read_bytes()
    packed.write_bytes(gzip.compress(b'{"id": "1", "contents": "c"}\n{"id": "2"}\n'))
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz line 2: expected the keys"):
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
    assert ids(retriever.search(["nothing"], 1)) == [["rome"]]  # by the query prompt alone
    assert bare.search(["nothing"], 1)[0][0].score == 0


def test_bad_arguments_and_files(corpus, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="k: expected at least 1 passage per query, found 0"):
        DenseRetriever(corpus).search(["q"], 0)
    with pytest.raises(DataError, match=r"no\.jsonl, found nothing"):
        DenseRetriever(tmp_path / "no.jsonl").prepare()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: expected at least one passage"):
        DenseRetriever(tmp_path / "empty.jsonl").prepare()
    assert list((tmp_path / "empty.jsonl.index").iterdir()) == []
    with pytest.raises(ConfigError, match=r"encoder: expected 'static', a sentence-transformers folder or a hub name"):
        DenseRetriever(corpus, encoder="./no/such/folder").prepare()


def test_an_index_of_another_length_is_refused(corpus):
    retriever = DenseRetriever(corpus)
    retriever.prepare()
    np.save(retriever.folder / "offsets.npy", np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match=r"expected 3 vectors, one per passage, found 4\. Delete the folder"):
        retriever.search(["tea"], 1)
