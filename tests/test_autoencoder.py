"""Autoencoders: shapes, a training that holds out, stops, and goes on to the same bytes; MemAE's memory against its formulas."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import softmax

from defectbook.core import DataError, ParameterError, WeightsError
from defectbook.models import autoencoder
from defectbook.models.autoencoder import (
    ENCODERS,
    Autoencoder,
    ItemMemory,
    MemoryAutoencoder,
    apply,
    entropy,
    evaluate_loss,
    latent_shape,
    memory_loss,
    receptive_field,
    split_held_out,
    squared_error,
    to_array,
    to_tensor,
    train_autoencoder,
)
from defectbook.models.training import seeded_torch

TINY = {"epochs": 4, "batch_size": 4, "device": "cpu"}


def textures(count: int = 14, side: int = 16, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Waves of random phase, float32 (count, side, side[, channels]) in 0..1."""
    phases = np.random.default_rng(seed).random((count, 1, 1, channels))
    columns = np.arange(side)[None, None, :, None] / side
    waves = np.broadcast_to(0.5 + 0.3 * np.sin(2 * np.pi * (2 * columns + phases)), (count, side, side, channels))
    return np.ascontiguousarray(waves[..., 0] if channels == 1 else waves, np.float32)


def network(kind: type = Autoencoder, widths: tuple[int, ...] = (4, 6), channels: int = 1, **options) -> nn.Module:
    with seeded_torch(0, "weights"):
        return kind(widths, channels, **options)


