"""SAM's parts called directly: the published answers, its checkpoints, frames and prompts, gradients, and the cache."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defectbook.core import DataError, ParameterError, WeightsError
from defectbook.data import sources
from defectbook.models import sam as room
from defectbook.models.embeddings import EmbeddingCache
from defectbook.models.sam import (
    SAM_MODELS,
    HQPromptModel,
    Official,
    PromptModel,
    Prompts,
    build_prompt_parts,
    build_sam,
    check_layout,
    identify_checkpoint,
    load_sam,
    parameter_count,
    pick_best,
    sam_package,
    scale_image,
    scaled_size,
    toy_sam,
    with_side,
)

SIZES = ((100, 60), (50, 200), (128, 128))
ROWS = [2, 0, 1, 1]
POINTS = torch.tensor([[[3.0, 4], [20, 30]], [[10, 90], [0, 0]], [[199, 49], [100, 10]], [[5.25, 5.5], [6, 6]]])
LABELS = torch.tensor([[1, 0], [1, -1], [0, 0], [1, 0]])
BOXES = torch.tensor([[1.0, 2, 50, 60], [5, 5, 40, 80], [10, 10, 150, 40], [0, 0, 200, 50]])


def pictures(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def toy_hq() -> HQPromptModel:
    """HQ-SAM's parts at the toy's size."""
    package, toy = sam_package("segment_anything_hq"), toy_sam()
    modeling = package.modeling
    torch.manual_seed(0)
    encoder = modeling.ImageEncoderViT(depth=3, embed_dim=32, img_size=128, mlp_ratio=4, num_heads=2, patch_size=16, qkv_bias=True,
                                       use_rel_pos=True, global_attn_indexes=(1, 2), window_size=14, out_chans=64)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=128, num_heads=8)
    decoder = modeling.MaskDecoderHQ(num_multimask_outputs=3, transformer=transformer, transformer_dim=64, iou_head_depth=3,
                                     iou_head_hidden_dim=64, vit_dim=32)
    return HQPromptModel(encoder, toy.prompt_encoder, decoder, name="toy_hq", side=128).eval()


def official_answer(model: PromptModel, image: np.ndarray, prompts: Prompts, row: int, several: bool) -> dict[str, Tensor]:
    """What `Sam.forward` of the model's package says of one prompt."""
    from segment_anything.utils.transforms import ResizeLongestSide

    package = sam_package("segment_anything_hq" if isinstance(model, HQPromptModel) else "segment_anything")
    sam, resize = package.modeling.Sam(model.image_encoder, model.prompt_encoder, model.mask_decoder).eval(), ResizeLongestSide(model.side)
    size, one = image.shape[:2], slice(row, row + 1)
    request = {"image": torch.as_tensor(resize.apply_image(image)).permute(2, 0, 1).float(), "original_size": size}
    if prompts.points.shape[1]:
        request |= {"point_coords": torch.as_tensor(resize.apply_coords(prompts.points[one].numpy(), size)), "point_labels": prompts.labels[one]}
    if prompts.boxes is not None:
        request["boxes"] = torch.as_tensor(resize.apply_boxes(prompts.boxes[one].numpy(), size))
    if prompts.logits is not None:
        request["mask_inputs"] = prompts.logits[one]
    with torch.no_grad():
        return sam([request], several)[0]


