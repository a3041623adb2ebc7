"""Pixel metrics against scikit-learn, brute force and their own promises."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from benchmarks.timing import peak_of
from defectbook.core import DataError, ParameterError
from defectbook.metrics import pixel
from defectbook.metrics.pixel import Counts, PixelStream, rank_pixels

WIDTH = {16: np.float16, 32: np.float32, 64: np.float64}


@st.composite
def scored(draw, both: bool = True, largest: int = 200):
    """Scores with many ties, few ties or none, and labels; with both classes present if asked."""
    size = draw(st.integers(2, largest))
    kind = draw(st.sampled_from(["integers", "floats", "constant", "wide", "bytes"]))
    if kind == "integers":
        scores = draw(hnp.arrays(np.int64, size, elements=st.integers(-4, 4)))
    elif kind == "bytes":
        scores = draw(hnp.arrays(np.uint8, size))
    elif kind == "constant":
        scores = np.full(size, draw(st.floats(-2.0**100, 2.0**100, width=32)), np.float32)
    else:
        width = draw(st.sampled_from([16, 32, 64]))
        limit = 1.0 if kind == "floats" else 60000.0
        scores = draw(hnp.arrays(WIDTH[width], size, elements=st.floats(-limit, limit, width=width)))
    labels = draw(hnp.arrays(np.uint8, size, elements=st.integers(0, 2)))
    if both:
        labels[0], labels[1] = 0, 1
    return scores, labels


@settings(max_examples=150, deadline=None)
@given(scored())
def test_rank_metrics_equal_scikit_learn(data):
    scores, labels = data
    truth = labels != 0
    ranking = rank_pixels(scores, labels)
    assert abs(ranking.auroc() - sk.roc_auc_score(truth, scores)) < 1e-12
    assert abs(ranking.average_precision() - sk.average_precision_score(truth, scores)) < 1e-12
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300))
    value, threshold = pixel.f1_max_oracle(scores, labels)
    assert abs(value - best) < 1e-12
    assert abs(sk.f1_score(truth, scores >= threshold) - value) < 1e-12


@settings(max_examples=100, deadline=None)
@given(scored())
def test_curves_equal_scikit_learn(data):
    scores, labels = data
    truth, ranking = labels != 0, rank_pixels(scores, labels)
    curve = pixel.roc_curve(ranking)
    fpr, tpr, _ = sk.roc_curve(truth, scores, drop_intermediate=False)
    ours, theirs = set(zip(curve.x, curve.y, strict=True)), set(zip(fpr, tpr, strict=True))
    assert ours <= theirs  # every corner is a point of theirs ...
    assert abs(np.sum(np.diff(curve.x) * (curve.y[1:] + curve.y[:-1]) / 2) - sk.auc(fpr, tpr)) < 1e-12  # ... and none is missing
    wide = scores.astype(np.float64)
    for x, y, threshold in zip(*curve, strict=True):
        assert np.mean(wide[~truth] >= threshold) == x and np.mean(wide[truth] >= threshold) == y
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    points = set(zip(recall, precision, strict=True))
    pr = pixel.pr_curve(ranking)
    assert {*zip(pr.x, pr.y, strict=True)} <= points


@settings(max_examples=60, deadline=None)
@given(scored(both=False), st.integers(1, 9), st.sampled_from([0, 10**6]), st.integers(1, 3))
def test_blocks_hints_and_threads_change_nothing(data, block, size_hint, threads):
    scores, labels = data
    flags = labels != 0
    whole = rank_pixels(scores, labels)
    parts = pixel.rank_scores([scores[flags]], np.array_split(scores[~flags], 7), size_hint, block, threads)
    for name in ("thresholds", "tp", "above", "fp", "positives", "negatives"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_ranking_equals_counting_on_many_distinct_scores():
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.1
    scores = np.exp(3 * rng.standard_normal(labels.size)) + labels
    single = scores.astype(np.float32)
    for typed in (scores, single, -scores, np.round(scores, 2), (scores * 1000).astype(np.int64), 1e6 + single):
        ranking = rank_pixels(typed, labels)
        unsieved = pixel.rank_scores([typed[labels]], [typed[~labels]], block=1)
        assert np.array_equal(ranking.fp, unsieved.fp) and np.array_equal(ranking.above, unsieved.above)
        normal = np.sort(typed[~labels])
        assert np.array_equal(ranking.thresholds, np.unique(typed[labels])[::-1])
        assert np.array_equal(ranking.fp, normal.size - np.searchsorted(normal, ranking.thresholds, "left"))
        assert np.array_equal(ranking.above, normal.size - np.searchsorted(normal, ranking.thresholds, "right"))
        assert abs(ranking.auroc() - sk.roc_auc_score(labels, typed)) < 1e-12


@pytest.mark.parametrize("labels", [np.zeros(5), np.ones(5)])
def test_one_class_is_nan(labels):
    assert np.isnan(pixel.auroc(np.arange(5.0), labels))
    ranking = rank_pixels(np.arange(5.0), labels)
    assert np.isnan(ranking.average_precision()) == (not labels.any())
    curve = pixel.roc_curve(ranking)
    assert np.isnan(curve.x).all() != np.isnan(curve.y).all()
    assert np.isnan(PixelStream(10).ranking().auroc())


def test_constant_scores():
    labels = np.array([0, 0, 0, 1])
    ranking = rank_pixels(np.full(4, 7.0), labels)
    assert ranking.auroc() == 0.5 and ranking.average_precision() == 0.25 and ranking.auroc_bounds() == (0, 1)


@pytest.mark.parametrize("place", [0, 2_000_000, 2_999_999])
@pytest.mark.parametrize("label", [0, 1])
def test_nan_is_refused_wherever_it_is(place, label):
    scores, labels = np.zeros(3_000_000, np.float32), np.zeros(3_000_000, np.uint8)
    labels[:5], labels[place] = 1, label
    scores[place] = np.nan
    with pytest.raises(ParameterError, match="NaN"):
        pixel.auroc(scores, labels)
    with pytest.raises(ParameterError, match="NaN"):
        PixelStream(12).update(scores, labels)


def test_infinite_scores_have_a_rank():
    scores, labels = np.array([-np.inf, 0, np.inf, np.inf]), np.array([0, 0, 1, 0])
    assert pixel.auroc(scores, labels) == 2.5 / 3
    stream = PixelStream(21)
    stream.update(scores, labels)
    assert stream.ranking().auroc() == 2.5 / 3
    stream.update(np.array([-np.inf]), np.array([1]))
    assert stream.ranking().thresholds.tolist() == [np.inf, -np.inf]


def test_malformed_input_is_named():
    with pytest.raises(ParameterError, match="fit_masks"):
        pixel.auroc(np.zeros((4, 6)), np.zeros((6, 4)))
    with pytest.raises(ParameterError, match="2 maps but 1 masks"):
        pixel.auroc([np.zeros(3), np.zeros(4)], [np.zeros(3)])
    with pytest.raises(ParameterError, match="complex"):
        pixel.auroc(np.zeros(3, complex), np.array([0, 1, 1]))
    assert pixel.auroc(np.zeros((2, 1, 3)), np.eye(2, 3)) == 0.5  # an axis of one is no other shape
    assert pixel.auroc([0.1, 0.9], [0, 1]) == 1.0


def test_lists_of_images_of_different_sizes():
    rng = np.random.default_rng(0)
    maps = [rng.random((5, 7)), rng.random((3, 4)).astype(np.float32), rng.random((9, 2))]
    masks = [(one > 0.6).astype(np.uint8) * 2 for one in maps]
    masks[0][0] = 1
    flat = np.concatenate([one.ravel() for one in maps]), np.concatenate([mask.ravel() for mask in masks])
    assert abs(pixel.auroc(maps, masks) - sk.roc_auc_score(flat[1] != 0, flat[0])) < 1e-12


def test_more_pixels_than_a_float32_counter_holds():
    count = 18_000_000  # a float32 counter stops at 16,777,216
    scores = np.zeros(count + 2, np.float32)
    scores[-2:] = 0.5, 1
    labels = np.zeros(count + 2, np.uint8)
    labels[-2] = 1
    assert pixel.auroc(scores, labels) == count / (count + 1)
    assert rank_pixels(scores, labels).fp.tolist() == [1]


def test_more_pairs_than_an_int64_holds():
    ranking = pixel.Ranking(np.array([1.0]), np.array([4 * 10**9]), np.array([10**9]), np.array([10**9]), 4 * 10**9, 4 * 10**9)
    assert ranking.auroc() == 0.75


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, st.integers(2, 100), elements=st.floats(-8, 8, width=32)), st.data())
def test_a_monotone_heavy_tailed_transform_changes_no_rank_metric(scores, data):
    labels = data.draw(hnp.arrays(np.uint8, scores.size, elements=st.integers(0, 1)))
    labels[:2] = 0, 1
    distinct = np.unique(scores)
    heavy = np.exp(np.exp(np.abs(distinct.astype(np.float64)) / 2)) * np.sign(distinct)  # up to 5e23, in no common range
    heavy = np.sort(heavy)[np.searchsorted(distinct, scores)] if np.unique(heavy).size == distinct.size else scores
    one, other = rank_pixels(scores, labels), rank_pixels(heavy, labels)
    assert one.auroc() == other.auroc() and one.average_precision() == other.average_precision()
    assert one.f_max().value == other.f_max().value
    assert np.array_equal(pixel.roc_curve(one)[:2], pixel.roc_curve(other)[:2])


def test_the_input_is_left_as_it_was_and_may_be_read_only(tmp_path):
    rng = np.random.default_rng(0)
    scores, labels = rng.random((6, 50, 40)).astype(np.float32), (rng.random((6, 50, 40)) < 0.1).astype(np.uint8)
    scores.tofile(tmp_path / "maps")
    mapped = np.memmap(tmp_path / "maps", np.float32, "r", shape=scores.shape)
    before = scores.copy()
    assert pixel.auroc(mapped, labels) == pixel.auroc(scores, labels)
    assert np.array_equal(scores, before)


def test_memory_stays_below_six_times_the_scores():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((64, 256, 256)).astype(np.float32)
    for share in (0.01, 0.2):
        labels = (rng.random(scores.shape) < share).astype(np.uint8)
        assert peak_of(lambda labels=labels: rank_pixels(scores, labels).auroc()) < 6 * scores.nbytes


def test_memory_of_a_stream_is_fixed():
    rng = np.random.default_rng(0)

    def run(images: int) -> None:
        stream = PixelStream()
        for _ in range(images):
            scores = rng.standard_normal((256, 256)).astype(np.float32)
            stream.update(scores, scores > 1)
        stream.ranking().average_precision_bounds()

    few, many = peak_of(lambda: run(2)), peak_of(lambda: run(40))
    assert many < 200e6 and many < 1.1 * few


# Streaming


@settings(max_examples=150, deadline=None)
@given(scored(), st.integers(10, 22))
def test_streamed_values_and_exact_ones_lie_within_the_promised_bounds(data, bits):
    scores, labels = data
    exact, stream = rank_pixels(scores, labels), PixelStream(bits)
    for part in np.array_split(np.arange(scores.size), 3):
        stream.update(scores[part], labels[part])
    streamed = stream.ranking()
    assert (streamed.positives, streamed.negatives) == (exact.positives, exact.negatives)
    for value, truth, (low, high) in (
            (streamed.auroc(), exact.auroc(), streamed.auroc_bounds()),
            (streamed.average_precision(), exact.average_precision(), streamed.average_precision_bounds()),
            (streamed.f_max().value, exact.f_max().value, streamed.f_max_bounds())):
        assert low - 1e-12 <= truth <= high + 1e-12 and low - 1e-12 <= value <= high + 1e-12
    assert abs(streamed.auroc() - exact.auroc()) <= (streamed.auroc_bounds()[1] - streamed.auroc_bounds()[0]) / 2 + 1e-12


def test_bounds_are_tight_enough_to_be_of_use():
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.02
    scores = np.exp(rng.standard_normal(labels.size) + 1.5 * labels).astype(np.float32)
    stream = PixelStream()
    stream.update(scores, labels)
    for low, high in (stream.ranking().auroc_bounds(), stream.ranking().average_precision_bounds(), stream.ranking().f_max_bounds()):
        assert high - low < 1e-3


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, 2, elements=st.floats(width=32, allow_nan=False)), st.integers(10, 22))
def test_bins_keep_the_order_and_begin_at_their_start(pair, bits):
    low, high = pixel.bin_index(np.sort(pair), bits).astype(np.int64)
    assert low <= high < 1 << bits
    start, following = pixel.bin_start(np.array([high, min(high + 1, (1 << bits) - 1)]), bits)
    assert start <= pair.max()
    assert pair.max() < following or following == start or not np.isfinite(pair.max())


def test_scores_that_differ_enough_never_share_a_bin():
    scores = np.float32(0.01) * np.float32(1 + 1.01 / 4096) ** np.arange(2000, dtype=np.float32)
    assert np.unique(pixel.bin_index(scores, 21)).size == scores.size
    assert np.ptp(pixel.bin_index(np.array([-0.0, 0.0]), 22)) == 0


# Counts


@st.composite
def classified(draw):
    images, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    element = st.integers(0, classes - 1)
    shape = (images, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    return draw(hnp.arrays(np.uint8, shape, elements=element)), draw(hnp.arrays(np.uint8, shape, elements=element)), classes


@settings(max_examples=100, deadline=None)
@given(classified())
def test_ratios_and_averages_equal_scikit_learn(data):
    prediction, truth, classes = data
    names = list(range(classes))
    counts = pixel.count_classes(prediction, truth, classes)
    matrix = sum(pixel.confusion_matrix(*pair, classes) for pair in zip(prediction, truth, strict=True))
    assert np.array_equal(matrix, sk.confusion_matrix(truth.ravel(), prediction.ravel(), labels=names))
    ratios = {Counts.tpr: sk.recall_score, Counts.precision: sk.precision_score, Counts.dice: sk.f1_score, Counts.iou: sk.jaccard_score,
              lambda c: c.f_beta(2.0): lambda *a, **k: sk.fbeta_score(*a, beta=2.0, **k)}
    for ours, theirs in ratios.items():
        # jaccard_score knows no NaN for 0/0, so absent classes are filled in by hand
        defined = ~np.isnan(ours(counts.sum()))
        expected = theirs(truth.ravel(), prediction.ravel(), labels=names, average=None, zero_division=0)
        np.testing.assert_allclose(ours(counts.sum())[defined], expected[defined], atol=1e-12)
        for how in ("micro", "macro"):
            value = pixel.average(counts, ours, how)
            wanted = theirs(truth.ravel(), prediction.ravel(), labels=names, average="micro", zero_division=0) if how == "micro" \
                else expected[defined].mean()
            assert abs(value.value - wanted) < 1e-12
        assert pixel.average(counts, ours, "macro").undefined == (~defined).sum()
        cells = ours(counts)
        assert pixel.average(counts, ours, "image").undefined == np.isnan(cells).sum()
        assert abs(pixel.average(counts, ours, "image").value - np.nanmean(cells)) < 1e-12


@settings(max_examples=60, deadline=None)
@given(classified())
def test_counts_add_up_over_images(data):
    prediction, truth, classes = data
    each = [pixel.counts_of(pixel.confusion_matrix(*pair, classes)) for pair in zip(prediction, truth, strict=True)]
    running = each[0]
    for one in each[1:]:
        running = running + one
    whole = pixel.counts_of(pixel.confusion_matrix(prediction, truth, classes))
    stacked = Counts.stack(each).sum()
    for name in ("tp", "fp", "fn", "tn"):
        assert np.array_equal(getattr(running, name), getattr(whole, name)) and np.array_equal(getattr(stacked, name), getattr(whole, name))
    total = whole.tp + whole.fp + whole.fn + whole.tn
    assert (total == truth.size).all()


def test_zero_over_zero_is_left_out_and_counted():
    counts = pixel.count_classes(np.zeros((3, 2, 2), int), np.zeros((3, 2, 2), int), 2)[:, 1:]
    assert np.isnan(counts.dice()).all() and np.isnan(counts.tpr()).all() and (counts.fpr() == 0).all()
    value, undefined, cells = pixel.average(counts, Counts.dice, "image")
    assert np.isnan(value) and (undefined, cells) == (3, 3)
    assert np.isnan(pixel.iou(np.zeros(4), np.zeros(4))) and pixel.iou([1, 1, 0], [0, 5, 0]) == 0.5
    assert pixel.dice(np.array([0, 3]), np.array([0, 1])) == 1.0


def test_rates_at_a_threshold():
    maps, masks = np.array([[[0.1, 0.9], [0.5, 0.2]]]), np.array([[[0, 1], [0, 2]]])
    counts = pixel.count_at(maps, masks, 0.5).sum()
    assert counts.fpr()[0] == 0.5 and counts.fnr()[0] == 0.5
    assert pixel.mean_iou(pixel.count_classes([[0, 1, 1]], [[0, 0, 1]], 3)) == (0.5, 1, 3)


@pytest.mark.parametrize("prediction, truth", [([0, 3], [0, 1]), ([0, -1], [0, 1]), ([0.5, 1.0], [0, 1]), ([0, 1, 1], [0, 1])])
def test_confusion_refuses_what_is_no_class(prediction, truth):
    with pytest.raises(ParameterError):
        pixel.confusion_matrix(np.array(prediction), np.array(truth), 2)


def test_unknown_averages_are_refused():
    with pytest.raises(ParameterError, match="micro, macro or image"):
        pixel.average(pixel.count_classes([[0]], [[0]], 2), Counts.iou, "weighted")
    with pytest.raises(ParameterError, match="pixels, images or each"):
        pixel.dice_oracle([np.eye(2)], [np.eye(2)], "best")


# Thresholds


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32).map(lambda x: np.float32(round(x, 1)))),
       st.floats(0.01, 1))
def test_normal_quantile_threshold_keeps_its_promise_and_is_the_smallest(scores, quantile):
    threshold = pixel.normal_quantile_threshold(scores, quantile)
    share = np.mean(scores >= np.float32(threshold))
    assert share <= 1 - quantile + 1e-6
    below = np.nextafter(np.float32(threshold), np.float32(-np.inf))
    assert np.mean(scores >= below) > 1 - quantile - 1e-6


def test_thresholds_without_data_say_what_to_do():
    with pytest.raises(DataError, match="normal_quantile_threshold"):
        pixel.synthetic_defect_threshold(np.arange(4.0), np.zeros(4))
    with pytest.raises(DataError, match="hold out"):
        pixel.normal_quantile_threshold([], 0.99)
    with pytest.raises(ParameterError, match="outside"):
        pixel.normal_quantile_threshold(np.arange(4.0), 99)
    with pytest.raises(ParameterError, match="NaN"):
        pixel.normal_quantile_threshold(np.array([1, np.nan]))
    assert pixel.synthetic_defect_threshold(np.array([0.1, 0.7, 0.9, 0.8]), np.array([0, 0, 1, 1])) == 0.8
    maps = [np.zeros((2, 2)), np.ones((3, 1))]
    assert pixel.normal_quantile_threshold(maps, 0.5) == np.nextafter(0.0, 1)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int8, (3, 3, 4), elements=st.integers(0, 5)), hnp.arrays(np.uint8, (3, 3, 4), elements=st.integers(0, 1)))
def test_best_dice_equals_brute_force(maps, masks):
    masks[0, 0, 0] = 1
    defective = [index for index in range(3) if masks[index].any()]
    table = np.array([[pixel.dice(maps[index] >= threshold, masks[index]) for index in defective] for threshold in range(6)])
    assert abs(pixel.dice_oracle(maps, masks, "images").value - table.mean(axis=1).max()) < 1e-12
    assert abs(pixel.dice_oracle(maps, masks, "each").value - table.max(axis=0).mean()) < 1e-12
    pooled = max(pixel.dice(maps >= threshold, masks) for threshold in range(6))
    value, threshold = pixel.dice_oracle(maps, masks)
    assert abs(value - pooled) < 1e-12 and abs(pixel.dice(maps >= threshold, masks) - value) < 1e-12


# Masks of another size


def test_masks_are_fitted_by_nearest_neighbour():
    yy, xx = np.mgrid[:1024, :1024]
    mask = np.where((yy - 500) ** 2 + (xx - 501) ** 2 <= 9, 3, 0).astype(np.uint8)  # radius 3: bilinear and floor lose it
    fitted = pixel.fit_masks([mask], [np.zeros((256, 256))])[0]
    assert set(np.unique(fitted)) == {0, 3}
    assert 0.4 < (fitted > 0).sum() * 16 / (mask > 0).sum() < 2.5
    speck = np.zeros((64, 64), np.uint8)
    speck[0, 0] = 1
    with pytest.raises(DataError, match="mask 0"):
        pixel.fit_masks([speck], [np.zeros((8, 8))])
