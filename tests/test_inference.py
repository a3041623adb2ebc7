"""Predicting folders: what is written, resumed, refused and listed; thresholds beside the model; the command."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, noise
from PIL import Image
from test_commands import said

from defectbook.core import DataError, DefectbookError, ParameterError, Sample, StoreError, WeightsError, read_image, read_mask
from defectbook.methods.lowrank import RPCA
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.segmenters import UNetSegmenter
from defectbook.methods.smooth_sparse import SmoothSparse
from defectbook.models.tiling import Tiled, Tiling
from defectbook.practice import inference
from defectbook.practice.inference import describe_mask, encode_map, find_images, predict_folder, read_map
from defectbook.practice.saved_detectors import (
    Threshold,
    fit_threshold,
    keep_threshold,
    load_detector,
    load_threshold,
    model_hash,
    save_threshold,
)


def holed(seed: int) -> np.ndarray:
    image = noise(seed).copy()
    image[20:28, 30:44] = 255
    return image


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


NORMAL = [Sample(noise(seed), name=f"normal {seed}") for seed in range(12)]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """A small saved detector without a threshold; copied by those who write into it."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    SmoothSparse(image_size=32).fit(NORMAL[:6]).save(folder)
    return folder


@pytest.fixture
def model(fitted: Path, tmp_path: Path) -> Path:
    """The same with a threshold."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in fitted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_threshold(folder, fit_threshold(load_detector(folder), NORMAL[6:], quantile=1.0))
    return folder


@pytest.fixture
def line(tmp_path: Path) -> Path:
    """Three sound parts and two with a hole, in two folders."""
    for seed in range(5):
        write(tmp_path / "line" / f"shift{seed % 2}" / f"{seed}.png", holed(50 + seed) if seed >= 3 else noise(50 + seed))
    return tmp_path / "line"


def contents(folder: Path) -> dict[str, bytes]:
    """All results but the seconds."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    with open(folder / "predictions.csv", newline="") as file:
        found["predictions.csv"] = repr([{**row, "seconds": ""} for row in csv.DictReader(file)]).encode()
    rows = (json.loads(row) for row in found["records.jsonl"].splitlines())
    found["records.jsonl"] = repr(sorted((row["file"], row["score"], row["sha256"]) for row in rows)).encode()
    return found


# -- what is written -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("maps", ["png16", "npy", "none"])
def test_files_hold_what_the_detector_says(model, line, tmp_path, maps) -> None:
    found = predict_folder(model, line, tmp_path / "out", maps=maps, overlays=True)
    threshold = load_threshold(model)
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert list(rows) == sorted(f"shift{seed % 2}/{seed}.png" for seed in range(5)) and found.done == 5 and found.failed == 0
    for name, row in rows.items():
        expected = load_detector(model).predict([Sample(line / name)])
        mask = expected.maps[0] >= threshold.pixel
        assert float(row["score"]) == expected.scores[0] and int(row["label"]) == int(expected.scores[0] >= threshold.score)
        assert float(row["threshold"]) == threshold.score and float(row["seconds"]) > 0 and row["error"] == ""
        assert np.array_equal(read_mask(tmp_path / "out" / "masks" / name), mask.astype(np.uint8))
        assert int(row["area"]) == mask.sum() and (int(row["width"]), int(row["height"])) == (64, 64)
        assert read_image(tmp_path / "out" / "overlays" / name).shape == (64, 64, 3)
        if maps == "npy":
            assert np.array_equal(read_map(tmp_path / "out" / "maps" / f"{name}.npy"), expected.maps[0])
        elif maps == "png16":
            step = 8 * np.subtract(*threshold.map_range[::-1]) / 65535
            inside = expected.maps[0].clip(2 * threshold.map_range[0] - threshold.map_range[1], None)
            if float(row["clipped"]) == 0:
                np.testing.assert_allclose(read_map(tmp_path / "out" / "maps" / name), inside, rtol=1e-5, atol=step)
        else:
            assert not (tmp_path / "out" / "maps").exists()
    holes = found.table[found.table.file.isin(["shift1/3.png", "shift0/4.png"])]
    assert (holes.label == 1).all()
    assert all(abs(row.box_left + row.box_width / 2 - 37) < 6 and abs(row.box_top + row.box_height / 2 - 24) < 6 for row in holes.itertuples())