# ---- the published answers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_says_what_sam_says_one_by_one(count: int, boxes: bool, earlier: bool, several: bool) -> None:
    model, images = toy_sam(), pictures()
    logits = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1)) if earlier else None
    prompts = Prompts(POINTS[:, :count], LABELS[:, :count], BOXES if boxes else None, logits)
    with torch.no_grad():
        found, iou = model.decode(model.embed(images), prompts, ROWS, several)
    assert found.shape == (4, 3 if several else 1, 32, 32) and iou.shape == found.shape[:2]
    for index, row in enumerate(ROWS):
        expected = official_answer(model, images[row], prompts, index, several)
        torch.testing.assert_close(found[index:index + 1], expected["low_res_logits"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(iou[index:index + 1], expected["iou_predictions"], rtol=1e-3, atol=1e-5)
        masks = model.masks(found[index:index + 1], SIZES[row])
        assert masks.shape == (1, found.shape[1], *SIZES[row])
        assert float(((masks > 0) == expected["masks"]).float().mean()) > 0.999  # a logit next to zero may fall on either side


@pytest.mark.parametrize("several", [False, True])
def test_hq_sam_says_what_its_package_says(several: bool) -> None:
    """Its forward pass takes the best of three by itself; here the three come back, refined, and `pick_best` does it."""
    model, images, prompts = toy_hq(), pictures(), Prompts(POINTS, LABELS)
    with torch.no_grad():
        embedding = model.embed(images)
        found, iou = model.decode(embedding, prompts, ROWS, several)
    assert [tuple(skip.shape) for skip in embedding.skips] == [(3, 32, 8, 8)]
    assert found.shape[1] == iou.shape[1] == (3 if several else 1)
    best, estimate = pick_best(found, iou)
    for index, row in enumerate(ROWS):
        expected = official_answer(model, images[row], prompts, index, several)
        torch.testing.assert_close(best[index:index + 1], expected["low_res_logits"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(estimate[index], expected["iou_predictions"].reshape(1), rtol=1e-3, atol=1e-5)


def test_gradients_are_those_of_the_published_modules() -> None:
    """One batch against the prompts one after the other through `MaskDecoder.predict_masks`."""
    model, images, prompts = toy_sam(), pictures(), Prompts(POINTS, LABELS)
    names = ("image_encoder.blocks.1.mlp.lin2.weight", "image_encoder.neck.2.weight", "mask_decoder.mask_tokens.weight",
             "prompt_encoder.point_embeddings.1.weight")
    parameters = {name: model.get_parameter(name) for name in names}
    model.decode(model.embed(images), prompts, ROWS)[0].square().sum().backward()
    batched = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    for index, row in enumerate(ROWS):
        scale = model.side / max(SIZES[row])
        height, width = scaled_size(SIZES[row], model.side)
        assert abs(height - SIZES[row][0] * scale) <= 0.5
        ratio = torch.tensor([width / SIZES[row][1], height / SIZES[row][0]])
        sparse, dense = model.prompt_encoder((POINTS[index:index + 1] * ratio, LABELS[index:index + 1]), None, None)
        main = model.image_encoder(model.frame(images[row:row + 1]))
        masks, _ = model.mask_decoder.predict_masks(main, model.prompt_encoder.get_dense_pe(), sparse, dense)
        masks[:, :1].square().sum().backward()
    for name, p in parameters.items():
        assert float(p.grad.abs().max()) > 0
        torch.testing.assert_close(batched[name], p.grad, rtol=1e-2, atol=1e-3 * float(p.grad.abs().max()))


def test_no_gradients_where_none_are_wanted() -> None:
    model = toy_sam()
    with torch.no_grad():
        assert not model.decode(model.embed(pictures()), Prompts.empty(3))[0].requires_grad
    frozen = model.freeze()
    assert frozen is model and not model.embed(pictures()).main.requires_grad and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.bool])
def test_labels_of_any_whole_type(kind: torch.dtype) -> None:
    model, labels = toy_sam(), LABELS.clamp(min=0)
    sizes = [SIZES[row] for row in ROWS]
    assert torch.equal(model.tokens(Prompts(POINTS.double(), labels.to(kind)), sizes), model.tokens(Prompts(POINTS, labels), sizes))


def test_prompts_do_not_mix() -> None:
    """An answer depends on its own prompt and image only, wherever they stand in the batch."""
    model = toy_sam()
    with torch.no_grad():
        embedding = model.embed(pictures())
        forward, _ = model.decode(embedding, Prompts(POINTS, LABELS), ROWS)
        backward, _ = model.decode(embedding, Prompts(POINTS.flip(0), LABELS.flip(0)), ROWS[::-1])
        other, _ = model.decode(model.embed(pictures()[:2] + pictures(7)[2:]), Prompts(POINTS, LABELS), ROWS)
    torch.testing.assert_close(forward, backward.flip(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(forward[1:], other[1:], rtol=1e-3, atol=1e-5)
    assert float((forward[0] - other[0]).abs().max()) > 1e-3


def test_a_box_of_nan_is_no_box() -> None:
    model, boxes = toy_sam(), BOXES.clone()
    boxes[1:] = torch.nan
    tokens = model.tokens(Prompts(POINTS, LABELS, boxes), [SIZES[row] for row in ROWS])
    every = model.tokens(Prompts(POINTS, LABELS, BOXES), [SIZES[row] for row in ROWS])
    assert torch.equal(tokens[0], every[0]) and torch.equal(tokens[1, :2], every[1, :2])
    assert torch.equal(tokens[1:, 2:], model.prompt_encoder.not_a_point_embed.weight.expand(3, 2, -1))


def test_the_hooks_of_a_subclass() -> None:
    seen = {}

    class Skipping(PromptModel):
        def encode(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            return super().encode(frames)[0], (F.avg_pool2d(frames, 4),)

        def draw(self, prompts: Prompts, sizes) -> Tensor:
            seen["draw"] = (len(prompts), [tuple(size) for size in sizes])
            return super().draw(prompts, sizes)

        def upscale(self, source: Tensor, embedding: room.Embedding, rows: Tensor, drawn: Tensor | None) -> Tensor:
            return super().upscale(source, embedding, rows, drawn) + embedding.skips[0].mean(1, keepdim=True)[rows]

    toy = toy_sam()
    parts = toy.image_encoder, toy.prompt_encoder, toy.mask_decoder
    model = Skipping(*parts, name="skipping", side=128).eval()
    with torch.no_grad():
        embedding = model.embed(pictures())
        with_skips, _ = model.decode(embedding, Prompts(POINTS, LABELS), ROWS)
        without, _ = toy.decode(embedding, Prompts(POINTS, LABELS), ROWS)
    sizes = [picture.shape[:2] for picture in pictures()]
    assert seen["draw"] == (4, [sizes[row] for row in ROWS]) and embedding.skips[0].shape == (3, 3, 32, 32)
    # Where the frame is padding, the skip is zero and adds nothing.
    assert torch.equal(with_skips[1, 0, :, 22:], without[1, 0, :, 22:]) and not torch.equal(with_skips[1, 0, :, :19], without[1, 0, :, :19])


# ---- frames ----------------------------------------------------------------------------------------------------------------------
@given(st.tuples(st.integers(16, 3000), st.integers(16, 3000)), st.sampled_from([128, 256, 1024]))
@settings(max_examples=100, deadline=None)
def test_sizes_are_scaled_as_sam_does(size: tuple[int, int], side: int) -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    assert scaled_size(size, side) == ResizeLongestSide.get_preprocess_shape(*size, side)
    assert max(scaled_size(size, side)) == side


@given(st.integers(16, 90), st.integers(16, 300), st.booleans())
@settings(max_examples=20, deadline=None)
def test_frames_are_sams_to_the_bit(height: int, width: int, turned: bool) -> None:
    from segment_anything.modeling import Sam
    from segment_anything.utils.transforms import ResizeLongestSide

    model = toy_sam()
    image = np.random.default_rng(height).integers(0, 256, (width, height, 3) if turned else (height, width, 3), np.uint8)
    scaled = ResizeLongestSide(128).apply_image(image)
    assert np.array_equal(scale_image(image, 128), scaled)
    sam = Sam(model.image_encoder, model.prompt_encoder, model.mask_decoder)
    assert torch.equal(model.frame([image])[0], sam.preprocess(torch.as_tensor(scaled).permute(2, 0, 1)))
    # The logits that lie inside are those whose centre is a pixel of the image in the frame.
    white = model.frame([np.full_like(image, 255)])[0, 0] != 0
    assert torch.equal(model.inside([image.shape[:2]])[0, 0], white[2::4, 2::4])


def test_masks_come_back_as_sam_brings_them() -> None:
    from segment_anything.modeling import Sam

    model = toy_sam()
    sam = Sam(model.image_encoder, model.prompt_encoder, model.mask_decoder)
    logits = torch.randn(2, 3, 32, 32)
    for size in (*SIZES, (700, 30), (17, 900)):
        assert torch.equal(model.masks(logits, size), sam.postprocess_masks(logits, scaled_size(size, 128), size))


@pytest.mark.parametrize(("image", "message"), [
    (np.zeros((15, 300, 3), np.uint8), "300x15 px is smaller than a patch"),
    (np.zeros((64, 64), np.uint8), r"shape \(64, 64\)"),
    (np.zeros((64, 64, 3), np.float32), "type float32"),
    (np.zeros((64, 64, 4), np.uint8), r"shape \(64, 64, 4\)"),
])
def test_images_that_are_none(image: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        toy_sam().embed([image])
    with pytest.raises(DataError, match="no images"):
        toy_sam().embed([])


# ---- prompts ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("prompts", "message"), [
    (lambda: Prompts.clicks([[(60, 5, True)]]), r"prompt 0: click at \(60, 5\) lies outside of its image, 60x100 px"),
    (lambda: Prompts.clicks([[(5, 5, True), (5, -1, False)]]), r"click at \(5, -1\) lies outside"),
    (lambda: Prompts.clicks([[(float("nan"), 5, True)]]), r"click at \(nan, 5\) lies outside"),
    (lambda: Prompts(torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.long), torch.tensor([[0.0, 0, 62, 10]])), "corner of a box"),
    (lambda: Prompts(torch.zeros(1, 0, 2), torch.zeros(1, 0, dtype=torch.long), None, torch.full((1, 1, 32, 32), torch.nan)), "not finite"),
])
def test_prompts_that_cannot_be(prompts, message: str) -> None:
    model = toy_sam()
    with pytest.raises(DataError, match=message):
        model.decode(model.embed(pictures()[:1]), prompts())


@pytest.mark.parametrize(("arguments", "message"), [
    ((torch.zeros(2, 3, 2), torch.zeros(2, 2, dtype=torch.long)), r"points \(2, 3, 2\) with labels \(2, 2\)"),
    ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)), r"give \(B, P, 2\)"),
    ((torch.zeros(1, 1, 2), torch.full((1, 1), 2)), "labels of clicks"),
    ((torch.zeros(1, 1, 2), torch.ones(1, 1)), "labels of clicks"),
    ((torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.long), torch.zeros(2, 4)), r"boxes \(2, 4\) for 1 prompts"),
    ((torch.zeros(1, 1, 2), torch.ones(1, 1, dtype=torch.long), None, torch.zeros(1, 3, 32, 32)), r"logits \(1, 3, 32, 32\)"),
])
def test_prompts_of_other_shapes(arguments: tuple, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Prompts(*arguments)


def test_rows_that_name_no_image() -> None:
    model = toy_sam()
    embedding = model.embed(pictures())
    for prompts, rows, message in ((Prompts.empty(2), None, "2 prompts for 3 images"), (Prompts.empty(2), [0, 3], r"rows \[0, 3\]"),
                                   (Prompts.empty(2), [0], r"rows \[0\] for 2 prompts"), (Prompts.empty(1), [-1], r"rows \[-1\]")):
        with pytest.raises(ParameterError, match=message):
            model.decode(embedding, prompts, rows)
    with pytest.raises(ParameterError, match="earlier logits of 16x16; toy takes those that it gave, 32x32"):
        model.decode(embedding, Prompts(torch.zeros(3, 0, 2), torch.zeros(3, 0, dtype=torch.long), None, torch.zeros(3, 1, 16, 16)))


# ---- published models and their checkpoints --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "encoder", "decoder", "tensors"), [
    ("vit_b", 89_670_912, 4_058_340, 314), ("vit_l", 308_278_272, 4_058_340, 482), ("vit_h", 637_026_048, 4_058_340, 594),
    ("hq_vit_b", 89_670_912, 5_129_444, 339)])
