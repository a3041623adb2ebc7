"""The loop that all segmenters share: killed and resumed, frozen parts, examples with nothing to learn, probabilities."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.data.mixing import SyntheticDefects
from defectbook.data.synthesis import Pros
from defectbook.models.losses import make_loss
from defectbook.models.segmentation import (
    Examples,
    TrainedPart,
    describe_loss,
    evaluate_loss,
    fingerprint,
    in_batches,
    largest_class,
    predict_probabilities,
    read_template,
    read_working_set,
    resize_probabilities,
    stream_probabilities,
    synthetic_samples,
    take,
    train_segmenter,
)
from defectbook.models.training import seeded_torch
from defectbook.models.unet import UNet


def squares(count: int, side: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dark noise, uint8 (count, 3, side, side), with one bright square each, and the squares' masks."""
    rng = np.random.default_rng(seed)
    images, masks = rng.integers(0, 90, (count, 3, side, side), np.uint8), np.zeros((count, side, side), np.uint8)
    for number, (top, left) in enumerate(rng.integers(0, side - 5, (count, 2))):
        images[number, :, top:top + 5, left:left + 5] += 120
        masks[number, top:top + 5, left:left + 5] = 1
    return torch.from_numpy(images), torch.from_numpy(masks)


def network(classes: int = 1, joining: str = "none", seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with seeded_torch(seed):
        model = UNet(width=4, depth=1, classes=classes, joining=joining)
        model.joined[0].append(nn.Dropout(dropout))
    return model


def normals(count: int = 2, side: int = 40, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(60, 200, (side, side, 3), np.uint8), name=f"board{i}",
                   meta={"template": rng.integers(60, 200, (side, side, 3), np.uint8)}) for i in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", ["bce", "soft_dice", "ce", "focal"])
def test_it_learns(loss: str) -> None:
    images, masks = squares(24)
    model = network(classes=2 if loss == "ce" else 1)
    history = train_segmenter(model, images, masks, loss, epochs=12, rate=2e-2, device="cpu")
    unseen, truth = squares(8, seed=1)
    found = largest_class(predict_probabilities(model, unseen, device="cpu"))
    dice = 2 * (found & truth.numpy()).sum() / (found.sum() + truth.numpy().sum())
    assert len(history) == 12 and history[-1]["train"] < history[0]["train"] and dice > 0.9 and not model.training


SCRIPT = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[3])
    import torch
    from safetensors.torch import save_file
    from test_segmentation import network, squares
    from defectbook.models.segmentation import train_segmenter
    folder, kill = sys.argv[1], int(sys.argv[2])
    images, masks = squares(12)
    model, calls = network(joining="difference", dropout=0.2), [0]
    def count(*_):
        calls[0] += model.training
        if calls[0] == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_hook(count)
    templates = images.flip(0)
    train_segmenter(model, [images, templates], masks, "soft_dice", epochs=4, rate=1e-2, held_out=0.25, checkpoint=folder, device="cpu")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder + "/final.safetensors")
""")


def run(folder: Path, kill: int = -1) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(kill), str(Path(__file__).parent)]
    return subprocess.run(command, env=environment, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_by_the_system_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Nine of twelve examples are trained on, so three steps an epoch: the eighth step is in the middle of the third epoch."""
    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "killed", kill=8) == -signal.SIGKILL
    assert (tmp_path / "killed" / "round00002.safetensors").exists() and not (tmp_path / "killed" / "final.safetensors").exists()
    assert run(tmp_path / "killed") == 0
    assert same(*(load_file(tmp_path / name / "final.safetensors") for name in ("whole", "killed")))


