"""Priors of every kind: fitted, restored, refused; and the detector that takes any object as one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise
from safetensors.numpy import load_file, save_file

from defectbook.core import DataError, ParameterError, Sample, WeightsError, resize_map
from defectbook.methods.paedid import PAEDID
from defectbook.methods.reconstruction import Reconstruction
from defectbook.models import autoencoder
from defectbook.models.autoencoder import to_tensor
from defectbook.models.decomposition import SsimLoss, ssim
from defectbook.models.detectors import read_working
from defectbook.models.positions import PositionMemory
from defectbook.models.priors import LOSSES, PRIORS, AutoencoderPrior, MemAEPrior, PatchPrior, PriorDetector, ssim_loss

TINY = {"encoder": (4, 6), "epochs": 3, "batch_size": 4, "device": "cpu"}
OWN = {"squared": (AutoencoderPrior, {}), "ssim": (AutoencoderPrior, {"loss": "ssim"}), "nearest": (AutoencoderPrior, {"decoder": "nearest"}),
       "memae": (MemAEPrior, {"items": 12}), "pae": (PatchPrior, {"alpha": 0.1}), "pae on a disk": (PatchPrior, {"limit_mb": 0})}


class Difference(PriorDetector):
    def compare(self, images: np.ndarray, priors: np.ndarray) -> np.ndarray:
        residual = np.abs(images - priors)
        return residual if residual.ndim == 3 else residual.mean(axis=-1)


def samples_of(count: int = 10, sizes: tuple[tuple[int, int], ...] = ((32, 32),)) -> list[Sample]:
    return [Sample(noise(i, sizes[i % len(sizes)]), None, 0, f"normal{i}") for i in range(count)]


def working(channels: str = "grey", count: int = 10, side: int = 16) -> np.ndarray:
    return read_working(samples_of(count), side, channels).images


def make(kind: str, **changes):
    prior, own = OWN[kind]
    return prior(**TINY | own | changes)


@pytest.fixture(scope="module")
def fitted() -> dict:
    """Every kind of prior, fitted once on grey images."""
    return {kind: make(kind).fit(working()) for kind in OWN}


def same(one, other) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one.maps, other.maps, strict=True)) and (one.scores == other.scores).all()


# Each kind

@pytest.mark.parametrize("kind", OWN)
def test_every_kind_fits_and_reconstructs(fitted: dict, kind: str) -> None:
    prior, images = fitted[kind], working()
    assert not make(kind).is_fitted and prior.is_fitted and len(prior.history) == 3
    rebuilt = prior.reconstruct(images)
    assert rebuilt.shape == images.shape and rebuilt.dtype == np.float32 and rebuilt.min() >= 0 and rebuilt.max() <= 1
    assert prior.reconstruct(images).tobytes() == rebuilt.tobytes()
    unseen = working(count=14)[10:]
    np.testing.assert_allclose(np.concatenate([prior.reconstruct(unseen[i:i + 1]) for i in range(4)]), prior.reconstruct(unseen), atol=1e-5)
    assert prior.reconstruct(images[:0]).shape == (0, 16, 16)
    json.dumps(prior.parameters)


@pytest.mark.parametrize("kind", OWN)
def test_every_kind_takes_colours(kind: str) -> None:
    images = working("rgb", 5)
    prior = make(kind, epochs=1).fit(images)
    assert prior.reconstruct(images).shape == images.shape and prior.reconstruct(images[:0]).shape == (0, 16, 16, 3)


@pytest.mark.parametrize("kind", OWN)
def test_two_fits_agree_to_the_bit(fitted: dict, kind: str) -> None:
    again, other = make(kind).fit(working()), make(kind, seed=1).fit(working())
    first = fitted[kind].tensors()
    assert again.history == fitted[kind].history and again.tensors().keys() == first.keys()
    assert all(again.tensors()[name].tobytes() == value.tobytes() for name, value in first.items())
    assert any(other.tensors()[name].tobytes() != value.tobytes() for name, value in first.items())


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_images_have_a_prior(fitted: dict, kind: str, value: float) -> None:
    constant = np.full((3, 16, 16), value, np.float32)
    assert np.isfinite(fitted[kind].reconstruct(constant)).all()
    learned = make(kind, epochs=1).fit(constant)
    assert np.isfinite(learned.reconstruct(working())).all() and np.isfinite(learned.reconstruct(constant)).all()


@pytest.mark.parametrize("kind", OWN)
def test_images_it_was_not_made_for_are_refused_in_one_line(fitted: dict, kind: str) -> None:
    """Without a check: colours end in torch, and a side of 18 px comes back with 16."""
    name = type(fitted[kind]).__name__
    cases = [(working("rgb", 2), DataError, f"images of 3 channels asked of a {name} that learned from 1"),
             (np.zeros((2, 18, 18), np.float32), ParameterError, "side=18 px cannot be halved 2 times"),
             (np.zeros((2, 16, 20), np.float32), DataError, "give squares"), (np.zeros((16, 16), np.float32), DataError, "give squares"),
             (np.zeros((2, 16, 16, 1), np.float32), DataError, "give squares")]
    for images, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            fitted[kind].reconstruct(images)
        assert "\n" not in str(caught.value)
    for images, error, message in cases[1:]:
        with pytest.raises(error, match=message):
            make(kind).fit(images)


def test_colours_learned_and_grey_asked() -> None:
    prior = make("pae", epochs=1).fit(working("rgb", 4))
    with pytest.raises(DataError, match="images of 1 channels asked of a PatchPrior that learned from 3"):
        prior.reconstruct(working(count=2))
    assert make("squared").fit(working(count=4)).fit(working("rgb", 4)).reconstruct(working("rgb", 2)).shape == (2, 16, 16, 3)  # another fit may


def test_bad_options_are_named_before_anything_is_read() -> None:
    refused = [("squared", {"encoder": "cels"}, "unknown encoder 'cels': did you mean 'cells'"), ("squared", {"encoder": ()}, "widths="),
               ("squared", {"loss": "ssmi"}, "did you mean 'ssim'"), ("squared", {"decoder": "near"}, "unknown decoder"),
               ("memae", {"items": 0}, "items=0"), ("memae", {"shrink": 1.5}, "shrink=1.5"), ("memae", {"loss": "ssim"}, "MemAE has its own loss"),
               ("pae", {"alpha": 0}, "alpha=0"), ("pae", {"alpha": 1.5}, "alpha=1.5"), ("pae", {"seed": -1}, "seed -1"),
               ("pae", {"device": "gpu"}, "device 'gpu'")]
    for kind, change, message in refused:
        with pytest.raises(ParameterError, match=message):
            make(kind, **change)
    for kind in OWN:
        with pytest.raises(ParameterError, match="is not fitted"):
            make(kind).reconstruct(working(count=2))
        with pytest.raises(DataError, match="at least two"):
            make(kind).fit(working(count=1))
        with pytest.raises(DataError, match="the loss .* is nan"):
            make(kind).fit(working() * np.nan)


# Losses

@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_ssim_loss_is_one_minus_ssim(channels: str) -> None:
    images, others = working(channels, 3, 32), working(channels, 6, 32)[3:]

    class Others(torch.nn.Module):
        def forward(self, _):
            return to_tensor(others)

    expected = np.mean(1 - ssim(others, images, border="reflect"))
    value = ssim_loss(Others(), to_tensor(images))
    assert value.ndim == 0 and float(value) == pytest.approx(expected, abs=1e-5) and 0.05 < expected < 1
    assert float(ssim_loss(torch.nn.Identity(), to_tensor(images))) == pytest.approx(0, abs=1e-5)


def test_ssim_loss_has_the_gradient_of_the_decomposition() -> None:
    images, start = working(count=2, side=32), working(count=4, side=32)[2:]
    parameter = torch.nn.Parameter(to_tensor(start).contiguous())

    class Free(torch.nn.Module):
        def forward(self, _):
            return parameter

    ssim_loss(Free(), to_tensor(images)).backward()
    _, expected = SsimLoss(images[:, None].astype(np.float64)).gradient(start[:, None].astype(np.float64))
    np.testing.assert_allclose(parameter.grad.numpy() * len(images), expected, atol=1e-3 * np.abs(expected).max())


def test_each_loss_lowers_itself(fitted: dict) -> None:
    assert set(LOSSES) == {"squared", "ssim"} and fitted["ssim"].parameters["loss"] == "ssim"
    for kind in ("squared", "ssim", "memae"):
        first, *_, last = (done["train"] for done in fitted[kind].history)
        assert last < first, kind
    weights = {kind: fitted[kind].tensors()["network/encoder.0.weight"].tobytes() for kind in ("squared", "ssim", "memae")}
    assert len(set(weights.values())) == 3


@pytest.mark.parametrize("change", [{"entropy": 0.1}, {"items": 13}, {"shrink": 0.05}])
def test_memaes_own_options_matter(fitted: dict, change: dict) -> None:
    other = make("memae", **change).fit(working())
    assert other.parameters == fitted["memae"].parameters | change and other.history != fitted["memae"].history


# The patch autoencoder

def test_the_memory_holds_every_clean_image(fitted: dict) -> None:
    prior, images = fitted["pae"], working()
    assert len(prior.memory) == 10 and prior.memory.shape == (4, 4, 6)
    latents = prior.encode(images)
    assert (prior.memory.vectors == latents.transpose(1, 2, 0, 3).astype(np.float16)).all()
    retrieval = prior.retrieve(images)
    assert retrieval.distances.shape == retrieval.replaced.shape == (10, 4, 4) and retrieval.distances.max() < 1e-4
    assert fitted["pae on a disk"].using(0.1).reconstruct(images).tobytes() == prior.reconstruct(images).tobytes()
    assert isinstance(fitted["pae on a disk"].memory.vectors, np.memmap)


def test_algorithm_one_step_by_step(fitted: dict) -> None:
    images = working(count=14)[10:]
    images[:, 4:9, 4:9] = 0
    latents = fitted["pae"].encode(images)
    matched, distances, _ = fitted["pae"].memory.retrieve(latents)
    retrieval = fitted["pae"].retrieve(images)
    assert (retrieval.distances == distances).all() and (retrieval.replaced.sum(axis=(1, 2)) == 2).all()  # a tenth of 16 patches
    mixed = np.where(retrieval.replaced[..., None], matched, latents)
    assert (retrieval.priors == fitted["pae"].decode(mixed)).all() and (retrieval.priors == fitted["pae"].reconstruct(images)).all()
    assert (retrieval.priors != fitted["pae"].plain().reconstruct(images)).any()


def test_alpha_one_decodes_nothing_but_memory(fitted: dict) -> None:
    images, everything = working(count=14)[10:], fitted["pae"].using(1.0)
    matched, _, _ = fitted["pae"].memory.retrieve(fitted["pae"].encode(images))
    assert (everything.reconstruct(images) == fitted["pae"].decode(matched)).all() and everything.retrieve(images).replaced.all()
    assert (fitted["pae"].using(1e-9).retrieve(images).replaced.sum(axis=(1, 2)) <= 1).all()


def test_using_and_plain_share_the_network(fitted: dict) -> None:
    prior = fitted["pae"]
    other, plain = prior.using(0.5), prior.plain()
    assert other.network is plain.network is prior.network and other.memory is prior.memory and other.history is plain.history is prior.history
    assert other.parameters == prior.parameters | {"alpha": 0.5} and prior.parameters["alpha"] == 0.1
    assert type(plain) is AutoencoderPrior and plain.is_fitted and "alpha" not in plain.parameters
    np.testing.assert_allclose(plain.reconstruct(working()), prior.decode(prior.encode(working())), atol=1e-6)
    with pytest.raises(ParameterError, match="alpha=2"):
        prior.using(2)
    assert not make("pae").using(0.5).is_fitted


def test_a_side_it_did_not_remember_is_refused(fitted: dict) -> None:
    assert fitted["squared"].reconstruct(working(side=24)).shape == (10, 24, 24)  # convolutions do not mind
    with pytest.raises(DataError, match=r"latent maps of \(6, 6, 6\) asked of a memory of \(4, 4, 6\)"):
        fitted["pae"].reconstruct(working(side=24))


def test_another_fit_that_fails_leaves_no_mixture_of_two(monkeypatch) -> None:
    prior = make("pae").fit(working())
    before = prior.reconstruct(working())
    with pytest.raises(DataError, match="the loss .* is nan"):
        prior.fit(working() * np.nan)
    assert prior.reconstruct(working()).tobytes() == before.tobytes()  # nothing was learned, nothing is lost

    def full(*_, **__):
        raise DataError("the disk is full")

    monkeypatch.setattr(PositionMemory, "build", full)
    with pytest.raises(DataError, match="disk is full"):
        prior.fit(working(count=12))
    assert not prior.is_fitted  # the new network has no memory


# Checkpoints

@pytest.mark.parametrize("kind", ["squared", "memae", "pae"])
def test_an_interrupted_fit_ends_with_the_same_bytes(fitted: dict, tmp_path, monkeypatch, kind: str) -> None:
    played, rounds = autoencoder._epoch, []

    def dies(training, *rest):
        if training.rounds == 2:
            raise KeyboardInterrupt
        return played(training, *rest)

    def counts(training, *rest):
        rounds.append(training.rounds)
        return played(training, *rest)

    interrupted = make(kind)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(autoencoder, "_epoch", dies)
        interrupted.fit(working(), tmp_path)
    assert not interrupted.is_fitted
    monkeypatch.setattr(autoencoder, "_epoch", counts)
    resumed = Difference(make(kind), 16).fit(samples_of(), tmp_path).prior
    assert resumed.history == fitted[kind].history and rounds == [2]
    assert all(resumed.tensors()[name].tobytes() == value.tobytes() for name, value in fitted[kind].tensors().items())


def test_checkpoints_of_other_data_or_parameters_are_refused(tmp_path) -> None:
    images = working()
    make("squared").fit(images, tmp_path)
    others = {"one pixel": images + 0, "another order": images[::-1], "mirrored": images[:, :, ::-1], "fewer": images[:-1]}
    others["one pixel"][0, 0, 0] = 1 - images[0, 0, 0]
    for change, stack in [({}, other) for other in others.values()] + [({"rate": 1e-3}, images), ({"seed": 1}, images), ({"loss": "ssim"}, images)]:
        with pytest.raises(WeightsError, match="training of other data or parameters"):
            make("squared", **change).fit(stack, tmp_path)
    with pytest.raises(WeightsError, match="training of other data or parameters"):
        make("memae").fit(images, tmp_path)
    assert make("squared").fit(np.asfortranarray(images), tmp_path).is_fitted  # how it lies in memory plays no part


# A detector on any prior

MIXED = ((32, 32), (16, 48), (40, 24))


@pytest.mark.parametrize("kind", OWN)
def test_detects_saves_and_loads_to_the_bit(fitted: dict, tmp_path, kind: str) -> None:
    detector, asked = Difference(fitted[kind], 16, batch_size=4), samples_of(7, MIXED)
    prediction = detector.predict(asked)
    assert [found.shape for found in prediction.maps] == [sample.image.shape[:2] for sample in asked]
    assert prediction.scores.shape == (7,) and same(prediction, detector.predict(asked))
    detector.save(tmp_path / "model")
    assert not [p for p in (tmp_path / "model").rglob("*") if p.suffix in (".pkl", ".pt", ".pth")]
    loaded = Difference.load(tmp_path / "model", device="cpu")
    assert type(loaded.prior) is type(fitted[kind]) and loaded.parameters == detector.parameters and loaded.is_fitted
    assert same(prediction, loaded.predict(asked)) and (loaded.backgrounds(asked) == detector.backgrounds(asked)).all()
    assert all((loaded.prior.tensors()[name] == value).all() for name, value in fitted[kind].tensors().items())
    loaded.save(tmp_path / "again")
    assert [(tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes() for name in ("config.json", "state.safetensors")]


def test_the_detector_fits_its_prior_on_normal_samples_once() -> None:
    detector = Difference(make("squared", epochs=1), 16, "rgb")
    assert not detector.is_fitted
    for attempt in (detector.predict, detector.backgrounds):
        with pytest.raises(ParameterError, match="this Difference is not fitted"):
            attempt(samples_of(2))
    with pytest.raises(DataError, match="no normal images to fit"):
        detector.fit([])
    with pytest.raises(DataError, match="normal0: label 1 among the normal images"):
        detector.fit([Sample(noise(0), None, 1, "normal0"), *samples_of(3)])
    network = detector.fit(samples_of(4, MIXED)).prior.network
    assert detector.fit(samples_of(3)).prior.network is network  # a fitted prior is used as it is
    assert detector.backgrounds(samples_of(3, MIXED)).shape == (3, 16, 16, 3)


def test_batches_and_no_samples(fitted: dict) -> None:
    asked = samples_of(7)
    expected = Difference(fitted["squared"], 16).predict(asked)
    for size in (1, 3, 7):
        parts = Difference(fitted["squared"], 16, batch_size=size).predict(asked)
        np.testing.assert_allclose(parts.scores, expected.scores, atol=1e-5)
    for kind in ("squared", "pae"):
        nothing = Difference(fitted[kind], 16)
        assert len(nothing.predict([])) == 0 and nothing.backgrounds([]).shape == (0, 16, 16)


def test_a_flat_image_and_a_white_one(fitted: dict) -> None:
    flat = [Sample(np.full((20, 30, 3), value, np.uint8), name=str(value)) for value in (0, 255)]
    prediction = Difference(fitted["pae"], 16).predict(flat)
    assert all(np.isfinite(found).all() for found in prediction.maps) and np.isfinite(prediction.scores).all()


def test_grey_priors_and_colour_detectors_do_not_meet(fitted: dict) -> None:
    for kind in OWN:
        with pytest.raises(DataError, match="images of 3 channels asked of"):
            Difference(fitted[kind], 16, "rgb").predict(samples_of(2))
    with pytest.raises(DataError, match="asked of a memory of"):
        Difference(fitted["pae"], 32).predict(samples_of(2))


class Blur:
    """A plugged-in prior: nothing to fit, nothing to keep."""

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        return np.broadcast_to(images.mean(axis=(1, 2), keepdims=True), images.shape)


class Median:
    """A plugged-in prior with all that a prior may have; `restore` returns nothing."""

    version = "2"

    def __init__(self, share: float = 0.5):
        self.parameters, self.picture = {"share": share}, None

    @property
    def is_fitted(self) -> bool:
        return self.picture is not None

    def fit(self, images, checkpoint=None):
        self.picture = np.quantile(images, self.parameters["share"], axis=0).astype(np.float32)

    def reconstruct(self, images):
        return np.repeat(self.picture[None], len(images), axis=0)

    def tensors(self):
        return {"picture": self.picture}

    def restore(self, tensors):
        self.picture = tensors["picture"]


@pytest.mark.parametrize("channels", ["grey", "rgb"])
def test_any_object_is_a_prior(channels: str) -> None:
    detector, asked = Difference(Blur(), 16, channels), samples_of(5, MIXED)
    images = read_working(asked, 16, channels).images
    assert detector.is_fitted and detector.fit(asked) is detector
    residual = np.abs(images - images.mean(axis=(1, 2), keepdims=True))
    residual = residual if channels == "grey" else residual.mean(axis=-1)
    for found, expected, sample in zip(detector.predict(asked).maps, residual, asked, strict=True):
        np.testing.assert_allclose(found, resize_map(expected, sample.image.shape[:2]), atol=1e-6)


def test_a_prior_without_tensors_is_not_saved(tmp_path) -> None:
    with pytest.raises(ParameterError, match="prior Blur cannot be saved: give it tensors"):
        Difference(Blur(), 16).save(tmp_path / "model")
    with pytest.raises(ParameterError, match="nothing to save: this Difference is not fitted"):
        Difference(make("pae"), 16).save(tmp_path / "model")
    unwritable = Median()
    unwritable.parameters["share"] = np.array([0.5])
    with pytest.raises(ParameterError, match="JSON cannot hold the parameters of this Difference"):
        Difference(unwritable, 16).fit(samples_of(3)).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_plugged_in_prior_is_saved_and_loaded_by_name(tmp_path) -> None:
    detector = Difference(Median(0.3), 16).fit(samples_of(5))
    detector.save(tmp_path / "model")
    for priors in (None, {"Medain": Median}):
        with pytest.raises(ParameterError, match="unknown prior 'Median'"):
            Difference.load(tmp_path / "model", priors=priors)
    for maker in (Median, lambda share: Median(share)):
        loaded = Difference.load(tmp_path / "model", priors={"Median": maker})
        assert loaded.prior.parameters == {"share": 0.3} and same(loaded.predict(samples_of(3)), detector.predict(samples_of(3)))


@pytest.mark.parametrize("result", [lambda images: images[:, :8], lambda images: images[0], lambda images: images * np.nan, lambda images: None,
                                    lambda images: images / 0 + np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_prior_that_gives_something_else_is_named(result) -> None:
    class Strange:
        def reconstruct(self, images):
            return result(images)

    for attempt in (Difference(Strange(), 16).predict, Difference(Strange(), 16).backgrounds):
        with pytest.raises(DataError, match=r"Strange.reconstruct gave .* for images of \(2, 16, 16\), or values that are not finite"):
            attempt(samples_of(2))


def test_priors_are_brought_to_zero_and_one() -> None:
    class Far:
        def reconstruct(self, images):
            return images.astype(np.float64) * 9 - 4

    background = Difference(Far(), 16).background(working())
    assert background.dtype == np.float32 and background.min() == 0 and background.max() == 1


def test_bad_detectors_are_named() -> None:
    for prior, change, message in ((object(), {}, "prior object has no reconstruct"), (None, {}, "NoneType has no reconstruct"),
                                   (Blur(), {"channels": "gray"}, "did you mean 'grey'"), (Blur(), {"image_size": 4}, "side=4"),
                                   (Blur(), {"batch_size": 0}, "batch_size=0")):
        with pytest.raises(ParameterError, match=message):
            Difference(prior, **change)


# Damaged folders

def rewrite(folder: Path, prior: dict | None = None, tensors: dict | None = None, drop: tuple[str, ...] = (), **parameters) -> None:
    """Change what a saved detector says: its prior's settings (None removes one), its parameters, its tensors."""
    config = json.loads((folder / "config.json").read_text())
    config["parameters"] |= parameters
    config["parameters"]["prior"] |= prior or {}
    config["parameters"]["prior"] = {key: value for key, value in config["parameters"]["prior"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "state.safetensors") | (tensors or {})
    save_file({name: value for name, value in state.items() if name not in drop}, folder / "state.safetensors")


DAMAGES = {
    "an unknown parameter of the prior": ({"prior": {"alhpa": 0.1}}, "alhpa"),
    "a value out of range": ({"prior": {"alpha": 3}}, "alpha=3"),
    "a prior without a name": ({"prior": {"kind": None}}, "'kind'"),
    "a prior without a version": ({"prior": {"version": None}}, "'version'"),
    "a prior of another version": ({"prior": {"version": "0"}}, "its PatchPrior is of version 0, and this is 1"),
    "another prior": ({"prior": {"kind": "MemAEPrior"}}, "alpha"),
    "another network": ({"prior": {"encoder": [4, 8]}}, "size mismatch|Error"),
    "no memory": ({"drop": ("memory",)}, "'memory'"),
    "no weights": ({"drop": ("network/encoder.0.weight",)}, "encoder.0.weight"),
    "fewer weights": ({"drop": ("network/decoder.0.weight",)}, "Missing key"),
    "a memory of another type": ({"tensors": {"memory": np.zeros((4, 4, 3, 6), np.float32)}}, "holds float16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(fitted: dict, tmp_path, damage: str) -> None:
    Difference(fitted["pae"], 16).save(tmp_path / "model")
    changes, message = DAMAGES[damage]
    rewrite(tmp_path / "model", **changes)
    with pytest.raises(WeightsError, match=message) as caught:
        Difference.load(tmp_path / "model", device="cpu")
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: not a saved Difference") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [PAEDID, Reconstruction])
def test_edited_parameters_are_named_by_every_detector(fitted: dict, tmp_path, kind: type) -> None:
    kind(fitted["pae"], image_size=16).save(tmp_path / "model")
    assert kind.load(tmp_path / "model", device="cpu").parameters == kind(fitted["pae"], image_size=16).parameters
    for change, message in (({"image_size": 4}, "side=4 px"), ({"image_sise": 16}, "unexpected keyword argument 'image_sise'")):
        rewrite(tmp_path / "model", **change)
        with pytest.raises(WeightsError, match=message) as caught:
            kind.load(tmp_path / "model", device="cpu")
        assert str(caught.value).startswith(f"{tmp_path / 'model'}: not a saved {kind.__name__}") and "\n" not in str(caught.value)


def test_what_is_not_the_folders_fault_is_not_blamed_on_it(fitted: dict, tmp_path) -> None:
    Difference(fitted["pae"], 16).save(tmp_path / "model")
    with pytest.raises(ParameterError, match="device 'gpu' is not a torch device"):
        Difference.load(tmp_path / "model", device="gpu")
    with pytest.raises(WeightsError, match="not a saved PriorDetector .it holds Difference"):
        PriorDetector.load(tmp_path / "model")


def test_the_registry_is_what_can_be_loaded() -> None:
    assert PRIORS == {"AutoencoderPrior": AutoencoderPrior, "MemAEPrior": MemAEPrior, "PatchPrior": PatchPrior}


def test_a_negative_image_is_no_solution_of_ssim() -> None:
    images = to_tensor(working("rgb", 3, 32))

    class Negative(torch.nn.Module):
        def forward(self, inputs):
            return -inputs

    assert float(ssim_loss(Negative(), images)) > 0.5 > float(ssim_loss(torch.nn.Identity(), images))
