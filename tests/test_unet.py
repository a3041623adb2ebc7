"""The five U-Nets: counted, compared with independent references, filled from published layouts, and hard to misuse."""

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defectbook.core import DataError, ParameterError, WeightsError
from defectbook.data import sources
from defectbook.data.sources import find_weights
from defectbook.models.features import fit_state, read_state
from defectbook.models.training import seeded_torch
from defectbook.models.unet import NETWORKS, UNet, build_network, count_parameters, normalise, pad_to_multiple, rename_brain


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class BrainUNet(nn.Module):
    """The published brain-MRI network's layers under its own tensor names; returns logits."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths, before = [width * 2**level for level in range(5)], 3
        for level, now in enumerate(widths, start=1):
            name = f"encoder{level}" if level < 5 else "bottleneck"
            setattr(self, name, self.block(f"enc{level}" if level < 5 else name, before, now))
            before = now
        for level in range(4, 0, -1):
            now = widths[level - 1]
            setattr(self, f"upconv{level}", nn.ConvTranspose2d(2 * now, now, 2, stride=2))
            setattr(self, f"decoder{level}", self.block(f"dec{level}", 2 * now, now))
        self.conv = nn.Conv2d(width, 1, 1)

    @staticmethod
    def block(name: str, inputs: int, outputs: int) -> nn.Sequential:
        parts = OrderedDict()
        for i, first in enumerate((inputs, outputs), start=1):
            parts |= {f"{name}conv{i}": nn.Conv2d(first, outputs, 3, padding=1, bias=False), f"{name}norm{i}": nn.BatchNorm2d(outputs),
                      f"{name}relu{i}": nn.ReLU()}
        return nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in range(1, 5):
            skips.append(x := getattr(self, f"encoder{level}")(x))
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for level in range(4, 0, -1):
            x = getattr(self, f"decoder{level}")(torch.cat((getattr(self, f"upconv{level}")(x), skips[level - 1]), 1))
        return self.conv(x)


def brain_file(folder: Path, width: int = 32) -> tuple[BrainUNet, Path]:
    """A network in the published layout, its batch statistics moved away from their start, and its file."""
    with seeded_torch(7):
        network = BrainUNet(width)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
    torch.save(network.state_dict(), folder / "brain.pt")
    return network.eval(), folder / "brain.pt"


@pytest.mark.parametrize(("name", "count"), [("unet", 31_037_633), ("unet_mri", 7_763_041), ("unet_imagenet", 14_328_209), ("siamese", 42_822_337),
                                             ("siamese_difference", 31_037_633), ("unet_lite0", 5_198_161)])
def test_full_size_counts(name: str, count: int) -> None:
    with torch.device("meta"):
        network = build_network(name, weights=None)
    assert count_parameters(network) == count
    published = NETWORKS[name].published
    assert published is None or round(count / 1e6, 1) == published
    assert count_parameters(network.requires_grad_(False)) == 0 and count_parameters(network, trained=False) == count


def test_brain_file_loads_and_gives_the_same_logits(tmp_path: Path) -> None:
    reference, path = brain_file(tmp_path)
    assert count_parameters(reference) == 7_763_041
    ours = build_network("unet_mri", weights=path).eval()
    pictures = images(0, 2, 3, 64, 48)
    standard = (pictures - pictures.mean((2, 3), keepdim=True)) / pictures.std((2, 3), keepdim=True, correction=0)
    with torch.no_grad():
        expected, found = reference(standard), ours(pictures)
    assert expected.std() > 0.01 and torch.allclose(found, expected, atol=1e-4)
    assert {rename_brain(name) for name in reference.state_dict()} == set(ours.state_dict())


def test_brain_file_keeps_a_new_head_for_other_classes(tmp_path: Path) -> None:
    reference, path = brain_file(tmp_path)
    ours = build_network("unet_mri", classes=2, weights=path, seed=3)
    fresh = build_network("unet_mri", classes=2, weights=None, seed=3)
    assert torch.equal(ours.head.weight, fresh.head.weight) and torch.equal(ours.down[0][0].weight, reference.encoder1.enc1conv1.weight)


@pytest.mark.parametrize("damage", ["narrow", "truncated", "lacking", "absent"])
def test_brain_files_that_do_not_fit_are_named(tmp_path: Path, damage: str) -> None:
    _, path = brain_file(tmp_path, 8 if damage == "narrow" else 32)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "lacking":
        torch.save({name: value for name, value in read_state(path).items() if "upconv3" not in name}, path)
    elif damage == "absent":
        path = tmp_path / "nowhere.pt"
    with pytest.raises(WeightsError, match=path.name) as caught:
        build_network("unet_mri", weights=path)
    assert "\n" not in str(caught.value) and ("up.1" in str(caught.value)) == (damage == "lacking")


def test_own_weights_load(tmp_path: Path) -> None:
    first = build_network("siamese", width=2, seed=1)
    torch.save(first.state_dict(), tmp_path / "own.pt")
    second = build_network("siamese", width=2, seed=2, weights=tmp_path / "own.pt")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_resnet_encoder_takes_torchvisions_layout(tmp_path: Path) -> None:
    with seeded_torch(1):
        classifier = timm.create_model("resnet18", pretrained=False)  # torchvision's tensor names, the classifier's included
    assert {"fc.weight", "layer4.1.bn2.running_var"} <= set(classifier.state_dict())
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    network = build_network("unet_imagenet", weights=tmp_path / "resnet18.pth").eval()
    pictures = images(0, 1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(network.network.encoder(pictures)[-1], classifier.eval().forward_features(pictures), atol=1e-4)
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="other.pth"):
        build_network("unet_imagenet", weights=tmp_path / "other.pth")


def test_stand_in_has_the_packaged_imagenet_features() -> None:
    network = build_network("unet_lite0").eval()
    path = find_weights("efficientnet_lite0", download=False)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(fit_state(read_state(path), whole, path))
    pictures = images(3, 1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(pictures, intermediates_only=True)
        found = network.network.encoder(pictures)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[1:], expected, strict=True))
    assert "stands in" in NETWORKS["unet_lite0"].label and network.mean == (0.5,) * 3


def test_nothing_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network connection was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEFECTBOOK_WEIGHTS", raising=False)
    build_network("unet_lite0")
    build_network("unet_imagenet", weights=None)
    with pytest.raises(WeightsError, match="resnet18-f37072fd.pth.*unet_lite0"):
        build_network("unet_imagenet")
    with pytest.raises(WeightsError, match="unet-e012d006.pt.*weights=None"):
        build_network("unet_mri")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ParameterError, match=r"pip install 'defectbook\[sam\]'"):
        build_network("unet_lite0", weights=None)


def test_difference_network_step_by_step() -> None:
    """Against the definition, image and template encoded one after the other."""
    network = build_network("siamese_difference", width=3, seed=0).eval()
    pictures, templates = images(0, 2, 3, 32, 32), images(1, 2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = network.encode(pictures), network.encode(templates)
        grid = ours[-1]
        for step in range(4):
            skip = (ours[3 - step] - theirs[3 - step]).abs()
            grid = network.joined[step](torch.cat([network.up[step](grid), skip], 1))
        assert torch.allclose(network(pictures, templates), network.head(grid), atol=1e-5)
        assert not torch.allclose(network(pictures, templates), network(pictures, pictures), atol=1e-3)


def test_concatenating_network_step_by_step() -> None:
    network = build_network("siamese", width=2, seed=0).eval()
    pictures, templates = images(0, 2, 3, 32, 32), images(1, 2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = network.encode(pictures), network.encode(templates)
        grid = torch.cat([ours[-1], theirs[-1]], 1)
        assert grid.shape[1] == 64 and network.up[0](grid).shape[1] == 32  # at width 64: 2048 and 1024
        for step in range(4):
            grid = network.joined[step](torch.cat([network.up[step](grid), ours[3 - step], theirs[3 - step]], 1))
        assert torch.allclose(network(pictures, templates), network.head(grid), atol=1e-5)


@given(height=st.integers(4, 19), width=st.integers(4, 19))
@settings(max_examples=20, deadline=None)
def test_any_size_is_padded_and_cropped(height: int, width: int) -> None:
    network = PLAIN
    pictures = images(height * 20 + width, 1, 3, height, width)
    padded = pad_to_multiple(pictures, 4)
    assert all(side % 4 == 0 and 0 <= side - own < 4 for side, own in zip(padded.shape[2:], (height, width), strict=True))
    assert torch.equal(padded[:, :, :height, :width], pictures) and torch.equal(padded[:, :, -1, :width], pictures[:, :, -1])
    with torch.no_grad():
        assert torch.allclose(network(pictures), network(padded)[:, :, :height, :width], atol=1e-5)


with seeded_torch(0):
    PLAIN = UNet(width=2, depth=2).eval()


def test_normalise() -> None:
    pictures = images(0, 2, 3, 8, 8)
    fixed = normalise(pictures, (0.1, 0.2, 0.3), 0.5)
    assert torch.allclose(fixed[:, 2], (pictures[:, 2] - 0.3) / 0.5)
    assert torch.equal(normalise(torch.full((1, 3, 4, 4), 0.25), None, None), torch.zeros(1, 3, 4, 4))


def test_seed_decides_the_weights_and_nothing_else_changes() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_network("unet", width=2, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, again.head.weight) and not torch.equal(first.head.weight, other.head.weight)


SIAMESE = build_network("siamese", width=2)
FLAT = images(0, 1, 3, 32, 32)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: PLAIN(images(0, 1, 3, 3, 9)), "9x3 px are smaller than one 4x4 patch"),
    (lambda: build_network("unet_lite0", weights=None)(images(0, 1, 3, 31, 64)), "64x31 px are smaller than one 32x32 patch"),
    (lambda: SIAMESE(FLAT), "got none"),
    (lambda: SIAMESE(FLAT, FLAT[:, :, :16]), r"got one of shape \(1, 3, 16, 32\)"),
    (lambda: PLAIN(FLAT, FLAT), "templates for a network that sees one image"),
    (lambda: PLAIN(FLAT[:, :1]), r"give floats in 0..1, shaped \(N, 3, H, W\)"),
    (lambda: PLAIN((FLAT * 255).to(torch.uint8)), "uint8"),
    (lambda: build_network("unet", width=2).train()(images(0, 1, 3, 16, 16)), "too small to train on alone"),
])
def test_wrong_inputs_are_data_errors_of_one_line(call, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: build_network("unett"), "did you mean 'unet'"),
    (lambda: build_network("unet_lite0", width=8), "leave width out"),
    (lambda: build_network("unet_mri", width=8), "have width 32"),
    (lambda: UNet(joining="subtract"), "unknown joining"),
    (lambda: UNet(width=0), "at least 1"),
])
def test_wrong_parameters(call, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        call()


def test_figures_of_the_chapters_exercises() -> None:
    with torch.device("meta"):
        assert round(count_parameters(UNet(depth=3)) / 1e6, 2) == 7.70
    # Siamese skips with the image's own bottleneck: 1024 -> 512 instead of 2048 -> 1024, and 512 channels fewer to join.
    fewer = (2048 * 1024 * 4 + 1024) - (1024 * 512 * 4 + 512) + 512 * 512 * 9
    assert round((42_822_337 - fewer) / 1e6, 1) == 34.2
