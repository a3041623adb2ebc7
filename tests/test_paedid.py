"""PAEDID as a detector: its parts add up, lambda and solver do what they say, any prior will do, files, and what is refused."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, WeightsError, generator, resize_image
from defectbook.data.cracked_surfaces import crack_samples
from defectbook.data.wood import read_wood
from defectbook.methods.paedid import PAEDID, SOLVERS
from defectbook.methods.reconstruction import Reconstruction
from defectbook.metrics.pixel import dice_oracle
from defectbook.models.decomposition import Problem
from defectbook.models.priors import PatchPrior

WOOD = read_wood(train=8, validation=1, test=4, size=32, seed=1)
TESTS = crack_samples(WOOD.test, seed=1)
SHAPES = {"grey": (4, 32, 32), "rgb": (4, 32, 32, 3)}


def working(samples, channels: str = "grey") -> np.ndarray:
    images = np.stack([resize_image(sample.image, (32, 32)) for sample in samples]).astype(np.float32) / 255
    return images if channels == "rgb" else images.mean(axis=3)


class Clean:
    """The perfect prior: it has seen each test image before it cracked."""

    def __init__(self, channels: str = "grey"):
        self.images = working(WOOD.test, channels)

    def reconstruct(self, images):
        assert len(images) == len(self.images)
        return self.images


@pytest.fixture(scope="module")
def prior() -> PatchPrior:
    return PatchPrior((4, 8), alpha=0.1, epochs=3, batch_size=4, device="cpu").fit(working(WOOD.train))


@pytest.fixture(scope="module")
def detector(prior) -> PAEDID:
    return PAEDID(prior, weight=1e-3, image_size=32)


def same(one, two) -> None:
    np.testing.assert_array_equal(one.scores, two.scores)
    for a, b in zip(one.maps, two.maps, strict=True):
        np.testing.assert_array_equal(a, b)


# parts

@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("channels", SHAPES)
def test_background_and_sparse_part_are_the_image(solver, channels):
    images, made = working(TESTS, channels), PAEDID(Clean(channels), 1e-3, 32, channels, solver=solver, iterations=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it has converged is not the question
        parts = made.take_apart(images, made.background(images))
        prediction, backgrounds = made.predict(TESTS), made.backgrounds(TESTS)
    assert parts.background.shape == parts.sparse.shape == SHAPES[channels] and parts.sparse.dtype == np.float32
    np.testing.assert_allclose(parts.background + parts.sparse, images, atol=1e-6)
    sizes = np.abs(parts.sparse)
    np.testing.assert_allclose(prediction.maps, sizes if channels == "grey" else sizes.mean(-1), atol=1e-6)
    assert backgrounds.shape == SHAPES[channels] and backgrounds.dtype == np.float32 and 0 <= backgrounds.min() and backgrounds.max() <= 1
    np.testing.assert_allclose(backgrounds, parts.background.clip(0, 1), atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(-5, -1), st.integers(0, 10**6))
def test_the_map_is_what_the_background_leaves(exponent, seed):
    images = generator(seed).random((2, 16, 16), np.float32)
    made = PAEDID(Clean(), 10**exponent, 16, iterations=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = made.compare(images, images[::-1])
        np.testing.assert_allclose(found, np.abs(images - made.explain(images, images[::-1])), atol=1e-6)
    assert np.isfinite(found).all()


def test_a_perfect_prior_finds_the_planted_cracks():
    masks = [sample.mask for sample in TESTS]
    for channels, weight in (("grey", 3e-4), ("rgb", 1e-4)):
        found = PAEDID(Clean(channels), weight, 32, channels).predict(TESTS).maps
        assert dice_oracle(found, masks, "each").value > 0.9 and dice_oracle(found, masks, "images").value > 0.9


# lambda and solver

def test_a_large_lambda_leaves_nothing_and_a_small_one_the_difference(detector):
    images = working(TESTS)
    priors = detector.background(images)
    sizes = [np.abs(detector.using(weight).take_apart(images, priors).sparse).sum() for weight in (1e-6, 1e-3, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2] and np.abs(detector.using(1.0).predict(TESTS).maps).max() < 1e-3
    assert np.abs(detector.using(1.0).backgrounds(TESTS) - images).max() < 1e-3


def test_both_solvers_come_to_one_objective():
    images = working(TESTS)
    ours, adam = (PAEDID(Clean(), 3e-4, 32, solver=solver, iterations=1500) for solver in ("proximal", "adam"))
    problem = Problem(images, Clean().images, 3e-4)
    ends = [problem.objective(made.take_apart(images, Clean().images).background.astype(float)[:, None]) for made in (ours, adam)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0.02)
    assert (ends[0] < problem.objective(images[:, None].astype(float))).all()


def test_using_shares_the_prior(detector):
    other = detector.using(2e-3)
    assert other.prior is detector.prior and other.is_fitted and (other.parameters["weight"], detector.parameters["weight"]) == (2e-3, 1e-3)
    assert other.parameters | {"weight": 1e-3} == detector.parameters
    made = PAEDID(Clean(), 1e-3, 32, "rgb", 5, "adam", "mean", 7).using(0.5)
    assert [made.parameters[name] for name in ("weight", "image_size", "channels", "batch_size", "solver", "norm", "iterations")] == [
        0.5, 32, "rgb", 5, "adam", "mean", 7]


def test_the_mean_is_the_sum_by_another_weight():
    one, two = PAEDID(Clean(), 3e-4, 32), PAEDID(Clean(), 3e-4 * 32 * 32, 32, norm="mean")
    np.testing.assert_allclose(one.predict(TESTS).maps, two.predict(TESTS).maps, atol=1e-5)


def test_what_has_not_converged_is_said_and_returned(detector):
    hasty = PAEDID(detector.prior, 1e-5, 32, iterations=1)
    with pytest.warns(UserWarning, match=r"have not converged after 1 iterations: residual \d"):
        prediction = hasty.predict(TESTS)
    assert np.isfinite(prediction.maps).all() and np.ptp(prediction.maps) > 0


# as a detector

def test_the_default_is_the_papers():
    made = PAEDID()
    assert type(made.prior) is PatchPrior and made.prior.widths == (3, 9, 27, 81) and made.prior.parameters["alpha"] == 0.03
    assert made.parameters["weight"] == 6e-4 and made.parameters["solver"] == "proximal" and made.parameters["image_size"] == 128


def test_fitted_by_its_own_fit_it_is_the_same(detector):
    made = PAEDID(PatchPrior((4, 8), alpha=0.1, epochs=3, batch_size=4, device="cpu"), 1e-3, 32)
    assert not made.is_fitted and made.fit(WOOD.train).is_fitted
    same(made.predict(TESTS), detector.predict(TESTS))
    memory = detector.prior.memory
    assert detector.fit(WOOD.train[:2]).prior.memory is memory, "a fitted prior is not fitted again"


def test_alpha_is_the_priors_and_one_fit_serves_all(prior):
    for alpha in (0.05, 0.5, 1.0):
        made = PAEDID(prior.using(alpha), 1e-3, 32)
        assert made.prior.network is prior.network and made.parameters["prior"]["alpha"] == alpha
        assert prior.using(alpha).retrieve(working(TESTS)).replaced.mean() == pytest.approx(alpha, abs=0.02)
        assert np.isfinite(made.predict(TESTS).maps).all()


def test_mixed_sizes_and_constant_images(detector):
    mixed = [Sample(resize_image(TESTS[0].image, size)) for size in ((32, 32), (50, 40), (9, 70))]
    mixed += [Sample(np.full((32, 32, 3), value, np.uint8)) for value in (0, 128, 255)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prediction = detector.predict(mixed)
    assert [found.shape for found in prediction.maps] == [sample.image.shape[:2] for sample in mixed]
    assert all(found.dtype == np.float32 and np.isfinite(found).all() and found.min() >= 0 for found in prediction.maps)
    assert np.isfinite(prediction.scores).all()


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_image_with_a_constant_prior(value, solver):
    images = np.full((1, 32, 32), value, np.float32)
    made = PAEDID(Clean(), 1e-3, 32, solver=solver, iterations=50)
    assert np.abs(made.compare(images, images)).max() < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(made.compare(images, 1 - images)).all()


def test_batches_do_not_matter_and_two_calls_are_equal(detector):
    single = PAEDID(detector.prior, 1e-3, 32, batch_size=1)
    np.testing.assert_allclose(single.predict(TESTS).maps, detector.predict(TESTS).maps, atol=2e-3)
    same(detector.predict(TESTS), detector.predict(TESTS))


def test_saved_and_loaded_bit_for_bit(detector, tmp_path):
    detector.save(tmp_path / "saved")
    loaded = PAEDID.load(tmp_path / "saved", device="cpu")
    assert loaded.parameters == detector.parameters and loaded.prior.parameters == detector.prior.parameters
    same(loaded.predict(TESTS), detector.predict(TESTS))
    np.testing.assert_array_equal(loaded.using(2e-3).backgrounds(TESTS), detector.using(2e-3).backgrounds(TESTS))
    with pytest.raises(WeightsError, match="not a saved Reconstruction"):
        Reconstruction.load(tmp_path / "saved")
    with pytest.raises(ParameterError, match="cannot be saved"):
        PAEDID(Clean(), image_size=32).save(tmp_path / "plugged")


@pytest.mark.parametrize(("make", "match"), [
    (lambda: PAEDID(weight=0), "weight=0"), (lambda: PAEDID(weight=-1e-3), "weight=-0.001"), (lambda: PAEDID(weight=np.nan), "weight=nan"),
    (lambda: PAEDID(weight=np.inf), "weight=inf"), (lambda: PAEDID(iterations=0), "iterations=0"), (lambda: PAEDID().using(0), "weight=0"),
    (lambda: PAEDID(PatchPrior(alpha=1.01)), "alpha=1.01"), (lambda: PAEDID(PatchPrior(alpha=0)), "alpha=0"),
    (lambda: PAEDID(solver="proximl"), "did you mean 'proximal'"), (lambda: PAEDID(norm="sums"), "did you mean 'sum'"),
    (lambda: PAEDID(channels="rbg"), "did you mean 'rgb'"), (lambda: PAEDID("cells"), "prior str has no reconstruct")])
def test_values_out_of_range_are_one_line(make, match):
    with pytest.raises(ParameterError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_calls_out_of_order_and_bad_images():
    made = PAEDID(PatchPrior((4, 8), device="cpu"), image_size=32)
    for call in (made.predict, made.backgrounds):
        with pytest.raises(ParameterError, match="call fit"):
            call(TESTS)
    with pytest.raises(DataError, match="no normal images"):
        made.fit([])
    with pytest.raises(DataError, match="among the normal images"):
        made.fit(TESTS)