class Killed(Exception):
    """Stands for a signal."""


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_interrupted_it_ends_with_the_same_weights(tmp_path: Path, held_out: float) -> None:
    images, masks = squares(12)
    options = {"loss": "soft_dice", "epochs": 4, "rate": 1e-2, "held_out": held_out, "device": "cpu"}
    whole = network(dropout=0.2)
    history = train_segmenter(whole, images, masks, **options)
    steps = -(-(12 - int(12 * held_out)) // 4)
    broken, calls = network(dropout=0.2), []

    def interrupt(*_) -> None:
        calls.append(broken.training)
        if sum(calls) == 2 * steps + 2:
            raise Killed

    broken.register_forward_hook(interrupt)
    with pytest.raises(Killed):
        train_segmenter(broken, images, masks, checkpoint=tmp_path, **options)
    again = network(dropout=0.2)
    assert train_segmenter(again, images, masks, checkpoint=tmp_path, **options) == history
    assert same(state(again), state(whole)) and not same(state(again), state(network(dropout=0.2)))
    finished = network(dropout=0.2)
    assert train_segmenter(finished, images, masks, checkpoint=tmp_path, **options) == history and same(state(finished), state(whole))


@pytest.mark.parametrize("change", ["images", "masks", "loss", "options", "rate", "start", "seed"])
def test_another_training_is_not_continued(tmp_path: Path, change: str) -> None:
    images, masks = squares(4)
    loss = make_loss("focal", weights=[0.25, 0.75])
    options = {"epochs": 1, "rate": 1e-2, "checkpoint": tmp_path, "device": "cpu"}
    train_segmenter(network(), images, masks, loss, **options)
    start = network(seed=1 if change == "start" else 0)
    if change in ("images", "masks"):
        images, masks = (images ^ 1, masks) if change == "images" else (images, masks ^ 1)
    loss = make_loss("focal", weights=[0.2, 0.8]) if change == "options" else "soft_dice" if change == "loss" else loss
    with pytest.raises(WeightsError, match="other data or parameters"):
        train_segmenter(start, images, masks, loss, **options | ({"rate": 2e-2} if change == "rate" else {"seed": 1} if change == "seed" else {}))


def test_an_identity_stands_for_the_data(tmp_path: Path) -> None:
    images, masks = squares(4)
    options = {"epochs": 1, "checkpoint": tmp_path, "device": "cpu"}
    train_segmenter(network(), images, masks, identity={"board": 1}, **options)
    train_segmenter(network(), images ^ 1, masks, identity={"board": 1}, **options)  # whoever names the data answers for it
    with pytest.raises(WeightsError):
        train_segmenter(network(), images, masks, identity={"board": 2}, **options)


def test_loss_descriptions_hold_name_and_options() -> None:
    assert describe_loss(make_loss("bce")) == ["binary_cross_entropy", {}]
    assert describe_loss(make_loss("focal", gamma=1.0, weights=torch.tensor([1, 3]))) == ["focal", {"gamma": 1.0, "weights": [1, 3]}]


def test_frozen_parts_do_not_move_and_are_not_kept(tmp_path: Path) -> None:
    images, masks = squares(8)
    model = network(dropout=0.5).requires_grad_(False)
    model.joined[0].requires_grad_(True)
    before, seen = state(model), []
    model.down[0][1].register_forward_hook(lambda module, *_: seen.append(module.training))
    train_segmenter(model, images, masks, epochs=2, rate=1e-2, checkpoint=tmp_path, device="cpu")
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("joined.0")} == set(TrainedPart(model).names) and not any(seen)
    kept = load_file(next(tmp_path.glob("round*.safetensors")))
    assert {name.removeprefix("model/") for name in kept if name.startswith("model/")} == moved
    with pytest.raises(ParameterError, match="requires a gradient"):
        train_segmenter(model.requires_grad_(False), images, masks, device="cpu")


def test_a_single_trained_parameter_of_a_frozen_module_is_kept() -> None:
    model = network().requires_grad_(False)
    model.down[0][1].bias.requires_grad_(True)
    names = TrainedPart(model).names
    assert "down.0.1.bias" in names and "down.0.1.running_mean" in names and "down.0.1.weight" not in names and "head.weight" not in names