class Noisy(Autoencoder):
    """A network that asks torch's generator while it trains, as one with dropout or a variational one does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        latents = self.encoder(images)
        return self.decoder(latents + 0.1 * torch.randn_like(latents) if self.training else latents)


def weights_of(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in model.state_dict().values())).hexdigest()


# Shapes

@pytest.mark.parametrize("decoder", ["subpixel", "nearest"])
@pytest.mark.parametrize(("name", "expected"), [("wood", (32, 32, 128)), ("cells", (8, 8, 81)), ("bottleneck", (8, 8, 128))])
def test_latent_shapes_of_the_three_encoders(name: str, expected: tuple[int, ...], decoder: str) -> None:
    """`expected` is what the paper says of images of 128 px."""
    widths, stages = ENCODERS[name], len(ENCODERS[name])
    assert latent_shape(widths, 128) == expected
    model = network(widths=widths, channels=3, decoder=decoder).eval()
    side = 4 * 2**stages  # a fourth or less of 128: shapes scale
    with torch.no_grad():
        latents = model.encoder(torch.rand(2, 3, side, side))
        assert latents.shape == (2, expected[2], 4, 4) and model.decoder(latents).shape == (2, 3, side, side)


@pytest.mark.parametrize("decoder", ["subpixel", "nearest"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [Autoencoder, MemoryAutoencoder])
def test_reconstructions_are_shaped_as_the_images_and_every_weight_learns(kind: type, channels: int, decoder: str) -> None:
    model = network(kind, channels=channels, decoder=decoder, **({"items": 9} if kind is MemoryAutoencoder else {})).train()
    images = torch.from_numpy(np.random.default_rng(0).random((3, channels, 16, 16), np.float32))
    assert model(images).shape == images.shape
    squared_error(model, images).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum()] == []


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_receptive_field_by_gradient(stages: int) -> None:
    side = 2**stages * 16
    encoder = network(widths=(3,) * stages).encoder.eval()
    pooled = nn.Sequential(*(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in encoder))  # every pixel has a gradient
    image = torch.rand(1, 1, side, side, requires_grad=True)
    pooled(image)[0, :, 8, 8].sum().backward()
    seen = image.grad[0, 0].abs().sum(0).nonzero().ravel()
    assert seen[-1] - seen[0] + 1 == receptive_field(stages)


def test_sides_and_widths_that_do_not_fit_are_named() -> None:
    for side in (15, 18, 130):
        with pytest.raises(ParameterError, match=f"side={side} px cannot be halved 2 times; give a multiple of 4"):
            latent_shape((4, 6), side)
    for widths in ((), (4, 0)):
        with pytest.raises(ParameterError, match="widths="):
            Autoencoder(widths)
    with pytest.raises(ParameterError, match="unknown decoder 'subpixels': did you mean 'subpixel'"):
        Autoencoder((4,), decoder="subpixels")


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 8, 8, 3), (1, 6, 4, 3), (0, 8, 8)])
def test_tensors_and_back(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).random(shape).astype(np.float32)
    stack = to_tensor(images)
    assert stack.shape == (shape[0], 3 if len(shape) == 4 else 1, *shape[1:3]) and stack.dtype == torch.float32
    back = to_array(stack)
    assert back.tobytes() == images.tobytes() and back.shape == images.shape and back.flags.c_contiguous
    assert len(shape) == 3 or (stack[:, 1].numpy() == images[..., 1]).all()


def test_applied_within_zero_and_one_whatever_the_batch() -> None:
    model, images = network(channels=3), textures(5, channels=3)
    nn.init.constant_(model.decoder[-2].bias, 0.5)
    model.decoder[-2].weight.data *= 20  # far outside 0..1
    whole = apply(model, images)
    assert whole.shape == images.shape and whole.dtype == np.float32 and whole.min() == 0 and whole.max() == 1
    for size in (1, 2, 5):
        np.testing.assert_allclose(apply(model, images, size), whole, atol=1e-5)
    assert apply(model, images[:0]).shape == (0, 16, 16, 3) and not model.training


def test_losses_are_means_over_images() -> None:
    model, images = network().eval(), textures(7)
    rebuilt = to_array(model(to_tensor(images)))
    expected = np.square(rebuilt - images).mean()
    for size in (1, 2, 3, 7, 50):
        assert evaluate_loss(model, images, squared_error, size) == pytest.approx(expected, rel=1e-5)


# Training

@settings(max_examples=80, deadline=None)
@given(st.integers(2, 400), st.floats(1e-6, 1 - 1e-6), st.integers(0, 9))
def test_held_out_and_rest_are_all(count: int, share: float, seed: int) -> None:
    train, held = split_held_out(count, share, seed)
    assert sorted([*train, *held]) == list(range(count)) and len(train) >= 1 and len(held) >= 1
    assert abs(len(held) - share * count) <= 1 and (np.diff(train) > 0).all()
    assert split_held_out(count, share, seed)[1].tolist() == held.tolist()


@pytest.mark.parametrize("decoder", ["subpixel", "nearest"])
def test_the_squared_error_falls(decoder: str) -> None:
    images, model = textures(20), network(decoder=decoder)
    before = evaluate_loss(model, images, squared_error)
    history = train_autoencoder(model, images, **TINY | {"epochs": 12})
    losses = [done["held_out"] for done in history]
    assert len(history) == 12 and losses[-1] < 0.3 * losses[0] and history[-1]["train"] < 0.3 * history[0]["train"]
    assert evaluate_loss(model, images, squared_error) < 0.2 * before and not model.training


def scripted(monkeypatch, losses: list[float]) -> list[str]:
    """Let the held-out losses of the epochs be these; returns where the weights after each epoch are noted."""
    weights: list[str] = []

    def evaluate(model, *_) -> float:
        weights.append(weights_of(model))
        return losses[len(weights) - 1]

    monkeypatch.setattr(autoencoder, "evaluate_loss", evaluate)
    return weights


@pytest.mark.parametrize(("losses", "patience", "epochs", "best"), [
    ([3, 2, 4, 5, 6, 7, 8], 3, 5, 1), ([3, 2, 4, 1, 6, 7, 8, 9], 2, 6, 3), ([1, 2, 3], 1, 2, 0), ([3, 3, 3, 3], 2, 3, 0), ([5, 4, 3, 2, 1], 1, 5, 4)])
def test_training_stops_after_patience_at_its_best_weights(monkeypatch, losses, patience: int, epochs: int, best: int) -> None:
    weights, model = scripted(monkeypatch, losses), network()
    history = train_autoencoder(model, textures(), **TINY | {"epochs": len(losses), "patience": patience})
    assert [done["held_out"] for done in history] == losses[:epochs] and len(set(weights)) == epochs
    assert weights_of(model) == weights[best]


def test_held_out_images_are_never_trained_on() -> None:
    images = textures()
    _, held = split_held_out(len(images), 0.3, 0)
    changed = images.copy()
    changed[held] = 1 - images[held][:, ::-1]
    one, other = network(), network()
    histories = [train_autoencoder(model, stack, held_out=0.3, **TINY | {"epochs": 1}) for model, stack in ((one, images), (other, changed))]
    assert weights_of(one) == weights_of(other) and histories[0][0]["held_out"] != histories[1][0]["held_out"]
    longer = [train_autoencoder(network(), stack, held_out=0.3, patience=4, **TINY) for stack in (images, changed)]
    assert [done["train"] for done in longer[0]] == [done["train"] for done in longer[1]] and len(longer[0]) == 4
    changed = images.copy()
    changed[split_held_out(len(images), 0.3, 0)[0][0]] += 0.1  # while one that is trained on does
    train_autoencoder(other := network(), changed, held_out=0.3, **TINY | {"epochs": 1})
    assert weights_of(one) != weights_of(other)


@pytest.mark.parametrize("kind", [Autoencoder, Noisy, MemoryAutoencoder])
def test_two_trainings_agree_to_the_bit(kind: type) -> None:
    loss, results = memory_loss() if kind is MemoryAutoencoder else squared_error, []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # what torch's own generator says plays no part
        expected = torch.rand(1)
        torch.manual_seed(len(results))
        history = train_autoencoder(model := network(kind), textures(), loss, seed=seed, **TINY)
        results.append((weights_of(model), str(history)))
        assert torch.equal(torch.rand(1), expected)
    assert results[0] == results[1] and results[0][0] != results[2][0]


def test_the_rate_falls_along_half_a_cosine(monkeypatch) -> None:
    rates, played = [], autoencoder._epoch

    def noted(training, *rest) -> float:
        rates.append(training.optimiser.param_groups[0]["lr"])
        return played(training, *rest)

    monkeypatch.setattr(autoencoder, "_epoch", noted)
    train_autoencoder(network(), textures(), **TINY | {"epochs": 4, "patience": 4, "rate": 0.01})
    expected = 0.01 * (0.05 + 0.95 * np.array([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]))  # never below a twentieth
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


class Stops(Exception):
    pass


def interrupted(folder: Path, images: np.ndarray, after: int, monkeypatch, **options) -> None:
    """A training that dies in the middle of the epoch after `after`."""
    played = autoencoder._epoch

    def dies(training, *rest):
        value = played(training, *rest)
        if training.rounds == after:
            raise Stops
        return value

    with monkeypatch.context() as patch, pytest.raises(Stops):
        patch.setattr(autoencoder, "_epoch", dies)
        train_autoencoder(network(Noisy), images, checkpoint=folder, **options)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_training_ends_with_the_same_bytes(tmp_path, monkeypatch, after: int) -> None:
    history = train_autoencoder(whole := network(Noisy), textures(), **TINY)
    interrupted(tmp_path, textures(), after, monkeypatch, **TINY)
    resumed = network(Noisy)
    if after:  # its first weights no longer matter
        nn.init.zeros_(resumed.encoder[0].weight)
    assert train_autoencoder(resumed, textures(), checkpoint=tmp_path, **TINY) == history
    assert weights_of(resumed) == weights_of(whole)
    again = network(Noisy)  # one that has ended gives its result and trains no more
    assert train_autoencoder(again, textures(), checkpoint=tmp_path, **TINY) == history and weights_of(again) == weights_of(whole)


def test_an_early_stop_is_remembered(tmp_path, monkeypatch) -> None:
    options = TINY | {"epochs": 9, "patience": 2}
    weights, first = scripted(monkeypatch, [3, 1, 2, 3, 0, 0, 0, 0, 0]), network()
    history = train_autoencoder(first, textures(), checkpoint=tmp_path, **options)
    assert train_autoencoder(again := network(), textures(), checkpoint=tmp_path, **options) == history and len(weights) == len(history) == 4
    assert weights_of(again) == weights_of(first) == weights[1]


def test_a_checkpoint_of_another_training_is_refused(tmp_path) -> None:
    train_autoencoder(network(), textures(), checkpoint=tmp_path, identity={"images": 1}, **TINY)
    with pytest.raises(WeightsError, match="training of other data or parameters"):
        train_autoencoder(network(), textures(), checkpoint=tmp_path, identity={"images": 2}, **TINY)


CHILD = """
import os, signal, sys
from test_autoencoder import network, textures, weights_of, TINY
from defectbook.models import autoencoder
played = autoencoder._epoch
def dies(training, *rest):
    value = played(training, *rest)
    if training.rounds == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # after the epoch's steps, before they are kept
    return value
