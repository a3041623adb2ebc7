"""Thinned curves, errors at thresholds and histograms against slow, obvious references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve

from defectbook.core import DataError, ParameterError
from defectbook.metrics.curves import errors_at, errors_f1_oracle, score_histograms, step_area, thin_curve
from defectbook.metrics.pixel import pr_curve, rank_pixels


def case(seed: int, count: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties (`levels` distinct values) and labels of both kinds."""
    rng = np.random.default_rng(seed)
    labels = np.r_[True, False, rng.random(count) < 0.2]
    return np.round((rng.random(labels.size) + 0.3 * labels) * levels).astype(np.float32), labels


CASES = st.tuples(st.integers(0, 10_000), st.integers(0, 400), st.sampled_from([2, 7, 50, 10**6]))


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(1, 250))
def test_thinning_keeps_the_area(drawn, points):
    scores, labels = case(*drawn)
    thin = thin_curve(pr_curve(rank_pixels(scores, labels)), points)
    assert len(thin.x) <= points or len(thin.x) == len(np.unique(scores[labels])) <= points
    assert step_area(thin) == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert (np.diff(thin.x) > 0).all() and thin.x[-1] == 1 and (thin.y > 0).all() and (thin.y <= 1 + 1e-12).all()


def test_thinned_steps_follow_a_long_curve():
    scores, labels = case(0, 200_000, 10**6)
    full, thin = pr_curve(rank_pixels(scores, labels)), thin_curve(pr_curve(rank_pixels(scores, labels)))
    assert len(full.x) > 10_000 and 190 <= len(thin.x) <= 200
    precision, recall, _ = precision_recall_curve(labels, scores)
    for low, high, mean in zip(np.r_[0, thin.x[:-1]], thin.x, thin.y, strict=True):
        inside = precision[:-1][(recall[:-1] > low + 1e-12) & (recall[:-1] <= high + 1e-12)]
        assert inside.min() - 1e-12 <= mean <= inside.max() + 1e-12


@settings(max_examples=60, deadline=None)
@given(CASES, st.floats(-0.5, 2))
def test_errors_against_a_confusion_matrix(drawn, share):
    scores, labels = case(*drawn)
    threshold = share * scores.max()
    (tn, fp), (fn, tp) = confusion_matrix(labels, scores >= threshold, labels=[False, True])
    errors = errors_at(scores, labels, threshold)
    assert errors[1:] == (fp, fn, tn + fp, fn + tp)
    assert errors.fpr == fp / (tn + fp) and errors.fnr == fn / (fn + tp)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_oracle_is_the_best_of_all_thresholds(drawn):
    scores, labels = case(*drawn)
    oracle = errors_f1_oracle(rank_pixels(scores, labels))
    assert oracle == errors_at(scores, labels, oracle.threshold)

    def f1(errors) -> float:
        found = errors.defective - errors.false_negatives
        return 2 * found / (2 * found + errors.false_positives + errors.false_negatives)

    assert f1(oracle) == pytest.approx(max(f1(errors_at(scores, labels, value)) for value in np.unique(scores)))


def test_errors_over_maps_of_different_sizes():
    maps = [np.array([[1.0, 2], [3, 4]], np.float32), np.array([[5.0, 0, 2]], np.float32)]
    masks = [np.array([[0, 0], [1, 1]]), np.array([[0, 1, 0]])]
    assert errors_at(maps, masks, 3)[1:] == (1, 1, 4, 3)


def test_no_defect_no_oracle():
    with pytest.raises(DataError, match="no defective pixel or image"):
        errors_f1_oracle(rank_pixels(np.arange(3.0), np.zeros(3)))
    errors = errors_at(np.arange(3.0), np.zeros(3), 1)
    assert errors.fpr == 2 / 3 and np.isnan(errors.fnr)


@settings(max_examples=40, deadline=None)
@given(CASES, st.integers(1, 40))
def test_histograms_count_every_score_once(drawn, bins):
    scores, labels = case(*drawn)
    counts = score_histograms(scores, labels, bins)
    for row, part in ((counts.normal, scores[~labels]), (counts.defective, scores[labels])):
        assert (row == np.histogram(part.astype(np.float64), counts.edges)[0]).all() and row.sum() == part.size
    for density in counts.densities():
        assert density @ np.diff(counts.edges) == pytest.approx(1)


def test_histograms_refuse_what_has_no_range():
    with pytest.raises(DataError, match="NaN or infinite"):
        score_histograms(np.array([1.0, np.inf]), np.array([0, 1]))
    with pytest.raises(DataError, match="no scores"):
        score_histograms(np.empty(0), np.empty(0))
    with pytest.raises(ParameterError, match="bins=0"):
        score_histograms(np.ones(2), np.ones(2), 0)
    flat = score_histograms(np.ones(5), np.array([0, 0, 1, 1, 1]), 4)
    assert flat.normal.sum() == 2 and flat.defective.sum() == 3


@pytest.mark.parametrize("points", [0, -3])
def test_a_curve_has_at_least_one_step(points):
    with pytest.raises(ParameterError, match="at least one step"):
        thin_curve(pr_curve(rank_pixels(np.arange(4.0), np.array([0, 1, 0, 1]))), points)
