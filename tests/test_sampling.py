"""Patch sampling: counts against slicing, every balanced set against its own rule, malformed input by name."""
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.foil import FOIL_CLASSES, Foils
from defectbook.data.sampling import (
    PatchStream,
    candidate_windows,
    choose_binary_balanced,
    choose_equal_pixels,
    choose_equal_samples,
    choose_oversampled,
    choose_uniform,
    crop_roi,
    cut_patches,
    index_mask,
    seen_share,
    split_rows,
    split_samples,
    window_counts,
)

COLOURS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 165, 0)]


@pytest.fixture(scope="module")
def masks():
    foils = Foils(count=10, size=(800, 800), seed=11)
    return [foils.truth(i)[split_rows(800)[0]] for i in range(10)]


@pytest.fixture(scope="module")
def candidates(masks):
    return candidate_windows(masks, FOIL_CLASSES, np.random.default_rng(0), spacing=16)


# --- crop, colours, split -------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 30), width=st.integers(1, 30))
def test_colours_round_trip(seed, height, width):
    mask = np.random.default_rng(seed).integers(0, 5, (height, width)).astype(np.uint8)
    assert (index_mask(np.uint8(COLOURS)[mask], COLOURS) == mask).all()


def test_unknown_colours_are_listed_with_their_counts():
    label = np.uint8(COLOURS)[np.zeros((4, 5), int)]
    label[0, :3], label[1, 0] = (9, 8, 7), (254, 0, 0)
    with pytest.raises(DataError) as error:
        index_mask(label, COLOURS, "foil_03.png")
    assert "foil_03.png: 4 pixels" in str(error.value) and "(9, 8, 7) x 3" in str(error.value) and "(254, 0, 0) x 1" in str(error.value)
    many = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    with pytest.raises(DataError, match=r"and \d+ more"):
        index_mask(many, COLOURS)
    with pytest.raises(ParameterError, match="share a colour"):
        index_mask(label, [(0, 0, 0), (0, 0, 0)])
    with pytest.raises(DataError, match="shape"):
        index_mask(np.zeros((4, 4), np.uint8), COLOURS)


def test_roi():
    array = np.arange(20).reshape(4, 5)
    assert crop_roi(array, (1, 2, 2, 3)).tolist() == [[7, 8, 9], [12, 13, 14]]
    for roi in ((-1, 0, 2, 2), (3, 0, 2, 2), (0, 4, 1, 2), (0, 0, 0, 2)):
        with pytest.raises(DataError, match="foil_01"):
            crop_roi(array, roi, "foil_01")


@settings(max_examples=50, deadline=None)
@given(height=st.integers(2, 3000), share=st.floats(0.05, 0.95), region=st.sampled_from(("top", "bottom")))
def test_split_is_a_partition(height, share, region):
    rows = np.arange(height)
    try:
        train, validation = (rows[part] for part in split_rows(height, share, region))
    except DataError:
        assert round(share * height) in (0, height)
        return
    assert sorted([*train, *validation]) == rows.tolist() and len(validation) == round(share * height)
    assert (validation[0] == 0) == (region == "top")


def test_split_of_the_thesis_and_bad_splits():
    assert split_rows(1920) == (slice(634, None), slice(0, 634))
    for share, region in ((0, "top"), (1, "top"), (0.3, "left")):
        with pytest.raises(ParameterError):
            split_rows(100, share, region)
    with pytest.raises(DataError):
        split_rows(1, 0.33)


def test_split_samples_stay_lazy_and_join_again():
    foils = Foils(count=2, size=(120, 100), seed=0)
    train, validation = split_samples(foils)
    assert (np.concatenate([validation[1].image, train[1].image]) == foils[1].image).all()
    assert (np.concatenate([validation[1].mask, train[1].mask]) == foils[1].mask).all()
    assert train[0].name == "foil_00/training" and train[0].meta["rows"] == ("training", 0.33, "top")
    unmarked = split_samples([Sample(np.zeros((9, 9, 3), np.uint8), label=1, name="odd")])[0][0]
    with pytest.raises(DataError, match="odd"):
        unmarked.mask  # noqa: B018


# --- candidates -----------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(8, 60), width=st.integers(8, 60), size=st.integers(1, 8), spacing=st.integers(1, 12))
def test_counts_against_slicing(seed, height, width, size, spacing):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 4, (height, width)).astype(np.uint8)
    found = candidate_windows([mask], "abcd", rng, size, spacing)
    for (_, top, left), counts in zip(found.windows[::7], found.counts[::7], strict=True):
        assert 0 <= top <= height - size and 0 <= left <= width - size
        assert (np.bincount(mask[top:top + size, left:left + size].ravel(), minlength=4) == counts).all()


