"""Statistics: SciPy as reference where it has the thing, enumeration where it has not, golden values, and bad input."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from defectbook.core import DataError, ParameterError
from defectbook.metrics.statistics import (
    bootstrap_interval,
    compare_categories,
    deviation_interval,
    draw_ranks,
    holm,
    paired_bootstrap,
    psoi,
    psomt,
    rank_methods,
    seed_spread,
    wilcoxon,
)


def auroc(scores, labels):
    """Share of ordered pairs, the slow and obvious way."""
    good, bad = scores[labels == 0], scores[labels == 1]
    if not len(good) or not len(bad):
        return float("nan")
    return float(np.mean((bad[:, None] > good) + 0.5 * (bad[:, None] == good)))


RNG = np.random.default_rng(0)
SKEWED = RNG.exponential(size=40)
LABELS = np.repeat([0, 1], [30, 12])
SCORES = RNG.normal(size=42) + LABELS


# ---------------------------------------------------------------- intervals

@pytest.mark.parametrize("method, name", [("percentile", "percentile"), ("bca", "BCa")])
def test_interval_of_a_mean_equals_scipys(method, name):
    ours = bootstrap_interval(np.mean, SKEWED, resamples=20000, method=method)
    theirs = stats.bootstrap((SKEWED,), np.mean, n_resamples=20000, method=name, rng=np.random.default_rng(1)).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.015)
    assert ours.estimate == SKEWED.mean()


def test_bca_differs_from_percentile_on_skewed_data():
    plain, bca = (bootstrap_interval(np.mean, SKEWED, resamples=5000, method=method) for method in ("percentile", "bca"))
    assert bca.high > plain.high + 0.01


@pytest.mark.parametrize("method, name", [("percentile", "percentile"), ("bca", "BCa")])
def test_stratified_interval_equals_scipys_two_samples(method, name):
    """Strata are SciPy's independent samples: each is drawn from separately."""
    def statistic(values, labels):
        return values[labels == 1].mean() - values[labels == 0].mean()

    ours = bootstrap_interval(statistic, SCORES, LABELS, strata=LABELS, resamples=10000, method=method)
    theirs = stats.bootstrap((SCORES[LABELS == 1], SCORES[LABELS == 0]), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis),
                             n_resamples=10000, method=name, rng=np.random.default_rng(1)).confidence_interval
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.05)


def test_every_draw_keeps_the_size_of_each_stratum():
    seen = []
    bootstrap_interval(lambda labels: seen.append(labels.mean()) or 0.0, LABELS, strata=LABELS, resamples=100)
    assert set(seen) == {LABELS.mean()}


def test_rows_stay_together():
    """Values and labels of one image are drawn as one."""
    values = np.arange(50)
    interval = bootstrap_interval(lambda a, b: float(np.abs(a - b).max()), values, values.copy(), resamples=100)
    assert (interval.low, interval.high) == (0, 0)


def test_intervals_cover_the_truth():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(200):
        interval = bootstrap_interval(np.mean, rng.normal(0.3, 1, 60), resamples=300, rng=rng)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_seeds_decide_the_draws():
    first, again, other = (bootstrap_interval(np.mean, SKEWED, resamples=200, rng=seed) for seed in (0, 0, 1))
    assert first == again and first != other
    generator = np.random.default_rng(0)
    once, then = (bootstrap_interval(np.mean, SKEWED, resamples=200, rng=generator) for _ in range(2))
    assert once != then


def test_an_undefined_draw_asks_for_strata():
    labels = np.array([1] + [0] * 30)
    scores = np.arange(31.0)[::-1]
    with pytest.raises(DataError, match="pass strata"):
        bootstrap_interval(auroc, scores, labels, resamples=200)
    assert bootstrap_interval(auroc, scores, labels, strata=labels, resamples=200).estimate == 1.0


