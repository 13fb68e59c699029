from dataclasses import replace

import numpy as np
import pytest
import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import scan
from sdsearch_lightning.retrieval.scan import Rounded
from sdsearch_lightning.retrieval.torch_index import TorchIndex, write_vectors


def unit(rng, rows, dimension=32):
    vectors = rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def opened(folder, vectors, precision, monkeypatch, most_rows=700):
    monkeypatch.setattr(scan, "_MOST_ROWS", most_rows)
    file = write_vectors(folder / "vectors.npy", *vectors.shape)
    file[:] = vectors
    file.flush()
    return TorchIndex(folder / "vectors.npy", "cpu", precision)


def exact(queries, vectors, k):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_equals_brute_force(tmp_path, monkeypatch, precision, k):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3003), unit(rng, 17)
    index = opened(tmp_path, vectors, precision, monkeypatch)
    assert len(index) == 3003 and index.dimension == 32
    scores, rows = index.search(queries, k)
    expected_scores, expected_rows = exact(queries, vectors, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    assert (index.search(-queries, k)[1] != expected_rows).any()


def test_bfloat16_alone_would_not_do(tmp_path, monkeypatch):
    """Thousands of vectors within bfloat16's error of each other: candidates miss some, and the bound notices."""
    rng = np.random.default_rng(0)
    vectors = unit(rng, 1)[0] + 1e-3 * unit(rng, 4000)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = unit(rng, 1).repeat(3, 0) + 0.01 * unit(rng, 3)
    index = opened(tmp_path, vectors, "bfloat16", monkeypatch)
    expected_scores, expected_rows = exact(queries, vectors, 5)
    rough = torch.from_numpy(queries).bfloat16() @ torch.from_numpy(vectors).bfloat16().T
    found = rough.topk(26).indices.numpy()
    missed = [set(want) - set(got) for want, got in zip(expected_rows.tolist(), found.tolist(), strict=True)]
    assert any(missed)
    scores, rows = index.search(queries, 5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    agree = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(rows.tolist(), expected_rows.tolist(), strict=True)])
    assert agree > 0.9  # all but ties in float32
    candidates, never = Rounded.candidates, torch.zeros(3, dtype=torch.bool)
    monkeypatch.setattr(Rounded, "candidates", lambda *asked: replace(candidates(*asked), is_doubtful=never))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(index.search(queries, 5)[0], expected_scores, atol=1e-6)


def test_the_last_chunk_may_be_shorter_than_k(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 71), unit(rng, 4)
    for precision in ("float32", "bfloat16"):
        index = opened(tmp_path, vectors, precision, monkeypatch, most_rows=64)
        np.testing.assert_array_equal(index.search(queries, 99)[1], exact(queries, vectors, 71)[1])


def test_float32_is_mapped_not_read(tmp_path, monkeypatch):
    def private_megabytes():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

    vectors = unit(np.random.default_rng(0), 60_000, 256)
    opened(tmp_path, vectors, "float32", monkeypatch, 1 << 16).search(vectors[:1], 1)  # the first product takes buffers
    before = private_megabytes()
    index = TorchIndex(tmp_path / "vectors.npy", "cpu")
    assert index.search(vectors[:1], 1)[1][0, 0] == 0 and private_megabytes() - before < 20


def test_an_unknown_scan_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="scan: expected one of auto, float32, bfloat16, found 'int8'"):
        opened(tmp_path, unit(np.random.default_rng(0), 3), "int8", monkeypatch)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_query_that_is_no_number_finds_nothing_whoever_stands_beside_it(tmp_path, monkeypatch, precision):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3000), unit(rng, 3)
    index = opened(tmp_path, vectors, precision, monkeypatch)
    expected = index.search(queries, 4)[1]
    for no_number in (np.nan, np.inf):
        queries[1, 5] = no_number
        _, rows = index.search(queries, 4)
        assert (rows[1] == -1).all() and (rows[[0, 2]] == expected[[0, 2]]).all()
