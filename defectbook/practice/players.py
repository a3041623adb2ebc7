import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from defectbook.core import DataError, ImageSource, ParameterError, read_image
from defectbook.models.sam import SMALLEST
from defectbook.practice.annotations import Mark



Frame = tuple[int, int, int, int]  # x0, y0, x1, y1 in px, x1 and y1 outside
NARROWEST = 2 * SMALLEST  # px: a smaller view is widened to this before the model sees it


def frame_of(view: Sequence[float] | None, size: tuple[int, int], click: tuple[int, int] | None = None, before: Frame | None = None) -> Frame:
    """The whole pixels of a view (x0, y0, x1, y1 in px; None is all) of an image of `size` = (height, width).

    Widened to `NARROWEST` px where the image allows it, and to hold `click`. before: the mark's frame, kept while the click lies in it, else
    included. Raises `ParameterError` for a view that is none.
    """
    height, width = size
    if view is not None:
        view = _checked_view(view)
    if before is not None and click is not None and before[0] <= click[0] < before[2] and before[1] <= click[1] < before[3]:
        return before
    if view is None:
        return 0, 0, width, height
    points = [view[:2], view[2:]] + ([click, (click[0] + 1, click[1] + 1)] if click else []) + ([before[:2], before[2:]] if before else [])
    (x0, x1), (y0, y1) = (_interval([point[axis] for point in points], length) for axis, length in enumerate((width, height)))
    return x0, y0, x1, y1


def _checked_view(view: Any) -> list[float]:
    try:
        x0, y0, x1, y1 = numbers = [float(value) for value in view]
        if np.isfinite(numbers).all() and x0 <= x1 and y0 <= y1:
            return numbers
    except (TypeError, ValueError):
        pass
    raise ParameterError(f"view {str(view)[:60]} is no x0, y0, x1, y1 in pixels; give None for the whole image")


