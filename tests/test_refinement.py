"""Refinement: the network, its training data, a training that survives being killed, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Prediction, Sample, StoreError, WeightsError, resize_map
from defectbook.data.sources import find_weights
from defectbook.methods import refinement as module
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.refinement import (
    REFINEMENT_LOSSES,
    EarlyFusion,
    Refinement,
    RefinementNetwork,
    Trainer,
    Triples,
    augment,
    make_triples,
    map_bounds,
    scale_map,
)
from defectbook.models.features import read_state


class Difference:
    """A detector for tests: the blurred distance from the mean of the normal images."""

    version = "1"

    def __init__(self, blur: float = 3.0):
        self.parameters, self.mean, self.fitted_on = {"blur": blur}, None, []

    def fit(self, samples):
        self.mean = np.mean([s.image for s in samples], axis=0)
        self.fitted_on = [s.name for s in samples]
        return self

    def predict(self, samples):
        if self.mean is None:
            raise ParameterError("not fitted")
        maps = []
        for sample in samples:
            image = sample.image.astype(np.float32)
            mean = cv2.resize(self.mean.astype(np.float32), image.shape[1::-1])
            maps.append(cv2.GaussianBlur(np.abs(image - mean).mean(2), (0, 0), self.parameters["blur"]))
        return Prediction(maps, np.array([m.mean() for m in maps]))

    def save(self, folder):
        Path(folder).mkdir()
        np.save(Path(folder) / "mean.npy", self.mean)

    @classmethod
    def load(cls, folder, device="auto"):
        detector = cls()
        detector.mean = np.load(Path(folder) / "mean.npy")
        return detector


TINY = {"backbone": "test_efficientnet", "weights": "none", "image_size": 32, "iterations": 6, "batch_size": 2, "pool_size": 8, "width": 4,
        "held_out": 0.2, "learning_rate": 1e-3, "device": "cpu"}


def normals(count: int = 10, side: int = 48) -> list[Sample]:
    return [Sample(noise(i, (side, side)), None, 0, f"normal{i}") for i in range(count)]


def damaged(side: int = 48) -> Sample:
    image, mask = noise(99, (side, side)).copy(), np.zeros((side, side), np.uint8)
    image[10:30, 12:28], mask[10:30, 12:28] = 255, 1
    return Sample(image, mask, 1, "damaged", mask_threshold=None)


def weights_of(refinement: Refinement) -> bytes:
    return b"".join(value.numpy().tobytes() for value in refinement.network.state_dict().values())


# The network

@pytest.mark.parametrize("backbone", ["test_efficientnet", "resnet18", "densenet161"])
@pytest.mark.parametrize("size", [(32, 32), (50, 71)])
def test_output_has_the_size_of_the_image(backbone: str, size: tuple[int, int]) -> None:
    network = RefinementNetwork(backbone, width=4, weights="none").eval()
    with torch.no_grad():
        output = network(torch.zeros(1, 3, *size), torch.zeros(1, *size))
    assert output.shape == (1, *size) and output.dtype == torch.float32


def test_fusion_is_one_convolution_on_four_channels() -> None:
    network = RefinementNetwork(weights=None)
    stem = network.encoder.conv_stem
    assert isinstance(stem, EarlyFusion)
    x = torch.randn(2, 4, 20, 20)
    padded = F.pad(x, (0, 1, 0, 1))  # this network pads like TensorFlow: below and to the right
    assert torch.allclose(stem(x), F.conv2d(padded, torch.cat([stem.image.weight, stem.map.weight], 1), None, 2), atol=1e-5)
    pretrained = next(iter(read_state(find_weights("efficientnet_lite0")).values()))
    assert torch.equal(stem.image.weight, pretrained)


def test_map_and_image_both_matter_and_every_parameter_learns() -> None:
    network = RefinementNetwork("test_efficientnet", 4, "none")
    image, maps = torch.rand(2, 3, 32, 32) * 255, torch.rand(2, 32, 32)
    output = network.train()(image, maps)
    assert not torch.allclose(output, network(image, 1 - maps)) and not torch.allclose(output, network(255 - image, maps))
    output.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_construction_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = RefinementNetwork("test_efficientnet", 4, "none", seed=1), RefinementNetwork("test_efficientnet", 4, "none", seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    other = RefinementNetwork("test_efficientnet", 4, "none", seed=2)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_backbones_that_cannot_be_had(tmp_path) -> None:
    with pytest.raises(ParameterError, match="unknown backbone 'densenet_161'.*did you mean 'densenet161'"):
        RefinementNetwork("densenet_161")
    with pytest.raises(ParameterError, match="halves its grid"):
        RefinementNetwork("test_vit", weights="none")
    with pytest.raises(WeightsError, match="weights='none'"):
        RefinementNetwork("resnet18")
    with pytest.raises(WeightsError, match="no such weights file"):
        RefinementNetwork("resnet18", weights=tmp_path / "absent.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="2 tensors"):
        RefinementNetwork("resnet18", weights=tmp_path / "other.pth")


def test_a_file_of_weights_is_used(tmp_path) -> None:
    import timm

    model = timm.create_model("resnet18", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    network = RefinementNetwork("resnet18", 4, tmp_path / "mine.pth")
    assert torch.equal(network.encoder.conv1.image.weight, model.conv1.weight)
    assert torch.equal(network.encoder.layer4[1].conv2.weight, model.layer4[1].conv2.weight)


# What it learns from

@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(-100, 100), st.floats(0.01, 50))
def test_bounds_follow_shift_and_scale(seed: int, spread: float, shift: float, scale: float) -> None:
    maps = np.random.default_rng(seed).normal(size=(3, 20, 20))
    low, high = map_bounds(maps, spread)
    moved = map_bounds(maps * scale + shift, spread)
    assert np.allclose(moved, (low * scale + shift, high * scale + shift))
    assert low == np.quantile(maps, 0.01) and np.isclose((high - low) / spread, np.quantile(maps, 0.999) - low)
    scaled = scale_map(np.array([low, high, 2 * high - low]), (low, high))
    assert np.allclose(scaled, [0, 1, 2], atol=1e-5) and scaled.dtype == np.float32


@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_maps_without_a_scale_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="no scale can be taken"):
        map_bounds([np.full((4, 4), value)])


def test_augmentation_moves_all_three_together() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:26] = 1
    image = np.repeat(mask[:, :, None] * 200, 3, 2)
    seen = set()
    for seed in range(12):
        i, a, m = augment(image, mask.astype(np.float32), mask, np.random.default_rng(seed), rotation=30, colour=0)
        assert i.dtype == np.uint8 and a.dtype == np.float32 and m.dtype == np.uint8 and set(np.unique(m)) <= {0, 1}
        assert np.abs(a - m).mean() < 0.02 and np.abs(i[:, :, 0] / 200 - m).mean() < 0.02
        seen.add(bool(m[30, 45]))
    assert seen == {True, False}  # some are flipped, some not
    i, a, m = augment(image + 40, mask.astype(np.float32), mask, np.random.default_rng(0), rotation=0, colour=0.1)
    assert np.abs(a - a.round()).max() == 0 and (i.astype(int) != np.where(m[:, :, None], 240, 40)).any()


def test_triples_are_equal_parts_of_four_kinds() -> None:
    samples = normals(4)
    detector = Difference().fit(samples)
    pool = make_triples(detector, samples, 8, 32, (0.0, 10.0), seed=3)
    assert pool.images.shape == (8, 32, 32, 3) and pool.maps.dtype == np.float32 and pool.masks.any((1, 2)).all()
    assert pool.maps.min() >= 0 and pool.maps.max() <= 1
    again, later = (make_triples(detector, samples, 8, 32, (0.0, 10.0), 3, epoch) for epoch in (0, 1))
    assert all((a == b).all() for a, b in zip(pool, again, strict=True)) and (pool.images != later.images).any()
    expected = detector.predict([Sample(pool.images[5])]).maps[0]
    assert np.allclose(pool.maps[5], np.clip(expected / 10, 0, 1), atol=1e-6)


def test_every_pass_uses_every_triple_once(monkeypatch) -> None:
    monkeypatch.setattr(module, "augment", lambda *triple_and_rng: triple_and_rng[:3])
    pool = Triples(np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 4, 4, 3), np.uint8), np.zeros((5, 4, 4), np.float32),
                   np.zeros((5, 4, 4), np.uint8))
    trainer = Trainer(RefinementNetwork("test_efficientnet", 4, "none"), "regression", 1e-3, 2, 0, "cpu")
    drawn = np.concatenate([trainer.batch(pool, i).images[:, 0, 0, 0] for i in range(10)]).reshape(4, 5)
    assert (np.sort(drawn, axis=1) == np.arange(5)).all() and len({tuple(row) for row in drawn}) > 1


# Training

@pytest.mark.parametrize("loss", REFINEMENT_LOSSES)
def test_each_loss_trains_and_predicts(loss: str) -> None:
    refinement = Refinement(Difference(), **TINY | {"loss": loss, "fusion": 1.0, "iterations": 25, "learning_rate": 3e-3}).fit(normals())
    assert all(np.isfinite([p["training"], p["held_out"]]).all() for p in refinement.history)
    (anomaly_map,) = refinement.predict([damaged()]).maps
    assert anomaly_map.min() >= 0 and anomaly_map.max() <= 1 and np.ptp(anomaly_map) > 0


def test_training_lowers_the_loss_on_defects_drawn_on_held_out_images() -> None:
    options = TINY | {"iterations": 60, "batch_size": 8, "pool_size": 32, "learning_rate": 3e-3}
    refinement = Refinement(Difference(), **options).fit(normals())
    curve = [point["held_out"] for point in refinement.history]
    assert len(curve) == module.EVALUATIONS and refinement.history[-1]["iteration"] == 60
    assert np.mean(curve[-3:]) < 0.7 * curve[0]


def test_two_fits_agree_to_the_bit() -> None:
    first, second, other = (Refinement(Difference(), **TINY | {"seed": seed}).fit(normals()) for seed in (0, 0, 1))
    assert weights_of(first) == weights_of(second) != weights_of(other)
    again = weights_of(first.fit(normals()))  # from the first weights, not from where the last fit ended
    assert again == weights_of(second)
    a, b = (r.predict([damaged()]) for r in (first, second))
    assert (a.maps[0] == b.maps[0]).all() and (a.scores == b.scores).all()


def test_a_detector_is_fitted_on_the_rest_and_scaled_by_what_is_held_out() -> None:
    samples, detector = normals(), Difference()
    refinement = Refinement(detector, **TINY).fit(samples)
    held = [s for s in samples if s.name not in detector.fitted_on]
    assert len(held) == 2 and len(detector.fitted_on) == 8
    assert refinement.bounds == map_bounds(detector.predict(held).maps)


def test_a_fitted_detector_is_kept_and_said_to_be(capsys) -> None:
    detector = Difference().fit(normals(3))
    mean = detector.mean.copy()
    Refinement(detector, **TINY).fit(normals())
    assert "Difference is fitted already and kept" in capsys.readouterr().out and (detector.mean == mean).all()
    fresh = Refinement(Difference(), **TINY).fit(normals())
    capsys.readouterr()
    before = fresh.detector.mean.copy()
    fresh.fit([Sample(255 - s.image, None, 0, s.name) for s in normals()])  # a second fit fits again
    assert capsys.readouterr().out == "" and (fresh.detector.mean != before).any()


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch) -> None:
    options = TINY | {"renew": True, "iterations": 9}
    expected = Refinement(Difference(), **options).fit(normals())
    step, steps = Trainer.step, []

    def dies(self, pool, iteration):
        if iteration == 6:
            raise KeyboardInterrupt
        return step(self, pool, iteration)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        Refinement(Difference(), **options).fit(normals(), tmp_path / "work")
    monkeypatch.setattr(Trainer, "step", lambda self, pool, i: steps.append(i) or step(self, pool, i))
    resumed = Refinement(Difference(), **options).fit(normals(), tmp_path / "work")
    assert steps == [6, 7, 8] and weights_of(resumed) == weights_of(expected) and resumed.history == expected.history
    assert list((tmp_path / "work").rglob("*")) == []


def test_checkpoints_of_other_runs_and_broken_ones_are_refused(tmp_path, monkeypatch) -> None:
    def dies(self, triples):
        raise KeyboardInterrupt

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, pool, i: step(self, pool, i) if i < 3 else dies(self, pool))
    with pytest.raises(KeyboardInterrupt):
        Refinement(Difference(), **TINY).fit(normals(), tmp_path)
    for other in (TINY | {"learning_rate": 2e-3}, TINY | {"loss": "ce"}):
        with pytest.raises(StoreError, match="belongs to other parameters or images"):
            Refinement(Difference(), **other).fit(normals(), tmp_path)
    with pytest.raises(StoreError, match="other parameters or images"):
        Refinement(Difference(), **TINY).fit(normals(11), tmp_path)
    path = tmp_path / "refinement" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="not a checkpoint of a refinement"):
        Refinement(Difference(), **TINY).fit(normals(), tmp_path)


CHILD = """
import sys
from test_refinement import TINY, Difference, normals, weights_of
from defectbook.methods.refinement import Refinement
import hashlib
refinement = Refinement(Difference(), **TINY | {"iterations": int(sys.argv[2])}).fit(normals(), sys.argv[1] or None)
print(hashlib.sha256(weights_of(refinement)).hexdigest())
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", CHILD, folder, "200"], env=environment, stdout=subprocess.PIPE, text=True)

    expected = start("").communicate()[0]
    child, path = start(str(tmp_path / "work")), tmp_path / "work" / "refinement" / "training.safetensors"
    deadline = time.monotonic() + 120
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and path.is_file(), "the training ended before it could be killed"
    assert start(str(tmp_path / "work")).communicate()[0] == expected and len(expected) == 65


