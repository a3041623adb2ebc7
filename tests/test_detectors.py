"""Images in at one size, maps out at their own; a fitted state that is on disk whole or not at all, and what a damaged one says."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, StoreError, WeightsError, resize_image, resize_map
from defectbook.methods.lowrank import RASL, RPCA
from defectbook.methods.smooth_sparse import SmoothSparse
from defectbook.models import detectors
from defectbook.models.detectors import WorkingImages, check_fitted, load_fitted, read_working, rebuilding, save_fitted, top_mean


class Mean:
    """The least detector: the mean of the normal images."""

    version = "1"

    def __init__(self, side: int = 16, **more):
        self.parameters, self.mean = {"side": side, **more}, None

    @property
    def is_fitted(self) -> bool:
        return self.mean is not None


def fitted(**more) -> Mean:
    detector = Mean(**more)
    detector.mean = np.random.default_rng(0).random((16, 16))
    return detector


def coloured(seed: int, height: int, width: int) -> Sample:
    return Sample(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8), name=f"{height}x{width}")


# Images in, maps out

SIZES = [(16, 16), (40, 24), (9, 70), (8, 8), (1, 1)]


@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_images_of_mixed_sizes_come_in_at_one(channels: str) -> None:
    samples = [coloured(i, *size) for i, size in enumerate(SIZES)]
    working = read_working(samples, 16, channels)
    assert working.images.dtype == np.float32 and working.sizes == SIZES and working.images.flags.c_contiguous
    assert working.images.shape == ((5, 16, 16) if channels == "grey" else (5, 16, 16, 3))
    for sample, image in zip(samples, working.images, strict=True):
        expected = resize_image(sample.image, (16, 16)) / np.float32(255)
        np.testing.assert_allclose(image, expected.mean(axis=2) if channels == "grey" else expected, atol=1e-6)


def test_values_are_areas_and_the_mean_of_three_channels() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[::2, :, 0], image[:, :, 1] = 200, 51
    assert (read_working([Sample(image)], 16, "rgb").images == np.float32([100, 51, 0]) / np.float32(255)).all()
    np.testing.assert_allclose(read_working([Sample(image)], 16).images, 151 / 3 / 255, rtol=1e-6)
    white = read_working([Sample(np.full((50, 30), 255, np.uint8))], 16).images
    assert white.min() == white.max() == 1


@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_no_samples_give_no_images_and_no_maps(channels: str) -> None:
    working = read_working([], 16, channels)
    assert working.images.shape[:3] == (0, 16, 16) and working.sizes == []
    prediction = working.predict(np.zeros((0, 16, 16), np.float32))
    assert prediction.maps == [] and prediction.scores.shape == (0,)


def test_what_cannot_be_read_is_named(tmp_path) -> None:
    for change, message in (({"channels": "gray"}, "unknown channels 'gray': did you mean 'grey'"), ({"side": 7}, "side=7 px is too small")):
        with pytest.raises(ParameterError, match=message):
            read_working([], **{"side": 16} | change)
    assert read_working([], 8).images.shape == (0, 8, 8)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="cut.png"):
        read_working([coloured(0, 9, 9), Sample(tmp_path / "cut.png")], 16)


def test_maps_return_to_the_images_sizes_and_scores_come_from_the_working_map() -> None:
    maps = np.random.default_rng(0).random((len(SIZES), 16, 16)).astype(np.float32)
    prediction = WorkingImages(np.zeros_like(maps), SIZES).predict(maps)
    assert [found.shape for found in prediction.maps] == SIZES and all(found.dtype == np.float32 for found in prediction.maps)
    assert (prediction.maps[0] == maps[0]).all() and (prediction.maps[1] == resize_map(maps[1], (40, 24))).all()
    assert prediction.scores.tolist() == [np.sort(found, axis=None)[-2:].mean() for found in maps]  # a hundredth of 256 pixels are two
    with pytest.raises(ValueError):  # as many maps as images
        WorkingImages(np.zeros_like(maps), SIZES).predict(maps[:-1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 10**6))
def test_top_mean_is_the_mean_of_the_largest(height: int, width: int, share: float, seed: int) -> None:
    found = np.random.default_rng(seed).integers(0, 9, (height, width)).astype(np.float64)  # with ties
    count = max(1, int(share * found.size))
    assert top_mean(found, share) == pytest.approx(sorted(found.ravel())[-count:] @ np.full(count, 1 / count))
    assert found.mean() - 1e-9 <= top_mean(found, share) <= found.max()


# State out, state in

def test_saved_and_loaded_to_the_bit(tmp_path) -> None:
    tensors = {"mean": fitted().mean, "half": np.arange(6, dtype=np.float16).reshape(2, 3).T, "count": np.array([3])}  # one not contiguous
    save_fitted(tmp_path / "new" / "model", fitted(rate=0.1, names=["a"]), tensors)
    parameters, again = load_fitted(tmp_path / "new" / "model", Mean, ["mean", "half"])
    assert parameters == {"side": 16, "rate": 0.1, "names": ["a"]} and set(again) == set(tensors)
    assert all((again[name] == tensors[name]).all() and again[name].dtype == tensors[name].dtype for name in tensors)
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["config.json", "model", "state.safetensors"]


def test_what_is_not_fitted_or_would_overwrite_is_not_saved(tmp_path) -> None:
    with pytest.raises(ParameterError, match="nothing to save: this Mean is not fitted"):
        save_fitted(tmp_path / "model", Mean(), {})
    with pytest.raises(ParameterError, match="this Mean is not fitted; call fit with normal samples"):
        check_fitted(Mean())
    check_fitted(fitted())
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        with pytest.raises(ParameterError, match=f"{name}: exists already"):
            save_fitted(tmp_path / name, fitted(), {"mean": fitted().mean})
    with pytest.raises(ParameterError, match="model: JSON cannot hold the parameters of this Mean .*ndarray"):
        save_fitted(tmp_path / "model", fitted(weights=np.zeros(2)), {"mean": fitted().mean})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"] and (tmp_path / "file").read_text() == "mine"


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(detectors, "save_file", full)
    with pytest.raises(StoreError, match="model: cannot be written .*No space left"):
        save_fitted(tmp_path / "model", fitted(), {"mean": fitted().mean})
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_stopped_before_its_last_file_leaves_nothing(tmp_path, monkeypatch) -> None:
    def stops(self, *rest) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stops)  # the JSON comes last
    with pytest.raises(KeyboardInterrupt):
        save_fitted(tmp_path / "model", fitted(), {"mean": fitted().mean})
    assert list(tmp_path.iterdir()) == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edit(path: Path, **changes) -> None:
    """Write changes into a config.json; None removes a key."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


