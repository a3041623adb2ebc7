import io
import platform
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import anywidget
import cv2
import numpy as np
import torch
import traitlets
from PIL import Image

from defectbook import __version__
from defectbook.core import DefectbookError, ParameterError, resolve_device
from defectbook.methods.adaptation import AdaptiveSam
from defectbook.models.sam import PromptModel, load_sam
from defectbook.practice.annotations import Mark, png_bytes
from defectbook.practice.sessions import Session



ADAPTATION = "CA=R RM=E CM"


def open_session(images: Any, model: Any = "sam_lite", classes: Sequence[str] = ("defect",), out: Path | str = "annotations",
                 adaptation: str | None = ADAPTATION, device: str = "auto", **settings: Any) -> Session:
    """A `Session` with a model of `load_sam`'s names, a `PromptModel`, or any object that has set_image, click, undo and finish.

    adaptation: a configuration of `AdaptiveSam`, or None for a model that stays as it is. settings: more for `AdaptiveSam`, such as rates.
    """
    provenance = {"library": __version__, "python": platform.python_version(), "torch": torch.__version__, "configuration": adaptation or "none",
                  "settings": {name: value for name, value in settings.items() if isinstance(value, (str, int, float, bool))}}
    if not isinstance(model, (str, PromptModel)):
        if not all(callable(getattr(model, name, None)) for name in ("set_image", "click", "undo", "finish")):
            raise ParameterError(f"model={type(model).__name__}: give a name such as sam_lite, a PromptModel, or an object with set_image, click, "
                                 "undo and finish")
        return Session(images, out, model, classes, provenance={**provenance, "model": type(model).__name__})
    base = load_sam(model, device=device) if isinstance(model, str) else model.to(resolve_device(device))
    base.freeze()

    def embed(image: np.ndarray) -> Any:
        with torch.no_grad():
            return base.embed([image])

    plain = AdaptiveSam(base, "none", classes)
    adapts = adaptation not in (None, "none")
    first = AdaptiveSam(base, adaptation, classes, **settings) if adapts else plain
    return Session(images, out, first, classes, plain if adapts else None, embed, {**provenance, "model": base.fingerprint})




MOST_SHOWN = 24e6  # pixels: larger images are shown smaller; masks and clicks keep the image's own pixels
LOSSLESS = 1.5e6  # pixels: up to here images go to the browser as PNG, above as JPEG


