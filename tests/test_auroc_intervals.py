"""Intervals of an AUROC from counts: the same as those of the general bootstrap, on awkward scores too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.metrics import auroc_intervals
from defectbook.metrics.auroc_intervals import auroc_interval
from defectbook.metrics.pixel import auroc
from defectbook.metrics.statistics import bootstrap_interval


def same(scores, labels, **options) -> None:
    quick = auroc_interval(scores, labels, 100, **options)
    slow = bootstrap_interval(auroc, scores, labels, strata=labels, resamples=100, **options)
    assert np.allclose([quick.estimate, quick.low, quick.high], [slow.estimate, slow.low, slow.high], rtol=0, atol=1e-12)
    assert quick.confidence == slow.confidence


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40), st.integers(0, 5), st.sampled_from([0.5, 0.95]))
def test_it_is_the_general_bootstrap(images, seed, confidence) -> None:
    scores, labels = np.array([score for score, _ in images], float), np.array([label for _, label in images])
    if labels.all() or not labels.any():
        with pytest.raises(DataError, match="one kind"):
            auroc_interval(scores, labels)
        return
    same(scores, labels, rng=seed, confidence=confidence)


def test_huge_tiny_and_unsigned_values() -> None:
    labels = np.arange(12) % 2
    for scores in (np.arange(12) * 1e300, np.arange(12) * 1e-300, np.arange(12, dtype=np.uint8), np.repeat([0.0, 1.0], 6)):
        same(np.asarray(scores, float), labels)


def test_chunks_do_not_matter(monkeypatch) -> None:
    scores, labels = np.random.default_rng(0).normal(size=50), np.arange(50) % 2
    whole = auroc_interval(scores, labels, 250)
    monkeypatch.setattr(auroc_intervals, "CHUNK", 170)
    assert auroc_interval(scores, labels, 250) == whole


@pytest.mark.parametrize("scores, labels, options, error, words", [
    ([1, np.inf], [0, 1], {}, DataError, "finite"), ([1, 2], [0, 1, 1], {}, DataError, "shape"), ([[1, 2]], [[0, 1]], {}, DataError, "shape"),
    ([1, 2], [1, 1], {}, DataError, "one kind"), ([1, 2], [0, 1], {"resamples": 99}, ParameterError, "100"),
    ([1, 2], [0, 1], {"confidence": 1}, ParameterError, "between 0 and 1")])
def test_bad_input_is_named(scores, labels, options, error, words) -> None:
    with pytest.raises(error, match=words):
        auroc_interval(scores, labels, **options)
