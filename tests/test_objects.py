"""Objects to click on: parts of masks, windows around them, sets, and folders of instances."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import noise
from scipy import ndimage

from defectbook.core import DataError, ParameterError, Sample, generator
from defectbook.data.objects import (
    OBJECT_SETS,
    PROCEDURAL_SETS,
    ClickObject,
    close_look,
    components,
    defect_objects,
    objects_on,
    procedural_objects,
    read_instances,
    shuffled,
    take_turns,
)


def spots(seed: int, size: tuple[int, int] = (80, 100)) -> np.ndarray:
    """A class mask with classes 0..2 in blobs."""
    field = ndimage.gaussian_filter(generator(seed, "spots").normal(size=size), 3)
    return (field > field.std()).astype(np.uint8) + (field > 1.6 * field.std())


@pytest.mark.parametrize("seed", range(5))
def test_components_are_scipys(seed: int) -> None:
    mask = spots(seed)
    expected = set()
    for value in (1, 2):
        labels, count = ndimage.label(mask == value, np.ones((3, 3)))
        expected |= {(value, (labels == number).tobytes()) for number in range(1, count + 1) if (labels == number).sum() >= 10}
    found = components(mask, least=10)
    assert {(value, part.tobytes()) for value, part in found} == expected and expected
    areas = [part.sum() for _, part in found]
    assert areas == sorted(areas, reverse=True)


def test_a_window_holds_the_object_and_its_neighbours_stay_out() -> None:
    image, mask = noise(0, (200, 300)), np.zeros((200, 300), np.uint8)
    mask[90:130, 200:240], mask[100:110, 250:260] = 1, 1
    sample = Sample(image, mask, 1, "two", {"kind": "hole"}, mask_threshold=None)
    first, second = objects_on(sample, most=5)
    assert (first.name, second.name, first.kind) == ("two#0", "two#1", "hole")
    assert first.image.shape == (256, 256, 3) and first.mask.shape == (256, 256) and first.mask.dtype == bool
    assert abs(first.mask.mean() - 0.25) < 0.02  # a window of twice its width
    assert ndimage.label(first.mask)[1] == 1
    assert objects_on(sample, most=1)[0].mask.tobytes() == first.mask.tobytes()
    assert len(objects_on(sample, most=5, least=200)) == 1


def test_whole_pictures_stay_as_they_are() -> None:
    image, mask = noise(1, (70, 90)), np.zeros((70, 90), np.uint8)
    mask[10:30, 5:40] = 3
    looked = close_look(image, mask, room=None)
    assert np.array_equal(looked[0], image) and np.array_equal(looked[1], mask != 0)
    kinds = [item.kind for item in objects_on(Sample(image, mask, 1, "x", mask_threshold=None), ("normal", "a", "b", "dent"))]
    assert kinds == ["dent"]


def test_a_mask_that_is_not_there() -> None:
    with pytest.raises(DataError, match="x: label 1 but no mask"):
        objects_on(Sample(noise(0), None, 1, "x"))


def test_turns_and_orders() -> None:
    assert take_turns([1, 2, 3, 4, 5], "aabab") == [1, 3, 2, 5, 4]
    objects = [ClickObject(np.zeros((1, 1, 3), np.uint8), np.ones((1, 1), bool), str(number), "a") for number in range(20)]
    orders = [[item.name for item in shuffled(objects, order)] for order in (0, 1, 2, 1)]
    assert orders[0] == [item.name for item in objects] and orders[1] == orders[3] != orders[2]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


@pytest.mark.parametrize("name", ["pcb", "foil"])
def test_simulated_sets(name: str) -> None:
    objects = defect_objects(name, 12)
    assert len(objects) == 12 and len({item.name for item in objects}) == 12 and len({item.kind for item in objects}) > 2
    assert all(0 < item.mask.mean() <= 0.75 for item in objects)
    again = defect_objects(name, 12)
    assert all(np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask) for a, b in zip(objects, again, strict=True))


@pytest.mark.parametrize("name", ["magnetic_tile", "deeppcb"])
def test_real_sets(name: str, data_root: Path) -> None:
    objects = defect_objects(name, 8)
    assert len(objects) == 8 and len({item.kind for item in objects}) > 2
    assert len({item.name for item in objects}) == 8


def test_unknown_set_and_count() -> None:
    with pytest.raises(ParameterError, match=", ".join(sorted(OBJECT_SETS))):
        defect_objects("tiles")
    with pytest.raises(ParameterError, match="count=0"):
        defect_objects("pcb", 0)


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbered = np.zeros((60, 80), np.uint16)
    numbered[5:25, 5:25], numbered[30:50, 40:75] = 1, 4000
    write(tmp_path / "images" / "logs" / "a.png", noise(0, (60, 80)))
    write(tmp_path / "masks" / "logs" / "a.png", numbered)
    write(tmp_path / "images" / "b.jpg", noise(1, (60, 80)))
    write(tmp_path / "masks" / "b" / "1.png", (numbered == 1).astype(np.uint8) * 255)
    write(tmp_path / "masks" / "b" / "2.png", (numbered > 1).astype(np.uint8))
    return tmp_path


def test_a_folder_of_instances(folder: Path) -> None:
    found = {item.name: item for item in read_instances(folder)}
    assert {name: (item.kind, int(item.mask.sum())) for name, item in found.items()} == {
        "b#0": ("object", 700), "b#1": ("object", 400), "logs/a#0": ("logs", 700), "logs/a#1": ("logs", 400)}
    assert found["b#0"].image.shape == (60, 80, 3)
    assert [item.image.shape for item in read_instances(folder, side=64, room=2.0, most=1)] == [(64, 64, 3)] * 2


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda root: (root / "masks" / "logs" / "a.png").unlink(), r"a: no mask for the picture of that name"),
    (lambda root: write(root / "masks" / "logs" / "a.png", np.zeros((60, 81), np.uint8)), r"a\.png: mask of 81x60 px for a picture of 80x60 px"),
    (lambda root: write(root / "masks" / "logs" / "a.png", np.zeros((60, 80, 3), np.uint8)), r"a\.png: no mask of one channel"),
    (lambda root: [path.unlink() for path in (root / "images").rglob("*.*")], r"images: no pictures"),
])
def test_spoilt_folders(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        read_instances(folder)


def test_a_folder_with_nothing_annotated(folder: Path) -> None:
    with pytest.raises(DataError, match="2 pictures and no instance of 5000 px"):
        read_instances(folder, least=5000)


@pytest.mark.parametrize("name", PROCEDURAL_SETS)
def test_procedural_objects_depend_on_place_and_seed(name) -> None:
    few, more, others = procedural_objects(name, 3), procedural_objects(name, 5), procedural_objects(name, 3, seed=1)
    assert [item.name for item in few] == [item.name for item in more[:3]]
    for item, same, other in zip(few, more, others, strict=False):
        assert item.image.shape == (256, 256, 3) and item.mask.shape == (256, 256) and item.mask.any()
        assert np.array_equal(item.image, same.image) and np.array_equal(item.mask, same.mask)
        assert not np.array_equal(item.mask, other.mask)


def test_procedural_sets_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ParameterError, match="cracked_wood"):
        procedural_objects("cracked_woods")
    with pytest.raises(ParameterError, match="count=0"):
        procedural_objects("scenes", 0)
