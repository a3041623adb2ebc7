"""Synthetic defects: exact masks for every kind, size and seed; bad input; mixing; the same bytes from any number of workers."""

import json
import pickle
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from defectbook.core import DataError, ParameterError, Sample, generator
from defectbook.data.draem import (
    CHANGES,
    TEXTURES,
    Draem,
    GeneratedTextures,
    TextureFolder,
    perlin_mask,
    perlin_noise,
    rotate,
)
from defectbook.data.mixing import (
    KINDS,
    PNI_KINDS,
    EpochSampler,
    Mixer,
    SyntheticDefects,
    equal_parts,
    make_kind,
    make_loader,
    synthesise_batch,
)
from defectbook.data.synthesis import MIN_CHANGE, CutPaste, DefectKind, Manual, Pros, Scar, choose_ink, is_grey, jitter, settle

NAMES_DRAWN = {"pros": {"line", "dot", "circle"}, "manual": {"stroke", "blob"}}
SURFACES = ("noise", "ramp", "black", "white", "even", "binary", "colour")


def surface(name: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A normal image of uint8 (height, width, 3), grey except for "colour"."""
    rng = np.random.default_rng(seed)
    if name == "colour":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    grey = {"noise": rng.normal(128, 20, (height, width)), "ramp": np.linspace(0, 255, height * width).reshape(height, width),
            "black": np.zeros((height, width)), "white": np.full((height, width), 255.0), "even": np.full((height, width), 128.0),
            "binary": 255.0 * (rng.random((height, width)) < 0.5)}[name]
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def differing(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The obvious definition: a pixel changed if any of its three values did."""
    return np.any(before != after, axis=2)


# ---------------------------------------------------------------- the contract

@pytest.mark.parametrize("name", sorted(KINDS))
@settings(max_examples=60, deadline=None)
@given(height=st.integers(16, 80), width=st.integers(16, 80), seed=st.integers(0, 2**32), ground=st.sampled_from(SURFACES))
def test_mask_is_exactly_the_changed_pixels(name, height, width, seed, ground):
    image = surface(ground, height, width, seed)
    before = image.copy()
    damaged, mask, kind = make_kind(name)(image, generator(seed))
    assert (image == before).all(), "the input was modified"
    assert damaged.dtype == np.uint8 and damaged.shape == image.shape and not np.shares_memory(damaged, image)
    assert mask.dtype == np.uint8 and mask.shape == image.shape[:2]
    assert np.array_equal(mask, differing(image, damaged).astype(np.uint8))
    assert kind in NAMES_DRAWN.get(name, {name})
    if name == "normal":
        assert not mask.any()
    else:
        change = np.abs(damaged.astype(float) - image)[mask == 1]
        assert mask.any() and change.mean() >= MIN_CHANGE - 1e-6
    again, mask_again, kind_again = make_kind(name)(image, generator(seed))
    assert (again == damaged).all() and (mask_again == mask).all() and kind_again == kind


@pytest.mark.parametrize("shape", [(16, 300), (300, 16), (17, 16)])
@pytest.mark.parametrize("name", sorted(set(KINDS) - {"normal"}))
def test_long_images(name, shape):
    image = surface("noise", *shape)
    for seed in range(20):
        damaged, mask, _ = make_kind(name)(image, generator(seed))
        assert np.array_equal(mask == 1, differing(image, damaged)) and mask.any()


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"normal"}))
def test_grey_stays_grey(name):
    image = surface("noise", 64, 64)
    assert all(is_grey(make_kind(name)(image, generator(seed))[0]) for seed in range(10))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_seeds_matter(name):
    image = surface("noise", 96, 96)
    results = {make_kind(name)(image, generator(seed))[0].tobytes() for seed in range(6)}
    assert len(results) == (1 if name == "normal" else 6)


