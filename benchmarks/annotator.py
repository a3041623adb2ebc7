"""How long a person waits for a mask: from the browser's message to the answer that goes back. One JSON object a line.

    python benchmarks/annotator.py [--peers] [--quick] [--threads N]

The bar is 300 ms on two cores once the embedding is there (computed ahead). A person is played by messages: each image is clicked eight times, with
a third of a second in between, in which the model learns; then comes the next image, whose embedding the annotator has made ahead. `ours_seconds` is
the median over all clicks but the process's first, which is a case of its own, and `p95_seconds` their 95th percentile. Log and masks are written
to the disk as always. The floor is the model's part alone, from an embedding that is there; the reference the same click without one: the encoder
is waited for. "agree": in each answer, the mask that the browser would draw is the mask on the disk. There is no peer; --peers changes nothing.
"""
import argparse
import io
import shutil
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from timing import report

from defectbook.data.scenes import draw_scene
from defectbook.methods.adaptation import AdaptiveSam
from defectbook.models.sam import load_sam
from defectbook.practice.annotator import ADAPTATION, Annotator

BAR = 0.3  # seconds


class Person:
    """Clicks as the browser would. images: uint8 (H, W, 3) each."""

    def __init__(self, images: list[np.ndarray], folder: Path):
        self.annotator = Annotator(images, out=folder, device="cpu")
        self.answers: list = []
        self.annotator.send = lambda content, buffers=None: self.answers.append((time.perf_counter(), content, buffers))
        self.ask("ready")

    def ask(self, do: str, **values) -> float:
        """Seconds from the message to its answer; what the model puts off comes after it."""
        started = time.perf_counter()
        self.annotator._receive(self.annotator, {"do": do, "id": "1", **values})
        answered, content, _ = self.answers[-1]
        if content["level"] == "error":
            raise RuntimeError(content["text"])
        return answered - started

    def agrees(self) -> bool:
        """Whether the last answer's mask is the file's."""
        _, content, buffers = self.answers[-1]
        mark = next(mark for mark in content["marks"] if mark["open"])
        (x, y, width, height), drawn = mark["box"], np.zeros((content["height"], content["width"]), bool)
        drawn[y:y + height, x:x + width] = np.asarray(Image.open(io.BytesIO(buffers[mark["png"]])).convert("RGBA"))[..., 3] > 0
        session = self.annotator.session
        return bool((drawn == session.masks.read(session.name, mark["number"])).all())


def waits(width: int, height: int, view: tuple | None, count: int, clicks: int, pause: float) -> tuple[float, list[float], bool]:
    """(seconds of the first click, seconds of the others, whether all answers agreed)."""
    images = [cv2.resize(draw_scene(5, number, 256, "held out", "surface").image, (width, height)) for number in range(count)]
    spots = np.random.default_rng(0).integers(*((view[:2], view[2:]) if view else ((0, 0), (width, height))), (count, clicks, 2))
    folder, seconds, agree = Path(tempfile.mkdtemp()), [], True
    person = Person(images, folder / "out")
    try:
        for number in range(count):
            if view:
                person.annotator._receive(person.annotator, {"do": "look", "view": view})
            time.sleep(4 * pause)  # the time to look at an image
            for step, (x, y) in enumerate(spots[number].tolist()):
                seconds.append(person.ask("click", x=x, y=y, positive=step % 3 != 2, view=view))
                agree &= person.agrees()
                time.sleep(pause)
            if number + 1 < count:
                person.ask("go", step=1)
    finally:
        person.annotator.session.close()
        shutil.rmtree(folder)
    return seconds[0], seconds[1:], agree


def model_alone(width: int, height: int, rounds: int) -> tuple[float, float]:
    """(median seconds of a click from an embedding, of embedding an image and a click): the decoder's part, and the wait without looking ahead."""
    sam, image = load_sam("sam_lite", device="cpu").freeze(), cv2.resize(draw_scene(5, 0, 256, "held out", "surface").image, (width, height))
    model, with_embedding, without = AdaptiveSam(sam, ADAPTATION), [], []
    for number in range(rounds + 1):
        started = time.perf_counter()
        model.set_image(image)
        embedded = time.perf_counter()
        model.click(width // 2, height // 2)
        if number:  # the first one warms up
            with_embedding.append(time.perf_counter() - embedded)
            without.append(time.perf_counter() - started)
    return float(np.median(with_embedding)), float(np.median(without))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="fewer images, clicks and pauses")
    parser.add_argument("--threads", type=int, default=2, help="of torch and OpenCV (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    count, clicks, pause = (2, 3, 0.1) if args.quick else (3, 8, 0.3)
    cases = [("1024x1024, whole image", 1024, 1024, None), ("2000x1300, whole image", 2000, 1300, None),
             ("2000x1300, a view of 400x300", 2000, 1300, (800, 500, 1200, 800))]
    for number, (case, width, height, view) in enumerate(cases):
        first, others, agree = waits(width, height, view, count, clicks, pause)
        seen = (view[2] - view[0], view[3] - view[1]) if view else (width, height)
        floor, unforeseen = model_alone(*seen, clicks)
        if not number:
            report("the first click of a session", first, None, None, agree)
        report(f"sam_lite, {case}", float(np.median(others)), unforeseen, floor, agree, p95_seconds=round(float(np.quantile(others, 0.95)), 4),
               bar_seconds=BAR, clicks=len(others), threads=args.threads)