def test_every_position_is_equally_likely():
    tops = np.concatenate([candidate_windows([np.zeros((20, 9), np.uint8)], "ab", np.random.default_rng(seed), 9, 5).windows[:, 1]
                           for seed in range(3000)])
    share = np.bincount(tops, minlength=12) / len(tops)
    assert np.abs(share - 1 / 12).max() < 0.015


def test_patch_as_large_as_the_region_and_larger():
    mask = np.zeros((30, 40), np.uint8)
    assert candidate_windows([mask], "ab", np.random.default_rng(0), 30).windows[:, 1].max() == 0
    with pytest.raises(DataError, match="31x31 px is larger than the region of 40x30"):
        candidate_windows([mask], "ab", np.random.default_rng(0), 31)
    with pytest.raises(DataError, match="no masks"):
        candidate_windows([], "ab", np.random.default_rng(0))


def test_unknown_mask_values_are_listed():
    mask = np.zeros((30, 30), np.uint8)
    mask[0, :4], mask[1, 0] = 7, 255
    with pytest.raises(DataError, match="mask 1: .* 7 x 4, 255 x 1"):
        candidate_windows([np.zeros_like(mask), mask], FOIL_CLASSES, np.random.default_rng(0), 10)


def test_window_counts_at_the_corners():
    mask = np.ones((5, 6), np.uint8)
    assert window_counts(mask, np.array([0, 2]), np.array([0, 3]), 3, 2).tolist() == [[0, 9], [0, 9]]


# --- the sets -------------------------------------------------------------------------------------------------------

def test_uniform_has_no_repeats_until_it_must(candidates):
    number = len(candidates.windows)
    chosen = choose_uniform(candidates, number, np.random.default_rng(0))
    assert sorted(chosen) == list(range(number))
    twice = np.bincount(choose_uniform(candidates, number + 5, np.random.default_rng(0)))
    assert twice.min() == 1 and twice.max() == 2


def test_oversampled(candidates):
    for kind in range(1, 5):
        chosen = choose_oversampled(candidates, 200, np.random.default_rng(0), kind)
        assert len(chosen) == 200 and (candidates.counts[chosen, kind] > 0).all()


def test_equal_samples(candidates):
    chosen = choose_equal_samples(candidates, 402, np.random.default_rng(0))
    assert len(chosen) == 402
    for kind, part in zip(range(1, 5), np.split(chosen, [101, 202, 302]), strict=True):
        assert (candidates.counts[part, kind] > 0).all()
    assert (candidates.counts[choose_equal_samples(candidates, 50, np.random.default_rng(0), kinds=[3]), 3] > 0).all()


def test_binary_balanced(candidates):
    for kind in (1, 3):
        chosen = choose_binary_balanced(candidates, 101, np.random.default_rng(0), kind)
        assert (candidates.counts[chosen, kind] > 0).sum() == 51


@pytest.mark.parametrize("count", (40, 150, 300))
@pytest.mark.parametrize("seed", (0, 1))
def test_equal_pixels(masks, count, seed):
    rng = np.random.default_rng(seed)
    candidates = candidate_windows(masks, FOIL_CLASSES, rng, spacing=16)
    chosen = choose_equal_pixels(candidates, count, rng)
    sums = candidates.counts[chosen, 1:].sum(0)
    assert len(chosen) == count == len(set(chosen.tolist())) and sums.min() > 0
    assert sums.max() - sums.min() <= 0.1 * sums.max()
    assert candidates.counts[chosen, 1:].any(1).all()


def test_equal_pixels_is_repeatable_and_options_hold(candidates):
    first = choose_equal_pixels(candidates, 100, np.random.default_rng(3))
    assert (first == choose_equal_pixels(candidates, 100, np.random.default_rng(3))).all()
    loose = choose_equal_pixels(candidates, 100, np.random.default_rng(3), repeats=3)
    assert np.bincount(loose).max() <= 3 and candidates.counts[loose, 1:].sum() >= 0.9 * candidates.counts[first, 1:].sum()
    pair = choose_equal_pixels(candidates, 100, np.random.default_rng(3), kinds=[1, 2], tolerance=0.02)
    sums = candidates.counts[pair][:, [1, 2]].sum(0)
    assert sums.max() - sums.min() <= 0.02 * sums.max()


