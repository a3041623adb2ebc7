"""Even parts, centre crops, cells with simulated cracks, and their names in the catalogue."""

import numpy as np
import pytest
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.catalogue import categories_in, load
from defectbook.data.cracks import read_elpv_cracks
from defectbook.data.datasets import Dataset
from defectbook.data.views import centre_crop, crop_sample, limit, share_out, spread


def samples(kind: str, count: int) -> list[Sample]:
    return [Sample(noise(i), label=int(kind != "good"), name=f"{kind}{i}", meta={"kind": kind}) for i in range(count)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 120))
def test_shares_keep_every_kind_and_the_sum(sizes, total):
    taken = share_out(sizes, total)
    assert (taken >= 1).all() and (taken <= sizes).all()
    assert taken.sum() == min(max(total, len(sizes)), sum(sizes))


@given(st.integers(1, 200), st.integers(1, 250))
def test_spread_is_rising_and_even(count, keep):
    index = spread(count, keep)
    assert len(index) == min(count, keep) and (np.diff(index) > 0).all() and 0 <= index[0] and index[-1] < count
    if keep < count:
        assert np.diff(index).max(initial=1) - np.diff(index).min(initial=count) <= 1


def test_limit_keeps_order_and_says_so(tmp_path):
    full = Dataset("toy", "all", tmp_path, samples("good", 9), samples("good", 3), samples("good", 8) + samples("hole", 4))
    part = limit(full, train=4, test=6)
    assert [len(split) for split in part.splits.values()] == [4, 3, 6]
    assert [s.meta["kind"] for s in part.test] == ["good"] * 4 + ["hole"] * 2
    assert part.notes[-1] == "an even part: 4 of 9 images of train, 6 of 12 images of test"
    assert limit(full) is full and limit(full, test=100) is full
    assert limit(full, train=4, test=6).fingerprint() == part.fingerprint() != full.fingerprint()
    with pytest.raises(ParameterError, match="test=0 images; ask for at least one"):
        limit(full, test=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 60), st.integers(8, 60), st.integers(10, 40), st.data())
def test_crop_keeps_image_and_mask_together(height, width, resize, data):
    """The mask of a crop is the crop of the resized mask: a picture of the mask itself goes the same way (nearest at equal scale)."""
    crop = data.draw(st.integers(1, resize))
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4:height // 2, width // 4:width // 2] = 3
    image, meta = np.zeros((height, width, 3), np.uint8), {"boxes": 1, "kind": "a"}
    seen = crop_sample(Sample(image, mask, 1, "one", meta, mask_threshold=None), resize, crop)
    assert seen.image.shape == (crop, crop, 3) and seen.mask.shape == (crop, crop) and set(np.unique(seen.mask)) <= {0, 3}
    assert seen.meta == {"kind": "a"} and seen.label == 1


def test_crop_is_the_middle():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)[..., None].repeat(3, 2)
    seen = crop_sample(Sample(image, None, 0, "one"), 8, 4)
    assert (seen.image == image[2:6, 2:6]).all() and seen.mask.sum() == 0 and seen.mask_source is None
    assert crop_sample(Sample(image, None, 1, "bad"), 8, 4).mask is None
    for resize, crop in ((8, 9), (8, 0)):
        with pytest.raises(ParameterError, match="between 1 px and the resized side"):
            crop_sample(Sample(image), resize, crop)


def test_centre_crop_reads_lazily(tmp_path):
    missing = Sample(tmp_path / "none.png", None, 0, "one")
    cropped = centre_crop(Dataset("toy", "all", tmp_path, [missing], [missing], [missing]))
    assert "middle 480x480 px" in cropped.notes[-1]
    with pytest.raises(DataError, match="none.png"):
        _ = cropped.train[0].image


def test_cracked_cells(elpv_tree):
    made = read_elpv_cracks(elpv_tree, normal=8, validation=4, test=10, seed=1)
    assert [len(split) for split in made.splits.values()] == [8, 4, 10] and made.simulated and "simulated" in made.name
    assert [s.label for s in made.test] == [0, 1] * 5
    cells = [s.name.removesuffix(" cracked") for s in made.samples]
    assert len(set(cells)) == len(cells), "a cell is in one split, whole or cracked"
    assert not {f"cell{i:04}" for i in range(24, 30)} & set(cells), "really defective cells take no part"
    for sample in made.test[1::2]:
        original = next(s for s in read_elpv_cracks(elpv_tree, normal=8, validation=4, test=10, seed=1).test if s.name == sample.name)
        assert (original.image == sample.image).all() and sample.mask.any()
    assert made.fingerprint() == read_elpv_cracks(elpv_tree, normal=8, validation=4, test=10, seed=1).fingerprint()
    assert made.fingerprint() != read_elpv_cracks(elpv_tree, normal=8, validation=4, test=10, seed=2).fingerprint()


def test_cracks_change_only_the_mask(elpv_tree):
    made = read_elpv_cracks(elpv_tree, normal=8, validation=4, test=6)
    cracked = made.test[1]
    whole = Sample(elpv_tree / "images" / f"{cracked.name.removesuffix(' cracked')}.png")
    assert ((whole.image != cracked.image).any(-1) == (cracked.mask > 0)).all()


def test_too_many_cracked_cells_are_refused(elpv_tree):
    with pytest.raises(DataError, match="test=13 cells were asked for, and 12 functional ones remain"):
        read_elpv_cracks(elpv_tree, normal=8, validation=4, test=13)


def test_catalogue_limits_and_lists(elpv_tree, mvtec_tree):
    part = load("elpv_simulated_cracks", elpv_tree, {"train": 5, "test": 4}, normal=8, validation=4, test=10)
    assert [len(split) for split in part.splits.values()] == [5, 4, 4] and {s.label for s in part.test} == {0, 1}
    assert categories_in("elpv_simulated_cracks", elpv_tree) == ["mono", "poly"]
    assert categories_in("folder", mvtec_tree) == ["plate"] and categories_in("foil") == [""]
    with pytest.raises(DataError, match="did you mean"):
        categories_in("elpv_simulated_crack")


def test_the_sets_of_the_small_experiments(data_root):
    """Which images stand for normal and defective, and which truth each set has."""
    pcb = load("deeppcb", None, {"train": 20, "validation": 5, "test": 30}, masks="boxes")
    assert not any(s.label for s in (*pcb.train, *pcb.validation)) and {s.label for s in pcb.test} == {0, 1}
    board = next(s for s in pcb.test if s.label)
    assert set(np.unique(board.mask)) == {0, *np.unique(board.meta["boxes"][:, 4])}
    tiles = load("magnetic_tile", None, {"train": 20, "validation": 5, "test": 30})
    assert {s.meta["kind"] for s in tiles.test} == {"good", "blowhole", "break", "crack"}
    assert all(s.mask.any() for s in tiles.test if s.label)