def test_published_models_without_memory(name: str, encoder: int, decoder: int, tensors: int) -> None:
    model = build_sam(name, empty=True)
    assert (parameter_count(model.image_encoder), parameter_count(model.mask_decoder)) == (encoder, decoder)
    assert len(model.state_dict()) == tensors and all(p.is_meta for p in model.parameters()) and model.side == 1024
    assert identify_checkpoint(model.state_dict()) == name
    if name == "vit_b":  # "4.06 M parameters" and "the other 89.7 M", as the paper on adaptation says
        assert round(decoder / 1e6, 2) == 4.06 and round((parameter_count(model) - decoder) / 1e6, 1) == 89.7


def test_the_official_layout_of_vit_b() -> None:
    shapes = {name: tuple(value.shape) for name, value in build_sam("vit_b", empty=True).state_dict().items()}
    expected = {
        "image_encoder.pos_embed": (1, 64, 64, 768), "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "image_encoder.blocks.0.attn.rel_pos_h": (27, 64), "image_encoder.blocks.11.attn.rel_pos_w": (127, 64),
        "image_encoder.neck.0.weight": (256, 768, 1, 1),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128), "prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "mask_decoder.transformer.layers.1.mlp.lin1.weight": (2048, 256), "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256)}
    assert {name: shapes[name] for name in expected} == expected


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory) -> Path:
    """A generated checkpoint in ViT-B's official layout."""
    path = tmp_path_factory.mktemp("sam") / "sam_vit_b.pth"
    generator = torch.Generator().manual_seed(0)
    state = build_sam("vit_b", empty=True).state_dict()
    torch.save({name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()}, path)
    return path


