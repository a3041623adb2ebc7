"""PatchCore, its parts, and the protocol around it, against obvious references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import ParameterError, WeightsError
from defectbook.data.datasets import read_folder
from defectbook.methods.patchcore import PatchCore
from defectbook.models.coreset import covering_radius, select_greedy
from defectbook.models.features import Backbone, embed_patches, fit_state
from defectbook.models.memory import MemoryBank
from defectbook.practice.protocol import evaluate


def naive_greedy(features: np.ndarray, keep: int) -> list[int]:
    """Farthest-point selection by all differences in float64; ties go to the smallest index."""
    chosen = [0]
    while len(chosen) < keep:
        distances = np.min([np.linalg.norm(features - features[i], axis=1) for i in chosen], axis=0)
        distances[chosen] = -1
        chosen.append(int(np.argmax(distances)))
    return chosen


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 8))
def test_greedy_is_the_naive_algorithm(seed: int, count: int, dimensions: int) -> None:
    # Integers: both ways are exact, so that ties are ties in both.
    features = np.random.default_rng(seed).integers(-20, 20, (count, dimensions)).astype(np.float32)
    keep = min(count, 12)
    assert select_greedy(features, keep).tolist() == naive_greedy(features.astype(np.float64), keep)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_greedy_radius_is_within_twice_any_other(seed: int, keep: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(80, 3)).astype(np.float32)
    other = rng.choice(80, keep, replace=False)
    assert covering_radius(features, select_greedy(features, keep)) <= 2 * covering_radius(features, other) + 1e-4


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 5))
def test_memory_finds_the_nearest(seed: int, count: int, neighbours: int) -> None:
    rng = np.random.default_rng(seed)
    stored, queries = rng.normal(size=(count, 7)), rng.normal(size=(9, 7))
    neighbours = min(neighbours, count)
    distances, indices = MemoryBank(stored).search(queries, neighbours)
    obvious = np.linalg.norm(queries[:, None] - stored[None], axis=2)
    assert np.allclose(distances, np.sort(obvious, axis=1)[:, :neighbours], atol=1e-3)
    assert np.allclose(np.take_along_axis(obvious, indices, axis=1), distances, atol=1e-3)


def test_memory_refuses_nonsense() -> None:
    bank = MemoryBank(np.eye(3))
    with pytest.raises(ParameterError, match="4 neighbours of a bank of 3"):
        bank.search(np.eye(3), 4)
    with pytest.raises(ParameterError, match="same backbone"):
        bank.search(np.eye(2))


def test_pooling_averages_over_a_window() -> None:
    """Against a loop: the mean over the 3 x 3 window, with zeros outside the border as PatchCore has it."""
    grid = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2, 5, 6)).astype(np.float32))
    padded = np.pad(grid[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    expected = np.array([[padded[:, y:y + 3, x:x + 3].mean((1, 2)) for x in range(6)] for y in range(5)])
    assert np.allclose(embed_patches([grid], pool=3)[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext101_32x8d", "densenet201"])
def test_other_backbones_load_files_of_their_layout(name: str, tmp_path, monkeypatch) -> None:
    """Weights of the right shapes, saved under torchvision's names, load strictly and give the documented strides."""
    import re

    import timm

    from defectbook.core import sha256_file
    from defectbook.data import sources

    model = timm.create_model(sources.entry("weights", name)["model"], pretrained=False)
    state = {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", key): value for key, value in model.state_dict().items()}
    path = tmp_path / f"{name}.pth"
    torch.save(state, path)
    monkeypatch.setitem(sources.manifest()["weights"][name], "sha256", sha256_file(path))
    backbone = Backbone(name, weights=path, device="cpu")
    assert backbone.strides == (8, 16)
    grids = backbone(np.zeros((1, 64, 64, 3), np.uint8))
    assert [tuple(grid.shape[2:]) for grid in grids] == [(8, 8), (4, 4)]


def test_weights_of_another_network_are_refused() -> None:
    small, large = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 2))
    with pytest.raises(WeightsError, match="2 tensors, 4 expected"):
        fit_state(small.state_dict(), large, "x.pth")
    with pytest.raises(WeightsError, match="'bias' has shape|'weight' has shape"):
        fit_state(torch.nn.Linear(5, 3).state_dict(), small, "x.pth")


@pytest.fixture(scope="module")
def detector_options() -> dict:
    return {"image_size": 64, "coreset": "none", "device": "cpu"}


def test_a_hole_is_found_and_located(mvtec_tree, detector_options) -> None:
    dataset = read_folder(mvtec_tree, "plate", validation=2)
    run = evaluate(PatchCore(**detector_options), dataset, ("image_auroc", "pixel_auroc"))
    values = dict(zip(run.metrics.metric, run.metrics.value, strict=True))
    assert values["image_auroc"] == 1.0 and values["pixel_auroc"] > 0.9
    hole = next(i for i, sample in enumerate(dataset.test) if sample.label)
    mask, anomaly_map = dataset.test[hole].mask, run.prediction.maps[hole]
    assert anomaly_map.shape == mask.shape and anomaly_map.dtype == np.float32
    assert anomaly_map[mask > 0].mean() > 1.5 * anomaly_map[mask == 0].mean()


def test_maps_come_at_each_images_own_size(mvtec_tree, detector_options) -> None:
    from defectbook.core import Sample

    dataset = read_folder(mvtec_tree, "plate")
    odd = Sample(np.zeros((50, 90, 3), np.uint8), name="odd")
    prediction = PatchCore(**detector_options).fit(dataset.train).predict([odd, dataset.test[0]])
    assert [m.shape for m in prediction.maps] == [(50, 90), (64, 64)]


@pytest.mark.parametrize("coreset", ["none", "random", "greedy"])
def test_two_fits_and_a_loaded_one_agree_to_the_bit(coreset: str, mvtec_tree, tmp_path) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    make = lambda: PatchCore(image_size=64, coreset=coreset, ratio=0.5, device="cpu").fit(dataset.train)  # noqa: E731
    first, second = make(), make()
    first.save(tmp_path / "model")
    third = PatchCore.load(tmp_path / "model", device="cpu")
    maps = [detector.predict(dataset.test).maps for detector in (first, second, third)]
    assert all((a == b).all() and (a == c).all() for a, b, c in zip(*maps, strict=True))
    with pytest.raises(ParameterError, match="exists already"):
        second.save(tmp_path / "model")


def test_a_bank_of_other_features_is_refused(mvtec_tree, tmp_path) -> None:
    import json

    dataset = read_folder(mvtec_tree, "plate")
    PatchCore(image_size=64, device="cpu").fit(dataset.train).save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["features"] = "densenet201:2,3:c1103571"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="fitted with features densenet201:2,3:c1103571, but the backbone here is efficientnet_lite0"):
        PatchCore.load(tmp_path / "model", device="cpu")


def test_predict_before_fit_says_so() -> None:
    with pytest.raises(ParameterError, match="call fit"):
        PatchCore(image_size=64, device="cpu").predict([])
