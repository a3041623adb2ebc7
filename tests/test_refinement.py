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

from defectbook.core import DataError, ParameterError, Prediction, Sample, WeightsError, normal_range, resize_image, resize_map
from defectbook.data.sources import find_weights
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.refinement import FusedStem, Refinement, RefinementNetwork, augment, make_pairs, scale_maps
from defectbook.models.features import read_state


class Difference:
    """A detector for tests: the blurred distance from the mean of the normal images."""

    version = "1"

    def __init__(self, blur: float = 3.0):
        self.parameters, self.mean, self.fitted_on = {"blur": blur}, None, []

    @property
    def is_fitted(self) -> bool:
        return self.mean is not None

    def fit(self, samples, checkpoint=None):
        self.mean = np.mean([s.image for s in samples], axis=0)
        self.fitted_on = [s.name for s in samples]
        return self

    def predict(self, samples):
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


TINY = {"backbone": "test_efficientnet", "weights": "none", "image_size": 64, "iterations": 6, "round_length": 2, "batch_size": 2,
        "pool_size": 8, "renew": False, "width": 4, "held_out": 0.2, "learning_rate": 1e-3, "device": "cpu"}


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
def test_output_has_the_size_of_the_image(backbone: str) -> None:
    network = RefinementNetwork(backbone, width=4, weights="none").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)).shape == (1, 1, 64, 96)


def test_fusion_is_one_convolution_on_four_channels() -> None:
    stem = RefinementNetwork("efficientnet_lite0", 4).encoder.conv_stem
    assert isinstance(stem, FusedStem)
    x = torch.randn(2, 4, 20, 20)
    padded = F.pad(x, (0, 1, 0, 1))  # this network pads like TensorFlow: below and to the right
    assert torch.allclose(stem(x), F.conv2d(padded, torch.cat([stem.image.weight, stem.map.weight], 1), None, 2), atol=1e-5)
    pretrained = next(iter(read_state(find_weights("efficientnet_lite0")).values()))
    assert torch.equal(stem.image.weight, pretrained)


