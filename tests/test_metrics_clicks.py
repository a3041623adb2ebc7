"""Clicks: golden values by hand, SciPy's Kaplan-Meier, properties, and sessions that must be refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from defectbook.core import DataError, DefectbookError, ParameterError
from defectbook.metrics.clicks import (
    Clicks,
    as_traces,
    click_metrics,
    clicks_quantile,
    clicks_to_target,
    failure_rate,
    iou_curve,
    kaplan_meier,
    number_of_clicks,
    restricted_mean,
    success_curve,
)

IOU = st.floats(0, 1, allow_subnormal=False)
FULL = st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(IOU, min_size=n, max_size=n), min_size=1, max_size=15))


@st.composite
def censored(draw):
    """Clicks of up to 30 objects, some reached and some given up, at least one of them clicked to the limit."""
    limit = draw(st.integers(1, 20))
    counts = draw(st.lists(st.integers(1, limit), min_size=1, max_size=30)) + [limit]
    reached = draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    return Clicks(np.array(counts), np.array(reached), limit)


def test_success_at_click_n_is_success():
    traces = [[0.1] * 19 + [0.85], [0.1] * 20]
    assert clicks_to_target(traces, 0.85, 20).reached.tolist() == [True, False]
    assert (number_of_clicks(traces), failure_rate(traces)) == (20.0, 0.5)


def test_golden_figures():
    traces = [[0.9], [0.5, 0.85], [0.2, 0.3, 0.4], [0.1, 0.95, 0.2]]
    assert clicks_to_target(traces, 0.85, 3).count.tolist() == [1, 2, 3, 2]
    assert number_of_clicks(traces, 0.85, 3) == 2.0
    assert failure_rate(traces, 0.85, 3) == 0.25
    assert success_curve(traces, 0.85, 3).tolist() == [0.25, 0.75, 0.75]


def test_a_later_drop_does_not_undo_a_success():
    assert failure_rate([[0.9, 0.1, 0.1]], 0.85, 3) == 0.0 and number_of_clicks([[0.9, 0.1, 0.1]], 0.85, 3) == 1.0


def test_clicks_beyond_the_limit_do_not_count():
    assert failure_rate([[0.1, 0.2, 0.9]], 0.85, 2) == 1.0 and number_of_clicks([[0.1, 0.2, 0.9]], 0.85, 2) == 2.0


def test_target_reached_exactly():
    assert clicks_to_target([[17 / 20]], 0.85, 1).reached.item()
    assert not clicks_to_target([[np.nextafter(0.85, 0)]], 0.85, 1).reached.item()


def test_metric_names_of_the_book():
    traces = [[0.95], [0.3] * 30]
    assert click_metrics(traces) == {"noc20@85": 10.5, "fr20@85": 0.5, "noc30@90": 15.5, "fr30@90": 0.5}


def test_sessions_stopped_at_an_easier_target_are_refused():
    traces = [[0.5, 0.86], [0.91]]
    assert number_of_clicks(traces, 0.85, 20) == 1.5
    for figure in (number_of_clicks, failure_rate, success_curve):
        with pytest.raises(DataError, match=r"trace 0 stops after 2 of 30 clicks below IoU 0\.9"):
            figure(traces, 0.90, 30)


def test_array_with_nan_tails_equals_ragged_lists():
    padded = np.array([[0.9, np.nan, np.nan], [0.1, 0.2, 0.3]])
    assert np.array_equal(as_traces(padded), as_traces([[0.9], [0.1, 0.2, 0.3]]), equal_nan=True)


@pytest.mark.parametrize("traces, message", [
    ([], "at least one object"), ([[]], "trace 0 is empty"), ([[0.5], [np.nan, np.nan]], "trace 1 is empty"),
    ([[0.5, np.nan, 0.7]], "no IoU at click 2"), ([[85.0, 90.0]], "holds 85; IoU lies in"), ([[0.5, -0.1]], "holds -0.1"),
    ([[0.5, np.inf]], "holds inf"), ([0.5, 0.9], "one sequence"), ([["a", "b"]], "no IoU"), (np.zeros((2, 3, 4)), "one sequence"),
])
def test_bad_traces_are_named(traces, message):
    with pytest.raises(DataError, match=message):
        as_traces(traces)


@pytest.mark.parametrize("arguments", [{"target": 0}, {"target": 85}, {"target": math.nan}, {"limit": 0}, {"limit": 2.5},
                                       {"limit": math.nan}])
def test_bad_settings_are_named(arguments):
    with pytest.raises(ParameterError, match=str(list(arguments.values())[0])):
        clicks_to_target([[0.5]], **arguments)


@pytest.mark.parametrize("count, reached", [([0], [True]), ([21], [True]), ([], []), ([1, 2], [True])])
def test_bad_clicks_are_refused(count, reached):
    with pytest.raises(DataError):
        Clicks(np.array(count), np.array(reached), 20)


def test_a_whole_float_is_a_limit():
    assert number_of_clicks([[0.1, 0.9, 0.2]], 0.85, 3.0) == 2.0 and len(iou_curve([[0.2]], 3.0)) == 3


def test_errors_are_one_line():
    with pytest.raises(DefectbookError) as caught:
        number_of_clicks([[0.2]], 0.9, 30)
    assert "\n" not in str(caught.value)


@given(FULL, st.floats(0.05, 1))
def test_noc_and_fr_bound_each_other(traces, target):
    limit = len(traces[0])
    noc, fr = number_of_clicks(traces, target, limit), failure_rate(traces, target, limit)
    assert 1 + fr * (limit - 1) - 1e-9 <= noc <= limit
    assert success_curve(traces, target, limit)[-1] == pytest.approx(1 - fr)


@given(FULL, st.floats(0.05, 0.95), st.floats(0, 0.05))
def test_harder_targets_never_need_fewer_clicks(traces, target, more):
    limit = len(traces[0])
    assert number_of_clicks(traces, target + more, limit) >= number_of_clicks(traces, target, limit)
    assert failure_rate(traces, target + more, limit) >= failure_rate(traces, target, limit)


@given(FULL, st.floats(0.05, 1))
def test_the_obvious_loop_agrees(traces, target):
    limit, counts, failures = len(traces[0]), [], 0
    for trace in traces:
        for click, iou in enumerate(trace, start=1):
            if iou >= target:
                counts.append(click)
                break
        else:
            counts.append(limit)
            failures += 1
    assert number_of_clicks(traces, target, limit) == pytest.approx(sum(counts) / len(counts))
    assert failure_rate(traces, target, limit) == pytest.approx(failures / len(counts))


@given(FULL, st.floats(0.05, 1))
def test_stopping_at_the_target_changes_nothing(traces, target):
    limit = len(traces[0])
    stopped = []
    for trace in traces:
        hit = next((click for click, iou in enumerate(trace, start=1) if iou >= target), limit)
        stopped.append(trace[:hit])
    assert number_of_clicks(stopped, target, limit) == number_of_clicks(traces, target, limit)
    assert failure_rate(stopped, target, limit) == failure_rate(traces, target, limit)


@given(FULL, st.floats(0.05, 1))
def test_restricted_mean_is_noc_when_failures_go_to_the_limit(traces, target):
    limit = len(traces[0])
    assert restricted_mean(traces, target, limit).mean == pytest.approx(number_of_clicks(traces, target, limit), abs=1e-9)


@given(censored())
def test_survival_equals_scipy(clicks):
    survival = kaplan_meier(clicks)[0]
    sample = stats.CensoredData(uncensored=clicks.count[clicks.reached], right=clicks.count[~clicks.reached])
    expected = stats.ecdf(sample).sf.evaluate(np.arange(clicks.limit + 1))
    assert np.allclose(survival, expected, atol=1e-12)


@given(censored())
def test_restricted_mean_lies_between_the_naive_ones(clicks):
    result = restricted_mean(clicks)
    assert clicks.count.mean() - 1e-9 <= result.mean <= np.where(clicks.reached, clicks.count, clicks.limit).mean() + 1e-9
    assert 1 <= result.low <= result.mean + 1e-9 and result.mean - 1e-9 <= result.high <= clicks.limit
    assert (np.diff(result.survival) <= 1e-12).all() and result.survival[0] == 1


def test_greenwood_by_hand():
    """Five objects: reached at 1 and 2, given up at 2, reached at 3, and one clicked to the limit 4 in vain."""
    clicks = Clicks(np.array([1, 2, 2, 3, 4]), np.array([True, True, False, True, False]), 4)
    survival, events, at_risk = kaplan_meier(clicks)
    assert at_risk.tolist() == [5, 5, 4, 2, 1] and events.tolist() == [0, 1, 1, 1, 0]
    assert np.allclose(survival, [1, 4 / 5, 3 / 5, 3 / 10, 3 / 10])
    result = restricted_mean(clicks)
    assert result.mean == pytest.approx(1 + 0.8 + 0.6 + 0.3)
    variance = (0.8 + 0.6 + 0.3) ** 2 * 1 / (5 * 4) + (0.6 + 0.3) ** 2 * 1 / (4 * 3) + 0.3**2 * 1 / (2 * 1)
    assert result.standard_error == pytest.approx(math.sqrt(variance))


def test_without_censoring_the_error_is_that_of_a_mean():
    counts = np.array([1, 1, 2, 3, 5, 8])
    result = restricted_mean(Clicks(counts, np.ones(6, bool), 10))
    assert result.mean == pytest.approx(counts.mean())
    assert result.standard_error == pytest.approx(counts.std() / math.sqrt(6))


def test_intervals_cover_the_truth():
    rng, hits = np.random.default_rng(0), 0
    truth = sum(0.8**k for k in range(10))  # geometric clicks, restricted to 10
    for _ in range(400):
        need, patience = rng.geometric(0.2, 150), rng.integers(2, 16, 150)
        seen = np.minimum(np.minimum(need, patience), 10)
        result = restricted_mean(Clicks(seen, need <= seen, 10))
        hits += result.low <= truth <= result.high
    assert 0.90 <= hits / 400 <= 0.98


def test_nothing_is_known_beyond_the_last_click():
    with pytest.raises(DataError, match=r"further than 2 of 20 clicks; choose limit=3"):
        restricted_mean([[0.1, 0.2], [0.9]], 0.85, 20)
    assert restricted_mean([[0.1, 0.2], [0.9]], 0.85, 3).mean == pytest.approx(1 + 0.5 + 0.5)


def test_quantiles():
    clicks = Clicks(np.array([1, 2, 3, 4]), np.array([True, True, True, False]), 4)
    assert [clicks_quantile(clicks, share) for share in (0.25, 0.5, 0.75)] == [1, 2, 3]
    assert math.isnan(clicks_quantile(clicks, 1.0))
    with pytest.raises(ParameterError):
        clicks_quantile(clicks, 0)


def test_curve_carries_the_last_mask_forward():
    assert iou_curve([[0.2, 0.4, 0.9], [0.8]]).tolist() == pytest.approx([0.5, 0.6, 0.85])
    assert iou_curve([[0.2, 0.4]], 1).tolist() == [0.2]
    assert len(iou_curve([[0.2]], 5)) == 5
    with pytest.raises(ParameterError):
        iou_curve([[0.2]], 0)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_bad_confidence(confidence):
    with pytest.raises(ParameterError):
        restricted_mean([[0.9]], confidence=confidence)
