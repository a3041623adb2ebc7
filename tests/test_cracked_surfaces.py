"""Cracks on any data set, before or after it is brought to one size: exact masks, untouched training, honest notes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.catalogue import load
from defectbook.data.cracked_surfaces import crack_samples, crack_tests
from defectbook.data.datasets import Dataset, read_elpv
from defectbook.data.joining import join
from defectbook.data.resized import Kept, at_size
from defectbook.data.views import limit
from defectbook.data.wood import read_wood


def surfaces(count: int, size: tuple[int, int] = (64, 64), prefix: str = "part") -> list[Sample]:
    return [Sample(noise(i, size), name=f"{prefix}{i}", meta={"kind": "good", "group": i // 2}) for i in range(count)]


def toy(normal: int = 12, defective: int = 3, size: tuple[int, int] = (64, 64)) -> Dataset:
    mask = np.zeros(size, np.uint8)
    mask[5:9, 5:9] = 2
    bad = [Sample(noise(50 + i, size), mask, 2, f"bad{i}", {"kind": "hole"}, mask_threshold=None) for i in range(defective)]
    tests = surfaces(normal, size, "test")
    return Dataset("toy", "all", Path("nowhere"), surfaces(5, size, "train"), surfaces(3, size, "validation"),
                   [*bad[:1], *tests, *bad[1:]], ("normal", "dent", "hole"), ["read from nowhere"])


# --- samples ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 90), st.integers(40, 90), st.integers(0, 10_000), st.sampled_from(["dark", "bright", "auto"]))
def test_the_mask_is_exactly_what_changed(height, width, seed, tone):
    (sound,) = surfaces(1, (height, width))
    (cracked,) = crack_samples([sound], seed, tone=tone)
    assert cracked.label == 1 and cracked.name == "part0 cracked" and cracked.meta == {"kind": "crack", "group": 0}
    assert cracked.mask.any() and ((cracked.image != sound.image).any(-1) == (cracked.mask == 1)).all()
    assert set(np.unique(cracked.mask)) == {0, 1}
    (again,) = crack_samples([sound], seed, tone=tone)
    assert again.image.tobytes() == cracked.image.tobytes() and again.mask.tobytes() == cracked.mask.tobytes()
    for other in (crack_samples([sound], seed + 1, tone=tone), crack_samples([sound], seed, "tuning", tone=tone)):
        assert (other[0].mask != cracked.mask).any()


def test_cracks_go_by_name_and_not_by_place():
    sounds = surfaces(6)
    forward, backward = crack_samples(sounds), crack_samples(sounds[::-1])
    for one, two in zip(forward, backward[::-1], strict=True):
        assert one.name == two.name and (one.image == two.image).all()
    assert len({sample.mask.tobytes() for sample in forward}) == 6


def test_many_samples_do_not_mix_up_in_the_cache():
    sounds = surfaces(40)
    images = [sample.image for sample in crack_samples(sounds)]
    masks = [sample.mask for sample in crack_samples(sounds)]
    for sound, image, mask in zip(sounds, images, masks, strict=True):
        assert ((image != sound.image).any(-1) == (mask == 1)).all()


def test_options_reach_the_cracks():
    (sound,) = surfaces(1, (128, 128))
    areas = [crack_samples([sound], width=width)[0].mask.sum() for width in ((0.01, 0.01), [0.05, 0.05])]
    assert areas[1] > 2 * areas[0]
    dark, bright = (crack_samples([sound], tone=tone)[0].image.astype(int) - sound.image for tone in ("dark", "bright"))
    assert dark.max() == 0 < -dark.min() and bright.min() == 0 < bright.max()


def test_auto_is_bright_on_dark_surfaces_only():
    def change(grey: int) -> np.ndarray:
        sound = Sample(np.full((64, 64, 3), grey, np.uint8), name="plain")
        return crack_samples([sound], tone="auto")[0].image.astype(int) - sound.image

    assert change(64).max() == 0 and change(200).max() == 0 and change(63).min() == 0 and change(0).min() == 0


def test_cracked_samples_survive_pickling_and_careless_readers():
    (cracked,) = crack_samples(read_wood(1, 0, 1, size=64).test, seed=3, contrast=[0.5, 0.6])
    image, mask = cracked.image, cracked.mask
    copy = pickle.loads(pickle.dumps(cracked))
    assert (copy.image == image).all() and (copy.mask == mask).all() and copy.name == cracked.name
    cracked.image[:] = 0
    cracked.mask[:] = 0
    assert (cracked.image == image).all() and (cracked.mask == mask).all()


def test_a_black_image_is_named_when_it_is_read():
    (cracked,) = crack_samples([Sample(np.zeros((64, 64, 3), np.uint8), name="night")])
    with pytest.raises(DataError, match="night: no pixel of this 64x64 px image can become darker; use the other tone"):
        _ = cracked.image


def test_a_defective_sample_is_refused():
    with pytest.raises(DataError, match="bad0: has label 2; cracks are grown on normal samples only"):
        crack_samples(toy().test)


@pytest.mark.parametrize(("options", "message"), [
    ({"tone": "red"}, "unknown tone of cracks 'red'"),
    ({"tone": ["dark"]}, "unknown tone"),
    ({"contrast": (0.9, 0.1)}, "contrast=(0.9, 0.1): give a range"),
    ({"contrast": 0.5}, "ranges are pairs of numbers"),
    ({"contrast": {}}, "ranges are pairs of numbers"),
    ({"contrast": (1e-6, 1e-6)}, "raise contrast"),
    ({"length": (0, 1)}, "length=(0, 1): give a positive range"),
    ({"cracks": "many"}, "ranges are pairs of numbers"),
    ({"branching": -1}, "branching is a number from 0"),
    ({"widht": (0.1, 0.2)}, "did you mean 'width'"),
    ({"image": 1}, "unknown option of cracks 'image'"),
    ({"seed": -1}, "seed -1"),
    ({"stream": 3}, "stream 3: give a name"),
])
def test_bad_options_are_one_line_before_anything_is_read(options, message):
    with pytest.raises(ParameterError) as error:
        crack_samples([Sample(Path("missing.png"), name="never read")], **options)
    assert message in str(error.value) and "\n" not in str(error.value)


# --- tests -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 14), st.data())
def test_a_crack_test_is_disjoint_and_leaves_the_rest_alone(normal, data):
    test = data.draw(st.integers(1, normal - 1))
    clean = data.draw(st.none() | st.integers(1, normal - test))
    source = toy(normal)
    made = crack_tests(source, test, data.draw(st.integers(0, 99)), clean)
    assert made.train is source.train and made.validation is source.validation and made.simulated
    assert made.name == "toy_simulated_cracks" and made.category == "all" and made.classes == ("normal", "crack")
    labels = [sample.label for sample in made.test]
    assert labels.count(1) == test and labels.count(0) == (clean or min(test, normal - test)) and set(labels) == {0, 1}
    names = [sample.name.removesuffix(" cracked") for sample in made.test]
    assert len(set(names)) == len(names) and all(name.startswith("test") for name in names)
    originals = {sample.name: sample for sample in source.test}
    assert all(sample is originals[sample.name] for sample in made.test if sample.label == 0)
    assert made.notes[0] == "read from nowhere" and f"simulated: cracks were grown on {test} normal test images of toy" in made.notes[-1]
    assert ("fewer than" in made.notes[-1]) == (clean is None and normal < 2 * test)
    assert "3 images with other defects are left out" in made.notes[-1]


def test_the_seed_decides():
    first, again, other = (crack_tests(toy(), 5, seed) for seed in (1, 1, 2))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.fingerprint() != crack_tests(toy(), 5, 1, stream="tuning").fingerprint()
    assert [s.name for s in first.test if s.label] == [s.name for s in crack_tests(toy(), 5, 1, clean=2).test if s.label]
    assert {s.name for s in first.test} != {s.name for s in other.test} or [s.label for s in first.test] != [s.label for s in other.test]


def test_names_and_notes():
    assert crack_tests(read_wood(1, 0, 4, size=32), 2).name == "wood_simulated_cracks"
    made = crack_tests(toy(defective=0), 2, name="mine", tone="bright")
    assert made.name == "mine" and "(seed 0, tone bright); 2 stay whole" in made.notes[-1] and "left out" not in made.notes[-1]
    assert toy().notes == ["read from nowhere"], "the source is not touched"


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"test": 12}, DataError, "toy, all: 12 normal images to crack and at least 1 to leave whole were asked for, but the test has 12"),
    ({"test": 8, "clean": 5}, DataError, "8 normal images to crack and 5 to leave whole"),
    ({"test": 0}, ParameterError, "test=0 images"),
    ({"test": 3, "clean": 0}, ParameterError, "clean=0 images"),
    ({"test": 3.0}, ParameterError, "test=3.0 images"),
    ({"test": 3, "clean": True}, ParameterError, "clean=True images"),
    ({"test": 3, "seed": "x"}, ParameterError, "seed 'x'"),
    ({"test": 3, "colour": "red"}, ParameterError, "unknown option of cracks 'colour'"),
])
def test_bad_tests_are_one_line(arguments, error, message):
    with pytest.raises(error) as raised:
        crack_tests(toy(), **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


# --- one size --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 80), st.integers(20, 80), st.integers(1, 70))
def test_at_size_resizes_image_and_mask(height, width, size):
    source = toy(2, 1, (height, width))
    small = at_size(source, size)
    assert [s.name for s in small.samples] == [s.name for s in source.samples] and small.classes == source.classes
    for sample in small.samples:
        assert sample.image.shape == (size, size, 3) and sample.mask.shape == (size, size) and set(np.unique(sample.mask)) <= {0, 2}
    assert small.notes == ["read from nowhere", f"every image resized to {size}x{size} px"]


def test_at_size_changes_nothing_when_sizes_agree():
    source = toy()
    same = at_size(source, 64)
    for one, two in zip(source.samples, same.samples, strict=True):
        assert (one.image == two.image).all() and (one.mask == two.mask).all() and one.meta == two.meta and one.label == two.label
    assert source.fingerprint() != at_size(source, 32).fingerprint() == at_size(source, 32).fingerprint()


def test_images_are_read_once():
    reads = []

    def read() -> np.ndarray:
        reads.append(1)
        return noise(0)

    small = at_size(Dataset("counted", "all", Path("."), [Sample(read, name="one")], [], []), 16)
    assert not reads, "nothing is read before it is asked for"
    first = small.train[0].image
    first[:] = 0
    assert len(reads) == 1 and small.train[0].image.any() and len(reads) == 1


def test_kept_arrays_stay_behind_when_pickled():
    small = at_size(read_wood(1, 0, 2, size=96), 32)
    image = small.test[0].image
    packed = pickle.dumps(small.test[0])
    assert len(packed) < 2000 and (pickle.loads(packed).image == image).all()
    kept = Kept(lambda: np.ones(2))
    kept()[:] = 0
    assert kept().all()


@pytest.mark.parametrize("size", [0, -3, 12.5, True, "128", (128, 128)])
def test_no_size_is_refused(size):
    with pytest.raises(ParameterError, match="toy: size=.* px; give a whole number, at least 1"):
        at_size(toy(), size)


# --- together --------------------------------------------------------------------------------------------------------


def test_resize_then_crack_keeps_the_mask_exact():
    small = at_size(toy(size=(90, 120)), 48)
    made = crack_tests(small, 5, seed=4)
    sound = {sample.name: sample.image for sample in small.test}
    for sample in made.test:
        changed = (sample.image != sound[sample.name.removesuffix(" cracked")]).any(-1)
        assert (changed == (sample.mask == 1)).all() and changed.any() == bool(sample.label)
        assert (pickle.loads(pickle.dumps(sample)).image == sample.image).all()
    again = crack_tests(at_size(toy(size=(90, 120)), 48), 5, seed=4)
    assert made.fingerprint() == again.fingerprint()


def test_cracks_can_be_resized_limited_and_joined(elpv_tree):
    cells = read_elpv(elpv_tree, normal=8, validation=4)
    made = crack_tests(at_size(cells, 32), 5)
    assert "elpv_simulated_cracks" == made.name and [len(split) for split in made.splits.values()] == [8, 4, 10]
    part = limit(made, test=4)
    assert sorted(s.label for s in part.test) == [0, 0, 1, 1]
    shrunk = at_size(crack_tests(cells, 5), 32)
    assert all(sample.mask.shape == (32, 32) for sample in shrunk.test)
    wood = crack_tests(at_size(read_wood(2, 1, 4, size=40), 32), 2)
    both = join([made, wood])
    assert both.simulated and len(both.test) == 14 and both.test[-1].image.shape == (32, 32, 3)


def test_on_real_tiles(data_root):
    tiles = load("magnetic_tile", None, {"train": 4, "validation": 2})
    made = crack_tests(at_size(tiles, 128), 20, tone="auto")
    sound = {sample.name: sample for sample in at_size(tiles, 128).test}
    assert "images with other defects are left out" in made.notes[-1] and {s.meta["kind"] for s in made.test} == {"good", "crack"}
    for sample in made.test[:12]:
        changed = (sample.image != sound[sample.name.removesuffix(" cracked")].image).any(-1)
        assert (changed == (sample.mask == 1)).all() and changed.any() == bool(sample.label)
