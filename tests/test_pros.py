import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample, StoreError, WeightsError, generator
from defectbook.methods import pros
from defectbook.methods.pros import PROS, REMAINDERS, AdaptedSam, Adapter, at_side, cached_prefix, count_learned, remainder_range, take_apart
from defectbook.metrics.published import published
from defectbook.models.sam import Prompts, build_sam, toy_sam, with_side
from defectbook.models.sam_lite import imagenet_lite
from defectbook.models.segmentation import TrainedPart

SIDE = 64
TINY = {"side": SIDE, "epochs": 2, "learning_rate": 1e-2, "device": "cpu"}


def samples(count: int = 6, size: int = 80, seed: int = 0) -> list[Sample]:
    """Dark noise with a bright square each."""
    rng, made = generator(seed), []
    for number in range(count):
        image, mask = rng.integers(0, 60, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint8)
        y, x = rng.integers(5, 50, 2)
        mask[y:y + 20, x:x + 20] = 1
        made.append(Sample(image + 150 * mask[..., None], mask, 1, f"square {number}", mask_threshold=None))
    return made


@pytest.fixture(scope="module")
def toy():
    return toy_sam(SIDE)


@pytest.fixture(scope="module")
def lite():
    return imagenet_lite(SIDE, 32).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(generator(1).random((3, 3, SIDE, SIDE), np.float32))


@pytest.fixture(scope="module")
def fitted(toy) -> PROS:
    return PROS(toy, **TINY).fit(samples())


def empty_answer(model, images: torch.Tensor) -> torch.Tensor:
    """What the frozen model says of the empty prompt, by its own methods, from uint8 images of its frame's size."""
    with torch.no_grad():
        arrays = [(image * 255).permute(1, 2, 0).numpy().round().astype(np.uint8) for image in images]
        logits, _ = model.decode(model.embed(arrays), Prompts.empty(len(arrays)))
        return model.masks(logits, (model.side, model.side))


# Adapters

@given(width=st.integers(2, 40), hidden=st.one_of(st.none(), st.integers(1, 12)), norms=st.sampled_from((0, 1, 2)))
@settings(max_examples=25, deadline=None)
def test_an_adapter_starts_as_the_identity_and_every_part_of_it_learns(width: int, hidden: int | None, norms: int) -> None:
    adapter = Adapter(width, hidden, norms)
    between = max(1, width // 4) if hidden is None else hidden
    assert count_learned(adapter) == 2 * width * between + between + width + 2 * width * norms
    x = torch.randn(5, width)
    assert torch.equal(adapter(x), x)
    optimiser, target = torch.optim.AdamW(adapter.parameters(), 1e-2), torch.randn(5, width)
    start = {name: value.clone() for name, value in adapter.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        ((adapter(x) - target) ** 2).mean().backward()
        optimiser.step()
    assert all(not torch.equal(value, start[name]) for name, value in adapter.named_parameters())


def test_on_a_grid_each_pixel_is_adapted_alone() -> None:
    adapter = Adapter(6)
    torch.nn.init.ones_(adapter.after.weight)
    grid = torch.randn(2, 6, 3, 5)
    found = adapter.on_grid(grid)
    assert found.shape == grid.shape and not torch.allclose(found, grid)
    assert torch.allclose(found[1, :, 2, 4], adapter(grid[1, :, 2, 4]), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"norms": 3}, {"bottleneck": 0}])
def test_impossible_adapters_are_refused(wrong: dict) -> None:
    with pytest.raises(ParameterError, match="norms=.*bottleneck="):
        Adapter(8, **wrong)


# The counts of the paper

def test_counts_of_vit_b_have_the_slope_of_table_3() -> None:
    table = published("PROS", "3")
    printed = {int(row.column[2:]): row.value for row in table[table["metric"] == "parameters"].itertuples()}
    assert sorted(printed) == [1, 4, 7, 9, 11, 12]
    counts = {k: count_learned(AdaptedSam(build_sam("vit_b", empty=True), k, remainder=())) for k in printed}
    assert counts == {k: 298_944 * k for k in printed}
    low, high = remainder_range(printed, 298_944)
    assert (low, high) == (169_224, 172_392)
    for remainder in (low, high):  # the last ones that round to all six
        assert all(abs(counts[k] + remainder - float(text) * 1e6) <= 5000 for k, text in printed.items())
    for remainder in (low - 1, high + 1):
        assert any(abs(counts[k] + remainder - float(text) * 1e6) > 5000 for k, text in printed.items())


