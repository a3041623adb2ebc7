"""The ground floor: every kind of image file, masks, samples, seeds, devices, whole files and folders, one-line errors."""

import builtins
import errno
import io
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from defectbook import core
from defectbook.core import (
    DataError,
    DefectbookError,
    ParameterError,
    Prediction,
    Sample,
    StoreError,
    WeightsError,
    generator,
    nearest,
    progress,
    read_image,
    read_mask,
    resize_image,
    resize_map,
    resize_mask,
    resolve_device,
    sha256_file,
    sha256_json,
    unknown,
    whole_folder,
    write_whole,
)

GREY = np.random.default_rng(0).integers(0, 256, (6, 5), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 5, 3), np.uint8)


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options) -> Path:
    """`array` written by Pillow, converted to `mode` first; the path."""
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def one_line(error: BaseException, *parts: str) -> bool:
    """Whether an error's message is one line and names all `parts`."""
    return "\n" not in str(error) and all(part in str(error) for part in parts)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize("kind", [DefectbookError, DataError, WeightsError, ParameterError, StoreError])
def test_errors_are_one_line(kind):
    error = kind("a\nfile\r\n  with\tmany   blanks\u2028here ")
    assert str(error) == "a file with many blanks here" and isinstance(error, DefectbookError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error) and type(pickle.loads(pickle.dumps(error))) is kind


@given(st.text())
def test_any_message_is_one_line(text):
    assert len(str(DataError(text)).splitlines()) <= 1


def test_unknown_names():
    assert unknown("kind", "scra", ["scar", "line"]) == "unknown kind 'scra': did you mean 'scar'? valid names are line, scar"
    assert unknown("kind", "qqq", ["scar"]) == "unknown kind 'qqq': valid names are scar"
    assert unknown("kind", "x", []) == "unknown kind 'x': valid names are (none)"
    assert nearest("scra", iter(["scar"])) == "scar" and nearest("zzz", []) is None


# ---------------------------------------------------------------- reading images

@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_grey_and_colour(tmp_path, suffix):
    grey = read_image(saved(tmp_path / f"grey{suffix}", GREY))
    assert grey.dtype == np.uint8 and grey.shape == (6, 5, 3) and (grey == GREY[:, :, None]).all()
    assert (read_image(saved(tmp_path / f"rgb{suffix}", COLOUR)) == COLOUR).all()
    assert (read_image(str(tmp_path / f"rgb{suffix}")) == COLOUR).all()


def test_alpha_is_dropped(tmp_path):
    alpha = np.full((6, 5, 1), 77, np.uint8)
    alpha[0, 0] = 0  # fully transparent pixels keep their colour
    assert (read_image(saved(tmp_path / "la.png", np.dstack([GREY, alpha]))) == GREY[:, :, None]).all()
    assert (read_image(saved(tmp_path / "rgba.png", np.dstack([COLOUR, alpha]))) == COLOUR).all()
    assert (read_image(saved(tmp_path / "rgba.tif", np.dstack([COLOUR, alpha]))) == COLOUR).all()


