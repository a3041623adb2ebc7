"""Tiles: weights that sum to one, maps equal to the untiled ones for a local detector, bounded memory, and detectors that are refused."""

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Prediction, Sample
from defectbook.methods.ensemble import Ensemble
from defectbook.methods.lowrank import RASL, RPCA
from defectbook.methods.paedid import PAEDID
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.pni import PNI
from defectbook.methods.smooth_sparse import SmoothSparse
from defectbook.models.tiling import Tiled, Tiling, blend_tiles, bound_to_position, cut_tiles, tile_samples


class Box:
    """|pixel - mean of the window around it|: a local rule with a reach of `radius` px."""

    position_bound = False

    def __init__(self, radius: int = 3):
        self.radius, self.seen, self.largest = radius, [], 0

    def fit(self, samples):
        self.seen = [sample.image for sample in samples]
        return self

    def predict(self, samples) -> Prediction:
        self.largest = max(self.largest, len(samples))
        side = 2 * self.radius + 1
        grey = [sample.image[..., 0].astype(np.float32) for sample in samples]
        maps = [np.abs(image - cv2.blur(image, (side, side), borderType=cv2.BORDER_REFLECT_101)) for image in grey]
        return Prediction(maps, np.array([found.max() for found in maps]))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


tilings = st.integers(8, 40).flatmap(lambda tile: st.integers(0, tile - 1).flatmap(
    lambda overlap: st.integers(0, max(0, (overlap - 1) // 2)).map(lambda margin: Tiling(tile, overlap, margin))))


@settings(max_examples=60, deadline=None)
@given(tilings, st.integers(1, 150))
def test_weights_sum_to_one_and_tiles_cover(tiling: Tiling, length: int) -> None:
    starts, weights = tiling.starts(length), tiling.weights(length)
    total, covered = np.zeros(max(length, tiling.tile)), max(length, tiling.tile)
    for start, row in zip(starts, weights, strict=True):
        total[start:start + tiling.tile] += row
    assert np.allclose(total, 1, rtol=0, atol=1e-12) and (weights >= 0).all()
    assert starts[0] == 0 and starts[-1] + tiling.tile == covered
    assert (np.diff(starts) <= tiling.tile - tiling.overlap).all() and (np.diff(starts) > 0).all()


@settings(max_examples=40, deadline=None)
@given(tilings, st.integers(1, 90), st.integers(1, 90), st.floats(-1e6, 1e6, width=32))
def test_a_constant_map_stays_to_the_bit(tiling: Tiling, height: int, width: int, value: float) -> None:
    count = len(tiling.starts(height)) * len(tiling.starts(width))
    blended = blend_tiles((np.full((tiling.tile, tiling.tile), value, np.float32) for _ in range(count)), (height, width), tiling)
    assert blended.shape == (height, width) and blended.dtype == np.float32 and (blended == np.float32(value)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(24, 120), st.integers(24, 120), st.integers(0, 9))
def test_equals_the_untiled_map_when_the_margin_is_the_reach(radius: int, height: int, width: int, seed: int) -> None:
    """A local detector of the same border rule: at the image's own border tiles see what the whole image does."""
    sample = Sample(picture(height, width, seed), name="x")
    tiled = Tiled(Box(radius), Tiling(24, 2 * radius + 5, radius), batch_size=3).predict([sample])
    np.testing.assert_allclose(tiled.maps[0], Box(radius).predict([sample]).maps[0], rtol=0, atol=1e-3)


def test_without_the_margin_it_differs() -> None:
    sample = Sample(picture(100, 100), name="x")
    difference = Tiled(Box(4), Tiling(24, 12, 0)).predict([sample]).maps[0] - Box(4).predict([sample]).maps[0]
    assert np.abs(difference).max() > 1


def test_an_image_of_one_tile_is_predicted_as_it_is() -> None:
    sample = Sample(picture(32, 32), name="x")
    found, plain = Tiled(Box(), Tiling(32, 8, 2)).predict([sample]), Box().predict([sample])
    assert np.array_equal(found.maps[0], plain.maps[0]) and found.scores[0] == plain.scores[0]


def test_score_is_the_worst_tiles() -> None:
    image = np.full((64, 64, 3), 100, np.uint8)
    image[50, 50] = 255
    samples = [Sample(np.full((64, 64, 3), 100, np.uint8), name="a"), Sample(image, name="b")]
    scores = Tiled(Box(), Tiling(32, 8, 2)).predict(samples).scores
    assert scores[0] == 0 and scores[1] > 100


@pytest.mark.parametrize(("height", "width"), [(1, 200), (200, 1), (5, 7), (31, 100)])
def test_images_smaller_than_a_tile_keep_their_size_and_scale(height: int, width: int) -> None:
    image = picture(height, width)
    tiles = list(cut_tiles(image, Tiling(32, 8, 2)))
    assert all(tile.shape == (32, 32, 3) for tile in tiles)
    assert np.array_equal(tiles[0][:min(32, height), :min(32, width)], image[:32, :32])
    assert Tiled(Box(), Tiling(32, 8, 2)).predict([Sample(image, name="x")]).maps[0].shape == (height, width)


def test_fit_sees_tiles_and_batches_are_bounded() -> None:
    box, tiling = Box(), Tiling(32, 8, 2)
    images = [picture(70, 50, seed) for seed in range(2)]
    Tiled(box, tiling, batch_size=2).fit([Sample(image, name=str(number)) for number, image in enumerate(images)])
    expected = [tile for image in images for tile in cut_tiles(image, tiling)]
    assert len(box.seen) == len(expected) and all(np.array_equal(one, two) for one, two in zip(box.seen, expected, strict=True))
    Tiled(box, tiling, batch_size=2).predict([Sample(images[0], name="x")])
    assert box.largest == 2


def test_tiles_in_order_read_each_image_once_and_none_is_kept_for_long() -> None:
    read = []

    def source(number: int):
        return lambda: read.append(number) or picture(64, 64, number)

    tiles = tile_samples([Sample(source(number), name=str(number)) for number in range(3)], Tiling(32, 8, 2))
    del read[:]
    assert all(tile.image.shape == (32, 32, 3) for tile in tiles)
    assert len(read) <= 3


def test_memory_does_not_grow_with_tiles() -> None:
    """Beside the image: its float32 map, one strip of tiles in float64 and a batch; not all tiles' maps."""
    image = np.zeros((1500, 1500, 3), np.uint8)
    tiled = Tiled(Box(), Tiling(100, 60, 10), batch_size=4)
    sample = Sample(image, name="large")
    tiled.predict([Sample(image[:200, :200], name="warm")])
    tracemalloc.start()
    tiled.predict([sample])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tiles = len(tiled.tiling.starts(1500)) ** 2
    held = image.nbytes + 2 * 4 * 1500 * 1500 + 3 * 8 * 100 * 1500 + 2_000_000
    assert peak < held < 4 * 100 * 100 * tiles


@pytest.mark.parametrize("values", [(4, 0, 0), (32, 32, 0), (32, -1, 0), (32, 8, 4), (32, 8, -1), (32.0, 8, 2), (True, 0, 0), ("32", 8, 2)])
def test_impossible_tilings_are_named(values: tuple) -> None:
    with pytest.raises(ParameterError, match="tile=|overlap="):
        Tiling(*values)


def pni(position: bool) -> PNI:
    return PNI("efficientnet_lite0", image_size=64, device="cpu").using(position=position)


@pytest.mark.parametrize(("build", "bound"), [
    (lambda: PatchCore(image_size=64, device="cpu"), False), (lambda: SmoothSparse(image_size=32), False),
    (lambda: pni(True), True), (lambda: pni(False), False), (PAEDID, True), (RPCA, True), (RASL, True),
    (lambda: Ensemble([PatchCore(image_size=64, device="cpu"), RPCA()]), True),
    (lambda: Ensemble([PatchCore(image_size=64, device="cpu")]), False),
])
def test_detectors_that_depend_on_position_are_refused(build, bound: bool) -> None:
    detector = build()
    assert bool(bound_to_position(detector)) == bound
    if bound:
        with pytest.raises(ParameterError, match="cannot be tiled"):
            Tiled(detector)


def test_an_unknown_detector_must_say_what_it_is() -> None:
    class Mystery:
        def predict(self, samples):
            raise AssertionError

    with pytest.raises(ParameterError, match="Mystery.*position_bound"):
        Tiled(Mystery())


def test_a_map_of_another_size_is_named() -> None:
    class Shrinking(Box):
        def predict(self, samples):
            return Prediction([np.zeros((8, 8), np.float32) for _ in samples], np.zeros(len(samples)))

    with pytest.raises(DataError, match="part 7.*\\(8, 8\\)"):
        Tiled(Shrinking(), Tiling(32, 8, 2)).predict([Sample(picture(64, 64), name="part 7")])
    with pytest.raises(DataError, match="no normal images"):
        Tiled(Box()).fit([])
