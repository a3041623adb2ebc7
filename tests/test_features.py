"""Frozen features: the weights lie where they belong, and the pooling is that of the paper or of the public code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

from defectbook.core import DataError, ParameterError, Sample, resize_image
from defectbook.models.features import Backbone, embed_patches, pool_flattened, stream_embeddings


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(device="cpu")


@pytest.mark.parametrize("name, channels", [("efficientnet_lite0", (40, 112)), ("efficientnet_lite1", (40, 112)),
                                            ("efficientnet_lite2", (48, 120))])
def test_weights_matched_by_position_know_what_they_were_trained_on(name: str, channels: tuple[int, int]) -> None:
    """Two tensors of one shape swapped would pass all other checks; the class of a picture would not survive it."""
    network = Backbone(name, device="cpu")
    for picture, number in ((data.coffee()[:, 100:500], 967), (data.chelsea()[:, 75:375], 285)):  # espresso, Egyptian cat
        assert network.classify(resize_image(picture, (240, 240))[None]).argmax() == number
    grids = network(np.zeros((1, 64, 64, 3), np.uint8))
    assert network.channels == channels and [tuple(grid.shape[1:]) for grid in grids] == [(channels[0], 8, 8), (channels[1], 4, 4)]
    assert all(torch.isfinite(grid).all() for grid in grids)


def test_that_check_sees_weights_in_another_order() -> None:
    """What matching by position risks: files that list a normalisation's bias and running mean the other way round."""
    network = Backbone(device="cpu")
    for layer in network.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.bias.data, layer.running_mean = layer.running_mean, layer.bias.data
    assert network.classify(resize_image(data.coffee()[:, 100:500], (240, 240))[None]).argmax() != 967


def adaptive_mean(values: np.ndarray, count: int) -> np.ndarray:
    """The last axis averaged in `count` stretches, from floor(i n / count) to ceil((i + 1) n / count)."""
    n = values.shape[-1]
    return np.stack([values[..., i * n // count:-(-(i + 1) * n // count)].mean(-1) for i in range(count)], axis=-1)


def obvious_flattened(grids: list[torch.Tensor], pool: int, dimensions: int) -> np.ndarray:
    """The public code step by step: windows, then every entry of a window resized to the first grid, then both averagings."""
    layers, size = [], grids[0].shape[-2:]
    for grid in grids:
        n, c, h, w = grid.shape
        padded = np.pad(grid.numpy(), ((0, 0), (0, 0), (pool // 2,) * 2, (pool // 2,) * 2))
        windows = np.stack([np.stack([padded[:, :, y:y + pool, x:x + pool].reshape(n, -1) for x in range(w)], -1) for y in range(h)], -2)
        resized = F.interpolate(torch.from_numpy(windows), size=size, mode="bilinear", align_corners=False)
        layers.append(adaptive_mean(resized.permute(0, 2, 3, 1).numpy(), dimensions))
    return adaptive_mean(np.concatenate(layers, axis=-1), dimensions)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]), st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_flattened_pooling_is_the_public_codes(seed: int, pool: int, dimensions: int, first: int, second: int) -> None:
    rng = np.random.default_rng(seed)
    grids = [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((2, first, 6, 5), (2, second, 3, 3))]
    ours = embed_patches(grids, pool, pooling="flattened", dimensions=dimensions)
    assert ours.shape == (2, 6, 5, dimensions)
    assert np.allclose(ours.numpy(), obvious_flattened(grids, pool, dimensions), atol=1e-5)


def test_flattened_pooling_on_the_coarsest_grid() -> None:
    grids = [torch.full((1, 2, 4, 4), 3.0), torch.full((1, 5, 2, 2), 3.0)]
    assert embed_patches(grids, 1, "coarsest", "flattened", 7).allclose(torch.full((1, 2, 2, 7), 3.0))
    assert pool_flattened(torch.arange(6.0).view(1, 6, 1, 1), 1, 2).flatten().tolist() == [1.0, 4.0]


@pytest.mark.parametrize("words, message", [
    ({"pooling": "flat"}, "did you mean 'flattened'"), ({"dimensions": 0, "pooling": "flattened"}, "dimensions=0"),
    ({"pool": 2}, "pool=2 must be odd"), ({"grid": "fine"}, "did you mean 'finest'")])
def test_wrong_choices_are_named(words: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        embed_patches([torch.zeros(1, 2, 4, 4)], **words)


def test_an_image_smaller_than_the_stride_is_named(backbone: Backbone) -> None:
    good, tiny = Sample(np.zeros((20, 30, 3), np.uint8), name="good"), Sample(np.zeros((40, 15, 3), np.uint8), name="tiny.png")
    with pytest.raises(DataError, match=r"tiny\.png: an image of 15x40 px is smaller than the stride 16 of efficientnet_lite0"):
        list(stream_embeddings(backbone, [good, tiny], image_size=64))
    with pytest.raises(DataError, match="images of 8x8 px are smaller than the stride 16"):
        list(stream_embeddings(backbone, [good], image_size=8))
    (only,) = stream_embeddings(backbone, [good], image_size=64)
    assert only.embeddings.shape == (1, 8, 8, 152) and only.sizes == [(20, 30)]


def test_features_that_are_not_finite_name_the_image(backbone: Backbone, monkeypatch) -> None:
    forward = Backbone.forward

    def poisoned(self, images):
        grids = [grid.clone() for grid in forward(self, images)]
        for grid, image in zip(grids[1], images, strict=True):
            if image.max() == 255:
                grid[0, 0, 0] = float("nan")
        return grids

    monkeypatch.setattr(Backbone, "forward", poisoned)
    samples = [Sample(np.full((32, 32, 3), value, np.uint8), name=f"image{value}") for value in (1, 2, 255, 4)]
    with pytest.raises(DataError, match="image255: features are not finite"):
        list(stream_embeddings(backbone, samples, image_size=32))