def test_bca_is_refused_where_all_draws_lie_on_one_side():
    """Minus the distance from the sample's own mean is largest, 0, on the sample itself."""
    with pytest.raises(DataError, match="method='percentile'"):
        bootstrap_interval(lambda values: -abs(values.mean() - SKEWED.mean()), SKEWED, resamples=100, method="bca")


@pytest.mark.parametrize("arrays", [[], [[1.0]], [[1.0, 2.0], [1.0]], [[1.0, math.nan]], [[1.0, math.inf]], [3.0]])
def test_bad_arrays(arrays):
    with pytest.raises(DataError):
        bootstrap_interval(lambda *parts: 0.0, *arrays)


@pytest.mark.parametrize("arguments", [{"confidence": 95}, {"confidence": 0}, {"resamples": 10}, {"resamples": 500.5}, {"method": "magic"}])
def test_bad_settings(arguments):
    with pytest.raises(ParameterError, match=str(list(arguments.values())[0])):
        bootstrap_interval(np.mean, SKEWED, **arguments)


def test_bad_strata():
    with pytest.raises(DataError, match="strata"):
        bootstrap_interval(np.mean, SKEWED, strata=[0, 1])


# ---------------------------------------------------------------- paired comparison

def test_paired_difference_of_means_is_the_bootstrap_of_the_differences():
    first, second = SKEWED, SKEWED + RNG.normal(0.05, 0.1, 40)
    duel = paired_bootstrap(np.mean, first, second, resamples=4000)
    plain = bootstrap_interval(np.mean, first - second, resamples=4000)
    assert duel.difference == pytest.approx(plain.estimate)
    assert (duel.low, duel.high) == pytest.approx((plain.low, plain.high))


def test_paired_p_value_agrees_with_the_t_test():
    rng = np.random.default_rng(5)
    first = rng.normal(size=80)
    second = first + rng.normal(0.15, 0.6, 80)
    ours, theirs = paired_bootstrap(np.mean, first, second, resamples=8000).p_value, stats.ttest_rel(first, second).pvalue
    assert ours == pytest.approx(theirs, abs=0.02)


def test_methods_swapped_give_the_mirror_image():
    second = SCORES + RNG.normal(0, 0.5, 42)
    one = paired_bootstrap(auroc, SCORES, second, LABELS, strata=LABELS, resamples=300)
    other = paired_bootstrap(auroc, second, SCORES, LABELS, strata=LABELS, resamples=300)
    assert (one.difference, one.low, one.high, one.p_value) == pytest.approx((-other.difference, -other.high, -other.low, other.p_value))


def test_a_method_does_not_differ_from_itself():
    duel = paired_bootstrap(auroc, SCORES, SCORES, LABELS, strata=LABELS, resamples=100)
    assert (duel.difference, duel.low, duel.high, duel.p_value) == (0, 0, 0, 1)


def test_p_values_are_uniform_under_no_difference():
    rng = np.random.default_rng(11)
    p = [paired_bootstrap(np.mean, *rng.normal(size=(2, 50)), resamples=200, rng=rng).p_value for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert min(p) >= 1 / 201


# ---------------------------------------------------------------- Wilcoxon

def test_wilcoxon_by_hand():
    assert wilcoxon([3, 1, 4], [0, 0, 0]) == (6.0, 0.25)
    assert wilcoxon([1, -2], [0, 0]) == (1.0, 1.0)


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=10))
def test_wilcoxon_equals_enumeration_of_all_signs(gaps):
    ours = wilcoxon(gaps, [0] * len(gaps))
    kept = [gap for gap in gaps if gap]
    if not kept:
        assert ours == (0.0, 1.0)
        return
    ranks = stats.rankdata(np.abs(kept))
    observed = ranks[np.array(kept) > 0].sum()
    sums = np.array([np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(kept))])
    p = min(1.0, 2 * min(np.mean(sums <= observed), np.mean(sums >= observed)))
    assert ours == (pytest.approx(observed), pytest.approx(p))