if sys.argv[2] == "die":
    autoencoder._epoch = dies
for folder in (sys.argv[1], None):
    autoencoder.train_autoencoder(model := network(), textures(), checkpoint=folder, **TINY)
    print(weights_of(model))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def start(then: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "work"), then], env=environment, capture_output=True, text=True)

    assert start("die").returncode == -signal.SIGKILL and (tmp_path / "work" / "training.json").is_file()
    ended = start("end")
    assert ended.returncode == 0, ended.stderr
    resumed, whole = ended.stdout.split()
    assert resumed == whole and len(whole) == 64


def test_bad_trainings_are_named() -> None:
    for count in (0, 1):
        with pytest.raises(DataError, match=f"{count} clean images; an autoencoder needs at least two"):
            train_autoencoder(network(), textures(2)[:count], **TINY)
    for change in ({"epochs": 0}, {"patience": 0}, {"batch_size": 0}, {"rate": 0}, {"rate": -1.0}, {"rate": np.nan}):
        with pytest.raises(ParameterError, match="all must be above 0"):
            train_autoencoder(network(), textures(), **TINY | change)
    for share in (0, 1, -0.1, np.nan):
        with pytest.raises(ParameterError, match="held_out="):
            train_autoencoder(network(), textures(), held_out=share, **TINY)
    with pytest.raises(ParameterError, match="seed -1"):
        train_autoencoder(network(), textures(), seed=-1, **TINY)
    with pytest.raises(DataError, match="round 1: the loss 'train' is nan; lower the learning rate or check the inputs"):
        train_autoencoder(network(), textures() * np.nan, **TINY)


