"""Sessions of clicks and the widget's messages, without a browser: nothing is lost, nothing is silently wrong, bad input is one line."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plain_sam import PlainSam

from defectbook.core import DataError, DefectbookError, ParameterError, Sample, StoreError
from defectbook.data.datasets import read_folder
from defectbook.models.sam import load_sam
from defectbook.practice import annotator as widget
from defectbook.practice.annotations import list_images
from defectbook.practice.annotator import Annotator, open_session, picture_bytes, stamp
from defectbook.practice.players import Ahead, check_stroke, frame_of, paint, read_picture
from defectbook.practice.sessions import Session


@pytest.fixture(scope="module")
def sam():
    return load_sam("sam_lite", device="cpu").freeze()


@pytest.fixture
def plates(tmp_path: Path) -> Path:
    """Three images with a dark spot each, and something that is no image."""
    folder = tmp_path / "plates"
    folder.mkdir()
    for number in range(3):
        image = noise(number, (96, 128)).copy()
        image[30:60, 40 + 10 * number:70 + 10 * number] = 20
        Image.fromarray(image).save(folder / f"plate {number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def plain(images, out, sam, classes=("hole", "crack"), **more) -> Session:
    def embed(image):
        with torch.no_grad():
            return sam.embed([image])

    return Session(images, out, PlainSam(sam), classes, embed=embed, **more)


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# -- parts -----------------------------------------------------------------------------------------------------------------------
def test_images_of_all_kinds_have_names(plates: Path) -> None:
    (plates / "sub").mkdir()
    (plates / ".hidden").mkdir()
    for place in ("sub", ".hidden"):
        Image.new("RGB", (20, 20)).save(plates / place / "plate 0.png")
    (plates / "out").mkdir()
    Image.new("RGB", (20, 20)).save(plates / "out" / "mask.png")
    names = [sample.name for sample in list_images(plates, without=plates / "out")]
    assert names == ["plate 0.png", "plate 1.png", "plate 2.png", "sub/plate 0.png"]
    two = [plates / "sub" / "plate 0.png", str(plates / "plate 1.png")]
    assert [sample.name for sample in list_images(two)] == ["sub/plate 0.png", "plate 1.png"]
    assert [sample.name for sample in list_images(plates / "plate 1.png")] == ["plate 1.png"]
    assert [sample.name for sample in list_images(np.zeros((20, 30, 3), np.uint8))] == ["image 1"]
    for bad, error in ((plates / "nowhere", DataError), ([], DataError), ([Sample("a", name="x"), Sample("b", name="x")], ParameterError)):
        with pytest.raises(error):
            list_images(bad)


@given(st.lists(st.floats(-50, 350), min_size=4, max_size=4), st.integers(0, 199), st.integers(0, 99), st.booleans())
@settings(max_examples=200, deadline=None)
def test_frames_lie_in_the_image_and_hold_what_they_must(box, x, y, extended) -> None:
    view = [min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])]
    before = (5, 5, 40, 40) if extended else None
    x0, y0, x1, y1 = frame_of(view, (100, 200), (x, y), before)
    assert 0 <= x0 <= x < x1 <= 200 and 0 <= y0 <= y < y1 <= 100 and min(x1 - x0, y1 - y0) >= 32
    if extended:
        assert x0 <= 5 and y0 <= 5 and x1 >= 40 and y1 >= 40


@pytest.mark.parametrize("view", [(1, 2, 3), (5, 0, 1, 9), (0, 0, float("nan"), 3), (0, 0, float("inf"), 3)])
def test_views_that_are_none_are_refused(view) -> None:
    with pytest.raises(ParameterError, match="is no x0"):
        frame_of(view, (100, 200))


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), min_size=1, max_size=5), st.sampled_from([1, 2, 3, 5, 8, 15]))
@settings(max_examples=100, deadline=None)
def test_strokes_are_the_pixels_near_a_line(points, width) -> None:
    """Against the distance of each pixel to each thin line's pixels, the slow way."""
    import cv2

    mask = np.zeros((40, 40), np.uint8)
    paint(mask, points, width, True)
    line = np.zeros((40, 40), np.uint8)
    cv2.polylines(line, [np.array(points[:1] + points, np.int32)[:, None]], False, 1)
    at = np.argwhere(line)
    rows, columns = np.mgrid[:40, :40]
    squared = ((rows[..., None] - at[:, 0]) ** 2 + (columns[..., None] - at[:, 1]) ** 2).min(-1)
    assert (mask.astype(bool) == (squared <= ((width - 1) / 2) ** 2 + 1e-9)).all()
    paint(mask, points, width, False)
    assert not mask.any()


