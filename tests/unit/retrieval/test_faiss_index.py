import sys

import numpy as np
import pytest

from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import backends, faiss_library
from sdsearch_lightning.retrieval.backends import choose_backend
from sdsearch_lightning.retrieval.faiss_index import FaissIndex, bytes_per_vector, write_faiss_index
from sdsearch_lightning.retrieval.faiss_library import import_faiss


def unit(rng, rows, dimension=16):
    vectors = rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def no_cache():
    import_faiss.cache_clear()
    backends._warn_once.cache_clear()
    yield
    import_faiss.cache_clear()


@pytest.mark.parametrize("batch", [1, 19, 64])  # below and above the threshold at which faiss changes its algorithm
def test_flat_equals_brute_force(tmp_path, batch):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 213), unit(rng, batch)
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    expected = np.argsort(-scores, axis=1)[:, :5]
    write_faiss_index(tmp_path / "i", vectors, "Flat")
    index = FaissIndex(tmp_path / "i")
    assert len(index) == 213 and index.dimension == 16
    found, rows = index.search(queries, 5)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(found, np.take_along_axis(scores, expected, 1), atol=1e-6)
    _, other = index.search(-queries, 5)
    assert (other != expected).any()
    assert index.search(queries, 1000)[1].shape == (batch, 213)  # no more columns than rows


