"""Robust PCA, Outlier Pursuit and RASL: planted parts come back, and the two detectors keep the house's contract."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform, gaussian_filter

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.methods.lowrank import (
    RASL,
    RPCA,
    DecompositionWarning,
    align,
    column_basis,
    decompose,
    frame_positions,
    linearise,
    motion_matrix,
    pursue_outliers,
    robust_rest,
    shrink,
    shrink_columns,
    threshold_singular,
    unwarp,
    warp,
)
from defectbook.models.detectors import top_mean


def planted(seed: int, rank: int = 3, shape: tuple[int, int] = (200, 60), share: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    return low, np.where(rng.random(shape) < share, rng.uniform(-10, 10, shape), 0)


# Recovery holds with high probability, not always: at 200 x 60 and rank 4 single entries can stay wrong. Hence fixed seeds.
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_low_rank_and_sparse_parts_are_recovered(seed: int, rank: int, share: float) -> None:
    low, sparse = planted(seed, rank, (300, 150), share)
    found = decompose(low + sparse)
    assert found.converged and found.rank == rank
    assert np.abs(found.low_rank - low).max() < 1e-3 and np.abs(found.sparse - sparse).max() < 1e-3


def test_wide_matrix_is_the_tall_one_turned() -> None:
    low, sparse = planted(1)
    tall, wide = decompose(low + sparse), decompose((low + sparse).T)
    assert np.allclose(tall.low_rank, wide.low_rank.T, atol=1e-6) and tall.rank == wide.rank


def test_residual_falls_and_decomposition_beats_others_in_the_objective() -> None:
    low, sparse = planted(2, share=0.2, rank=8)
    matrix, weight = low + sparse, 1 / np.sqrt(200)
    found = decompose(matrix)

    def objective(part: np.ndarray) -> float:
        return np.linalg.norm(part, "nuc") + weight * np.abs(matrix - part).sum()

    assert all(late < early for early, late in zip(found.residuals, found.residuals[5:], strict=False))
    assert found.residuals[-1] <= 1e-7 < found.residuals[0]
    best = objective(found.low_rank)
    rng = np.random.default_rng(0)
    others = [found.low_rank * 1.01, found.low_rank * 0.99, found.low_rank + 0.01 * sparse, np.zeros_like(low)]
    others += [found.low_rank + 0.01 * np.outer(rng.normal(size=200), rng.normal(size=60)) for _ in range(10)]
    assert all(best < objective(other) + 1e-3 for other in others)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), amount=st.floats(0.1, 8), wide=st.booleans())
def test_gram_thresholding_agrees_with_the_svd(seed: int, amount: float, wide: bool) -> None:
    matrix = np.random.default_rng(seed).normal(size=(9, 40) if wide else (40, 9))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    lowered, remaining = threshold_singular(matrix, amount)
    assert np.allclose(lowered, (left * np.maximum(values - amount, 0)) @ right)
    assert np.allclose(np.sort(remaining), np.sort(values[values > amount] - amount))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.01, 3))
def test_shrinking_is_the_proximal_map(values: list[float], amount: float) -> None:
    column = np.array(values)[:, None]
    for shrunk, norm in ((shrink(column, amount), lambda v: np.abs(v).sum()), (shrink_columns(column, amount), np.linalg.norm)):
        def cost(v: np.ndarray, norm=norm) -> float:
            return amount * norm(v) + ((v - column) ** 2).sum() / 2

        assert all(cost(shrunk) <= cost(shrunk + step) + 1e-9 for step in (0.01, -0.01, 0.1 * column, -0.1 * column, -shrunk))


def test_outlier_columns_are_named() -> None:
    low, _ = planted(3, rank=2, shape=(100, 200))
    low[:, [5, 90]] = np.random.default_rng(0).normal(size=(100, 2)) * 3
    found = pursue_outliers(low, outliers=0.01)
    assert np.flatnonzero(np.linalg.norm(found.sparse, axis=0) > 1e-6).tolist() == [5, 90] and found.rank == 2


def test_gross_errors_do_not_move_the_robust_regression() -> None:
    low, _ = planted(4)
    errors = np.where(np.random.default_rng(1).random(200) < 0.15, 4.0, 0)
    assert np.allclose(robust_rest(low[:, 0] + errors, column_basis(low)), errors, atol=1e-3)


@pytest.mark.parametrize("matrix", [np.zeros((0, 3)), np.zeros(4), np.full((4, 3), np.nan), np.array([[1, np.inf], [0, 1]])])
def test_matrices_that_are_none_are_named(matrix: np.ndarray) -> None:
    with pytest.raises(DataError):
        decompose(matrix)


def test_bad_values_and_no_convergence() -> None:
    low, sparse = planted(5)
    for bad in ({"weight": 0}, {"tolerance": -1}, {"iterations": 0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            decompose(low, **bad)
    with pytest.raises(ParameterError, match="outliers"):
        pursue_outliers(low, outliers=0)
    with pytest.warns(DecompositionWarning, match="residual"):
        found = decompose(low + sparse, iterations=4)
    assert not found.converged
    gap = np.linalg.norm(low + sparse - found.low_rank - found.sparse) / np.linalg.norm(low + sparse)
    assert gap == pytest.approx(min(found.residuals))


def test_zero_constant_and_single_columns() -> None:
    assert decompose(np.zeros((10, 3))).rank == 0
    constant = decompose(np.full((50, 6), 0.5))
    assert constant.converged and constant.rank == 1 and np.abs(constant.sparse).max() < 1e-6
    assert decompose(np.random.default_rng(0).random((50, 1))).converged


def moved_views(seed: int, count: int = 10, side: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """Views of one pattern, and the motions that undo them; each view has a spot of its own."""
    rng = np.random.default_rng(seed)
    pattern = gaussian_filter(rng.normal(size=(side + 20, side + 20)), 4)
    pattern = 0.5 + 0.2 * pattern / pattern.std()
    motions = rng.uniform(-1, 1, (count, 6)) * [1, 1, 2, 1, 1, 2]
    motions -= motions.mean(axis=0)
    views = []
    for motion in motions:
        matrix, shift = motion_matrix(motion, frame_positions(side, 5)[1])
        back, middle = np.linalg.inv(matrix), np.full(2, (side - 1) / 2)
        views.append(affine_transform(pattern, back, middle + 10 - back @ (middle + shift), (side, side), order=3))
        row, column = rng.integers(10, side - 15, 2)
        views[-1][row:row + 5, column:column + 5] = 1.4
    return np.array(views), motions


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_misalignment_is_recovered(seed: int) -> None:
    """To a tenth of a pixel, measured as the mean distance between where the true and the found motion send a pixel."""
    views, truth = moved_views(seed)
    found = align(views)
    positions, _ = frame_positions(views.shape[1], 5)
    apart = [np.hypot(positions @ (a - b)[:3], positions @ (a - b)[3:]) for a, b in zip(found.motions, truth, strict=True)]
    assert found.converged and np.mean(apart) < 0.1
    assert found.objectives[-1] < found.objectives[0]


def test_derivative_against_finite_differences() -> None:
    image = gaussian_filter(np.random.default_rng(3).normal(size=(60, 60)), 5) + 0.2
    motion = np.array([0.3, -0.2, 0.5, 0.1, 0.4, -0.7])
    _, derivative, _ = linearise(image, motion)
    for parameter, step in enumerate(0.2 * np.eye(6)):
        slope = (linearise(image, motion + step)[0] - linearise(image, motion - step)[0]) / 0.4
        assert np.abs(slope - derivative[:, parameter]).max() < 0.1 * np.abs(derivative[:, parameter]).max()


def test_unwarp_returns_pixels_to_their_places() -> None:
    image = gaussian_filter(np.random.default_rng(4).normal(size=(50, 50)), 3)
    motion = np.array([0.5, -1, 2, 1, 0.3, -3.0])
    back = unwarp(warp(image, motion), motion, 50)
    assert np.abs(back - image)[14:-14, 14:-14].max() < 0.1 * np.abs(image).max()
    assert (back[:2] == 0).all() or (back[-2:] == 0).all()


def test_align_names_bad_input() -> None:
    for images in (np.zeros((0, 20, 20)), np.zeros((2, 20, 30)), np.full((2, 20, 20), np.nan), np.zeros((2, 20, 20))):
        with pytest.raises(DataError):
            align(images)
    with pytest.raises(ParameterError, match="inset"):
        align(np.ones((2, 20, 20)), inset=9)
    still = align(np.full((3, 24, 24), 0.5))
    assert still.converged and (still.motions == 0).all() and still.decomposition.rank == 1
    with pytest.warns(DecompositionWarning, match="did not settle"):
        align(moved_views(0)[0], steps=1)


def products(count: int, side: int = 40) -> list[Sample]:
    """Images of one pattern under different light, of mixed sizes."""
    pattern = gaussian_filter(np.random.default_rng(7).normal(size=(side, side)), 3)
    pattern = 0.5 + 0.15 * pattern / pattern.std()
    images = []
    for number in range(count):
        grey = np.clip(255 * pattern * (0.8 + 0.3 * number / count), 0, 255).astype(np.uint8)
        grey = np.kron(grey, np.ones((2, 2), np.uint8)) if number % 3 == 2 else grey
        images.append(Sample(np.repeat(grey[:, :, None], 3, axis=2), name=f"product {number}"))
    return images


def broken(sample: Sample) -> Sample:
    image, mask = sample.image.copy(), np.zeros(sample.image.shape[:2], np.uint8)
    mask[18:22, 12:28] = 1
    image[mask > 0] = 10
    return Sample(image, mask, 1, "broken", mask_threshold=0)


def fitted(kind: type[RPCA], **parameters) -> RPCA:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecompositionWarning)
        return kind(image_size=40, columns=8, **parameters).fit(products(9))


@pytest.mark.parametrize("kind", [RPCA, RASL])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.filterwarnings("ignore::defectbook.methods.lowrank.DecompositionWarning")
def test_detectors_mark_the_defect(kind: type[RPCA], joint: bool, tmp_path) -> None:
    detector, tests = fitted(kind, joint=joint), [products(9)[2], products(9)[4], broken(products(9)[4])]
    found = detector.predict(tests)
    assert detector.is_fitted and [m.shape for m in found.maps] == [s.image.shape[:2] for s in tests]
    assert all(m.dtype == np.float32 and np.isfinite(m).all() for m in found.maps)
    assert found.scores.argmax() == 2
    assert found.scores[1:] == pytest.approx([top_mean(found_map) for found_map in found.maps[1:]])  # those two are at the working size
    inside = tests[2].mask > 0
    assert found.maps[2][inside].mean() > 5 * found.maps[2][~inside].mean()
    detector.save(tmp_path / "saved")
    again = kind.load(tmp_path / "saved")
    assert again.parameters == detector.parameters
    assert all(np.array_equal(a, b) for a, b in zip(again.predict(tests).maps, found.maps, strict=True))
    with pytest.raises(ParameterError, match="exists"):
        detector.save(tmp_path / "saved")
    with pytest.raises(WeightsError):
        (RASL if kind is RPCA else RPCA).load(tmp_path / "saved")


@pytest.mark.parametrize("kind", [RPCA, RASL])
@pytest.mark.filterwarnings("ignore::defectbook.methods.lowrank.DecompositionWarning")
def test_a_map_does_not_depend_on_other_test_images(kind: type[RPCA]) -> None:
    detector, tests = fitted(kind), [products(9)[4], broken(products(9)[4])]
    assert np.array_equal(detector.predict(tests).maps[0], detector.predict(tests[:1]).maps[0])


@pytest.mark.parametrize("kind", [RPCA, RASL])
@pytest.mark.filterwarnings("ignore::defectbook.methods.lowrank.DecompositionWarning")
def test_odd_images_are_sensible(kind: type[RPCA]) -> None:
    constant, black = (Sample(np.full((30, 50, 3), value, np.uint8)) for value in (90, 0))
    one = kind(image_size=32).fit([products(1)[0]])
    assert all(np.isfinite(m).all() and m.shape == (30, 50) for m in one.predict([constant, black]).maps)
    flat = kind(image_size=32).fit([constant, constant])
    assert flat.predict([constant]).maps[0].max() < 1e-3
    assert len(flat.predict([])) == 0


@pytest.mark.parametrize("kind", [RPCA, RASL])
def test_misuse_is_named(kind: type[RPCA], tmp_path) -> None:
    with pytest.raises(ParameterError, match="fit"):
        kind().predict(products(1))
    with pytest.raises(ParameterError, match="fit"):
        kind().save(tmp_path / "x")
    with pytest.raises(DataError):
        kind().fit([])
    with pytest.raises(DataError, match="label 1"):
        kind().fit([broken(products(1)[0])])
    with pytest.raises(WeightsError):
        kind.load(tmp_path)
    for bad in ({"columns": 0}, {"image_size": 4}, {"weight": -1.0}, {"tolerance": 0.0}, {"iterations": 0}, {"seed": -1}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            kind(**bad)


def test_a_high_rank_is_said_and_printed(capsys) -> None:
    rng = np.random.default_rng(0)
    textures = [Sample(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8), name=str(i)) for i in range(6)]
    with pytest.warns(DecompositionWarning, match="not of low rank"):
        RPCA(image_size=32).fit(textures)
    assert "of 6 columns" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RPCA(image_size=40).fit([sample for sample in products(9) if sample.image.shape[0] == 40][:1] * 6)