def test_two_images_are_enough_and_a_last_batch_is_not_one_image() -> None:
    assert len(train_autoencoder(network(), textures(2), **TINY)) == 4
    sizes = []

    def noted(model, images):
        sizes.append(len(images))
        return squared_error(model, images)

    train_autoencoder(network(), textures(11), noted, **TINY | {"epochs": 1})  # ten to train on, in batches of four
    assert sizes == [5, 5, 1]


# MemAE

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.floats(0, 3), st.integers(0, 10**6))
def test_weights_are_memaes(items: int, width: int, multiple: float, seed: int) -> None:
    """Against equations 4 to 7 in float64; weights near the threshold may fall on either side."""
    rng, shrink = np.random.default_rng(seed), multiple / items if multiple < items else 0.0
    memory = ItemMemory(items, width, shrink).double()
    memory.items.data = torch.from_numpy(rng.normal(size=(items, width)))
    latents = rng.normal(size=(5, width))
    stored = memory.items.detach().numpy()
    cosine = latents @ stored.T / np.linalg.norm(latents, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    soft = np.exp(cosine) / np.exp(cosine).sum(axis=1, keepdims=True)
    hard = np.where(soft > shrink, np.maximum(soft - shrink, 0) * soft / (np.abs(soft - shrink) + 1e-12), 0)
    total = hard.sum(axis=1, keepdims=True)
    expected = np.divide(hard, total, out=np.zeros_like(hard), where=total > 0)
    found = memory.weights(torch.from_numpy(latents)).detach().numpy()
    if np.abs(soft - shrink).min() > 1e-9:
        np.testing.assert_allclose(found, expected, atol=1e-7)
    assert (found >= 0).all()
    sums = found.sum(axis=1)
    assert np.all(np.isclose(sums, 1) | (sums == 0))


def latents_of(count: int = 200, width: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(count, width)).astype(np.float32))


def memory_with(items: int = 50, shrink: float | None = None) -> ItemMemory:
    with seeded_torch(0):
        return ItemMemory(items, 12, shrink)


