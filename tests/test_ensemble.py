"""The ensemble: one scale from normal images held out, never from the images that are judged."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Prediction, Sample, WeightsError
from defectbook.data.datasets import read_folder
from defectbook.methods.ensemble import Ensemble, Scale, average, scale_of
from defectbook.methods.patchcore import PatchCore


class Brightness:
    """A detector that can be worked out by hand: the map is gain * |grey - mean of the training images|, the score its largest value."""

    version = "1"

    def __init__(self, gain: float = 1.0, offset: float = 0.0):
        self.parameters = {"gain": gain, "offset": offset}
        self.names: list[str] = []
        self.mean: float | None = None

    def fit(self, samples):
        self.names = [sample.name for sample in samples]
        self.mean = float(np.mean([sample.image.mean() for sample in samples]))
        return self

    def predict(self, samples):
        gain, offset = self.parameters["gain"], self.parameters["offset"]
        maps = [(gain * np.abs(sample.image[..., 0] - self.mean) + offset).astype(np.float32) for sample in samples]
        return Prediction(maps, np.array([m.max() for m in maps]))

    def save(self, folder):
        folder.mkdir()
        (folder / "all.json").write_text(json.dumps([self.parameters, self.mean]))

    @classmethod
    def load(cls, folder):
        parameters, mean = json.loads((folder / "all.json").read_text())
        detector = cls(**parameters)
        detector.mean = mean
        return detector


def images(count: int, seed: int = 0, label: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    # Each image has a brightest value of its own: grey values of one range would often give twelve images the same score.
    tops = rng.permutation(np.arange(100, 100 + count)) + 60 * label
    return [Sample(np.maximum(rng.integers(80, top, (6, 7, 3), np.uint8), (np.arange(42) == 0).reshape(6, 7, 1) * np.uint8(top)), None, label,
                   f"{seed}-{i}") for i, top in enumerate(tops)]


def test_the_scale_is_that_of_images_no_member_has_seen() -> None:
    samples = images(20)
    members = [Brightness(), Brightness(5.0, 7.0)]
    ensemble = Ensemble(members, held_out=0.3, seed=4).fit(samples)
    assert members[0].names == members[1].names and len(members[0].names) == 14
    held_out = [sample for sample in samples if sample.name not in members[0].names]
    for member, scale in zip(members, ensemble.scales, strict=True):
        prediction = member.predict(held_out)
        pixels = np.concatenate([m.ravel() for m in prediction.maps]).astype(np.float64)
        assert np.allclose(scale, (pixels.mean(), pixels.std(), prediction.scores.mean(), prediction.scores.std()))
    standardised = list(ensemble.opinions(held_out))
    assert all(np.allclose(np.mean([m.mean() for m in o.maps]), 0, atol=1e-5) and np.isclose(o.scores.std(), 1) for o in standardised)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1000), st.floats(-100, 100), st.integers(0, 1000))
def test_a_members_unit_does_not_matter(gain: float, offset: float, seed: int) -> None:
    samples, tests = images(24, seed), images(3, seed + 1, label=1)
    one = Ensemble([Brightness(), Brightness()], 0.5, seed).fit(samples).predict(tests)
    other = Ensemble([Brightness(), Brightness(gain, offset)], 0.5, seed).fit(samples).predict(tests)
    spread = 1e-3 * (1 + abs(offset) / gain)  # float32 maps lose what a large offset leaves of them
    assert np.allclose(one.scores, other.scores, atol=spread)
    assert all(np.allclose(a, b, atol=spread) for a, b in zip(one.maps, other.maps, strict=True))


def test_an_image_alone_is_judged_as_among_others(mvtec_tree) -> None:
    """Maps and scores hold nothing of the images that are predicted with them: no statistics of the test set."""
    dataset = read_folder(mvtec_tree, "plate", validation=0)
    options = {"image_size": 64, "coreset": "none", "grid": "coarsest", "batch_size": 1, "device": "cpu"}
    ensemble = Ensemble([PatchCore(**options), PatchCore(**options, pool=1, distance="squared")], held_out=0.34).fit(dataset.train)
    together = ensemble.predict(dataset.test)
    defects_only = ensemble.predict([sample for sample in dataset.test if sample.label])
    for number, sample in enumerate(dataset.test):
        alone = ensemble.predict([sample])
        assert (alone.maps[0] == together.maps[number]).all() and alone.scores[0] == together.scores[number]
    labels = np.array([sample.label for sample in dataset.test])
    assert (defects_only.scores == together.scores[labels > 0]).all()
    assert together.scores[labels > 0].min() > together.scores[labels == 0].max()


def test_predict_is_the_plain_mean_and_keeps_sizes() -> None:
    samples = images(10)
    ensemble = Ensemble([Brightness(), Brightness(2.0), Brightness(3.0, 1.0)]).fit(samples)
    tests = [*images(2, 9, label=1), Sample(np.full((4, 9, 3), 200, np.uint8), None, 1, "wide")]
    opinions, result = list(ensemble.opinions(tests)), ensemble.predict(tests)
    assert [m.shape for m in result.maps] == [(6, 7), (6, 7), (4, 9)] and all(m.dtype == np.float32 for m in result.maps)
    assert all(np.allclose(m, np.mean([o.maps[i] for o in opinions], axis=0), atol=1e-6) for i, m in enumerate(result.maps))
    assert np.allclose(result.scores, np.mean([o.scores for o in opinions], axis=0))


def test_saved_loaded_and_fitted_again_agree_to_the_bit(mvtec_tree, tmp_path) -> None:
    dataset = read_folder(mvtec_tree, "plate", validation=0)
    options = {"image_size": 64, "coreset": "random", "ratio": 0.5, "grid": "coarsest", "device": "cpu"}
    make = lambda: Ensemble([PatchCore("efficientnet_lite0", **options), PatchCore("efficientnet_lite1", **options)], 0.34, 3)  # noqa: E731
    first, second = make().fit(dataset.train), make().fit(dataset.train)
    first.save(tmp_path / "model")
    third = Ensemble.load(tmp_path / "model", {"PatchCore": PatchCore}, device="cpu")
    assert third.parameters == first.parameters and third.scales == first.scales
    json.dumps(first.parameters)
    predictions = [ensemble.predict(dataset.test) for ensemble in (first, second, third)]
    for other in predictions[1:]:
        assert (predictions[0].scores == other.scores).all()
        assert all((a == b).all() for a, b in zip(predictions[0].maps, other.maps, strict=True))
    with pytest.raises(ParameterError, match="exists already"):
        first.save(tmp_path / "model")
    with pytest.raises(ParameterError, match="unknown member class 'PatchCore'"):
        Ensemble.load(tmp_path / "model", {"Brightness": Brightness})
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="not a saved ensemble"):
        Ensemble.load(tmp_path / "model", {"PatchCore": PatchCore})


def test_members_of_several_kinds_are_loaded_by_name(tmp_path) -> None:
    class Darkness(Brightness):
        pass

    ensemble = Ensemble([Brightness(2.0), Darkness(3.0)]).fit(images(10))
    ensemble.save(tmp_path / "model")
    loaded = Ensemble.load(tmp_path / "model", {"Brightness": Brightness, "Darkness": Darkness})
    assert [type(member) for member in loaded.detectors] == [Brightness, Darkness]
    assert (loaded.predict(images(3, 5)).scores == ensemble.predict(images(3, 5)).scores).all()


def test_nonsense_is_refused(tmp_path) -> None:
    with pytest.raises(ParameterError, match="ensemble of no detectors"):
        Ensemble([])
    with pytest.raises(ParameterError, match="held_out=1.0 must lie between 0 and 1"):
        Ensemble([Brightness()], held_out=1.0)
    with pytest.raises(ParameterError, match="not fitted; call fit"):
        Ensemble([Brightness()]).predict(images(1))
    with pytest.raises(ParameterError, match="nothing to save"):
        Ensemble([Brightness()]).save(tmp_path / "model")
    with pytest.raises(DataError, match="2 normal images, 2 of them held out, leave none to fit"):
        Ensemble([Brightness()]).fit(images(2))
    with pytest.raises(DataError, match="label 1 among the normal images"):
        Ensemble([Brightness()]).fit([*images(8), *images(1, 3, label=1)])
    with pytest.raises(DataError, match="member 1, Brightness: maps or scores .* do not vary"):
        Ensemble([Brightness(), Brightness(0.0, 5.0)]).fit(images(8))
    with pytest.raises(ParameterError, match="average of no predictions"):
        average([])
    with pytest.raises(DataError, match="image 0: maps of"):
        average([Prediction([np.zeros((2, 3))], np.zeros(1)), Prediction([np.zeros((3, 3))], np.zeros(1))])


def test_scale_of_maps_of_several_sizes_counts_pixels() -> None:
    maps = [np.zeros((2, 2), np.float32), np.full((1, 12), 4, np.float32)]
    assert scale_of(Prediction(maps, np.array([0.0, 2.0]))) == Scale(3.0, np.sqrt(3.0), 1.0, 1.0)