def test_the_range_is_empty_when_nothing_fits() -> None:
    low, high = remainder_range({1: "0.47", 2: "0.47"}, 298_944)
    assert low > high


@pytest.mark.parametrize(("remainder", "count"), [((), 0), (("mask_token",), 256), (("hypernetwork",), 139_808), (("upscaling",), 73_952),
                                                  (("norms",), 4_608), (tuple(REMAINDERS), 218_624)])
def test_parameters_of_each_remainder(remainder: tuple[str, ...], count: int) -> None:
    assert count_learned(AdaptedSam(build_sam("vit_b", empty=True), 1, remainder=remainder)) == 298_944 + count


# The adapted model

@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["toy", "lite"])
@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_at_the_start_it_is_the_frozen_model(where: str, kind: str, adapters: int, images: torch.Tensor, request) -> None:
    model = request.getfixturevalue(kind)
    eight_bit = (images * 255).round() / 255
    network = PROS(model, adapters=adapters, where=where, **TINY).network
    assert torch.allclose(network(eight_bit).detach(), empty_answer(model, eight_bit), atol=1e-4)


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["toy", "lite"])
def test_only_what_is_stated_learns_and_the_given_model_stays(where: str, kind: str, request) -> None:
    model = request.getfixturevalue(kind)
    before = model.fingerprint
    segmenter = PROS(model, adapters=2, where=where, **TINY)
    state = {name: value.clone() for name, value in segmenter.network.state_dict().items()}
    segmenter.fit(samples())
    changed = {name for name, value in segmenter.network.state_dict().items() if not torch.equal(value, state[name])}
    stated = {name for name, value in segmenter.network.named_parameters() if value.requires_grad}
    assert changed == stated == set(TrainedPart(segmenter.network).names)
    learned = ("adapters.", "model.mask_decoder.mask_tokens.first", "model.mask_decoder.output_hypernetworks_mlps.0.")
    assert all(name.startswith(learned) for name in stated) and all(any(name.startswith(start) for name in stated) for start in learned)
    assert model.fingerprint == before and all(p.requires_grad for p in model.parameters())


def test_adapters_follow_the_last_blocks(lite) -> None:
    chain = take_apart(lite)
    assert len(chain.blocks) == 16 and chain.widths[-1] == 320 and chain.widths[0] == 16
    network = PROS(lite, adapters=16, **TINY).network
    assert [adapter.down.in_features for adapter in network.adapters] == chain.widths
    assert [adapter.down.in_features for adapter in PROS(lite, adapters=3, **TINY).network.adapters] == chain.widths[-3:]


@pytest.mark.parametrize("kind", ["toy", "lite"])
def test_each_adapter_is_used(kind: str, images: torch.Tensor, request) -> None:
    model = request.getfixturevalue(kind)
    for where in ("encoder", "decoder"):
        most = len(take_apart(model).blocks) if where == "encoder" else 3
        network = PROS(model, adapters=most, where=where, **TINY).network
        start = network(images).detach()
        for adapter in network.adapters:
            torch.nn.init.constant_(adapter.after.bias, 0.3)
            assert not torch.allclose(network(images).detach(), start, atol=1e-5), where
            torch.nn.init.zeros_(adapter.after.bias)


def test_hq_sam_is_adapted_with_its_early_features(images: torch.Tensor) -> None:
    pytest.importorskip("segment_anything_hq")
    chain = take_apart(build_sam("hq_vit_b", empty=True))
    assert chain.taps == (2, 11) and chain.widths == [768] * 12
    model = with_side(build_sam("hq_vit_b"), SIDE)
    expected = empty_answer(model, images[:1])
    network = AdaptedSam(model, 2)
    grid, early = network.prefix((images[:1] * 255).round() / 255)
    assert grid.shape == early.shape == (1, 768, 4, 4) and not torch.equal(grid, early)
    assert torch.allclose(network.rest(grid, early).detach(), expected, atol=1e-3)


