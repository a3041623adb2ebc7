import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
from PIL import Image

from defectbook.core import DataError, ImageSource, ParameterError, StoreError, make_folder, read_image, read_mask, whole_folder, write_whole
from defectbook.data.datasets import IMAGE_SUFFIXES



class EventLog:
    """A file of JSON lines that only grows; each event is on the disk when `append` returns.

    dropped: the characters of an unfinished last line, which a killed process left, and which opening removes. Raises `StoreError`.
    """

    def __init__(self, path: Path | str):
        self.path, self.dropped = Path(path), 0
        make_folder(self.path.parent)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            content = self.path.read_bytes()
            end = content.rfind(b"\n") + 1
            if end < len(content):
                self.dropped = len(content) - end
                os.ftruncate(self._file, end)
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another output folder") from error
        self.events = [self._parse(number, line) for number, line in enumerate(content[:end].splitlines(), 1)]

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            event = json.loads(line)
            event["event"]
            return event
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{self.path}, line {number}: {line[:40]!r} is no event; remove the line, or choose another output folder") from error

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Write one event, with the time; returns what was written. On a full disk nothing is left of it. Raises `StoreError`."""
        event = {**event, "time": round(time.time(), 3)}
        before = None
        try:
            before = os.fstat(self._file)
            if not before.st_nlink:
                raise StoreError(f"{self.path}: was removed while it was in use; choose another output folder")
            self._write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            if before is not None:
                os.ftruncate(self._file, before.st_size)
            raise StoreError(f"{self.path}: cannot be written ({error.strerror}); free some space, then do it again") from error
        self.events.append(event)
        return event

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line):]
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1




class FolderLock:
    """Holds `folder` for this process. stale: who held it before and never let go ({} if nobody). Raises `StoreError` that names the holder."""

    def __init__(self, folder: Path | str):
        self.path = make_folder(folder) / "annotator.lock"
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written ({error.strerror}); choose another output folder") from error
        try:
            _hold(self._file)
        except OSError as error:
            holder = self._read()
            os.close(self._file)
            self._file = -1
            if not isinstance(error, (BlockingIOError, PermissionError)):
                raise StoreError(f"{self.path}: cannot be locked ({error.strerror}); choose a folder on a local disk") from error
            raise StoreError(f"{folder}: is open in another annotator (process {holder.get('pid', '?')} on {holder.get('host', '?')}, since "
                             f"{holder.get('since', '?')}); close that one, or choose another output folder") from error
        self.stale = self._read()
        self._say({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})

    def _read(self) -> dict[str, Any]:
        try:
            holder = json.loads(os.pread(self._file, 4096, 0) if hasattr(os, "pread") else self.path.read_bytes())
            return holder if isinstance(holder, dict) else {}
        except (OSError, ValueError):
            return {}

    def _say(self, holder: dict[str, Any]) -> None:
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(holder).encode() if holder else b"")
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written ({error.strerror}); free some space, or choose another folder") from error

    def release(self) -> None:
        """Let the folder go; the file stays, since removing it would race with whoever comes next."""
        if self._file >= 0:
            try:
                self._say({})
            finally:
                os.close(self._file)
                self._file = -1


def _hold(file: int) -> None:
    """Lock an open file for as long as it is open. Raises `OSError` when somebody else has."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 1 << 20, os.SEEK_SET)  # a byte beyond the content, which others must be able to read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)




@dataclass
class Mark:
    """One mask in the making, or accepted. steps: the events of its clicks and strokes, in order. area: of the accepted mask, in px."""

    number: int
    cls: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    accepted: bool = False
    area: int = 0

    @property
    def clicks(self) -> list[dict[str, Any]]:
        return [step for step in self.steps if step["event"] == "click"]

    @property
    def strokes(self) -> list[dict[str, Any]]:
        return [step for step in self.steps if step["event"] == "stroke"]

    @property
    def frame(self) -> tuple[int, int, int, int] | None:
        """The part of the image that the model saw at the last click, x0, y0, x1, y1 in px; None before the first click."""
        return tuple(self.clicks[-1]["frame"]) if self.clicks else None


@dataclass
class Page:
    """What is known of one image. size: (height, width) and pixels: a hash, once it was seen. normal: it was marked as without defects."""

    name: str
    size: tuple[int, int] | None = None
    pixels: str = ""
    normal: bool = False
    marks: dict[int, Mark] = field(default_factory=dict)
    numbers: int = 0  # given so far: a number is never used again

    @property
    def open(self) -> Mark | None:
        return next((mark for mark in self.marks.values() if not mark.accepted), None)

    @property
    def accepted(self) -> list[Mark]:
        return [mark for mark in self.marks.values() if mark.accepted]




