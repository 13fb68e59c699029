import numpy as np
import pytest
import torch

from sdsearch_lightning.retrieval import scan
from sdsearch_lightning.retrieval.scan import Rounded, best_rows, queries_at_once
from sdsearch_lightning.retrieval.torch_index import TorchIndex


def unit(rng, rows, dimension=32):
    vectors = rng.standard_normal((rows, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rounded(vectors):
    return Rounded.of(torch.from_numpy(vectors).split(999), *vectors.shape, torch.device("cpu"))


def clustered(seed, spread, rows=4000, dimension=48):
    """Unit vectors in clusters as narrow as `spread`, and queries near them."""
    rng = np.random.default_rng(seed)
    centres = unit(rng, 8, dimension)
    vectors = centres[rng.integers(0, 8, rows)] + spread * unit(rng, rows, dimension)
    queries = centres[rng.integers(0, 8, 20)] + 0.3 * unit(rng, 20, dimension)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), queries.astype(np.float32)


@pytest.fixture
def small_products(monkeypatch):
    """Several products to a scan, the last one shorter."""
    monkeypatch.setattr(scan, "_MOST_ROWS", 700)


@pytest.fixture
def open_index(tmp_path):
    def open_index(vectors, precision="bfloat16"):
        np.save(tmp_path / "vectors.npy", vectors)
        return TorchIndex(tmp_path / "vectors.npy", "cpu", precision)

    return open_index


def check_exact(vectors, queries, k, scores, rows):
    """Whatever is in float64 among the k best, within what float32 can tell apart."""
    truth = queries.astype(np.float64) @ vectors.astype(np.float64).T
    best = -np.sort(-truth, axis=1)[:, :k]
    assert all(len(set(found)) == k for found in rows.tolist())
    np.testing.assert_allclose(np.take_along_axis(truth, rows, 1), best, atol=5e-7, rtol=0)
    np.testing.assert_allclose(scores, best, atol=1e-6, rtol=0)


SPREADS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_scores_that_are_close_are_told_apart(small_products, open_index, k):
    shares = []
    for seed, spread in enumerate(SPREADS):
        vectors, queries = clustered(seed, spread)
        index = open_index(vectors)
        scores, rows = index.search(queries, k)
        check_exact(vectors, queries, k, scores, rows)
        shares.append(float(index._rounded.candidates(torch.from_numpy(queries), k).is_doubtful.float().mean()))
    assert shares[0] == 1 and shares[-1] == 0  # both ways were gone
    with pytest.raises(AssertionError):
        check_exact(vectors, queries, k, scores, np.roll(rows, 1, 0))


def understate(monkeypatch, name):
    bounds, half_step = Rounded.bounds, scan.half_step

    def fewer(self, asked):
        rough, close = bounds(self, asked)
        return rough * (name != "rough"), close * (name != "close")

    monkeypatch.setattr(Rounded, "bounds", fewer)
    monkeypatch.setattr(scan, "half_step", lambda rough: half_step(rough) * (name != "half step"))


@pytest.mark.parametrize("name", ["rough", "half step"])
def test_an_understated_bound_on_the_products_is_caught_by_the_scan(small_products, open_index, monkeypatch, name):
    vectors, queries = clustered(0, 1.0)
    index = open_index(vectors)
    assert not index._rounded.candidates(torch.from_numpy(queries), 5).is_doubtful.any()
    understate(monkeypatch, name)
    assert index._rounded.candidates(torch.from_numpy(queries), 5).is_doubtful.float().mean() > 0.3
    check_exact(vectors, queries, 5, *index.search(queries, 5))


def test_an_understated_bound_on_the_vectors_is_caught_by_the_test(small_products, open_index, monkeypatch):
    for is_understated in (False, True):
        if is_understated:
            understate(monkeypatch, "close")
        wrong = 0
        for seed in range(3):
            vectors, queries = clustered(seed, 0.3)
            try:
                check_exact(vectors, queries, 5, *open_index(vectors).search(queries, 5))
            except AssertionError:
                wrong += 1
        assert wrong == 3 * is_understated


def test_the_bounds_hold_and_are_not_far_off():
    rng = np.random.default_rng(1)
    vectors, queries = unit(rng, 5000), np.concatenate([unit(rng, 50), 3 * unit(rng, 5)])
    index, asked = rounded(vectors), torch.from_numpy(queries)
    rough, close = index.bounds(asked)
    of_rounded = asked.double() @ index.vectors.double().T
    one = (asked.bfloat16().double() @ index.vectors.double().T - of_rounded).abs().amax(1, keepdim=True)
    other = (of_rounded - asked.double() @ torch.from_numpy(vectors).double().T).abs().amax(1, keepdim=True)
    for error, bound in ((one, rough), (other, close)):
        assert (error <= bound).all() and (error > bound / 8).all()


def test_half_a_step_is_what_rounding_may_change():
    numbers = torch.randn(100_000) * 2.0 ** torch.randint(-20, 3, (100_000,))
    off = (numbers.bfloat16().float() - numbers).abs() / scan.half_step(numbers.bfloat16().float())
    assert off.max() <= 1 and off.max() > 0.999


@pytest.mark.parametrize("num_queries", [1, 64])
def test_products_of_this_processor_are_summed_in_float32(num_queries):
    rng = np.random.default_rng(0)
    vectors, asked = (torch.from_numpy(unit(rng, rows, 700)).bfloat16() for rows in (900, num_queries))
    exact, rough = asked.double() @ vectors.double().T, (asked @ vectors.T).float()
    assert ((rough - exact).abs() <= scan.half_step(rough) + 700 * 2.0**-22).all()
    parts = sum((asked[:, i : i + 50] @ vectors[:, i : i + 50].T for i in range(0, 700, 50)), torch.zeros(()))
    assert not ((parts.float() - exact).abs() <= scan.half_step(parts.float()) + 700 * 2.0**-22).all()


@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 71, 672, 673, 1344, 3003])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_number_of_rows(small_products, open_index, num_rows, precision):
    rng = np.random.default_rng(num_rows)
    vectors, queries = unit(rng, num_rows), unit(rng, 4)
    index = open_index(vectors, precision)
    for k in (1, 7, 99):
        scores, rows = index.search(queries, k)
        assert rows.shape == scores.shape == (4, min(k, num_rows))
        np.testing.assert_array_equal(rows, np.argsort(-(queries @ vectors.T), axis=1)[:, :k])