@given(seed=st.integers(0, 2**32), height=st.integers(1, 20), width=st.integers(1, 20), levels=st.sampled_from([2, 4, 256]))
@settings(max_examples=200, deadline=None)
def test_settle(seed, height, width, levels):
    rng = np.random.default_rng(seed)
    # Few levels make coincidences frequent; 255 and 0 are among them.
    image, painted = ((rng.integers(0, levels, (height, width, 3)) * (255 // (levels - 1))).astype(np.uint8) for _ in range(2))
    support = (rng.random((height, width)) < rng.random()).astype(np.uint8) * 255
    result, mask = settle(image, painted, support)
    inside = support != 0
    assert np.array_equal(mask, inside.astype(np.uint8)) and np.array_equal(differing(image, result), inside)
    assert (result[~inside] == image[~inside]).all()
    distance = np.abs(result.astype(int) - painted)[inside].reshape(-1, 3)
    coincided = ~differing(image, painted)[inside]
    assert (distance[~coincided] == 0).all() and (distance[coincided] == 1).all()


def test_read_only_and_strided_images():
    image = surface("colour", 40, 60)
    image.flags.writeable = False
    turned = surface("colour", 60, 120).transpose(1, 0, 2)[::2]
    for name in sorted(KINDS):
        for picture in (image, turned):
            damaged, mask, _ = make_kind(name)(picture, generator(1))
            assert np.array_equal(mask == 1, differing(picture, damaged)), name


# ---------------------------------------------------------------- each kind against its source

def test_cutpaste_areas_and_aspects():
    image = surface("noise", 256, 256)
    areas, aspects = [], []
    for seed in range(300):
        rows, columns = np.nonzero(CutPaste()(image, generator(seed))[1])
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width, "not a full rectangle"
        areas.append(height * width / 256**2)
        aspects.append(width / height)
    assert 0.0195 < min(areas) < 0.03 and 0.14 < max(areas) < 0.1525
    assert 0.28 < min(aspects) < 0.4 and 2.9 < max(aspects) < 3.4
    assert 120 < sum(aspect > 1 for aspect in aspects) < 180


def test_cutpaste_without_jitter_copies_the_image():
    image = surface("noise", 64, 64)
    damaged, mask, _ = CutPaste(jitter=0)(image, generator(3))
    rows, columns = np.nonzero(mask)
    top, left, height, width = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
    patch = damaged[top:top + height, left:left + width].astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(image[:, :, 0].astype(int), (height, width))
    # One level is allowed: `settle` moves coincidences.
    assert (np.abs(windows - patch[:, :, 0]).max(axis=(2, 3)) <= 1).sum() == 1


def test_jitter_stays_within_its_strength():
    patch = surface("colour", 32, 32)
    for seed in range(50):
        change = np.abs(jitter(np.full_like(patch, 100), 0.1, generator(seed)).astype(int) - 100)
        assert change.max() <= 100 * 0.1 + 12.75 + 1
    assert (jitter(patch, 0, generator(0)) == patch).all()


def test_scar_sizes():
    image = surface("noise", 256, 256)
    lengths, widths = [], []
    for seed in range(200):
        mask = Scar()(image, generator(seed))[1]
        rows, columns = np.nonzero(mask)
        if rows.min() > 0 and columns.min() > 0 and rows.max() < 255 and columns.max() < 255:
            _, sides, _ = cv2.minAreaRect(np.stack([columns, rows], axis=1).astype(np.float32))
            lengths.append(max(sides) + 1), widths.append(min(sides) + 1)
    assert 8 < min(lengths) and max(lengths) < 28 and min(widths) < 4 and max(widths) < 19
    assert np.mean(lengths) > 1.5 * np.mean(widths)


def test_unturned_scar_is_a_shifted_copy():
    image = surface("ramp", 128, 128)
    for seed in range(5):
        damaged, mask, _ = Scar(angle=0, jitter=0)(image, generator(seed))
        rows, columns = np.nonzero(mask)
        assert mask.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


@pytest.mark.parametrize("shape", ["line", "dot", "circle"])
def test_pros_shapes(shape):
    image = surface("even", 256, 256)
    sharp = Pros(shapes=(shape,), count=(1, 1), blur=(0, 0), opacity=(1, 1))
    for seed in range(30):
        damaged, mask, kind = sharp(image, generator(seed))
        rows, columns = np.nonzero(mask)
        assert kind == shape and cv2.connectedComponents(mask)[0] <= (2 if shape != "circle" else 3)
        inside = rows.min() > 0 and columns.min() > 0 and rows.max() < 255 and columns.max() < 255
        if shape == "circle" and inside:
            background = cv2.connectedComponents(1 - mask)[0] - 1
            assert background == 2, "a circle separates its inside from its outside"
        if shape == "dot" and inside:
            assert abs(np.ptp(rows) - np.ptp(columns)) <= 1 and 3 <= np.ptp(rows) <= 22


def test_pros_count_and_opacity():
    image = surface("even", 256, 256)
    parts = [cv2.connectedComponents(Pros(shapes=("dot",), count=(5, 5))(image, generator(seed))[1])[0] - 1 for seed in range(20)]
    assert max(parts) == 5 and min(parts) >= 3
    faint = [np.abs(Pros(opacity=(0.1, 0.1), contrast=(100, 100))(image, generator(s))[0].astype(int) - 128).max() for s in range(20)]
    assert max(faint) <= 3 * 11  # three layers at most, each of a tenth of 100 levels


@given(level=st.integers(0, 255), amount=st.floats(3, 127), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_ink_keeps_its_contrast(level, amount, seed):
    image = np.full((8, 8, 3), level, np.uint8)
    ink = choose_ink(image, np.ones((8, 8), np.uint8), (amount, amount), generator(seed))
    assert abs(abs(ink[0] - level) - amount) < 1e-9 and ink[0] == ink[1] == ink[2]


def test_lengths_scale_with_the_image():
    small, large = (np.median([Manual(count=(1, 1))(surface("even", side, side), generator(seed))[1].mean() for seed in range(60)])
                    for side in (128, 512))
    assert 0.6 < small / large < 1.7


# ---------------------------------------------------------------- Perlin noise and textures

def slow_perlin(shape, cells, rng):
    """Perlin's definition, a pixel and a corner at a time."""
    angle = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    noise = np.zeros(shape)
    for v in range(shape[0]):
        for u in range(shape[1]):
            y, x = v * cells[0] / shape[0], u * cells[1] / shape[1]
            for i in (int(y), int(y) + 1):
                for j in (int(x), int(x) + 1):
                    wy, wx = (1 - (6 * d**5 - 15 * d**4 + 10 * d**3) for d in (abs(y - i), abs(x - j)))
                    noise[v, u] += wy * wx * (np.sin(angle[i, j]) * (y - i) + np.cos(angle[i, j]) * (x - j))
    return np.sqrt(2) * noise


@given(height=st.integers(2, 24), width=st.integers(2, 24), rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_perlin_noise_against_its_definition(height, width, rows, columns, seed):
    noise = perlin_noise((height, width), (rows, columns), generator(seed))
    assert noise.dtype == np.float32 and noise.shape == (height, width) and np.abs(noise).max() <= 1
    assert np.abs(noise - slow_perlin((height, width), (rows, columns), generator(seed))).max() < 1e-5


def test_perlin_corners_are_as_defective_as_the_centre():
    total = sum(perlin_mask((64, 64), (2, 4), 0.5, generator(seed)).astype(int) for seed in range(1500))
    corners = np.mean([total[:12, :12], total[:12, -12:], total[-12:, :12], total[-12:, -12:]])
    assert 0.7 < corners / total[26:38, 26:38].mean() < 1.4


@pytest.mark.parametrize("style", sorted(TEXTURES))
@pytest.mark.parametrize("shape", [(16, 16), (16, 90), (61, 40)])
def test_generated_textures(style, shape):
    texture = GeneratedTextures((style,))(shape, generator(0))
    assert texture.shape == (*shape, 3) and texture.dtype == np.uint8 and texture.std() > 1
    assert (texture == GeneratedTextures((style,))(shape, generator(0))).all()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_texture_changes(change):
    texture = surface("colour", 32, 48) // 2 + 20
    kept = texture.copy()
    for seed in range(5):
        result = change(texture, generator(seed))
        assert result.shape == texture.shape and result.dtype == np.uint8 and (texture == kept).all()
    assert any((change(texture, generator(seed)) != texture).any() for seed in range(5))


def test_rotation_is_about_the_centre():
    image = surface("colour", 33, 33)
    assert np.abs(rotate(image, 180).astype(int) - image[::-1, ::-1]).max() <= 1


def texture_folder(root, count=3):
    for index in range(count):
        (root / "deep").mkdir(exist_ok=True)
        Image.fromarray(surface("colour", 40, 30, index)).save(root / ("deep" if index % 2 else ".") / f"t{index}.png")
    return root


def test_texture_folder(tmp_path):
    source = TextureFolder(texture_folder(tmp_path), side=32, keep=2)
    assert len(source) == 3 and source((20, 24), generator(0)).shape == (20, 24, 3)
    drawn = {source((32, 32), generator(seed)).tobytes() for seed in range(30)}
    assert len(drawn) == 3 and len(source._memory) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy._memory) == 0 and (copy((32, 32), generator(4)) == source((32, 32), generator(4))).all()
    source.check()
    image = surface("noise", 64, 64)
    damaged, mask, _ = Draem(textures=source)(image, generator(0))
    assert np.array_equal(mask == 1, differing(image, damaged))


def test_texture_memory_is_not_handed_out_for_writing(tmp_path):
    source = TextureFolder(texture_folder(tmp_path, 1), side=32)
    first = source((32, 32), generator(0)).copy()
    for seed in range(20):
        Draem(textures=source)(surface("noise", 32, 32), generator(seed))
    assert (source((32, 32), generator(0)) == first).all()


def test_bad_texture_folders(tmp_path):
    with pytest.raises(DataError, match="absent: no such folder of textures"):
        TextureFolder(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"holds no image \(\.bmp"):
        TextureFolder(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    source = TextureFolder(tmp_path)
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        Draem(textures=source)(surface("noise", 64, 64), generator(0))
    with pytest.raises(DataError, match=r"broken\.png: cannot be read"):
        source.check()


def test_bad_texture_sources():
    with pytest.raises(ParameterError, match="no texture source"):
        Draem(textures="dtd")
    with pytest.raises(DataError, match=r"gave uint8 \(3, 3, 3\), expected uint8 \(64, 64, 3\)"):
        Draem(textures=lambda shape, rng: np.zeros((3, 3, 3), np.uint8))(surface("noise", 64, 64), generator(0))
    with pytest.raises(ParameterError, match="did you mean 'marble'"):
        GeneratedTextures(("marbel",))


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("name", sorted(set(KINDS) - {"normal"}))
def test_images_that_are_too_small(name):
    for shape in ((15, 40), (40, 15), (1, 1)):
        with pytest.raises(DataError, match=f"{shape[1]}x{shape[0]} px is too small, it needs 16x16 px"):
            make_kind(name)(surface("noise", *shape), generator(0))


@pytest.mark.parametrize("image", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 4), np.uint8), np.zeros((32, 32, 3)), "image.png", None],
                         ids=["grey", "rgba", "float", "path", "none"])
@pytest.mark.parametrize("kind", [Pros(), Draem(), Mixer({"scar": 1}), make_kind("normal")], ids=["pros", "draem", "mixer", "normal"])
def test_things_that_are_no_image(kind, image):
    with pytest.raises(DataError, match=r"expected an image of uint8 \(H, W, 3\)"):
        kind(image, generator(0))


def test_a_seed_is_no_generator():
    with pytest.raises(ParameterError, match="expected a NumPy generator"):
        Pros()(surface("noise", 32, 32), 7)


def test_invisible_defects_are_refused():
    for kind in (CutPaste(jitter=0), Scar(jitter=0)):
        with pytest.raises(DataError, match="no visible change in 50 draws"):
            kind(surface("even", 64, 64), generator(0))


@pytest.mark.parametrize("kind, options, message", [
    (Pros, {"shapes": ("lines",)}, "did you mean 'line'"),
    (Pros, {"shapes": ()}, "not a non-empty tuple"),
    (Pros, {"shapes": "line"}, "not a non-empty tuple"),
    (Pros, {"opacity": (0.9, 0.2)}, "not ordered"),
    (Pros, {"opacity": (0.5, 1.5)}, r"in 0.05\.\.1"),
    (Pros, {"count": (0, 2)}, "count"),
    (Pros, {"count": (1.0, 2.5)}, "whole numbers"),
    (Pros, {"blur": (float("nan"), 1)}, "blur"),
    (Pros, {"blur": ("a", "b")}, "blur"),
    (Pros, {"blur": (1,)}, "blur"),
    (CutPaste, {"area": (0.5, 2)}, "area"),
    (CutPaste, {"jitter": -0.1}, "jitter"),
    (Scar, {"width": (16, 2)}, "width"),
    (Manual, {"shapes": ("strok",)}, "did you mean 'stroke'"),
    (Draem, {"scales": (0, 99)}, "scales"),
    (Draem, {"changes": 11}, "changes"),
    (Draem, {"threshold": 2}, "threshold"),
])
def test_bad_options(kind, options, message):
    with pytest.raises(ParameterError, match=message) as caught:
        kind(**options)
    assert "\n" not in str(caught.value) and kind.__name__ in str(caught.value)


def test_options_from_json():
    options = json.loads('{"shapes": ["line", "dot"], "count": [2, 2]}')
    assert make_kind("pros", **options) == Pros(shapes=("line", "dot"), count=(2, 2))
    assert hash(make_kind("pros", **options)) == hash(Pros(shapes=("line", "dot"), count=(2, 2)))


def test_unknown_kinds_and_options():
    with pytest.raises(ParameterError, match="unknown kind of defect 'cut-paste': did you mean 'cutpaste'"):
        make_kind("cut-paste")
    with pytest.raises(ParameterError, match="unknown option of scar 'widht': did you mean 'width'"):
        make_kind("scar", widht=(2, 3))
    with pytest.raises(ParameterError, match="unknown option of line 'shapes'"):
        make_kind("line", shapes=("dot",))
    with pytest.raises(ParameterError, match="unknown option of normal"):
        make_kind("normal", count=1)


# ---------------------------------------------------------------- mixing

@pytest.mark.parametrize("ratios, message", [
    ({}, "at least one kind"),
    ({"scar": 0.5, "draem": 0.4}, "sum to 0.9, not to 1"),
    ({"scar": 2, "draem": 3}, "sum to 5, not to 1"),
    ({"scar": -0.5, "draem": 1.5}, "ratio of 'scar' is -0.5"),
    ({"scar": float("nan"), "draem": 1}, "finite"),
    ({"scar": float("inf")}, "finite"),
    ({"scar": 0.0}, "sum to 0"),
    ({"scarr": 1.0}, "did you mean 'scar'"),
])
def test_bad_ratios(ratios, message):
    with pytest.raises(ParameterError, match=message):
        Mixer(ratios)


def test_mixer_takes_kinds_of_ones_own():
    class Half(DefectKind):
        def paint(self, image, rng):
            support = np.zeros(image.shape[:2], np.uint8)
            support[:, : image.shape[1] // 2] = 1
            return 255 - image, support, "half"

    mixer = Mixer({"half": 0.5, "scar": 0.5}, {"half": Half()})
    image = surface("noise", 64, 64)
    drawn = [mixer(image, generator(seed)) for seed in range(40)]
    assert {kind for _, _, kind in drawn} == {"half", "scar"}
    assert all(np.array_equal(mask == 1, differing(image, damaged)) for damaged, mask, _ in drawn)
    with pytest.raises(ParameterError, match="'halb'.*did you mean 'half'"):
        Mixer({"half": 1.0}, {"halb": Half()})
    with pytest.raises(ParameterError, match="scar are named twice"):
        equal_parts("scar", "draem", scar=Scar())


@given(shares=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), count=st.integers(0, 200), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_plans_keep_their_quotas(shares, count, seed):
    names = sorted(KINDS)[: len(shares)]
    mixer = Mixer({name: share / sum(shares) for name, share in zip(names, shares, strict=True)})
    plan = mixer.plan(count, generator(seed))
    numbers = np.bincount(plan, minlength=len(shares))
    exact = mixer.ratios * count
    assert len(plan) == count and (np.abs(numbers - exact) < 1 + 1e-9).all() and (numbers[np.array(shares) == 0] == 0).all()


def test_ties_of_a_plan_are_broken_fairly():
    extra = sum(np.bincount(equal_parts(*PNI_KINDS).plan(9, generator(seed)), minlength=4) - 2 for seed in range(2000))
    assert extra.sum() == 2000 and 400 < extra.min() and extra.max() < 600


def test_zero_ratio_is_never_drawn():
    mixer, image = Mixer({"scar": 0.0, "line": 1.0}), surface("noise", 32, 32)
    assert {mixer(image, generator(seed))[2] for seed in range(30)} == {"line"}


@given(split=st.integers(0, 8), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_batches_may_be_split_anywhere(split, seed):
    images = np.stack([surface("noise", 24, 30, index) for index in range(8)])
    mixer = equal_parts(*PNI_KINDS)
    whole = synthesise_batch(images, mixer, seed)
    parts = [synthesise_batch(images[:split], mixer, seed), synthesise_batch(images[split:], mixer, seed, first=split)]
    for a, b in zip(whole, (x + y for x, y in zip(*parts, strict=True)), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- the torch data set

def normal_samples(count=5, side=40):
    return [Sample(surface("noise", side, side + 4, index), name=f"good{index}") for index in range(count)]


def fingerprint(item):
    return item["name"], item["kind"], zlib.crc32(item["image"].tobytes()), zlib.crc32(item["mask"].tobytes())


@given(order=st.permutations([(epoch, index) for epoch in range(3) for index in range(4)]))
@settings(max_examples=15, deadline=None)
def test_items_do_not_depend_on_the_order(order):
    expected = SyntheticDefects(normal_samples(), equal_parts(*PNI_KINDS), seed=1, length=4)
    data = SyntheticDefects(normal_samples(), equal_parts(*PNI_KINDS), seed=1, length=4)
    assert {key: fingerprint(data[key]) for key in order} == {key: fingerprint(expected[key]) for key in sorted(order)}


def test_items_meet_the_contract():
    data = SyntheticDefects(normal_samples(), Mixer({"normal": 0.5, "scar": 0.5}), seed=2, length=12)
    kinds = [data[0, i]["kind"] for i in range(12)]
    assert kinds.count("normal") == kinds.count("scar") == 6
    for index in range(12):
        item = data[1, index]
        assert np.array_equal(item["mask"] == 1, differing(item["normal"], item["image"]))
        assert item["label"] == int(item["kind"] != "normal")
        assert (item["normal"] == data.samples[index % 5].image).all()
        sample = data.sample(index, epoch=1)
        assert (sample.image == item["image"]).all() and (sample.mask == item["mask"]).all()
        assert (sample.label, sample.name, sample.meta["kind"]) == (item["label"], item["name"], item["kind"])
    assert len({data[epoch, 3]["image"].tobytes() for epoch in range(4)}) > 1


def test_seeds_and_single_kinds():
    one, other = (SyntheticDefects(normal_samples(), Pros(), seed=seed) for seed in (1, 2))
    assert len(one) == 5 and fingerprint(one[0]) == fingerprint(one[0, 0]) != fingerprint(other[0])


def test_data_set_refuses():
    with pytest.raises(DataError, match="no normal samples"):
        SyntheticDefects([], Pros())
    with pytest.raises(DataError, match="crack7: labelled 1"):
        SyntheticDefects([Sample(surface("noise", 40, 40), label=1, name="crack7")], Pros())
    with pytest.raises(ParameterError, match="length=0"):
        SyntheticDefects(normal_samples(), Pros(), length=0)
    data = SyntheticDefects([Sample(surface("noise", 8, 8), name="tiny")], Pros())
    with pytest.raises(DataError, match="tiny: Pros: an image of 8x8 px is too small"):
        data[0]
    for key in (1, -1, (0, 1), (-1, 0)):
        with pytest.raises(IndexError):
            data[key]


def test_samples_are_read_lazily_and_resized():
    reads = []

    def read():
        reads.append(1)
        return surface("noise", 50, 70)

    data = SyntheticDefects([Sample(read, name="lazy")], Pros(), size=(32, 48))
    assert reads == [] and data[0]["image"].shape == (32, 48, 3) and data[0]["mask"].shape == (32, 48)


def test_sampler():
    sampler = EpochSampler(10, seed=4)
    first, second = list(sampler), list(sampler)
    assert len(sampler) == 10 and sorted(first) == [(0, i) for i in range(10)] and sorted(second) == [(1, i) for i in range(10)]
    assert [i for _, i in first] != [i for _, i in second] and list(EpochSampler(10, seed=4, epoch=1)) == second
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


def two_epochs(loader):
    return [(batch["name"], batch["kind"], batch["label"].tolist(), zlib.crc32(batch["image"].numpy().tobytes()),
             zlib.crc32(batch["mask"].numpy().tobytes())) for _ in range(2) for batch in loader]


def test_forked_workers_are_refused():
    with pytest.raises(ParameterError, match="start='fork' does not start workers safely"):
        make_loader(SyntheticDefects(normal_samples(), Pros()), batch_size=2, workers=1, start="fork")


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_deliver_the_same_bytes(start, tmp_path):
    mixer = equal_parts("cutpaste", "scar", "manual", draem=Draem(textures=TextureFolder(texture_folder(tmp_path), side=48)))
    data = SyntheticDefects(normal_samples(), mixer, seed=9, length=10)
    alone = two_epochs(make_loader(data, batch_size=4))
    assert two_epochs(make_loader(data, batch_size=4, workers=2, start=start)) == alone
    assert len({names for batch in alone for names in [tuple(batch[0])]}) == 6  # three batches an epoch, none repeated
    resumed = make_loader(data, batch_size=4, epoch=1)
    assert [batch["name"] for batch in resumed] == [batch[0] for batch in alone[3:]]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_kinds_travel_by_pickle(name):
    kind = make_kind(name)
    copy = pickle.loads(pickle.dumps(kind))
    image = surface("noise", 40, 40)
    assert copy == kind and (copy(image, generator(5))[0] == kind(image, generator(5))[0]).all()
