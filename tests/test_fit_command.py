"""A folder of good images becomes a model with a threshold; whatever is wrong with it is one line, and leaves nothing behind."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from defectbook.core import DataError, ParameterError
from defectbook.methods.reconstruction import Reconstruction
from defectbook.practice.cli import main
from defectbook.practice.fit_command import fit_model
from defectbook.practice.saved_detectors import load_detector, load_threshold


@pytest.fixture
def good(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "good" / "tray 2").mkdir(parents=True)
    for number in range(15):
        image = 100 + 30 * np.sin(np.arange(48) / 4)[None, :, None] + rng.normal(0, 12, (48, 48, 1))
        cv2.imwrite(str(tmp_path / "good" / ("tray 2" if number % 2 else "") / f"{number:02d}.png"), np.clip(image, 0, 255).astype(np.uint8))
    return tmp_path / "good"


def test_the_threshold_comes_from_images_that_were_not_learned(good: Path, tmp_path: Path) -> None:
    made = fit_model("ssd", [good], tmp_path / "model", held_out=0.2, seed=3, image_size=24, knots=4)
    assert (made.learned, made.held_out) == (12, 3)
    again = fit_model("ssd", [good], tmp_path / "again", held_out=0.2, seed=3, image_size=24, knots=4)
    assert again.threshold == made.threshold == load_threshold(tmp_path / "model")
    other = fit_model("ssd", [good], tmp_path / "other", held_out=0.2, seed=4, image_size=24, knots=4)
    assert other.threshold.data != made.threshold.data, "another seed holds other images out"
    assert load_detector(tmp_path / "model").parameters["knots"] == 4


def test_without_a_rule_all_images_are_learned_from(good: Path, tmp_path: Path) -> None:
    made = fit_model("ssd", [good], tmp_path / "model", rule="none", image_size=24, knots=4)
    assert (made.learned, made.held_out, made.threshold) == (15, 0, None) and load_threshold(tmp_path / "model") is None


def test_fit_then_predict_from_the_command_line(good: Path, tmp_path: Path, capsys) -> None:
    model, out = tmp_path / "parts.model", tmp_path / "monday"
    assert main(["fit", "ssd", str(good), "--out", str(model), "-p", "image_size=24", "-p", "knots=4", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["held_out"] == 3 and f"defectbook predict {model}" in said.err
    marred = cv2.imread(str(good / "00.png"))
    marred[20:26, 8:40] = 255
    cv2.imwrite(str(tmp_path / "marred.png"), marred)
    assert main(["predict", str(model), str(tmp_path / "marred.png"), str(good / "02.png"), "--out", str(out), "--json"]) == 0
    table = {row["file"]: row for row in json.loads(capsys.readouterr().out)}
    assert table["marred.png"]["label"] == 1 and table["marred.png"]["score"] > table["02.png"]["score"]


@pytest.mark.parametrize(("words", "message"), [
    (["ssdd", "{good}"], "did you mean 'ssd'"),
    (["ssd", "{good}", "-p", "kots=4"], "no option 'kots'"),
    (["ssd", "{good}", "-p", "knots"], "expected name=value"),
    (["ssd", "{good}", "-p", "seed=4"], "write --seed"),
    (["ssd", "{good}", "--rule", "quantil"], "unknown rule 'quantil'"),
    (["ssd", "{good}", "--held-out", "1"], "give a share between 0 and 1"),
    (["ssd", "{good}", "--held-out", "0.99"], "leave fewer than two"),
    (["ssd", "{good}/nothing"], "no such image or folder"),
    (["ssd", "{empty}"], "no images"),
    (["ssd"], "fit needs METHOD"),
])
def test_slips_are_one_line_and_leave_nothing(good: Path, tmp_path: Path, capsys, words: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    told = [word.format(good=good, empty=tmp_path / "empty") for word in words]
    assert main(["fit", *told, "--out", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_folder_and_a_broken_image_are_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ParameterError, match="exists already"):
        fit_model("ssd", [good], tmp_path / "model", image_size=24, knots=4)
    (good / "torn.png").write_bytes((good / "00.png").read_bytes()[:200])
    with pytest.raises(DataError, match="torn.png"):
        fit_model("ssd", [good], tmp_path / "torn", image_size=24, knots=4, rule="none")
    assert not (tmp_path / "torn").exists()


def test_a_fit_that_was_stopped_before_saving_does_not_train_again(good: Path, tmp_path: Path, monkeypatch) -> None:
    options = {"image_size": 16, "encoder": (2, 4), "epochs": 3, "batch_size": 4, "rule": "none"}
    undisturbed = load_detector(fit_model("ae", [good], tmp_path / "whole", **options).folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reconstruction, "save", lambda self, folder: (_ for _ in ()).throw(KeyboardInterrupt()))
        fit_model("ae", [good], tmp_path / "model", **options)
    assert list(tmp_path.glob(".model.fitting/*")) and not (tmp_path / "model").exists()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda self, *args: pytest.fail("it trained again"))
        resumed = load_detector(fit_model("ae", [good], tmp_path / "model", **options).folder)
    for name, value in undisturbed.prior.network.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), resumed.prior.network.state_dict()[name].numpy())
    assert not list(tmp_path.glob(".*fitting"))


def test_a_model_whose_threshold_cannot_be_set_is_kept_and_said(good: Path, tmp_path: Path) -> None:
    for path in good.rglob("*.png"):
        cv2.imwrite(str(path), np.full((48, 48, 3), 90, np.uint8))
    with pytest.raises(DataError, match="do not vary.*is saved, but without a threshold"):
        fit_model("ssd", [good], tmp_path / "model", image_size=24, knots=4)
    assert load_detector(tmp_path / "model").is_fitted and load_threshold(tmp_path / "model") is None
