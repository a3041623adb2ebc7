"""The readers of ELPV and of folders in MVTec layout, on good and on bad input."""

import json

import numpy as np
import pytest
from tiny_trees import cut_short, elpv_tree, mvtec_tree, noise, spot, write_image

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.class_masks import ClassMask, ClassTable, read_classes
from defectbook.data.counts import beside_pros, count_classes
from defectbook.data.datasets import Dataset, read_elpv, read_folder, readable, split_normal


@pytest.fixture
def folder(tmp_path):
    return mvtec_tree(tmp_path / "folder")


def test_folder_gives_disjoint_splits_and_right_masks(folder):
    dataset = read_folder(folder, "discs", validation=2)
    assert [len(split) for split in dataset.splits.values()] == [4, 2, 5]
    names = [sample.name for sample in dataset.samples]
    assert len(set(names)) == len(names)
    defects = [sample for sample in dataset.test if sample.label]
    assert all((sample.mask == (spot() > 0)).all() for sample in defects)
    assert {sample.meta["kind"] for sample in dataset.test} == {"good", "dot"}


def test_summary_names_everything(folder):
    (folder / "discs" / "test" / "dot" / "notes.txt").write_text("hello")
    write_image(folder / "discs" / "ground_truth" / "dot" / "099_mask.png", spot())
    (folder / "discs" / "train" / "odd").mkdir()
    text = read_folder(folder, "discs").summary()
    for words in ("notes.txt", "masks without an image (099)", "ignored folders odd", "64x48", "6.51 %"):
        assert words in text


@pytest.mark.parametrize("break_it, words", [
    (lambda base: (base / "ground_truth/dot/001_mask.png").unlink(), "no mask for"),
    (lambda base: write_image(base / "ground_truth/dot/001_mask.png", spot((20, 20))), "mask of 20x20 px for an image of 64x48 px"),
    (lambda base: [path.unlink() for path in (base / "train/good").iterdir()], "no normal images"),
    (lambda base: write_image(base / "test/dot/001.jpg", noise(1)), "same stem"),
])
def test_folder_faults_are_named(folder, break_it, words):
    break_it(folder / "discs")
    with pytest.raises(DataError, match=words) as error:
        read_folder(folder, "discs")
    assert "\n" not in str(error.value) and "discs" in str(error.value)


def test_unknown_category_suggests(folder):
    with pytest.raises(DataError, match="did you mean 'discs'"):
        read_folder(folder, "disks")


def test_unreadable_image_is_raised_or_skipped_by_name(folder):
    broken = cut_short(folder / "discs" / "train" / "good" / "003.png")
    dataset = read_folder(folder, "discs", validation=0)
    with pytest.raises(DataError, match="003.png"):
        [sample.image for sample in dataset.train]
    skipped = read_folder(folder, "discs", validation=0, on_error="skip")
    assert len(skipped.train) == 5
    assert [str(broken) in note for note in skipped.notes] == [True]
    assert str(broken) in skipped.summary()


def test_skip_reports_every_file(folder):
    cut_short(folder / "discs" / "train" / "good" / "000.png")
    cut_short(folder / "discs" / "test" / "dot" / "000.png")
    cut_short(folder / "discs" / "ground_truth" / "dot" / "001_mask.png", 0.7)
    (folder / "discs" / "ground_truth" / "dot" / "002_mask.png").unlink()
    dataset = read_folder(folder, "discs", on_error="skip")
    assert sum(sample.label for sample in dataset.test) == 0
    assert sum(note.startswith("skipped") for note in dataset.notes) == 4


def test_unknown_error_policy(folder):
    with pytest.raises(ParameterError, match="valid names are raise, skip"):
        read_folder(folder, "discs", on_error="ignore")


def test_several_classes(folder):
    base = folder / "discs"
    (base / "classes.json").write_text(json.dumps({"normal": 0, "dot": 200, "line": 90}))
    for i in range(3):
        mask = spot(value=200)
        mask[40:42] = 90
        write_image(base / "ground_truth" / "dot" / f"{i:03}_mask.png", mask)
    dataset = read_folder(folder, "discs")
    assert dataset.classes == ("normal", "dot", "line")
    mask = dataset.test[0].mask
    assert np.bincount(mask.ravel()).tolist() == [48 * 64 - 200 - 128, 200, 128]
    table = dataset.statistics().table
    assert table.loc["line", "pixels"] == 3 * 128 and table.loc["dot", "regions"] == 3


def test_coloured_classes(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"normal": [0, 0, 0], "red": [255, 0, 0], "green": [0, 255, 0]}))
    table = read_classes(tmp_path / "classes.json")
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[0, :3], mask[1, :2] = (255, 0, 0), (0, 255, 0)
    path = write_image(tmp_path / "mask.png", mask)
    assert np.bincount(ClassMask(path, table)().ravel()).tolist() == [59, 3, 2]
    mask[2, :5] = (1, 2, 3)
    write_image(path, mask)
    with pytest.raises(DataError, match=r"#010203 \(5 px\)"):
        ClassMask(path, table)()


