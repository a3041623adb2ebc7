"""The readers of published layouts: generated trees always, the real sets where DEFECTBOOK_DATA names them."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tiny_trees import btad_tree, cut_short, deeppcb_tree, elpv_tree, mvtec_tree, spot, tile_tree, visa_tree, write_image

from defectbook.core import DataError, ParameterError
from defectbook.data.catalogue import READERS, load
from defectbook.data.public_sets import (
    BoxMask,
    categories_of,
    differing,
    read_boxes,
    read_btad,
    read_deeppcb,
    read_magnetic_tile,
    read_visa,
)
from defectbook.data.sources import manifest


def real(folder: str) -> Path:
    """The folder of a real data set; skips the test, naming the set, when it is not there."""
    root = os.environ.get("DEFECTBOOK_DATA")
    if not root or not (Path(root) / folder).is_dir():
        pytest.skip(f"data set {folder} is not at hand: set DEFECTBOOK_DATA to the folder that holds {folder}/")
    return Path(root) / folder


def counts(dataset) -> list[int]:
    return [len(split) for split in dataset.splits.values()]


# VisA

def test_visa_reads_small_mask_values(tmp_path):
    dataset = read_visa(visa_tree(tmp_path), "candle", validation=2)
    assert counts(dataset) == [4, 2, 4]
    assert [int(s.mask.sum()) for s in dataset.test if s.label] == [200, 200]
    assert "6.51 %" in dataset.summary()
    assert categories_of("visa", tmp_path) == ["candle", "pcb1"]


@pytest.mark.parametrize("change, words", [
    (lambda t: t.replace("label", "lable"), "lacks the columns label"),
    (lambda t: t.replace("train,normal", "learn,normal", 1), "line 2: split 'learn'"),
    (lambda t: t.replace("candle/Data/Masks/Anomaly/000.png", ""), "no mask is named"),
    (lambda t: t.replace("Anomaly/001.JPG", "Anomaly/077.JPG"), "077.JPG: named in split_csv/1cls.csv but missing"),
])
def test_visa_table_faults(tmp_path, change, words):
    table = visa_tree(tmp_path) / "split_csv" / "1cls.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(DataError, match=words):
        read_visa(tmp_path, "candle")


def test_visa_unknown_object_and_missing_table(tmp_path):
    visa_tree(tmp_path)
    with pytest.raises(DataError, match="did you mean 'candle'"):
        read_visa(tmp_path, "candel")
    (tmp_path / "split_csv" / "1cls.csv").unlink()
    with pytest.raises(DataError, match="not found"):
        read_visa(tmp_path, "candle")


def test_visa_skips_unreadable(tmp_path):
    visa_tree(tmp_path)
    cut_short(tmp_path / "candle/Data/Images/Normal/0002.JPG")
    dataset = read_visa(tmp_path, "candle", validation=1, on_error="skip")
    assert counts(dataset) == [4, 1, 4] and any("0002.JPG" in note for note in dataset.notes)


# BTAD

@pytest.mark.parametrize("category", ["01", "02", "03"])
@pytest.mark.parametrize("inside", ["", "BTech_Dataset_transformed"])
def test_btad(tmp_path, category, inside):
    btad_tree(tmp_path / inside)
    dataset = read_btad(tmp_path, category, validation=1)
    assert counts(dataset) == [5, 1, 5]
    assert {s.meta["kind"] for s in dataset.samples} == {"good", "ko"}
    assert all(s.mask.sum() == 200 for s in dataset.test if s.label)
    assert categories_of("btad", tmp_path) == ["01", "02", "03"]


# DeepPCB

def test_deeppcb_detection_and_segmentation(tmp_path):
    deeppcb_tree(tmp_path)
    detection = read_deeppcb(tmp_path, validation=0.25)
    assert counts(detection) == [3, 1, 4]
    assert all(s.label == 0 for s in (*detection.train, *detection.validation))
    segmentation = read_deeppcb(tmp_path, task="segmentation", validation=0.25, masks="boxes")
    assert counts(segmentation) == [3, 1, 2]
    assert np.bincount(segmentation.test[0].mask.ravel(), minlength=7).tolist() == [64 * 64 - 14 * 16 - 100, 14 * 16, 0, 0, 0, 0, 100]
    assert segmentation.statistics().table.loc["open", "regions"] == 6
    assert "6 pairs with 12 boxes" in segmentation.summary() and "share 2 groups" in segmentation.summary()


def test_deeppcb_difference_is_what_changed(tmp_path):
    dataset = read_deeppcb(deeppcb_tree(tmp_path), task="segmentation", masks="difference")
    for sample in dataset.samples:
        assert np.bincount(sample.mask.ravel(), minlength=7)[[1, 6]].tolist() == [48, 9]


def test_deeppcb_without_masks_has_none(tmp_path):
    board = read_deeppcb(deeppcb_tree(tmp_path)).test[1]
    assert board.label == 1 and board.mask is None and board.meta["boxes"].shape == (2, 5)


def test_deeppcb_category_is_a_group(tmp_path):
    dataset = read_deeppcb(deeppcb_tree(tmp_path), "group00000", task="segmentation", validation=0)
    assert counts(dataset) == [2, 0, 1]
    with pytest.raises(DataError, match="did you mean 'group00001'"):
        read_deeppcb(tmp_path, "group0001")


@pytest.mark.parametrize("content, words", [
    ("", "no boxes"),
    ("\n \n", "no boxes"),
    ("1 2 3 4\n", "line 1: .* is not 'x1 y1 x2 y2 type'"),
    ("1 2 9 9 1\n1 2 x 9 1\n", "line 2"),
    ("1 2 9 9 7\n", "has type 7; types are 1 to 6"),
    ("1 2 9 9 0\n", "has type 0"),
    ("-1 2 9 9 1\n", "no box inside the image of 64x64 px"),
    ("1 2 65 9 1\n", "no box inside the image"),
    ("9 2 9 9 1\n", "no box inside the image"),
    ("9 9 2 2 1\n", "no box inside the image"),
])
def test_bad_boxes_are_named_and_skipped(tmp_path, content, words):
    deeppcb_tree(tmp_path)
    path = tmp_path / "PCBData/group00000/00000_not/00000004.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        read_deeppcb(tmp_path)
    assert str(path) in str(error.value)
    skipped = read_deeppcb(tmp_path, on_error="skip", task="segmentation", validation=0)
    assert counts(skipped) == [4, 0, 1]
    assert any(note.startswith("skipped") and str(path) in note for note in skipped.notes)


def test_boxes_to_the_edge_are_right(tmp_path):
    (tmp_path / "a.txt").write_text("0,0,64,64,1\n")
    assert read_boxes(tmp_path / "a.txt", (64, 64)).tolist() == [[0, 0, 64, 64, 1]]


def test_deeppcb_missing_and_broken_files(tmp_path):
    deeppcb_tree(tmp_path)
    cut_short(tmp_path / "PCBData/group00000/00000/00000002_temp.jpg")
    skipped = read_deeppcb(tmp_path, on_error="skip", task="segmentation", validation=0)
    assert counts(skipped) == [3, 0, 2] and any("00000002_temp.jpg" in note for note in skipped.notes)
    (tmp_path / "PCBData/group00001/00001/00001003_test.jpg").unlink()
    with pytest.raises(DataError, match="00001003_test.jpg: named in the lists but missing"):
        read_deeppcb(tmp_path)
    (tmp_path / "PCBData/test.txt").unlink()
    with pytest.raises(DataError, match="test.txt: not found"):
        read_deeppcb(tmp_path, on_error="skip")


def test_smaller_box_stays_visible(tmp_path):
    image = write_image(tmp_path / "a.png", np.zeros((20, 20), np.uint8))
    mask = BoxMask(image, ((5, 5, 8, 8, 2), (0, 0, 20, 20, 1)))()
    assert (mask == 2).sum() == 9 and (mask == 1).sum() == 391


def test_differing_keeps_squares_and_drops_seams():
    rng = np.random.default_rng(0)
    a = np.zeros((40, 40, 3), np.uint8)
    for _ in range(20):
        b = a.copy()
        r, c, h, w = rng.integers(2, 20), rng.integers(2, 20), rng.integers(1, 8), rng.integers(1, 8)
        b[r:r + h, c:c + w] = 255
        expected = np.zeros((40, 40), bool)
        expected[r:r + h, c:c + w] = min(h, w) > 1
        assert (differing(b, a) == expected).all()


# Magnetic tiles

def test_tiles_all_six_kinds(tmp_path):
    dataset = read_magnetic_tile(tile_tree(tmp_path))
    assert dataset.classes == ("normal", "blowhole", "break", "crack", "fray", "uneven")
    assert sum(counts(dataset)) == 6 * 12
    assert all(s.label == 0 for s in (*dataset.train, *dataset.validation))
    assert sum(s.label for s in dataset.test) == 60
    for sample in dataset.test:
        if sample.label:
            assert set(np.unique(sample.mask)) == {0, dataset.classes.index(sample.meta["kind"])}
            assert (sample.mask > 0).sum() == 240  # the soft row of 90 is no defect
    assert "not in this copy" not in dataset.summary()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tiles_do_not_leak(tmp_path, task, seed):
    dataset = read_magnetic_tile(tile_tree(tmp_path, ("Crack", "Break", "Free")), task=task, seed=seed)
    assert all(counts(dataset))
    tile = {split: {(s.meta["kind"], int(s.name.split("_")[-1]) // 1000) for s in members} for split, members in dataset.splits.items()}
    assert not tile["train"] & tile["test"] and not tile["train"] & tile["validation"] and not tile["validation"] & tile["test"]
    assert "not in this copy: MT_Blowhole, MT_Fray, MT_Uneven" in dataset.summary()


def test_tiles_one_kind_is_binary(tmp_path):
    dataset = read_magnetic_tile(tile_tree(tmp_path), "crack", task="segmentation")
    assert dataset.classes == ("normal", "crack") and sum(counts(dataset)) == 12
    assert dataset.train[0].mask.max() == 1


def test_tiles_faults(tmp_path):
    tile_tree(tmp_path, ("Crack", "Free"))
    with pytest.raises(DataError, match="did you mean 'crack'"):
        read_magnetic_tile(tmp_path, "krack")
    with pytest.raises(ParameterError, match="did you mean 'segmentation'"):
        read_magnetic_tile(tmp_path, task="segment")
    first = sorted((tmp_path / "MT_Crack/Imgs").glob("*.png"))[0]
    write_image(first, spot((10, 10)))
    with pytest.raises(DataError, match="mask of 10x10 px"):
        read_magnetic_tile(tmp_path)
    first.unlink()
    with pytest.raises(DataError, match="no mask for"):
        read_magnetic_tile(tmp_path)
    skipped = read_magnetic_tile(tmp_path, on_error="skip")
    assert sum(s.label for s in skipped.test) == 11 and any(str(first) in note for note in skipped.notes)


def test_a_free_image_of_a_cracked_tile_is_for_the_test(tmp_path):
    tile_tree(tmp_path, ("Crack", "Free"))
    moved = tmp_path / "MT_Free/Imgs/exp6_num_10100"  # 60 shots after the first cracked tile
    source = tmp_path / "MT_Crack/Imgs/exp1_num_10000"
    moved.with_suffix(".jpg").write_bytes(source.with_suffix(".jpg").read_bytes())
    for seed in range(3):
        dataset = read_magnetic_tile(tmp_path, seed=seed)
        assert "free/exp6_num_10100" in [s.name for s in dataset.test]
        assert "1 free images show a tile that also has a defective image" in dataset.summary()


# All of them

def test_samples_can_be_sent_to_workers(tmp_path):
    for dataset in (read_deeppcb(deeppcb_tree(tmp_path / "p"), masks="difference"), read_magnetic_tile(tile_tree(tmp_path / "t", tiles=2))):
        for sample in dataset.test:
            again = pickle.loads(pickle.dumps(sample))
            assert (again.mask == sample.mask).all()


def test_catalogue_loads_each_format_by_name(tmp_path):
    trees = {"btad": btad_tree, "deeppcb": deeppcb_tree, "elpv": elpv_tree, "folder": mvtec_tree, "magnetic_tile": tile_tree,
             "mvtec": mvtec_tree, "mvtec_transistor_384": mvtec_tree, "visa": visa_tree}
    assert set(trees) == set(manifest()["data"]) and set(trees) <= set(READERS)
    for name, tree in trees.items():
        root = tree(tmp_path / name)
        options = {"normal": 2, "validation": 1} if name == "elpv" else {}
        dataset = load(name, root, category=categories_of(name, root)[0], **options)
        assert dataset.name == name and len(dataset.train) and len(dataset.test)
        assert dataset.summary().startswith(name)
    with pytest.raises(DataError, match="did you mean 'mvtec'"):
        load("mvtek")


def test_catalogue_loads_simulators(tmp_path):
    boards = load("pcb", count=2, train=2, validation=1, size=128, kinds=("open", "short"))
    foils = load("foil", count=4, size=(96, 96), validation=1, test=1)
    assert boards.simulated and foils.simulated and counts(foils) == [2, 1, 1]
    again = load("foil", count=4, size=(96, 96), validation=1, test=1)
    assert foils.test[0].mask.shape == (96, 96) and foils.fingerprint() == again.fingerprint()
    with pytest.raises(ParameterError, match="has neither"):
        load("pcb", tmp_path)
    with pytest.raises(ParameterError, match="none is left for training"):
        load("foil", count=2, size=(96, 96), validation=1, test=1)


def test_readers_find_sets_under_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTBOOK_DATA", str(tmp_path))
    deeppcb_tree(tmp_path / manifest()["data"]["deeppcb"]["folder"])
    assert len(load("deeppcb").test) == 4
    with pytest.raises(DataError, match="VisA_20220922.tar"):
        load("visa", category="candle")


# The real ones, against the counts in their SOURCE.md

def test_real_deeppcb():
    dataset = read_deeppcb(real("DeepPCB"), task="segmentation")
    train, validation, test = counts(dataset)
    assert (train + validation, test) == (148, 154)
    assert sum(len(s.meta["boxes"]) for s in dataset.samples) == 2043
    table = dataset.statistics().table
    assert table["regions"].tolist() == [393, 307, 395, 340, 298, 310]
    assert "302 pairs with 2043 boxes" in dataset.summary()


def test_real_deeppcb_boxes_hold_a_difference():
    boards = read_deeppcb(real("DeepPCB"), "group12000", task="segmentation", masks="difference").samples
    assert len(boards) == 14
    for board in boards:
        mask = board.mask
        assert all(mask[y1:y2, x1:x2].any() for x1, y1, x2, y2, _ in board.meta["boxes"])


def test_real_magnetic_tile():
    dataset = read_magnetic_tile(real("MagneticTile"))
    counted = dataset.statistics()
    assert round(counted.beta(), 1) == 2.0 and round(counted.beta("pixels"), 1) == 20.4
    kinds = [s.meta["kind"] for s in dataset.samples]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"good": 952, "blowhole": 115, "crack": 57, "break": 85}
    assert all(s.label == 0 for s in (*dataset.train, *dataset.validation))


def test_real_transistor():
    real("mvtec_transistor_384")
    dataset = load("mvtec_transistor_384", category="transistor")
    train, validation, test = counts(dataset)
    assert (train + validation, test) == (213, 100)
    kinds = [s.meta["kind"] for s in dataset.test]
    expected = {"good": 60, "bent_lead": 10, "cut_lead": 10, "damaged_case": 10, "misplaced": 10}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    assert sum(s.mask_source is not None for s in dataset.test) == 40
