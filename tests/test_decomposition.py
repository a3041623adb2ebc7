"""SSIM and its gradient against slow and known ones; the solver against its promises."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from defectbook.core import DataError, ParameterError
from defectbook.models.decomposition import Problem, SsimLoss, SsimLossTorch, decompose_adam, decompose_proximal, filter_matrix, ssim, window_weights


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    one = rng.random(shape)
    return one, np.clip(one + rng.normal(0, 0.1, shape), 0, 1)


def planted(count: int = 2, size: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smooth textured backgrounds with a dark bar, the backgrounds with small errors as priors, and the bars."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    clean = np.stack([0.6 + 0.15 * np.sin(rows / rng.uniform(2, 4)) * np.cos(columns / rng.uniform(2, 4)) for _ in range(count)])
    bars = np.zeros(clean.shape, bool)
    bars[:, size // 2:size // 2 + 2, 8:-8] = True
    return np.where(bars, clean - 0.35, clean), np.clip(clean * 1.03 + rng.normal(0, 0.005, clean.shape), 0, 1), bars


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_ssim_agrees_with_skimage(window: str, channels: tuple[int, ...]) -> None:
    one, other = random_pair((3, 37, 50, *channels))
    settings_ = {"gaussian_weights": True, "sigma": 1.5} if window == "gaussian" else {"win_size": 11}
    expected = [structural_similarity(a, b, data_range=1, use_sample_covariance=False, channel_axis=-1 if channels else None, **settings_)
                for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(ssim(one, other, window=window), expected, atol=1e-12)


def test_ssim_map_agrees_with_skimage_also_at_the_border() -> None:
    one, other = random_pair((1, 33, 29))
    _, expected = structural_similarity(one[0], other[0], data_range=1, use_sample_covariance=False, gaussian_weights=True, full=True)
    np.testing.assert_allclose(SsimLoss(other[:, None]).map(one[:, None])[0, 0], expected, atol=1e-12)


def test_flat_images_have_no_trouble() -> None:
    flat = np.full((2, 20, 20), 0.5)
    assert np.allclose(ssim(flat, flat), 1) and np.allclose(ssim(np.zeros_like(flat), np.zeros_like(flat)), 1)
    found = decompose_proximal(flat, flat, 1e-4)
    assert found.converged.all() and not found.sparse.any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 14), st.integers(3, 9).filter(lambda size: size % 2), st.sampled_from(["reflect", "valid"]), st.integers(0, 99))
def test_filter_matrix_is_a_sliding_average(length: int, size: int, border: str, seed: int) -> None:
    weights, row = window_weights("gaussian", size), np.random.default_rng(seed).random(length)
    if border == "valid" and length < size:
        with pytest.raises(DataError, match="fewer than the window"):
            filter_matrix(length, weights, border)
        return
    padded = np.pad(row, size // 2, mode="symmetric") if border == "reflect" else row
    expected = [padded[start:start + size] @ weights for start in range(len(padded) - size + 1)]
    np.testing.assert_allclose(filter_matrix(length, weights, border) @ row, expected, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(st.integers(9, 20), st.integers(9, 20), st.integers(1, 3), st.sampled_from(["reflect", "valid"]), st.sampled_from(["gaussian", "uniform"]))
def test_sliding_filters_are_the_matrices_and_their_transposes(height: int, width: int, channels: int, border: str, window: str) -> None:
    images, _ = random_pair((2, channels, height, width), height + width)
    loss = SsimLoss(images, size=9, border=border, window=window)
    smooth = loss.smooth(images)
    np.testing.assert_allclose(smooth, loss.rows @ images @ loss.columns.T, atol=1e-14)
    maps = np.random.default_rng(1).normal(size=smooth.shape)
    np.testing.assert_allclose(loss.spread(maps), loss.rows.T @ maps @ loss.columns, atol=1e-14)


def test_small_losses_keep_their_digits_in_single_precision() -> None:
    flat = np.full((1, 1, 40, 40), 0.5) + 1e-3 * np.random.default_rng(0).random((1, 1, 40, 40))
    near = flat + 1e-4 * np.random.default_rng(1).normal(size=flat.shape)
    single, exact = (SsimLoss(flat).select(slice(None), dtype) for dtype in (np.float32, np.float64))
    assert exact.value(near).item() < 1e-4
    np.testing.assert_allclose(single.value(near.astype(np.float32)), exact.value(near), rtol=1e-3)


@pytest.mark.parametrize("border", ["reflect", "valid"])
@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_gradient_against_differences_and_autograd(border: str, window: str) -> None:
    one, other = random_pair((2, 2, 15, 18))
    loss = SsimLoss(other, window=window, border=border)
    value, gradient = loss.gradient(one)
    np.testing.assert_allclose(value, loss.value(one), atol=1e-15)
    tensor = torch.from_numpy(one).requires_grad_()
    found = SsimLossTorch(loss)(tensor)
    found.sum().backward()
    np.testing.assert_allclose(found.detach().numpy(), value, atol=1e-13)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-13)
    for place in ((0, 0, 0, 0), (0, 1, 7, 9), (1, 0, 14, 17), (1, 1, 3, 0)):
        step = np.zeros_like(one)
        step[place] = 1e-6
        difference = (loss.value(one + step) - loss.value(one - step))[place[0]] / 2e-6
        assert gradient[place] == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_curvature_lies_above_the_second_derivative() -> None:
    _, other = random_pair((1, 1, 16, 16))
    loss, rng = SsimLoss(other), np.random.default_rng(1)
    scale = loss.curvature()
    for direction in [*rng.normal(size=(20, 1, 1, 16, 16)), np.ones((1, 1, 16, 16))]:
        second = 2 * loss.value(other + 1e-4 * direction).item() / 1e-8
        assert second <= (scale * direction**2).sum() * 1.001


@pytest.mark.parametrize("weight", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("start", ["images", "prior", "best", "warm"])
def test_descends_and_ends_at_a_stationary_point(weight: float, start: str) -> None:
    images, priors, _ = planted()
    found = decompose_proximal(images, priors, weight, tolerance=1e-3, iterations=3000, start=start)
    assert found.converged.all() and (found.residual <= 1e-3).all()
    assert (np.diff(found.history, axis=0) <= 0).all()
    problem = Problem(images, priors, weight)
    np.testing.assert_allclose(problem.objective(found.background[:, None]), found.objective, rtol=1e-9)
    # Stationary by definition: slopes of weight where S is not zero, and within it where S is.
    slope = problem.loss.gradient(found.background[:, None])[1][:, 0]
    away = np.where(found.sparse != 0, slope - weight * np.sign(found.sparse), np.maximum(np.abs(slope) - weight, 0))
    assert np.sqrt(np.mean(away**2)) < 0.02 * weight


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.floats(-5, -2))
def test_never_worse_than_both_natural_starts(seed: int, exponent: float) -> None:
    images, priors = random_pair((2, 16, 16), seed)
    weight = 10**exponent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decompose_proximal(images, priors, weight, iterations=5)
    problem = Problem(images, priors, weight)
    for natural in (images, priors):
        assert (found.objective <= problem.objective(natural[:, None]) + 1e-12).all()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])  # within float32's reach, and beyond it
@pytest.mark.parametrize("iterations", [3, 3000])
def test_residual_belongs_to_the_background_returned(tolerance: float, iterations: int) -> None:
    images, priors, _ = planted()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if iterations == 3 else "error")
        found = decompose_proximal(images, priors, 3e-4, tolerance=tolerance, iterations=iterations)
    assert (found.iterations <= iterations).all() and (found.converged == (iterations == 3000)).all()
    problem = Problem(images, priors, 3e-4)
    background = found.background[:, None]
    slope, bend = problem.loss.slope(problem.loss.terms(background))
    scale = np.maximum(bend, 0.03 * problem.loss.curvature())
    moved = problem.shrink(background - slope / scale, 1 / scale) - background
    np.testing.assert_allclose(problem.mismatch(moved, 1 / scale), found.residual, rtol=0.02, atol=1e-9)


def test_where_the_lamp_has_changed_the_best_start_is_smooth() -> None:
    _, priors, _ = planted()
    images = np.clip(priors * np.linspace(0.85, 1.1, priors.shape[2]), 0, 1)
    problem = Problem(images, priors, 1e-4)
    pointwise = [problem.loss.references + np.clip(problem.images - problem.loss.references, -limit, limit) for limit in (0, 0.04, 0.08, 0.16, 1)]
    best = problem.objective(problem.start("best"))
    assert (best < 0.99 * np.min([problem.objective(start) for start in pointwise], 0)).all()
    trials = np.array([problem.objective(trial) for trial in problem.trials()])
    np.testing.assert_allclose(best, trials.min(0), rtol=1e-12)


def test_finds_the_planted_defect() -> None:
    images, priors, bars = planted()
    found = decompose_proximal(images, priors, 5e-4)
    marked = np.abs(found.sparse) > 0.1
    assert 2 * (marked & bars).sum() / (marked.sum() + bars.sum()) > 0.95
    assert (found.sparse == 0).mean() > 0.3 > (images == priors).mean()
    np.testing.assert_array_equal(found.sparse[bars] < 0, True)


def test_batch_channels_types_and_weights_do_not_matter() -> None:
    images, priors, _ = planted(3)
    together = decompose_proximal(images, priors, np.array([1e-4, 3e-4, 1e-3]), tolerance=1e-3)
    for index, weight in enumerate((1e-4, 3e-4, 1e-3)):
        alone = decompose_proximal(images[index:index + 1], priors[index:index + 1], weight, tolerance=1e-3)
        np.testing.assert_allclose(together.background[index], alone.background[0], atol=1e-9)
        assert together.iterations[index] == alone.iterations[0]
    one = decompose_proximal(images[..., None], priors[..., None], 3e-4, tolerance=1e-3)
    mean = decompose_proximal(images, priors, 3e-4 * images[0].size, norm="mean", tolerance=1e-3)
    np.testing.assert_allclose(one.background[..., 0], mean.background, atol=1e-9)
    small = decompose_proximal(images.astype(np.float32), priors.astype(np.float32), 3e-4, tolerance=1e-3)
    assert small.background.dtype == np.float32 and small.sparse.shape == images.shape
    np.testing.assert_allclose(small.background, mean.background, atol=1e-3)


def test_adam_comes_to_the_same_objective_later() -> None:
    images, priors, _ = planted()
    ours = decompose_proximal(images, priors, 5e-4, tolerance=1e-2)
    theirs = decompose_adam(images, priors, 5e-4, iterations=300)
    np.testing.assert_allclose(theirs.objective, ours.objective, rtol=0.05)
    assert (np.diff(theirs.history, axis=0) <= 1e-12).all()
    reached = np.flatnonzero((theirs.history <= ours.objective * 1.02).all(1))
    assert not len(reached) or reached[0] > 5 * ours.iterations.max()


def test_warns_with_the_residual_when_it_has_not_converged() -> None:
    images, priors, _ = planted()
    with pytest.warns(UserWarning, match=r"2 of 2 images have not converged after 2 iterations: residual .*best iterates"):
        found = decompose_proximal(images, priors, 1e-5, tolerance=1e-9, iterations=2)
    assert not found.converged.any() and np.isfinite(found.background).all()


GOOD = np.full((1, 16, 16), 0.5)


@pytest.mark.parametrize(("images", "priors", "match"), [
    (GOOD, np.full((1, 16, 17), 0.5), "differ in shape"),
    (GOOD + 1, GOOD, "images: values 1.5 to 1.5 lie outside"),
    (GOOD, -GOOD, "priors: values .* outside 0..1"),
    (np.where(np.eye(16) > 0, np.nan, GOOD), GOOD, "image 0 holds NaN"),
    ((GOOD * 255).astype(np.uint8), (GOOD * 255).astype(np.uint8), "type uint8"),
    (GOOD[0], GOOD[0], r"give \(N, H, W\)"),
    (GOOD[:0], GOOD[:0], "at least one pixel"),
])
@pytest.mark.parametrize("solve", [decompose_proximal, decompose_adam])
def test_bad_images_are_named(solve, images: np.ndarray, priors: np.ndarray, match: str) -> None:
    with pytest.raises(DataError, match=match) as error:
        solve(images, priors, 1e-4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("changed", "match"), [
    ({"weight": 0}, "weight=0 must be above 0"), ({"weight": -1e-5}, "above 0"), ({"weight": np.nan}, "finite"),
    ({"weight": np.ones(3)}, "one for each of 1"), ({"norm": "max"}, "sum, mean"), ({"start": "middle"}, "valid values"),
    ({"tolerance": 0}, "tolerance"), ({"iterations": 0}, "iterations"), ({"window": "round"}, "gaussian, uniform"),
    ({"size": 4}, "odd"), ({"sigma": 0.0}, "sigma"), ({"k2": 0.0}, "k2"), ({"border": "wrap"}, "reflect, valid"),
])
def test_bad_parameters_are_named(changed: dict, match: str) -> None:
    with pytest.raises(ParameterError, match=match) as error:
        decompose_proximal(GOOD, GOOD, **{"weight": 1e-4, **changed})
    assert "\n" not in str(error.value)


def test_a_start_of_another_shape_is_named() -> None:
    with pytest.raises(DataError, match="start"):
        decompose_proximal(GOOD, GOOD, 1e-4, start=np.full((1, 8, 8), 0.5))