def test_undeclared_values_are_listed_with_counts(folder):
    base = folder / "discs"
    (base / "classes.json").write_text(json.dumps({"normal": 0, "dot": 255}))
    mask = spot()
    mask[0, :7], mask[1, :3] = 17, 99
    write_image(base / "ground_truth" / "dot" / "001_mask.png", mask)
    write_image(base / "ground_truth" / "dot" / "002_mask.png", mask)
    with pytest.raises(DataError, match=r"17 \(14 px\), 99 \(6 px\)"):
        read_folder(folder, "discs")
    skipped = read_folder(folder, "discs", on_error="skip")
    assert sum(sample.label for sample in skipped.test) == 1
    assert sum("17 (7 px), 99 (3 px)" in note for note in skipped.notes) == 2


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"a": 0}', '{"a": 0, "b": 256}', '{"a": 0, "b": 0}', '{"a": 0, "b": [1, 2]}',
                                     '{"a": 0, "b": true}', "no json"])
def test_bad_class_tables(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(DataError, match="classes.json"):
        read_classes(tmp_path / "classes.json")


def test_class_lookup_agrees_with_a_loop(tmp_path):
    rng = np.random.default_rng(0)
    codes = tuple(int(c) for c in rng.permutation(256)[:7])
    table = ClassTable(tuple("abcdefg"), codes)
    values = rng.choice(codes, (31, 17)).astype(np.uint8)
    path = write_image(tmp_path / "mask.png", values)
    assert (ClassMask(path, table)() == [[codes.index(v) for v in row] for row in values.tolist()]).all()


def test_elpv(tmp_path):
    root = elpv_tree(tmp_path / "elpv")
    dataset = read_elpv(root, "all", normal=3, validation=1)
    assert [len(split) for split in dataset.splits.values()] == [3, 1, 6]
    assert "2 cells of other probabilities" in dataset.summary()
    cut_short(root / "images" / "cell0011.png")
    assert sum(s.label for s in read_elpv(root, "all", 3, 1, on_error="skip").test) == 3
    with pytest.raises(DataError, match="ask for fewer"):
        read_elpv(root, "all", normal=100)
    (root / "labels.csv").write_text("images/cell0000.png 1.0\n")
    with pytest.raises(DataError, match="line 1"):
        read_elpv(root)


def test_fingerprint_follows_content_split_and_boxes(folder):
    first = read_folder(folder, "discs", validation=2)
    assert read_folder(folder, "discs", validation=2).fingerprint() == first.fingerprint()
    assert read_folder(folder, "discs", validation=1).fingerprint() != first.fingerprint()
    first.test[0].meta["boxes"] = np.array([[0, 0, 2, 2, 1]])
    assert read_folder(folder, "discs", validation=2).fingerprint() != first.fingerprint()


def test_split_normal_is_a_partition():
    samples = [Sample(noise(0), name=str(i)) for i in range(20)]
    parts = split_normal(samples, (7, 5), 3, "here")
    assert sorted(int(s.name) for part in parts for s in part) == list(range(20))
    assert [len(p) for p in parts] == [7, 5, 8]


def test_statistics_of_boxes_masks_and_kinds():
    boxes = np.array([[0, 0, 4, 4, 1], [8, 8, 12, 12, 1], [20, 20, 30, 30, 3]])
    boards = [Sample(noise(0), None, 1, "a", {"boxes": boxes, "kind": "defective"}), Sample(noise(1), None, 0, "b")]
    counted = count_classes("boards", boards, ("normal", "open", "short", "spur"))
    assert counted.table["regions"].tolist() == [2, 0, 1] and counted.table["images"].tolist() == [1, 0, 1]
    assert counted.beta() == float("inf") and np.isnan(counted.beta("pixels")) and "short" in str(counted)
    kinds = [Sample(noise(i), spot(), 1, str(i), {"kind": "dent" if i else "hole"}) for i in range(4)]
    counted = count_classes("kinds", kinds, ("normal", "defect"))
    assert counted.table.loc["dent", ["images", "regions", "pixels"]].tolist() == [3, 3, 600]
    assert counted.beta() == 3 and counted.colour
    assert counted.pixel_ratios()["dent"] == pytest.approx((48 * 64 * 4 - 800) / 600)
    assert beside_pros(counted).loc["kinds, as read here"].tolist() == ["4", "2", "Yes", "3.0"]
    with pytest.raises(ParameterError, match="did you mean 'images'"):
        counted.beta("image")


def test_readable_looks_at_templates(tmp_path):
    template = write_image(tmp_path / "template.png", noise(0))
    samples = [Sample(noise(0), name="a", meta={"template": template})]
    assert len(readable(samples, "skip", [])) == 1
    cut_short(template)
    notes = []
    assert not readable(samples, "skip", notes) and "template.png" in notes[0]


def test_samples_are_all_splits():
    parts = [[Sample(noise(i), name=str(i))] for i in range(3)]
    assert [s.name for s in Dataset("x", "", None, *parts).samples] == ["0", "1", "2"]
