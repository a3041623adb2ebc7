"""Speed of the deep image decomposition's solver: one JSON object a line.

    python benchmarks/decomposition.py [--peers] [--quick]

Solver: PAEDID's equation 3 on solar cells at 128 px with simulated cracks (package elpv_dataset), the prior being the cell before its
crack, blurred and a little brighter. The reference is the paper's way, Adam through torch, at the best learning rate of those tried
and with a rate that falls. Both go for the same objective: a hundredth above the lowest that either finds with many iterations. Seconds
are those of a whole run, cut off at the iteration where the mean objective of the batch first gets there; `evaluations` are the gradient
evaluations of both. `agree`: both reach it. The bar is 10 times faster.

SSIM and its gradient: against a loop of gathered windows on one image (the obvious way), or with --peers skimage's; and torch autograd.
`agree` is the largest difference. Ours and the reference run alternately in one process; OMP_NUM_THREADS limits threads.
"""

import argparse
import os
import warnings
from functools import partial

import numpy as np
import torch
from timing import alternate, report

from defectbook.core import resize_image
from defectbook.data.cracks import simulate_cracks
from defectbook.data.datasets import read_elpv
from defectbook.models.decomposition import Decomposition, SsimLoss, SsimLossTorch, decompose_adam, decompose_fista, ssim, window_weights

os.environ.setdefault("DEFECTBOOK_PROGRESS", "0")
RATES = (3e-3, 1e-2, 3e-2)


def cells(count: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Cracked cells and their priors, float32 (count, size, size)."""
    images, priors = [], []
    for number, sample in enumerate(read_elpv(category="mono", normal=count, validation=1, seed=0).train):
        cracked = simulate_cracks(sample.image, np.random.default_rng(number))[0]
        clean = resize_image(sample.image, (size, size))[..., 0] / 255
        blurred = sum(np.roll(clean, shift, axis) for shift in (-1, 0, 1) for axis in (0, 1)) / 6
        images.append(resize_image(cracked, (size, size))[..., 0] / 255)
        priors.append(np.clip(blurred * 1.04 + 0.02, 0, 1))
    return np.array(images, np.float32), np.array(priors, np.float32)


def first_within(run: Decomposition, target: float) -> int | None:
    """The index in the history at which the mean objective reaches the target."""
    reached = np.flatnonzero(run.history.mean(1) <= target)
    return int(reached[0]) if len(reached) else None


def solver_case(images: np.ndarray, priors: np.ndarray, weight: float, most: int, rounds: int) -> None:
    """A run that gets to the target in k iterations is timed as a run of k iterations."""
    adams = {rate: partial(decompose_adam, images, priors, weight, rate=rate) for rate in RATES}
    fista = partial(decompose_fista, images, priors, weight, tolerance=1e-6)
    long = fista(iterations=2 * most)
    target = 1.01 * min(long.history[-1].mean(), *(run(iterations=most).history[-1].mean() for run in adams.values()))
    # Adam's rate falls over its run: the shortest run that gets there, of a geometric series of lengths, is the fair one.
    lengths = [round(most / 1.3**k) for k in range(12)][::-1]
    shortest = {rate: next((k for k in lengths if run(iterations=k).history[-1].mean() <= target), None) for rate, run in adams.items()}
    best = min((rate for rate in RATES if shortest[rate]), key=lambda rate: shortest[rate], default=None)
    ours = first_within(long, target)
    case = f"decomposition of {len(images)} images of {images.shape[1]} px, lambda {weight:g}, to 1 % above the lowest, against Adam"
    if best is None or ours is None:
        report(case, None, None, None, False, evaluations={"ours": ours, "adam": shortest})
        return
    runs = [partial(fista, iterations=max(1, ours)), partial(adams[best], iterations=shortest[best])]
    (mine, theirs), values = alternate(runs, rounds)
    rough = int(long.iterations.max()) - (len(long.history) - 1)
    report(case, mine, theirs, None, bool(all(value.history[-1].mean() <= target * (1 + 1e-6) for value in values)),
           evaluations={"ours": ours + rough, "adam": shortest[best]}, rate=best)


def obvious_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Gather every window, weigh it, average: the definition."""
    row = window_weights()
    windows = [np.lib.stride_tricks.sliding_window_view(image, (11, 11)) for image in (one, other)]
    weights = np.outer(row, row)
    means = [np.einsum("hwij,ij->hw", part, weights) for part in windows]
    spread = [part - mean[..., None, None] for part, mean in zip(windows, means, strict=True)]
    xx, yy, xy = (np.einsum("hwij,hwij,ij->hw", spread[a], spread[b], weights) for a, b in ((0, 0), (1, 1), (0, 1)))
    return float(((2 * means[0] * means[1] + 1e-4) * (2 * xy + 9e-4) / ((means[0]**2 + means[1]**2 + 1e-4) * (xx + yy + 9e-4))).mean())


def ssim_cases(images: np.ndarray, priors: np.ndarray, peers: bool, rounds: int) -> None:
    images, priors = images.astype(np.float64), priors.astype(np.float64)
    if peers:
        from skimage.metrics import structural_similarity

        one = partial(structural_similarity, data_range=1, gaussian_weights=True, use_sample_covariance=False)
    else:
        one = obvious_ssim
    name = "skimage" if peers else "gathered windows"
    functions = [lambda: ssim(images, priors), lambda: [one(image, prior) for image, prior in zip(images, priors, strict=True)]]
    (ours, reference), values = alternate(functions, rounds)
    report(f"SSIM of {len(images)} images of {images.shape[1]} px, against {name}", ours, reference, None, float(np.abs(np.subtract(*values)).max()))
    loss = SsimLoss(priors[:, None])
    by_torch, given = SsimLossTorch(loss), torch.from_numpy(images[:, None])

    def autograd() -> np.ndarray:
        leaf = given.clone().requires_grad_()
        by_torch(leaf).sum().backward()
        return leaf.grad.numpy()

    (ours, reference), values = alternate([lambda: loss.gradient(images[:, None])[1], autograd], rounds)
    report(f"gradient of SSIM, {len(images)} images of {images.shape[1]} px, against torch autograd", ours, reference, None,
           float(np.abs(values[0] - values[1]).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="compare SSIM with skimage's")
    parser.add_argument("--quick", action="store_true", help="2 images instead of 8")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    images, priors = cells(2 if arguments.quick else 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # runs are cut off on purpose
        for weight in (1e-5, 1e-4, 6e-4):
            solver_case(images, priors, weight, 200 if arguments.quick else 400, 2 if arguments.quick else 3)
    ssim_cases(images, priors, arguments.peers, 5)


if __name__ == "__main__":
    main()