# Predicting

@pytest.fixture(scope="module")
def fitted() -> Refinement:
    return Refinement(Difference(), **TINY).fit(normals())


def test_final_maps_mix_raw_and_refined(fitted: Refinement) -> None:
    samples = [damaged(), damaged(70), *normals(3)]
    raw = [scale_map(m, fitted.bounds) for m in fitted.detector.predict(samples).maps]
    maps = {}
    for fitted.own["fusion"] in (0.0, 0.1, 1.0):
        maps[fitted.own["fusion"]] = fitted.predict(samples).maps
    fitted.own["fusion"] = 0.1
    assert raw[0].max() > 1.5  # the worst is not clamped
    for i, sample in enumerate(samples):
        assert maps[0.1][i].shape == sample.image.shape[:2] and maps[0.1][i].dtype == np.float32
        assert np.allclose(maps[0.0][i], raw[i]) and maps[1.0][i].min() >= 0 and maps[1.0][i].max() <= 1
        assert np.allclose(maps[0.1][i], 0.9 * raw[i] + 0.1 * maps[1.0][i], atol=1e-5)


def test_a_map_does_not_depend_on_its_neighbours(fitted: Refinement) -> None:
    together, alone = fitted.predict([*normals(3), damaged()]), fitted.predict([damaged()])
    assert np.allclose(together.maps[-1], alone.maps[0], atol=1e-5)


