"""Thresholds by cross-validation: each figure against its slow definition, who wins, and what is refused."""

import inspect

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, generator
from defectbook.metrics.pixel import dice, dice_oracle
from defectbook.practice.thresholds import Tuned, dice_each, false_alarm_area, rescale_each, tune


def draw(count: int, seed: int, levels: int = 6, side: int = 6, empty: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps of few grey values, with ties, that lean towards their masks; sides differ."""
    rng, maps, masks = generator(seed), [], []
    for _ in range(count):
        shape = tuple(rng.integers(2, side + 1, 2))
        mask = (rng.random(shape) < 0.3).astype(np.uint8)
        mask.flat[0] = 1
        mask *= rng.random() >= empty
        maps.append((rng.integers(0, levels, shape) + 2 * mask * (rng.random(shape) < 0.5)).astype(np.float32) / levels)
        masks.append(mask)
    return maps, masks


def leaning(masks, seed: int) -> list[np.ndarray]:
    rng = generator(seed, "maps")
    return [(rng.integers(0, 5, mask.shape) + mask).astype(np.float32) for mask in masks]


def best_by_hand(maps, masks) -> tuple[float, float]:
    """The best mean Dice of one threshold, and the lowest threshold that reaches it, over all values that occur."""
    values = np.unique(np.concatenate([np.ravel(found) for found in maps]))
    quality = [np.mean([dice(found >= value, mask) for found, mask in zip(maps, masks, strict=True)]) for value in values]
    return float(np.max(quality)), float(values[np.argmax(quality)])


# figures

@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(-0.2, 1.5), st.integers(1, 255))
def test_dice_of_each_image_is_the_dice_of_two_masks(count, seed, threshold, value):
    maps, masks = draw(count, seed, empty=0.4)
    found = dice_each(maps, [value * mask for mask in masks], threshold)
    expected = [dice(each >= threshold, mask) for each, mask in zip(maps, masks, strict=True) if mask.any()]
    assert found.dtype == np.float64 and found.shape == (len(expected),)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_threshold_itself_counts_as_a_defect():
    maps, masks = [np.array([[0.25, 0.5], [0.75, 1.0]], np.float32)], [np.array([[0, 0], [1, 1]], np.uint8)]
    assert dice_each(maps, masks, 0.75)[0] == 1 and dice_each(maps, masks, np.nextafter(0.75, 1))[0] == pytest.approx(2 / 3)
    assert dice_each(maps, masks, 2.0)[0] == 0 and dice_each(maps, [0 * masks[0]], 0.5).size == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(-0.2, 1.5))
def test_false_alarms_are_counted_in_sound_images_only(count, seed, threshold):
    maps, masks = draw(count, seed, empty=0.5)
    shares = [np.count_nonzero(found >= threshold) / found.size for found, mask in zip(maps, masks, strict=True) if not mask.any()]
    found = false_alarm_area(maps, masks, threshold)
    assert np.isnan(found) if not shares else found == pytest.approx(np.mean(shares))


def test_maps_without_masks_are_refused():
    maps, masks = draw(3, 0)
    for function in (dice_each, false_alarm_area):
        with pytest.raises(ValueError):
            function(maps, masks[:2], 0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_rescaled_maps_lie_between_0_and_1_whatever_their_unit(count, seed, shift, scale):
    maps, _ = draw(count, seed)
    others = rescale_each([scale * found.astype(np.float64) + shift for found in maps])
    for found, again, moved in zip(maps, rescale_each(maps), others, strict=True):
        assert again.shape == found.shape and np.isfinite(again).all()
        if np.ptp(found):
            assert again.min() == 0 and again.max() == 1 and (np.diff(again.ravel()[np.argsort(found, axis=None)]) >= 0).all()
            np.testing.assert_allclose(moved, again, atol=1e-4)
        else:
            assert not again.any()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e30])
def test_a_constant_map_becomes_zero(value):
    (found,) = rescale_each([np.full((3, 4), value, np.float32)])
    assert not found.any() and found.shape == (3, 4)


# tuning

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(2, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_tuning_is_the_double_loop_over_folds_and_thresholds(images, folds, count, seed):
    assume(folds <= images)
    _, masks = draw(images, seed)
    candidates = {name: leaning(masks, seed + name) for name in range(count)}
    tuned = tune(candidates, masks, folds, seed)
    assert list(tuned.table.columns) == ["candidate", "fold", "images", "dice", "threshold"] and len(tuned.table) == count * folds
    parts = np.array_split(generator(seed, "folds").permutation(images), folds)
    means = {}
    for name, maps in candidates.items():
        rows, total = tuned.table[tuned.table.candidate == name], 0.0
        assert rows.fold.tolist() == list(range(folds)) and rows.images.tolist() == [len(part) for part in parts]
        for part, row in zip(parts, rows.itertuples(), strict=True):
            rest = [i for i in range(images) if i not in part]
            quality, threshold = best_by_hand([maps[i] for i in rest], [masks[i] for i in rest])
            assert row.threshold == pytest.approx(threshold)
            assert np.mean([dice(maps[i] >= row.threshold, masks[i]) for i in rest]) == pytest.approx(quality)
            held_out = [dice(maps[i] >= threshold, masks[i]) for i in part]
            assert row.dice == pytest.approx(np.mean(held_out))
            total += sum(held_out)
        means[name] = total / images
    assert means[tuned.choice] == pytest.approx(max(means.values())) and tuned.dice == pytest.approx(max(means.values()))
    quality, threshold = best_by_hand(candidates[tuned.choice], masks)
    assert tuned.threshold == pytest.approx(threshold)
    assert dice_each(candidates[tuned.choice], masks, tuned.threshold).mean() == pytest.approx(quality)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 20), st.integers(2, 6), st.integers(0, 10**6))
def test_every_image_is_judged_once_and_folds_are_even(images, folds, seed):
    assume(folds <= images)
    maps, masks = draw(images, seed)
    sizes = tune({"only": maps}, masks, folds, seed).table.images
    assert sizes.sum() == images and sizes.max() - sizes.min() <= 1


def test_the_better_candidate_wins_and_ties_go_to_the_first():
    maps, masks = draw(8, 3)
    perfect = [mask.astype(np.float32) for mask in masks]
    tuned = tune({"noise": maps, 0.1: perfect, ("a", 2): perfect}, masks, 4)
    assert tuned.choice == 0.1 and tuned.dice == 1 and tuned.threshold == 1
    assert tune({("a", 2): perfect, 0.1: perfect}, masks, 4).choice == ("a", 2)
    assert tune({("a", 2): perfect, 0.1: perfect}, masks, 4).dice == 1


def test_folds_depend_on_the_seed_alone():
    maps, masks = draw(9, 1)
    one, two, three = (tune({"a": maps, "b": maps}, masks, 3, seed) for seed in (0, 0, 5))
    assert one.table.equals(two.table) and not one.table.equals(three.table)
    assert one.table.dice[:3].tolist() == one.table.dice[3:].tolist(), "all candidates see the same folds"
    assert one.threshold == three.threshold == dice_oracle(maps, masks, "images").threshold


def test_tuning_has_no_way_to_see_the_test():
    assert list(inspect.signature(tune).parameters) == ["candidates", "masks", "folds", "seed"]
    assert list(Tuned.__dataclass_fields__) == ["choice", "threshold", "table"]
    maps, masks = draw(6, 2)
    before = [found.copy() for found in maps]
    tune({"a": maps}, masks, 2)
    assert all((one == two).all() for one, two in zip(before, maps, strict=True))


def test_bad_candidates_folds_and_images_are_named():
    maps, masks = draw(4, 0)
    broken = [maps[0] * np.nan, *maps[1:]]
    for change, kind, match in (
            ({"candidates": {}}, ParameterError, "0 candidates and 2 folds"), ({"folds": 1}, ParameterError, "1 candidates and 1 folds"),
            ({"folds": 5}, DataError, "4 tuning images for 5 folds"), ({"masks": [0 * masks[0], *masks[1:]]}, DataError, "1 without a defect"),
            ({"masks": []}, DataError, "0 tuning images"), ({"candidates": {"a": maps[:3]}}, DataError, "candidate 'a': 3 maps for 4 masks"),
            ({"candidates": {1e-4: broken}}, DataError, "candidate 0.0001: 4 maps for 4 masks, or maps with NaN")):
        with pytest.raises(kind, match=match) as error:
            tune(**{"candidates": {"a": maps}, "masks": masks, "folds": 2, **change})
        assert "\n" not in str(error.value)