def test_cached_features_train_a_head(tmp_path: Path) -> None:
    """Half-precision features mapped from disk: what PROS does with a frozen prefix."""
    images, masks = squares(16)
    frozen = network().eval()
    with torch.no_grad():
        features = frozen.encode(images.float() / 255)[0].half().numpy()
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    with seeded_torch(0):
        head = nn.Conv2d(4, 1, 1)
    history = train_segmenter(head, mapped, masks, epochs=10, rate=5e-2, identity={"cache": 1}, checkpoint=tmp_path / "kept", device="cpu")
    assert history[-1]["train"] < 0.7 * history[0]["train"] and predict_probabilities(head, mapped, device="cpu").shape == (16, 2, 16, 16)


def test_several_inputs_arrive_in_order_and_type() -> None:
    images, masks = squares(4)
    numbers = np.arange(4, dtype=np.float64)[:, None]
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, pictures: Tensor, extra: Tensor) -> Tensor:
            seen.append((pictures, extra))
            return self.gain * pictures[:, :1]

    train_segmenter(Spy(), (images, numbers), masks, epochs=1, batch_size=3, device="cpu")
    for pictures, extra in seen:
        assert pictures.dtype == extra.dtype == torch.float32 and 0 <= pictures.min() and pictures.max() <= 1
        assert torch.equal((pictures * 255).round().to(torch.uint8), images[extra[:, 0].long()])
    assert sorted(int(n) for _, extra in seen for n in extra) == [0, 1, 2, 3] and [len(extra) for _, extra in seen] == [2, 2]


def test_the_order_is_shuffled_anew_each_epoch_by_the_seed() -> None:
    images, masks = squares(6)

    def orders(seed: int) -> list[list[int]]:
        seen: list[int] = []

        class Spy(nn.Conv2d):
            def forward(self, pictures: Tensor, number: Tensor) -> Tensor:
                seen.extend(int(n) for n in number)
                return super().forward(pictures)

        train_segmenter(Spy(3, 1, 1), (images, torch.arange(6)), masks, epochs=3, batch_size=2, seed=seed, device="cpu")
        return [seen[first:first + 6] for first in (0, 6, 12)]

    first = orders(0)
    assert first == orders(0) != orders(1) and first[0] != first[1] != first[2] and all(sorted(order) == list(range(6)) for order in first)


def test_the_best_epoch_on_held_out_examples_is_kept() -> None:
    images, masks = squares(12)
    masks = masks.clone()
    masks[:3] = 1 - masks[:3]  # some lies, so that the held-out loss rises again
    model = network()
    history = train_segmenter(model, images, masks, epochs=12, rate=5e-2, held_out=0.25, seed=2, device="cpu")
    losses = [done["held_out"] for done in history]
    from defectbook.models.segmentation import split_watched

    examples = Examples((images,), masks, None)
    learned, watched = split_watched(examples, 0.25, 2)
    assert len(watched) == 3 and sorted([*learned, *watched]) == list(range(12))
    assert evaluate_loss(model, examples, make_loss("bce"), watched, 4) == pytest.approx(min(losses), rel=1e-4) and min(losses) < losses[-1]


@pytest.mark.parametrize("loss", ["bce", "soft_dice", "ce", "focal"])
def test_a_batch_without_a_defect_trains(loss: str) -> None:
    images, masks = squares(4)
    masks = masks.clone()
    masks[1:] = 0  # batches of one: three of four hold no defect
    model = network(classes=2 if loss == "ce" else 1)
    history = train_segmenter(model, images, masks, loss, epochs=3, batch_size=1, rate=1e-2, device="cpu")
    assert all(np.isfinite(done["train"]) for done in history) and all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_pixels_that_do_not_count_have_no_say() -> None:
    images, masks = squares(8)
    valid = torch.ones_like(masks)
    valid[:, :, 8:] = 0
    lies = torch.where(valid.bool(), masks, 1 - masks)
    one, other = network(), network()
    for model, targets in ((one, masks), (other, lies)):
        train_segmenter(model, images, targets, "soft_dice", valid=valid, epochs=2, rate=1e-2, device="cpu")
    assert same(state(one), state(other)) and not same(state(one), state(network()))


