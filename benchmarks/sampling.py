"""How fast balanced patch sets are found: one JSON object a line.

    python benchmarks/sampling.py [--peers] [--quick]

The bar is Equal Pixels under 10 seconds for 26 images of 2000x1300 px on two cores (floor_seconds of that case is the time to read
every mask once). The obvious way of the reference cuts each window and counts it, then draws windows at random for the class with
the fewest pixels and exchanges at random until the classes are equal (it gives up after a minute; "agree" is whether OUR set is equal
within 10 %). There is no peer to install; --peers is accepted and changes nothing.
"""
import argparse
import sys
import time

import numpy as np
from timing import report, seconds

from defectbook.core import generator
from defectbook.data.foil import FOIL_CLASSES, Foils
from defectbook.data.sampling import Candidates, candidate_windows, choose_equal_pixels


def counted_by_slicing(masks, windows: np.ndarray) -> np.ndarray:
    """The obvious way to count: cut each window and count its values."""
    return np.stack([np.bincount(masks[item][top:top + 256, left:left + 256].ravel(), minlength=5) for item, top, left in windows])


def spread(sums: np.ndarray) -> float:
    return (sums.max() - sums.min()) / max(sums.max(), 1)


def random_equal(counts: np.ndarray, number: int, rng: np.random.Generator, limit: float) -> tuple[np.ndarray, float]:
    """The obvious search: fill up the class that lacks pixels, then keep random exchanges that help; stops at `limit` seconds."""
    start, pixels = time.perf_counter(), counts[:, 1:]
    pools = [np.flatnonzero(pixels[:, kind]) for kind in range(4)]
    chosen, sums = [], np.zeros(4)
    for _ in range(number):
        chosen.append(int(rng.choice(pools[int(sums.argmin())])))
        sums = sums + pixels[chosen[-1]]
    while spread(sums) > 0.1 and time.perf_counter() - start < limit:
        position, other = rng.integers(number), int(rng.choice(pools[int(sums.argmin())]))
        changed = sums - pixels[chosen[position]] + pixels[other]
        if spread(changed) < spread(sums):
            chosen[position], sums = other, changed
    return np.array(chosen), spread(sums)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="8 images of 1000x650 px, a few seconds in all")
    quick = parser.parse_args().quick
    count, size, number, limit = (8, (650, 1000), 60, 5) if quick else (26, (1300, 2000), 1404, 60)
    foils = Foils(count=count, size=size, seed=0)
    masks = [foils.truth(item) for item in range(count)]
    name = f"{count} images {size[1]}x{size[0]}"
    floor = seconds(lambda: [np.count_nonzero(mask) for mask in masks])[0]

    ours, candidates = min((seconds(candidate_windows, masks, FOIL_CLASSES, generator(0)) for _ in range(3)), key=lambda pair: pair[0])
    sliced, counts = seconds(counted_by_slicing, masks, candidates.windows)
    report(f"count {len(counts)} windows of {name}", ours, sliced, floor, bool((counts == candidates.counts).all()))

    def equal_pixels() -> tuple[Candidates, np.ndarray]:
        found = candidate_windows(masks, FOIL_CLASSES, generator(1))
        return found, choose_equal_pixels(found, number, generator(2))

    ours, (found, chosen) = min((seconds(equal_pixels) for _ in range(3)), key=lambda pair: pair[0])
    sums = found.counts[chosen, 1:].sum(0)
    searched, (_, left) = seconds(random_equal, counts, number, generator(3), limit)
    report(f"equal pixels, {number} patches of {name}", ours, sliced + searched, floor, bool(spread(sums) <= 0.1 and len(chosen) == number))
    print(f"# ours: {dict(zip(FOIL_CLASSES[1:], sums.tolist(), strict=True))}, spread {spread(sums):.1%}; "
          f"random search ended at {left:.1%} after {searched:.0f} s", file=sys.stderr)