def test_image_scores_by_name(fitted: Refinement) -> None:
    samples = [damaged(), *normals(2)]
    final = fitted.predict(samples)
    assert np.allclose(final.scores, [m.max() for m in final.maps])
    fitted.own["image_score"] = "detector"
    assert np.allclose(fitted.predict(samples).scores, fitted.detector.predict(samples).scores)
    fitted.own["image_score"] = "map_max"


def test_saved_and_loaded(fitted: Refinement, tmp_path) -> None:
    fitted.save(tmp_path / "model")
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".pkl", ".pt", ".pth")]
    loaded = Refinement.load(tmp_path / "model", detector=Difference, device="cpu")
    a, b = fitted.predict([damaged()]), loaded.predict([damaged()])
    assert (a.maps[0] == b.maps[0]).all() and (a.scores == b.scores).all()
    assert loaded.bounds == fitted.bounds and loaded.history == fitted.history and loaded.own == fitted.own
    json.dumps(loaded.parameters)
    with pytest.raises(ParameterError, match="a loaded Refinement is not trained anew"):
        loaded.fit(normals())
    with pytest.raises(ParameterError, match="exists already"):
        fitted.save(tmp_path / "model")
    with pytest.raises(ParameterError, match="neither PatchCore nor PNI"):
        Refinement.load(tmp_path / "model", device="cpu")
    (tmp_path / "model" / "network.safetensors").write_bytes(b"short")
    with pytest.raises(WeightsError, match="not a saved refinement"):
        Refinement.load(tmp_path / "model", detector=Difference, device="cpu")


