"""Speed of PNI beside PatchCore: one JSON object a line.

    python benchmarks/pni.py [--peers] [--quick]

Real solar cells (package elpv_dataset) at 256 px, EfficientNet-Lite0, 512 words, neighbours reduced to 64 dimensions, a network of 2 x 512:
the sizes of preset `small`. There is no packaged peer, so --peers changes nothing; the references are the obvious ways.

"scoring": what PNI adds to PatchCore's prediction of the same images apart from its network (ours: PNI's prediction less the network's time;
reference: PatchCore's; their ratio is to stay above 1 / 1.2). "network": the network's own time for the same images (no reference).
"veto": the search for the nearest allowed item against equations 4 and 5 for every item; agree is the largest relative difference.
"histogram": running sums against counting every window. "windows": gathering a batch against unfolding whole images.
"fit": the whole fit in seconds (no reference).

Ours and the reference run alternately in one process; times are the best of the rounds.
"""

import argparse
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from timing import alternate, report

from defectbook.data.datasets import read_elpv
from defectbook.methods.pni import PNI, allowed_distances, word_probability
from defectbook.models.context import count_positions, gather_windows, window_indices

os.environ.setdefault("DEFECTBOOK_PROGRESS", "0")


class Stopwatch:
    """A function that sums up the time it takes."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments):
        start = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


def obvious_counts(labels: np.ndarray, words: int, side: int) -> np.ndarray:
    half, (_, height, width) = side // 2, labels.shape
    counts = np.zeros((height, width, words))
    for i in range(height):
        for j in range(width):
            window = labels[:, max(0, i - half):i + half + 1, max(0, j - half):j + half + 1]
            counts[i, j] = np.bincount(window.ravel(), minlength=words)
    return counts / counts.sum(-1, keepdims=True)


def obvious_veto(queries: np.ndarray, items: np.ndarray, probabilities: np.ndarray, words: np.ndarray, tau: float) -> np.ndarray:
    squares = (queries**2).sum(1)[:, None] - 2 * queries @ items.T + (items**2).sum(1)
    return np.sqrt(np.where(probabilities[:, words] > tau, np.maximum(squares, 0), np.inf).min(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="no peer is packaged; accepted for uniformity")
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    quick = parser.parse_args().quick
    cells = read_elpv(category="mono", normal=24 if quick else 160, validation=8 if quick else 40, seed=0)
    rounds = 2 if quick else 3
    started = time.perf_counter()
    pni = PNI("efficientnet_lite0", image_size=256, pool=3, sigma=4.0, words=512, reduced=64, depth=2, width=512, epochs=1 if quick else 3,
              decay_every=2, device="cpu").fit(cells.train)
    report("fit", time.perf_counter() - started, None, None, None)

    images, plain = cells.validation, pni.using(False, False)
    watch = pni.network.probabilities = Stopwatch(pni.network.probabilities)

    def without_network() -> float:
        watch.seconds, start = 0.0, time.perf_counter()
        pni.predict(images)
        return time.perf_counter() - start - watch.seconds

    ours, theirs, network = np.inf, np.inf, np.inf
    for _ in range(rounds):
        start = time.perf_counter()
        plain.predict(images)
        theirs = min(theirs, time.perf_counter() - start)
        ours, network = min(ours, without_network()), min(network, watch.seconds)
    (times, _) = alternate([lambda: pni.using(False, True).predict(images), lambda: plain.predict(images)], rounds)
    report("scoring, both terms", ours, theirs, None, None)
    report("scoring, position only", *times, None, None)
    report("network", network, None, None, None)

    (batch,) = list(pni.patchcore.embeddings(images[:1]))
    grid = batch.embeddings[0]
    queries, bank = grid.reshape(-1, grid.shape[-1]), pni.patchcore.bank
    tables = list(pni.probabilities(grid).values())
    mean, tau = (tables[0] + tables[1]) / 2, 1e-3
    (times, values) = alternate([
        lambda: allowed_distances(queries, bank, lambda rows, items: word_probability(tables, rows, pni.item_words[items]) > tau),
        lambda: obvious_veto(queries, bank.features, mean, pni.item_words, tau)], rounds)
    report("veto", *times, None, float(np.abs(values[0] / values[1] - 1).max()))

    labels = np.random.default_rng(0).integers(0, 512, (20 if quick else 200, 32, 32))
    (times, values) = alternate([lambda: count_positions(labels, 512), lambda: obvious_counts(labels, 512, 9)], rounds)
    report("histogram", *times, None, float(np.abs(values[0] - values[1]).max()))

    stack = torch.randn(4, 32, 32, 64)
    flat, windows, rows = stack.reshape(-1, 64), torch.from_numpy(window_indices(32, 32)), torch.arange(4096)

    def unfold() -> torch.Tensor:
        patches = F.unfold(stack.permute(0, 3, 1, 2), 9, padding=4).reshape(4, 64, 81, 1024)
        return torch.cat([patches[:, :, :40], patches[:, :, 41:]], 2).permute(0, 3, 2, 1).reshape(4096, -1)

    (times, values) = alternate([lambda: gather_windows(flat, windows, rows), unfold], rounds)
    report("windows", *times, None, bool(torch.equal(values[0], values[1])))


if __name__ == "__main__":
    main()