def test_many_queries_are_searched_in_parts(small_products, open_index, monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3003), unit(rng, 17)
    index = open_index(vectors)
    scores, rows = index.search(queries, 5)
    assert queries_at_once(3003, 5) > 17
    monkeypatch.setattr(scan, "_NUMBERS", 110_000)
    assert queries_at_once(3003, 5) == 4
    for one, other in zip(index.search(queries, 5), (scores, rows), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_query_of_any_length_finds_the_same(open_index, precision):
    """Bounds are made of squares, which vanish or overflow in float32 long before a query does."""
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3003), unit(rng, 4)
    index = open_index(vectors, precision)
    scores, rows = index.search(queries, 5)
    for power in (-95, -70, 66, 127):
        stretched = np.ldexp(queries, power)
        found_scores, found_rows = index.search(stretched, 5)
        np.testing.assert_array_equal(found_rows, rows)
        np.testing.assert_array_equal(found_scores, np.ldexp(scores, power))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_query_that_is_not_finite_finds_nothing_and_disturbs_no_other(open_index, precision):
    rng = np.random.default_rng(0)
    vectors, queries = np.abs(unit(rng, 71)), unit(rng, 5)
    index = open_index(vectors, precision)
    scores, rows = index.search(queries, 71)
    for position, value in enumerate((-np.inf, np.inf, np.nan)):
        queries[position, position:] = value
    found_scores, found_rows = index.search(queries, 71)
    assert (found_rows[:3] == -1).all()
    np.testing.assert_array_equal(found_rows[3:], rows[3:])
    np.testing.assert_array_equal(found_scores[3:], scores[3:])


def test_a_bound_that_is_not_a_number_is_a_doubt(open_index):
    vectors, queries = clustered(0, 1.0)
    vectors[7] = np.nan
    index = open_index(vectors)
    assert index._rounded.candidates(torch.from_numpy(queries), 5).is_doubtful.all()
    rows = index.search(queries, 5)[1]
    vectors[7] = 0
    np.testing.assert_array_equal(rows[:, 1:], open_index(vectors).search(queries, 4)[1])  # what is not one comes first


def test_a_score_does_not_depend_on_who_is_asked_for_beside_it(open_index):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3003, 100), unit(rng, 17, 100)
    for precision in ("float32", "bfloat16"):
        index = open_index(vectors, precision)
        for alone, among in zip(index.search(queries[3:4], 5), index.search(queries, 5), strict=True):
            np.testing.assert_array_equal(alone[0], among[3])


def test_ties_are_no_doubt():
    """A query of zeros (a text of unknown words has such a vector) would have all rows looked at."""
    vectors = unit(np.random.default_rng(0), 3003)
    found = rounded(vectors).candidates(torch.zeros(2, 32), 5)
    assert not found.is_doubtful.any() and (found.near_mask.sum(1) == 5).all()


def test_more_equal_vectors_than_are_looked_at_are_a_doubt(open_index):
    vectors, queries = clustered(0, 0.3)
    vectors[::2] = vectors[0]
    index = open_index(vectors)
    found = index._rounded.candidates(torch.from_numpy(vectors[:1]), 5)
    assert found.is_doubtful.all()
    check_exact(vectors, queries, 5, *index.search(queries, 5))
    check_exact(vectors, vectors[:1], 5, *index.search(vectors[:1], 5))


def test_arithmetic_that_is_worse_than_its_bound_is_noticed(small_products, open_index, monkeypatch):
    vectors, queries = clustered(0, 1.0)
    index, best_blocks = open_index(vectors), scan._best_blocks

    def forgetful(asked, vectors, num_blocks):
        kept = torch.arange(asked.shape[1]) < 30
        return best_blocks(asked * kept if asked.dtype == torch.bfloat16 else asked, vectors, num_blocks)

    assert not index._rounded.candidates(torch.from_numpy(queries), 5).is_doubtful.any()
    monkeypatch.setattr(scan, "_best_blocks", forgetful)
    assert index._rounded.candidates(torch.from_numpy(queries), 5).is_doubtful.all()
    check_exact(vectors, queries, 5, *index.search(queries, 5))


def test_best_rows_of_vectors_in_memory():
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 3003), unit(rng, 4)
    scores, rows = best_rows(torch.from_numpy(queries), torch.from_numpy(vectors), 5)
    check_exact(vectors, queries, 5, scores.numpy(), rows.numpy())
