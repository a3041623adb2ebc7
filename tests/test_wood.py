"""Simulated end-grain images: repeatable, unlike each other, not low-rank, and refused with one line when asked wrongly."""

import pickle

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import ParameterError, generator
from defectbook.data.wood import draw_wood, read_wood, ring_profile


@settings(max_examples=25, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.integers(0, 1000), st.floats(0, 3), st.floats(1, 60), st.floats(0, 3))
def test_any_size_and_grain_gives_a_repeatable_image(height, width, seed, spread, rings, bend):
    one, two = (draw_wood((height, width), generator(seed), spread=spread, rings=rings, bend=bend) for _ in range(2))
    assert one.shape == (height, width, 3) and one.dtype == np.uint8 and (one == two).all()
    assert (one != draw_wood((height, width), generator(seed + 1), spread=spread, rings=rings, bend=bend)).any()
    assert one.std() > 3, "an image without structure"


@given(st.integers(0, 10_000), st.floats(0.5, 50), st.floats(0.01, 20))
def test_rings_cover_every_radius(seed, rings, reach):
    dark, early = ring_profile(np.linspace(0, reach, 500), rings, generator(seed))
    assert dark.shape == early.shape == (500,) and np.isfinite(dark).all()
    assert 0 <= dark.min() and dark.max() <= 1 and set(np.unique(early)) <= {0, 1}


def test_the_mean_number_of_rings_is_as_asked():
    """A ring ends where darkness falls at once; over many draws their number is about `rings` a unit of length."""
    radii = np.linspace(0, 4, 20_000)
    for rings in (5, 14, 40):
        falls = [(np.diff(ring_profile(radii, rings, generator(seed))[0]) < -0.2).sum() / 4 for seed in range(20)]
        assert 0.75 * rings < np.mean(falls) < 1.15 * rings


def pith_of(grain: dict, seed: int) -> np.ndarray:
    """The centre of the reddish heartwood, as shares of the image; there is no other reddish place."""
    image = draw_wood((96, 96), generator(seed), heartwood=(0.2, 0.2), **grain).astype(float)
    smooth = cv2.GaussianBlur(image, (0, 0), 4)
    ratio = smooth[..., 0] / smooth[..., 2]
    return np.argwhere(ratio > (ratio.min() + ratio.max()) / 2).mean(0) / 96


def test_spread_is_how_far_the_pith_wanders():
    centres = {spread: np.std([pith_of({"spread": spread, "pith": (0.5, 0.5)}, seed) for seed in range(15)], 0).mean() for spread in (0, 0.05, 0.15)}
    assert centres[0] < 0.03 < centres[0.15] and centres[0] < centres[0.05] < centres[0.15]
    near = np.mean([pith_of({"spread": 0, "pith": (0.3, 0.7)}, seed) for seed in range(6)], 0)
    assert np.abs(near - (0.3, 0.7)).max() < 0.06


def test_pores_and_heartwood_darken():
    def grey(**grain):
        return np.mean([draw_wood((96, 96), generator(seed), **grain).mean() for seed in range(5)])

    assert grey(pores=4) < grey(pores=1) < grey(pores=0)
    assert grey(heartwood=(3, 3)) < grey(heartwood=(0.3, 0.3)) < grey(heartwood=(0, 0))


@pytest.mark.parametrize("spread", [0, 0.3])
def test_the_stack_is_not_low_rank(spread):
    """Also when the pith is always in one place: ten of forty singular values do not hold 90 % of the structure."""
    large = [draw_wood((96, 96), generator(seed), spread=spread).mean(2) for seed in range(40)]
    images = [cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA).ravel() for image in large]
    energy = np.linalg.svd(np.stack([image - image.mean() for image in images], 1), compute_uv=False) ** 2
    assert energy[:10].sum() < 0.9 * energy.sum() and energy[0] < 0.7 * energy.sum()


def test_it_is_brown():
    pixels = np.concatenate([draw_wood((64, 64), generator(seed)).reshape(-1, 3) for seed in range(10)]).astype(float).mean(0)
    assert pixels[0] > 1.15 * pixels[1] > 1.3 * pixels[2] and 80 < pixels.mean() < 200


# --- as a data set --------------------------------------------------------------------------------------------------


