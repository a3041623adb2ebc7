"""How fast the simulators draw and photograph: one JSON object a line.

    python benchmarks/simulators.py [--peers] [--quick]

Each case is a function of `quick` that returns a report; add a simulator by adding its functions to CASES.
floor_seconds of the throughput cases is the bar: 10 images of 512x512 a second on two processes.
There is no peer to install; --peers is accepted and changes nothing.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import cv2
import numpy as np
from timing import report, seconds

from defectbook.core import generator
from defectbook.data.pcb import PcbOptions, pcb_sample, take_shot
from defectbook.data.pcb_boards import make_board
from defectbook.data.pcb_defects import KINDS, add_defects

BAR = 10  # images a second


def one_thread() -> None:
    cv2.setNumThreads(1)  # two processes, one thread each


def throughput(name: str, draw: Callable[[int], int], images: int, rounds: int = 2) -> None:
    """Two processes (ours) and one (reference), alternately; draw(item) simulates one item and returns a checksum."""
    best = {"two": np.inf, "one": np.inf}
    with ProcessPoolExecutor(2, initializer=one_thread) as pool:
        list(pool.map(draw, range(images, images + 4)))  # start both workers before the clock
        for _ in range(rounds):
            cpu = time.process_time()
            taken, one = seconds(lambda: [draw(item) for item in range(images)])
            cpu = time.process_time() - cpu
            best["one"] = min(best["one"], taken)
            taken, two = seconds(lambda: list(pool.map(draw, range(images))))
            best["two"] = min(best["two"], taken)
    print(f"# {name}: {images / best['two']:.1f} images a second on two processes, {images / best['one']:.1f} on one, "
          f"{1000 * cpu / images:.0f} ms of CPU an image, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    report(f"{name}, two processes", best["two"], best["one"], images / BAR, one == two)


def draw_board(item: int) -> int:
    """Image, mask and their checksum, for the kinds in turn; nothing is kept from an earlier call."""
    take_shot.cache_clear()
    sample = pcb_sample(PcbOptions(size=512, seed=1), "test", item, KINDS[item % len(KINDS)])
    return int(sample.image.sum(dtype=np.int64)) + int(sample.mask.sum(dtype=np.int64))


def pcb_throughput(quick: bool) -> None:
    images = 10 if quick else 60
    throughput(f"{images} boards 512x512 with mask", draw_board, images)


def pcb_masks(quick: bool) -> None:
    """Scenes and mask from windows, against rendering the whole defective board and comparing whole photographs."""
    ours, reference, agree = [], [], True
    for item in range(3 if quick else 12):
        board = make_board(512, generator(item, "design"), generator(item, "photo"))
        made = add_defects(board, KINDS[item % len(KINDS)], generator(item))
        fast, (_, _, mask) = seconds(made.scenes)
        slow, whole = seconds(lambda made=made: (made.board.photograph() != made.board.photograph(made.layers)).any(axis=2))
        ours.append(fast), reference.append(slow)
        agree &= bool(np.array_equal(mask == 1, whole))
    report("masks of boards 512x512, by windows", sum(ours), sum(reference), None, agree)


CASES: list[Callable[[bool], None]] = [pcb_throughput, pcb_masks]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="smaller cases, a few seconds in all")
    arguments = parser.parse_args()
    one_thread()
    for case in CASES:
        case(arguments.quick)
