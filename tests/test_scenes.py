"""Scenes: exact masks, one stream of chance a scene, close looks that lose nothing, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, generator
from defectbook.data.scenes import FAMILIES, SHARES, SMALLEST, Scene, close_up, draw_scene, enlarge, look_closely, outline, paste, visible


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([128, 160, 256]), st.sampled_from([None, *FAMILIES]))
def test_a_scene_holds_objects_that_can_be_seen(seed: int, index: int, side: int, family: str | None) -> None:
    scene = draw_scene(seed, index, side, "property", family)
    assert scene.image.shape == (side, side, 3) and scene.image.dtype == np.uint8
    assert scene.masks.dtype == np.uint8 and scene.masks.shape[1:] == (side, side) and set(np.unique(scene.masks)) == {0, 1}
    areas = scene.masks.sum((1, 2))
    assert len(areas) >= 1 and areas.min() >= SMALLEST and areas.max() <= 0.75 * side * side
    assert scene.family in FAMILIES and (family is None or scene.family == family)


def test_a_scene_depends_on_its_own_numbers_only() -> None:
    alone = draw_scene(3, 7, 128)
    for other in range(5):
        draw_scene(3, other, 128)
    again = draw_scene(3, 7, 128)
    assert (alone.image == again.image).all() and (alone.masks == again.masks).all()
    assert not np.array_equal(alone.image, draw_scene(4, 7, 128).image) and not np.array_equal(alone.image, draw_scene(3, 7, 128, "test").image)


def test_families_come_in_their_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1) and set(SHARES) == set(FAMILIES)
    drawn = [draw_scene(1, index, 128).family for index in range(80)]
    for family, share in SHARES.items():
        assert abs(drawn.count(family) / 80 - share) < 4 * (share * (1 - share) / 80) ** 0.5


def test_later_shapes_cover_earlier_ones() -> None:
    for index in range(12):
        scene = FAMILIES["shapes"](128, generator(index, "cover"))
        assert scene.masks.sum(0).max() <= 1  # no pixel belongs to two


def test_paste_says_exactly_where_its_cover_is() -> None:
    rng = generator(5)
    image = np.full((64, 64, 3), 90, np.uint8)
    cover = np.zeros((64, 64), np.uint8)
    cover[20:40, 10:30] = 255
    mask = paste(image, cover, np.full_like(image, 200), rng)
    assert (mask == (cover > 127)).all() and (image[25:35, 15:25] > 150).all() and (image[50:, 50:] == 90).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(64, 200))
def test_outlines_are_drawn_inside(seed: int, side: int) -> None:
    layer = outline(side, generator(seed))
    assert layer.shape == (side, side) and layer.dtype == np.uint8


def test_what_cannot_be_seen_is_no_object() -> None:
    tiny, all_of_it, good = (np.zeros((32, 32), np.uint8) for _ in range(3))
    tiny[0, 0], all_of_it[:], good[4:20, 4:20] = 1, 1, 1
    assert visible([tiny, all_of_it, good], 32).sum() == good.sum() and visible([], 32).shape == (0, 32, 32)


def test_a_close_look_is_the_window_it_names() -> None:
    image = np.arange(100 * 120 * 3, dtype=np.uint32).reshape(100, 120, 3).astype(np.uint8)
    mask = np.zeros((1, 100, 120), np.uint8)
    mask[0, 30:50, 40:70] = 1
    same = look_closely(Scene(image, mask, "x"), (60, 50), 64, 64)
    assert (same.image == image[18:82, 28:92]).all() and (same.masks[0] == mask[0, 18:82, 28:92]).all()
    corner = look_closely(Scene(image, mask, "x"), (0, 0), 64, 64)  # moved inside
    assert (corner.image == image[:64, :64]).all()
    larger = look_closely(Scene(image, mask, "x"), (60, 50), 64, 128)
    assert larger.image.shape == (128, 128, 3) and larger.masks[0].sum() == pytest.approx(4 * mask.sum(), rel=0.1)


def test_enlarging_keeps_an_object() -> None:
    for index in range(10):
        scene = FAMILIES["surface"](128, generator(index, "enlarge"))
        if len(scene.masks):
            assert len(enlarge(scene, generator(index)).masks) >= 1


def sample(mask: np.ndarray | None, size: tuple[int, int] = (120, 200)) -> Sample:
    return Sample(np.full((*size, 3), 100, np.uint8), mask, 0 if mask is None else 1, "tile", {"kind": "crack"}, mask_threshold=None)


def test_a_close_up_shows_the_largest_component_only() -> None:
    mask = np.zeros((120, 200), np.uint8)
    mask[40:70, 100:140], mask[5:10, 5:10] = 1, 1
    scene = close_up(sample(mask), 96)
    assert scene.masks.shape == (1, 96, 96) and scene.family == "crack"
    # The window is twice the longer side, 80 px, at 96 px: areas grow by 1.44.
    assert scene.masks.sum() == pytest.approx(30 * 40 * 1.44, rel=0.05)


@pytest.mark.parametrize("bad", [sample(None), sample(np.zeros((120, 200), np.uint8)), sample(np.ones((40, 200), np.uint8), (40, 200))])
def test_no_close_up_of_nothing(bad: Sample) -> None:
    with pytest.raises(DataError, match="tile"):
        close_up(bad)


@pytest.mark.parametrize("options", [{"side": 64}, {"side": 1.5}, {"side": True}, {"family": "shape"}])
def test_refused(options: dict) -> None:
    with pytest.raises(ParameterError):
        draw_scene(0, 0, **{"side": 128, **options})
