"""What an annotation leaves on the disk: a log that survives, a lock that does not outlive its holder, exports that others read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from defectbook.core import DataError, DefectbookError, ParameterError, StoreError
from defectbook.data.datasets import read_folder
from defectbook.practice.annotations import (
    Annotated,
    EventLog,
    Ledger,
    MaskFiles,
    check_classes,
    class_codes,
    coco_document,
    decode_rle,
    encode_rle,
    export_coco,
    export_mvtec,
    file_name,
)
from defectbook.practice.folders import FolderLock

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24))


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    ours, theirs = encode_rle(mask), coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert ours == {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}
    assert (decode_rle(ours) == mask).all() and (coco.decode(ours) == mask).all()


@pytest.mark.parametrize("rle", [{"size": [3, 3], "counts": ""}, {"size": [3, 3], "counts": "8"}, {"size": [3, 3], "counts": "o"}])
def test_damaged_run_lengths_are_refused(rle) -> None:
    with pytest.raises(DataError, match="damaged"):
        decode_rle(rle)


@given(st.text(max_size=300), st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_file_names_are_safe_and_different(first: str, second: str) -> None:
    names = [file_name(text.encode("utf-8", "replace").decode()) for text in (first, second)]
    for name in names:
        assert len(name) <= 150 and "/" not in name and "\0" not in name and not name.startswith(".")
    if first.encode("utf-8", "replace") != second.encode("utf-8", "replace"):
        assert names[0] != names[1]


# -- the log ---------------------------------------------------------------------------------------------------------------------
def test_every_cut_of_a_log_keeps_its_whole_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "whole.jsonl")
    for number in range(3):
        log.append({"event": "click", "number": number})
    log.close()
    content = (tmp_path / "whole.jsonl").read_bytes()
    for length in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:length])
        reopened = EventLog(path)
        whole = content[:length].count(b"\n")
        assert [event["number"] for event in reopened.events] == list(range(whole))
        assert reopened.dropped == length - len(b"".join(content.splitlines(True)[:whole]))
        reopened.append({"event": "click", "number": 9})
        reopened.close()
        assert len(path.read_bytes().splitlines()) == whole + 1


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event":"visit"}\nrubbish\n{"event":"visit"}\n')
    with pytest.raises(StoreError, match=r"log.jsonl, line 2: b'rubbish' is no event"):
        EventLog(tmp_path / "log.jsonl")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.append({"event": "visit"})
    before = (tmp_path / "log.jsonl").read_bytes()
    real = os.write

    def nearly_full(file, data):
        if len(data) <= 20:
            raise OSError(28, "No space left")
        return real(file, data[:7])

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(StoreError, match="No space left.*free some space"):
        log.append({"event": "click", "x": 1})
    monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_bytes() == before and len(log.events) == 1
    log.append({"event": "click", "x": 2})
    assert [event.get("x") for event in EventLog(tmp_path / "log.jsonl").events] == [None, 2]


def test_a_removed_log_is_noticed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(StoreError, match="was removed"):
        log.append({"event": "visit"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        for opener in (lambda: FolderLock(tmp_path, "annotator"), lambda: EventLog(tmp_path / "log.jsonl"),
                       lambda: FolderLock(tmp_path / "new", "annotator")):
            with pytest.raises(StoreError, match="Permission denied.*choose another output folder"):
                opener()
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody may write to")
def test_a_read_only_file_system_is_refused() -> None:
    for opener in (lambda: FolderLock("/proc", "annotator"), lambda: FolderLock("/proc/new", "annotator"), lambda: EventLog("/proc/log.jsonl")):
        with pytest.raises(StoreError, match="choose another output folder"):
            opener()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="out"):
        FolderLock(tmp_path / "out", "annotator")


# -- the lock --------------------------------------------------------------------------------------------------------------------
HOLDER = """
import sys, time
from defectbook.practice.folders import FolderLock
lock = FolderLock(sys.argv[1], "annotator")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_annotator_is_refused_and_a_dead_one_gives_way(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=rf"is open in another annotator \(process {holder.pid} on .+, since") as caught:
            FolderLock(tmp_path, "annotator")
        assert "\n" not in str(caught.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = FolderLock(tmp_path, "annotator")
        assert lock.stale["pid"] == holder.pid
        lock.release()
        assert FolderLock(tmp_path, "annotator").stale == {}
    finally:
        holder.kill()
        holder.wait()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "annotator")
    with pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path, "annotator")
    lock.release()
    lock.release()  # twice does no harm
    FolderLock(tmp_path, "annotator").release()