def test_a_side_is_reached_by_interpolation_or_anew(toy, lite) -> None:
    assert at_side(toy, SIDE) is toy
    assert at_side(lite, 96).side == 96 and lite.side == SIDE
    assert PROS(toy, **{**TINY, "side": 32}).network.model.side == 32 and toy.side == SIDE


# The cached prefix

@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["toy", "lite"])
def test_cached_and_uncached_training_agree(where: str, kind: str, request) -> None:
    model = request.getfixturevalue(kind)
    found = {cache: PROS(model, adapters=2, where=where, cache=cache, **TINY).fit(samples()) for cache in ("none", "float32", "float16")}
    states = {cache: TrainedPart(segmenter.network).state_dict() for cache, segmenter in found.items()}
    for name, value in states["none"].items():  # not bit for bit: the encoder sees other batches
        assert torch.allclose(states["float32"][name], value, atol=1e-3), name
    maps = {cache: segmenter.predict(samples(2, seed=5)) for cache, segmenter in found.items()}
    assert np.allclose(maps["float32"], maps["none"], atol=1e-3) and np.allclose(maps["float16"], maps["none"], atol=2e-2)


def test_a_large_cache_lies_on_disk_and_goes_away(toy, tmp_path: Path, capsys) -> None:
    network = PROS(toy, **TINY).network
    images = torch.from_numpy(generator(2).integers(0, 255, (5, 3, SIDE, SIDE), dtype=np.uint8))
    with cached_prefix(network, images, batch_size=2) as kept, cached_prefix(network, images, limit_mb=1e-3, folder=tmp_path, batch_size=2) as filed:
        assert all(isinstance(part, torch.Tensor) for part in kept) and all(isinstance(part, np.memmap) for part in filed)
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(kept, filed, strict=True)) and len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir()) and "MB, more than" in capsys.readouterr().err
    one = PROS(toy, **TINY).fit(samples(), cache_mb=1e-3, cache_folder=tmp_path)
    other = PROS(toy, **TINY).fit(samples())
    assert np.array_equal(one.predict(samples(1)), other.predict(samples(1)))  # the same bytes in another place


def test_a_full_disk_is_named_before_anything_is_written(toy, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pros.shutil, "disk_usage", lambda place: type("usage", (), {"free": 100}))
    with pytest.raises(StoreError, match="are free; give another cache_folder"):
        PROS(toy, **TINY).fit(samples(), cache_mb=1e-3, cache_folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_beyond_half_precision_are_refused(toy) -> None:
    segmenter = PROS(toy, cache="float16", **TINY)
    with torch.no_grad():
        segmenter.network.model.image_encoder.blocks[-1].mlp.lin2.bias.fill_(1e5)
    with pytest.raises(DataError, match="not finite in float16; use float32"):
        segmenter.fit(samples())


# The segmenter

def test_it_learns_squares(toy) -> None:
    segmenter = PROS(toy, **{**TINY, "epochs": 12}).fit(samples(12))
    assert segmenter.history[-1]["train"] < 0.6 * segmenter.history[0]["train"]
    probabilities = segmenter.predict(samples(3, seed=9))
    assert probabilities.shape == (3, 2, SIDE, SIDE) and probabilities.dtype == np.float32 and np.allclose(probabilities.sum(1), 1, atol=1e-5)
    masks = segmenter.masks(samples(3, size=90, seed=9))
    assert all(mask.shape == (90, 90) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1} for mask in masks)


@pytest.mark.parametrize("loss", ["ce", "bce", "soft_dice"])
def test_batches_without_a_defect_are_learned_from(toy, loss: str) -> None:
    sound = [Sample(sample.image, np.zeros((80, 80), np.uint8), 0, sample.name, mask_threshold=None) for sample in samples(7)]
    segmenter = PROS(toy, loss=loss, **{**TINY, "batch_size": 2}).fit([samples(1)[0], *sound])
    assert all(np.isfinite(list(losses.values())).all() for losses in segmenter.history)
    assert np.isfinite(segmenter.predict(samples(1))).all()


def test_the_same_call_gives_the_same_bytes(toy, fitted: PROS) -> None:
    again = PROS(toy, **TINY).fit(samples())
    assert np.array_equal(again.predict(samples(2)), fitted.predict(samples(2)))
    other = PROS(toy, seed=1, **TINY).fit(samples())
    assert not np.array_equal(other.predict(samples(2)), fitted.predict(samples(2)))