def test_around_patchcore(tmp_path) -> None:
    detector = PatchCore(image_size=64, coreset="none", device="cpu")
    refinement = Refinement(detector, **TINY | {"image_size": 64, "iterations": 2}).fit(normals(6, 64), tmp_path / "work")
    refinement.save(tmp_path / "model")
    loaded = Refinement.load(tmp_path / "model", device="cpu")
    assert isinstance(loaded.detector, PatchCore)
    prediction = loaded.predict([damaged(64), *normals(1, 64)])
    assert (prediction.maps[0] == refinement.predict([damaged(64), *normals(1, 64)]).maps[0]).all()
    assert prediction.scores[0] > prediction.scores[1]
    assert refinement.parameters["detector"]["method"] == "PatchCore" and refinement.parameters["weights"] == "none"


# Bad input

def test_bad_input_is_named(fitted: Refinement, monkeypatch) -> None:
    image, anomaly_map = np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 32, 32), np.float32)
    fitted.refine(image, anomaly_map)
    with pytest.raises(DataError, match="a map of 48x40 px, but this refinement network was trained on 32x32 px"):
        fitted.refine(image, np.zeros((1, 40, 48), np.float32))
    with pytest.raises(DataError, match="an image of 64x64 px, but this refinement network was trained on 32x32 px"):
        fitted.refine(np.zeros((1, 64, 64, 3), np.uint8), anomaly_map)
    with pytest.raises(DataError, match="not finite"):
        fitted.refine(image, anomaly_map + np.nan)
    with pytest.raises(DataError, match="normal0: label 2 among"):
        fitted.fit([Sample(noise(0), None, 2, "normal0"), *normals()])
    for count in (0, 1):
        with pytest.raises(DataError, match="leave none to fit"):
            fitted.fit(normals(count))
    for maps, message in (([None], "gave no map for an image of 48x48 px"), ([np.zeros((8, 8))], r"gave a map of shape \(8, 8\)")):
        with monkeypatch.context() as patch:
            patch.setattr(Difference, "predict", lambda self, samples, maps=maps: Prediction(maps * len(samples), np.zeros(len(samples))))
            with pytest.raises(DataError, match=message):
                fitted.predict([damaged()])


