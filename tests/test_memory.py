"""The memory bank against all distances in float64: indices with ties, distances, both routes, copies."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coreset import KINDS, make_features

from defectbook.core import DataError, ParameterError
from defectbook.models import memory
from defectbook.models.coreset import square_distances
from defectbook.models.memory import MemoryBank, QuickSearch, estimate_memory, find_copies, smallest


def obvious(stored: np.ndarray, queries: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """All distances by the yardstick, sorted; a stable sort gives ties to the smallest index."""
    squares = np.array([square_distances(stored, query) for query in queries])
    order = np.argsort(squares, axis=1, kind="stable")[:, :keep]
    return np.sqrt(np.take_along_axis(squares, order, axis=1)).astype(np.float32), order


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 9), st.data())
def test_search_is_the_obvious_one_to_the_bit(kind: str, seed: int, count: int, dimensions: int, data) -> None:
    features = make_features(kind, seed, count + 10, dimensions)
    stored, queries = features[:count], np.concatenate([features[count:], features[:3]])
    keep, route = data.draw(st.integers(1, min(count, 12))), data.draw(st.sampled_from(["faiss", "products"]))
    distances, indices = MemoryBank(stored).search(queries, keep, route)
    expected, order = obvious(stored, queries, keep)
    assert distances.dtype == np.float32 and indices.dtype == np.int64
    assert indices.tolist() == order.tolist() and distances.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [5, 200, 900])  # faiss pair by pair, products, faiss by products
def test_large_banks_and_every_route(kind: str, queries: int) -> None:
    features = make_features(kind, 2, 1000 + queries, 160)
    stored, asked = features[:1000], features[1000:]
    expected, order = obvious(stored, asked[:40], 3)
    for route in ("auto", "faiss", "products"):
        distances, indices = MemoryBank(stored).search(asked, 3, route)
        assert (indices[:40] == order).all() and (distances[:40] == expected).all(), route


def test_answers_do_not_depend_on_company() -> None:
    """One query alone, or among a thousand that take another route: the same bytes."""
    bank, queries = MemoryBank(make_features("normal", 1, 2000, 160)), make_features("normal", 2, 1000, 160)
    together = bank.search(queries, 4)
    apart = [bank.search(queries[i:i + size], 4) for i, size in ((0, 1), (1, 99), (100, 900))]
    for part in (0, 1):
        assert np.concatenate([answer[part] for answer in apart]).tobytes() == together[part].tobytes()


def test_route_is_a_rule_of_sizes() -> None:
    search = QuickSearch(make_features("normal", 0, 50, 100))
    assert [search.route(count) for count in (1, 31, 32, 1279, 1280, 10**6)] == ["faiss", "faiss", "products", "products", "faiss", "faiss"]


def test_near_ties_are_decided_exactly() -> None:
    """Hundreds of features at distances that the quick search cannot tell apart: the doubtful path, by both routes."""
    rng = np.random.default_rng(0)
    stored = (100 + 1e-4 * rng.normal(size=(700, 30))).astype(np.float32)
    stored[0] = -100  # keeps the mean, and so the norms and the error, large
    queries = (100 + 1e-4 * rng.normal(size=(40, 30))).astype(np.float32)
    expected, order = obvious(stored, queries, 5)
    bank = MemoryBank(stored)
    assert bank._quick.error(queries - bank._quick.mean).min() > expected.max() ** 2
    for route in ("faiss", "products"):
        distances, indices = bank.search(queries, 5, route)
        assert (indices == order).all() and (distances == expected).all()


def test_quick_distances_stay_within_their_bound() -> None:
    for kind in KINDS:
        features = make_features(kind, 3, 340, 50)
        search = QuickSearch(features[:300])
        queries = features[300:] - search.mean
        exact = np.array([square_distances(features[:300], query) for query in features[300:]])
        error = search.error(queries)
        for rows, quick in search.products(queries, np.arange(40)):
            assert (np.abs(quick - exact[rows]) <= error[rows, None]).all(), kind
        squares, index = search.index.search(queries, 7)
        assert (np.abs(squares - np.take_along_axis(exact, index, axis=1)) <= error[:, None]).all(), kind


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 8), st.booleans())
def test_smallest_entries(seed: int, columns: int, keep: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    table = (rng.integers(0, 5, (6, columns)) if ties else rng.normal(size=(6, columns))).astype(np.float32)
    keep = min(keep, columns)
    found = smallest(table, keep)
    assert all(len(set(row)) == keep for row in found.tolist())
    assert (np.sort(np.take_along_axis(table, found, axis=1)) == np.sort(table, axis=1)[:, :keep]).all()


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3))
def test_copies_are_found(seed: int, count: int, dimensions: int) -> None:
    features = np.random.default_rng(seed).integers(0, 3, (count, dimensions)).astype(np.float32)
    seen: dict[bytes, int] = {}
    assert find_copies(features).tolist() == [seen.setdefault(row.tobytes(), i) for i, row in enumerate(features)]


def test_rows_of_one_hash_are_told_apart(monkeypatch) -> None:
    class Constant:
        def integers(self, *_):
            return np.zeros(2, np.uint64) + np.uint64(2**63)  # weights of 1: (a, b) and (b, a) collide

    monkeypatch.setattr(memory, "generator", lambda *_: Constant())
    features = np.array([[1, 2], [2, 1], [1, 2], [2, 1], [3, 3]], np.float32)
    assert find_copies(features).tolist() == [0, 1, 0, 3, 4]
    distances, indices = MemoryBank(features).search(np.array([[2.0, 1.0]]), 4)
    assert indices.tolist() == [[1, 3, 0, 2]]


def test_copies_are_searched_once_and_counted_each() -> None:
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(50, 6)).astype(np.float32)
    stored = distinct[rng.integers(0, 50, 5000)]
    bank = MemoryBank(stored)
    assert bank._quick.index.ntotal == 50 and len(bank) == 5000 and bank.features.tobytes() == stored.tobytes()
    expected, order = obvious(stored, distinct[:20] + 0.1, 150)
    distances, indices = bank.search(distinct[:20] + 0.1, 150)
    assert (indices == order).all() and (distances == expected).all()


@pytest.mark.parametrize("count, dimensions", [(20_000, 50), (300, 900)])
def test_estimate_holds_and_is_not_far_off(count: int, dimensions: int) -> None:
    """NumPy's allocations; faiss' own copy, which tracemalloc does not see, comes when most of them have gone."""
    features = make_features("normal", 0, count, dimensions)
    tracemalloc.start()
    MemoryBank(features)
    peak = tracemalloc.get_traced_memory()[1] + features.nbytes
    tracemalloc.stop()
    assert 0.5 * estimate_memory(count, dimensions) < peak < estimate_memory(count, dimensions)


def test_nonsense_is_refused() -> None:
    bank = MemoryBank(np.eye(3))
    with pytest.raises(ParameterError, match="4 neighbours of a bank of 3; give more normal images or ask for fewer"):
        bank.search(np.eye(3), 4)
    with pytest.raises(ParameterError, match="0 neighbours"):
        bank.search(np.eye(3), 0)
    with pytest.raises(ParameterError, match="same backbone"):
        bank.search(np.eye(2))
    with pytest.raises(ParameterError, match="'hnsw': valid names are auto, faiss, products"):
        bank.search(np.eye(3), route="hnsw")
    with pytest.raises(DataError, match="queries are not finite"):
        bank.search(np.full((1, 3), np.nan))
    for features, message in ((np.zeros((0, 3)), "at least one feature"), (np.full((2, 3), np.inf), "not finite"),
                              (np.full((2, 3), [[0], [1e30]]), "scale them")):
        with pytest.raises(DataError, match=message):
            MemoryBank(features)


def test_no_queries_give_no_answers() -> None:
    distances, indices = MemoryBank(np.eye(3)).search(np.zeros((0, 3)), 2)
    assert distances.shape == indices.shape == (0, 2)
