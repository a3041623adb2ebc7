"""sam_lite: its shapes, its discs, its file. Trained weights are not needed: the network starts from ImageNet's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from defectbook.core import ParameterError, WeightsError
from defectbook.models.features import Backbone
from defectbook.models.sam import Prompts, load_sam, parameter_count, toy_sam
from defectbook.models.sam_lite import RADIUS, STRENGTH, TAPS, SamLite, imagenet_lite, load_lite, save_lite


@pytest.fixture(scope="module")
def model() -> SamLite:
    return imagenet_lite(128).eval()


def picture(seed: int = 0, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def test_the_encoder_is_lite0(model: SamLite) -> None:
    frames = model.frame([picture()])
    backbone = Backbone("efficientnet_lite0", (0, 1, 2, 3, 4), device="cpu")
    x, taps = model.image_encoder.stem(frames), []
    with torch.no_grad():
        for number, block in enumerate(model.image_encoder.blocks):
            x = block(x)
            taps += [x] if number in TAPS else []
        for ours, theirs in zip(taps, backbone(picture()[None]), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    assert len(model.image_encoder.blocks) == 16


def test_shapes_and_counts(model: SamLite) -> None:
    embedding = model.embed([picture(), picture(1, (64, 128))])
    assert embedding.main.shape == (2, 128, 16, 16) and [skip.shape[1:] for skip in embedding.skips] == [(32, 32, 32), (16, 64, 64)]
    logits, iou = model.decode(embedding, Prompts.clicks([[(3, 4, True)], [(100, 60, False)]]), several=True)
    assert logits.shape == (2, 3, 64, 64) and iou.shape == (2, 3) and model.mask_size == (64, 64)
    assert model.decode(embedding, Prompts.empty(2))[0].shape == (2, 1, 64, 64)
    assert parameter_count(model) < 4e6 and parameter_count(SamLite(256)) == parameter_count(model)


def test_batches_answer_as_one_by_one(model: SamLite) -> None:
    pictures, clicks = [picture(2), picture(3)], [[(10, 10, True)], [(90, 30, True)]]
    with torch.no_grad():
        together, _ = model.decode(model.embed(pictures), Prompts.clicks(clicks))
        for row in range(2):
            alone, _ = model.decode(model.embed(pictures[row:row + 1]), Prompts.clicks(clicks[row:row + 1]))
            assert torch.allclose(alone[0], together[row], atol=1e-4)


def test_statistics_are_the_stored_ones_from_the_start() -> None:
    model = imagenet_lite(64)
    with torch.no_grad():
        assert torch.equal(model.embed([picture(0, (64, 64))]).main, model.eval().embed([picture(0, (64, 64))]).main)


def test_gradients_reach_every_part_but_not_the_statistics() -> None:
    model = imagenet_lite(64).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    logits, iou = model.decode(model.embed([picture(0, (64, 64))]), Prompts.clicks([[(5, 5, True)]]), several=True)
    (logits.square().mean() + iou.square().mean()).backward()
    encoder = model.image_encoder
    for part in (encoder.stem, encoder.blocks[0], encoder.blocks[15], encoder.lateral, encoder.skips, model.prompt_encoder.mask_downscaling,
                 model.mask_decoder.transformer, model.click_convs, model.mix_convs):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_a_click_is_a_disc(model: SamLite) -> None:
    prompts = Prompts.clicks([[(64, 32, True), (100, 100, False)]])
    drawn = model.draw(prompts, [(128, 128)])[0, 0]
    y, x = np.mgrid[:64, :64]
    for (cx, cy), value in (((64, 32), STRENGTH), ((100, 100), -STRENGTH)):
        disc = (x - (cx + 0.5) / 2 + 0.5) ** 2 + (y - (cy + 0.5) / 2 + 0.5) ** 2 <= RADIUS**2
        assert (drawn.numpy() == value).tolist() == disc.tolist()
    assert model.draw(Prompts.empty(2), [(128, 128)] * 2).abs().sum() == 0


def test_a_disc_lies_where_the_image_lies_in_its_frame(model: SamLite) -> None:
    drawn = model.draw(Prompts.clicks([[(255, 63, True)]]), [(64, 256)])[0, 0]  # the frame shows it at half size, in its upper half
    rows, columns = np.nonzero(drawn.numpy())
    assert columns.max() == 63 and abs(rows.mean() - 15.6) < 1


def test_earlier_answers_are_halved_cut_and_overruled(model: SamLite) -> None:
    earlier = torch.full((1, 1, 64, 64), 3.0)
    earlier[..., :32] = 40.0
    drawn = model.draw(Prompts(torch.tensor([[[20.0, 20.0]]]), torch.tensor([[0]]), None, earlier), [(128, 128)])[0, 0]
    assert drawn[40, 50] == 1.5 and drawn[40, 10] == STRENGTH / 2 and drawn[10, 10] == -STRENGTH
    with pytest.raises(ParameterError, match="earlier logits"):
        model.draw(Prompts.clicks([[]], torch.zeros(1, 1, 32, 32)), [(128, 128)])


def test_the_file_comes_back(model: SamLite, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "mine.safetensors"
    save_lite(model, path, "for a test")
    again = load_sam("sam_lite", path, "cpu")
    assert again.side == 128 and not again.training
    for name, value in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], value, rtol=1e-3, atol=1e-6)
        assert "running" not in name or torch.equal(again.state_dict()[name], value)
    assert path.stat().st_size < 20e6
    monkeypatch.setenv("DEFECTBOOK_SAM_LITE", str(path))
    assert load_lite().side == 128


def test_bad_files(model: SamLite, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    save_lite(model, path)
    with pytest.raises(WeightsError, match="no such weights file"):
        load_lite(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cut.safetensors"):
        load_lite(tmp_path / "cut.safetensors")
    state = load_file(path)
    save_file(state, tmp_path / "bare.safetensors")  # no word on its size
    with pytest.raises(WeightsError, match="save_lite"):
        load_lite(tmp_path / "bare.safetensors")
    torch.save({name: value.clone() for name, value in toy_sam().state_dict().items()}, tmp_path / "toy.pth")
    with pytest.raises(WeightsError, match="toy.pth"):
        load_lite(tmp_path / "toy.pth")
    broken = SamLite(64)
    with torch.no_grad():
        broken.mask_decoder.iou_token.weight.fill_(1e6)  # infinite in float16
    with pytest.raises(WeightsError, match="float16"):
        save_lite(broken, tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()


@pytest.mark.parametrize(("side", "channels"), [(32, 128), (100, 128), (128, 24), (128, 8)])
def test_refused_sizes(side: int, channels: int) -> None:
    with pytest.raises(ParameterError, match=f"side={side}"):
        SamLite(side, channels)


def test_another_width_is_kept_in_the_file(tmp_path: Path) -> None:
    save_lite(SamLite(64, 32), tmp_path / "narrow.safetensors")
    assert load_lite(tmp_path / "narrow.safetensors").channels == 32


def test_first_weights_depend_on_the_seed_only() -> None:
    one, same, other = imagenet_lite(64, seed=1), imagenet_lite(64, seed=1), imagenet_lite(64, seed=2)
    weights = [m.mask_decoder.iou_token.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(one.image_encoder.blocks[3].state_dict()["conv_pw.weight"], other.image_encoder.blocks[3].state_dict()["conv_pw.weight"])