def test_bad_options_are_named() -> None:
    refused = [({"loss": "regresion"}, "did you mean 'regression'"), ({"loss": "weighted_ce"}, "unknown loss of the refinement"),
               ({"image_score": "max"}, "unknown image_score"), ({"iterations": 0}, "iterations=0"), ({"batch_size": 1}, "batch_size=1"),
               ({"fusion": 1.5}, "fusion=1.5"), ({"held_out": 0}, "held_out=0"), ({"learning_rate": -1}, "learning_rate=-1"),
               ({"image_size": 16}, "smaller than the stride 32"), ({"spread": 0}, "spread=0"), ({"pool_size": 2.5}, "pool_size=2.5")]
    for change, message in refused:
        with pytest.raises(ParameterError, match=message):
            Refinement(Difference(), **TINY | change)
    untrained = Refinement(Difference(), **TINY)
    for attempt in (lambda: untrained.predict([damaged()]), lambda: untrained.save("nowhere")):
        with pytest.raises(ParameterError, match="not trained yet"):
            attempt()
    assert not Path("nowhere").exists()


def test_a_loss_that_is_not_finite_is_named(monkeypatch) -> None:
    with pytest.raises(ParameterError, match=r"loss is (nan|inf) at iteration \d+; lower learning_rate=1e\+30"):
        Refinement(Difference(), **TINY | {"learning_rate": 1e30, "iterations": 20}).fit(normals())


def test_maps_are_refined_at_the_networks_size_and_enlarged(fitted: Refinement) -> None:
    sample = damaged(70)
    fitted.own["fusion"] = 1.0
    final = fitted.predict([sample]).maps[0]
    fitted.own["fusion"] = 0.1
    raw = scale_map(fitted.detector.predict([sample]).maps[0], fitted.bounds)
    small = fitted.refine(cv2.resize(sample.image, (32, 32), interpolation=cv2.INTER_AREA)[None], resize_map(raw, (32, 32))[None])[0]
    assert np.allclose(final, resize_map(small, (70, 70)), atol=1e-6)
