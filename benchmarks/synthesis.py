"""Synthetic defects at 256 x 256 px: seconds an image for every kind, against the obvious way of writing it.

    python benchmarks/synthesis.py [--peers] [--quick]

One JSON object a line. The obvious way works on whole float64 frames, takes Perlin noise from four arrays of repeated gradients,
jitters and pastes with Pillow (with torchvision's ColorJitter under --peers), and finds the mask by differencing. `agree` is, for the
noise, the largest difference; for a kind, whether every mask of ours is exactly the set of changed pixels. The floor is a copy and a
difference of one image. One thread.
"""

import argparse
import math
import time

import cv2
import numpy as np
from PIL import Image, ImageEnhance
from timing import report

from defectbook.core import generator
from defectbook.data.draem import CHANGES, GeneratedTextures, perlin_noise, rotate
from defectbook.data.mixing import PNI_KINDS, equal_parts, make_kind
from defectbook.data.synthesis import choose_ink

SIDE = 256


def obvious_perlin(shape, cells, rng):
    """Perlin noise from four whole arrays of repeated gradients; the size must be a multiple of the grid."""
    angle = rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))
    gradients = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    axes = [np.arange(pixels) * count / pixels for pixels, count in zip(shape, cells, strict=True)]
    inside = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) % 1
    fade = 6 * inside**5 - 15 * inside**4 + 10 * inside**3
    noise = np.zeros(shape)
    for i in (0, 1):
        for j in (0, 1):
            corner = gradients[i:cells[0] + i, j:cells[1] + j].repeat(shape[0] // cells[0], 0).repeat(shape[1] // cells[1], 1)
            weight = (fade[..., 0] if i else 1 - fade[..., 0]) * (fade[..., 1] if j else 1 - fade[..., 1])
            noise += weight * ((inside - (i, j)) * corner).sum(axis=-1)
    return math.sqrt(2) * noise


def difference(before, after):
    return np.any(before != after, axis=2).astype(np.uint8)


def obvious_ink(kind, image, rng):
    """Lines, dots, circles, strokes and blobs on whole float64 frames."""
    name = str(rng.choice(kind.shapes))
    painted = image.astype(np.float64)
    for _ in range(rng.integers(kind.count[0], kind.count[1], endpoint=True)):
        layer = np.zeros(image.shape[:2], np.uint8)
        kind.draw(layer, name, rng)
        coverage = cv2.GaussianBlur(layer.astype(np.float64), (0, 0), max(rng.uniform(*kind.blur), 0.1))
        coverage *= rng.uniform(*kind.opacity) / max(coverage.max(), 1)
        ink = choose_ink(image, (coverage > 0).astype(np.uint8), kind.contrast, rng)
        painted = (1 - coverage[..., None]) * painted + coverage[..., None] * ink
    painted = np.rint(painted).astype(np.uint8)
    return painted, difference(image, painted)


def pillow_jitter(patch, strength, rng):
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        patch = enhance(patch).enhance(1 + rng.uniform(-strength, strength))
    return patch


def torchvision_jitter(patch, strength, rng):
    from torchvision.transforms import ColorJitter

    return ColorJitter(strength, strength, strength, strength)(patch)


def obvious_cutpaste(image, rng, jitter):
    picture = Image.fromarray(image)
    area, aspect = rng.uniform(0.02, 0.15) * picture.width * picture.height, rng.uniform(0.3, 3.3)
    width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    left, x = (int(v) for v in rng.uniform(0, SIDE - width, 2))
    top, y = (int(v) for v in rng.uniform(0, SIDE - height, 2))
    picture.paste(jitter(picture.crop((left, top, left + width, top + height)), 0.1, rng), (x, y))
    after = np.asarray(picture)
    return after, difference(image, after)


def obvious_scar(image, rng, jitter):
    picture = Image.fromarray(image)
    width, height = int(rng.uniform(2, 16)), int(rng.uniform(10, 25))
    left, top = int(rng.uniform(0, SIDE - width)), int(rng.uniform(0, SIDE - height))
    patch = jitter(picture.crop((left, top, left + width, top + height)), 0.1, rng)
    patch = patch.convert("RGBA").rotate(rng.uniform(-45, 45), expand=True)
    picture.paste(patch, (int(rng.uniform(0, SIDE - patch.width)), int(rng.uniform(0, SIDE - patch.height))), patch.getchannel("A"))
    after = np.asarray(picture)
    return after, difference(image, after)


def obvious_draem(image, rng):
    cells = tuple(int(2**k) for k in rng.integers(0, 6, 2))
    inside = rotate(obvious_perlin((SIDE, SIDE), cells, rng), rng.uniform(-90, 90)) > 0.5
    texture = GeneratedTextures()((SIDE, SIDE), rng)
    for index in rng.permutation(len(CHANGES))[:3]:
        texture = CHANGES[index](texture, rng)
    beta, weight = rng.uniform(0, 0.8), inside[..., None].astype(np.float64)
    mixed = beta * (image / 255) + (1 - beta) * (texture / 255)
    after = np.rint(255 * ((1 - weight) * (image / 255) + weight * mixed)).astype(np.uint8)
    return after, difference(image, after)


def mean_seconds(function, repeats):
    """Wall seconds of one call, the mean over `repeats` seeds: kinds draw work of very different size."""
    taken = 0.0
    for seed in range(repeats):
        rng = generator(seed)
        start = time.perf_counter()
        function(rng)
        taken += time.perf_counter() - start
    return taken / repeats


def compare(case, ours, reference, floor, agree, rounds, repeats):
    """Ours, reference and floor in turn, `rounds` times; the fastest round of each counts, and one JSON line is printed."""
    times = [[mean_seconds(function, repeats) for function in (ours, reference, floor)] for _ in range(rounds)]
    mine, other, least = (min(column) for column in zip(*times, strict=True))
    report(case, mine, other, least, agree, images_per_second=round(1 / mine))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="jitter with torchvision in the reference")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    arguments = parser.parse_args()
    rounds, repeats = (2, 15) if arguments.quick else (4, 60)
    jitter = torchvision_jitter if arguments.peers else pillow_jitter
    cv2.setNumThreads(1)
    image = np.random.default_rng(0).normal(128, 20, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    other = image[::-1].copy()

    def floor(rng):
        return image.copy(), cv2.absdiff(image, other)

    for cells in ((2, 2), (32, 32)):
        ours, obvious = (make((SIDE, SIDE), cells, generator(0)) for make in (perlin_noise, obvious_perlin))
        compare(f"perlin noise, {cells[0]}x{cells[1]} cells", lambda rng, c=cells: perlin_noise((SIDE, SIDE), c, rng),
                lambda rng, c=cells: obvious_perlin((SIDE, SIDE), c, rng), floor, float(np.abs(ours - obvious).max()), rounds, repeats)

    ink = {name: make_kind(name) for name in ("line", "dot", "circle", "stroke", "blob", "manual")}
    obvious = {name: lambda rng, kind=kind: obvious_ink(kind, image, rng) for name, kind in ink.items()}
    obvious |= {"cutpaste": lambda rng: obvious_cutpaste(image, rng, jitter), "scar": lambda rng: obvious_scar(image, rng, jitter),
                "draem": lambda rng: obvious_draem(image, rng)}
    obvious["pni mixture"] = lambda rng: obvious[PNI_KINDS[rng.integers(4)]](rng)
    for name, reference in obvious.items():
        kind = equal_parts(*PNI_KINDS) if name == "pni mixture" else make_kind(name)
        drawn = [kind(image, generator(seed)) for seed in range(repeats)]
        agree = all(np.array_equal(mask, difference(image, after)) for after, mask, _ in drawn)
        compare(name, lambda rng, kind=kind: kind(image, rng), reference, floor, agree, rounds, repeats)


if __name__ == "__main__":
    main()