@given(st.integers(0, 1000), st.integers(6, 45))
@settings(max_examples=25, deadline=None)
def test_wilcoxon_equals_scipy_exact(seed, count):
    first, second = np.random.default_rng(seed).normal(size=(2, count))
    theirs = stats.wilcoxon(first, second, method="exact")
    positive, p = wilcoxon(first, second)
    assert p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert min(positive, count * (count + 1) / 2 - positive) == theirs.statistic


def test_wilcoxon_equals_scipy_for_many_pairs_with_ties():
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 12, (2, 400)).astype(float)
    theirs = stats.wilcoxon(first, second, method="asymptotic", correction=False)
    assert wilcoxon(first, second)[1] == pytest.approx(theirs.pvalue, rel=1e-9)


def test_exact_and_approximate_agree_where_they_meet():
    rng = np.random.default_rng(4)
    first = rng.normal(0.2, 1, 101)
    exact, approximate = wilcoxon(first[:100], np.zeros(100))[1], wilcoxon(first, np.zeros(101))[1]
    assert exact == pytest.approx(stats.wilcoxon(first[:100], method="asymptotic").pvalue, abs=5e-3)
    assert approximate == pytest.approx(stats.wilcoxon(first, method="exact").pvalue, abs=5e-3)


def test_differences_that_only_look_different_in_binary_are_tied():
    first, second = np.array([0.3, 0.2, 0.9]), np.array([0.2, 0.3, 0.8])  # 0.1, -0.1, 0.1 on paper
    assert wilcoxon(first, second)[0] == 4.0


@pytest.mark.parametrize("pair", [([1, 2], [1]), ([[1, 2], [3, 4]], [[1, 2], [3, 4]]), ([1, math.nan], [1, 2])])
def test_wilcoxon_refuses(pair):
    with pytest.raises(DataError):
        wilcoxon(*pair)


# ---------------------------------------------------------------- Holm and categories

def test_holm_by_hand():
    assert holm([0.01, 0.02, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    adjusted = holm(p)
    rejected = set()
    for step, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - step) > alpha:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(adjusted <= alpha).tolist()) == rejected
    assert (adjusted >= np.array(p)).all() and (adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-15).all()


@pytest.mark.parametrize("p", [[0.5, math.nan], [-0.1], [1.1], [[0.5]]])
def test_holm_refuses(p):
    with pytest.raises(DataError):
        holm(p)


def test_categories_are_told_apart_only_where_they_differ():
    rng = np.random.default_rng(8)
    second = {name: rng.uniform(size=30) for name in "abc"}
    first = {name: values + rng.normal(0, 0.05, 30) + {"a": 0.1, "b": -0.1, "c": 0}[name] for name, values in second.items()}
    table = compare_categories(first, second, resamples=200)
    assert table["better"].tolist() == ["first", "second", ""] and table["images"].tolist() == [30, 30, 30]
    assert table["p_holm"].tolist() == pytest.approx(holm(table["p"]).tolist())
    assert isinstance(table, pd.DataFrame) and (table["low"] <= table["difference"]).all() and (table["difference"] <= table["high"]).all()


def test_categories_must_match():
    with pytest.raises(DataError, match="differ"):
        compare_categories({"a": [1.0, 2.0]}, {"b": [1.0, 2.0]})
    with pytest.raises(DataError):
        compare_categories({}, {})


# ---------------------------------------------------------------- ranks

