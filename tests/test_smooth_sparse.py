"""Smooth-sparse decomposition: against dense systems and generic solvers, planted parts come back, and the detector keeps the contract."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.methods.smooth_sparse import (
    LEAST_SPARSITY,
    Anomalies,
    SmoothSparse,
    SmoothSparseWarning,
    Surface,
    choose_smoothness,
    cross_validation,
    decompose,
    difference_penalty,
    noise_sparsity,
    otsu_sparsity,
    shrink,
    spline_basis,
)


def dense(shape: tuple[int, int], knots: int, smoothness: float) -> tuple[np.ndarray, np.ndarray]:
    """(B, lambda R) of the two-dimensional problem, as Kronecker products."""
    first, second = (spline_basis(side, knots) for side in shape)
    r1, r2 = (difference_penalty(basis.shape[1]) for basis in (first, second))
    penalty = np.kron(r1, second.T @ second) + np.kron(first.T @ first, r2) + smoothness * np.kron(r1, r2)
    return np.kron(first, second), smoothness * penalty


def dense_smoother(shape: tuple[int, int], knots: int, smoothness: float) -> np.ndarray:
    """By least squares on the factors of the penalty: the normal equations lose half the digits where the penalty is large."""
    first, second = (spline_basis(side, knots) for side in shape)
    d1, d2 = (np.diff(np.eye(basis.shape[1]), 2, axis=0) for basis in (first, second))
    assert np.allclose(d1.T @ d1, difference_penalty(first.shape[1]))
    basis = np.kron(first, second)
    factors = [np.kron(d1, second), np.kron(first, d2), smoothness**0.5 * np.kron(d1, d2)]
    stacked = np.vstack([basis, *(smoothness**0.5 * factor for factor in factors)])
    orthogonal, triangle = np.linalg.qr(stacked)
    return basis @ np.linalg.solve(triangle, orthogonal[: len(basis)].T)


def spotted(seed: int, shape: tuple[int, int] = (18, 14), count: int = 3, share: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    images = 0.5 + 0.2 * np.sin(3 * y + rng.uniform(0, 6, (count, 1, 1))) * x + 0.02 * rng.normal(size=(count, *shape))
    return images + 0.3 * (rng.random(images.shape) < share)


def plates(count: int, side: int = 64, seed: int = 0, dents: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noisy images, their smooth truth, masks of a square dent 0.25 deep)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    smooth = 0.5 + 0.2 * np.sin(3 * x + rng.uniform(0, 6, (count, 1, 1))) * np.cos(2 * y)
    masks = np.zeros(smooth.shape, bool)
    for mask in masks if dents else ():
        row, column = rng.integers(8, side - 14, 2)
        mask[row:row + 5, column:column + 5] = True
    return smooth + 0.015 * rng.normal(size=smooth.shape) - 0.25 * masks, smooth, masks


def sample(image: np.ndarray, mask: np.ndarray | None = None, name: str = "plate") -> Sample:
    pixels = np.repeat(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)[:, :, None], 3, axis=2)
    return Sample(pixels, None if mask is None else mask.astype(np.uint8), int(mask is not None), name, mask_threshold=0)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(8, 20), width=st.integers(8, 20), knots=st.integers(1, 5), power=st.floats(-3, 5), seed=st.integers(0, 99))
@example(height=8, width=8, knots=1, power=5.0, seed=0)
def test_separable_smoother_is_the_dense_one(height: int, width: int, knots: int, power: float, seed: int) -> None:
    images = np.random.default_rng(seed).random((2, height, width))
    slow = dense_smoother((height, width), knots, 10**power)
    found = Surface((height, width), knots).smooth(images, 10**power)
    assert np.allclose(found.reshape(2, -1), images.reshape(2, -1) @ slow.T, atol=1e-7)


def test_planes_pass_through_whatever_the_smoothness() -> None:
    y, x = np.mgrid[:30, :22]
    plane = (0.2 + 0.01 * y - 0.02 * x)[None]
    for smoothness in (1e-3, 1.0, 1e9):
        assert np.allclose(Surface((30, 22), 6).smooth(plane, smoothness), plane, atol=1e-8)


@pytest.mark.parametrize("smoothness", [0.01, 1.0, 300.0])
def test_cross_validation_is_its_definition(smoothness: float) -> None:
    images, slow = spotted(0), dense_smoother((18, 14), 4, smoothness)
    errors = [np.sum((flat - slow @ flat) ** 2) / flat.size for flat in images.reshape(3, -1)]
    expected = np.mean(errors) / (1 - np.trace(slow) / slow.shape[0]) ** 2
    assert cross_validation(Surface((18, 14), 4), images)(smoothness) == pytest.approx(expected, rel=1e-8)


def test_chosen_smoothness_beats_a_finer_grid_and_nears_the_truth() -> None:
    images, smooth, _ = plates(4)
    surface = Surface((64, 64))
    chosen, value = choose_smoothness(surface, images), cross_validation(surface, images)
    assert all(value(chosen) <= value(10**power) * (1 + 1e-6) for power in np.linspace(-4, 8, 300))
    error = [np.mean((surface.smooth(images, s) - smooth) ** 2) for s in (chosen, *10.0 ** np.linspace(-4, 8, 60))]
    assert error[0] < 1.3 * min(error)


@pytest.mark.parametrize("basis", ["pixels", "splines"])
@pytest.mark.parametrize("smoothness", [0.05, 2.0])
def test_minimum_agrees_with_long_plain_steps_on_the_dense_problem(basis: str, smoothness: float) -> None:
    """ISTA on the whole (theta, theta_a), or theta_a alone where theta is solved for: nothing shared with the solver but the bases."""
    images, gamma = spotted(1, count=1), 0.04
    shape, flat = images.shape[1:], images.ravel()
    if basis == "pixels":
        design = np.eye(flat.size)
    else:
        sides = [spline_basis(side, side // 4, 2) for side in shape]
        design = np.kron(*(side / np.linalg.norm(side, axis=0) for side in sides))
    left = np.eye(flat.size) - dense_smoother(shape, 4, smoothness)
    scale, slow = np.linalg.norm(design, 2) ** 2, np.zeros(design.shape[1])
    for _ in range(30000):
        ahead = slow + design.T @ (left @ (flat - design @ slow)) / scale
        slow, before = np.sign(ahead) * np.maximum(np.abs(ahead) - gamma / scale, 0), slow
        if np.abs(slow - before).max() < 1e-12:
            break
    found = decompose(images, Surface(shape, 4), smoothness, gamma, Anomalies(shape, basis), tolerance=1e-11, iterations=20000)
    rest = flat - design @ slow
    assert found.history[-1, 0] == pytest.approx(rest @ left @ rest / 2 + gamma * np.abs(slow).sum(), rel=1e-8)
    assert np.allclose(found.sparse.ravel(), design @ slow, atol=1e-5)
    basis_, penalty = dense(shape, 4, smoothness)  # the objective with theta still in it, at the surface that was returned
    theta = np.linalg.lstsq(basis_, found.smooth.ravel(), rcond=None)[0]
    noise = flat - found.smooth.ravel() - found.sparse.ravel()
    assert found.history[-1, 0] == pytest.approx(noise @ noise / 2 + theta @ penalty @ theta / 2 + gamma * np.abs(slow).sum(), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), gamma=st.floats(0.005, 0.3), power=st.floats(-3, 4), basis=st.sampled_from(["pixels", "splines"]))
def test_objective_never_rises_and_the_end_is_stationary(seed: int, gamma: float, power: float, basis: str) -> None:
    images, surface = spotted(seed), Surface((18, 14), 4)
    anomalies = Anomalies((18, 14), basis)
    found = decompose(images, surface, 10**power, gamma, anomalies, tolerance=1e-7, iterations=20000)
    assert found.converged.all() and (np.diff(found.history, axis=0) <= 0).all()
    left = images - found.sparse
    slope = anomalies.collect(left - surface.smooth(left, 10**power))  # at a minimum: gamma times the sign, or less where zero
    assert np.abs(slope).max() <= gamma + 1e-5
    there = np.abs(found.coefficients) > 1e-4
    assert np.allclose(slope[there], gamma * np.sign(found.coefficients[there]), atol=1e-5)


def test_planted_parts_are_recovered() -> None:
    images, smooth, masks = plates(5, dents=True)
    surface = Surface((64, 64))
    chosen = choose_smoothness(surface, plates(5, seed=1)[0])
    found = decompose(images, surface, chosen, noise_sparsity(surface, plates(5, seed=1)[0], chosen))
    marked = found.sparse != 0
    assert marked[masks].all() and marked[~masks].mean() < 0.01
    assert np.abs(found.smooth - smooth).max() < 0.05 and np.abs(found.smooth - smooth).mean() < 0.003
    assert (found.sparse[masks] < -0.1).all()


def test_each_image_is_alone_in_the_batch() -> None:
    images, surface = spotted(3, count=4), Surface((18, 14), 4)
    weights = np.array([0.02, 0.05, 0.1, 0.2])
    together = decompose(images, surface, 1.0, weights)
    for number in range(4):
        alone = decompose(images[number:number + 1], surface, 1.0, weights[number])
        assert np.allclose(together.sparse[number], alone.sparse[0], atol=1e-12)


def test_odd_images_have_no_sparse_part() -> None:
    surface = Surface((20, 20), 5)
    found = decompose(np.stack([np.zeros((20, 20)), np.full((20, 20), 0.6)]), surface, 1.0, 0.01)
    assert (found.sparse == 0).all() and found.converged.all() and np.allclose(found.smooth[1], 0.6)
    empty = decompose(np.zeros((0, 20, 20)), surface, 1.0, 0.01)
    assert empty.sparse.shape == (0, 20, 20)
    flat = np.full((2, 20, 20), 0.3)
    assert noise_sparsity(surface, flat, 1.0) == LEAST_SPARSITY
    assert (otsu_sparsity(surface, flat, 1.0, Anomalies((20, 20))) == LEAST_SPARSITY).all()


def test_noise_is_measured_though_edges_are_there() -> None:
    rng, surface = np.random.default_rng(0), Surface((64, 64))
    noise = 0.5 + 0.02 * rng.normal(size=(1, 64, 64))
    barred = noise - 0.3 * (np.arange(64) % 32 < 2)[None, :, None]
    assert noise_sparsity(surface, noise, 1e4) == pytest.approx(0.06, rel=0.05)
    assert noise_sparsity(surface, barred, 1e4) < 2 * 0.06 < 3 * barred.std()
    assert noise_sparsity(surface, noise, 1e4, factor=2) == pytest.approx(0.04, rel=0.05)


def test_no_convergence_is_said_and_the_best_iterate_returned() -> None:
    images, surface, anomalies = spotted(4), Surface((18, 14), 4), Anomalies((18, 14), "splines")
    with pytest.warns(SmoothSparseWarning, match=r"3 of 3 images .* residual"):
        found = decompose(images, surface, 0.1, 0.02, anomalies, tolerance=1e-9, iterations=3)
    assert not found.converged.any() and len(found.history) == 4 and (found.history[-1] < found.history[0]).all()
    left = images - found.sparse
    value = np.einsum("nhw,nhw->n", left, left - surface.smooth(left, 0.1)) / 2 + 0.02 * np.abs(found.coefficients).sum((1, 2))
    assert np.allclose(value, found.history[-1])


def test_bad_values_are_named() -> None:
    surface, images = Surface((18, 14), 4), spotted(0)
    for bad in ({"smoothness": 0.0}, {"sparsity": -1.0}, {"sparsity": np.array([0.1, np.nan, 0.1])}, {"tolerance": 0.0}, {"iterations": 0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            decompose(images, surface, **{"smoothness": 1.0, "sparsity": 0.1, **bad})
    for other in (images[0], images[:, :10], np.full_like(images, np.nan)):
        with pytest.raises(DataError):
            decompose(other, surface, 1.0, 0.1)
    for knots in (0, 16):
        with pytest.raises(ParameterError, match="knots"):
            spline_basis(18, knots)
    with pytest.raises(ParameterError, match="did you mean 'pixels'"):
        Anomalies((18, 14), "pixel")


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.01, 3))
def test_shrink_lowers_sizes(values: list[float], amount: float) -> None:
    shrunk = shrink(np.array(values), amount)
    assert np.allclose(np.abs(shrunk), np.maximum(np.abs(values) - amount, 0)) and (shrunk * values >= 0).all()


@pytest.mark.parametrize("parameters", [{}, {"anomaly_basis": "splines"}, {"sparsity": "otsu"}, {"channels": "rgb"},
                                        {"smoothness": 10.0, "sparsity": 0.05}])
def test_detector_marks_the_dent_and_comes_back(parameters: dict, tmp_path) -> None:
    normal, (images, _, masks) = [sample(image) for image in plates(6)[0]], plates(3, seed=2, dents=True)
    tests = [sample(image, mask, "dented") for image, mask in zip(images, masks, strict=True)]
    detector = SmoothSparse(image_size=64, **parameters).fit(normal)
    found, good = detector.predict(tests), detector.predict([sample(image) for image in plates(3, seed=3)[0]])
    assert detector.is_fitted and all(m.dtype == np.float32 and m.shape == (64, 64) for m in found.maps)
    for found_map, mask in zip(found.maps, masks, strict=True):
        assert found_map[mask].mean() > 10 * found_map[~mask].mean()
    assert found.scores.min() > good.scores.max()
    detector.save(tmp_path / "saved")
    again = SmoothSparse.load(tmp_path / "saved")
    assert again.parameters == detector.parameters
    assert all(np.array_equal(a, b) for a, b in zip(again.predict(tests).maps, found.maps, strict=True))
    assert np.allclose(detector.predict(tests[1:2]).maps[0], found.maps[1], atol=1e-6)


def test_colour_defects_need_the_channels() -> None:
    """Red lighter by what green and blue are darker: the grey image does not change."""
    rng, mask = np.random.default_rng(0), np.zeros((48, 48), bool)
    mask[20:26, 20:26] = True
    base = np.round(120 + 2 * rng.normal(size=(48, 48, 3))).astype(np.uint8)
    odd = base.copy()
    odd[mask] = (base[mask] + np.array([60, -30, -30])).astype(np.uint8)
    maps = {channels: SmoothSparse(48, channels).fit([Sample(base)]).predict([Sample(odd)]).maps[0] for channels in ("rgb", "grey")}
    assert maps["rgb"][mask].mean() > 0.1 > 10 * maps["grey"][mask].mean()


def test_constant_and_mixed_sizes() -> None:
    detector = SmoothSparse(image_size=32).fit([Sample(np.full((40, 60, 3), 90, np.uint8)), Sample(np.full((20, 20, 3), 200, np.uint8))])
    found = detector.predict([Sample(np.full((50, 30, 3), value, np.uint8)) for value in (0, 90, 255)])
    assert all(m.shape == (50, 30) and m.max() == 0 for m in found.maps) and (found.scores == 0).all()
    assert len(detector.predict([])) == 0


def test_detector_misuse_is_named(tmp_path) -> None:
    plate = sample(plates(1)[0][0])
    for attempt in (lambda: SmoothSparse().predict([plate]), lambda: SmoothSparse().save(tmp_path / "x")):
        with pytest.raises(ParameterError, match="fit"):
            attempt()
    for samples in ([], [sample(plates(1)[0][0], np.ones((64, 64)))]):
        with pytest.raises(DataError):
            SmoothSparse().fit(samples)
    with pytest.raises(WeightsError):
        SmoothSparse.load(tmp_path)
    for bad in ({"image_size": 4}, {"channels": "gray"}, {"knots": 0}, {"knots": 200}, {"smoothness": 0.0}, {"sparsity": -0.1}, {"sparsity": "otso"},
                {"anomaly_basis": "pixel"}, {"spacing": 0}, {"tolerance": 0.0}, {"iterations": 0}, {"smoothness": np.inf}):
        with pytest.raises(ParameterError, match=next(iter(bad))) as caught:
            SmoothSparse(**bad)
        assert "\n" not in str(caught.value)
