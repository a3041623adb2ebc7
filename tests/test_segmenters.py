"""The fifteen baselines behind one contract."""

from pathlib import Path

import numpy as np
import pytest
import torch

from defectbook.core import DataError, ParameterError, Sample, WeightsError
from defectbook.methods.segmenters import CHANNELS, PROS_BASELINES, UNetSegmenter
from defectbook.metrics.published import published
from defectbook.models.unet import NETWORKS


def boards(count: int, seed: int = 0, size: tuple[int, int] = (40, 36)) -> list[Sample]:
    """Noise with a bright bar of class 1 or 2, and the same noise as template."""
    rng, samples = np.random.default_rng(seed), []
    for number in range(count):
        template = rng.integers(0, 100, (*size, 3), np.uint8)
        image, mask = template.copy(), np.zeros(size, np.uint8)
        top = rng.integers(2, size[0] - 12)
        image[top:top + 9, 5:25] += 140
        mask[top:top + 9, 5:25] = 1 + number % 2
        samples.append(Sample(image, mask, 1 + number % 2, f"board{number}", {"template": template}, mask_threshold=None))
    return samples


def small(network: str = "unet", loss: str = "soft_dice", **options) -> UNetSegmenter:
    width = {} if NETWORKS[network].width is None else {"width": 2}
    return UNetSegmenter(network, loss, **{"side": 32, "epochs": 2, "learning_rate": 2e-2, "weights": None, "device": "cpu"} | width | options)


def test_the_baselines_are_the_rows_of_the_printed_table() -> None:
    table = published("PROS", "2")
    rows = table[table.metric == "parameters"].iloc[:15]
    wording = {"bce": "BCE", "soft_dice": "Soft Dice", "ce": "Cross Entropy"}
    for (network, loss), (row, printed) in zip(PROS_BASELINES, zip(rows.row, rows.number, strict=True), strict=True):
        assert row.endswith(wording[loss]) and NETWORKS[network].published == printed
        assert ("Siamese" in row) == NETWORKS[network].pairs and ("Diff" in row) == (network == "siamese_difference")
        assert ("MRI" in row) == (network == "unet_mri") and ("ImageNet" in row) == (network == "unet_imagenet")


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("loss", sorted(CHANNELS))
def test_every_baseline_fits_predicts_and_comes_back_bit_for_bit(tmp_path: Path, network: str, loss: str) -> None:
    samples = boards(5)
    segmenter = small(network, loss, epochs=1).fit(samples[:4])
    found = segmenter.predict(samples)
    assert found.shape == (5, 2, 32, 32) and found.dtype == np.float32 and np.allclose(found.sum(1), 1, atol=1e-5)
    assert len(segmenter.history) == 1
    segmenter.save(tmp_path / "kept")
    again = UNetSegmenter.load(tmp_path / "kept", device="cpu")
    assert again.parameters == segmenter.parameters and again.predict(samples).tobytes() == found.tobytes()
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".json", ".safetensors"]


def test_it_finds_bars_at_the_images_own_size() -> None:
    segmenter = small("siamese_difference", epochs=14).fit(boards(12))
    unseen = boards(4, seed=1, size=(50, 44))
    masks = segmenter.masks(unseen)
    truth = [sample.mask > 0 for sample in unseen]
    assert [mask.shape for mask in masks] == [(50, 44)] * 4 and all(mask.dtype == np.uint8 for mask in masks)
    overlap = sum((mask.astype(bool) & true).sum() for mask, true in zip(masks, truth, strict=True))
    assert 2 * overlap / sum(mask.sum() + true.sum() for mask, true in zip(masks, truth, strict=True)) > 0.7
    assert np.array_equal(segmenter.predict(unseen)[:, 1] > 0.5, segmenter.predict(unseen).argmax(1) == 1)