def test_palette(tmp_path):
    path = saved(tmp_path / "p.png", COLOUR // 128 * 255, "P")
    assert (read_image(path) == np.asarray(Image.open(path).convert("RGB"))).all()
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "two.png", transparency=0)
    assert read_image(tmp_path / "two.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk(tmp_path):
    for name, options in (("c.tif", {}), ("c.jpg", {"quality": 95})):
        path = saved(tmp_path / name, np.full((16, 16, 3), (200, 40, 90), np.uint8), "CMYK", **options)
        assert np.abs(read_image(path).astype(int) - (200, 40, 90)).max() <= 3


def test_bilevel(tmp_path):
    assert (read_image(saved(tmp_path / "b.png", GREY > 127)) == np.where(GREY > 127, 255, 0)[:, :, None]).all()
    assert read_image(np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey(tmp_path, suffix):
    values = np.array([[0, 1, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    assert cv2.imwrite(str(tmp_path / f"deep{suffix}"), values)
    read = read_image(tmp_path / f"deep{suffix}")
    assert (read[:, :, 0] == np.round(values / 257)).all() and read.dtype == np.uint8 and read.shape == (1, 9, 3)
    assert (read == read_image(values)).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_colour(tmp_path, suffix):
    values = np.random.default_rng(2).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / f"deep{suffix}"), values[:, :, ::-1])
    # Pillow itself cuts such files to their upper bytes: a level may be missing against rounding.
    assert np.abs(read_image(tmp_path / f"deep{suffix}").astype(int) - np.round(values / 257)).max() <= 1
    assert (read_image(values) == np.round(values / 257)).all()


@given(st.integers(0, 65535))
def test_sixteen_bits_are_mapped_linearly(value):
    array = np.array([[value, 65535]], np.uint16)
    assert read_image(array)[0, 0, 0] == round(value / 257) and read_image(array)[0, 1, 0] == 255


def test_float_is_refused(tmp_path):
    path = saved(tmp_path / "f.tif", GREY.astype(np.float32))
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert one_line(caught.value, str(path), "float32", "uint16")
    cv2.imwrite(str(tmp_path / "rgb.tif"), COLOUR.astype(np.float32))
    with pytest.raises(DataError, match="rgb.tif"):
        read_image(tmp_path / "rgb.tif")
    for array in (np.zeros((2, 2)), np.zeros((2, 2), complex), np.array([["a"]]), np.array([[None]])):
        with pytest.raises(DataError, match="not an 8- or 16-bit image"):
            read_image(array)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (4, 0), (4, 4, 0), (4, 4, 5), (2, 2, 2, 3), ()])
def test_shapes_that_are_no_image(shape):
    with pytest.raises(DataError, match="is no image; expected"):
        read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 2), (4, 6, 3), (4, 6, 4)])
def test_shapes_that_are_images(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    read = read_image(array)
    assert read.shape == (4, 6, 3) and read.dtype == np.uint8 and read.flags.c_contiguous
    assert (read == (array[:, :, :3] if shape[2:] and shape[2] > 2 else array.reshape(4, 6, -1)[:, :, :1])).all()


def test_functions_as_sources():
    assert (read_image(lambda: COLOUR) == COLOUR).all()
    with pytest.raises(DataError):
        read_image(lambda: np.zeros((3, 3)))


def test_exif_orientation_is_obeyed(tmp_path):
    image = Image.fromarray(COLOUR)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert (read_image(tmp_path / "turned.png") == np.rot90(COLOUR, -1)).all()


def test_files_that_are_no_image(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is a letter, not a picture\n" * 9)
    (tmp_path / "folder.png").mkdir()
    for name, words in (("empty.png", "cannot be read"), ("text.png", "cannot be read"), ("folder.png", "no such image file"),
                        ("missing.png", "no such image file"), ("two\nlines.png", "no such image file")):
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / name)
        assert one_line(caught.value, " ".join(name.split()), words)


def test_bombs_are_refused(tmp_path, monkeypatch):
    saved(tmp_path / "big.png", np.zeros((64, 64), np.uint8))
    for limit in (3000, 1000):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match="big.png"):
            read_image(tmp_path / "big.png")