def test_sums_are_one_and_sparsity_grows_with_the_threshold() -> None:
    active = []
    for multiple in (0, 0.5, 1, 1.5, 2):
        weights = memory_with(shrink=multiple / 50).weights(latents_of()).detach()
        spoken = weights.sum(-1) > 0
        assert torch.allclose(weights[spoken].sum(-1), torch.ones(int(spoken.sum())), atol=1e-5)
        active.append(float((weights > 0).float().mean()))
    assert active[0] == 1 and all(after < before for before, after in zip(active, active[1:], strict=False)) and 0 < active[-1] < 0.2
    assert memory_with().shrink == 1 / 50
    assert not memory_with(shrink=np.e**2 / 50).weights(latents_of()).any()  # no softmax of cosines is as large


def test_lengths_do_not_matter_to_the_weights() -> None:
    memory, latents = memory_with(), latents_of()
    expected = memory.weights(latents)
    assert torch.allclose(memory.weights(latents * torch.logspace(-2, 3, 200)[:, None]), expected, atol=1e-5)
    memory.items.data *= torch.logspace(-2, 3, 50)[:, None]
    assert torch.allclose(memory.weights(latents), expected, atol=1e-5)


def test_mixtures_are_of_the_items_at_each_position() -> None:
    memory, latents = memory_with(), latents_of(2 * 3 * 4).reshape(2, 3, 4, 12).permute(0, 3, 1, 2)
    mixed, weights = memory(latents)
    assert mixed.shape == latents.shape and weights.shape == (2, 3, 4, 50)
    for b, i, j in np.ndindex(2, 3, 4):
        alone = memory.weights(latents[b, :, i, j])
        assert torch.allclose(weights[b, i, j], alone, atol=1e-6) and torch.allclose(mixed[b, :, i, j], alone @ memory.items, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20))
def test_entropy_is_its_formula(seed: int, items: int) -> None:
    weights = softmax(torch.from_numpy(3 * np.random.default_rng(seed).normal(size=(2, 3, 3, items))), -1)
    values = weights.numpy()
    assert float(entropy(weights)) == pytest.approx(-(values * np.log(values)).sum(-1).mean(), abs=1e-8)
    assert 0 <= float(entropy(weights)) + 1e-9 <= np.log(items) + 1e-8


def test_entropy_at_its_ends() -> None:
    assert abs(float(entropy(torch.eye(4)))) < 1e-6 and float(entropy(torch.zeros(2, 4))) == 0
    assert float(entropy(torch.full((3, 8), 1 / 8))) == pytest.approx(np.log(8), rel=1e-6)


def test_memaes_loss_and_its_gradient_at_the_items() -> None:
    model, images = network(MemoryAutoencoder, items=20).train(), to_tensor(textures(4))
    rebuilt, weights = model.recall(images)
    expected = (rebuilt - images).square().mean() + 0.5 * entropy(weights)
    assert memory_loss(0.5)(model, images).item() == pytest.approx(expected.item(), rel=1e-5)
    assert weights.shape == (4, 4, 4, 20) and torch.equal(model(images), rebuilt)
    entropy(weights).backward()  # the second part alone reaches the items too
    assert model.memory.items.grad.abs().sum() > 0
    model.zero_grad()
    memory_loss(0.0)(model, images).backward()
    assert (model.memory.items.grad.abs().sum(1) > 0).all() and model.encoder[0].weight.grad.abs().sum() > 0


def test_memae_learns() -> None:
    model = network(MemoryAutoencoder, items=20)
    before = model.memory.items.detach().clone()
    history = train_autoencoder(model, textures(20), memory_loss(), **TINY | {"epochs": 12})
    assert history[-1]["held_out"] < 0.5 * history[0]["held_out"] and not torch.equal(model.memory.items, before)


@pytest.mark.parametrize(("items", "shrink"), [(0, None), (-1, 0.0), (5, 1.0), (5, -0.1), (5, np.nan), (1, None)])
def test_memories_that_cannot_be_are_named(items: int, shrink: float | None) -> None:
    """One item has weight 1, which the default threshold of 1 / items would cut whatever the image."""
    with pytest.raises(ParameterError, match=f"items={items}, shrink={shrink}"):
        ItemMemory(items, 4, shrink)
    assert torch.equal(ItemMemory(1, 4, 0.0).weights(torch.ones(2, 4)), torch.ones(2, 1))
