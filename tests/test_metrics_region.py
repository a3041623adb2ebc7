"""Region metrics against a slow reference that follows the definition to the letter."""


import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from benchmarks.timing import peak_of
from defectbook.core import ParameterError
from defectbook.metrics import region
from defectbook.metrics.pixel import auroc
from defectbook.metrics.region import RegionStream, aupro, find_regions, rank_regions


def slow_curve(maps, masks):
    """(fpr, pro) at every distinct score, one region at a time."""
    labels = [ndimage.label(mask != 0, np.ones((3, 3)))[0] for mask in masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([np.ravel(one) for one in maps]))[::-1]:
        overlaps = [np.mean(one[label == index] >= threshold)
                    for one, label in zip(maps, labels, strict=True) for index in range(1, label.max() + 1)]
        alarms = np.concatenate([one[mask == 0] >= threshold for one, mask in zip(maps, masks, strict=True)])
        points.append((np.mean(alarms), np.mean(overlaps)))
    return np.array(points).T


def slow_aupro(maps, masks, limit):
    fpr, pro = slow_curve(maps, masks)
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x0 < limit:
            end = min(x1, limit)
            top = y1 if x1 <= limit else y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (end - x0) * (y0 + top) / 2
    return area / limit


@st.composite
def small_sets(draw):
    """One to three small maps with ties or without, masks with regions that touch at corners, and both classes somewhere."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 6)), draw(st.integers(2, 6)))
    if draw(st.booleans()):
        maps = draw(hnp.arrays(np.int16, shape, elements=st.integers(0, 5)))
    else:
        maps = draw(hnp.arrays(np.float32, shape, elements=st.floats(-10, 10, width=32)))
    masks = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2)))
    assume(masks.any() and not masks.all())
    return maps, masks


LIMITS = st.one_of(st.sampled_from([0.05, 0.3, 1.0]), st.floats(0.01, 1))


@settings(max_examples=200, deadline=None)
@given(small_sets(), LIMITS)
def test_aupro_equals_the_slow_reference(data, limit):
    maps, masks = data
    value = aupro(maps, masks, limit)
    assert abs(value - slow_aupro(maps, masks, limit)) < 1e-12
    assert 0 <= value <= 1
    low, high = rank_regions(maps, masks).aupro_bounds(limit)
    assert low - 1e-12 <= value <= high + 1e-12


@settings(max_examples=100, deadline=None)
@given(small_sets(), LIMITS)
def test_the_curve_has_the_points_of_the_slow_one_and_the_area_of_the_metric(data, limit):
    maps, masks = data
    ranking = rank_regions(maps, masks)
    curve = region.pro_curve(ranking)
    fpr, pro = slow_curve(maps, masks)
    for x, y in zip(curve.x, curve.y, strict=True):
        assert np.min(np.abs(fpr - x) + np.abs(pro - y)) < 1e-12
    cut = region.pro_curve(ranking, limit)
    assert abs(np.sum(np.diff(cut.x) * (cut.y[1:] + cut.y[:-1]) / 2) / limit - ranking.aupro(limit)) < 1e-12
    assert cut.x.max() <= limit and cut.y.max() <= 1 and (np.diff(cut.y) >= 0).all()


def test_toy_values():
    mask = np.array([[1, 1, 0, 0, 0]])
    assert aupro([np.array([[5, 4, 3, 2, 1.0]])], [mask]) == 1.0
    assert aupro([np.zeros((1, 5))], [mask]) == pytest.approx(0.15)  # the diagonal up to 0.3
    assert aupro([np.array([[1, 2, 3, 4, 5.0]])], [mask]) == 0.0
    half = np.array([[9, 0, 1, 2, 3.0]])  # one of two pixels on top, the other at the bottom
    assert aupro([half], [mask]) == pytest.approx(0.5)
    assert aupro([half], [mask], 1.0) == pytest.approx(0.5)


def test_regions_of_one_size_make_aupro_the_pixel_auroc():
    rng = np.random.default_rng(0)
    masks = np.kron(rng.random((4, 5, 5)) < 0.3, np.pad(np.ones((3, 3)), ((0, 2), (0, 2)))[None]).astype(np.uint8)
    maps = np.round(rng.standard_normal(masks.shape) + masks, 1)
    assert aupro(maps, masks, 1.0) == pytest.approx(auroc(maps, masks), abs=1e-12)


def test_pixels_that_touch_at_a_corner_are_one_region():
    regions = find_regions([np.zeros((4, 4)), np.zeros((4, 4))], [np.eye(4), np.diag([1, 0, 0, 1])])
    assert regions.areas.tolist() == [4, 1, 1] and regions.images.tolist() == [0, 1, 1]


def test_a_ring_is_measured_without_its_hole():
    mask = np.ones((5, 5), np.uint8)
    mask[1:4, 1:4] = 0
    padded = np.pad(mask, 3)
    regions = find_regions([padded.astype(float)], [padded])
    assert regions.areas.tolist() == [16] and regions.overlaps(0.5).tolist() == [1.0]
    assert aupro([padded.astype(float)], [padded]) == 1.0


def test_never_above_one():
    rng = np.random.default_rng(0)
    for seed in range(20):
        masks = (np.random.default_rng(seed).random((3, 40, 40)) < 0.2).astype(np.uint8)  # hundreds of regions of odd areas
        value = aupro(masks + rng.random(masks.shape) * 0.5, masks)
        assert value <= 1 and value == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(small_sets())
def test_a_monotone_heavy_tailed_transform_changes_nothing(data):
    maps, masks = data
    distinct = np.unique(maps)
    heavy = np.cumsum(np.exp(np.exp(np.linspace(0, 3, distinct.size))))[np.searchsorted(distinct, maps)]
    one, other = rank_regions(maps, masks), rank_regions(heavy, masks)
    for limit in (0.05, 0.3, 1.0):
        assert one.aupro(limit) == other.aupro(limit)
    assert np.array_equal(region.pro_curve(one)[:2], region.pro_curve(other)[:2])


@pytest.mark.parametrize("mask", [np.zeros((3, 3)), np.ones((3, 3))])
def test_one_class_is_nan(mask):
    scores = np.arange(9.0).reshape(3, 3)
    assert np.isnan(aupro([scores], [mask]))
    with pytest.raises(ParameterError, match="at least one"):
        region.pro_curve(rank_regions([scores], [mask]))
    stream = RegionStream(10)
    assert np.isnan(stream.ranking().aupro())
    stream.update(scores, mask)
    assert np.isnan(stream.ranking().aupro())


@pytest.mark.parametrize("limit", [0, -0.1, 1.5, np.nan])
def test_limits_outside_are_refused(limit):
    with pytest.raises(ParameterError, match="limit"):
        aupro([np.eye(3)], [np.eye(3)], limit)


def test_malformed_input_is_named():
    with pytest.raises(ParameterError, match="NaN"):
        aupro([np.array([[np.nan, 1]])], [np.array([[0, 1]])])
    with pytest.raises(ParameterError, match="NaN"):
        aupro([np.array([[np.nan, 1]])], [np.array([[1, 0]])])
    with pytest.raises(ParameterError, match="map 1"):
        aupro([np.eye(3), np.eye(4)], [np.eye(3), np.eye(3)])
    with pytest.raises(ParameterError, match="2 maps but 1 masks"):
        aupro([np.eye(3), np.eye(3)], [np.eye(3)])
    with pytest.raises(ParameterError, match=r"\(H, W\)"):
        aupro([np.ones((2, 2, 1))], [np.ones((2, 2, 1))])


@settings(max_examples=100, deadline=None)
@given(small_sets(), st.integers(10, 22), LIMITS)
def test_streamed_and_exact_values_lie_within_the_promised_bounds(data, bits, limit):
    maps, masks = data
    stream = RegionStream(bits)
    for one, mask in zip(maps, masks, strict=True):
        stream.update(one, mask)
    streamed, exact = stream.ranking(), rank_regions(maps, masks)
    low, high = streamed.aupro_bounds(limit)
    assert low - 1e-12 <= exact.aupro(limit) <= high + 1e-12 and low - 1e-12 <= streamed.aupro(limit) <= high + 1e-12
    assert streamed.weights.sum() == pytest.approx(1)
    if maps.dtype == np.int16 and bits >= 12:  # then the numbers 0 to 5 have bins of their own
        assert abs(streamed.aupro(limit) - exact.aupro(limit)) < 1e-12


def test_memory_of_exact_and_streamed_aupro():
    rng = np.random.default_rng(0)
    masks = np.zeros((64, 256, 256), np.uint8)
    masks[::2, 40:90, 40:90] = 1
    maps = rng.standard_normal(masks.shape).astype(np.float32) + masks
    assert peak_of(lambda: rank_regions(maps, masks).aupro()) < 6 * maps.nbytes

    def stream(images: int) -> None:
        stream = RegionStream()
        for one, mask in zip(maps[:images], masks[:images], strict=True):
            stream.update(one, mask)
        stream.ranking().aupro_bounds()

    few, many = peak_of(lambda: stream(4)), peak_of(lambda: stream(64))
    assert many < 200e6 and many < 1.1 * few


def test_recall_by_size():
    mask = np.zeros((12, 12), np.uint8)
    mask[0, 0] = mask[2, 2:6] = 1  # areas 1 and 4
    mask[5:9, 5:9] = 2  # area 16
    scores = np.zeros(mask.shape)
    scores[2, 2:4] = scores[5:9, 5:9] = 1
    regions = find_regions([scores], [mask])
    sizes = region.recall_by_size(regions, 0.5, edges=(1, 4, 16, 17, 100))
    assert sizes.regions.tolist() == [1, 1, 1, 0]
    assert sizes.overlap[:3].tolist() == [0, 0.5, 1] and np.isnan(sizes.overlap[3]) and np.isnan(sizes.found[3])
    assert sizes.found[:3].tolist() == [0, 1, 1]
    assert region.recall_by_size(regions, 0.5, edges=(1, 4, 16, 17), min_overlap=0.5).found.tolist() == [0, 0, 1]
    assert region.recall_by_size(regions, 0.5, edges=(2, 10)).regions.tolist() == [1]
    with pytest.raises(ParameterError, match="ascending"):
        region.recall_by_size(regions, 0.5, edges=(4, 1))