def encoded(kind: str) -> bytes:
    y, x = np.mgrid[:37, :41]
    picture = np.stack([y * 5 % 256, x * 6 % 256, x * y % 256], axis=2).astype(np.uint8)
    target = io.BytesIO()
    options = {"progressive": True} if kind == "progressive" else {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    Image.fromarray(picture).save(target, "JPEG" if kind == "progressive" else kind, **options)
    return target.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("PNG", "JPEG", "progressive", "BMP", "TIFF", "PPM")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", sorted(ENCODED))
@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_files(kind, share, tmp_path):
    """A file cut anywhere is refused by name, unless what was cut off carries no pixels."""
    data = ENCODED[kind]
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data)
    whole = read_image(path)
    path.write_bytes(data[:int(share * len(data))])
    try:
        assert np.array_equal(read_image(path), whole), "a damaged picture was taken for a good one"
    except DataError as error:
        assert one_line(error, str(path))


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PPM", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cut_in_half(kind, tmp_path):
    path = tmp_path / "half.img"
    path.write_bytes(ENCODED[kind][:len(ENCODED[kind]) // 2])
    with pytest.raises(DataError, match="half.img"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", sorted(ENCODED))
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes(kind, changes, tmp_path):
    """Whatever the bytes: an image that meets the contract, or a `DataError`, never another exception."""
    data = bytearray(ENCODED[kind])
    for share, value in changes:
        data[int(share * len(data))] = value
    path = tmp_path / "flipped.img"
    path.write_bytes(data)
    try:
        image = read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    except DataError as error:
        assert one_line(error, str(path))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16, np.int8, np.uint32])
def test_other_integers_are_refused_or_kept(dtype):
    try:
        assert read_image(np.array([[0, 100]], dtype))[0, 1, 0] == 100
    except DataError as error:
        assert one_line(error, np.dtype(dtype).name)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Path.is_file no longer raises")
def test_names_that_are_too_long():
    with pytest.raises(DataError):
        read_image("a" * 5000 + ".png")


@pytest.mark.parametrize("source", [None, [[1, 2]], lambda: None], ids=["none", "list", "function of none"])
def test_things_that_are_no_source(source):
    with pytest.raises(DataError):
        read_image(source)


# ---------------------------------------------------------------- reading masks

def test_binary_masks(tmp_path):
    values = np.array([[0, 1, 127, 128, 255]], np.uint8)
    for source in (values, saved(tmp_path / "m.png", values), lambda: values):
        assert read_mask(source).tolist() == [[0, 0, 0, 1, 1]] and read_mask(source, threshold=0).tolist() == [[0, 1, 1, 1, 1]]
        assert read_mask(source, threshold=None).tolist() == values.tolist()
    assert read_mask(values).dtype == np.uint8
    assert read_mask(saved(tmp_path / "b.png", values > 127)).tolist() == [[0, 0, 0, 1, 1]]
    assert read_mask(values > 127).tolist() == read_mask(values > 127, None).tolist() == [[0, 0, 0, 1, 1]]
    assert read_mask(np.array([[0, 32000, 33000]], np.uint16)).tolist() == [[0, 0, 1]]


def test_colour_files_as_masks(tmp_path):
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    alpha = np.full((6, 5, 1), 9, np.uint8)
    assert (read_mask(saved(tmp_path / "rgb.png", grey)) == (GREY > 127)).all()
    assert (read_mask(saved(tmp_path / "rgba.png", np.dstack([grey, alpha]))) == (GREY > 127)).all()
    with pytest.raises(DataError, match="coloured mask") as caught:
        read_mask(saved(tmp_path / "colour.png", COLOUR))
    assert one_line(caught.value, "colour.png")


def test_palette_positions_are_classes(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.putdata([0, 2, 1])
    image.save(tmp_path / "voc.png")
    assert read_mask(tmp_path / "voc.png", threshold=None).tolist() == [[0, 2, 1]]


def test_binary_masks_with_a_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png")
    assert read_mask(tmp_path / "p.png").tolist() == [[0, 1]]


def test_masks_with_alpha(tmp_path):
    path = saved(tmp_path / "la.png", np.dstack([GREY, np.full_like(GREY, 255)]))
    assert (read_mask(path) == (GREY > 127)).all()


@pytest.mark.parametrize("array", [np.array([[0, 300]], np.uint16), np.array([[0, -1]]), np.array([[0, 0.5]])], ids=["300", "-1", "0.5"])
def test_class_indices_that_do_not_fit(array):
    with pytest.raises(DataError):
        read_mask(array, threshold=None)


def test_masks_that_are_none(tmp_path):
    for array in (np.zeros(4, np.uint8), np.zeros((2, 2, 2, 2), np.uint8)):
        with pytest.raises(DataError):
            read_mask(array)
    with pytest.raises(DataError, match="not an 8- or 16-bit"):
        read_mask(np.zeros((2, 2)))
    with pytest.raises(DataError, match="missing.png"):
        read_mask(tmp_path / "missing.png")


# ---------------------------------------------------------------- resizing

SIDES = st.integers(1, 40)


@given(height=SIDES, width=SIDES, to_height=SIDES, to_width=SIDES, seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_resized_masks_hold_no_new_class(height, width, to_height, to_width, seed):
    mask = np.random.default_rng(seed).choice([0, 1, 4, 200], (height, width)).astype(np.uint8)
    small = resize_mask(mask, (to_height, to_width))
    assert small.shape == (to_height, to_width) and small.dtype == np.uint8
    # Nearest neighbour with pixel centres: each pixel shows the one its centre falls into.
    rows, columns = (np.minimum(((2 * np.arange(n) + 1) * m) // (2 * n), m - 1) for n, m in ((to_height, height), (to_width, width)))
    assert set(np.unique(small)) <= set(np.unique(mask))
    assert (small == mask[np.ix_(rows, columns)]).mean() > 0.8  # ties between centres may fall either way


def test_resizing_keeps_its_contract():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    assert resize_image(image, (4, 6)) is image and resize_image(image, (8, 3)).shape == (8, 3, 3)
    blocks = np.kron(np.array([[10, 20], [30, 40]], np.uint8), np.ones((2, 2), np.uint8))
    assert resize_image(np.repeat(blocks[:, :, None], 3, axis=2), (2, 2))[:, :, 0].tolist() == [[10, 20], [30, 40]]
    averaged = resize_image(np.array([[0, 100]], np.uint8)[:, :, None].repeat(3, axis=2), (1, 1))
    assert averaged.tolist() == [[[50, 50, 50]]]
    bigger = resize_map(np.array([[0.0, 1.0]]), (2, 4))
    assert bigger.dtype == np.float32 and bigger.shape == (2, 4) and bigger[0].tolist() == [0, 0.25, 0.75, 1]
    assert resize_mask(np.eye(4, dtype=np.uint8), (4, 4)).tolist() == np.eye(4).tolist()


# ---------------------------------------------------------------- samples and predictions

def test_samples_are_lazy(tmp_path):
    path = tmp_path / "later.png"
    sample = Sample(path, label=1, name="later", meta={"kind": "crack"})
    with pytest.raises(DataError, match="later.png"):
        _ = sample.image
    saved(path, COLOUR)
    assert (sample.image == COLOUR).all() and sample.mask is None and sample.meta == {"kind": "crack"} and "later" in repr(sample)


def test_sample_masks(tmp_path):
    assert Sample(COLOUR).mask.shape == (6, 5) and not Sample(COLOUR).mask.any() and Sample(COLOUR, label=2).mask is None
    assert (Sample(COLOUR, mask=GREY, label=1).mask == (GREY > 127)).all()
    assert (Sample(COLOUR, mask=GREY, label=1, mask_threshold=None).mask == GREY).all()
    path = saved(tmp_path / "mask.png", np.zeros((3, 4), np.uint8))
    with pytest.raises(DataError) as caught:
        Sample(COLOUR, mask=path, label=1, name="part7").mask  # noqa: B018
    assert one_line(caught.value, str(path), "4x3 px", "5x6 px", "part7", "export both at one size")
    with pytest.raises(DataError, match="mask of part8: mask of 4x3 px"):
        Sample(COLOUR, mask=np.zeros((3, 4), np.uint8), label=1, name="part8").mask  # noqa: B018


def test_sample_meta_is_its_own():
    meta = {"kind": "a"}
    sample = Sample(COLOUR, meta=meta)
    meta["kind"] = "b"
    assert sample.meta == {"kind": "a"} and Sample(COLOUR).meta is not Sample(COLOUR).meta


def test_samples_travel_by_pickle(tmp_path):
    sample = pickle.loads(pickle.dumps(Sample(saved(tmp_path / "a.png", COLOUR), mask=GREY, label=1, name="a")))
    assert (sample.image == COLOUR).all() and (sample.mask == (GREY > 127)).all() and sample.name == "a"


def test_predictions():
    prediction = Prediction([np.zeros((2, 2), np.float32)] * 2, [1, 2])
    assert len(prediction) == 2 and prediction.scores.dtype == np.float64
    with pytest.raises(ValueError, match="1 maps but 2 scores"):
        Prediction([np.zeros((2, 2), np.float32)], [1, 2])
    with pytest.raises(AttributeError):
        prediction.scores = np.zeros(2)


# ---------------------------------------------------------------- seeds and devices

@given(seed=st.integers(0, 2**64), stream=st.text(max_size=20))
def test_generators_repeat(seed, stream):
    assert generator(seed, stream).random(3).tolist() == generator(seed, stream).random(3).tolist()


@given(seed=st.integers(0, 2**31), one=st.text("ab/0", max_size=6), other=st.text("ab/0", max_size=6))
def test_streams_are_apart(seed, one, other):
    same = generator(seed, one).integers(2**62) == generator(seed, other).integers(2**62)
    assert same == (one == other)


def test_streams_look_independent():
    draws = np.array([generator(5, f"item {i}").random(200) for i in range(60)])
    correlation = np.corrcoef(draws)[~np.eye(60, dtype=bool)]
    assert abs(draws.mean() - 0.5) < 0.01 and np.abs(correlation).max() < 0.35


def test_generators_pass_through():
    rng = np.random.default_rng(0)
    assert generator(rng) is rng and generator(rng, "stream") is rng
    assert generator(np.int64(3)).random() == generator(3).random()


def test_large_seeds_do_not_meet_streams():
    assert generator(97 * 2**32).random() != generator(0, "a").random()


@pytest.mark.parametrize("seed", [-1, 1.7])
def test_bad_seeds(seed):
    with pytest.raises(ParameterError):
        generator(seed)


def test_devices():
    import torch

    assert resolve_device("cpu") == "cpu" and resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "", "cuda:x"):
        with pytest.raises(ParameterError, match="use auto, cpu or cuda"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="sees no GPU") as caught:
            resolve_device("cuda:0")
        assert one_line(caught.value, "device=cpu")


def test_core_does_not_import_heavy_packages():
    script = "import sys, defectbook.core; print([m for m in ('torch', 'cv2', 'matplotlib', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_progress_yields_everything(capsys, monkeypatch):
    assert list(progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    monkeypatch.setenv("DEFECTBOOK_PROGRESS", "0")
    assert list(progress([])) == [] and capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- whole folders

def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(target: Path, content: str) -> None:
    with whole_folder(target) as draft:
        (draft / "a.txt").write_text(content)


def test_whole_folder(tmp_path):
    target = tmp_path / "deep" / "er" / "run"
    with whole_folder(target) as draft:
        assert not target.exists() and draft.parent == target.parent
        (draft / "sub").mkdir()
        (draft / "sub" / "a.txt").write_text("a")
    assert names(tmp_path / "deep" / "er") == ["run"] and (target / "sub" / "a.txt").read_text() == "a"
    fill(str(tmp_path / "text path"), "b")
    assert (tmp_path / "text path" / "a.txt").read_text() == "b"


def test_whole_folder_can_be_read_by_others(tmp_path):
    old = os.umask(0o027)
    try:
        fill(tmp_path / "run", "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), DataError("x"), SystemExit(3)], ids=lambda e: type(e).__name__)
def test_whole_folder_vanishes_on_errors(tmp_path, error):
    with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "run") as draft:
        (draft / "half").write_text("half")
        raise error
    assert caught.value is error and names(tmp_path) == []


def test_whole_folder_on_a_full_disk(tmp_path):
    with pytest.raises(StoreError) as caught, whole_folder(tmp_path / "run") as draft:
        (draft / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(draft / "half"))
    assert one_line(caught.value, str(tmp_path / "run"), "No space left on device", "free some space") and names(tmp_path) == []


def test_first_writer_wins(tmp_path):
    fill(tmp_path / "run", "first")
    fill(tmp_path / "run", "second")
    assert (tmp_path / "run" / "a.txt").read_text() == "first" and names(tmp_path) == ["run"]


def test_target_appears_meanwhile(tmp_path):
    with whole_folder(tmp_path / "run") as draft:
        (draft / "a.txt").write_text("slow")
        fill(tmp_path / "run", "quick")
    assert (tmp_path / "run" / "a.txt").read_text() == "quick" and names(tmp_path) == ["run"]


def test_parent_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for write in (lambda: fill(tmp_path / "file" / "run", "a"), lambda: write_whole(tmp_path / "file" / "a.txt", "a")):
        with pytest.raises(StoreError) as caught:
            write()
        assert one_line(caught.value, str(tmp_path / "file"), "cannot be written", "choose another output folder")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "x"


def test_draft_taken_away(tmp_path):
    with pytest.raises(StoreError, match="run: cannot be written"), whole_folder(tmp_path / "run") as draft:
        draft.rmdir()
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_read_only_places(tmp_path):
    tmp_path.chmod(0o500)
    try:
        for write in (lambda: fill(tmp_path / "run", "a"), lambda: write_whole(tmp_path / "a.txt", "a")):
            with pytest.raises(StoreError, match="Permission denied"):
                write()
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []


def in_threads(count: int, work) -> list[BaseException]:
    """Run work(i) in `count` threads that start together; the errors."""
    errors, gate = [], threading.Barrier(count)

    def run(index):
        gate.wait()
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - collected for the assertion
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_concurrent_folders(tmp_path):
    for round_ in range(10):
        def work(index, target=tmp_path / f"run{round_}"):
            with whole_folder(target) as draft:
                for name in "abc":
                    (draft / name).write_text(str(index) * 1000)
        assert in_threads(8, work) == []
        contents = {(tmp_path / f"run{round_}" / name).read_text() for name in "abc"}
        assert len(contents) == 1, "a folder of two writers"
    assert names(tmp_path) == sorted(f"run{round_}" for round_ in range(10))


WRITER = """
import sys
from pathlib import Path
from defectbook.core import whole_folder, write_whole
root, me = Path(sys.argv[1]), sys.argv[2]
for i in range(40):
    with whole_folder(root / f"run{i}") as draft:
        (draft / "a").write_text(me * 5000)
        (draft / "b").write_text(me * 5000)
    write_whole(root / "latest", me * 5000)
"""


def test_concurrent_processes(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), me], stderr=subprocess.PIPE, text=True) for me in "xyz"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "latest").exists():
            seen.add((tmp_path / "latest").read_text())
    assert [writer.communicate()[1] for writer in writers] == [""] * 3
    assert seen <= {me * 5000 for me in "xyz"} and (tmp_path / "latest").read_text() in {me * 5000 for me in "xyz"}
    assert names(tmp_path) == sorted(["latest", *(f"run{i}" for i in range(40))])
    for i in range(40):
        assert (tmp_path / f"run{i}" / "a").read_text() == (tmp_path / f"run{i}" / "b").read_text()


def test_errors_of_the_block_keep_their_meaning(tmp_path):
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "run"):
        (tmp_path / "input.csv").read_text()


def test_target_is_a_file(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(StoreError):
        fill(tmp_path / "run", "a")


def test_empty_target_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    fill(tmp_path / "run", "a")
    assert names(tmp_path / "run") == []


@pytest.mark.skipif(not hasattr(core, "make_folder"), reason="this core has no make_folder")
def test_make_folder(tmp_path):
    assert core.make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    assert core.make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(StoreError) as caught:
            core.make_folder(target)
        assert one_line(caught.value, str(target), "choose another output folder")


# ---------------------------------------------------------------- whole files

@given(content=st.one_of(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"]), max_size=200)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_write_whole(content, tmp_path):
    target = tmp_path / "a" / "b.bin"
    write_whole(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content) and names(target.parent) == ["b.bin"]


def test_write_whole_replaces(tmp_path):
    write_whole(str(tmp_path / "a.txt"), "old")
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_write_whole_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "old")
    real = builtins.open

    def full(self, data):
        with real(self, "wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError) as caught:
        write_whole(tmp_path / "a.txt", "something new")
    assert one_line(caught.value, str(tmp_path / "a.txt"), "No space left on device")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_write_whole_onto_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder: cannot be written"):
        write_whole(tmp_path / "folder", "x")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == []


def test_concurrent_files_of_one_process(tmp_path):
    errors = []
    for _ in range(40):
        errors += in_threads(8, lambda index: write_whole(tmp_path / "a.txt", str(index) * 200_000))
        text = (tmp_path / "a.txt").read_text()
        assert len(text) == 200_000 and len(set(text)) == 1
    assert errors == []


# ---------------------------------------------------------------- fingerprints

def test_sha256_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(b"a" * 1_000_000 + b"a" * 2_000_000)
    again = tmp_path / "again"
    again.write_bytes(b"a" * 3_000_000)
    assert sha256_file(str(tmp_path / "big")) == sha256_file(again) != sha256_file(tmp_path / "abc")


JSON = st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4), max_leaves=12)


@given(one=JSON, other=JSON)
def test_sha256_json(one, other):
    def reversed_keys(value):
        if isinstance(value, dict):
            return {key: reversed_keys(value[key]) for key in reversed(value)}
        return [reversed_keys(item) for item in value] if isinstance(value, list) else value

    def typed(value):  # True == 1 in Python, and not in JSON
        if isinstance(value, dict):
            return {key: typed(item) for key, item in value.items()}
        return [typed(item) for item in value] if isinstance(value, list) else (type(value).__name__, value)

    assert sha256_json(one) == sha256_json(reversed_keys(one)) and len(sha256_json(one)) == 64
    assert (sha256_json(one) == sha256_json(other)) == (typed(one) == typed(other))
