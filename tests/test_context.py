"""Words, positions and neighbourhoods: against loops that say what is meant."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.models.context import Reduction, assign_words, build_mlp, count_positions, fit_neighbourhood, gather_windows, hold_out, window_indices


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.sampled_from((1, 3, 5, 9)), st.integers(0, 10**6))
def test_histogram_is_algorithm_one(images: int, height: int, width: int, side: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, (images, height, width))
    counts = np.zeros((height, width, 5))
    for grid in labels:
        for i in range(height):
            for j in range(width):
                for k in range(max(0, i - side // 2), min(height, i + side // 2 + 1)):
                    for m in range(max(0, j - side // 2), min(width, j + side // 2 + 1)):
                        counts[i, j, grid[k, m]] += 1
    expected = counts / counts.sum(-1, keepdims=True)
    np.testing.assert_allclose(count_positions(labels, 5, side), expected, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from((1, 3, 5)), st.integers(1, 3))
def test_windows_are_gathered_as_a_padded_image_would_be(height: int, width: int, side: int, channels: int) -> None:
    features = np.random.default_rng(0).normal(size=(2, height, width, channels)).astype(np.float32)
    half, middle = side // 2, side * side // 2
    padded = np.pad(features, ((0, 0), (half, half), (half, half), (0, 0)))
    flat = torch.from_numpy(features.reshape(-1, channels))
    rows = torch.arange(2 * height * width)
    found = gather_windows(flat, torch.from_numpy(window_indices(height, width, side)), rows).numpy()
    for row, window in zip(rows.tolist(), found, strict=True):
        image, i, j = row // (height * width), row // width % height, row % width
        expected = np.delete(padded[image, i:i + side, j:j + side].reshape(-1, channels), middle, 0)
        np.testing.assert_array_equal(window, expected.ravel())


def test_gathering_leaves_features_and_windows_as_they_were() -> None:
    flat, windows = torch.ones(9, 2), torch.from_numpy(window_indices(3, 3, 3))
    before = windows.clone()
    gather_windows(flat, windows, torch.arange(9))
    assert torch.equal(windows, before) and (flat == 1).all()


def test_the_public_codes_window_shows_the_middle() -> None:
    right = window_indices(9, 9, 9)
    leaky = window_indices(9, 9, 9, skip=41)
    centre = 4 * 9 + 4
    assert centre not in right[centre] and centre in leaky[centre] and len(leaky[centre]) == 80


def test_reduction_keeps_distances_of_a_subspace_and_passes_all_without_dimensions() -> None:
    rng = np.random.default_rng(0)
    plane = (rng.normal(size=(200, 3)) @ rng.normal(size=(3, 10))).astype(np.float32)
    reduced = Reduction.fit(plane, 3)(plane)
    ratio = np.linalg.norm(plane[:50] - plane[50:100], axis=1) / np.linalg.norm(reduced[:50] - reduced[50:100], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    np.testing.assert_array_equal(Reduction.fit(plane, None)(plane), plane)
    with pytest.raises(ParameterError, match="10 dimensions"):
        Reduction.fit(plane, 11)


@pytest.mark.parametrize(("images", "patches", "share", "unit", "expected"), [
    (10, 4, 0.1, "images", 4), (10, 4, 0.1, "patches", 4), (2, 5, 0.9, "images", 5)])
def test_hold_out(images: int, patches: int, share: float, unit: str, expected: int) -> None:
    held = hold_out(images, patches, share, unit)
    assert held.shape == (images * patches,) and held.sum() == expected


def test_a_single_image_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="more normal images"):
        hold_out(1, 100, 0.1)
    with pytest.raises(ParameterError, match="between 0 and 1"):
        hold_out(5, 100, 1.0)


@pytest.mark.parametrize("side", [0, 2, -3])
def test_sides_are_odd(side: int) -> None:
    with pytest.raises(ParameterError, match="odd"):
        window_indices(3, 3, side)
    with pytest.raises(ParameterError, match="odd"):
        count_positions(np.zeros((1, 3, 3), int), 2, side)


def test_network_learns_a_checkerboard_from_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    phase = rng.integers(0, 2, 30)
    labels = (np.indices((6, 6)).sum(0)[None] + phase[:, None, None]) % 2
    features = (np.eye(2)[labels] + rng.normal(0, 0.05, (30, 6, 6, 2))).astype(np.float32)
    model, history = fit_neighbourhood(features.reshape(-1, 2), (6, 6), labels.ravel(), 2, held=hold_out(30, 36, 0.2), side=3, depth=1, width=16,
                                       epochs=12, batch_size=64, learning_rate=1e-2, temperature=1.0)
    probable = model.probabilities(features[:2])
    assert probable.shape == (2, 6, 6, 2) and np.allclose(probable.sum(-1), 1, atol=1e-5)
    assert (probable.argmax(-1) == labels[:2]).mean() > 0.95 and len(history) == 12


def test_words_of_the_vocabulary_are_their_own() -> None:
    words = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    assert assign_words(words, words, block=7).tolist() == list(range(20))


def test_mlp_without_hidden_layers_is_linear() -> None:
    assert [type(layer).__name__ for layer in build_mlp(4, 3, depth=0)] == ["Linear"]


def test_a_wrong_temperature_is_told_before_training(tmp_path) -> None:
    features = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    with pytest.raises(ParameterError, match="temperature=0.0 must be above 0"):
        fit_neighbourhood(features, (4, 4), np.zeros(32, int), 2, side=3, depth=2, width=8, temperature=0.0, held=np.arange(32) < 8,
                          folder=tmp_path / "training")
    assert not (tmp_path / "training").exists()