@given(st.integers(2, 12), st.integers(3, 7), st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_friedman_equals_scipy(datasets, methods, seed):
    scores = np.random.default_rng(seed).integers(0, 6, (datasets, methods))
    if (scores == scores[:, :1]).all():
        return
    theirs, ours = stats.friedmanchisquare(*scores.T), rank_methods(scores)
    assert (ours.statistic, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9, abs=1e-12)


# Critical values of the two-tailed Nemenyi test at 0.05 and 0.10, as printed in Demsar 2006, Table 5(a).
@pytest.mark.parametrize("methods, at_5, at_10", [
    (2, 1.960, 1.645), (3, 2.343, 2.052), (4, 2.569, 2.291), (5, 2.728, 2.459), (6, 2.850, 2.589), (7, 2.949, 2.693), (8, 3.031, 2.780),
    (9, 3.102, 2.855), (10, 3.164, 2.920)])
def test_critical_difference_equals_the_printed_table(methods, at_5, at_10):
    scores = np.random.default_rng(0).normal(size=(14, methods))
    for alpha, quantile in ((0.05, at_5), (0.10, at_10)):
        expected = quantile * math.sqrt(methods * (methods + 1) / (6 * 14))
        assert rank_methods(scores, alpha=alpha).critical_difference == pytest.approx(expected, rel=5e-4)


def test_ranks_and_direction():
    scores = [[0.9, 0.8, 0.7], [0.9, 0.9, 0.1]]
    assert rank_methods(scores).ranks.tolist() == [1.25, 1.75, 3.0]
    assert rank_methods(scores, larger_is_better=False).ranks.tolist() == [2.75, 2.25, 1.0]


def test_groups_are_maximal_runs_within_the_critical_difference():
    rng = np.random.default_rng(0)
    scores = np.stack([rng.normal(mean, 0.3, 40) for mean in (0, 0.02, 3, 3.02, 6)], axis=1)
    assert sorted(sorted(group) for group in rank_methods(scores).groups) == [[0, 1], [2, 3]]
    same = rank_methods(rng.normal(size=(5, 4)))
    assert [sorted(group) for group in same.groups] == [[0, 1, 2, 3]]


@given(st.lists(st.floats(1, 6), min_size=2, max_size=7), st.floats(0.1, 3))
def test_groups_against_the_definition(ranks, difference):
    from defectbook.metrics.statistics import _rank_groups

    groups = [set(group) for group in _rank_groups(np.array(ranks), difference)]
    for group in groups:
        assert max(ranks[i] for i in group) - min(ranks[i] for i in group) < difference
        assert not any(group < other for other in groups)
    for i, j in itertools.combinations(range(len(ranks)), 2):
        together = any({i, j} <= group for group in groups)
        assert together == (abs(ranks[i] - ranks[j]) < difference)


def test_equal_scores_have_no_difference():
    ranking = rank_methods(np.ones((4, 3)))
    assert (ranking.statistic, ranking.p_value) == (0.0, 1.0) and ranking.ranks.tolist() == [2, 2, 2]


@pytest.mark.parametrize("scores", [[1, 2], [[1, 2]], [[1], [2]], [[1, math.nan], [1, 2]]])
def test_incomplete_tables_are_refused(scores):
    with pytest.raises(DataError):
        rank_methods(scores)


def test_diagram_names_every_method_once():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranking = rank_methods(np.random.default_rng(0).normal(size=(8, 5)))
    figure, axis = plt.subplots()
    draw_ranks(axis, ranking, list("abcde"))
    texts = [text.get_text() for text in axis.texts]
    assert [sum(text.startswith(f"{name} (") for text in texts) for name in "abcde"] == [1] * 5
    with pytest.raises(ParameterError, match="4 names for 5 methods"):
        draw_ranks(axis, ranking, list("abcd"))
    plt.close(figure)


# ---------------------------------------------------------------- stability

def test_psoi_by_hand():
    """Seven checkpoints from 7,000 to 10,000; class averages 0.50, 0.52, 0.54, then 0.52 four times."""
    iterations = list(range(500, 10001, 500))
    tpr = np.full((20, 2), 9.0)
    tpr[13:] = [[0.4, 0.6], [0.42, 0.62], [0.44, 0.64], [0.52, 0.52], [0.52, 0.52], [0.52, 0.52], [0.52, 0.52]]
    result = psoi({"tpr": tpr}, iterations)
    averages = np.array([0.50, 0.52, 0.54, 0.52, 0.52, 0.52, 0.52])
    assert result.count == 7 and result.deviations["tpr"] == pytest.approx(math.sqrt(((averages - 0.52) ** 2).sum() / 6))
    assert psoi({"tpr": tpr}, iterations, ddof=0).deviations["tpr"] == pytest.approx(math.sqrt(0.0008 / 7))
    assert result.without_first["tpr"] == pytest.approx(np.std(averages[1:], ddof=1)) and result.stable


def test_the_deviation_is_of_averages_not_of_classes():
    """Classes that move against each other cancel: the thesis averages first."""
    assert psomt({"tpr": [[0.2, 0.8], [0.8, 0.2], [0.5, 0.5]]}).deviations["tpr"] == pytest.approx(0, abs=1e-15)


def test_undefined_ratios_are_left_out_of_the_average():
    assert psomt({"precision": [[0.5, math.nan], [0.7, 0.7]]}, ddof=0).deviations["precision"] == pytest.approx(0.1)
    with pytest.raises(DataError, match="entry 1 has no value"):
        psomt({"precision": [[0.5, 0.5], [math.nan, math.nan]]})


def test_the_rule_is_below_five_hundredths_for_every_metric():
    fine, edge = [0.50, 0.55], [0.5, 0.6]
    assert psomt({"tpr": fine, "fpr": fine}, ddof=0).stable
    assert psomt({"tpr": edge}, ddof=0).deviations["tpr"] == pytest.approx(0.05)
    assert not psomt({"tpr": fine, "fpr": [0.1, 0.3]}, ddof=0).stable
    assert not psomt({"tpr": [0.0, 0.1]}, limit=0.05, ddof=0).stable  # 0.05 is not under 0.05


def test_an_early_outlier_is_visible():
    result = psoi({"tpr": [0.3, 0.5, 0.5, 0.5]}, [7000, 7500, 8000, 8500])
    assert not result.stable and result.without_first["tpr"] == 0


def test_two_trainings_have_nothing_without_the_first():
    assert math.isnan(psomt({"tpr": [0.5, 0.6]}).without_first["tpr"])


@pytest.mark.parametrize("iterations, message", [([7000, 8000], "7500"), ([7500, 8000], "7000"), ([5000, 6000], "7000"),
                                                 ([8000, 7000], "do not rise"), ([7000, 7250], "7500")])
def test_missing_checkpoints_are_named(iterations, message):
    with pytest.raises(DataError, match=message):
        psoi({"tpr": [0.5, 0.5]}, iterations)


def test_stability_refuses_uneven_input():
    for call in (lambda: psoi({"tpr": [0.5]}, [7000, 7500]), lambda: psomt({"tpr": [0.5, 0.6], "fpr": [0.1, 0.1, 0.1]}), lambda: psomt({}),
                 lambda: psomt({"tpr": [0.5]}), lambda: psomt({"tpr": np.zeros((2, 2, 2))})):
        with pytest.raises(DataError):
            call()


# ---------------------------------------------------------------- seeds

def test_seed_spread_by_hand():
    spread = seed_spread([1.0, 2.0, 3.0])
    assert (spread.count, spread.mean.estimate, spread.deviation.estimate, spread.smallest, spread.largest) == (3, 2.0, 1.0, 1.0, 3.0)
    assert spread.mean.high - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2 degrees of freedom)
    assert (spread.deviation.low, spread.deviation.high) == pytest.approx((0.52067, 6.28473), rel=1e-4)


def test_deviation_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    hits = [low <= 2 <= high for low, high in (deviation_interval(rng.normal(0, 2, 5).std(ddof=1), 5) for _ in range(1000))]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("call", [lambda: seed_spread([0.5]), lambda: seed_spread([0.5, math.nan]), lambda: seed_spread([[1, 2], [3, 4]])])
def test_bad_seed_values(call):
    with pytest.raises(DataError):
        call()


@pytest.mark.parametrize("deviation, count", [(0.1, 1), (-0.1, 3), (math.nan, 3)])
def test_bad_deviations(deviation, count):
    with pytest.raises(ParameterError):
        deviation_interval(deviation, count)