def test_strokes_may_leave_the_image() -> None:
    mask = np.zeros((40, 40), np.uint8)
    paint(mask, [(-500, 20), (900, 20)], 5, True)
    paint(mask, [(-90, -90)], 50, True)
    paint(mask, [(-3, 5)], 9, True)
    assert (mask.sum(1)[18:23] == 40).all() and mask.sum() == 200 + (mask[:18] > 0).sum() and mask[5, :2].all() and not mask[5, 2]


@pytest.mark.parametrize(("points", "width"), [([], 3), (None, 3), ([[1, 2], [3]], 3), ([[1, float("nan")]], 3), ([[1, 2]], 0), ([[1, 2]], "x"),
                                               ([[1e9, 2]], 3), ([[0, 0]] * 20_001, 3)])
def test_strokes_that_are_none_are_refused(points, width) -> None:
    with pytest.raises(ParameterError, match="stroke"):
        check_stroke(points, width)


def test_what_fails_ahead_is_tried_again() -> None:
    ahead, answers = Ahead(2), itertools.chain([1 / 2], [2])

    def sometimes():
        value = next(answers)
        if value < 1:
            raise DataError("not yet")
        return value

    with pytest.raises(DataError):
        ahead.start("a", sometimes).result()
    assert ahead.start("a", sometimes).result() == 2 == ahead.start("a", sometimes).result()
    ahead.close()


def test_a_picture_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="9x40 px is smaller than a patch"):
        read_picture(np.zeros((40, 9, 3), np.uint8))