def test_a_second_fit_starts_anew(toy, fitted: PROS) -> None:
    segmenter = PROS(toy, **TINY).fit(samples(4, seed=3)).fit(samples())
    assert np.array_equal(segmenter.predict(samples(2)), fitted.predict(samples(2)))


def test_held_out_samples_pick_the_epoch(toy) -> None:
    segmenter = PROS(toy, held_out=0.34, **TINY).fit(samples())
    assert all(set(losses) == {"train", "held_out"} for losses in segmenter.history)


def test_nothing_asked_nothing_answered(fitted: PROS) -> None:
    assert fitted.predict([]).shape == (0, 2, SIDE, SIDE) and fitted.masks([]) == []


# Saved and loaded

def test_saved_and_loaded_it_answers_the_same(toy, fitted: PROS, tmp_path: Path) -> None:
    fitted.save(tmp_path / "pros")
    again = PROS.load(tmp_path / "pros", "cpu", model=toy)
    assert again.parameters == fitted.parameters and np.array_equal(again.predict(samples(2)), fitted.predict(samples(2)))
    learned = 4 * count_learned(fitted.network)
    assert (tmp_path / "pros" / "state.safetensors").stat().st_size < learned + 4096  # the frozen model is not in it
    assert json.loads((tmp_path / "pros" / "config.json").read_text())["parameters"]["fingerprint"] == toy.fingerprint


def test_adapters_of_other_weights_are_refused(toy, fitted: PROS, tmp_path: Path) -> None:
    fitted.save(tmp_path / "pros")
    with pytest.raises(WeightsError, match="adapts toy:64:.*, and this model is toy:64:"):
        PROS.load(tmp_path / "pros", "cpu", model=toy_sam(SIDE, seed=1))
    with pytest.raises(WeightsError, match="'toy' that has no name here; pass it as model"):
        PROS.load(tmp_path / "pros", "cpu")
    with pytest.raises(WeightsError, match="expected toy:64:nonsense"):
        PROS(toy, fingerprint="toy:64:nonsense", **TINY)
    assert PROS(toy, fingerprint=toy.fingerprint, **TINY).parameters == PROS(toy, **TINY).parameters


@pytest.mark.parametrize("damage", ["missing", "other", "cut", "lacks"])
def test_a_damaged_folder_is_named(toy, fitted: PROS, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "pros"
    fitted.save(folder)
    if damage == "missing":
        (folder / "state.safetensors").unlink()
    elif damage == "cut":
        (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-100])
    else:
        config = json.loads((folder / "config.json").read_text())
        if damage == "other":
            config["method"] = "UNetSegmenter"
        else:
            config["parameters"]["adapters"] = 2
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"{folder}: not a saved PROS"):
        PROS.load(folder, "cpu", model=toy)


def test_named_weights_are_found_again(lite, tmp_path: Path) -> None:
    from defectbook.models.sam_lite import save_lite

    path = tmp_path / "lite.safetensors"
    save_lite(lite, path)
    segmenter = PROS("sam_lite", path, **TINY).fit(samples(2))
    segmenter.save(tmp_path / "pros")
    again = PROS.load(tmp_path / "pros", "cpu")
    assert again.label == "PROS (sam_lite, K = 1)" and np.array_equal(again.predict(samples(1)), segmenter.predict(samples(1)))
    path.unlink()
    with pytest.raises(WeightsError, match="no such weights file"):
        PROS.load(tmp_path / "pros", "cpu")


# Bad input

@pytest.mark.parametrize(("wrong", "message"), [
    ({"adapters": 3}, "adapters=3: toy has 2 places in its encoder; give 0 to 2"),
    ({"adapters": 4, "where": "decoder"}, "adapters=4: toy has 3 places in its decoder; give 0 to 3"),
    ({"adapters": -1}, "adapters=-1"),
    ({"adapters": 0, "remainder": "none"}, "nothing would learn"),
    ({"where": "neck"}, "unknown place for adapters 'neck'"),
    ({"remainder": ["mask_tokens"]}, "unknown remainder 'mask_tokens'.*did you mean 'mask_token'"),
    ({"loss": "focal"}, "unknown loss 'focal'"),
    ({"cache": "bfloat16"}, "unknown cache 'bfloat16'"),
    ({"epochs": 0}, "epochs=0"),
    ({"side": 40}, "no multiple of 16"),
    ({"norms": 5}, "norms=5"),
])
def test_impossible_parameters_are_refused(toy, wrong: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message) as raised:
        PROS(toy, **{**TINY, **wrong})
    assert "\n" not in str(raised.value)


