import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from defectbook.core import DataError, DefectbookError, ParameterError, Sample, StoreError, make_folder, unknown, write_whole
from defectbook.data.datasets import IMAGE_SUFFIXES
from defectbook.practice.annotations import (
    Annotated,
    EventLog,
    FolderLock,
    Ledger,
    Mark,
    MaskFiles,
    Page,
    check_classes,
    export_coco,
    export_mvtec,
)
from defectbook.practice.players import Ahead, AnnotatorModel, Picture, Player, check_stroke, frame_of, paint, read_picture



def list_images(images: Path | str | Iterable[Any], without: Path | str | None = None) -> list[Sample]:
    """A folder (with all folders in it, but not `without`), or paths, arrays and samples, as samples with names of their own.

    Files are named by their path below the folder, or below what their paths have in common. Raises `DataError` for nothing to show,
    `ParameterError` for two images of one name.
    """
    if isinstance(images, (str, Path)):
        root = Path(images)
        if not root.exists():
            raise DataError(f"{root}: no such folder or image")
        hidden = None if without is None else Path(without).resolve()
        images = [root] if root.is_file() else sorted(
            path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(root).parts) and (hidden is None or hidden not in path.resolve().parents))
    items = list(images)
    paths = [Path(item).absolute() for item in items if isinstance(item, (str, Path))]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    samples = [_sample(number, item, common) for number, item in enumerate(items, 1)]
    if not samples:
        raise DataError(f"no images to annotate; give a folder with files {', '.join(IMAGE_SUFFIXES)}, or a list of them")
    names = [sample.name for sample in samples]
    if twice := next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None:
        raise ParameterError(f"two images are named {twice!r}; give samples names of their own")
    return samples


def _sample(number: int, item: Any, common: Path) -> Sample:
    if isinstance(item, Sample):
        return item if item.name else Sample(item.image_source, name=f"image {number}")
    if isinstance(item, (str, Path)):
        return Sample(Path(item), name=Path(item).absolute().relative_to(common).as_posix())
    return Sample(item, name=f"image {number}")




def _alone(method: Callable) -> Callable:
    """One action at a time: a notebook's cell and its widget may run in two threads."""
    @wraps(method)
    def guarded(self, *args, **kwargs):
        with self.guard:
            return method(self, *args, **kwargs)

    return guarded