def test_equal_pixels_is_close_to_the_best_on_a_small_case():
    """Against trying all subsets: as equal as asked, and not far from the largest sum that any such subset has."""
    import itertools

    rng = np.random.default_rng(2)
    mask = rng.choice(3, (40, 40), p=(0.8, 0.14, 0.06)).astype(np.uint8)
    candidates = candidate_windows([mask], "abc", rng, 6, 9)
    assert len(candidates.windows) == 16
    subsets = np.array(list(itertools.combinations(range(16), 6)))
    sums = candidates.counts[:, 1:][subsets].sum(1)
    feasible = sums[(sums.max(1) - sums.min(1)) <= 0.1 * sums.max(1)]
    assert len(feasible)
    chosen = candidates.counts[choose_equal_pixels(candidates, 6, rng), 1:].sum(0)
    assert chosen.max() - chosen.min() <= 0.1 * chosen.max() and chosen.max() >= 0.8 * feasible.max()


def test_a_class_in_no_patch_is_said_and_not_searched_for(masks):
    without = [np.where(mask == 3, 0, mask).astype(np.uint8) for mask in masks]
    candidates = candidate_windows(without, FOIL_CLASSES, np.random.default_rng(0), spacing=64)
    rng = np.random.default_rng(0)
    for choose in (choose_equal_pixels, choose_equal_samples, partial(choose_oversampled, kind=3), partial(choose_binary_balanced, kind=3)):
        with pytest.raises(DataError, match=r"class 3 \(cavity\) occurs in none"):
            choose(candidates, 40, rng)
    assert len(choose_equal_samples(candidates, 40, rng, kinds=[1, 2, 4])) == 40


def test_impossible_equality_is_an_error():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32], mask[5, 40] = 1, 2  # windows of 16 hold at most one pixel of class 2
    candidates = candidate_windows([mask], "abc", np.random.default_rng(0), 16, 4)
    with pytest.raises(DataError, match="found no 60 of"):
        choose_equal_pixels(candidates, 60, np.random.default_rng(0))
    with pytest.raises(ParameterError):
        choose_equal_pixels(candidates, 60, np.random.default_rng(0), tolerance=0)
    with pytest.raises(ParameterError, match="class 9"):
        choose_oversampled(candidates, 5, np.random.default_rng(0), kind=9)


def test_class_in_every_window():
    candidates = candidate_windows([np.ones((20, 20), np.uint8)], "ab", np.random.default_rng(0), 8, 4)
    with pytest.raises(DataError, match="every window"):
        choose_binary_balanced(candidates, 10, np.random.default_rng(0), kind=1)


# --- cutting and streaming ------------------------------------------------------------------------------------------

def test_seen_share_by_hand():
    mask = np.zeros((4, 6), np.uint8)
    mask[0, 0] = mask[3, 5] = 1
    share = seen_share([mask], np.array([[0, 0, 0], [0, 1, 1]]), 2, 3)
    assert np.isclose(share[0], 6 / 22) and share[1] == 0.5 and np.isnan(share[2])


def test_stream_refreshes_and_repeats(masks):
    images = [np.dstack([mask * 60] * 3) for mask in masks]
    stream = PatchStream(images, masks, FOIL_CLASSES, choose_equal_samples, batch=4, refresh=3, size=128, spacing=32, seed=5)
    batches = [batch for batch, _ in zip(stream, range(6), strict=False)]
    for image, mask in batches:
        assert image.shape == (4, 128, 128, 3) and mask.shape == (4, 128, 128) and (image[..., 0] == mask * 60).all()
    again = PatchStream(images, masks, FOIL_CLASSES, choose_equal_samples, batch=4, refresh=3, size=128, spacing=32, seed=5)
    assert all((a[0] == b[0]).all() for a, b in zip(batches, again, strict=False))
    assert (stream.windows(0) != stream.windows(1)).any() and len(stream.windows(0)) == 12
    assert (cut_patches(masks, stream.windows(0)[:4], 128) == batches[0][1]).all()


def test_stream_checks_its_input(masks):
    images = [np.zeros((*mask.shape, 3), np.uint8) for mask in masks]
    with pytest.raises(DataError, match="10 images but 9 masks"):
        PatchStream(images, masks[:-1], FOIL_CLASSES)
    with pytest.raises(DataError, match="item 0"):
        PatchStream([images[0][:-1], *images[1:]], masks, FOIL_CLASSES)
    with pytest.raises(ParameterError):
        PatchStream(images, masks, FOIL_CLASSES, refresh=0)