def test_encoded_maps_say_their_scale_and_what_was_clipped(tmp_path) -> None:
    anomaly_map = np.array([[0.0, 1.0, 7.0, 9.0]], np.float32)
    content, clipped = encode_map(anomaly_map, (0.0, 1.0))
    (tmp_path / "m.png").write_bytes(content)
    assert clipped == 0.25
    np.testing.assert_allclose(read_map(tmp_path / "m.png"), [[0, 1, 7, 7]], atol=1e-4)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode.startswith("I;16")
    for damaged in (b"", b"no png", content[:40]):
        (tmp_path / "m.png").write_bytes(damaged)
        with pytest.raises(DataError, match="m.png: is no stored anomaly map"):
            read_map(tmp_path / "m.png")
    np.save(tmp_path / "p.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="p.npy"):
        read_map(tmp_path / "p.npy")


def test_describe_mask() -> None:
    mask = np.zeros((10, 12), bool)
    assert describe_mask(mask) == {"area": 0, "box_left": None, "box_top": None, "box_width": None, "box_height": None, "largest_area": 0}
    mask[1, 1] = mask[2, 2] = True  # touch at a corner: one part
    mask[5:8, 4:9] = True
    assert describe_mask(mask) == {"area": 17, "box_left": 4, "box_top": 5, "box_width": 5, "box_height": 3, "largest_area": 15}


# -- resuming and refusing -------------------------------------------------------------------------------------------------------
def test_resumes_to_the_same_bytes(model, line, tmp_path, monkeypatch) -> None:
    predict_folder(model, line, tmp_path / "whole")
    single, calls = inference._predict_one, []

    def dies(*arguments):
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return single(*arguments)

    monkeypatch.setattr(inference, "_predict_one", dies)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(model, line, tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.csv").exists()
    with open(tmp_path / "out" / "records.jsonl", "a") as file:
        file.write('{"file": "shift1/1.png", "sco')  # cut in two by the kill
    monkeypatch.setattr(inference, "_predict_one", single)
    found = predict_folder(model, line, tmp_path / "out")
    assert (found.done, found.kept) == (3, 2) and contents(tmp_path / "out") == contents(tmp_path / "whole")
    (tmp_path / "out" / "masks" / "shift0" / "0.png").unlink()
    assert predict_folder(model, line, tmp_path / "out").done == 1
    assert predict_folder(model, line, tmp_path / "out").done == 0 and contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_survives_kills(model, tmp_path) -> None:
    for seed in range(40):
        write(tmp_path / "line" / f"{seed}.png", noise(seed))
    predict_folder(model, tmp_path / "line", tmp_path / "whole")
    code = "import sys; from defectbook.practice.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "predict", str(model), str(tmp_path / "line"), "--out", str(tmp_path / "out"), "-q"]
    records = tmp_path / "out" / "records.jsonl"
    for target in (1, 7, 19):
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not records.exists() or records.read_bytes().count(b"\n") < target):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_choices_and_other_folders_are_refused_and_nothing_changes(model, line, tmp_path) -> None:
    out = tmp_path / "out"
    predict_folder(model, line, out)
    before = contents(out)
    for options, message in (({"threshold": 0.5}, "another threshold"), ({"maps": "npy"}, "another maps"), ({"overlays": True}, "another overlays")):
        with pytest.raises(ParameterError, match=message):
            predict_folder(model, line, out, **options)
    assert contents(out) == before
    replaced = predict_folder(model, line / "shift0", out, maps="npy", replace=True)
    assert len(replaced.table) == 3 and not list(out.rglob("maps/*.png")) and len(list(out.rglob("*.npy"))) == 3
    foreign = tmp_path / "foreign"
    write(foreign / "holiday.png", noise(1))
    for replace in (False, True):
        with pytest.raises(ParameterError, match="holiday.png"):
            predict_folder(model, line, foreign, replace=replace)
    with pytest.raises(ParameterError, match="no predict.json"):
        predict_folder(model, line, line)  # results among the images
    (out / "predict.json").write_text('{"schema": 99}')
    with pytest.raises(ParameterError, match="another version"):
        predict_folder(model, line, out, replace=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        predict_folder(model, line, tmp_path / "file")


def test_a_changed_image_is_refused(model, line, tmp_path) -> None:
    predict_folder(model, line, tmp_path / "out")
    write(line / "shift0" / "0.png", noise(99))
    with pytest.raises(DataError, match="0.png: has changed"):
        predict_folder(model, line, tmp_path / "out")


def test_two_at_once_are_refused(model, line, tmp_path) -> None:
    from defectbook.practice.folders import FolderLock

    with FolderLock(tmp_path / "out", "predict"), pytest.raises(StoreError, match="is open in another predict"):
        predict_folder(model, line, tmp_path / "out")


def test_a_full_disk_keeps_what_is_finished(model, line, tmp_path, monkeypatch) -> None:
    whole, count = inference.write_whole, []

    def full(target, content):
        count.append(target)
        if len(count) == 7:
            raise StoreError(f"{target}: cannot be written (No space left on device); choose another output folder")
        whole(target, content)

    monkeypatch.setattr(inference, "write_whole", full)
    with pytest.raises(StoreError, match="No space"):
        predict_folder(model, line, tmp_path / "out")
    monkeypatch.setattr(inference, "write_whole", whole)
    found = predict_folder(model, line, tmp_path / "out")
    assert found.kept >= 1 and found.kept + found.done == 5


# -- bad images ------------------------------------------------------------------------------------------------------------------
def test_bad_images_are_listed_and_do_not_stop_the_rest(model, line, tmp_path) -> None:
    good = (line / "shift0" / "0.png").read_bytes()
    bad = {"cut.png": good[:len(good) // 2], "empty.png": b"", "text.jpg": b"this is no picture", "bomb.tif": b"II*\0" + b"\xff" * 60}
    for name, content in bad.items():
        (line / name).write_bytes(content)
    (line / "dangling.png").symlink_to(line / "nowhere.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(line / "float.tif")
    (line / ".hidden.png").write_bytes(good)
    (line / "notes.txt").write_text("no image")
    found = predict_folder(model, line, tmp_path / "out")
    failed = found.table[found.table.error != ""]
    assert set(failed.file) == {*bad, "dangling.png", "float.tif"} and found.done == 5 and found.failed == 6
    assert all(name in error and "\n" not in error for name, error in zip(failed.file, failed.error, strict=True))
    (line / "cut.png").write_bytes(good)  # mended
    found = predict_folder(model, line, tmp_path / "out")
    assert (found.done, found.kept, found.failed) == (1, 5, 5)


def test_strange_but_good_images(model, tmp_path) -> None:
    line = tmp_path / "line"
    line.mkdir()
    Image.fromarray(noise(1)[..., 0]).save(line / "grey.png")
    Image.fromarray(noise(1)[..., 0].astype(np.uint16) * 257).save(line / "sixteen.png")
    Image.fromarray(noise(1)).convert("P").save(line / "palette.png")
    Image.fromarray(noise(1)).convert("RGBA").save(line / "alpha.png")
    Image.fromarray(noise(1)).convert("CMYK").save(line / "cmyk.jpg")
    Image.fromarray(noise(1, (8, 200))).save(line / "wide, with a comma and \"quotes\".BMP")
    found = predict_folder(model, line, tmp_path / "out")
    assert found.failed == 0 and len(found.table) == 6
    scores = found.table.set_index("file").score
    assert scores["grey.png"] == scores["sixteen.png"] == scores["alpha.png"]
    assert sorted(row["file"] for row in csv.DictReader(open(tmp_path / "out" / "predictions.csv"))) == sorted(found.table.file)


def test_which_images_are_found(line, tmp_path) -> None:
    assert list(find_images([line])) == ["shift0/0.png", "shift0/2.png", "shift0/4.png", "shift1/1.png", "shift1/3.png"]
    assert list(find_images([line], line / "shift1")) == ["shift0/0.png", "shift0/2.png", "shift0/4.png"]
    assert "shift0/0.png" in find_images([line / "shift0", line / "shift1"]) and "0.png" in find_images([line / "shift0"])
    other = write(tmp_path / "other" / "0.png", noise(0))
    for sources, message in (([tmp_path / "none"], "no such image"), ([line / "shift0" / "0.png", other], "both be stored"), ([], "no images")):
        with pytest.raises(DataError, match=message):
            find_images(sources)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="no images"):
        find_images([tmp_path / "loop"])


# -- thresholds ------------------------------------------------------------------------------------------------------------------
def test_normal_quantile_threshold(fitted) -> None:
    detector = load_detector(fitted)
    scores = detector.predict(NORMAL[6:]).scores
    found = fit_threshold(detector, NORMAL[6:], quantile=1.0)
    assert scores.max() < found.score <= np.nextafter(scores.max(), np.inf, dtype=np.float32) * (1 + 1e-6)
    half = fit_threshold(detector, NORMAL[6:], quantile=0.5)
    assert (scores >= half.score).sum() == 3 and found.images == 6 and found.data == half.data
    assert found.data != fit_threshold(detector, NORMAL[5:11], quantile=1.0).data


def test_synthetic_threshold_separates_and_repeats(fitted) -> None:
    detector = load_detector(fitted)
    one, two = (fit_threshold(detector, NORMAL[6:], "synthetic", seed=3, kind="scar", folds=2) for _ in range(2))
    assert one == two and one.options == {"kind": "scar", "folds": 2, "copies": 1}
    assert one != fit_threshold(detector, NORMAL[6:], "synthetic", seed=4, kind="scar", folds=2)


def test_slips_in_setting_a_threshold(fitted) -> None:
    detector, bad = load_detector(fitted), [Sample(holed(1), label=1, name="hole")]
    for arguments, options, error, message in (
            ((NORMAL, "quantil"), {}, ParameterError, "normal_quantile"), ((NORMAL,), {"quantil": 1}, ParameterError, "did you mean 'quantile'"),
            ((NORMAL,), {"quantile": 2.0}, ParameterError, "outside"), (([],), {}, DataError, "no normal image"), ((bad,), {}, DataError, "hole"),
            ((NORMAL[:3], "synthetic"), {}, DataError, "tuning images")):
        with pytest.raises(error, match=message):
            fit_threshold(detector, *arguments, **options)


def test_threshold_beside_the_model(model) -> None:
    threshold = load_threshold(model)
    assert threshold.model == model_hash(model) and threshold.rule == "normal_quantile"
    assert save_threshold(model, threshold) == threshold  # the same again is no conflict
    other = Threshold(**{**threshold.__dict__, "score": 1.0})
    with pytest.raises(ParameterError, match="exists already"):
        save_threshold(model, other)
    assert load_threshold(model) == threshold and save_threshold(model, other, replace=True).score == load_threshold(model).score == 1.0


def test_keep_threshold_reuses_what_fits_only(model) -> None:
    detector = load_detector(model)
    kept = keep_threshold(model, detector, NORMAL[6:], "normal_quantile", quantile=1.0)
    assert kept == load_threshold(model)
    for images, options in ((NORMAL[6:], {"quantile": 0.5}), (NORMAL[5:], {"quantile": 1.0})):
        with pytest.raises(ParameterError, match="threshold.json: was set by normal_quantile"):
            keep_threshold(model, detector, images, "normal_quantile", **options)
    assert keep_threshold(model, detector, NORMAL[6:], "normal_quantile", replace=True, quantile=0.5).score <= kept.score


GOOD = {"schema": 1, "score": 1.0, "pixel": 1.0, "map_range": [0.0, 1.0]}


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 2}', b"[" * 100_000,
    *(json.dumps({**GOOD, **change}).encode() for change in (
        {"score": None}, {"score": "1"}, {"score": float("nan")}, {"pixel": float("inf")}, {"map_range": [1.0, 0.0]}, {"map_range": 3},
        {"map_range": []}, {"map_range": ["a", "b"]}, {"extra": 1}, {"tiling": {"tile": -1}}, {"tiling": 7}, {"tiling": {"tail": 3}}))])
def test_damaged_thresholds_are_named(model, content) -> None:
    (model / "threshold.json").write_bytes(content)
    with pytest.raises(WeightsError, match="threshold.json") as caught:
        load_threshold(model)
    assert "\n" not in str(caught.value)


def test_another_state_of_the_model_needs_another_threshold(model, line, tmp_path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(WeightsError, match="another state of this model"):
        predict_folder(model, line, tmp_path / "out")
    assert predict_folder(model, line, tmp_path / "out", threshold=1.0, mask_threshold=1.0).done == 5


def test_without_a_threshold_both_must_be_given(fitted, line, tmp_path) -> None:
    for options in ({}, {"threshold": 1.0}, {"mask_threshold": 1.0}):
        with pytest.raises(ParameterError, match="no threshold.json"):
            predict_folder(fitted, line, tmp_path / "out", **options)
    with pytest.raises(ParameterError, match="finite"):
        predict_folder(fitted, line, tmp_path / "out", threshold=float("nan"), mask_threshold=1.0)
    assert not (tmp_path / "out").exists()
    found = predict_folder(fitted, line, tmp_path / "out", threshold=-1e9, mask_threshold=0.0)
    assert (found.table.label == 1).all() and (found.table.area == 64 * 64).all()


# -- models ----------------------------------------------------------------------------------------------------------------------
def test_detectors_load_by_their_folder_alone(tmp_path) -> None:
    detectors = {"rpca": RPCA(image_size=16, columns=4).fit(NORMAL[:4]),
                 "patchcore": PatchCore(image_size=64, coreset="none", device="cpu").fit(NORMAL[:2])}
    for name, detector in detectors.items():
        detector.save(tmp_path / name)
        again = load_detector(tmp_path / name, "cpu")
        assert type(again) is type(detector) and np.array_equal(again.predict(NORMAL[8:9]).maps[0], detector.predict(NORMAL[8:9]).maps[0])


def test_a_segmenter_is_judged_by_even_odds(line, tmp_path) -> None:
    segmenter = UNetSegmenter("unet", width=4, side=32, weights=None, device="cpu")
    segmenter.is_fitted = True
    segmenter.save(tmp_path / "unet")
    found = predict_folder(tmp_path / "unet", line, tmp_path / "out", device="cpu")
    assert found.threshold.score == 0.5 and found.threshold.rule == "even odds" and found.table.score.between(0, 1).all()
    probability = load_detector(tmp_path / "unet", "cpu").predict([Sample(line / "shift0" / "0.png")]).maps[0]
    expected = segmenter.masks([Sample(line / "shift0" / "0.png")])[0]
    assert np.mean((probability >= 0.5) == expected) > 0.999
    siamese = UNetSegmenter("siamese", width=4, side=32, weights=None, device="cpu")
    siamese.is_fitted = True
    siamese.save(tmp_path / "siamese")
    with pytest.raises(ParameterError, match="template"):
        load_detector(tmp_path / "siamese", "cpu")


@pytest.mark.parametrize(("change", "error"), [
    (None, WeightsError), (b"{", WeightsError), (b"[1]", WeightsError), (b'{"method": "yolo"}', ParameterError), (b"{}", ParameterError),
    (b'{"method": []}', ParameterError), (b'{"method": "SmoothSparse"}', WeightsError),
    (b'{"method": "SmoothSparse", "version": "1", "parameters": {"image_size": "big"}}', WeightsError),
    (b'{"method": "patchcore", "features": "x", "parameters": {"sides": 3}}', WeightsError),
    (b'{"method": "pni", "parameters": {}}', WeightsError), (b'{"method": "ensemble", "members": 3}', WeightsError),
    (b'{"method": "PROS", "version": "1", "parameters": {}}', WeightsError)])
def test_damaged_models_are_named(model, line, tmp_path, change, error) -> None:
    if change is None:
        (model / "config.json").unlink()
    else:
        (model / "config.json").write_bytes(change)
    with pytest.raises(error, match=str(model)) as caught:
        load_detector(model, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(DefectbookError):
        predict_folder(model, line, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_pickles_are_not_loaded(model, line, tmp_path) -> None:
    """A pickle in the place of tensors is refused and does not run."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (model / "state.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError):
        load_detector(model)
    assert not (tmp_path / "ran").exists()


# -- tiles -----------------------------------------------------------------------------------------------------------------------
def test_tiling_goes_with_the_threshold(fitted, model, tmp_path) -> None:
    write(tmp_path / "line" / "large.png", noise(3, (160, 200)))
    tiling = Tiling(64, 16, 4)
    with pytest.raises(ParameterError, match="set with tiling none"):
        predict_folder(model, tmp_path / "line", tmp_path / "out", tiling=tiling)
    detector = Tiled(load_detector(model), tiling)
    save_threshold(model, fit_threshold(detector, NORMAL[6:]), replace=True)
    found = predict_folder(model, tmp_path / "line", tmp_path / "out", maps="npy")  # the threshold says how
    expected = detector.predict([Sample(tmp_path / "line" / "large.png")])
    assert found.table.score[0] == expected.scores[0]
    assert np.array_equal(read_map(tmp_path / "out" / "maps" / "large.png.npy"), expected.maps[0])
    RPCA(image_size=16, columns=4).fit(NORMAL[:4]).save(tmp_path / "rpca")
    with pytest.raises(ParameterError, match="cannot be tiled"):
        predict_folder(tmp_path / "rpca", tmp_path / "line", tmp_path / "out2", 1.0, 1.0, tiling)


# -- the command -----------------------------------------------------------------------------------------------------------------
def test_the_command_from_nothing_to_a_table(fitted, line, tmp_path, capsys) -> None:
    model, held = tmp_path / "m", tmp_path / "held"
    model.mkdir()
    for path in fitted.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    for sample in NORMAL[6:]:
        write(held / f"{sample.name}.png", sample.image)
    words = ["predict", str(model), str(line), "--out", str(tmp_path / "out"), "--device", "cpu"]
    code, out, err = said(capsys, *words)
    assert code == 2 and "--rule normal_quantile" in err and err.count("\n") == 1
    setting = [*words, "--rule", "normal_quantile", "--normal", str(held), "--quantile", "1.0"]
    code, out, err = said(capsys, *setting)
    assert code == 0 and "2 of 5 images are defective" in out and "5 predicted, 0 kept" in err and "on 6 normal images" in err
    assert "shift1/3.png" in out and "shift0/0.png" not in out
    assert "0 predicted, 5 kept" in said(capsys, *setting)[2]  # the same command resumes
    code, out, err = said(capsys, *words[:-2], "--json", "-q", "--device", "cpu")
    assert code == 0 and err == "" and len(json.loads(out)) == 5
    (line / "broken.png").write_bytes(b"x")
    code, out, err = said(capsys, *words)
    assert code == 1 and "broken.png" in out and "1 could not be read" in err


GIVEN = ["MODEL", "LINE", "--out", "o"]


@pytest.mark.parametrize(("words", "message"), [
    (["none", "x.png", "--out", "o"], "x.png: no such image"), (["MODEL", "LINE"], "required: --out"),
    (["LINE", "LINE", "--out", "o"], "config.json"),
    ([*GIVEN, "--tile", "2"], "tile=2"), ([*GIVEN, "--overlap", "4"], "--overlap without --tile"), ([*GIVEN, "--rule", "normal"], "normal_quantile"),
    ([*GIVEN, "--rule", "synthetic"], "--normal FOLDER"), ([*GIVEN, "--quantile", "1"], "belong to --rule"),
    ([*GIVEN, "--maps", "jpg"], "unknown format of maps 'jpg'"), ([*GIVEN, "--devise", "cpu"], "did you mean --device?"),
    ([*GIVEN, "--device", "tpu9"], "device 'tpu9'"),
])
def test_slips_of_the_command(model, line, tmp_path, capsys, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, "predict", *({"MODEL": str(model), "LINE": str(line)}.get(word, word) for word in words))
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("defectbook: ") and not out and not (tmp_path / "o").exists()


def test_help_of_the_command(capsys) -> None:
    code, out, _ = said(capsys, "predict", "--help")
    assert code == 0 and "examples:" in out and "exit codes" in out