def test_an_encoder_that_is_no_chain_is_refused_by_name() -> None:
    pytest.importorskip("segment_anything_hq")
    model = build_sam("mobile")
    with pytest.raises(ParameterError, match="the encoder of mobile is no chain of equal blocks; give where='decoder'"):
        AdaptedSam(model, 1)
    assert count_learned(AdaptedSam(model, 3, where="decoder", remainder=())) == 3 * count_learned(Adapter(256))


def test_more_adapters_than_lite_has_blocks(lite) -> None:
    with pytest.raises(ParameterError, match="adapters=17: sam_lite has 16 places in its encoder; give 0 to 16"):
        PROS(lite, adapters=17, **TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(toy) -> None:
    with pytest.raises(ParameterError, match="(?i)cuda"):
        PROS(toy, **{**TINY, "device": "cuda"})


def test_samples_that_cannot_be_learned_from(toy) -> None:
    sound = [Sample(np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), np.uint8), 0, "sound")]
    small = [Sample(np.zeros((12, 80, 3), np.uint8), np.ones((12, 80), np.uint8), 1, "sliver", mask_threshold=None)]
    bare = [Sample(np.zeros((80, 80, 3), np.uint8), None, 1, "bare")]
    for given_samples, message in ((sound, "no defective pixel in any of 1 masks"), (small, "sliver: 80x12 px is smaller than a patch"),
                                   (bare, "bare: .*no mask"), ([], "lengths")):
        with pytest.raises(DataError, match=message):
            PROS(toy, **TINY).fit(given_samples)


def test_predicting_refuses_slivers_and_the_unfitted(toy, fitted: PROS) -> None:
    with pytest.raises(DataError, match="sliver: 12x80 px is smaller than a patch"):
        fitted.predict([Sample(np.zeros((80, 12, 3), np.uint8), name="sliver")])
    with pytest.raises(ParameterError, match="not fitted"):
        PROS(toy, **TINY).predict(samples(1))
    with pytest.raises(ParameterError, match="not fitted"):
        PROS(toy, **TINY).save("nowhere")


# Interrupted

FIT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import torch
from test_pros import SIDE, TINY, samples
from defectbook.methods.pros import PROS
from defectbook.models.sam import toy_sam
torch.set_num_threads(1)
segmenter = PROS(toy_sam(SIDE), **{{**TINY, "epochs": 40}}).fit(samples(), checkpoint=sys.argv[1] or None)
assert len(segmenter.history) == 40
print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in segmenter.network.state_dict().values())).hexdigest())
"""


@pytest.mark.slow
def test_a_killed_fit_ends_with_the_same_weights(tmp_path: Path) -> None:
    script = FIT.format(tests=str(Path(__file__).parent))

    def start(folder: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, folder], stdout=subprocess.PIPE, text=True)

    expected = start("").communicate()[0]
    child, path = start(str(tmp_path / "kept")), tmp_path / "kept" / "training.json"
    deadline = time.monotonic() + 120
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and path.is_file(), "the training ended before it could be killed"
    assert 0 < len(json.loads(path.read_text())["history"]) < 40
    assert start(str(tmp_path / "kept")).communicate()[0] == expected and len(expected) == 65


def test_a_kept_training_of_other_settings_is_refused(toy, tmp_path: Path) -> None:
    PROS(toy, **TINY).fit(samples(), tmp_path / "kept")
    longer = PROS(toy, **{**TINY, "epochs": 3}).fit(samples(), tmp_path / "kept")  # more epochs go on
    assert len(longer.history) == 3
    with pytest.raises(WeightsError, match="another folder"):
        PROS(toy, adapters=2, **TINY).fit(samples(), tmp_path / "kept")
    with pytest.raises(WeightsError, match="another folder"):
        PROS(toy, **TINY).fit(samples(5), tmp_path / "kept")
