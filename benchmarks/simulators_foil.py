"""How fast foils are drawn and photographed: one JSON object a line.

    python benchmarks/simulators_foil.py [--peers] [--quick]

Cases: whole foils of 512x512 px on two processes (floor_seconds is the bar, 10 images a second; the reference is one process),
the camera against marching each shadow ray step by step, and photometric stereo against a least-squares call for each pixel.
There is no peer to install; --peers is accepted and changes nothing.
"""
import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from timing import report, seconds

from defectbook.core import generator
from defectbook.data.foil import Foils, cast_shadows, line_lights
from defectbook.data.photometric import photometric_stereo

FOILS = {"count": 64, "size": (512, 512), "seed": 1}


def draw(item: int) -> int:
    """The checksum of one foil's image, drawn from scratch."""
    return int(Foils(**FOILS).image(item).sum(dtype=np.int64))


def throughput(images: int) -> None:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(draw, range(60, 64)))  # start both workers before the clock
        items = range(images)
        ours, two = min(seconds(lambda: list(pool.map(draw, items))) for _ in range(2))
        cpu = time.process_time()
        reference, one = seconds(lambda: [draw(item) for item in items])
        cpu = time.process_time() - cpu
    report(f"{images} foils 512x512, two processes", ours, reference, images / 10, one == two)
    print(f"# {images / ours:.1f} images a second on two processes, {images / reference:.1f} on one, "
          f"{1000 * cpu / images:.0f} ms of CPU an image", file=sys.stderr)


def marched_shadows(height: np.ndarray, light: np.ndarray) -> np.ndarray:
    """The obvious way: look 1, 2, ... 15 steps towards the light."""
    dy, dx = int(math.copysign(1, light[1])), int(math.copysign(1, light[0]))
    rise = np.float32(math.sqrt(2) * light[2] / math.hypot(light[0], light[1]))
    padded = np.pad(height, 15, mode="edge")
    rows, columns = height.shape
    shadow = np.zeros(height.shape, bool)
    for step in range(1, 16):
        shadow |= padded[15 + step * dy:15 + step * dy + rows, 15 + step * dx:15 + step * dx + columns] - step * rise > height
    return shadow


def shadows() -> None:
    height = Foils(**FOILS).foil(0).height
    light = line_lights()[0]
    ours, reference = [], []
    for _ in range(7):
        first, fast = seconds(cast_shadows, height, light)
        second, slow = seconds(marched_shadows, height, light)
        ours.append(first), reference.append(second)
    inner = np.s_[16:-16, 16:-16]
    report("cast shadows 512x512, one lamp", min(ours), min(reference), seconds(height.max)[0], bool((fast[inner] == slow[inner]).all()))


def stereo(side: int) -> None:
    rng = generator(0)
    lights = line_lights()
    captures = rng.integers(60, 200, (4, side, side)).astype(np.uint8)

    def by_pixel():
        found = np.empty((side, side, 3))
        for y in range(side):
            for x in range(side):
                found[y, x] = np.linalg.lstsq(lights, captures[:, y, x].astype(float), rcond=None)[0]
        return found / np.linalg.norm(found, axis=2, keepdims=True)

    ours, found = min((seconds(photometric_stereo, captures, lights, 0.0) for _ in range(5)), key=lambda pair: pair[0])
    reference, slow = seconds(by_pixel)
    report(f"photometric stereo {side}x{side}, 4 lamps", ours, reference, seconds(captures.astype, np.float32)[0],
           float(np.abs(found.normals - slow).max()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="smaller cases, a few seconds in all")
    quick = parser.parse_args().quick
    throughput(8 if quick else 40)
    shadows()
    stereo(64 if quick else 200)