# -- a session -------------------------------------------------------------------------------------------------------------------
def test_everything_is_there_after_reopening(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        session.click(90, 80, positive=False)
        session.stroke([(45, 40), (60, 40)], 5)
        first = session.mask
        session.accept()
        session.choose("crack")
        session.next()
        session.click(60, 45)
        session.stroke([(2, 2), (20, 2)], 3)
        second, tally = session.mask, session.tally()
    with plain(plates, out, sam) as again:
        assert again.index == 1 and (again.mask == second).all() and again.tally().equals(tally)
        assert again.page.open.cls == "crack"
        again.undo()
        assert not again.mask[2, 2:20].all()
        again.previous()  # accepts the open one
        assert (again.accepted_mask(1) == first).all() and [mark.cls for mark in again.ledger.pages["plate 1.png"].accepted] == ["crack"]
    assert {event["event"] for event in events(out)} >= {"session", "visit", "click", "stroke", "accept", "undo"}


def test_a_killed_process_loses_nothing(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    code = """
import sys, time
sys.path.insert(0, sys.argv[3])
from plain_sam import PlainSam
from defectbook.models.sam import load_sam
from defectbook.practice.sessions import Session
session = Session(sys.argv[1], sys.argv[2], PlainSam(load_sam("sam_lite", device="cpu").freeze()), ("hole", "crack"))
session.click(50, 45)
session.accept()
session.next()
session.click(60, 45)
session.click(5, 5, positive=False)
print(int(session.mask.sum()), flush=True)
time.sleep(600)
"""
    victim = subprocess.Popen([sys.executable, "-c", code, plates, out, Path(__file__).parent], stdout=subprocess.PIPE)
    area = int(victim.stdout.readline())
    with pytest.raises(StoreError, match=f"process {victim.pid}"):
        plain(plates, out, sam)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    with plain(plates, out, sam) as session:
        assert session.index == 1 and int(session.mask.sum()) == area and len(session.page.open.clicks) == 2
        assert any(f"process {victim.pid}" in note for note in session.notes) and session.ledger.pages["plate 0.png"].accepted[0].area > 0


@pytest.mark.parametrize("seed", range(4))
def test_random_actions_replay_to_the_same(seed: int, plates: Path, tmp_path: Path, sam) -> None:
    """Whatever is done, a reopened session has the same marks, masks and place."""
    rng, out = np.random.default_rng(seed), tmp_path / "out"
    session = plain(plates, out, sam)
    acts = [lambda: session.click(int(rng.integers(128)), int(rng.integers(96)), bool(rng.random() < 0.7),
                                  (20, 10, 100, 90) if rng.random() < 0.3 else None),
            lambda: session.stroke(rng.integers(0, 90, (3, 2)), int(rng.integers(1, 12)), bool(rng.random() < 0.6)), session.undo, session.undo,
            session.accept, lambda: session.choose(str(rng.choice(["hole", "crack"]))), lambda: session.go(int(rng.integers(3))),
            lambda: session.delete(int(rng.integers(1, 4))), session.mark_normal, lambda: session.mark_normal(False)]
    for _ in range(25):
        try:
            acts[rng.integers(len(acts))]()
        except ParameterError as error:
            assert "\n" not in str(error)
    mask, tally, index, normal = session.mask, session.tally(), session.index, session.page.normal
    kept = {mark.number: session.accepted_mask(mark.number) for mark in session.page.accepted}
    assert all(value is not None and value.any() for value in kept.values())
    session.close()
    with plain(plates, out, sam) as again:
        assert (again.index, again.page.normal) == (index, normal) and again.tally().equals(tally)
        assert (again.mask is None) == (mask is None) and (mask is None or (again.mask == mask).all())
        assert all((again.accepted_mask(number) == value).all() for number, value in kept.items())


def test_bad_input_changes_nothing(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        before, mask = len(events(out)), session.mask
        for act in (lambda: session.click(128, 5), lambda: session.click(-1, 5), lambda: session.click(float("nan"), 5),
                    lambda: session.choose("hol"), lambda: session.go(3), lambda: session.go(-1), lambda: session.delete(7),
                    session.mark_normal, lambda: session.adapt(False),
                    lambda: session.stroke([], 3), lambda: session.click(5, 5, True, (4, 4))):
            with pytest.raises(ParameterError) as caught:
                act()
            assert "\n" not in str(caught.value)
        assert len(events(out)) == before and (session.mask == mask).all()


def test_an_empty_mask_is_not_accepted_but_left(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        session.stroke([(20, 20)], 5)
        session.stroke([(20, 20)], 9, add=False)
        assert not session.mask.any()
        with pytest.raises(ParameterError, match="empty"):
            session.accept()
        assert session.page.open is not None
        session.next()
        assert any("empty and was dropped" in note for note in session.notes) and not session.ledger.pages["plate 0.png"].marks


def test_undo_goes_all_the_way_back(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        shots = [session.click(50, 45), session.click(60, 50), session.stroke([(5, 5)], 7), session.click(90, 80, positive=False)]
        session.accept()
        assert session.mask is None
        for shot in [shots[3], shots[2], shots[1], shots[0]]:
            assert (session.undo() == shot).all()
        assert session.undo() is None and not session.page.marks
        with pytest.raises(ParameterError, match="nothing to undo"):
            session.undo()


def test_the_model_is_asked_for_as_little_as_possible(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        model = session._players[True].model
        session.click(50, 45)
        session.click(60, 50)
        session.stroke([(5, 5)], 7)
        session.undo()
        session.undo()
        assert [call[0] for call in model.calls] == ["set_image", "click", "click", "undo"]
        session.click(60, 50, True, (0, 0, 64, 64))  # inside of the frame, so the frame stays
        session.accept()
        assert [call[0] for call in model.calls[4:]] == ["click", "finish"]


def test_the_model_sees_the_view(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        model = session._players[True].model
        mask = session.click(55, 45, True, (30, 20, 80, 70))
        assert model.calls == [("set_image", (50, 50), "hole"), ("click", 25, 25, True)] and mask.shape == (96, 128) and not mask[:, :30].any()
        session.click(100, 45, False, (90, 20, 110, 60))
        assert model.calls[2:] == [("set_image", (50, 80), "hole"), ("click", 25, 25, True), ("click", 70, 25, False)]
        session.undo()
        assert model.calls[-2:] == [("set_image", (50, 50), "hole"), ("click", 25, 25, True)] and (session.mask == mask).all()


def test_an_image_that_is_gone_stops_only_itself(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.next()
        session.click(60, 45)
        session.next()
    (plates / "plate 1.png").unlink()
    samples = [plates / f"plate {number}.png" for number in range(3)]
    with plain(samples, out, sam) as session:
        session.go(1)
        assert "no such image file" in session.problem and session.mask is None
        for act in (lambda: session.click(5, 5), lambda: session.stroke([(1, 1)], 3), session.mark_normal):
            with pytest.raises(DataError, match="plate 1.png"):
                act()
        session.go(0)
        session.click(50, 45)
        session.accept()
        target, notes = session.export()
        assert any("plate 1.png" in note for note in notes) and len(list((target / "mvtec" / "test").rglob("*.png"))) == 1
        assert len(json.loads((target / "coco.json").read_text())["annotations"]) == 2


def test_an_image_that_was_replaced_is_noticed(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        session.accept()
    Image.fromarray(noise(9, (96, 128))).save(plates / "plate 0.png")
    with plain(plates, out, sam) as session:
        assert any("has changed" in note for note in session.notes) and not session.problem
    Image.fromarray(noise(9, (64, 64))).save(plates / "plate 0.png")
    with plain(plates, out, sam) as session:
        assert "is 64x64 px now, and its masks are 128x96" in session.problem


def test_a_full_disk_is_said_and_nothing_is_lost(plates: Path, tmp_path: Path, sam, monkeypatch) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        mask = session.mask

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match="No space left"):
                session.click(60, 50)
        assert len(session.page.open.clicks) == 1 and (session.mask == mask).all()
        session.click(60, 50)
        after = session.mask
    with plain(plates, out, sam) as again:
        assert len(again.page.open.clicks) == 2 and (again.mask == after).all()


def test_an_accepted_mask_is_on_the_disk_whatever_was_refused_before(plates: Path, tmp_path: Path, sam, monkeypatch) -> None:
    """The log had room for the click, and the mask's file had none."""
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        with monkeypatch.context() as patch:
            patch.setattr(session.masks, "write", no_space)
            with pytest.raises(StoreError, match="No space left"):
                session.click(60, 50, False)
            with pytest.raises(StoreError, match="No space left"):
                session.accept()
        assert not session.page.accepted, "nothing is accepted that is not on the disk"
        mask = session.mask
        session.accept()
        assert (session.accepted_mask(1) == mask).all()


def no_space(*_) -> None:
    raise StoreError("masks: cannot be written (No space left on device); choose another output folder")


@pytest.mark.parametrize("step", [lambda session: session.click(60, 50, False), lambda session: session.stroke([(5, 5), (20, 5)], 9),
                                  lambda session: session.undo()])
def test_a_mask_that_is_behind_its_log_is_made_again(step, plates: Path, tmp_path: Path, sam, monkeypatch) -> None:
    """Killed after the event was logged and before its mask was written."""
    with plain(plates, tmp_path / "whole", sam) as session:
        session.click(50, 45)
        session.stroke([(30, 30)], 7)
        step(session)
        whole = session.mask
    with plain(plates, tmp_path / "out", sam) as session:
        session.click(50, 45)
        session.stroke([(30, 30)], 7)
        monkeypatch.setattr(session.masks, "write", no_space)
        with pytest.raises(StoreError):
            step(session)
    with plain(plates, tmp_path / "out", sam) as again:
        assert (again.mask == whole).all() and not any("otherwise" in note for note in again.notes)
        again.accept()
        assert (again.accepted_mask(1) == whole).all()


def test_an_image_whose_mask_is_gone_is_not_exported_as_normal(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        session.click(50, 45)
        session.accept()
        mask = session.accepted_mask(1)
        session.next()
        session.mark_normal()
        session.go(0)
        for damage in (lambda path: path.write_bytes(b"rubbish"), Path.unlink):
            damage(session.masks.path("plate 0.png", 1))
            target, notes = session.export()
            assert any("plate 0.png: the file of mask 1 is gone or damaged" in note for note in notes)
            assert [path.name for path in (target / "mvtec").rglob("*.png")] == ["plate 1.png"]
            assert len(json.loads((target / "coco.json").read_text())["images"]) == 1
        assert (session.undo() == mask).all()
        session.accept()
        target, _ = session.export()
        assert (read_folder(target / "mvtec", validation=0).test[0].mask == mask).all()


def test_an_image_that_is_deleted_while_it_is_kept_in_memory_is_noticed(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        session.next()
        session.go(0)
        (plates / "plate 1.png").unlink()
        session.next()
        assert "no such image file" in session.problem
        Image.fromarray(noise(1, (96, 128))).save(plates / "plate 1.png")
        session.go(0)
        session.next()
        assert not session.problem


def mounted(folder: Path, options: str):
    """A small file system of its own at `folder`; skips the test where this process may not mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system")


def test_a_disk_that_is_really_full(tmp_path: Path, sam) -> None:
    """A file system of 200 KB: clicking goes on until it is full, says so in a line, and goes on when there is room again."""
    images, out = [noise(number, (400, 600)) for number in range(2)], tmp_path / "disk"
    mounted(out, "size=200k")
    try:
        with plain(images, out, sam) as session:
            (out / "something else").write_bytes(bytes(170_000))
            rng, refused = np.random.default_rng(0), None
            for _ in range(300):
                try:
                    session.stroke(rng.integers(0, 400, (40, 2)), 3)
                except StoreError as error:
                    refused = str(error)
                    break
            assert refused and "No space left" in refused and "\n" not in refused
            (out / "something else").unlink()
            session.stroke([(5, 5)], 3)
            mask = session.mask
            session.accept()
        with plain(images, out, sam) as again:
            assert (again.accepted_mask(1) == mask).all() and not again.notes[0].startswith("the last line")
    finally:
        subprocess.run(["umount", out], check=True)


def test_a_read_only_folder_is_one_line(plates: Path, tmp_path: Path, sam) -> None:
    mounted(tmp_path / "disk", "ro")
    try:
        for out in (tmp_path / "disk", tmp_path / "disk" / "new"):
            with pytest.raises(StoreError, match="Read-only file system.*choose another output folder") as caught:
                plain(plates, out, sam)
            assert "\n" not in str(caught.value)
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_images_of_all_kinds(tmp_path: Path, sam) -> None:
    """Grey, with alpha, of 16 bits, a palette, and names with spaces, signs and letters of all sorts: each is shown, clicked and exported."""
    folder, grey = tmp_path / "odd", noise(0, (60, 80))[..., 0]
    (folder / "line 2").mkdir(parents=True)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(np.dstack([grey] * 4)).save(folder / "alpha.png")
    Image.fromarray(np.dstack([grey] * 2), "LA").save(folder / "grey alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "16 bits.png")
    Image.fromarray(grey).convert("P").save(folder / "line 2" / "Ünïcode % ~ 钢板 #1.png")
    Image.fromarray(grey).save(folder / "line 2" / "two.dots.tif")
    Image.fromarray(grey).save(folder / "zero.bmp")
    with plain(folder, tmp_path / "out", sam) as session:
        masks = {}
        for index, sample in enumerate(session.samples):
            session.go(index)
            assert not session.problem and session.picture.image.shape == (60, 80, 3)
            if sample.name == "zero.bmp":
                session.mark_normal()
                continue
            session.stroke([(10 + index, 20), (40, 20)], 5)
            masks[sample.name] = session.mask
            session.accept()
        target, notes = session.export()
    assert len(masks) == 6 and not any("left out" in note for note in notes)
    back = read_folder(target / "mvtec", validation=0)
    assert sorted(int((sample.mask > 0).sum()) for sample in back.test) == sorted(int(mask.sum()) for mask in masks.values())


def test_images_that_cannot_be_annotated_say_why(tmp_path: Path, sam) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    Image.new("RGB", (1, 1)).save(folder / "1 dot.png")
    (folder / "2 rubbish.png").write_bytes(b"rubbish")
    (folder / "3 nothing.png").touch()
    Image.fromarray(noise(0, (60, 80))).save(folder / "4 whole.png")
    (folder / "5 cut.png").write_bytes((folder / "4 whole.png").read_bytes()[:400])
    with plain(folder, tmp_path / "out", sam) as session:
        for index, words in enumerate(("1x1 px is smaller than a patch", "cannot be read", "cannot be read", "", "cannot be read")):
            session.go(index)
            assert words in session.problem and bool(words) == bool(session.problem) and "\n" not in session.problem
            if words:
                with pytest.raises(DataError):
                    session.click(0, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images to annotate"):
        plain(tmp_path / "empty", tmp_path / "other", sam)
    assert not (tmp_path / "other").exists()


def test_other_classes_and_other_images_are_noticed(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with plain(plates, out, sam) as session:
        session.click(50, 45)
        session.accept()
    with pytest.raises(ParameterError, match="masks of class 'hole', which is not among the classes"):
        plain(plates, out, sam, ("scratch",))
    with plain([plates / "plate 1.png"], out, sam) as session:  # the refused one has let go of the folder
        assert any("plate 0.png; their masks are kept" in note for note in session.notes)


def test_an_open_mask_of_another_model_is_kept(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"

    class Other(PlainSam):
        def _mask(self):
            return ~super()._mask()

    with plain(plates, out, sam) as session:
        mask = session.click(50, 45)
    with Session(plates, out, Other(sam), ("hole", "crack")) as session:
        assert (session.mask == mask).all() and any("answers otherwise" in note for note in session.notes)


def test_exports_are_read_back(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        with pytest.raises(ParameterError, match="nothing is decided"):
            session.export()
        session.click(50, 45)
        session.accept()
        mask = session.accepted_mask(1)
        session.next()
        session.mark_normal()
        target, notes = session.export()
        assert notes == ["class crack: was never annotated", "1 image is not decided and left out"] and target.name == "export-1"
        assert session.export()[0].name == "export-2"
        with pytest.raises(StoreError, match="exists"):
            session.export(target)
    back = read_folder(target / "mvtec", validation=0)
    assert (back.test[0].mask == mask).all() and len(back.train) == 1


def test_normal_images(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        session.mark_normal()
        session.click(50, 45)
        assert not session.page.normal, "a click takes the decision back"


def test_cells_and_widget_may_act_at_once(plates: Path, tmp_path: Path, sam) -> None:
    with plain(plates, tmp_path / "out", sam) as session:
        threads = [threading.Thread(target=lambda x=x: session.click(x, 40)) for x in (20, 40, 60, 80)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(click["x"] for click in session.page.open.clicks) == [20, 40, 60, 80]


# -- with adaptation -------------------------------------------------------------------------------------------------------------
RATES = {"RM": 1e-3, "CA": 1e-3}


def weights(session: Session) -> dict[str, torch.Tensor]:
    return session._players[True].model.state()


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_adaptation_survives_and_can_be_turned_off(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with open_session(plates, sam, ("hole", "crack"), out, rates=RATES, device="cpu") as session:
        session.click(50, 45)
        session.accept()
        session.next()
        learned, state = session.click(60, 45), weights(session)
        session.adapt(False)
        taught, untaught = (session._players[on].model.logits for on in (True, False))
        assert (taught != untaught).any(), "what was learned shows on the next image"
        assert (session.adapt(True) == learned).all()
    for removed in (False, True):  # from the kept state, and from the log alone
        if removed:
            (out / "model.safetensors").unlink()
        with open_session(plates, sam, ("hole", "crack"), out, rates=RATES, device="cpu") as session:
            assert same(weights(session), state) and (session.mask == learned).all() and session.ledger.adapting
    (out / "model.safetensors").write_bytes(b"rubbish")
    with open_session(plates, sam, ("hole", "crack"), out, rates=RATES, device="cpu") as session:
        assert any("learns again from the log" in note for note in session.notes) and same(weights(session), state)


def test_undoing_an_acceptance_takes_back_what_it_taught(plates: Path, tmp_path: Path, sam) -> None:
    out = tmp_path / "out"
    with open_session(plates, sam, ("hole",), out, rates=RATES, device="cpu") as session:
        first = session.click(50, 45)
        session.accept()
        taught = weights(session)
        assert (session.undo() == first).all()
        session.undo()
        session.click(70, 70)
        session.accept()
        again = weights(session)
        assert not same(taught, again)
    (out / "model.safetensors").unlink()
    with open_session(plates, sam, ("hole",), out, rates=RATES, device="cpu") as session:
        assert same(weights(session), again), "an acceptance that was taken back teaches nothing on reopening either"


def test_models_that_are_none_are_refused(plates: Path, tmp_path: Path) -> None:
    for model, error in ((3, ParameterError), ("sam_light", ParameterError), (object(), ParameterError)):
        with pytest.raises(error):
            open_session(plates, model, ("hole",), tmp_path / "out", device="cpu")
    with pytest.raises(ParameterError):
        open_session(plates, "sam_lite", ("hole",), tmp_path / "out", adaptation="CA=X", device="cpu")
    assert not (tmp_path / "out" / "log.jsonl").exists()


# -- the widget's messages -------------------------------------------------------------------------------------------------------
@pytest.fixture
def talk(plates: Path, tmp_path: Path, sam, monkeypatch):
    """An annotator, and a function that says something to it as the browser would and returns what came back."""
    app = Annotator(plates, sam, ("hole", "crack"), tmp_path / "out", adaptation=None, device="cpu")
    sent: list = []
    monkeypatch.setattr(app, "send", lambda content, buffers=None: sent.append((content, buffers)))

    def say(do, **values):
        sent.clear()
        app._receive(app, {"do": do, "id": "7", **values}, [])
        return sent[-1] if sent else None

    say.app = app
    yield say
    app.session.close()


def test_messages_bring_pictures_once_and_masks_when_they_change(talk, plates: Path) -> None:
    state, buffers = talk("ready")
    assert (state["width"], state["height"], state["picture"], state["reply"]) == (128, 96, 0, "7") and len(buffers) == 1
    shown = np.asarray(Image.open(io.BytesIO(buffers[0])))
    assert (shown == np.asarray(Image.open(plates / "plate 0.png"))).all()
    state, buffers = talk("click", x=50, y=45, positive=True, view=None)
    (mark,) = state["marks"]
    assert state["picture"] is None and mark["open"] and mark["points"] == [[50, 45, True]] and len(buffers) == 1
    x, y, width, height = mark["box"]
    part = np.asarray(Image.open(io.BytesIO(buffers[mark["png"]])).convert("RGBA"))[..., 3] > 0
    assert (part == talk.app.session.mask[y:y + height, x:x + width]).all() and part.sum() == mark["area"] == talk.app.session.mask.sum()
    state, buffers = talk("accept")
    assert "hole accepted after 1 click" in state["text"] and len(buffers) == 1
    state, buffers = talk("class", name="crack")
    assert state["cls"] == "crack" and not buffers and state["marks"][0]["kept"]
    assert talk("look", view=[0, 0, 50, 50]) is None
    state, buffers = talk("ready")
    assert len(buffers) == 2, "a page that was reloaded gets everything again"
    state, _ = talk("go", step=1)
    assert state["index"] == 1 and state["picture"] == 0 and not state["marks"]
    assert "written to" in talk("export")[0]["text"]


@pytest.mark.parametrize("message", [{}, {"do": "explode"}, {"do": "click"}, {"do": "click", "x": "a", "y": 3}, {"do": "click", "x": None, "y": 3},
                                     {"do": "click", "x": float("inf"), "y": 0}, {"do": "click", "x": 500, "y": 0}, {"do": "go", "step": 99},
                                     {"do": "click", "x": 5, "y": 5, "view": "wide"}, {"do": "stroke", "points": 3, "width": 3}, {"do": "delete"},
                                     {"do": "class", "name": "nothing"}, {"do": "accept"}, {"do": "undo"}, {"do": "adapt", "on": False},
                                     {"do": "look", "view": [1]}, {"do": ["click"]}, {"do": "delete", "number": True}])
def test_bad_messages_become_one_line(talk, message) -> None:
    talk("ready")
    state, _ = talk(message.get("do"), **{name: value for name, value in message.items() if name != "do"})
    assert state["level"] == "error" and state["text"] and "\n" not in state["text"] and state["marks"] == []


def test_unexpected_errors_become_one_line_too(talk, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(talk.app.session._players[True].model, "click", broken)
    state, _ = talk("click", x=50, y=45)
    assert state["level"] == "error" and state["text"].startswith("RuntimeError: first line second line") and "Traceback" in talk.app.last_error
    monkeypatch.undo()


def test_running_the_cell_again_hands_over(talk, plates: Path, tmp_path: Path, sam) -> None:
    talk("click", x=50, y=45)
    mask = talk.app.session.mask
    again = Annotator(plates, sam, ("hole", "crack"), tmp_path / "out", adaptation=None, device="cpu")
    assert talk.app.session.closed and (again.session.mask == mask).all()
    state, _ = talk("click", x=50, y=45)
    assert state["level"] == "error" and "closed" in state["text"]
    again.session.close()


def test_a_large_image_is_sent_small_enough() -> None:
    large = np.zeros((2000, 3000, 3), np.uint8)
    large[500:600] = 200
    content = picture_bytes(large)
    assert Image.open(io.BytesIO(content)).size == (3000, 2000) and len(content) < 2_000_000
    huge = picture_bytes(np.zeros((6000, 9000, 3), np.uint8))
    assert np.prod(Image.open(io.BytesIO(huge)).size) <= widget.MOST_SHOWN


@pytest.mark.parametrize("mask", [np.zeros((9, 12), bool), np.ones((9, 12), bool), np.eye(9, 12, 3, dtype=bool)])
def test_stamps_hold_the_mask(mask) -> None:
    (x, y, width, height), content = stamp(mask)
    found = np.zeros_like(mask)
    found[y:y + height, x:x + width] = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))[..., 3] > 0
    assert (found == mask).all()


def test_a_large_image_can_be_annotated(tmp_path: Path, sam) -> None:
    image = noise(0, (2000, 3000)).copy()
    image[900:940, 1500:1560] = 10
    with plain([image], tmp_path / "out", sam) as session:
        mask = session.click(1530, 920, True, (1400, 850, 1650, 1000))
        assert mask.shape == (2000, 3000) and not mask[:850].any() and session.page.open.frame == (1400, 850, 1650, 1000)


def test_errors_at_opening_name_their_cause(plates: Path, tmp_path: Path, sam) -> None:
    (tmp_path / "file").write_text("")
    for act in (lambda: plain(plates, tmp_path / "file", sam), lambda: plain(tmp_path / "nowhere", tmp_path / "out", sam),
                lambda: plain(plates, tmp_path / "out", sam, ())):
        with pytest.raises(DefectbookError) as caught:
            act()
        assert "\n" not in str(caught.value)