@pytest.mark.parametrize(
    ("factory", "options", "bytes_each"),
    [("IVF16,SQ8", {"nprobe": 16}, 24), ("IVF8,PQ16x4", {"nprobe": 8}, 16), ("HNSW16", {"ef_search": 200}, 204)],
)
def test_approximate_kinds_find_what_flat_finds(tmp_path, factory, options, bytes_each):
    rng = np.random.default_rng(0)
    centres = unit(rng, 40)
    vectors = centres.repeat(50, 0) + 0.03 * unit(rng, 2000)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    write_faiss_index(tmp_path / "i", vectors, factory)
    index = FaissIndex(tmp_path / "i", **options)
    _, rows = index.search(centres, 10)
    assert (rows // 50 == np.arange(40)[:, None]).mean() > 0.99  # each centre finds its own cluster
    assert bytes_per_vector(16, factory) == bytes_each
    file_bytes = (tmp_path / "i").stat().st_size / 2000
    assert 0.8 * bytes_each < file_bytes < 1.3 * bytes_each + 10
    if "nprobe" in options:  # the option arrives: one list of many is not enough for a query between clusters
        few = FaissIndex(tmp_path / "i", nprobe=1)
        assert (few.search(unit(rng, 64), 1500)[1] == -1).any()


def test_an_index_smaller_than_the_table_faiss_would_add_to_it_opens(tmp_path):
    vectors = unit(np.random.default_rng(0), 1000, 64)
    write_faiss_index(tmp_path / "i", vectors, "IVF100,PQ16np")
    assert 100 * 16 * 256 * 4 > (tmp_path / "i").stat().st_size + (1 << 20)
    assert (FaissIndex(tmp_path / "i", nprobe=100).search(vectors[:50], 1)[1][:, 0] == np.arange(50)).all()


def test_options_reach_an_index_behind_a_transform(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 4000), unit(rng, 50)
    write_faiss_index(tmp_path / "i", vectors, "PCA16,HNSW4")
    truth = (queries @ vectors.T).argmax(1)
    few, many = (FaissIndex(tmp_path / "i", ef_search=ef).search(queries, 1)[1][:, 0] for ef in (1, 400))
    assert (many == truth).mean() > (few == truth).mean() + 0.2


def test_flat_is_mapped_not_read(tmp_path):
    """Opening 60 MB of vectors takes next to no private memory."""

    def private_megabytes():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

    vectors = unit(np.random.default_rng(0), 60_000, 256)
    write_faiss_index(tmp_path / "mapped.index", vectors, "Flat")
    before = private_megabytes()
    index = FaissIndex(tmp_path / "mapped.index")
    _, rows = index.search(vectors[:1], 1)
    assert rows[0, 0] == 0 and private_megabytes() - before < 20
    with open("/proc/self/maps") as maps:
        assert "mapped.index" in {line.rstrip().rpartition("/")[2] for line in maps}


def test_what_cannot_be_an_index_is_refused(tmp_path):
    faiss = import_faiss()
    vectors = unit(np.random.default_rng(0), 100)
    with pytest.raises(
        ConfigError, match=r"factory string that works for 16 dimensions, such as Flat, .*, found 'Flatt'"
    ):
        write_faiss_index(tmp_path / "i", vectors, "Flatt")
    with pytest.raises(ConfigError, match="'IVF500,SQ8' expects at least 500 passages to train on, found 100"):
        write_faiss_index(tmp_path / "i", vectors, "IVF500,SQ8")
    for factory in ("IDMap,Flat", "PQ32x10", "IVF4,PQ3"):  # added by number; bits beyond the vectors; 16 / 3
        with pytest.raises(ConfigError, match=rf"found '{factory}' \("):
            write_faiss_index(tmp_path / "i", vectors, factory)
    with pytest.raises(ConfigError, match="found 'NSG32'"):
        bytes_per_vector(16, "NSG32")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text").write_text("no index at all")
    with pytest.raises(DataError, match=r"text: expected a FAISS index, found a file that it cannot read"):
        FaissIndex(tmp_path / "text")
    euclidean = faiss.IndexFlatL2(16)
    euclidean.add(vectors)
    faiss.write_index(euclidean, str(tmp_path / "l2"))
    with pytest.raises(DataError, match=r"l2: expected an index of inner products"):
        FaissIndex(tmp_path / "l2")


def test_a_gpu_is_asked_for_where_there_is_none(tmp_path):
    write_faiss_index(tmp_path / "i", unit(np.random.default_rng(0), 10), "Flat")
    with pytest.raises(ConfigError, match="expected a GPU for 'faiss-gpu', found none that FAISS sees"):
        FaissIndex(tmp_path / "i", gpus=True)


def test_gpus_are_used_sharded_in_half_precision(tmp_path, monkeypatch):
    """With a stand-in for the GPU wheel: what is asked of it."""
    faiss, asked = import_faiss(), {}

    class Options:
        pass

    def clone(index, co):
        asked.update(vars(co))
        return index

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "GpuMultipleClonerOptions", Options, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", clone, raising=False)
    vectors = unit(np.random.default_rng(0), 10)
    write_faiss_index(tmp_path / "i", vectors, "Flat")
    index = FaissIndex(tmp_path / "i", gpus=True)
    assert asked == {"shard": True, "useFloat16": True} and index.search(vectors[:1], 1)[1][0, 0] == 0


def test_backend_names():
    assert choose_backend("torch") == "torch"
    assert choose_backend("faiss") == choose_backend("auto") == choose_backend("faiss-gpu", "HNSW32") == "faiss"
    with pytest.raises(ConfigError, match="expected one of 'auto', 'faiss', 'faiss-gpu', 'torch', found 'annoy'"):
        choose_backend("annoy")
    with pytest.raises(ConfigError, match="expected Flat with backend 'torch', which is exact, found 'HNSW32'"):
        choose_backend("torch", "HNSW32")


def test_torch_stands_in_where_faiss_is_not_installed(monkeypatch, no_cache):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for module in (backends, faiss_library):
        monkeypatch.setattr(module, "installed_wheels", list)
    assert choose_backend("auto") == "torch"
    for backend, factory in (("faiss", "Flat"), ("auto", "HNSW32")):
        with pytest.raises(ConfigError, match=r"pip install faiss-cpu \(or faiss-gpu, never both\)"):
            choose_backend(backend, factory)


def test_two_wheels_are_told_how_to_repair(monkeypatch, no_cache):
    repair = r"pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu"
    monkeypatch.setitem(sys.modules, "faiss", type(sys)("faiss"))  # the husk that an uninstall leaves
    monkeypatch.setattr(faiss_library, "version", lambda wheel: "1.15.1")
    with pytest.raises(ConfigError, match=repair):
        choose_backend("faiss")
    with pytest.warns(UserWarning, match=repair):
        assert choose_backend("auto") == "torch"
    assert choose_backend("auto") == "torch"  # told once: a second warning would be an error here


def test_a_gpu_wheel_without_cuda_libraries_is_caught(monkeypatch, no_cache, tmp_path):
    (tmp_path / "faiss.py").write_text("raise RuntimeError('faiss-gpu installed but nvidia-cuda-runtime is missing')")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(faiss_library, "installed_wheels", lambda: ["faiss-gpu"])
    with pytest.raises(ConfigError, match=r"nvidia-cuda-runtime is missing.*pip uninstall -y faiss-gpu && pip install"):
        choose_backend("faiss")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