def picture_bytes(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as the browser gets it."""
    height, width = image.shape[:2]
    if height * width > MOST_SHOWN:
        scale = (MOST_SHOWN / (height * width)) ** 0.5
        image = cv2.resize(image, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
    if height * width <= LOSSLESS:
        return png_bytes(image)
    return cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def stamp(mask: np.ndarray) -> tuple[list[int], bytes]:
    """A mask as its box (x, y, width, height) and a PNG of what lies in it: one bit a pixel, nothing or white. An empty one has a box of 1x1."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    width, height = max(1, width), max(1, height)
    part = Image.fromarray(mask[y:y + height, x:x + width].astype(np.uint8), "P")
    part.putpalette([0, 0, 0, 255, 255, 255])
    file = io.BytesIO()
    part.save(file, "PNG", bits=1, transparency=0, compress_level=1)
    return [x, y, width, height], file.getvalue()




_OPEN: "weakref.WeakValueDictionary[Path, Annotator]" = weakref.WeakValueDictionary()  # the annotators of this kernel, by their folders


class Annotator(anywidget.AnyWidget):
    """Click on defects in JupyterLab; every click and mask is on the disk at once. Run the cell again, in this kernel or another, to go on.

    images: a folder, paths, arrays or samples. model: "sam_lite", another name of `load_sam`, a `PromptModel`, or an object that answers
    clicks. classes: names, chosen with the keys 1 to 9. out: the folder of the log, the masks and the exports. adaptation: how the model
    learns, see `AdaptiveSam`, or None. height: of the picture, px. settings: more for `AdaptiveSam`. What was annotated is in `session`.
    Raises `StoreError` for a folder that another process holds or that cannot be written, `ParameterError` and `DataError`.
    """

    _esm = Path(str(files("defectbook") / "assets" / "annotator.js"))
    _css = Path(str(files("defectbook") / "assets" / "annotator.css"))
    height = traitlets.Int(480).tag(sync=True)

    def __init__(self, images: Any, model: Any = "sam_lite", classes: Sequence[str] = ("defect",), out: Path | str = "annotations",
                 adaptation: str | None = ADAPTATION, height: int = 480, device: str = "auto", **settings: Any):
        folder = Path(out).resolve()
        if (before := _OPEN.get(folder)) is not None:  # the cell was run again: the older widget hands over
            before.hand_over()
        self.session = open_session(images, model, classes, out, adaptation, device, **settings)
        self.last_error = ""  # the traceback of the last unexpected error
        self._shown: tuple[int, str] | None = None
        self._kept: set[int] = set()
        super().__init__(height=height)
        _OPEN[folder] = self
        self.on_msg(self._receive)

    def hand_over(self) -> None:
        """Close the session; the widget says so."""
        self.session.close()
        self._tell("", "this annotator was closed: a newer one is open below, or in another cell", "error")

    # -- messages in -------------------------------------------------------------------------------------------------------------
    def _receive(self, _: Any, content: Any, buffers: Any = None) -> None:
        """Do what the browser asks for, and answer with the new state; whatever goes wrong becomes one line."""
        asked = content if isinstance(content, Mapping) else {}
        with self.session.guard:
            try:
                act = ACTS.get(asked.get("do"))
                if act is None:
                    raise ParameterError(f"the browser asked for {str(asked.get('do'))[:40]!r}, which this version does not know; reload the page")
                text, level = act(self, asked) or "", "said"
            except DefectbookError as error:
                text, level = str(error), "error"
            except Exception as error:
                self.last_error = traceback.format_exc()
                text, level = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (what was done before is kept; see last_error)", "error"
            if asked.get("do") != "look" or level == "error":
                self._tell(str(asked.get("id", "")), text, level)
            if asked.get("do") == "click":
                self.session.settle()

    # -- state out ---------------------------------------------------------------------------------------------------------------
    def _tell(self, reply: str, text: str, level: str) -> None:
        state, buffers = self._view()
        notes, self.session.notes = self.session.notes, []
        text = " · ".join(filter(None, [text, *notes]))
        self.send({"kind": "state", "reply": reply, "text": text, "level": level, **state}, buffers)

    def _view(self) -> tuple[dict[str, Any], list[bytes]]:
        """What the browser needs to draw; pictures and masks that it has already are left out."""
        session, buffers = self.session, []
        page, picture = session.page, session._picture
        shown, image = (session.index, picture.pixels if picture else ""), None
        if shown != self._shown:
            self._shown, self._kept = shown, set()
            if picture:
                buffers.append(picture_bytes(picture.image))
                image = 0
        marks = [self._mark_view(mark, buffers) for mark in page.marks.values()] if picture else []
        height, width = picture.image.shape[:2] if picture else (1, 1)
        decided = sum(bool(other.accepted or other.normal) for other in session.ledger.pages.values())
        clicks = [len(mark.clicks) for other in session.ledger.pages.values() for mark in other.accepted]
        each = f", {np.mean(clicks):.1f} clicks each" if clicks else ""
        total = f"{len(clicks)} mask{'s' * (len(clicks) != 1)}{each}\n{decided} of {len(session.samples)} images decided"
        return {"index": session.index, "count": len(session.samples), "name": session.name, "width": width, "height": height, "picture": image,
                "problem": session.problem, "normal": page.normal, "marks": marks, "classes": list(session.classes), "cls": session.cls,
                "adapting": session.ledger.adapting, "adapts": session.adapts, "total": total}, buffers

    def _mark_view(self, mark: Mark, buffers: list[bytes]) -> dict[str, Any]:
        known = mark.accepted and mark.number in self._kept
        mask = None if known else self.session.accepted_mask(mark.number) if mark.accepted else self.session.mask
        box, index, area = None, None, mark.area
        if mask is not None:
            box, content = stamp(mask)
            index, area = len(buffers), int(np.count_nonzero(mask))
            buffers.append(content)
        (self._kept.add if mark.accepted else self._kept.discard)(mark.number)
        points = [[click["x"], click["y"], click["positive"]] for click in mark.clicks]
        return {"number": mark.number, "cls": mark.cls, "clicks": len(points), "strokes": len(mark.strokes), "area": area, "open": not mark.accepted,
                "points": [] if mark.accepted else points, "frame": mark.frame, "box": box, "png": index, "kept": known}

    # -- what can be asked for ---------------------------------------------------------------------------------------------------
    def _do_ready(self, asked: Mapping[str, Any]) -> None:
        self._shown = None

    def _do_look(self, asked: Mapping[str, Any]) -> None:
        self.session.look(asked.get("view"))

    def _do_click(self, asked: Mapping[str, Any]) -> None:
        self.session.click(_number(asked, "x"), _number(asked, "y"), bool(asked.get("positive", True)), asked.get("view"))

    def _do_stroke(self, asked: Mapping[str, Any]) -> None:
        self.session.stroke(asked.get("points"), _number(asked, "width"), bool(asked.get("add", True)))

    def _do_undo(self, asked: Mapping[str, Any]) -> None:
        self.session.undo()

    def _do_accept(self, asked: Mapping[str, Any]) -> str:
        mark = self.session.page.open
        note = self.session.accept()
        return f"{mark.cls} accepted after {len(mark.clicks)} clicks" + (f"; {note}" if note else "")

    def _do_class(self, asked: Mapping[str, Any]) -> None:
        self.session.choose(str(asked.get("name")))

    def _do_normal(self, asked: Mapping[str, Any]) -> None:
        self.session.mark_normal(bool(asked.get("on", True)))

    def _do_delete(self, asked: Mapping[str, Any]) -> None:
        self.session.delete(int(_number(asked, "number")))

    def _do_adapt(self, asked: Mapping[str, Any]) -> str:
        self.session.adapt(bool(asked.get("on")))
        return "the model learns from now on" if self.session.ledger.adapting else "the model is as it was before it learned; clicks change nothing"

    def _do_go(self, asked: Mapping[str, Any]) -> None:
        self.session.go(self.session.index + int(_number(asked, "step")))

    def _do_export(self, asked: Mapping[str, Any]) -> str:
        target, notes = self.session.export()
        return " · ".join([f"written to {target}", *notes])


ACTS: dict[str, Callable[[Annotator, Mapping[str, Any]], str | None]] = {
    name.removeprefix("_do_"): act for name, act in vars(Annotator).items() if name.startswith("_do_")}


def _number(asked: Mapping[str, Any], name: str) -> float:
    """A finite number in a message. Raises `ParameterError`."""
    value = asked.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ParameterError(f"{name}={str(value)[:40]} is no number; nothing was changed")
    return value


