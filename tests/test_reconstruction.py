"""Residuals against their definitions, what the three constructors build, maps, files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from defectbook.core import DataError, ParameterError, Sample, WeightsError, generator, resize_image
from defectbook.data.cracked_surfaces import crack_samples
from defectbook.data.wood import read_wood
from defectbook.methods.paedid import PAEDID
from defectbook.methods.reconstruction import (
    RESIDUALS,
    Reconstruction,
    absolute_residual,
    memae,
    pae,
    squared_residual,
    ssim_ae,
    ssim_residual,
)
from defectbook.metrics.pixel import auroc
from defectbook.models.priors import AutoencoderPrior, MemAEPrior, PatchPrior
from defectbook.models.training import Training

WOOD = read_wood(train=8, validation=1, test=4, size=32, seed=1)
TESTS = crack_samples(WOOD.test[:2], seed=1) + list(WOOD.test[2:])
TINY = {"encoder": (4, 8), "image_size": 32, "epochs": 2, "batch_size": 4, "device": "cpu"}
METHODS = {"SSIM-AE": ssim_ae, "MemAE": lambda **options: memae(items=10, **options), "PAE": lambda **options: pae(alpha=0.1, **options)}


@pytest.fixture(scope="module")
def fitted() -> dict[str, Reconstruction]:
    return {name: make(**TINY).fit(WOOD.train) for name, make in METHODS.items()}


def pairs(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(seed)
    images = rng.random(shape, np.float32)
    return images, np.clip(images + 0.2 * rng.standard_normal(shape, np.float32), 0, 1)


def same(one, two) -> None:
    np.testing.assert_array_equal(one.scores, two.scores)
    for a, b in zip(one.maps, two.maps, strict=True):
        np.testing.assert_array_equal(a, b)


class Blur:
    """A plugged-in prior that needs no training and has no parameters: the mean grey value of each image."""

    def reconstruct(self, images):
        return np.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)


# residuals

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.sampled_from([(), (3,)]), st.integers(0, 10**6))
def test_differences_are_their_definitions(count, height, width, channels, seed):
    images, priors = pairs((count, height, width, *channels), seed)
    for residual, function in ((absolute_residual, abs), (squared_residual, lambda x: x * x)):
        expected = np.zeros((count, height, width))
        for place in np.ndindex(count, height, width):
            expected[place] = np.mean([function(x - p) for x, p in zip(np.ravel(images[place]), np.ravel(priors[place]), strict=True)])
        found = residual(images, priors)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_structural_difference_is_one_minus_the_map_of_skimage(channels):
    images, priors = pairs((2, 24, 30, *channels), 3)
    found = ssim_residual(images, priors)
    for image, prior, residual in zip(images.astype(float), priors.astype(float), found, strict=True):
        _, expected = structural_similarity(image, prior, full=True, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                            channel_axis=-1 if channels else None)
        np.testing.assert_allclose(residual, 1 - (expected.mean(-1) if channels else expected), atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.sampled_from([(), (3,)]), st.integers(0, 10**6))
def test_structural_difference_keeps_its_range(side, channels, seed):
    images, _ = pairs((2, side, side, *channels), seed)
    for priors in (images, 1 - images, np.round(images), np.zeros_like(images), np.ones_like(images)):
        found = ssim_residual(images, priors)
        assert found.shape == (2, side, side) and -1e-4 < found.min() and found.max() < 2 + 1e-4
    assert np.abs(ssim_residual(images, images)).max() < 1e-5


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("other", [0.0, 1.0])
def test_constant_images_are_no_trouble(residual, value, other):
    """No variance anywhere: SSIM has only its constants to divide by."""
    images, priors = np.full((1, 16, 16), value, np.float32), np.full((1, 16, 16), other, np.float32)
    found = RESIDUALS[residual](images, priors)
    assert np.isfinite(found).all() and np.ptp(found) < 1e-4 and (found.max() < 1e-4) == (value == other)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_squared_and_absolute_rank_grey_pixels_alike(seed):
    images, priors = pairs((1, 12, 12), seed)
    order = np.argsort(absolute_residual(images, priors), axis=None)
    assert (np.diff(squared_residual(images, priors).ravel()[order]) >= 0).all()


# the three

def test_constructors_give_the_prior_they_say():
    one, two, three = ssim_ae(), memae(items=7, entropy=0.1), pae(alpha=0.2, residual="ssim", epochs=3, seed=4)
    assert type(one.prior) is AutoencoderPrior and one.prior.parameters["loss"] == "ssim"
    assert type(two.prior) is MemAEPrior and two.prior.own == {"items": 7, "shrink": None, "entropy": 0.1}
    assert type(three.prior) is PatchPrior and three.prior.parameters["loss"] == "squared"
    assert [three.prior.parameters[name] for name in ("alpha", "epochs", "seed")] == [0.2, 3, 4]
    assert [made.parameters["residual"] for made in (one, two, three)] == ["absolute", "absolute", "ssim"]
    assert all(made.prior.widths == (3, 9, 27, 81) and made.parameters["image_size"] == 128 for made in (one, two, three))
    assert three.parameters["prior"]["kind"] == "PatchPrior" and not three.is_fitted


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_the_residual_of_image_and_prior(fitted, name):
    images = np.stack([sample.image for sample in TESTS]).astype(np.float32).mean(-1) / 255
    priors = fitted[name].backgrounds(TESTS)
    assert priors.shape == images.shape and priors.dtype == np.float32 and 0 <= priors.min() and priors.max() <= 1
    for residual, function in RESIDUALS.items():
        prediction = fitted[name].using(residual).predict(TESTS)
        np.testing.assert_allclose(prediction.maps, function(images, priors), atol=1e-4 if residual == "ssim" else 1e-5)
        for score, found in zip(prediction.scores, prediction.maps, strict=True):
            assert score == pytest.approx(np.sort(found, axis=None)[-10:].mean(), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_squared_and_absolute_have_one_auroc(fitted, name):
    masks = [sample.mask for sample in TESTS]
    one, two = (auroc(fitted[name].using(residual).predict(TESTS).maps, masks) for residual in ("absolute", "squared"))
    assert one == pytest.approx(two, abs=1e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_maps_lie_at_each_image_s_own_size(fitted, residual):
    mixed = [Sample(resize_image(TESTS[0].image, size), name=str(size)) for size in ((32, 32), (48, 64), (90, 20), (8, 8))]
    mixed.append(Sample(np.full((40, 30, 3), 255, np.uint8), name="white"))
    prediction = fitted["PAE"].using(residual).predict(mixed)
    assert [found.shape for found in prediction.maps] == [sample.image.shape[:2] for sample in mixed]
    assert all(found.dtype == np.float32 and np.isfinite(found).all() for found in prediction.maps) and np.isfinite(prediction.scores).all()
    assert len(fitted["PAE"].predict([]).maps) == 0


def test_using_shares_the_prior(fitted):
    other = fitted["PAE"].using("ssim")
    assert other.prior is fitted["PAE"].prior and other.is_fitted and fitted["PAE"].parameters["residual"] == "absolute"
    assert {name: value for name, value in other.parameters.items() if name != "residual"} == {
        name: value for name, value in fitted["PAE"].parameters.items() if name != "residual"}
    same(other.using("absolute").predict(TESTS), fitted["PAE"].predict(TESTS))


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_one_detector(fitted, name):
    again, other = METHODS[name](**TINY).fit(WOOD.train), METHODS[name](**TINY, seed=1).fit(WOOD.train)
    same(again.predict(TESTS), fitted[name].predict(TESTS))
    same(again.predict(TESTS), again.predict(TESTS))
    assert again.prior.history == fitted[name].prior.history != other.prior.history


def test_batches_do_not_matter(fitted):
    single = Reconstruction(fitted["PAE"].prior, image_size=32, batch_size=1)
    np.testing.assert_allclose(single.predict(TESTS).maps, fitted["PAE"].predict(TESTS).maps, atol=1e-5)


def test_a_fit_that_is_stopped_goes_on(fitted, tmp_path, monkeypatch):
    finish, done = Training.finish_round, []

    def stop_after_one(self, **losses):
        finish(self, **losses)
        done.append(self.rounds)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "finish_round", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        METHODS["PAE"](**TINY).fit(WOOD.train, checkpoint=tmp_path / "work")
    resumed = METHODS["PAE"](**TINY).fit(WOOD.train, checkpoint=tmp_path / "work")
    assert done == [1, 2]
    same(resumed.predict(TESTS), fitted["PAE"].predict(TESTS))
    with pytest.raises(WeightsError, match="other data or parameters"):
        METHODS["PAE"](**TINY, seed=1).fit(WOOD.train, checkpoint=tmp_path / "work")


# files

@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_saved_and_loaded_bit_for_bit(name, channels, tmp_path):
    detector = METHODS[name](**TINY, channels=channels, residual="squared").fit(WOOD.train)
    detector.save(tmp_path / "saved")
    loaded = Reconstruction.load(tmp_path / "saved", device="cpu")
    assert loaded.parameters == detector.parameters and type(loaded.prior) is type(detector.prior)
    same(loaded.predict(TESTS), detector.predict(TESTS))
    np.testing.assert_array_equal(loaded.backgrounds(TESTS), detector.backgrounds(TESTS))
    assert not list((tmp_path / "saved").glob("*.pkl")) and detector.backgrounds(TESTS).ndim == (3 if channels == "grey" else 4)


def test_files_of_others_are_refused(fitted, tmp_path):
    with pytest.raises(WeightsError, match="not a saved Reconstruction"):
        Reconstruction.load(tmp_path)
    fitted["PAE"].save(tmp_path / "pae")
    with pytest.raises(ParameterError, match="exists already"):
        fitted["PAE"].save(tmp_path / "pae")
    with pytest.raises(WeightsError, match="not a saved PAEDID"):
        PAEDID.load(tmp_path / "pae")
    with pytest.raises(ParameterError, match="cannot be saved"):
        Reconstruction(Blur(), image_size=32).save(tmp_path / "plugged")
    assert not (tmp_path / "plugged").exists()


# any prior, and what is refused

def test_any_object_with_reconstruct_is_a_prior():
    detector = Reconstruction(Blur(), image_size=32)
    prediction = detector.predict(TESTS)  # nothing to fit
    grey = np.stack([sample.image for sample in TESTS]).astype(np.float32).mean(-1) / 255
    np.testing.assert_allclose(prediction.maps, np.abs(grey - grey.mean((1, 2), keepdims=True)), atol=1e-5)
    assert detector.parameters["prior"] == {"kind": "Blur", "version": ""}
    same(detector.fit(WOOD.train).predict(TESTS), prediction)


@pytest.mark.parametrize("wrong", [lambda images: images[:, :5], lambda images: images * np.nan, lambda images: images[:1]])
def test_priors_of_another_shape_or_with_nan_are_named(wrong):
    blur = Blur()
    blur.reconstruct = wrong
    with pytest.raises(DataError, match="Blur.reconstruct gave") as error:
        Reconstruction(blur, image_size=32).predict(TESTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("make", "match"), [
    (lambda: ssim_ae(residual="absolut"), "did you mean 'absolute'"), (lambda: memae(channels="gray"), "did you mean 'grey'"),
    (lambda: pae("wod"), "did you mean 'wood'"), (lambda: pae(image_size=4), "at least 8"), (lambda: pae(alpha=1.5), "alpha=1.5"),
    (lambda: pae(alpha=-0.1), "alpha=-0.1"), (lambda: memae(loss="ssim"), "own loss"), (lambda: memae(items=0), "items=0"),
    (lambda: ssim_ae(decoder="near"), "did you mean 'nearest'"), (lambda: Reconstruction(object()), "no reconstruct"),
    (lambda: Reconstruction(Blur(), batch_size=0), "batch_size=0"), (lambda: ssim_ae().using("ssim "), "did you mean 'ssim'")])
def test_bad_names_and_values_are_refused_before_any_image_is_read(make, match):
    with pytest.raises(ParameterError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_bad_images_and_calls_out_of_order(tmp_path):
    detector = pae(**TINY)
    for call in (detector.predict, detector.backgrounds):
        with pytest.raises(ParameterError, match="call fit"):
            call(TESTS)
    with pytest.raises(ParameterError, match="not fitted"):
        detector.save(Path(tmp_path) / "saved")
    with pytest.raises(DataError, match="no normal images"):
        detector.fit([])
    with pytest.raises(DataError, match="among the normal images"):
        detector.fit(TESTS)
    with pytest.raises(DataError, match="at least two"):
        detector.fit(WOOD.train[:1])
    with pytest.raises(ParameterError, match="multiple of 4"):
        pae(**{**TINY, "image_size": 30}).fit(WOOD.train)
