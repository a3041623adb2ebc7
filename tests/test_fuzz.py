"""Malformed input by the hundred: only our errors escape, in one line that names the file; nothing else is touched, nothing is unpickled.

Every input is opened in the sandbox of damage.py, which says what may not happen. The last test prints how many there were.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise
from damage import NO_JSON, NO_TEXT, OPENED, Sandbox, Trap, as_json, changed_values, damaged, sandbox  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from plain_sam import PlainSam
from test_runs import toy_run
from test_sweeps import write_tiny
from tiny_trees import mvtec_tree, visa_tree

from defectbook.core import DefectbookError, ParameterError, Sample, read_image, read_mask
from defectbook.data.class_masks import read_classes
from defectbook.data.datasets import read_elpv, read_folder
from defectbook.data.fetching import check_data, fetch_data, unpack
from defectbook.data.public_sets import read_boxes, read_visa
from defectbook.models.features import Backbone, read_state
from defectbook.models.priors import AutoencoderPrior
from defectbook.models.sam import load_sam
from defectbook.models.sam_lite import WEIGHTS
from defectbook.practice import saved_detectors
from defectbook.practice.annotations import EventLog
from defectbook.practice.cells import cell_state, read_record, start_cell
from defectbook.practice.export import export_checked
from defectbook.practice.grids import Cell, read_grid
from defectbook.practice.inference import predict_folder, read_map
from defectbook.practice.panels import Panel
from defectbook.practice.runs import RunStore, StoredRun, provenance
from defectbook.practice.saved_detectors import load_detector, load_threshold
from defectbook.practice.sessions import Session
from defectbook.practice.store_tools import diff_runs, find_rubbish, find_run, read_seals, seal, summary_table, tidy, verify

QUICK = settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(QUICK, max_examples=300)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# Images and masks --------------------------------------------------------------------------------------------------------------------

PICTURE = Image.fromarray(noise(3))
IMAGES = {
    "rgb.png": encoded(PICTURE, "PNG"), "grey16.png": encoded(Image.fromarray(noise(3)[..., 0].astype(np.uint16) * 257), "PNG"),
    "palette.png": encoded(PICTURE.convert("P"), "PNG"), "photo.jpg": encoded(PICTURE, "JPEG"), "photo.bmp": encoded(PICTURE, "BMP"),
    "photo.tif": encoded(PICTURE, "TIFF", compression="tiff_lzw"), "photo.webp": encoded(PICTURE, "WEBP"), "photo.gif": encoded(PICTURE, "GIF"),
    "photo.ico": encoded(PICTURE, "ICO"), "photo.ppm": encoded(PICTURE, "PPM"), "photo.tga": encoded(PICTURE, "TGA"),
}


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with right checksums, however wrong the rest is."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                                           for kind, data in chunks)


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


BODY = (b"IDAT", zlib.compress(bytes(100)))
END = (b"IEND", b"")
STRANGE_IMAGES = {
    "huge.png": png(header(2**31 - 1, 2**31 - 1), BODY, END), "wide.png": png(header(2**31 - 1, 1), BODY, END),
    "large.png": png(header(60_000, 60_000), BODY, END),
    "nothing.png": png(header(0, 0), BODY, END), "no bits.png": png(header(8, 8, 0), BODY, END), "no body.png": png(header(8, 8), END),
    "no head.png": png(BODY, END), "text bomb.png": png(header(8, 8), (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))), BODY, END),
    "colour profile.png": png(header(8, 8), (b"iCCP", b"a\0\0" + b"\xff" * 50), BODY, END),
    "bad exif.png": png(header(8, 8), (b"eXIf", b"II*\0\xff\xff\xff\xff"), BODY, END),
    "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -2**31, 1, 24, 0, 0, 0, 0, 0, 0),
    "loop.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0" + bytes(20),
    "huge.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 3) + struct.pack("<HHII", 256, 4, 1, 2**31)
    + struct.pack("<HHII", 257, 4, 1, 2**31) + struct.pack("<HHII", 258, 3, 2**30, 8) + bytes(4),
    "huge.gif": b"GIF89a\xff\xff\xff\xff\xf7\0\0" + bytes(800), "huge.webp": b"RIFF\xff\xff\xff\xffWEBPVP8L\xff\xff\xff\xff/" + b"\xff" * 30,
    "huge.jpg": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\xff\xd9", "none.jpg": b"\xff\xd8\xff\xd9",
    "long.jpg": b"\xff\xd8" + b"\xff\xe1\xff\xff" * 50, "huge.ppm": b"P6 99999999 99999999 255\n", "negative.ppm": b"P6 -1 -1 255\n",
    "words.ppm": b"P6 a b c\n",
    "huge.pgm": b"P5 4 4 99999999999999999999\n" + bytes(16), "page.html": b"<!DOCTYPE html><html></html>",
    "vector.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "many.ico": b"\0\0\x01\0\xff\xff" + bytes(40), "fli.png": struct.pack("<IHHHHHH", 128, 0xAF11, 65535, 65535, 65535, 8, 3) + bytes(110),
    "psd.png": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 65535, 2**31 - 1, 2**31 - 1, 8, 3) + bytes(20),
    "dds.png": b"DDS " + struct.pack("<I", 124) + b"\xff" * 120,
    "float.tif": encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "negative.tif": encoded(Image.fromarray(np.full((4, 4), -5, np.int32)), "TIFF"),
}
# A page of PostScript: Pillow would hand it to Ghostscript.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(evil) (w) file closefile\nshowpage\n%%EOF\n"


def test_images(sandbox: Sandbox) -> None:  # noqa: F811
    for name, content in IMAGES.items():
        for what, bad in damaged(content, cuts=3, flips=3):
            path = sandbox.put(name, bad)
            sandbox.open("images", f"{name}, {what}", lambda path=path: read_image(path), path)
    for name, content in STRANGE_IMAGES.items():
        path = sandbox.put(name, content)
        # A broken profile or camera's note is not the picture.
        sandbox.open("images", name, lambda path=path: read_image(path), path, refuse=name not in ("colour profile.png", "bad exif.png"))


def test_postscript_is_no_image(sandbox: Sandbox) -> None:  # noqa: F811
    path = sandbox.put("photo.png", POSTSCRIPT)
    sandbox.open("images", "PostScript", lambda: read_image(path), path, refuse=True)
    sandbox.judge()


def test_masks(sandbox: Sandbox) -> None:  # noqa: F811
    mask = Image.fromarray((noise(1)[..., 0] > 120).astype(np.uint8) * 255)
    for name, form in (("mask.png", "PNG"), ("mask.bmp", "BMP"), ("mask.tif", "TIFF")):
        for what, bad in damaged(encoded(mask, form), seed=1, cuts=2, flips=2):
            path = sandbox.put(name, bad)
            for threshold in (127, None):
                sandbox.open("masks", f"{name}, {what}, {threshold}", lambda path=path, threshold=threshold: read_mask(path, threshold), path)
    for name in ("huge.png", "loop.tif", "fli.png", "negative.tif", "float.tif", "page.html"):
        path = sandbox.put(name, STRANGE_IMAGES[name])
        sandbox.open("masks", name, lambda path=path: read_mask(path, None), path, refuse=True)
    path = sandbox.put("coloured.png",
                       IMAGES["rgb.png"][:0] + encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)), "PNG"))
    sandbox.open("masks", "coloured", lambda: read_mask(path), path, refuse=True)


def open_folder(sandbox: Sandbox, victim: str, cases: Iterable[tuple[str, bytes]]) -> None:  # noqa: F811
    """A data set in which one file is damaged, read whole, and read without what cannot be read."""
    tree = mvtec_tree(sandbox.inputs / "set", good=2)
    path = tree / "discs" / victim
    for what, bad in cases:
        path.write_bytes(bad)
        sandbox.open("images", f"{victim}, {what}", lambda: [(s.image, s.mask) for s in read_folder(tree, "discs").samples], path)
        sandbox.open("images", f"{victim}, {what}, skipped", lambda: [read_folder(tree, "discs", on_error="skip"), check_data("folder", tree)], tree)
        OPENED["images"] -= 1  # the same input
    sandbox.judge()


VICTIMS = ("train/good/000.png", "test/dot/001.png", "ground_truth/dot/002_mask.png")


@pytest.mark.parametrize("victim", VICTIMS)
def test_folders_of_images(sandbox, victim) -> None:  # noqa: F811
    open_folder(sandbox, victim, damaged(IMAGES["rgb.png"], cuts=2, flips=2))


@pytest.mark.parametrize("victim", VICTIMS)
def test_folders_of_strange_images(sandbox, victim) -> None:  # noqa: F811
    open_folder(sandbox, victim, STRANGE_IMAGES.items())


# Tables ------------------------------------------------------------------------------------------------------------------------------

def lines(*words: str) -> bytes:
    return "".join(f"{word}\n" for word in words).encode()


ODD_CELLS = ("", "x", "nan", "inf", "-1", "1e999", "9" * 400, "../../evil", "/etc/passwd", "a\0b", '"', "'", "\u202e", "=1+1", "x" * 200_000)


def test_labels_of_elpv(sandbox: Sandbox) -> None:  # noqa: F811
    root = sandbox.inputs / "elpv"
    for number in range(4):
        sandbox.put(f"elpv/images/cell{number}.png", IMAGES["rgb.png"])
    good = lines(*(f"images/cell{number}.png  {float(number == 3)}  mono" for number in range(4)))
    cases = [*damaged(good, cuts=3, flips=3), *NO_TEXT.items(),
             *((f"cell {cell[:12]!r}", good + f"images/cell1.png {cell} mono\n".encode()) for cell in ODD_CELLS),
             *((f"path {cell[:12]!r}", good + f"{cell} 0.0 mono\n".encode()) for cell in ODD_CELLS[1:])]
    for what, bad in cases:
        path = sandbox.put("elpv/labels.csv", bad)
        sandbox.open("CSVs", f"labels.csv, {what}", lambda: [s.image for s in read_elpv(root, normal=2, validation=0).samples], root)
        assert path.is_file()
    sandbox.judge()


def test_tables_of_visa(sandbox: Sandbox) -> None:  # noqa: F811
    root = visa_tree(sandbox.inputs / "visa", ("candle",))
    table = root / "split_csv" / "1cls.csv"
    good = table.read_bytes()
    rows = [b"candle,train,normal,%s,\n" % cell.encode() for cell in ODD_CELLS] + [b"candle,%s,normal,a,\n" % cell.encode() for cell in ODD_CELLS]
    for what, bad in [*damaged(good, cuts=3, flips=4), *NO_TEXT.items(), *((repr(row[:30]), good + row) for row in rows)]:
        table.write_bytes(bad)
        sandbox.open("CSVs", f"1cls.csv, {what}", lambda: [s.mask for s in read_visa(root, "candle").samples], root)
    sandbox.judge()


def test_boxes(sandbox: Sandbox) -> None:  # noqa: F811
    for what, bad in [*damaged(lines("10 10 20 20 1", "30 30 40 40 2"), cuts=2, flips=3), *NO_TEXT.items(),
                      *((cell[:12], f"10 10 20 20 {cell}\n".encode()) for cell in ODD_CELLS)]:
        path = sandbox.put("boxes.txt", bad)
        sandbox.open("CSVs", f"boxes, {what}", lambda path=path: read_boxes(path, (64, 64)), path)


def test_classes(sandbox: Sandbox) -> None:  # noqa: F811
    classes = {"normal": 0, "scratch": 80, "hole": 160}
    for what, bad in [*NO_JSON.items(), *((what, as_json(value)) for what, value in changed_values(classes, count=20))]:
        path = sandbox.put("classes.json", bad)
        sandbox.open("CSVs", f"classes.json, {what}", lambda path=path: read_classes(path), path)
    sandbox.judge()


# Grids -------------------------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"{after}: &{after} [*{before}, *{before}, *{before}, *{before}]\n" for before,
                                  after in zip("abcdefgh", "bcdefghi", strict=True))
TAGS = ("!!python/object/apply:os.system [touch ../evil]", "!!python/object/new:os.system [ls]", "!!python/name:os.system", "!!python/module:os",
        "!!python/object:builtins.object {}", "!!python/tuple [1]", "!!python/object/apply:pathlib.Path.touch [x]", "!!binary '%%%'", "!!timestamp x",
        "!!int x", "!!float x", "!!set [1]", "!!omap 3", "!unknown 1", "!<tag:yaml.org,2002:python/object/apply:os.system> [ls]")
GRID = {"store": "results", "processes": 2, "threads": 1, "memory": 0.5, "gpus": 0, "timeout": 60,
        "grids": [{"experiment": "tiny.ipynb", "fixed": {"pause": 0.0}, "vary": {"factor": [1.0, 2.0]}, "seeds": 2}]}
GRIDS = {
    **NO_TEXT, **{f"tag {tag[:40]}": f"grids: {tag}".encode() for tag in TAGS}, "bomb": BOMB.encode(), "itself": b"grids: &a [*a]",
    "merge": b"a: &a {b: 1}\ngrids: {<<: *a}",
    "merge of a number": b"grids: [{<<: 3}]", "deep": b"[" * 60_000, "deep map": b"{a: " * 15_000,
    "deep block": b"".join(b" " * i + b"a:\n" for i in range(300)),
    "tab": b"\tgrids: []", "key twice": b"grids: []\ngrids: []", "odd key": b"? [1, 2]\n: 3\n", "map key": b"? {a: 1}\n: 3\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "directive": b"%YAML 9.9\n---\na: 1\n", "control": b"a: \x07\n",
    "too many seeds": b"grids: [{experiment: tiny.ipynb, seeds: 99999999999999999999}]",
    "too many cells": b"grids: [{experiment: tiny.ipynb, vary: {%s}}]" % b", ".join(b"f%d: [%s]" % (i, b", ".join([b"1"] * 100)) for i in range(20)),
    "path": b"grids: [{experiment: ../../../etc/passwd.ipynb}]", "pipe": b"grids: [{experiment: /dev/stdin.ipynb}]",
    "zero": b'grids: [{experiment: "a\\0.ipynb"}]',
    "long": b'grids: [{experiment: "' + b"x" * 5000 + b'.ipynb"}]',
    "number of digits": b"grids: [{experiment: tiny.ipynb, fixed: {seed: " + b"9" * 5000 + b"}}]",
    "sexagesimal": b"processes: 190:20:30\ngrids: []", "infinite memory": b"memory: .inf\ngrids: [1]", "not a number": b"memory: .nan\ngrids: [1]",
}


def test_grids(sandbox: Sandbox) -> None:  # noqa: F811
    write_tiny(sandbox.inputs)
    for what, bad in GRIDS.items():
        path = sandbox.put("grid.yaml", bad)
        sandbox.open("grids", what, lambda path=path: read_grid(path), path, refuse=True)
    for what, bad in [*damaged(as_json(GRID), cuts=5, flips=10), *((what, as_json(value)) for what, value in changed_values(GRID, count=60))]:
        path = sandbox.put("grid.yaml", bad)
        sandbox.open("grids", what, lambda path=path: read_grid(path), path)


def test_notebooks_of_grids(sandbox: Sandbox) -> None:  # noqa: F811
    notebook = write_tiny(sandbox.inputs)
    good = json.loads(notebook.read_text())
    path = sandbox.put("grid.yaml", b"grids: [{experiment: tiny.ipynb, seeds: 2}]")
    sources = ("seed = 0\nseed2 = __import__('os').system('touch evil')", "seed = open('/etc/passwd')", "import os", "seed = (", "seed, b = 1, 2",
               "seed = " + "(" * 5000,
               "seed = " + "-" * 3000 + "1", "seed = [" + "[" * 300 + "]" * 300 + "]", "seed = 0\0", "seed: int = 0", "seed = 9" + "9" * 5000,
               "x.y = 3", "del seed")
    programs = ((f"program {source[:30]!r}", as_json({**good, "cells": [{**good["cells"][0], "source": source}]})) for source in sources)
    for what, bad in [*NO_JSON.items(), *damaged(as_json(good), cuts=3, flips=3),
                      *((what, as_json(value)) for what, value in changed_values(good, count=30)), *programs]:
        notebook.write_bytes(bad)
        sandbox.open("grids", f"notebook, {what}", lambda: read_grid(path), notebook.stem)


# Checkpoints -------------------------------------------------------------------------------------------------------------------------

def safetensors(entry: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    head = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def tensor(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


SAFETENSORS = {
    **NO_TEXT, "endless header": safetensors(b"{}", length=2**63), "header beyond the file": safetensors(b"{}", length=10**6),
    "negative": safetensors(b"{}", length=2**64 - 1),
    "no JSON": safetensors(b"{"), "deep": safetensors(b"[" * 100_000), "list": safetensors([]),
    "beyond the end": safetensors(tensor(offsets=(0, 10**12))),
    "backwards": safetensors(tensor(offsets=(64, 0))), "negative offset": safetensors(tensor(offsets=(-64, 0))),
    "huge shape": safetensors(tensor(shape=(2**40, 2**40))),
    "negative shape": safetensors(tensor(shape=(-4, -4))), "unknown type": safetensors(tensor("F13")), "words": safetensors(tensor(shape="many")),
    "overlap": safetensors({"a": tensor()["w"], "b": tensor()["w"]}), "hole": safetensors(tensor(offsets=(8, 72)), bytes(72)),
    "metadata": safetensors({"__metadata__": {"a": 1}}),
}


def pickles(place: Path) -> Iterator[tuple[str, bytes]]:
    """Checkpoints that are programs, in all formats that torch reads; each would make the file `place`."""
    file = io.BytesIO()
    trap = Trap(place)
    for protocol in (0, 2, 4, 5):
        yield f"pickle {protocol}", pickle.dumps({"w": trap}, protocol)
    for name, old in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save({"w": trap}, file, _use_new_zipfile_serialization=old)
        yield f"torch {name}", file.getvalue()
    yield "system", b"cos\nsystem\n(S'touch evil'\ntR."
    yield "eval", b"cbuiltins\neval\n(S'1'\ntR."
    yield "getattr", b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."
    yield "build", pickle.dumps(_Stateful())
    yield "extension", b"\x80\x02\x82\x01."
    yield "persistent", b"Pxyz\n."
    yield "endless memo", b"\x80\x04]" + b"\x94" * 10_000 + b"h\xff."
    yield "long string", b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x."
    yield "frame", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."
    yield "numpy object", _npy(np.array([trap], object))
    script = torch.jit.script(torch.nn.Linear(2, 2))
    script.save(place.with_name("script.pt"))
    yield "TorchScript", place.with_name("script.pt").read_bytes()
    place.with_name("script.pt").unlink()


class _Stateful:
    def __setstate__(self, state):
        raise AssertionError("unpickled")

    def __getstate__(self):
        return {"a": 1}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_checkpoints(sandbox: Sandbox) -> None:  # noqa: F811
    from safetensors.torch import save

    ran = sandbox.root / "ran"
    programs = list(pickles(ran))
    state = {"w": torch.arange(16.0).reshape(4, 4), "b": torch.zeros(4)}
    for what, bad in [*SAFETENSORS.items(), *programs]:
        path = sandbox.put("weights.safetensors", bad)
        sandbox.open("checkpoints", f"safetensors, {what}", lambda path=path: read_state(path), path, refuse=what != "metadata")
    for what, bad in damaged(save(state), cuts=4, flips=8):
        path = sandbox.put("weights.safetensors", bad)
        sandbox.open("checkpoints", f"safetensors, {what}", lambda path=path: read_state(path), path)
    values = {"number": 3, "list": [state], "nested": {"a": state}, "text": "x", "none": None, "not tensors": {"w": 3},
              "parameters": {"w": torch.nn.Parameter(torch.zeros(2))}}
    for what, bad in [*programs, *NO_TEXT.items(), *((what, saved(value)) for what, value in values.items()),
                      *damaged(saved(state), cuts=6, flips=10)]:
        path = sandbox.put("weights.pth", bad)
        sandbox.open("checkpoints", f"pth, {what}", lambda path=path: read_state(path), path, refuse=(what, bad) in programs)
    assert not ran.exists(), "a pickle ran"


def test_weights_of_models(sandbox: Sandbox) -> None:  # noqa: F811
    """SAM's and the backbones' own loaders: another layout, another hash, a program."""
    from safetensors.torch import save

    ran = sandbox.root / "ran"
    lite = WEIGHTS.read_bytes()
    cases = [*list(pickles(ran))[:6], *SAFETENSORS.items(), ("other tensors", save({"w": torch.zeros(2)})), *list(damaged(lite, cuts=2, flips=2))]
    for what, bad in cases:
        for suffix in ("safetensors", "pth"):
            path = sandbox.put(f"weights.{suffix}", bad)
            sandbox.open("checkpoints", f"sam_lite {suffix}, {what}", lambda path=path: load_sam("sam_lite", path, "cpu"), path)
    for what, bad in cases[:12]:
        path = sandbox.put("weights.pth", bad)
        sandbox.open("checkpoints", f"vit_b, {what}", lambda path=path: load_sam("vit_b", path, "cpu", download=False), path, refuse=True)
        sandbox.open("checkpoints", f"backbone, {what}", lambda path=path: Backbone("efficientnet_lite0", weights=path), path, refuse=True)
    assert not ran.exists(), "a pickle ran"


# Saved detectors ---------------------------------------------------------------------------------------------------------------------

NORMAL = [Sample(noise(seed), name=f"normal {seed}") for seed in range(6)]


def _paedid(kind: str) -> Any:
    prior = AutoencoderPrior((4, 8), epochs=1, batch_size=4, device="cpu")
    return getattr(saved_detectors, kind)(prior, image_size=32).fit(NORMAL)


def _untrained(segmenter: Any) -> Any:
    segmenter.is_fitted = True
    return segmenter


MAKERS: dict[str, Callable[[], Any]] = {
    "patchcore": lambda: saved_detectors.PatchCore(image_size=64, coreset="none", device="cpu").fit(NORMAL[:2]),
    "pni": lambda: saved_detectors.PNI("efficientnet_lite0", image_size=64, pool=3, sigma=2.0, ratio=0.2, words=16, neighbourhood=3, reduced=8,
                                       depth=1, width=16,
                                       epochs=1, mlp_batch=64, device="cpu").fit(NORMAL),
    "ensemble": lambda: saved_detectors.Ensemble([saved_detectors.SmoothSparse(image_size=32), saved_detectors.RPCA(image_size=16, columns=4)],
                                                 0.5).fit(NORMAL),
    "refinement": lambda: saved_detectors.Refinement(
        saved_detectors.RPCA(image_size=32, columns=4), "test_efficientnet", weights="none", image_size=64, iterations=2, round_length=2,
        batch_size=2, pool_size=2,
        renew=False, width=4, held_out=0.2, device="cpu").fit(NORMAL),
    "RPCA": lambda: saved_detectors.RPCA(image_size=16, columns=4).fit(NORMAL),
    "RASL": lambda: saved_detectors.RASL(image_size=24, columns=4, inset=2, steps=1).fit(NORMAL),
    "SmoothSparse": lambda: saved_detectors.SmoothSparse(image_size=32).fit(NORMAL),
    "PAEDID": lambda: _paedid("PAEDID"), "Reconstruction": lambda: _paedid("Reconstruction"),
    "UNetSegmenter": lambda: _untrained(saved_detectors.UNetSegmenter("unet", width=4, side=32, weights=None, device="cpu")),
    "PROS": lambda: _untrained(saved_detectors.PROS(side=64, adapters=1, bottleneck=4, device="cpu")),
}


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory) -> dict[str, Path]:
    """One saved detector of each kind."""
    root = tmp_path_factory.mktemp("detectors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in MAKERS.items():
            make().save(root / name)
    return {name: root / name for name in MAKERS}


def test_every_detector_is_made() -> None:
    assert set(MAKERS) == set(saved_detectors.LOADERS)


def model_cases(folder: Path, count: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(what is done, a function that does it to a copy of a saved detector)."""
    def write(name: Path, content: bytes) -> Callable[[Path], None]:
        return lambda copy: (copy / name).write_bytes(content) and None

    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder)
        value = json.loads(path.read_text())
        odd = sorted(NO_JSON.items())
        yield from ((f"{name}, {what}", write(name, bad)) for what, bad in random.Random(str(folder.name)).sample(odd, min(len(odd), count // 3)))
        yield from ((f"{name}, {what}", write(name, as_json(other))) for what, other in changed_values(value, seed=len(folder.name), count=count))
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder)
        yield from ((f"{name}, {what}", write(name, bad)) for what, bad in list(damaged(path.read_bytes(), cuts=2, flips=2))[:count])
        yield from ((f"{name}, {what}", write(name, bad)) for what, bad in list(SAFETENSORS.items())[:count // 4])
        yield f"{name}, gone", lambda copy, name=name: (copy / name).unlink()
        yield f"{name}, other tensors", write(name, safetensors(tensor()))
        yield f"{name}, other shapes", lambda copy, name=name: _reshape(copy / name, lambda value: value.reshape(-1)[:1])
        yield f"{name}, not finite", lambda copy, name=name: _reshape(copy / name,
                                                                      lambda value: np.full_like(value, np.nan) if value.dtype.kind == "f" else value)
        yield f"{name}, a folder", lambda copy, name=name: ((copy / name).unlink(), (copy / name).mkdir())


def _reshape(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from safetensors.numpy import load_file, save_file

    save_file({key: np.ascontiguousarray(change(value)) for key, value in load_file(path).items()}, path)


def open_models(sandbox: Sandbox, saved_models: dict[str, Path], kind: str, count: int) -> None:  # noqa: F811
    image = sandbox.put("line/0.png", IMAGES["rgb.png"])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
    try:
        if used:  # an absurd size shall fail here and not take the machine's memory first
            resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), limits[1]))
        folder = sandbox.inputs / "model"
        for what, act in model_cases(saved_models[kind], count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved_models[kind], folder)
            act(folder)
            found = sandbox.open("detectors", f"{kind}, {what}", lambda: load_detector(folder, "cpu"), folder)
            if not isinstance(found, BaseException):  # what loads must also predict, or say why not
                shutil.rmtree(sandbox.target, ignore_errors=True)
                sandbox.open("detectors", f"{kind}, {what}, predicting", free=sandbox.target, named="0.png",
                             act=lambda: predict_folder(folder, image, sandbox.target, threshold=1.0, mask_threshold=1.0, device="cpu"))
                OPENED["detectors"] -= 1  # the same input
            shutil.rmtree(sandbox.target, ignore_errors=True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


SLOW_TO_LOAD = ("patchcore", "pni", "refinement", "PROS")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_detectors(sandbox, saved_models, kind) -> None:  # noqa: F811
    open_models(sandbox, saved_models, kind, 4 if kind in SLOW_TO_LOAD else 12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_many_more_detectors(sandbox, saved_models, kind) -> None:  # noqa: F811
    open_models(sandbox, saved_models, kind, 30 if kind in SLOW_TO_LOAD else 150)


THRESHOLD = {"schema": 1, "score": 0.5, "pixel": 0.5, "map_range": [0.0, 1.0], "rule": "given", "options": {}, "seed": 0, "images": 3, "data": "abc",
             "model": "0" * 16, "tiling": {"tile": 64, "overlap": 16, "margin": 2}}


def test_thresholds_and_results(sandbox, saved_models) -> None:  # noqa: F811
    """threshold.json, predict.json, records.jsonl and maps."""
    folder = sandbox.inputs / "model"
    shutil.copytree(saved_models["SmoothSparse"], folder)
    path = folder / "threshold.json"
    for what, bad in [*NO_JSON.items(), *((what, as_json(value)) for what, value in changed_values(THRESHOLD, count=30))]:
        path.write_bytes(bad)
        sandbox.open("detectors", f"threshold.json, {what}", lambda: load_threshold(folder), path)
    path.unlink()
    image = sandbox.put("line/0.png", IMAGES["rgb.png"])
    options = {"threshold": 1.0, "mask_threshold": 1.0, "device": "cpu"}
    predict_folder(folder, image, sandbox.target, **options)
    good = {name: (sandbox.target / name).read_bytes() for name in ("predict.json", "records.jsonl")}
    for name, content in good.items():
        value = json.loads(content)
        for what, bad in [*NO_JSON.items(), *((what, as_json(other)) for what, other in changed_values(value, count=25))]:
            for each, whole in good.items():
                (sandbox.target / each).write_bytes(whole)
            (sandbox.target / name).write_bytes(bad)
            sandbox.open("results", f"{name}, {what}", lambda: predict_folder(folder, image, sandbox.target, **options), sandbox.target,
                         free=sandbox.target)
    ran = sandbox.root / "ran"
    maps = {"map.npy": _npy(np.zeros((4, 4), np.float32)), "map.png": (sandbox.target / "maps" / "0.png").read_bytes()}
    cases = [(name, *case) for name, content in maps.items() for case in damaged(content, cuts=3, flips=3)]
    cases += [("map.npy", "objects", _npy(np.array([Trap(ran)], object))), ("map.npy", "pickle", pickle.dumps(Trap(ran))),
              ("map.png", "no text", IMAGES["rgb.png"]),
              ("map.npy", "words",
               b"\x93NUMPY\x01\0\x50\0{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 99999999999)}" + b" " * 10 + b"\n"),
              ("map.npy", "program", b"\x93NUMPY\x01\0\x40\0{'descr': __import__('os').system('touch evil'), 'shape': ()}          \n")]
    for name, what, bad in cases:
        path = sandbox.put(name, bad)
        sandbox.open("results", f"{name}, {what}", lambda path=path: read_map(path), path)
    assert not ran.exists()


# Archives ----------------------------------------------------------------------------------------------------------------------------

def zipped(*entries: tuple[str, bytes], mode: int = 0, **changes: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        for name, content in entries:
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.compress_type, info.external_attr = name, zipfile.ZIP_DEFLATED, mode << 16
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return file.getvalue()


def tarred(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "", mode: str = "w", **changes: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


OUTSIDE = ("../evil", "../../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "c:evil", "..", "a/..", "\\\\server\\evil", "//evil",
           "./../evil", "a/./../../evil",
           "~/../../evil/../../x", "....//../evil")
ODD_NAMES = (".", "", "a//b", "a/./b", "x" * 300, "/".join(["d"] * 3000), "con", "a:b/c", "\u202egnp.exe", "a\nb", " ", "-rf", "a\x1b[31m",
             "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"))


def archives() -> Iterator[tuple[str, bytes, bool]]:
    """(what is wrong, the archive, whether it must be refused)."""
    good = [("a.txt", b"one"), ("b/c.txt", b"two" * 500)]
    for name in OUTSIDE:
        for form, pack in (("zip", zipped), ("tar", tarred)):
            yield f"{form} {name}", pack(("fine.txt", b"x"), (name, b"evil")), True
    for name in ODD_NAMES:
        for form, pack in (("zip", zipped), ("tar", tarred)):
            yield f"{form} {name[:20]!r}", pack(("fine.txt", b"x"), (name, b"odd")), False
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        for link in ("/etc/passwd", "../evil", "a.txt", ""):
            yield f"tar link {kind!r} {link}", tarred(*good, kind=kind, link=link), True
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK):
        yield f"zip mode {kind:o}", zipped(*good, mode=kind | 0o777), True
    yield "set-uid", tarred(*good, mode="w"), False
    yield "zip bomb", zipped(*((f"z{i}", bytes(40 << 20)) for i in range(2))), True
    for mode in ("w:gz", "w:xz", "w:bz2"):
        yield f"tar bomb {mode}", tarred(*((f"z{i}", bytes(40 << 20)) for i in range(2)), mode=mode), True
    yield "zip with one name twice", zipped(("a", b"1"), ("a", b"2")), True
    yield "tar with a file as a folder", tarred(("a", b"1"), ("a/b", b"2")), True
    yield "zip, encrypted", _flagged(zipped(*good)), True
    yield "zip, unknown compression", _compressed_by(zipped(*good), 99), True
    yield "zip in a zip", zipped(("inner.zip", zipped(*good))), False
    yield "tar, sparse", tarred(*good, kind=tarfile.GNUTYPE_SPARSE), False
    yield "tar, size of a terabyte", _resized(tarred(*good), 1 << 40), True
    yield "gzip of nothing", b"\x1f\x8b\x08\0" + bytes(20), True
    yield "rar", b"Rar!\x1a\x07\0" + bytes(50), True
    yield "many entries", zipped(*((f"{i}", b"") for i in range(3000))), False
    for form, content in (("zip", zipped(*good)), ("tar", tarred(*good)), ("tar.gz", tarred(*good, mode="w:gz")),
                          ("tar.xz", tarred(*good, mode="w:xz")),
                          ("tar.bz2", tarred(*good, mode="w:bz2"))):
        yield from ((f"{form}, {what}", bad, False) for what, bad in damaged(content, cuts=4, flips=6))


def _flagged(content: bytes) -> bytes:
    """The same zip, whose first entry says that it is encrypted."""
    changed = bytearray(content)
    changed[6] |= 1
    changed[changed.find(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def _compressed_by(content: bytes, method: int) -> bytes:
    changed = bytearray(content)
    changed[8] = method
    changed[changed.find(b"PK\x01\x02") + 10] = method
    return bytes(changed)


def _resized(content: bytes, size: int) -> bytes:
    """The same tar, whose first entry claims to be of `size` bytes."""
    info = tarfile.TarInfo("large.bin")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + content


def test_archives(sandbox: Sandbox) -> None:  # noqa: F811
    for what, content, refuse in archives():
        path = sandbox.put("archive.bin", content)
        sandbox.open("archives", what, lambda path=path: unpack(path, sandbox.target), path, refuse, sandbox.target, whole=True)
        shutil.rmtree(sandbox.target, ignore_errors=True)
    # Known sets whose archive has a known hash take no other.
    for what, content in list(damaged(zipped(("a.txt", b"one")), cuts=2, flips=2)):
        path = sandbox.put("archive.zip", content)
        for name in ("visa", "btad", "mvtec"):
            sandbox.open("archives", f"{name}, {what}", lambda path=path, name=name: fetch_data(name, sandbox.target, path), named="archive.zip"
                         if name == "visa" else name, free=sandbox.target, whole=True)
            shutil.rmtree(sandbox.target, ignore_errors=True)


# Runs --------------------------------------------------------------------------------------------------------------------------------

def look_at(store: RunStore, run: StoredRun, other: StoredRun) -> None:
    """What the commands do with a run."""
    for act in (lambda: find_run(store, run.id[:8]), lambda: tidy(store.runs()), lambda: diff_runs(run, other), lambda: diff_runs(other, run),
                lambda: summary_table(tidy([run]))):
        act()


def stored(root: Path) -> tuple[RunStore, StoredRun, StoredRun]:
    store, runs = RunStore(root), []
    panel = Panel(np.full((8, 38, 3), 120, np.uint8), "s1", "NA", "false alarm", 0.2, 0.15)
    for seed in (3, 4):
        runs.append(store.save("toy", {"detector": "toy 1", "seed": seed}, {"seed": seed}, toy_run(0.25), provenance("cpu", "smoke", {"fit": 1.0}),
                               [panel]))
    return store, *runs


def run_cases(run: StoredRun, count: int) -> Iterator[tuple[str, str, bytes]]:
    """(file, what is wrong with it, its new content)."""
    for name in ("params.json", "provenance.json", "panels/panels.json"):
        value = json.loads((run.folder / name).read_text())
        yield from ((name, what, bad) for what, bad in NO_JSON.items())
        yield from ((name, what, as_json(other)) for what, other in changed_values(value, seed=len(name), count=count))
    for name in ("metrics.csv", "scores.csv"):
        content = (run.folder / name).read_bytes()
        yield from ((name, what, bad) for what, bad in [*NO_TEXT.items(), *damaged(content, cuts=4, flips=6)])
        yield from ((name, f"cell {cell[:12]!r}", content.replace(b"0.25", cell.encode()).replace(b"0.1", cell.encode())) for cell in ODD_CELLS)
        yield name, "a column twice", content.replace(b"metric,", b"value,").replace(b"kind,", b"score,")
        yield name, "other columns", b"a,b\n1,2\n"
    yield from (("panels/00_false_alarm.webp", what, bad) for what,
                bad in list(damaged((run.folder / "panels/00_false_alarm.webp").read_bytes(), cuts=2, flips=2)))


def test_runs(sandbox: Sandbox) -> None:  # noqa: F811
    store, run, other = stored(sandbox.inputs / "results")
    for name, what, bad in run_cases(run, 12):
        path = run.folder / name
        whole = path.read_bytes()
        path.write_bytes(bad)
        sandbox.open("runs", f"{name}, {what}", lambda: look_at(store, run, other), run.folder)
        sandbox.open("runs", f"verify, {name}, {what}", lambda: [verify(store), find_rubbish(store)], run.folder)
        OPENED["runs"] -= 1  # the same input
        record = {"state": "done", "runs": {f"toy/{run.id}": "0" * 16}, "error": []}
        sandbox.open("runs", f"sweep, {name}, {what}", lambda record=record: cell_state(record, store.path), run.folder)
        OPENED["runs"] -= 1
        path.write_bytes(whole)
    assert verify(store) == []
    seal(store)
    seals = store.path / "toy" / "SHA256SUMS"
    whole = seals.read_bytes()
    for what, bad in [*NO_TEXT.items(), *damaged(whole, cuts=3, flips=4), ("outside", b"0" * 64 + b"  ../../../evil/x\n"),
                      ("absolute", b"0" * 64 + b"  //etc/passwd\n")]:
        seals.write_bytes(bad)
        sandbox.open("runs", f"seals, {what}", lambda: [read_seals(seals.parent), verify(store)], seals)


def test_records_of_sweeps(sandbox: Sandbox) -> None:  # noqa: F811
    notebook = write_tiny(sandbox.inputs)
    cell = Cell(str(notebook), notebook, {"seed": 1}, ("seed",))
    folder, store = sandbox.root / "targets" / "cell", sandbox.root / "targets" / "results"
    record = {"schema": 1, "key": cell.key, "label": "tiny", "experiment": "tiny", "parameters": {"seed": 1}, "state": "done", "error": [],
              "executed": "", "seconds": 1.0,
              "peak_memory_mb": 3, "runs": {"tiny/0123456789ab": "0" * 16}}
    for what, bad in [*NO_JSON.items(), *damaged(as_json(record), cuts=3, flips=3),
                      *((what, as_json(value)) for what, value in changed_values(record, count=40)),
                      ("outside", as_json({**record, "runs": {"../../evil": "0"}}))]:
        folder.mkdir(exist_ok=True)
        (folder / "record.json").write_bytes(bad)
        sandbox.open("runs", f"record.json, {what}", lambda: cell_state(read_record(folder), store), folder, free=folder)
    (folder / "record.json").unlink()
    # What a cell is said to have touched decides what is removed before it starts again.
    for what, bad in [("outside", b"draft ../../home\ndraft ../../inputs\n"), ("absolute", f"draft {sandbox.root / 'home'}\n".encode()),
                      ("here", b"draft .\ndraft \n"),
                      ("a run", b"draft tiny/0123456789ab\n"), *NO_TEXT.items()]:
        (folder / "seen.txt").write_bytes(bad)
        (store / "tiny" / "0123456789ab").mkdir(parents=True, exist_ok=True)
        sandbox.open("runs", f"seen.txt, {what}", lambda: _begin(cell, folder, store), folder, free=folder)
        assert (store / "tiny" / "0123456789ab").is_dir(), what


def _begin(cell: Cell, folder: Path, store: Path) -> None:
    """`start_cell`, but for the process."""
    from unittest import mock

    with mock.patch("subprocess.Popen"):
        start_cell(cell, folder, store)


# Annotations -------------------------------------------------------------------------------------------------------------------------

EVENTS = [{"event": "visit", "image": "0.png", "size": [64, 64], "pixels": "x"},
          {"event": "click", "image": "0.png", "mark": 1, "class": "hole", "x": 30, "y": 30, "positive": True, "frame": [0, 0, 64, 64]},
          {"event": "stroke", "image": "0.png", "mark": 1, "class": "hole", "points": [[3, 3], [9, 9]], "width": 3.0, "add": True},
          {"event": "undo", "image": "0.png", "mark": 1}, {"event": "class", "image": "0.png", "mark": 1, "class": "crack"},
          {"event": "accept", "image": "0.png", "mark": 1, "area": 30, "adapting": False},
          {"event": "reopen", "image": "0.png", "mark": 1, "restored": False},
          {"event": "normal", "image": "1.png", "normal": True}, {"event": "adapting", "on": True}]


def log_of(events: list) -> bytes:
    return b"".join(as_json(event) + b"\n" for event in events)


@pytest.fixture(scope="module")
def plain():
    return PlainSam(load_sam("sam_lite", device="cpu").freeze())


def open_logs(sandbox: Sandbox, plain: Any, count: int) -> None:  # noqa: F811
    for name in ("0.png", "1.png"):
        sandbox.put(f"images/{name}", IMAGES["rgb.png"])
    out = sandbox.target
    cases = [*NO_JSON.items(), *damaged(log_of(EVENTS), cuts=4, flips=8),
             *((what, log_of(value)) for what, value in changed_values(EVENTS, count=count)),
             ("outside", log_of([{**EVENTS[1], "mark": "../../evil"}])),
             ("image outside", log_of([{**EVENTS[1], "image": "../../evil"}, {**EVENTS[5], "image": "../../evil"}])),
             ("undo first", log_of([EVENTS[3]])), ("undo twice", log_of([EVENTS[1], EVENTS[3], EVENTS[3]])),
             ("infinite area", log_of([EVENTS[1], {**EVENTS[5], "area": float("inf")}])),
             ("method", log_of([{"event": "_init__", "image": "x"}])), ("number as a name", log_of([{**EVENTS[1], "image": 7}]))]
    for what, bad in cases:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "log.jsonl").write_bytes(bad + (b"" if bad.endswith(b"\n") else b"\n"))  # what follows the last line's end is dropped
        sandbox.open("annotation logs", what, lambda: _events(out / "log.jsonl"), out / "log.jsonl")

        def session() -> None:
            with Session(sandbox.inputs / "images", out, plain, ("hole", "crack")) as session:
                session.next()
                list(session.annotated([]))

        sandbox.open("annotation logs", f"session, {what}", session, out, free=out)
        OPENED["annotation logs"] -= 1  # the same input


def _events(path: Path) -> list:
    log = EventLog(path)
    log.close()
    return log.events


def test_logs_of_annotations(sandbox, plain) -> None:  # noqa: F811
    open_logs(sandbox, plain, 40)


@pytest.mark.slow
def test_many_more_logs_of_annotations(sandbox, plain) -> None:  # noqa: F811
    open_logs(sandbox, plain, 600)


# Export ------------------------------------------------------------------------------------------------------------------------------

class _Odd(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), value))

    def forward(self, images):
        return images.float().mean((1, 2, 3)) * self.weight


def test_exports(sandbox: Sandbox) -> None:  # noqa: F811
    pytest.importorskip("onnxruntime", reason="the optional extra onnx is not installed: pip install 'defectbook[onnx]'")
    path = sandbox.root / "targets" / "graph.onnx"

    def mean(image: np.ndarray) -> np.ndarray:
        return image.astype(np.float32).mean(keepdims=True)[0, 0]

    cases = {"not finite": (_Odd(float("nan")), mean, {}), "infinite": (_Odd(float("inf")), mean, {}), "other numbers": (_Odd(1.5), mean, {}),
             "other shape": (_Odd(1.0), lambda image: np.zeros((3, 3)), {}),
             "answer of NaN": (_Odd(1.0), lambda image: np.full(1, np.nan, np.float32), {}),
             "tolerance of NaN": (_Odd(1.5), mean, {"tolerance": float("nan")}), "no images": (_Odd(1.0), mean, {"images": []}),
             "grey image": (_Odd(1.0), mean, {"images": [np.zeros((8, 8), np.uint8)]}), "error": (torch.nn.Identity(), lambda image: 1 / 0, {})}
    for what, (graph, answer, options) in cases.items():
        sandbox.open("exports", what, lambda graph=graph, answer=answer,
                     options=options: export_checked(graph, answer, path, 8, "mean", {}, **options), path, refuse=True)
    path.write_bytes(b"mine")
    sandbox.open("exports", "a file that is there", lambda: export_checked(_Odd(1.0), mean, path, 8, "mean", {}), path, refuse=True)
    assert path.read_bytes() == b"mine"


# Whatever comes ----------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12)
ANYTHING = st.one_of(st.binary(max_size=300), st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")), JSON.map(as_json))


def open_anything(box: Sandbox, data: bytes) -> None:
    """The same bytes as every kind of file."""
    write_tiny(box.inputs)
    notebook = box.inputs / "tiny.ipynb"
    assert notebook.is_file()
    readers: dict[str, Callable[[Path], Any]] = {
        "classes.json": read_classes,
        "x.png": read_image, "x.bmp": read_mask, "x.pth": read_state, "x.safetensors": read_state, "x.yaml": read_grid, "x.npy": read_map,
        "boxes.txt": lambda path: read_boxes(path, (64, 64)), "x.zip": lambda path: unpack(path, box.target), "log.jsonl": _events,
        "record.json": lambda path: read_record(path.parent), "config.json": lambda path: load_detector(path.parent, "cpu"),
        "threshold.json": lambda path: load_threshold(path.parent)}
    for name, read in readers.items():
        path = box.put(f"{name}.d/{name}", data)
        named, free = path.parent if name in ("config.json", "record.json") else path, path if name == "log.jsonl" else box.target
        box.open("anything", f"{name} {data[:40]!r}", lambda path=path, read=read: read(path), named, free=free, whole=name == "x.zip")
        shutil.rmtree(box.target, ignore_errors=True)
    box.judge()


@QUICK
@given(data=ANYTHING)
def test_anything(sandbox, data) -> None:  # noqa: F811
    open_anything(sandbox, data)


@pytest.mark.slow
@LONG
@given(data=ANYTHING)
def test_anything_at_length(sandbox, data) -> None:  # noqa: F811
    open_anything(sandbox, data)


# The sandbox itself ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("act", "message"), [
    (lambda box: pickle.loads(b"N."), "pickle.loads was called"),
    (lambda box: torch.load(box.put("w.pth", saved({})), weights_only=False), "without weights_only"),
    (lambda box: np.load(box.put("a.npy", _npy(np.zeros(1))), allow_pickle=True), "allow_pickle"),
    (lambda box: (box.root / "evil").write_text("x"), "changed"),
    (lambda box: (box.root / "home" / "new").mkdir(), "changed"), (lambda box: Path("new").touch(), "changed"),
    (lambda box: os.system("true"), "os.system"),
    (lambda box: Path("/tmp/defectbook-fuzz-outside").touch(), "/tmp/defectbook-fuzz-outside"), (lambda box: 1 / 0, "ZeroDivisionError"),
    (lambda box: (_ for _ in ()).throw(ParameterError("somewhere")), "should name here.txt"), (lambda box: None, "was taken")])
def test_the_sandbox_notices(sandbox, act, message) -> None:  # noqa: F811
    before = OPENED.copy()
    sandbox.open("none", "a sin", lambda: act(sandbox), "here.txt", refuse=True)
    OPENED.clear()
    OPENED.update(before)
    problems, sandbox.problems = sandbox.problems, []
    Path("/tmp/defectbook-fuzz-outside").unlink(missing_ok=True)
    assert any(message in problem for problem in problems), problems


def test_at_least_three_hundred(request, capsys) -> None:
    """Counted over the tests above, where all of them ran."""
    with capsys.disabled():
        print(f"\nmalformed inputs: {sum(OPENED.values())} ({', '.join(f'{count} {kind}' for kind, count in sorted(OPENED.items()))})")
    ran = {item.originalname for item in request.session.items if item.path == request.path}
    if {"test_images", "test_archives", "test_runs", "test_grids", "test_checkpoints"} <= ran:
        assert sum(OPENED.values()) >= 300 and issubclass(ParameterError, DefectbookError)