def _interval(values: Sequence[float], length: int) -> tuple[int, int]:
    """The whole numbers around `values` in 0..length, at least `NARROWEST` apart where that fits."""
    low, high = int(np.clip(np.floor(min(values)), 0, length)), int(np.clip(np.ceil(max(values)), 0, length))
    missing = max(0, min(NARROWEST, length) - (high - low))
    low = min(max(0, low - missing // 2), length - (high - low) - missing)
    return low, max(high, low + min(NARROWEST, length))




def paint(mask: np.ndarray, points: Sequence[Sequence[float]], width: float, add: bool) -> None:
    """Draw a stroke through `points` (x, y in px), `width` px wide with round ends, into a mask, uint8 (H, W), in place."""
    path, radius = np.rint(np.asarray(points, np.float64).reshape(-1, 2)).astype(np.int64), (width - 1) / 2
    path = path[[0, *range(len(path))]]  # a single point becomes a line that OpenCV draws
    (x0, y0), (x1, y1) = path.min(0) - int(radius) - 1, path.max(0) + int(radius) + 2
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(mask.shape[1], x1), min(mask.shape[0], y1)
    if x0 >= x1 or y0 >= y1:
        return
    # The pixels near a thin line: OpenCV's own thick lines are up to two pixels too thick. The margin keeps ends outside of the image in play.
    margin = int(radius) + 1
    away = np.full((y1 - y0 + 2 * margin, x1 - x0 + 2 * margin), 255, np.uint8)
    cv2.polylines(away, [(path - (x0 - margin, y0 - margin)).astype(np.int32)[:, None]], False, 0)
    near = cv2.distanceTransform(away, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[margin:margin + y1 - y0, margin:margin + x1 - x0] <= radius
    mask[y0:y1, x0:x1][near] = int(add)


def check_stroke(points: Any, width: Any) -> list[list[float]]:
    """The points as short numbers. Raises `ParameterError` for no points, more than 20,000, or what is not finite."""
    try:
        path = np.asarray(points, np.float64).reshape(-1, 2)
        width = float(width)
    except (TypeError, ValueError) as error:
        raise ParameterError("a stroke is a list of points (x, y) in pixels, with a width") from error
    if not 1 <= len(path) <= 20_000 or not np.isfinite(path).all() or np.abs(path).max() > 1e6 or not 1 <= width <= 2000:
        raise ParameterError(f"a stroke of {len(path)} points, {width} px wide: give 1 to 20,000 points in the image, and 1 to 2000 px")
    return [[round(float(x), 1), round(float(y), 1)] for x, y in path]




class Ahead:
    """Computes values in one background thread and keeps the last `keep` of them. What fails is not kept: it is tried again when it is needed."""

    def __init__(self, keep: int):
        self.keep = keep
        self._pool = ThreadPoolExecutor(1, "annotator")
        self._known: OrderedDict[Any, Future] = OrderedDict()
        self._guard = threading.RLock()

    def start(self, key: Any, compute: Callable[[], Any]) -> Future:
        """The future value of `key`; the work begins when the thread is free."""
        with self._guard:
            known = self._known.get(key)
            if known is None or known.cancelled() or (known.done() and known.exception()):
                self._known[key] = known = self._pool.submit(compute)
            self._known.move_to_end(key)
            while len(self._known) > self.keep:
                self._known.popitem(last=False)[1].cancel()
        return known

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value, waited for; errors of `compute` come out here."""
        return self.start(key, compute).result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Picture(NamedTuple):
    """An image that was read: uint8 (H, W, 3), and sixteen digits of a hash over its pixels."""

    image: np.ndarray
    pixels: str


def read_picture(source: ImageSource) -> Picture:
    """Raises `DataError` for an image that cannot be read, or is smaller than a patch."""
    image = read_image(source)
    if min(image.shape[:2]) < SMALLEST:
        raise DataError(f"{source if isinstance(source, (str, Path)) else 'the image'}: {image.shape[1]}x{image.shape[0]} px is smaller than a "
                        f"patch ({SMALLEST} px)")
    return Picture(image, hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest()[:16])




class AnnotatorModel(Protocol):
    """A model that answers clicks, as `methods.adaptation.AdaptiveSam` does. set_image begins an object and forgets an unfinished one; finish
    accepts it. Optional: adapt, state, load_state, note."""

    def set_image(self, image: np.ndarray, cls: str | None = None, embedding: Any = None) -> None: ...
    def click(self, x: int, y: int, positive: bool = True) -> np.ndarray: ...
    def undo(self) -> np.ndarray | None: ...
    def finish(self, mask: np.ndarray | None = None) -> np.ndarray: ...


class Player:
    """Plays the clicks of marks to `model`. embed: makes an embedding of an image ahead of time, or None where the model does it by itself."""

    def __init__(self, model: AnnotatorModel, embed: Callable[[np.ndarray], Any] | None = None, ahead: Ahead | None = None):
        self.model, self.embed, self.ahead = model, embed, ahead
        self._shown: tuple | None = None  # image, mark, class, frame
        self._played: list[tuple] = []
        self._last: np.ndarray | None = None  # the model's answer to them

    def prepare(self, name: str, picture: Picture, frame: Frame) -> Any:
        """Begin to embed a frame of an image; the future, or None."""
        if self.embed is None or self.ahead is None:
            return None
        return self.ahead.start((name, picture.pixels, frame), lambda: self.embed(crop(picture.image, frame)))

    def answer(self, name: str, mark: Mark, picture: Picture) -> np.ndarray | None:
        """The model's mask for all clicks of `mark`, bool (H, W) of the whole image; None when it has none."""
        if not mark.clicks:
            self.forget()
            return None
        frame, clicks = mark.frame, [(step["x"], step["y"], step["positive"]) for step in mark.clicks]
        shown = (name, mark.number, mark.cls, frame)
        if self._shown == shown and self._played[:-1] == clicks:
            self._last = self.model.undo()
        else:
            if self._shown != shown or self._played != clicks[:len(self._played)]:
                self.forget()
                waiting = self.prepare(name, picture, frame)
                self.model.set_image(crop(picture.image, frame), mark.cls, None if waiting is None else waiting.result())
                self._shown = shown
            for x, y, positive in clicks[len(self._played):]:
                self._last = self.model.click(x - frame[0], y - frame[1], positive)
                self._played = [*self._played, (x, y, positive)]
        self._played = clicks
        return spread(self._last, frame, picture.image.shape[:2])

    def forget(self) -> None:
        """A mark is given up: the next one begins with set_image, at which the model forgets what the unfinished one taught."""
        self._shown, self._played, self._last = None, [], None

    def settle(self) -> None:
        """Let the model do what it put off to answer faster; for the time in which a person looks at the answer."""
        if self._shown and callable(put_off := getattr(self.model, "adapt", None)):
            put_off()

    def finish(self, name: str, mark: Mark, picture: Picture, mask: np.ndarray) -> str:
        """Tell the model that `mask` (H, W) was accepted for this mark; returns the model's note, if it has one."""
        if not mark.clicks:
            return ""
        self.answer(name, mark, picture)
        self.model.finish(crop(mask, mark.frame))
        self._shown, self._played, self._last = None, [], None
        return str(getattr(self.model, "note", "") or "")


def crop(array: np.ndarray, frame: Frame) -> np.ndarray:
    return np.ascontiguousarray(array[frame[1]:frame[3], frame[0]:frame[2]])


def spread(mask: np.ndarray | None, frame: Frame, size: tuple[int, int]) -> np.ndarray | None:
    """A frame's mask in an empty one of the whole image, bool (H, W)."""
    if mask is None:
        return None
    whole = np.zeros(size, bool)
    whole[frame[1]:frame[3], frame[0]:frame[2]] = mask
    return whole