def test_a_generated_vit_b_is_loaded_and_works(vit_b: Path) -> None:
    model = load_sam("vit_b", vit_b, device="cpu", verify=False)
    assert not model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert parameter_count(model.mask_decoder) == 4_058_340 and model.image_encoder.pos_embed.shape == (1, 64, 64, 768)
    state = torch.load(vit_b, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        small = with_side(model, 256)  # the frame of PROS: a sixteenth of the tokens
        embedding = small.embed(pictures()[:1])
        logits, iou = small.decode(embedding, Prompts.empty(1))
    assert embedding.main.shape == (1, 256, 16, 16) and logits.shape == (1, 1, 64, 64) and iou.shape == (1, 1)
    assert bool(torch.isfinite(logits).all()) and small.fingerprint.startswith("vit_b:256:")


@pytest.fixture(scope="module")
def mobile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mobile") / "mobile_sam.pt"
    state = build_sam("mobile").state_dict()
    for name, value in state.items():
        if name.endswith("attention_biases"):  # zeros at the start: nobody would notice if they were not used
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    torch.save(state, path)
    return path


def test_mobile_sam_embeds_and_has_a_fixed_frame(mobile: Path) -> None:
    model = load_sam("mobile", mobile, device="cpu", verify=False)
    assert 10.0e6 < parameter_count(model) < 10.2e6 and type(model) is PromptModel
    attention = [module for module in model.image_encoder.modules() if hasattr(module, "attention_biases")]
    assert len(attention) == 10
    for module in attention:  # TinyViT makes a table of them when eval() is called, which must be after loading
        assert torch.equal(module.ab, module.attention_biases[:, module.attention_bias_idxs]) and bool(module.ab.any())
    with torch.no_grad():
        embedding = model.embed(pictures()[:1])
        logits, _ = model.decode(embedding, Prompts.clicks([[(5, 5, True)]]), several=True)
    assert embedding.main.shape == (1, 256, 64, 64) and not embedding.skips and logits.shape == (1, 3, 256, 256)
    with pytest.raises(ParameterError, match="encoder of mobile works at 1024 px only"):
        with_side(model, 512)


def test_where_weights_are_looked_for(mobile: Path, tmp_path, monkeypatch) -> None:
    """An explicit file, then the model's variable, then the folders; each verified by its hash."""
    monkeypatch.delenv("DEFECTBOOK_MOBILE_SAM", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="mobile_sam.pt: has the layout, but sha256 is .* expected 6dbb90523a35330f.*verify=False"):
        load_sam("mobile", mobile, device="cpu")
    monkeypatch.setitem(sources.manifest()["weights"]["mobile_sam"], "sha256", hashlib.sha256(mobile.read_bytes()).hexdigest())
    explicit = load_sam("mobile", mobile, device="cpu")
    with pytest.raises(WeightsError, match="weights 'mobile_sam' were not found at"):
        load_sam("mobile", device="cpu", download=False)
    monkeypatch.setenv("DEFECTBOOK_MOBILE_SAM", str(tmp_path / "none.pt"))
    with pytest.raises(WeightsError, match=r"none.pt: no such weights file \(given .* by DEFECTBOOK_MOBILE_SAM\); download https"):
        load_sam("mobile", device="cpu")
    monkeypatch.setenv("DEFECTBOOK_MOBILE_SAM", str(mobile))
    assert load_sam("mobile", device="cpu", download=False).fingerprint == explicit.fingerprint
    monkeypatch.delenv("DEFECTBOOK_MOBILE_SAM")
    monkeypatch.setenv("DEFECTBOOK_WEIGHTS", str(mobile.parent))
    assert load_sam("mobile", device="cpu", download=False).fingerprint == explicit.fingerprint
    with pytest.raises(WeightsError, match="absent.pt: no such weights file .*; download https"):
        load_sam("mobile", tmp_path / "absent.pt", device="cpu")


def saved(path: Path, **tensors: Tensor) -> Path:
    torch.save({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("name", "tensors", "message"), [
    ("vit_b", {"image_encoder__pos_embed": torch.zeros(1, 64, 64, 1024)}, r"this is a vit_l checkpoint, not vit_b; use load_sam\('vit_l', ...\)"),
    ("vit_b", {"image_encoder__pos_embed": torch.zeros(1, 64, 64, 768), "mask_decoder__hf_token__weight": torch.zeros(1, 256)},
     r"this is a hq_vit_b checkpoint, not vit_b; use load_sam\('hq_vit_b', ...\)"),
    ("vit_h", {"image_encoder__patch_embed__seq__0__c__weight": torch.zeros(32, 3, 3, 3)}, r"this is a mobile checkpoint, not vit_h"),
    ("vit_b", {"image_encoder__pos_embed": torch.zeros(1, 64, 64, 1280), "mask_decoder__hf_token__weight": torch.zeros(1, 256)},
     "this is a hq_vit_h checkpoint, not vit_b; no model here takes it; give weights of vit_b"),
    ("vit_b", {"conv1__weight": torch.zeros(3)}, r"no SAM checkpoint \(1 tensors, 'conv1.weight' first\); give weights of vit_b"),
    ("vit_b", {"image_encoder__pos_embed": torch.zeros(1, 64, 64, 768)}, "tensor 'image_encoder.blocks.0.attn.proj.bias' is missing; fetch"),
])
def test_files_of_other_models(tmp_path, name: str, tensors: dict, message: str) -> None:
    path = saved(tmp_path / "w.pth", **tensors)
    with pytest.raises(WeightsError, match=f"w.pth: .*{message}") as error:
        load_sam(name, path, device="cpu")
    assert "\n" not in str(error.value)


def test_layouts_that_almost_fit() -> None:
    model = build_sam("vit_b", empty=True)
    state = model.state_dict()
    check_layout("vit_b", state, model, "w.pth")
    with pytest.raises(WeightsError, match="tensor 'adapter.weight' is not part of vit_b"):
        check_layout("vit_b", {**state, "adapter.weight": torch.zeros(3)}, model, "w.pth")
    with pytest.raises(WeightsError, match=r"tensor 'image_encoder.pos_embed' has shape \(1, 16, 16, 768\), expected \(1, 64, 64, 768\)"):
        check_layout("vit_b", {**state, "image_encoder.pos_embed": torch.zeros(1, 16, 16, 768)}, model, "w.pth")


def test_truncated_files_and_pickled_code(mobile: Path, tmp_path) -> None:
    import pickle

    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    half, trap = tmp_path / "half.pt", tmp_path / "trap.pt"
    half.write_bytes(mobile.read_bytes()[:1_000_000])
    trap.write_bytes(pickle.dumps({"weight": Trap()}, protocol=2))
    for path in (half, trap):
        with pytest.raises(WeightsError, match=f"{path.name}: cannot be read as weights .*fetch the file again"):
            load_sam("mobile", path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_hq_weights_are_verified_by_their_md5(tmp_path, monkeypatch) -> None:
    path = tmp_path / "hq.pth"
    path.write_bytes(b"weights")
    item = SAM_MODELS["hq_vit_b"]
    with pytest.raises(WeightsError, match="md5 is .* expected c6b8953247bcfdc8"):
        room._check_official(item, path)
    monkeypatch.setitem(sources.manifest()["weights"]["sam_hq_vit_b"], "md5", hashlib.md5(b"weights").hexdigest())
    room._check_official(item, path)


def test_the_manifest_knows_every_published_model() -> None:
    for name, item in SAM_MODELS.items():
        if isinstance(item, Official):
            known = sources.entry("weights", item.weights)
            assert known["url"].startswith("https://") and (len(known["sha256"]) == 64 or len(known["md5"]) == 32), name
            assert item.variable == f"DEFECTBOOK_{item.weights.upper()}"
    # The names of Meta's files carry the beginning of their md5, which is no sha256.
    assert sources.entry("weights", "sam_vit_b")["file"] == "sam_vit_b_01ec64.pth"


def test_unknown_names_and_missing_cuda(monkeypatch) -> None:
    with pytest.raises(ParameterError, match="unknown SAM model 'vit_bb': did you mean 'vit_b'"):
        load_sam("vit_bb")
    with pytest.raises(ParameterError, match="unknown published SAM model 'sam_lite'"):
        build_sam("sam_lite")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParameterError, match="sees no GPU"):
        load_sam("vit_h", device="cuda")


def test_the_package_is_asked_for_by_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ParameterError, match=r"needs the package segment-anything .*pip install 'defectbook\[sam\]'"):
        load_sam("vit_b", device="cpu")
    with pytest.raises(ParameterError, match="segment-anything"):
        build_prompt_parts()


def test_models_of_later_chapters_register_themselves(tmp_path, monkeypatch) -> None:
    (tmp_path / "later_sam.py").write_text(
        "from defectbook.models.sam import SAM_MODELS, toy_sam\n"
        "SAM_MODELS['later'] = lambda checkpoint, device, download, verify: toy_sam(seed=3)\n")
    (tmp_path / "forgetful_sam.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name, module in {"later": "later_sam", "forgetful": "forgetful_sam", "absent": "defectbook.models.no_such_sam"}.items():
        monkeypatch.setitem(SAM_MODELS, name, module)
    assert load_sam("later", device="cpu").fingerprint == toy_sam(seed=3).fingerprint
    assert load_sam("later", device="cpu").name == "toy"
    with pytest.raises(ParameterError, match="forgetful_sam did not register a loader for 'forgetful'"):
        load_sam("forgetful", device="cpu")
    with pytest.raises(ParameterError, match="absent needs the module defectbook.models.no_such_sam"):
        load_sam("absent", device="cpu")


def test_the_old_imports_of_hq_leave_timm_alone() -> None:
    code = ("import warnings; warnings.simplefilter('error', FutureWarning); warnings.simplefilter('error', UserWarning)\n"
            "import sys, timm\n"
            "before = {name: sys.modules.get(name) for name in ('timm.models.layers', 'timm.models.registry')}\n"
            "from defectbook.models.sam import build_sam\n"
            "build_sam('mobile')\n"
            "assert type(timm.create_model('tiny_vit_5m_224')).__module__.startswith('timm.'), 'registry overwritten'\n"
            "assert {name: sys.modules.get(name) for name in before} == before, 'stand-ins left behind'\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


# ---- identity, another frame, the cache ------------------------------------------------------------------------------------------
def test_fingerprints_follow_the_weights() -> None:
    model = toy_sam()
    first, of_embeddings = model.fingerprint, model.embedding_fingerprint
    assert first == toy_sam().fingerprint != toy_sam(seed=1).fingerprint
    with torch.no_grad():
        model.mask_decoder.iou_token.weight.add_(1)
    assert model.fingerprint != first and model.embedding_fingerprint == of_embeddings
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    model.embed(pictures()).main.sum().backward()
    optimiser.step()
    assert model.embedding_fingerprint != of_embeddings
    model.load_state_dict(toy_sam().state_dict())
    assert model.fingerprint == first


def test_the_same_side_changes_nothing_and_another_works() -> None:
    model, images = toy_sam(), pictures()
    with torch.no_grad():
        before = model.decode(model.embed(images), Prompts.empty(3))[0]
        after = with_side(model, 128)
        torch.testing.assert_close(after.decode(after.embed(images), Prompts.empty(3))[0], before, rtol=1e-4, atol=1e-5)
        small = with_side(toy_sam(), 48)
        logits = small.decode(small.embed(images), Prompts(POINTS[1:], LABELS[1:]), ROWS[1:])[0]
    assert small.mask_size == (12, 12) and logits.shape == (3, 1, 12, 12) and small.inside(SIZES).shape == (3, 1, 12, 12)
    for side in (40, 0):
        with pytest.raises(ParameterError, match=f"side={side} px is no multiple of 16"):
            with_side(toy_sam(), side)


@pytest.mark.parametrize("folder", [False, True])
def test_cached_embeddings_are_those_computed_to_the_bit(tmp_path, folder: bool) -> None:
    model, images = toy_hq().freeze(), pictures()
    cache = EmbeddingCache(model, tmp_path / "cache" if folder else None)
    first = cache.embed(images)
    again = cache.embed(images[::-1] + images[:1])
    assert (cache.misses, cache.hits) == (3, 4) and again.sizes == (*SIZES[::-1], SIZES[0])
    for index, row in enumerate((2, 1, 0, 0)):
        alone = model.embed(images[row:row + 1])
        assert torch.equal(again.main[index], first.main[row]) and torch.equal(first.main[row], alone.main[0])
        assert torch.equal(again.skips[0][index], alone.skips[0][0])
    assert not again.main.requires_grad
    if folder:  # another process finds what is there
        other = EmbeddingCache(toy_hq().freeze(), tmp_path / "cache")
        assert torch.equal(other.embed(images).main, first.main) and other.misses == 0


def test_the_cache_tells_weights_and_pixels_apart(tmp_path) -> None:
    model, images = toy_sam().freeze(), pictures()
    cache = EmbeddingCache(model, tmp_path)
    cache.embed(images)
    changed = [image.copy() for image in images]
    changed[1][0, 0, 0] ^= 1
    cache.embed(changed)
    assert cache.misses == 4
    cache.embed([images[2].reshape(64, 256, 3)])  # the same bytes, another image
    assert cache.misses == 5
    with torch.no_grad():
        model.image_encoder.patch_embed.proj.bias.add_(1)
    assert torch.equal(cache.embed(images).main[:1], model.embed(images[:1]).main) and cache.misses == 8
    EmbeddingCache(model, tmp_path, half=True).embed(images)
    assert len(list(tmp_path.glob("*.safetensors"))) == 11


@pytest.mark.parametrize("folder", [False, True])
def test_the_least_recently_used_embedding_goes(tmp_path, folder: bool) -> None:
    model, images = toy_sam().freeze(), pictures()
    one = EmbeddingCache(model)
    one.embed(images[:1])
    cache = EmbeddingCache(model, tmp_path if folder else None, limit_mb=2.5 * one.size / 2**20)
    cache.embed(images[:2])
    cache.embed(images[:1])
    cache.embed(images[2:])  # image 1 goes
    assert cache.size <= 2.5 * one.size and (cache.misses, cache.hits) == (3, 1)
    cache.embed([images[0], images[2]])
    assert (cache.misses, cache.hits) == (3, 3)
    cache.embed(images[1:2])
    assert cache.misses == 4
    if folder:
        assert len(list(tmp_path.iterdir())) == 2
    # All are returned even when they do not fit together.
    assert EmbeddingCache(model, limit_mb=0.001).embed(images).main.shape[0] == 3


def test_half_and_damaged_entries(tmp_path) -> None:
    model, images = toy_sam().freeze(), pictures()
    half = EmbeddingCache(model, tmp_path, half=True)
    first, exact = half.embed(images), model.embed(images)
    assert torch.equal(half.embed(images).main, first.main) and first.main.dtype == torch.float32
    assert 0 < float((first.main - exact.main).abs().max()) < 1e-2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(half.embed(images).main, first.main) and half.misses == 6
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(half.embed(images).main, first.main) and half.misses == 9


def test_what_the_cache_refuses(tmp_path) -> None:
    model = toy_sam()
    for limits in ({"limit_mb": 0}, {"batch": 0}):
        with pytest.raises(ParameterError, match="both must be above 0"):
            EmbeddingCache(model, **limits)
    with pytest.raises(ParameterError, match=r"in training mode; call eval\(\) or freeze\(\) first"):
        EmbeddingCache(model.train()).embed(pictures())
    with torch.no_grad():
        model.eval().image_encoder.neck[0].weight.fill_(torch.nan)
    with pytest.raises(DataError, match="image 0: its embedding is not finite"):
        EmbeddingCache(model, tmp_path).embed(pictures())
    assert not list(tmp_path.iterdir())


def test_batches_in_the_cache() -> None:
    model, images = toy_sam().freeze(), pictures() + pictures(1)
    together = EmbeddingCache(model, batch=4).embed(images)
    torch.testing.assert_close(together.main, model.embed(images).main, rtol=1e-3, atol=1e-5)