class Ledger:
    """The state of an annotation, made of its events. pages: by the images' names. last: the image that was looked at last."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()):
        self.pages: dict[str, Page] = {}
        self.last, self.adapting = "", True
        self.count = 0
        for event in events:
            try:
                self.apply(event)
            except (KeyError, TypeError, ValueError) as error:
                raise StoreError(f"event {self.count + 1} of the log, {json.dumps(event)[:80]}: does not fit what came before "
                                 f"({type(error).__name__}: {error}); remove the line, or choose another output folder") from error

    def page(self, name: str) -> Page:
        return self.pages.setdefault(name, Page(name))

    def apply(self, event: Mapping[str, Any]) -> None:
        """Change the state by one event."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)
        self.count += 1

    def _mark(self, event: Mapping[str, Any]) -> Mark:
        return self.pages[event["image"]].marks[event["mark"]]

    def _on_visit(self, event: Mapping[str, Any]) -> None:
        page = self.page(event["image"])
        page.size, page.pixels, self.last = tuple(event["size"]), event["pixels"], event["image"]

    def _on_click(self, event: Mapping[str, Any]) -> None:
        page, number = self.page(event["image"]), event["mark"]
        if number not in page.marks:
            page.marks[number], page.numbers = Mark(number, event["class"]), max(page.numbers, number)
        page.marks[number].steps.append(dict(event))
        page.normal = False

    _on_stroke = _on_click

    def _on_undo(self, event: Mapping[str, Any]) -> None:
        mark = self._mark(event)
        mark.steps.pop()
        if not mark.steps:
            del self.pages[event["image"]].marks[event["mark"]]

    def _on_class(self, event: Mapping[str, Any]) -> None:
        self._mark(event).cls = event["class"]

    def _on_accept(self, event: Mapping[str, Any]) -> None:
        mark = self._mark(event)
        mark.accepted, mark.area = True, int(event["area"])

    def _on_reopen(self, event: Mapping[str, Any]) -> None:
        self._mark(event).accepted = False

    def _on_delete(self, event: Mapping[str, Any]) -> None:
        del self.pages[event["image"]].marks[event["mark"]]

    def _on_normal(self, event: Mapping[str, Any]) -> None:
        self.page(event["image"]).normal = bool(event["normal"])

    def _on_adapting(self, event: Mapping[str, Any]) -> None:
        self.adapting = bool(event["on"])




def file_name(name: str, limit: int = 150) -> str:
    """`name` as a file name of at most `limit` characters: unusual ones are quoted, long names end in a hash; different names stay different."""
    quoted = quote(name, safe=" ()[]+,=@").replace("~", "%7E")
    quoted = "%2E" + quoted[1:] if quoted.startswith(".") else quoted
    return quoted if len(quoted) <= limit else f"{quoted[:limit - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class MaskFiles:
    """The masks of an annotation, one PNG each (0 or 255), at folder/<image>/<number>.png."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def path(self, image: str, number: int) -> Path:
        return self.folder / file_name(image) / f"{number}.png"

    def write(self, image: str, number: int, mask: np.ndarray) -> None:
        """Write a mask, bool (H, W), whole or not at all. Raises `StoreError`."""
        write_whole(self.path(image, number), png_bytes(mask.astype(np.uint8) * 255))

    def read(self, image: str, number: int) -> np.ndarray | None:
        """The mask as bool (H, W); None where there is none. Raises `DataError` for a damaged file."""
        path = self.path(image, number)
        return read_mask(path) > 0 if path.is_file() else None


def png_bytes(array: np.ndarray) -> bytes:
    """A PNG of a uint8 array, (H, W) or (H, W, 3) RGB, packed fast rather than small."""
    array = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", array, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()




def run_lengths(mask: np.ndarray) -> list[int]:
    """The lengths of a mask's runs, (H, W) read column by column; the first counts zeros and may be 0."""
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff([0, *changes, flat.size]).tolist()
    return [0, *lengths] if flat.size and flat[0] else lengths


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run lengths: {"size": [H, W], "counts": text}."""
    lengths, letters = run_lengths(mask), []
    for index, length in enumerate(lengths):
        value, more = length - (lengths[index - 2] if index > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + 32 * more))
    return {"size": [int(side) for side in mask.shape], "counts": "".join(letters)}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask, bool (H, W), of `encode_rle`. Raises `DataError` when the lengths do not add up to the size."""
    lengths: list[int] = []
    value = shift = 0
    for letter in rle["counts"]:
        bits = ord(letter) - 48
        value, shift = value | (bits & 31) << shift, shift + 5
        if not bits & 32:
            value -= 1 << shift if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    height, width = rle["size"]
    if shift or min(lengths, default=0) < 0 or sum(lengths) != height * width:
        raise DataError(f"run lengths of {sum(lengths)} px for a mask of {width}x{height}; the file is damaged")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape((height, width), order="F")