DAMAGES = {
    "no folder": (lambda folder: shutil.rmtree(folder), "not a saved Mean"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "not a saved Mean"),
    "no state": (lambda folder: (folder / "state.safetensors").unlink(), "not a saved Mean"),
    "cut config": (lambda folder: cut(folder / "config.json"), "not a saved Mean"),
    "cut state": (lambda folder: cut(folder / "state.safetensors"), "not a saved Mean"),
    "empty state": (lambda folder: (folder / "state.safetensors").write_bytes(b""), "not a saved Mean"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]"), "not a saved Mean"),
    "no parameters": (lambda folder: edit(folder / "config.json", parameters=None), "not a saved Mean .'parameters'"),
    "another class": (lambda folder: edit(folder / "config.json", method="Median"), "not a saved Mean .it holds Median with mean"),
    "another version": (lambda folder: edit(folder / "config.json", version="0"), "written by Mean 0, and this is 1; fit and save it again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(tmp_path, damage: str) -> None:
    folder = tmp_path / "model"
    save_fitted(folder, fitted(), {"mean": fitted().mean})
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        load_fitted(folder, Mean, ["mean"])
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_tensor_that_is_missing_is_noticed(tmp_path) -> None:
    save_fitted(tmp_path / "model", fitted(), {"mean": fitted().mean})
    with pytest.raises(WeightsError, match="it holds Mean with mean"):
        load_fitted(tmp_path / "model", Mean, ["mean", "deviation"])
    assert load_fitted(tmp_path / "model", Mean)[0] == {"side": 16}


def test_rebuilding_names_the_folder_once_and_shortly() -> None:
    with pytest.raises(WeightsError) as caught, rebuilding("some/folder", Mean):
        raise RuntimeError("a line\n" + "and more " * 1000)
    message = str(caught.value)
    assert message.startswith("some/folder: not a saved Mean (a line and more") and len(message) < 400 and "\n" not in message
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(KeyboardInterrupt), rebuilding("some/folder", Mean):
        raise KeyboardInterrupt


@pytest.mark.parametrize("parameters, message", [({"sidde": 3}, "unexpected keyword argument 'sidde'"), ([1, 2], "must be a mapping"),
                                                 ({"image_size": 3}, "image_size|side=3")])
@pytest.mark.parametrize("kind", [RPCA, RASL, SmoothSparse])
@pytest.mark.filterwarnings("ignore::defectbook.methods.lowrank.DecompositionWarning")
def test_edited_parameters_are_named_by_every_detector(tmp_path, kind: type, parameters, message: str) -> None:
    samples = [Sample(np.random.default_rng(i).integers(90, 110, (16, 16), np.uint8)) for i in range(6)]
    detector = kind(image_size=16, **({"columns": 6} if kind is not SmoothSparse else {"smoothness": 1.0, "sparsity": 1.0, "knots": 4}))
    detector.fit(samples).save(tmp_path / "model")
    assert kind.load(tmp_path / "model").parameters == detector.parameters
    edit(tmp_path / "model" / "config.json", parameters=parameters)
    with pytest.raises(WeightsError, match=message) as caught:
        kind.load(tmp_path / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: not a saved {kind.__name__}") and "\n" not in str(caught.value)