def test_map_and_image_both_matter_and_every_parameter_learns() -> None:
    network = RefinementNetwork("test_efficientnet", 4, "none").train()
    image, maps = torch.rand(2, 3, 64, 64) * 255, torch.rand(2, 1, 64, 64)
    output = network(image, maps)
    assert not torch.allclose(output, network(image, 1 - maps)) and not torch.allclose(output, network(255 - image, maps))
    output.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_construction_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (Refinement(Difference(), **TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert weights_of(first) == weights_of(second) != weights_of(other)


def test_backbones_that_cannot_be_had(tmp_path) -> None:
    for name in ("densenet_161", "resnet18"):  # the second is timm's, but its weights are not known
        with pytest.raises(ParameterError, match=f"unknown backbone '{name}'.*any name of timm with weights='none'"):
            RefinementNetwork(name)
    with pytest.raises(WeightsError, match="no such weights file"):
        RefinementNetwork("efficientnet_lite0", weights=tmp_path / "absent.pth")
    (tmp_path / "other.pth").write_bytes(b"something else")
    with pytest.raises(WeightsError, match="sha256"):
        RefinementNetwork("efficientnet_lite0", weights=tmp_path / "other.pth")


# What it learns from

def test_scaled_maps_are_not_clipped() -> None:
    scaled = scale_maps(np.array([[2.0, 4.0], [6.0, 0.0]]), (2.0, 4.0))
    assert scaled.dtype == np.float32 and scaled.tolist() == [[0, 1], [2, -1]]
    assert scale_maps(5.0, (2.0, 4.0)) == 1.5


def test_augmentation_moves_all_three_together() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:26] = 1
    truths = torch.from_numpy(mask)[None, None].repeat(16, 1, 1, 1)
    images, maps = (200 * truths).float().repeat(1, 3, 1, 1), truths.float()
    i, a, m = augment(images, maps, truths, np.random.default_rng(0), degrees=30, colour=0)
    assert set(m.unique().tolist()) <= {0, 1} and m.shape == truths.shape
    assert (a - m).abs().mean() < 0.02 and (i[:, :1] / 200 - m).abs().mean() < 0.02
    flipped = m[:, 0, 30, 45] > 0
    assert flipped.any() and not flipped.all()
    i, a, m = augment(images + 40, maps, truths, np.random.default_rng(0), degrees=0, colour=0.1)
    assert torch.allclose(a, m.float(), atol=1e-4) and i.min() >= 0 and i.max() <= 255
    assert (i - (40 + 200 * m)).abs().amax((1, 2, 3)).min() > 1  # every image's colours have changed
    ratio = i[:, 0] / i[:, 1]
    assert ratio.std() > 0.01  # and not all channels alike


def test_pairs_are_equal_parts_of_four_kinds() -> None:
    samples = normals(4)
    detector = Difference().fit(samples)
    pairs = make_pairs(detector, samples, 8, 64, seed=3)
    assert pairs["images"].shape == (8, 64, 64, 3) and pairs["truths"].any((1, 2)).all()
    again, later = (make_pairs(detector, samples, 8, 64, 3, epoch) for epoch in (0, 1))
    assert all((pairs[key] == again[key]).all() for key in pairs) and (pairs["images"] != later["images"]).any()
    assert np.allclose(pairs["maps"][5], detector.predict([Sample(pairs["images"][5])]).maps[0])


# Training

@pytest.mark.parametrize("loss", ["regression", "regression_norm", "ce", "bce", "focal", "soft_dice"])
def test_each_loss_trains_and_predicts(loss: str) -> None:
    refinement = Refinement(Difference(), **TINY | {"loss": loss, "fusion": 1.0}).fit(normals())
    assert len(refinement.history) == 3 and all(np.isfinite([p["train"], p["held_out"]]).all() for p in refinement.history)
    (anomaly_map,) = refinement.predict([damaged()]).maps
    assert anomaly_map.min() >= 0 and anomaly_map.max() <= 1 and np.ptp(anomaly_map) > 0


def test_training_lowers_the_loss_on_defects_drawn_on_held_out_images() -> None:
    """The images are one texture and a little noise, so that the detector's map says something about the defect; where all images
    differ, as in `normals`, there is nothing to learn."""
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(90, 160, (8, 8)), np.ones((8, 8), int))[..., None]
    alike = [Sample((texture + rng.normal(0, 4, (64, 64, 3))).astype(np.uint8), None, 0, f"alike{i}") for i in range(10)]
    # Four channels before the last layer may all speak against a defect from the start, and a pool of forty holds out four pairs only.
    options = TINY | {"iterations": 80, "round_length": 10, "batch_size": 4, "pool_size": 80, "width": 8, "learning_rate": 5e-3, "loss": "bce"}
    curve = [point["held_out"] for point in Refinement(Difference(blur=1.0), **options).fit(alike).history]
    assert len(curve) == 8 and min(curve) < 0.75 * curve[0]


def test_two_fits_agree_to_the_bit() -> None:
    first, second, other = (Refinement(Difference(), **TINY | {"seed": seed}).fit(normals()) for seed in (0, 0, 1))
    assert weights_of(first) == weights_of(second) != weights_of(other)
    assert weights_of(first.fit(normals())) == weights_of(second)  # from the first weights, not from where the last fit ended
    a, b = (r.predict([damaged()]) for r in (first, second))
    assert (a.maps[0] == b.maps[0]).all() and (a.scores == b.scores).all()


def test_a_detector_is_fitted_on_the_rest_and_scaled_by_what_is_held_out() -> None:
    samples, detector = normals(), Difference()
    refinement = Refinement(detector, **TINY).fit(samples)
    held = [s for s in samples if s.name not in detector.fitted_on]
    assert len(held) == 2 and len(detector.fitted_on) == 8
    assert refinement.bounds == normal_range(detector.predict(held).maps)


def test_a_fitted_detector_and_given_validation_images_are_used_as_they_are() -> None:
    detector = Difference().fit(normals(3))
    mean, validation = detector.mean.copy(), normals(14)[10:]
    refinement = Refinement(detector, **TINY).fit(normals(), validation)
    assert (detector.mean == mean).all() and refinement.bounds == normal_range(detector.predict(validation).maps)


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch) -> None:
    options = TINY | {"renew": True}
    expected = Refinement(Difference(), **options).fit(normals())
    played, rounds = Refinement._round, []

    def dies(self, training, *rest):
        if training.rounds == 2:
            raise KeyboardInterrupt
        return played(self, training, *rest)

    monkeypatch.setattr(Refinement, "_round", dies)
    with pytest.raises(KeyboardInterrupt):
        Refinement(Difference(), **options).fit(normals(), checkpoint=tmp_path / "work")
    monkeypatch.setattr(Refinement, "_round", lambda self, training, *rest: rounds.append(training.rounds) or played(self, training, *rest))
    resumed = Refinement(Difference(), **options).fit(normals(), checkpoint=tmp_path / "work")
    assert rounds == [2] and weights_of(resumed) == weights_of(expected) and resumed.history == expected.history