def test_rubbish_in_the_lock_file_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "annotator.lock").write_text("[]")
    lock = FolderLock(tmp_path, "annotator")
    assert lock.stale == {} and json.loads((tmp_path / "annotator.lock").read_text())["pid"] == os.getpid()
    lock.release()


# -- the ledger ------------------------------------------------------------------------------------------------------------------
def test_events_that_do_not_fit_are_named() -> None:
    with pytest.raises(StoreError, match=r"event 2 of the log, .*\"undo\".* does not fit"):
        Ledger([{"event": "visit", "image": "a", "size": [4, 4], "pixels": ""}, {"event": "undo", "image": "a", "mark": 1}])


def test_unknown_events_change_nothing_and_numbers_are_not_used_again() -> None:
    click = {"event": "click", "image": "a", "mark": 1, "class": "x", "x": 0, "y": 0, "positive": True, "frame": [0, 0, 1, 1]}
    ledger = Ledger([{"event": "from the future"}, click, {"event": "undo", "image": "a", "mark": 1}])
    assert ledger.pages["a"].marks == {} and ledger.pages["a"].numbers == 1 and ledger.count == 3


# -- masks and exports -----------------------------------------------------------------------------------------------------------
def test_masks_are_written_whole(tmp_path: Path) -> None:
    masks, mask = MaskFiles(tmp_path), np.eye(20, dtype=bool)
    masks.write("../a/b.png", 3, mask)
    assert (masks.read("../a/b.png", 3) == mask).all() and masks.read("b", 3) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".png"]
    assert all(tmp_path in path.resolve().parents for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("names", [[], ["a", "a"], ["A", "a"], ["good"], ["a/b"], [""], [" a"], ["a."], [3], ["x" * 81], ["a\n"]])
def test_class_names_that_cannot_be_folders_are_refused(names) -> None:
    with pytest.raises(ParameterError):
        check_classes(names)


@given(st.integers(1, 254))
def test_class_codes_are_different_and_end_at_255(count: int) -> None:
    codes = list(class_codes([f"c{number}" for number in range(count)]).values())
    assert len(set(codes)) == count and codes[-1] == 255 and min(codes) > 0


def annotated(tmp_path: Path) -> list[Annotated]:
    """Files of several kinds: two of one stem, a rotated photograph, a colour image in an array, and two without defects."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 255, (24, 32, 3), np.uint8)
    for name in ("a.png", "a.jpg", "plate_mask.png", "good.png"):
        Image.fromarray(colour).save(tmp_path / name)
    turned = Image.fromarray(colour)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    hole, crack = np.zeros((24, 32), bool), np.zeros((24, 32), bool)
    hole[4:12, 5:15], crack[10:14, 3:30] = True, True
    return [Annotated("a.png", tmp_path / "a.png", (24, 32), (("hole", hole),)), Annotated("a.jpg", tmp_path / "a.jpg", (24, 32), (("hole", crack),)),
            Annotated("plate_mask.png", tmp_path / "plate_mask.png", (24, 32), (("crack", crack),)),
            Annotated("turned.jpg", tmp_path / "turned.jpg", (32, 24), (("hole", hole.T), ("crack", crack.T))),
            Annotated("in/memory", colour, (24, 32), (("crack", crack), ("crack", hole))), Annotated("good.png", tmp_path / "good.png", (24, 32)),
            Annotated("good/2", colour, (24, 32))]


def test_mvtec_export_is_read_back(tmp_path: Path) -> None:
    decided = annotated(tmp_path)
    notes = export_mvtec(decided, ("hole", "crack", "stain"), tmp_path / "out")
    assert notes == ["class stain: no image shows only this class"]
    back = read_folder(tmp_path / "out", validation=0)
    assert back.classes == ("normal", "hole", "crack", "stain") and len(back.train) == 2 and len(back.test) == 5
    total = {cls: sum(int(mask.sum()) for item in decided for name, mask in item.objects if name == cls) for cls in ("hole", "crack")}
    hole, crack = decided[0].objects[0][1], decided[1].objects[0][1]
    both = int((hole & crack).sum())
    found = [sum(int((sample.mask == value).sum()) for sample in back.test) for value in (1, 2)]
    assert found == [total["hole"] - both, total["crack"] - both], "overlaps go to the later mask"
    by_name = {sample.name.split("/")[-1]: sample for sample in back.test}
    assert (by_name["turned"].mask.shape == (32, 24)) and by_name["turned"].meta["kind"] == "combined"
    assert (by_name["a"].mask > 0).sum() == hole.sum()


def test_one_class_needs_no_table(tmp_path: Path) -> None:
    decided = [item for item in annotated(tmp_path) if item.name in ("a.png", "good.png")]
    assert export_mvtec(decided, "hole", tmp_path / "out") == []
    assert not (tmp_path / "out" / "classes.json").exists()
    back = read_folder(tmp_path / "out", validation=0)
    assert back.test[0].mask.sum() == decided[0].objects[0][1].sum() and back.test[0].meta["kind"] == "hole"


def test_exports_name_what_is_missing(tmp_path: Path) -> None:
    decided = annotated(tmp_path)[:2]
    (tmp_path / "a.jpg").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    notes = export_mvtec(decided, ("hole",), tmp_path / "out")
    wanted = ("is 9x9 px now", "no such image", "never annotated", "train/good")
    assert len(notes) == 4 and all(words in note for words, note in zip(wanted, notes, strict=True))
    assert len(coco_document(decided, ("hole",))["annotations"]) == 2, "COCO needs no image"
    for export in (export_mvtec, export_coco):
        with pytest.raises(StoreError, match="exists already"):
            export(decided, ("hole",), tmp_path / "out")


def test_pycocotools_reads_the_export(tmp_path: Path) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    decided = annotated(tmp_path)
    export_coco(decided, ("hole", "crack", "stain"), tmp_path / "coco.json", {"description": "test"})
    coco = coco_module.COCO(str(tmp_path / "coco.json"))
    assert len(coco.getImgIds()) == 7 and [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == ["hole", "crack", "stain"]
    for image in coco.loadImgs(coco.getImgIds()):
        (item,) = [item for item in decided if item.name == image["file_name"]]
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert len(found) == len(item.objects)
        for annotation, (cls, mask) in zip(found, item.objects, strict=True):
            assert (coco.annToMask(annotation) == mask).all() and coco.cats[annotation["category_id"]]["name"] == cls
            assert annotation["area"] == mask.sum() and annotation["bbox"][2] == mask.any(0).sum()


# -- a killed process ------------------------------------------------------------------------------------------------------------
WRITER = """
import sys
from defectbook.practice.annotations import EventLog
log = EventLog(sys.argv[1])
for number in range(10**6):
    log.append({"event": "click", "number": number, "padding": "x" * (number % 977)})
    print(number, flush=True)
"""


@pytest.mark.slow
def test_what_was_reported_survives_a_kill(tmp_path: Path) -> None:
    for delay in (0.05, 0.1, 0.2):
        path = tmp_path / f"{delay}.jsonl"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(delay)
        writer.kill()
        reported = [0, *map(int, writer.stdout.read().split(b"\n")[:-1])]
        writer.wait()
        found = [event["number"] for event in EventLog(path).events]
        assert found == list(range(len(found))) and len(found) >= reported[-1] + 1


def test_messages_are_one_line(tmp_path: Path) -> None:
    for act in (lambda: check_classes(["a/b"]), lambda: FolderLock(__file__, "annotator"), lambda: EventLog(tmp_path / "a\0b")):
        with pytest.raises(DefectbookError) as caught:
            act()
        assert "\n" not in str(caught.value)
