"""PatchCore, its parts, and the protocol around it, against obvious references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.data.datasets import read_folder
from defectbook.methods.patchcore import PLAIN, PatchCore, reweighting, top_mean
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


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.sampled_from([1.0, 300.0]))
def test_reweighting_is_equation_7(seed: int, count: int, neighbours: int, scale: float) -> None:
    """Against the formula term by term, in numbers that do not overflow; features as large as 300 would in float64."""
    from decimal import Decimal

    rng = np.random.default_rng(seed)
    bank, patches = MemoryBank(scale * rng.normal(size=(count, 5))), (scale * rng.normal(size=(3, 5))).astype(np.float32)
    neighbours = min(neighbours, count)
    matched = rng.integers(0, count, 3)
    weights = reweighting(bank, patches, matched, neighbours)
    for patch, item, weight in zip(patches, bank.features[matched], weights, strict=True):
        around = bank.features[np.argsort(np.linalg.norm(bank.features - item, axis=1), kind="stable")[:neighbours]]
        terms = [Decimal(float(np.linalg.norm(patch - other))).exp() for other in around]
        assert weight == pytest.approx(float(1 - terms[0] / sum(terms)), abs=2e-4 * scale)


def test_top_mean_counts_at_least_one_pixel() -> None:
    assert top_mean(np.arange(50.0).reshape(5, 10)) == 49
    assert top_mean(np.arange(400.0).reshape(20, 20)) == np.mean([399, 398, 397, 396])


def test_image_scores_are_what_their_names_say(mvtec_tree) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    options = {"image_size": 64, "coreset": "none", "device": "cpu", "grid": "coarsest"}
    plain = PatchCore(**options).fit(dataset.train)
    embeddings = np.concatenate([batch.embeddings for batch in plain.embeddings(dataset.test)])
    results = {}
    for rule in ("patch_max", "reweighted", "top_mean", "map_max"):
        detector = PatchCore(**options, image_score=rule, neighbours=4)
        detector.bank = plain.bank
        results[rule] = detector.predict(dataset.test)
        assert all((a == b).all() for a, b in zip(results[rule].maps, results["patch_max"].maps, strict=True))
    assert np.allclose(results["map_max"].scores, [m.max() for m in results["map_max"].maps])
    assert np.allclose(results["top_mean"].scores, [np.sort(m.ravel())[-40:].mean() for m in results["top_mean"].maps])  # 1 % of 64 x 64
    for features, largest, weighted in zip(embeddings, results["patch_max"].scores, results["reweighted"].scores, strict=True):
        distances = np.linalg.norm(features.reshape(-1, 1, 152) - plain.bank.features[None], axis=2)
        worst = distances.min(1).argmax()
        item = plain.bank.features[distances[worst].argmin()]
        around = np.argsort(np.linalg.norm(plain.bank.features - item, axis=1))[:4]
        shares = np.exp(distances[worst, around] - distances[worst, around].max())
        assert largest == pytest.approx(distances[worst].min(), rel=1e-3)
        assert weighted == pytest.approx(largest * (1 - shares[0] / shares.sum()), rel=1e-3)


def test_distances_squared_and_averaged(mvtec_tree) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    options = {"image_size": 64, "coreset": "none", "device": "cpu", "grid": "coarsest"}
    plain = PatchCore(**options).fit(dataset.train)
    embeddings = next(plain.embeddings(dataset.test)).embeddings
    rows = np.sort(np.linalg.norm(embeddings.reshape(-1, 1, 152) - plain.bank.features[None], axis=2), axis=1)
    for choices, expected in (({}, rows[:, 0]), ({"distance": "squared"}, rows[:, 0]**2), ({"nearest": 3}, rows[:, :3].mean(1)),
                              ({"distance": "squared", "nearest": 2}, (rows[:, :2]**2).mean(1))):
        detector = PatchCore(**options, **choices)
        detector.bank = plain.bank
        grids, _ = detector.compare(embeddings)
        assert np.allclose(grids.ravel(), expected, rtol=1e-3, atol=1e-2)


def test_parameters_of_a_plain_detector_are_what_they_always_were() -> None:
    """Their hash is the identity of stored runs: a choice that was added later is only named where it is made."""
    known = ["backbone", "layers", "image_size", "pool", "grid", "coreset", "ratio", "sigma", "batch_size", "seed"]
    assert list(PatchCore(device="cpu").parameters) == known
    assert list(PatchCore(device="cpu", **PLAIN).parameters) == known
    reference = PatchCore(device="cpu", variant="reference", nearest=5)
    assert {name: reference.parameters[name] for name in reference.parameters if name not in known} == {
        "pooling": "flattened", "distance": "squared", "nearest": 5}


@pytest.mark.parametrize("words, message", [
    ({"variant": "papers"}, "did you mean 'paper'"), ({"distance": "l2"}, "unknown distance 'l2'"), ({"nearest": 0}, "nearest=0 must be"),
    ({"image_score": "max"}, "unknown image_score 'max'"), ({"pooling": "flat"}, "did you mean 'flattened'")])
def test_wrong_choices_are_named(words: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        PatchCore(device="cpu", **words)


@pytest.mark.parametrize("variant", ["paper", "reference"])
def test_variants_are_saved_and_loaded(variant: str, mvtec_tree, tmp_path) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    make = lambda: PatchCore(image_size=64, variant=variant, ratio=0.3, grid="coarsest", device="cpu").fit(dataset.train)  # noqa: E731
    first, second = make(), make()
    first.save(tmp_path / "model")
    third = PatchCore.load(tmp_path / "model", device="cpu")
    assert third.choices == first.choices and third.parameters == first.parameters
    predictions = [detector.predict(dataset.test) for detector in (first, second, third)]
    for other in predictions[1:]:
        assert (predictions[0].scores == other.scores).all()
        assert all((a == b).all() for a, b in zip(predictions[0].maps, other.maps, strict=True))


def test_fewer_patches_than_neighbours_are_refused(mvtec_tree) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    with pytest.raises(ParameterError, match="9 neighbours, but 1 normal images leave a bank of 1 patches"):
        PatchCore(image_size=64, variant="paper", grid="coarsest", ratio=0.1, device="cpu").fit(dataset.train[:1])
    with pytest.raises(ParameterError, match="4 neighbours, but 1 normal images leave a bank of 1 patches"):
        PatchCore(image_size=64, nearest=4, grid="coarsest", ratio=0.1, device="cpu").fit(dataset.train[:1])


def test_a_defective_or_a_missing_sample_is_refused(mvtec_tree) -> None:
    dataset = read_folder(mvtec_tree, "plate")
    detector = PatchCore(image_size=64, device="cpu")
    with pytest.raises(DataError, match="no normal images to fit"):
        detector.fit([])
    with pytest.raises(DataError, match="label 1 among the normal images to fit .2 such."):
        detector.fit(dataset.test)
    assert detector.bank is None


def counted(monkeypatch, fail_at: int | None = None) -> list[int]:
    """The number of images in every call of the backbone; the call number `fail_at` is interrupted."""
    calls, forward = [], Backbone.forward

    def spy(self, images):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", spy)
    return calls


@pytest.mark.parametrize("coreset", ["none", "random", "greedy"])
def test_an_interrupted_fit_goes_on_and_ends_the_same(coreset: str, mvtec_tree, tmp_path, monkeypatch) -> None:
    train = read_folder(mvtec_tree, "plate", validation=0).train
    make = lambda: PatchCore(image_size=64, coreset=coreset, ratio=0.5, batch_size=2, device="cpu")  # noqa: E731
    whole = make().fit(train)
    with monkeypatch.context() as patched:
        counted(patched, fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            make().fit(train, tmp_path / "unfinished")
    assert len(list((tmp_path / "unfinished" / "patchcore").glob("batch*.npy"))) == 2
    with monkeypatch.context() as patched:
        calls = counted(patched)
        resumed = make().fit(train, tmp_path / "unfinished")
        assert calls == [1, 2]  # the first image once more, to know it again, and the batch that was missing
    assert (resumed.bank.features == whole.bank.features).all()
    assert not (tmp_path / "unfinished" / "patchcore").exists()


def test_a_fit_interrupted_in_the_coreset_goes_on(mvtec_tree, tmp_path, monkeypatch) -> None:
    from defectbook.models import coreset

    train = read_folder(mvtec_tree, "plate", validation=0).train
    make = lambda: PatchCore(image_size=64, ratio=0.5, device="cpu")  # noqa: E731
    whole = make().fit(train)

    def pulled(items, *words, **named):
        for number, item in enumerate(items):
            if number == 7:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patched:
        patched.setattr(coreset, "progress", pulled)
        with pytest.raises(KeyboardInterrupt):
            make().fit(train, tmp_path)
    import json

    kept = json.loads((tmp_path / "patchcore" / "coreset.json").read_text())["chosen"]
    assert 7 <= len(kept) < 20
    resumed = make().fit(train, tmp_path)
    assert (resumed.bank.features == whole.bank.features).all()


def test_a_checkpoint_of_others_is_refused(mvtec_tree, tmp_path, monkeypatch) -> None:
    train = read_folder(mvtec_tree, "plate", validation=0).train
    options = {"image_size": 64, "coreset": "none", "batch_size": 2, "device": "cpu"}
    with monkeypatch.context() as patched:
        counted(patched, fail_at=1)
        with pytest.raises(KeyboardInterrupt):
            PatchCore(**options).fit(train, tmp_path)
    with pytest.raises(DataError, match="keeps a fit with other pool; give another folder"):
        PatchCore(**options, pool=5).fit(train, tmp_path)
    with pytest.raises(DataError, match="keeps a fit with other images"):
        PatchCore(**options).fit(train[1:], tmp_path)
    other = [Sample(255 - sample.image, name=sample.name) for sample in train]
    with pytest.raises(DataError, match="keeps features of another image than"):
        PatchCore(**options).fit(other, tmp_path)
    assert PatchCore(**options, image_score="map_max").fit(train, tmp_path).bank is not None  # the features are the same


@pytest.mark.slow
def test_a_killed_fit_goes_on(mvtec_tree, tmp_path) -> None:
    """A process of its own, killed by the system's SIGKILL as soon as two batches are on disk."""
    import subprocess
    import sys
    import time

    from conftest import ROOT

    code = f"""
import time
from defectbook.data.datasets import read_folder
from defectbook.methods.patchcore import PatchCore
from defectbook.models.features import Backbone
forward = Backbone.forward
Backbone.forward = lambda self, images: (time.sleep(0.5), forward(self, images))[1]
train = read_folder({str(mvtec_tree)!r}, "plate", validation=0).train
PatchCore(image_size=64, ratio=0.5, batch_size=1, device="cpu").fit(train, {str(tmp_path / "unfinished")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 120
    while len(list((tmp_path / "unfinished" / "patchcore").glob("batch*.npy"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 2 <= len(list((tmp_path / "unfinished" / "patchcore").glob("batch*.npy"))) < 6
    train = read_folder(mvtec_tree, "plate", validation=0).train
    make = lambda: PatchCore(image_size=64, ratio=0.5, batch_size=1, device="cpu")  # noqa: E731
    assert (make().fit(train, tmp_path / "unfinished").bank.features == make().fit(train).bank.features).all()


def test_predict_before_fit_says_so() -> None:
    with pytest.raises(ParameterError, match="call fit"):
        PatchCore(image_size=64, device="cpu").predict([])