def test_checkpoints_of_other_runs_and_broken_ones_are_refused(tmp_path) -> None:
    Refinement(Difference(), **TINY).fit(normals(), checkpoint=tmp_path)
    for changed, samples in (({"learning_rate": 2e-3}, normals()), ({"loss": "ce"}, normals()), ({}, normals(11))):
        with pytest.raises(WeightsError, match="training of other data or parameters"):
            Refinement(Difference(), **TINY | changed).fit(samples, checkpoint=tmp_path)
    (path,) = (tmp_path / "refinement").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(WeightsError, match="damaged"):
        Refinement(Difference(), **TINY).fit(normals(), checkpoint=tmp_path)


CHILD = """
import sys
from test_refinement import TINY, Difference, normals, weights_of
from defectbook.methods.refinement import Refinement
import hashlib
options = TINY | {"iterations": int(sys.argv[2]), "round_length": 10}
refinement = Refinement(Difference(), **options).fit(normals(), checkpoint=sys.argv[1] or None)
print(hashlib.sha256(weights_of(refinement)).hexdigest())
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", CHILD, folder, "200"], env=environment, stdout=subprocess.PIPE, text=True)

    expected = start("").communicate()[0]
    child, path = start(str(tmp_path / "work")), tmp_path / "work" / "refinement" / "training.json"
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
    raw = [scale_maps(m, fitted.bounds) for m in fitted.detector.predict(samples).maps]
    maps = {share: fitted.with_fusion(share).predict(samples).maps for share in (0.0, 0.1, 1.0)}
    assert raw[0].max() > 1.5  # the worst is not clipped
    for i, sample in enumerate(samples):
        assert maps[0.1][i].shape == sample.image.shape[:2] and maps[0.1][i].dtype == np.float32
        assert np.allclose(maps[0.0][i], raw[i]) and maps[1.0][i].min() >= 0 and maps[1.0][i].max() <= 1
        assert np.allclose(maps[0.1][i], 0.9 * raw[i] + 0.1 * maps[1.0][i], atol=1e-5)


def test_maps_are_refined_at_the_networks_size_and_enlarged(fitted: Refinement) -> None:
    sample = damaged(100)
    raw = scale_maps(fitted.detector.predict([sample]).maps[0], fitted.bounds)
    small = fitted.refine(resize_image(sample.image, (64, 64))[None], resize_map(raw, (64, 64))[None])[0]
    assert np.allclose(fitted.with_fusion(1.0).predict([sample]).maps[0], resize_map(small, (100, 100)), atol=1e-6)


def test_a_map_does_not_depend_on_its_neighbours(fitted: Refinement) -> None:
    together, alone = fitted.predict([*normals(3), damaged()]), fitted.predict([damaged()])
    assert np.allclose(together.maps[-1], alone.maps[0], atol=1e-5)


def test_image_scores_by_name(fitted: Refinement) -> None:
    samples = [damaged(), *normals(2)]
    coarse, redrawn = fitted.detector.predict(samples).scores, [m.max() for m in fitted.with_fusion(1.0).predict(samples).maps]
    scaled = (coarse - fitted.bounds[0]) / (fitted.bounds[1] - fitted.bounds[0])
    scores = {}
    for name in ("fused", "detector", "map_max"):
        fitted.own["image_score"] = name
        prediction = fitted.predict(samples)
        scores[name] = prediction.scores
    fitted.own["image_score"] = "fused"
    assert np.allclose(scores["detector"], scaled) and np.allclose(scores["map_max"], [m.max() for m in prediction.maps])
    assert np.all(scores["fused"] >= 0.9 * scaled + 0.1 * np.array(redrawn) - 1e-5)  # enlarging may lower a maximum


def test_saved_and_loaded(fitted: Refinement, tmp_path) -> None:
    fitted.save(tmp_path / "model")
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".pkl", ".pt", ".pth")]
    loaded = Refinement.load(tmp_path / "model", {"Difference": Difference}, device="cpu")
    a, b = fitted.predict([damaged()]), loaded.predict([damaged()])
    assert (a.maps[0] == b.maps[0]).all() and (a.scores == b.scores).all()
    assert loaded.bounds == fitted.bounds and loaded.history == fitted.history and loaded.own == fitted.own
    json.dumps(loaded.parameters)
    with pytest.raises(ParameterError, match="a loaded refinement is not trained anew"):
        loaded.fit(normals())
    with pytest.raises(ParameterError, match="exists already"):
        fitted.save(tmp_path / "model")
    with pytest.raises(ParameterError, match="unknown detector class 'Difference'"):
        Refinement.load(tmp_path / "model", {"PatchCore": PatchCore}, device="cpu")
    (tmp_path / "model" / "network.safetensors").write_bytes(b"short")
    with pytest.raises(WeightsError, match="not a saved refinement"):
        Refinement.load(tmp_path / "model", {"Difference": Difference}, device="cpu")


def test_around_patchcore(tmp_path) -> None:
    detector = PatchCore(image_size=64, coreset="none", device="cpu")
    refinement = Refinement(detector, **TINY | {"iterations": 2}).fit(normals(6, 64), checkpoint=tmp_path / "work")
    refinement.save(tmp_path / "model")
    loaded = Refinement.load(tmp_path / "model", {"PatchCore": PatchCore}, device="cpu")
    samples = [damaged(64), *normals(1, 64)]
    assert isinstance(loaded.detector, PatchCore) and refinement.parameters["detector"]["method"] == "PatchCore"
    assert (loaded.predict(samples).maps[0] == refinement.predict(samples).maps[0]).all()
    assert loaded.predict(samples).scores[0] > loaded.predict(samples).scores[1]


# Bad input

def test_bad_input_is_named(fitted: Refinement, monkeypatch) -> None:
    image, anomaly_map = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 64, 64), np.float32)
    fitted.refine(image, anomaly_map)
    for images, maps in ((image, np.zeros((1, 40, 48), np.float32)), (np.zeros((1, 32, 32, 3), np.uint8), anomaly_map)):
        sizes = f"images of {images.shape[2]}x{images.shape[1]} px and maps of {maps.shape[2]}x{maps.shape[1]} px.*trained on 64x64 px"
        with pytest.raises(DataError, match=sizes):
            fitted.refine(images, maps)
    with pytest.raises(DataError, match="not finite"):
        fitted.refine(image, anomaly_map + np.nan)
    with pytest.raises(DataError, match="normal0: label 2 among"):
        fitted.fit([Sample(noise(0), None, 2, "normal0"), *normals()])
    with pytest.raises(DataError, match="no normal images"):
        fitted.fit([])
    with pytest.raises(DataError, match="leave none to fit"):
        fitted.fit(normals(1))
    monkeypatch.setattr(Difference, "predict", lambda self, samples: Prediction([np.zeros((8, 8), np.float32)], np.zeros(1)))
    with pytest.raises(DataError, match="damaged: a map of 8x8 px for an image of 48x48 px"):
        fitted.predict([damaged()])


def test_bad_options_are_named() -> None:
    refused = [({"loss": "regresion"}, "did you mean 'regression'"), ({"loss": "weighted_ce"}, "needs weights"),
               ({"image_score": "max"}, "unknown image_score"), ({"iterations": 0}, "iterations=0"), ({"fusion": 1.5}, "fusion=1.5"),
               ({"held_out": 0}, "held_out=0"), ({"image_size": 80}, "image_size=80"), ({"pool_size": 0}, "pool_size=0")]
    for change, message in refused:
        with pytest.raises(ParameterError, match=message):
            Refinement(Difference(), **TINY | change)
    untrained = Refinement(Difference(), **TINY)
    for attempt in (lambda: untrained.predict([damaged()]), lambda: untrained.save("nowhere")):
        with pytest.raises(ParameterError, match="is not fitted"):
            attempt()
    assert not Path("nowhere").exists()


def test_a_loss_that_is_not_finite_is_named() -> None:
    with pytest.raises(DataError, match=r"round \d+: the loss .* is (nan|inf); lower the learning rate"):
        Refinement(Difference(), **TINY | {"learning_rate": 1e30, "iterations": 20}).fit(normals())


def test_the_best_round_is_kept() -> None:
    refinement = Refinement(Difference(), **TINY | {"iterations": 8, "learning_rate": 0.3}).fit(normals())
    losses = [point["held_out"] for point in refinement.history]
    best = int(np.argmin(losses))
    short = Refinement(Difference(), **TINY | {"iterations": 2 * (best + 1), "learning_rate": 0.3}).fit(normals())
    assert weights_of(refinement) == weights_of(short)