def test_the_data_set_is_normal_lazy_and_repeatable():
    wood = read_wood(6, 3, 4, size=48, seed=5)
    assert (wood.name, wood.category, wood.simulated) == ("wood_simulated", "grain", True)
    assert [len(split) for split in wood.splits.values()] == [6, 3, 4]
    assert len({sample.name for sample in wood.samples}) == 13 and not any(sample.label for sample in wood.samples)
    assert len({sample.image.tobytes() for sample in wood.samples}) == 13, "two images are the same"
    assert wood.test[0].mask.shape == (48, 48) and not wood.test[0].mask.any()
    assert wood.fingerprint() == read_wood(6, 3, 4, size=48, seed=5).fingerprint()
    assert wood.fingerprint() != read_wood(6, 3, 4, size=48, seed=6).fingerprint()
    assert wood.fingerprint() != read_wood(6, 3, 4, size=48, seed=5, spread=0.1).fingerprint()
    assert "Grain(rings=14.0" in wood.notes[0] and "simulated" in wood.summary()


def test_samples_survive_pickling_and_careless_readers():
    sample = read_wood(1, 0, 1, size=40).test[0]
    before = sample.image
    assert (pickle.loads(pickle.dumps(sample)).image == before).all()
    sample.image[:] = 0
    assert (sample.image == before).all()


@given(st.integers(1, 30), st.integers(0, 30))
def test_an_item_does_not_depend_on_the_other_counts(train, validation):
    few, many = read_wood(train, validation, 2, size=32), read_wood(30, 30, 2, size=32)
    assert few.test[1].name == many.test[1].name and few.test[1].image_source == many.test[1].image_source
    assert few.train[-1].image_source == many.train[train - 1].image_source


def test_sizes_and_lists():
    assert read_wood(1, 0, 1, size=(40, 64)).train[0].image.shape == (40, 64, 3)
    listed, paired = read_wood(1, 0, 1, size=[40, 64], pith=[0.1, 0.9]), read_wood(1, 0, 1, size=(40, 64), pith=(0.1, 0.9))
    assert listed.fingerprint() == paired.fingerprint(), "JSON has lists where Python has pairs"


@pytest.mark.parametrize(("options", "message"), [
    ({"train": 0}, "train=0 images of wood; give a whole number, at least 1"),
    ({"validation": -1}, "validation=-1 images"),
    ({"test": 2.5}, "test=2.5 images"),
    ({"test": True}, "test=True images"),
    ({"size": 31}, "32 to 4096 px"),
    ({"size": (64, 300)}, "at most four times"),
    ({"size": 10**6}, "32 to 4096 px"),
    ({"size": "large"}, "give a side in pixels"),
    ({"size": (64, 64, 3)}, "give a side in pixels"),
    ({"seed": -1}, "seed -1"),
    ({"spread": -0.1}, "spread=-0.1: give a number from 0 to 10"),
    ({"spread": float("nan")}, "spread=nan"),
    ({"rings": "many"}, "rings='many': give a number"),
    ({"pith": 0.5}, "pith=0.5: give two numbers"),
    ({"pith": "ab"}, "pith='ab': give two numbers"),
    ({"heartwood": (0.6, 0.3)}, "smallest first"),
    ({"bark": 1}, "unknown option of wood 'bark'"),
])
def test_bad_arguments_are_one_line(options, message):
    with pytest.raises(ParameterError) as error:
        read_wood(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_drawing_checks_too():
    with pytest.raises(ParameterError, match="32 to 4096 px"):
        draw_wood((16, 64), generator(0))
    with pytest.raises(ParameterError, match="did you mean 'rays'"):
        draw_wood((64, 64), generator(0), ray=1)


def test_bytes_do_not_depend_on_places_in_memory() -> None:
    """One function of OpenCV rounded by alignment: about one image in thirty came out differently from time to time."""
    rng, kept = np.random.default_rng(0), []
    first = [draw_wood((64, 64), np.random.default_rng(seed)) for seed in range(120)]
    for _ in range(3):
        for seed, image in enumerate(first):
            kept.append(np.empty(int(rng.integers(1, 9999)), np.uint8))
            assert np.array_equal(draw_wood((64, 64), np.random.default_rng(seed)), image), seed