@dataclass(frozen=True)
class Annotated:
    """One decided image. objects: (class, mask bool (H, W)) in the order they were accepted; none means normal. size: (height, width)."""

    name: str
    image: ImageSource
    size: tuple[int, int]
    objects: tuple[tuple[str, np.ndarray], ...] = ()


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The names, fit to be folders. Raises `ParameterError` for none, more than 254, twice the same, and names with a meaning of their own."""
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    if not 1 <= len(names) <= 254 or len({str(name).lower() for name in names}) < len(names):
        raise ParameterError(f"classes {list(names)}: give 1 to 254 different names")
    for name in names:
        if not isinstance(name, str) or not name or name.strip(" .") != name or any(c in '/\\:*?"<>|' or ord(c) < 32 for c in name) or len(name) > 80:
            raise ParameterError(f"class {name!r}: give a name that can be a folder's: without / \\ : * ? \" < > |, spaces and dots at its ends")
        if name.lower() in ("good", "normal", "combined"):
            raise ParameterError(f"class {name!r}: this name is taken by the folder layout; choose another")
    return names


def class_codes(classes: Sequence[str]) -> dict[str, int]:
    """The grey value of each class in a mask file, as far apart as 255 allows; one class is 255."""
    return {name: round(255 * (index + 1) / len(classes)) for index, name in enumerate(classes)}


def class_mask(annotated: Annotated, codes: Mapping[str, int]) -> np.ndarray:
    """One mask of grey values, uint8 (H, W); where two objects overlap the later one is on top."""
    mask = np.zeros(annotated.size, np.uint8)
    for cls, pixels in annotated.objects:
        mask[pixels] = codes[cls]
    return mask




def export_mvtec(images: Iterable[Annotated], classes: Sequence[str], target: Path | str) -> list[str]:
    """Write a new folder in MVTec's layout, which `read_folder` opens; returns what a reader of it must know, one line each.

    Normal images go to train/good, others to test/<class>, or test/combined for several classes in one. With several classes in the set,
    classes.json says which grey value is which. An image that is gone is left out with a note. Raises `StoreError` when `target` exists.
    """
    target, classes = Path(target), check_classes(classes)
    if target.exists():
        raise StoreError(f"{target}: exists already; give the name of a new folder")
    codes, notes, kinds = class_codes(classes), [], {kind: set() for kind in (*classes, "good", "combined")}
    with whole_folder(target) as draft:
        (draft / "train" / "good").mkdir(parents=True)
        for annotated in images:
            try:
                content, suffix = _as_file(annotated)
            except DataError as error:
                notes.append(f"left out: {error}")
                continue
            named = {cls for cls, _ in annotated.objects}
            kind = "good" if not named else named.pop() if len(named) == 1 else "combined"
            path = PurePosixPath(annotated.name)
            stem = file_name(str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else annotated.name)
            stem = file_name(annotated.name) + "_" if stem in kinds[kind] or stem.endswith("_mask") else stem
            kinds[kind].add(stem)
            _put(draft / ("train" if kind == "good" else "test") / kind / (stem + suffix), content)
            if annotated.objects:
                _put(draft / "ground_truth" / kind / f"{stem}_mask.png", png_bytes(class_mask(annotated, codes)))
        if len(classes) > 1:
            _put(draft / "classes.json", json.dumps({"normal": 0, **codes}, indent=1, ensure_ascii=False).encode())
    never = [cls for cls in classes if not kinds[cls]]
    notes += [f"class {cls}: no image shows only this class" if kinds["combined"] else f"class {cls}: was never annotated" for cls in never]
    if not kinds["good"]:
        notes.append("no image is marked as normal, and readers of this layout want some in train/good: mark a few, or put some there")
    return notes


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _as_file(annotated: Annotated) -> tuple[bytes, str]:
    """(content, suffix) of the image: the file itself where its header tells the size people saw, else a PNG. Raises `DataError`."""
    pixels = read_image(annotated.image)
    if pixels.shape[:2] != annotated.size:
        raise DataError(f"{annotated.name}: is {pixels.shape[1]}x{pixels.shape[0]} px now, its masks are {annotated.size[1]}x{annotated.size[0]}; "
                        "restore the image")
    if isinstance(annotated.image, (str, Path)):
        path = Path(annotated.image)
        with Image.open(path) as file:
            upright = file.getexif().get(0x0112, 1) == 1  # a camera may store an image lying on its side
        if upright and path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"):
            return path.read_bytes(), path.suffix
    return png_bytes(pixels), ".png"




def coco_document(images: Iterable[Annotated], classes: Sequence[str], info: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """COCO's JSON object: each object one annotation with compressed run lengths; normal images have none. info: goes in as it is."""
    classes = check_classes(classes)
    document: dict[str, Any] = {"info": dict(info or {}), "images": [], "annotations": [],
                                "categories": [{"id": index, "name": name} for index, name in enumerate(classes, 1)]}
    for number, annotated in enumerate(images, 1):
        height, width = annotated.size
        document["images"].append({"id": number, "file_name": annotated.name, "height": height, "width": width})
        for cls, mask in annotated.objects:
            x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
            document["annotations"].append({
                "id": len(document["annotations"]) + 1, "image_id": number, "category_id": classes.index(cls) + 1, "iscrowd": 0,
                "segmentation": encode_rle(mask), "area": int(np.count_nonzero(mask)), "bbox": [x, y, w, h]})
    return document


def export_coco(images: Iterable[Annotated], classes: Sequence[str], target: Path | str, info: Mapping[str, Any] | None = None) -> None:
    """Write `coco_document` to a new file, whole or not at all. Raises `StoreError` when `target` exists."""
    if Path(target).exists():
        raise StoreError(f"{target}: exists already; give the name of a new file")
    write_whole(target, json.dumps(coco_document(images, classes, info)))