class Session:
    """Annotates `images` (see `list_images`) into the folder `out`, with `model`; opening the folder again goes on where it was.

    classes: names; the first is chosen at the start. plain: the same model without adaptation, for `adapt(False)`. embed: of an image, for the
    model's set_image, so that it can be made ahead. provenance: JSON values for the log, beside time and classes. The notes say what opening
    found. Raises `StoreError` for a folder that is held, broken or read-only, `ParameterError` and `DataError`.
    """

    def __init__(self, images: Any, out: Path | str, model: AnnotatorModel, classes: Sequence[str] = ("defect",), plain: AnnotatorModel | None = None,
                 embed: Callable[[np.ndarray], Any] | None = None, provenance: Mapping[str, Any] | None = None):
        self.out, self.classes, self.guard = Path(out), check_classes(classes), threading.RLock()
        self.samples = list_images(images, without=out)
        self.cls, self.notes, self.closed = self.classes[0], [], False
        with contextlib.ExitStack() as undo:
            self._lock = FolderLock(out)
            undo.callback(self._lock.release)
            self._log = EventLog(self.out / "log.jsonl")
            undo.callback(self._log.close)
            self.ledger = Ledger(self._log.events)
            self.masks, self._state = MaskFiles(self.out / "masks"), self.out / "model.safetensors"
            self._pictures, self._embeddings = Ahead(3), Ahead(8)
            undo.callback(self._embeddings.close)
            undo.callback(self._pictures.close)
            self._players = {True: Player(model, embed, self._embeddings), False: Player(plain or model, embed, self._embeddings)}
            self.adapts = plain is not None
            self._before: tuple[str, int, dict] | None = None
            self._tell_opening()
            self._write("session", classes=list(self.classes), images=len(self.samples), pid=os.getpid(), **dict(provenance or {}))
            self._restore_model()
            names = [sample.name for sample in self.samples]
            self._open(names.index(self.ledger.last) if self.ledger.last in names else 0)
            undo.pop_all()

    def _tell_opening(self) -> None:
        if self._lock.stale:
            self.notes.append(f"took over from process {self._lock.stale.get('pid', '?')}, which ended without closing")
        if self._log.dropped:
            self.notes.append("the last line of the log was incomplete and was dropped")
        known, names = self.ledger.pages, {sample.name for sample in self.samples}
        if done := sum(bool(page.accepted or page.normal) for page in known.values()):
            self.notes.append(f"going on: {done} images were decided, {sum(len(page.accepted) for page in known.values())} masks accepted")
        if gone := sorted(name for name, page in known.items() if page.marks and name not in names):
            self.notes.append(f"{len(gone)} annotated images are not in the list now, such as {gone[0]}; their masks are kept")
        if other := sorted({mark.cls for page in known.values() for mark in page.marks.values()} - set(self.classes)):
            raise ParameterError(f"{self.out}: holds masks of class {other[0]!r}, which is not among the classes {', '.join(self.classes)}; add it")

    # -- what there is -----------------------------------------------------------------------------------------------------------
    @property
    def name(self) -> str:
        return self.samples[self.index].name

    @property
    def page(self) -> Page:
        return self.ledger.page(self.name)

    @property
    def picture(self) -> Picture:
        """The image that is open. Raises `DataError` when it could not be read."""
        if self._picture is None:
            raise DataError(self.problem)
        return self._picture

    @property
    def mask(self) -> np.ndarray | None:
        """The open mark's mask, bool (H, W); None when no mark is open."""
        return self._mask

    def accepted_mask(self, number: int) -> np.ndarray | None:
        """An accepted mask of the open image, bool (H, W); None when its file is gone."""
        return self._read_mask(self.name, number)

    def tally(self) -> pd.DataFrame:
        """One row a mask: image, mask, class, clicks, strokes, area in px, accepted."""
        rows = [(page.name, mark.number, mark.cls, len(mark.clicks), len(mark.strokes), mark.area, mark.accepted)
                for page in self.ledger.pages.values() for mark in page.marks.values()]
        return pd.DataFrame(rows, columns=["image", "mask", "class", "clicks", "strokes", "area", "accepted"])

    # -- clicks, strokes and steps back ------------------------------------------------------------------------------------------
    @_alone
    def click(self, x: float, y: float, positive: bool = True, view: Sequence[float] | None = None) -> np.ndarray:
        """A click at column x, row y of the image in px; returns the open mark's mask, bool (H, W). view: what the model should see of the image.

        Without an open mark it opens one. Raises `ParameterError` for a click outside of the image, `DataError` when there is no image.
        """
        height, width = self.picture.image.shape[:2]
        if not (np.isfinite([x, y]).all() and 0 <= x < width and 0 <= y < height):
            raise ParameterError(f"a click at ({x:g}, {y:g}) lies outside of the image, {width}x{height} px; nothing was changed")
        x, y, mark = int(x), int(y), self.page.open
        frame = frame_of(view, (height, width), (x, y), mark.frame if mark else None)
        self._step("click", x=x, y=y, positive=bool(positive), frame=list(frame))
        return self._answer()

    @_alone
    def stroke(self, points: Sequence[Sequence[float]], width: float = 5, add: bool = True) -> np.ndarray:
        """A stroke of the brush through points (x, y) in px; returns the open mark's mask. Opens a mark if need be. Raises `ParameterError`."""
        points, _ = check_stroke(points, width), self.picture  # which raises when there is none
        self._step("stroke", points=points, width=round(float(width), 1), add=bool(add))
        return self._answer(fresh=False)

    @_alone
    def undo(self) -> np.ndarray | None:
        """Take the last step back: of the open mark, else the acceptance of the last mark. Returns the open mark's mask, or None.

        The model's state before that acceptance comes back too, if it was this session's last one. Raises `ParameterError` with nothing to undo.
        """
        mark = self.page.open
        if mark is None:
            return self._reopen()
        fresh = mark.steps[-1]["event"] == "click"
        self._write("undo", image=self.name, mark=mark.number)
        return self._answer(fresh)

    def _reopen(self) -> np.ndarray | None:
        if not self.page.accepted:
            raise ParameterError("there is nothing to undo on this image")
        mark = self.page.accepted[-1]
        restored = bool(self._before and self._before[:2] == (self.name, mark.number))
        self._write("reopen", image=self.name, mark=mark.number, restored=restored)
        if restored:
            self._player.model.load_state(self._before[2])
            self._keep_state()
        self._before = None
        return self._answer()

    def _step(self, event: str, **values: Any) -> None:
        mark = self.page.open
        number, cls = (mark.number, mark.cls) if mark else (self.page.numbers + 1, self.cls)
        self._write(event, image=self.name, mark=number, **{"class": cls}, **values)

    # -- the mask ----------------------------------------------------------------------------------------------------------------
    @property
    def _player(self) -> Player:
        return self._players[self.ledger.adapting]

    def _answer(self, fresh: bool = True) -> np.ndarray | None:
        """Make the open mark's mask, and write it. fresh: the model has to be asked."""
        mark = self.page.open
        if fresh or mark is None:
            self._from_model = self._player.answer(self.name, mark, self.picture) if mark else self._player.forget()
        self._mask = self._touched_up(mark)
        if mark is not None:
            self.masks.write(self.name, mark.number, self._mask)
        return self._mask

    def _touched_up(self, mark: Mark | None) -> np.ndarray | None:
        if mark is None:
            return None
        mask = np.zeros(self.picture.image.shape[:2], np.uint8) if self._from_model is None else self._from_model.astype(np.uint8)
        for stroke in mark.strokes:
            paint(mask, stroke["points"], stroke["width"], stroke["add"])
        return mask > 0

    def _read_mask(self, name: str, number: int) -> np.ndarray | None:
        """A mask's file, or None where it is missing, damaged, or of another size than the image had."""
        with contextlib.suppress(DataError):
            mask = self.masks.read(name, number)
            return mask if mask is None or mask.shape == self.ledger.page(name).size else None
        return None

    @_alone
    def settle(self) -> None:
        """Let the model take the step of learning that it put off to answer faster; it changes no result. Call it while somebody looks."""
        self._player.settle()

    # -- decisions ---------------------------------------------------------------------------------------------------------------
    @_alone
    def accept(self) -> str:
        """Accept the open mark; the model may learn from it. Returns the model's note, or "". Raises `ParameterError` for none or an empty mask."""
        mark = self.page.open
        if mark is None:
            raise ParameterError("there is no open mask to accept; click on a defect first")
        if not self._mask.any():
            raise ParameterError("the mask is empty, so it was not accepted; click on the defect, paint it, or undo")
        mask, before = self._mask, self._model_state()
        self._write("accept", image=self.name, mark=mark.number, area=int(np.count_nonzero(mask)), clicks=len(mark.clicks),
                    adapting=self.ledger.adapting)
        self._mask = self._from_model = None
        note = self._player.finish(self.name, mark, self.picture, mask)
        self._before = None if before is None else (self.name, mark.number, before)
        self._keep_state()
        return note

    @_alone
    def choose(self, cls: str) -> np.ndarray | None:
        """The class of the open mark and of those to come; returns the open mark's mask. Raises `ParameterError`."""
        if cls not in self.classes:
            raise ParameterError(unknown("class", cls, self.classes))
        self.cls, mark = cls, self.page.open
        if mark is not None and mark.cls != cls:
            self._write("class", image=self.name, mark=mark.number, **{"class": cls})
            self._answer()
        return self._mask

    @_alone
    def delete(self, number: int) -> None:
        """Remove a mask of the open image; its file stays until the number's folder is removed. Raises `ParameterError`."""
        if number not in self.page.marks:
            raise ParameterError(f"there is no mask {number} on this image")
        was_open = not self.page.marks[number].accepted
        self._write("delete", image=self.name, mark=number)
        if was_open:
            self._answer()

    @_alone
    def mark_normal(self, normal: bool = True) -> None:
        """Decide that the open image shows no defect, or take that back. Raises `ParameterError` while it has masks."""
        _ = self.picture  # which raises when there is none
        if normal and self.page.marks:
            raise ParameterError(f"this image has {len(self.page.marks)} masks; delete them before you mark it as normal")
        if self.page.normal != normal:
            self._write("normal", image=self.name, normal=bool(normal))

    @_alone
    def adapt(self, on: bool) -> np.ndarray | None:
        """Turn adaptation on or off; an open mark is asked again. Raises `ParameterError` for a model without a plain sister."""
        if not self.adapts:
            raise ParameterError("this session's model does not adapt; give adaptation=... when it is opened")
        if on != self.ledger.adapting:
            self._write("adapting", on=bool(on))
            self._before = None
            if self.page.open is not None:
                self._answer()
        return self._mask

    # -- from image to image -----------------------------------------------------------------------------------------------------
    @_alone
    def go(self, index: int) -> None:
        """Open image `index`. An open mark is accepted, or dropped when it is empty. Raises `ParameterError` when there is no such image."""
        if not 0 <= index < len(self.samples):
            raise ParameterError(f"there is no image {index + 1}; there are {len(self.samples)}")
        if index != self.index:
            self._leave()
            self._open(index)

    def next(self) -> None:
        self.go(self.index + 1)

    def previous(self) -> None:
        self.go(self.index - 1)

    def _leave(self) -> None:
        mark = self.page.open
        if mark is None or self._picture is None:
            return
        if self._mask.any():
            self.accept()
        else:
            self._write("delete", image=self.name, mark=mark.number)
            self.notes.append(f"{self.name}: its last mask was empty and was dropped")

    def _open(self, index: int) -> None:
        self.index, self._picture, self.problem, self._mask, self._from_model = index, None, "", None, None
        try:
            self._picture = self._pictures.get(index, lambda: read_picture(self.samples[index].image_source))
            self._check_picture(self._picture)
        except DataError as error:
            self._picture, self.problem = None, str(error)
        else:
            self._resume_mark()
            self._player.prepare(self.name, self._picture, frame_of(None, self._picture.image.shape[:2]))
        self._look_ahead()

    def _check_picture(self, picture: Picture) -> None:
        """Log what is looked at. Raises `DataError` when the image is another than the one that was annotated."""
        page, size = self.page, tuple(picture.image.shape[:2])
        if page.marks and page.size != size:
            raise DataError(f"{self.name}: is {size[1]}x{size[0]} px now, and its masks are {page.size[1]}x{page.size[0]}; restore the image")
        if page.marks and page.pixels != picture.pixels:
            self.notes.append(f"{self.name}: has changed since it was annotated; look at its masks")
        if (page.size, page.pixels, self.ledger.last) != (size, picture.pixels, self.name):
            self._write("visit", image=self.name, size=list(size), pixels=picture.pixels)

    def _resume_mark(self) -> None:
        mark = self.page.open
        if mark is None:
            return
        kept = self._read_mask(self.name, mark.number)
        try:
            self._from_model = self._player.answer(self.name, mark, self.picture)
        except DefectbookError as error:
            self.notes.append(f"{self.name}: the model cannot answer the clicks of the open mask ({error})")
        self._mask = self._touched_up(mark)
        if kept is not None and (kept != self._mask).any():
            self._mask = kept
            self.notes.append(f"{self.name}: the model answers otherwise than before; the open mask is shown as it was, up to the next click")

    def _look_ahead(self) -> None:
        """Read and embed the image after this one; what fails will fail again, loudly, when it is opened."""
        index = self.index + 1
        if index >= len(self.samples):
            return
        name, source = self.samples[index].name, self.samples[index].image_source
        waiting = self._pictures.start(index, lambda: read_picture(source))

        def embed(done: Future) -> None:
            if not self.closed and not done.cancelled() and done.exception() is None:
                picture = done.result()
                with contextlib.suppress(RuntimeError):  # the pool has closed meanwhile
                    self._player.prepare(name, picture, frame_of(None, picture.image.shape[:2]))

        waiting.add_done_callback(embed)

    @_alone
    def look(self, view: Sequence[float] | None) -> None:
        """Say what part of the image is looked at, so that its embedding is there when it is clicked."""
        if self._picture is not None and (self.page.open is None or not self.page.open.clicks):
            self._player.prepare(self.name, self._picture, frame_of(view, self._picture.image.shape[:2]))

    # -- what the model learned --------------------------------------------------------------------------------------------------
    def _model_state(self) -> dict | None:
        state = getattr(self._player.model, "state", None)
        return state() if self.ledger.adapting and self.adapts and state else None

    def _keep_state(self) -> None:
        """Write what the model learned, with the number of events it rests on."""
        import torch
        from safetensors.torch import save

        state = self._model_state()
        if state is not None:
            tensors = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in state.items()}
            write_whole(self._state, save(tensors, {"events": str(self.ledger.count)}))

    def _restore_model(self) -> None:
        """Bring the model to where it was: its last state, and what was accepted after that."""
        if not self.adapts:
            return
        events, start = self._log.events, self._load_state()
        ledger, taken_back, latest = Ledger(events[:start]), set(), {}
        for number, event in enumerate(events):
            if event["event"] == "accept":
                latest[event["image"], event["mark"]] = number
            elif event["event"] == "reopen" and event["restored"]:
                taken_back.add(latest[event["image"], event["mark"]])
        for number, event in enumerate(events[start:], start):
            if event["event"] == "accept" and event["adapting"] and number not in taken_back:
                self._learn_again(ledger.pages[event["image"]], event)
            ledger.apply(event)

    def _load_state(self) -> int:
        """Load the kept state; returns how many events it rests on, 0 without one."""
        from safetensors import safe_open

        if not self._state.is_file():
            return 0
        try:
            with safe_open(str(self._state), "pt") as file:
                count, state = int(file.metadata()["events"]), {name: file.get_tensor(name) for name in file.keys()}
            if count > len(self._log.events):
                raise ValueError("it is newer than the log")
            self._players[True].model.load_state(state)
            return count
        except Exception as error:
            self.notes.append(f"{self._state.name}: what the model had learned could not be read ({error}); it learns again from the log")
            return 0

    def _learn_again(self, page: Page, event: Mapping[str, Any]) -> None:
        mark, mask = page.marks[event["mark"]], self.masks.read(page.name, event["mark"])
        sample = next((sample for sample in self.samples if sample.name == page.name), None)
        if sample is None or mask is None:
            return
        with contextlib.suppress(DataError):
            picture = read_picture(sample.image_source)
            self._players[True].finish(page.name, mark, picture, mask)

    # -- handing over ------------------------------------------------------------------------------------------------------------
    def annotated(self) -> Iterator[Annotated]:
        """The decided images, in the list's order: those with accepted masks, and those marked as normal."""
        for sample in self.samples:
            page = self.ledger.pages.get(sample.name)
            if page is None or page.size is None or not (page.accepted or page.normal):
                continue
            masks = [(mark.cls, self._read_mask(page.name, mark.number)) for mark in page.accepted]
            yield Annotated(page.name, sample.image_source, page.size, tuple((cls, mask) for cls, mask in masks if mask is not None))

    @_alone
    def export(self, target: Path | str | None = None) -> tuple[Path, list[str]]:
        """Write a new folder with mvtec/ and coco.json; returns it and notes. target: by default `out`/export-1, -2, ... Raises `StoreError`."""
        numbers = (number for number in range(1, 10**6) if not (self.out / f"export-{number}").exists())
        target = self.out / f"export-{next(numbers)}" if target is None else Path(target)
        if target.exists():
            raise StoreError(f"{target}: exists already; give the name of a new folder")
        if not any(page.accepted or page.normal for page in self.ledger.pages.values()):
            raise ParameterError("nothing is decided yet: accept a mask, or mark an image as normal, before you export")
        notes = export_mvtec(self.annotated(), self.classes, make_folder(target) / "mvtec")
        export_coco(self.annotated(), self.classes, target / "coco.json", {"description": "made with defectbook's annotator"})
        undecided = sum(not (page.accepted or page.normal) for page in map(self.ledger.page, [sample.name for sample in self.samples]))
        if undecided:
            notes.append(f"{undecided} images are not decided and were left out")
        if any(page.open for page in self.ledger.pages.values()):
            notes.append("the open mask is not accepted yet and was left out")
        self._write("export", target=str(target), notes=notes)
        return target, notes

    # -- the end -----------------------------------------------------------------------------------------------------------------
    def _write(self, event: str, **values: Any) -> None:
        """Log an event, then let it happen."""
        if self.closed:
            raise StoreError("this session is closed; open it again to go on")
        self.ledger.apply(self._log.append({"event": event, **values}))

    @_alone
    def close(self) -> None:
        """Let the folder go. Nothing has to be saved: everything was."""
        if not self.closed:
            self.closed = True
            for part in (self._pictures, self._embeddings, self._log):
                part.close()
            self._lock.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error) -> None:
        self.close()