IMAGES, MASKS = squares(4)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: train_segmenter(network(), IMAGES, MASKS * 0), DataError, "no defective pixel in any of 4 masks"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, valid=1 - MASKS), DataError, "no defective pixel"),
    (lambda: train_segmenter(network(), IMAGES[:3], MASKS), DataError, "for 3 inputs"),
    (lambda: train_segmenter(network(), [IMAGES, IMAGES[:2]], MASKS), DataError, r"lengths \[2, 4\]"),
    (lambda: train_segmenter(network(), IMAGES[:0], MASKS[:0]), DataError, "at least 1"),
    (lambda: train_segmenter(network(), IMAGES, MASKS.float()), DataError, "class indices"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, valid=MASKS[0]), DataError, "one value for each pixel"),
    (lambda: train_segmenter(network(), IMAGES, torch.cat([MASKS[:1], MASKS[1:] * 0]), held_out=0.99), DataError, "holding out"),
    (lambda: train_segmenter(network(), IMAGES * torch.nan, MASKS, epochs=1), DataError, "lower the learning rate or check the inputs"),
    (lambda: train_segmenter(network(), IMAGES, MASKS * 2), ParameterError, "hold classes 0 to 2"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, "dice"), ParameterError, "soft_dice"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, "regression"), ParameterError, "takes values"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, epochs=0), ParameterError, "epochs=0"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, rate=-1), ParameterError, "rate=-1"),
    (lambda: train_segmenter(network(), IMAGES, MASKS, held_out=1), ParameterError, "held_out=1"),
    (lambda: predict_probabilities(network(), IMAGES * torch.nan), DataError, "logits of example 0 are not finite"),
    (lambda: read_working_set([], 4), ParameterError, "side=4"),
    (lambda: synthetic_samples(normals(), Pros(), 2, templates="none"), ParameterError, "templates='none'"),
])
def test_bad_input_is_named_in_one_line(call, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@given(count=st.integers(1, 60), size=st.integers(1, 9))
def test_batches_are_even(count: int, size: int) -> None:
    batches = in_batches(np.arange(count), size)
    lengths = [len(batch) for batch in batches]
    assert np.array_equal(np.concatenate(batches), np.arange(count)) and max(lengths) <= size and max(lengths) - min(lengths) <= 1


def test_fingerprints_see_values_shapes_and_types() -> None:
    base = torch.arange(6, dtype=torch.float32)
    others = [base + 1, base.view(2, 3), base.double(), base.half(), base.bfloat16(), base.flip(0)]
    assert len({fingerprint([array]) for array in [base, *others]}) == 7
    assert fingerprint([base.numpy()]) == fingerprint([base]) and fingerprint([torch.tensor(3)]) != fingerprint([torch.tensor(4)])
    assert fingerprint([base.view(2, 3).T]) == fingerprint([base.view(2, 3).T.contiguous()])


def test_taking_converts() -> None:
    parts = (torch.full((3, 2, 4, 4), 255, dtype=torch.uint8), np.full((3, 5), 2, np.float16))
    pictures, rest = take(parts, np.array([2, 0]), "cpu")
    assert pictures.shape == (2, 2, 4, 4) and (pictures == 1).all() and rest.dtype == torch.float32 and (rest == 2).all()


@given(classes=st.integers(1, 4), count=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_probabilities_sum_to_one_whatever_the_batches(classes: int, count: int) -> None:
    images, _ = squares(count)
    model = network(classes=classes)
    whole, singly = (predict_probabilities(model, images, batch_size=size, device="cpu") for size in (8, 1))
    assert whole.shape == (count, max(2, classes), 16, 16) and whole.dtype == np.float32
    assert np.allclose(whole.sum(1), 1, atol=1e-5) and np.allclose(whole, singly, atol=1e-5)
    if classes == 1:
        with torch.no_grad():
            assert np.allclose(whole[:, 1], model(images.float() / 255)[:, 0].sigmoid().numpy(), atol=1e-5)


def test_streaming_reads_one_batch_at_a_time_and_agrees() -> None:
    reads: list[int] = []

    def reader(number: int):
        def read() -> np.ndarray:
            reads.append(number)
            return np.random.default_rng(number).integers(0, 255, (20 + number, 30, 3), np.uint8)
        return read

    samples = [Sample(reader(i), name=str(i)) for i in range(5)]
    model = network()
    stream = stream_probabilities(model, samples, 16, batch_size=2, device="cpu")
    first = next(stream)
    assert reads == [0, 1] and [sample.name for sample in first.samples] == ["0", "1"] and first.sizes == [(20, 30), (21, 30)]
    found = np.concatenate([first.probabilities, *(batch.probabilities for batch in stream)])
    assert np.allclose(found, predict_probabilities(model, read_working_set(samples, 16).images, device="cpu"), atol=1e-5)
    large = resize_probabilities(found[0], (50, 70))
    assert large.shape == (2, 50, 70) and large.dtype == np.float32 and np.allclose(large.sum(0), 1, atol=1e-5)


def test_ties_are_background() -> None:
    probabilities = np.array([[0.5, 0.4], [0.5, 0.6]], np.float32).reshape(2, 1, 2)
    assert largest_class(probabilities).tolist() == [[0, 1]] and largest_class(probabilities).dtype == np.uint8


@pytest.mark.parametrize("source", ["path", "array", "function"])
def test_templates_come_from_anywhere(tmp_path: Path, source: str) -> None:
    template = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(template).save(tmp_path / "template.png")
    given = {"path": tmp_path / "template.png", "array": template, "function": lambda: template}[source]
    sample = Sample(np.zeros((24, 32, 3), np.uint8), name="board", meta={"template": given})
    assert np.array_equal(read_template(sample), template)
    working = read_working_set([sample], 16, templates=True, masks=True)
    assert len(working.inputs) == 2 and working.sizes == [(24, 32)]
    assert working.templates.any() and not working.images.any() and not working.masks.any()


@pytest.mark.parametrize(("meta", "words"), [
    ({}, "board7: no template"),
    ({"template": np.zeros((9, 9, 3), np.uint8)}, "board7: a template of 9x9 px"),
    ({"template": "nowhere.png"}, "nowhere.png: no such image file"),
])
def test_templates_that_do_not_serve(meta: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_working_set([Sample(np.zeros((24, 24, 3), np.uint8), name="board7", meta=meta)], 16, templates=True)


def test_masks_keep_their_classes_and_must_be_there() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[4:20, 4:20], mask[24:36, 24:36] = 3, 7
    sample = Sample(np.zeros((40, 40, 3), np.uint8), mask, 1, "board", mask_threshold=None)
    assert set(read_working_set([sample], 16, masks=True).masks.unique().tolist()) == {0, 3, 7}
    with pytest.raises(DataError, match="lone: label 1 but no mask"):
        read_working_set([Sample(np.zeros((40, 40, 3), np.uint8), None, 1, "lone")], 16, masks=True)


def test_synthetic_samples_are_those_of_the_mixture_with_templates() -> None:
    samples = normals(3)
    drawn = synthetic_samples(samples, Pros(), 7, seed=5, size=(32, 32))
    defects = SyntheticDefects(samples, Pros(), 5, (32, 32), 7)
    for index, sample in enumerate(drawn):
        expected = defects.sample(index)
        assert sample.name == expected.name and np.array_equal(sample.image, expected.image) and np.array_equal(sample.mask, expected.mask)
        assert sample.label == 1 and np.array_equal((sample.image != sample.meta["template"]).any(axis=2), sample.mask > 0)
    given = synthetic_samples(samples, Pros(), 4, seed=5, templates="given")
    assert np.array_equal(given[3].meta["template"], samples[0].meta["template"])
    with pytest.raises(DataError, match="no template"):
        synthetic_samples([Sample(samples[0].image, name="bare")], Pros(), 1, templates="given")
    with pytest.raises(DataError, match="labelled 1"):
        synthetic_samples([Sample(samples[0].image, label=1)], Pros(), 1)