def test_a_fit_depends_on_parameters_and_samples_only(tmp_path: Path) -> None:
    samples = boards(4)
    first, twice = small(), small()
    twice.fit(boards(4, seed=9))
    state = torch.random.get_rng_state()
    one, two = (segmenter.fit(samples).predict(samples) for segmenter in (first, twice))
    assert one.tobytes() == two.tobytes() and torch.equal(torch.random.get_rng_state(), state)
    assert one.tobytes() != small(seed=1).fit(samples).predict(samples).tobytes()
    kept = small().fit(samples, checkpoint=tmp_path / "work")
    assert kept.predict(samples).tobytes() == one.tobytes() and list((tmp_path / "work").glob("round*"))
    with pytest.raises(WeightsError, match="other data or parameters"):
        small(seed=1).fit(samples, checkpoint=tmp_path / "work")


def test_stream_agrees_with_predict() -> None:
    samples = boards(5)
    segmenter = small(batch_size=2).fit(samples)
    batches = list(segmenter.stream(samples))
    assert [len(batch.samples) for batch in batches] == [2, 2, 1] and batches[0].sizes == [(40, 36)] * 2
    assert np.array_equal(np.concatenate([batch.probabilities for batch in batches]), segmenter.predict(samples))
    assert segmenter.predict([]).shape == (0, 2, 32, 32)


def test_labels_say_what_a_network_started_from() -> None:
    assert small("unet").label == "U-Net" and small("unet_mri").label == "U-Net, brain MRI (from random weights)"
    assert UNetSegmenter("unet_lite0", side=32, device="cpu").label == "U-Net, ImageNet (EfficientNet-Lite0 stands in for ResNet-18)"


def test_loading_needs_no_weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UNetSegmenter("unet_lite0", side=32, epochs=1, device="cpu").fit(boards(2)).save(tmp_path / "kept")

    def refuse(*_, **__):
        raise AssertionError("weights were looked for")

    monkeypatch.setattr("defectbook.models.unet.find_weights", refuse)
    again = UNetSegmenter.load(tmp_path / "kept", device="cpu")
    assert again.parameters["weights"] == "default" and "random" not in again.label


def lone() -> list[Sample]:
    return [Sample(np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), np.uint8), 1, "lone", mask_threshold=None)]


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: small("unet", "dice"), ParameterError, "unknown loss 'dice'"),
    (lambda: UNetSegmenter("siamse"), ParameterError, "did you mean 'siamese'"),
    (lambda: small(side=15), ParameterError, "side of at least 16 px"),
    (lambda: small("unet_lite0", side=31), ParameterError, "side of at least 32 px"),
    (lambda: small(epochs=0), ParameterError, "epochs=0"),
    (lambda: small().predict(boards(1)), ParameterError, "not fitted"),
    (lambda: small().masks(boards(1)), ParameterError, "not fitted"),
    (lambda: small().save("nowhere"), ParameterError, "not fitted"),
    (lambda: small("siamese").fit(lone()), DataError, "lone: no template"),
    (lambda: small().fit([Sample(np.zeros((40, 40, 3), np.uint8), name="sound")]), DataError, "no defective pixel"),
    (lambda: small().fit([Sample(np.zeros((40, 40, 3), np.uint8), None, 1, "bare")]), DataError, "bare: label 1 but no mask"),
    (lambda: small().fit([]), DataError, "at least 1"),
    (lambda: UNetSegmenter.load("nowhere"), WeightsError, "nowhere: not a saved UNetSegmenter"),
])
def test_bad_input_is_named_in_one_line(call, error: type, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ParameterError, match="sees no GPU"):
        small(device="cuda")


@pytest.mark.parametrize("damage", ["weights", "version", "tensor"])
def test_damaged_folders_are_named(tmp_path: Path, damage: str) -> None:
    from safetensors.numpy import load_file, save_file

    small(epochs=1).fit(boards(2)).save(tmp_path / "kept")
    state, config = tmp_path / "kept" / "state.safetensors", tmp_path / "kept" / "config.json"
    if damage == "weights":
        state.write_bytes(state.read_bytes()[:100])
    elif damage == "version":
        config.write_text(config.read_text().replace('"version": "1"', '"version": "0"'))
    else:
        save_file({name: value for name, value in load_file(state).items() if name != "head.weight"}, state)
    with pytest.raises(WeightsError, match="kept"):
        UNetSegmenter.load(tmp_path / "kept", device="cpu")
