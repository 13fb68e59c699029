import sys

import numpy as np
import pytest

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import flat_index
from sdsearch_lightning.retrieval.flat_index import FaissFlat, TorchFlat, choose_backend, import_faiss


def unit(rng, rows, dimension=16):
    vectors = rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def no_cache():
    import_faiss.cache_clear()
    yield
    import_faiss.cache_clear()


@pytest.mark.parametrize("batch", [1, 19, 64])  # below and above the threshold at which faiss changes its algorithm
def test_faiss_and_torch_equal_brute_force(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(TorchFlat, "chunk_rows", 70)  # the last chunk holds fewer than k rows
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 213), unit(rng, batch)
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    expected = np.argsort(-scores, axis=1)[:, :5]
    for index_class in (FaissFlat, TorchFlat):
        index_class.write(tmp_path, np.array_split(vectors, 4), len(vectors))
        index = index_class(tmp_path, "cpu")
        assert len(index) == 213
        found, rows = index.search(queries, 5)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(found, np.take_along_axis(scores, expected, 1), atol=1e-6)
        _, other = index.search(-queries, 5)
        assert (other != expected).any()


def test_both_are_mapped_not_read(tmp_path):
    """Opening 60 MB of vectors takes next to no private memory."""

    def private_megabytes():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

    vectors, opened = unit(np.random.default_rng(0), 60_000, 256), []
    for index_class in (FaissFlat, TorchFlat):
        index_class.write(tmp_path, [vectors], len(vectors))
        before = private_megabytes()
        opened.append(index_class(tmp_path, "cpu"))
        _, rows = opened[-1].search(vectors[:1], 1)
        assert rows[0, 0] == 0 and private_megabytes() - before < 20
    with open("/proc/self/maps") as maps:
        assert {"index.faiss", "vectors.npy"} <= {line.rstrip().rpartition("/")[2] for line in maps}


def test_backend_names():
    assert choose_backend("torch") is TorchFlat
    assert choose_backend("faiss") is choose_backend("auto") is FaissFlat
    with pytest.raises(ConfigError, match="expected 'auto', 'faiss' or 'torch', found 'annoy'"):
        choose_backend("annoy")


def test_torch_stands_in_where_faiss_is_not_installed(monkeypatch, no_cache):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(flat_index, "_installed_wheels", list)
    assert choose_backend("auto") is TorchFlat
    with pytest.raises(ConfigError, match=r"pip install faiss-cpu \(or faiss-gpu, never both\)"):
        choose_backend("faiss")


def test_two_wheels_are_told_how_to_repair(monkeypatch, no_cache):
    repair = r"pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu"
    monkeypatch.setitem(sys.modules, "faiss", type(sys)("faiss"))  # the husk that an uninstall leaves
    monkeypatch.setattr(flat_index, "version", lambda wheel: "1.15.1")
    with pytest.raises(ConfigError, match=repair):
        choose_backend("faiss")
    with pytest.warns(UserWarning, match=repair):
        assert choose_backend("auto") is TorchFlat


def test_a_gpu_wheel_without_cuda_libraries_is_caught(monkeypatch, no_cache, tmp_path):
    (tmp_path / "faiss.py").write_text("raise RuntimeError('faiss-gpu installed but nvidia-cuda-runtime is missing')")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flat_index, "_installed_wheels", lambda: ["faiss-gpu"])
    with pytest.raises(ConfigError, match="nvidia-cuda-runtime is missing"):
        choose_backend("faiss")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
