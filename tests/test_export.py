"""ONNX: a file exists only if onnxruntime answers as the library does."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import noise

from defectbook.core import ParameterError, Sample, StoreError, WeightsError
from defectbook.methods.pros import PROS
from defectbook.models.features import Backbone, embed_patches
from defectbook.practice.export import FeatureGraph, ProsGraph, export_checked, export_features, export_pros, trial_images

onnx = pytest.importorskip("onnx", reason="onnx is not installed: the export was not tested (pip install 'defectbook[onnx]')")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the export was not tested")


def run(path, image: np.ndarray) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": image[None]})
    return found


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(device="cpu")


@pytest.mark.parametrize("options", [{}, {"pool": 5, "grid": "coarsest"}])
def test_features_agree_on_new_images(backbone, tmp_path, options) -> None:
    found = export_features(backbone, tmp_path / "f.onnx", 64, **options)
    assert found.difference <= found.tolerance == 1e-4
    expected = embed_patches(backbone(noise(7)[None]), **options).numpy()
    np.testing.assert_allclose(run(tmp_path / "f.onnx", noise(7)), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    about = json.loads({entry.key: entry.value for entry in onnx.load(tmp_path / "f.onnx").metadata_props}["defectbook"])
    assert about["features"] == backbone.fingerprint and about["image_size"] == 64


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_pros_agrees_on_new_images(tmp_path, where) -> None:
    segmenter = PROS(side=64, where=where, device="cpu")
    with pytest.raises(ParameterError, match="not fitted"):
        export_pros(segmenter, tmp_path / "p.onnx")
    with torch.no_grad():  # as if it had learned: adapters that are not the identity
        for parameter in segmenter.network.adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    segmenter.is_fitted = True
    export_pros(segmenter, tmp_path / "p.onnx")
    expected = segmenter.predict([Sample(noise(5))])[:, 1]
    assert expected.std() > 1e-3
    np.testing.assert_allclose(run(tmp_path / "p.onnx", noise(5)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1.001, float("nan"), 0.0])
def test_the_gate_holds(backbone, tmp_path, factor) -> None:
    class Wrong(FeatureGraph):
        def forward(self, images):
            return super().forward(images) * factor

    def answer(image: np.ndarray) -> np.ndarray:
        return embed_patches(backbone(image[None])).numpy()

    with pytest.raises(WeightsError, match="not finite" if np.isnan(factor) else "differs by") as caught:
        export_checked(Wrong(backbone, 64), answer, tmp_path / "w.onnx", 64, "embeddings", {})
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="cannot be exported.*it gives"):
        export_checked(FeatureGraph(backbone, 64), lambda image: answer(image)[:, 1:], tmp_path / "w.onnx", 64, "embeddings", {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written(backbone, tmp_path, monkeypatch) -> None:
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(ParameterError, match="exists already"):
        export_features(backbone, tmp_path / "there.onnx", 64)
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    with pytest.raises(ParameterError, match="flattened"):
        export_features(backbone, tmp_path / "f.onnx", 64, pooling="flattened")
    with pytest.raises(StoreError, match="cannot be written"):
        export_features(backbone, tmp_path / "there.onnx" / "f.onnx", 64)

    class Loops(FeatureGraph):
        def forward(self, images):
            raise RuntimeError("no\nsuch operator")

    with pytest.raises(WeightsError, match="no such operator"):
        export_checked(Loops(backbone, 64), lambda image: image, tmp_path / "x.onnx", 64, "y", {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ParameterError, match="pip install"):
        export_features(backbone, tmp_path / "x.onnx", 64)


def test_trial_images_differ_and_repeat() -> None:
    first, second = trial_images(32), trial_images(32)
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))
    assert len({image.tobytes() for image in first}) == 3 and all(image.shape == (32, 32, 3) for image in first)


def test_the_graph_does_not_share_the_segmenter() -> None:
    segmenter = PROS(side=64, device="cpu")
    graph = ProsGraph(segmenter.network)
    assert not {id(p) for p in graph.parameters()} & {id(p) for p in segmenter.network.parameters()}
