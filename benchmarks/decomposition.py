"""Speed of the deep image decomposition's solver: one JSON object a line.

    python benchmarks/decomposition.py [--peers] [--quick]

Solver: PAEDID's equation 3 on solar cells at 128 px with simulated cracks (package elpv_dataset), the prior being the cell before its
crack, blurred and a little brighter. The reference is the paper's way, Adam through torch, at the best learning rate of those tried
and with a rate that falls. Adam begins at the prior; a second line gives it the start that ours chooses, which is no part of the paper's way.
Both go for the same objective: a hundredth above the lowest that each of them finds with many iterations, so the higher one of the two
decides. `adam_excess` is how far Adam's lowest then lies above ours: with a large lambda it ends in poorer valleys. Seconds are those of
a whole run, cut off at the iteration where the mean objective of the batch first gets there; `evaluations` are the gradient evaluations
of both. `agree`: both reach it. The bar is 10 times faster. Last, seconds an image at the default tolerance (the bar is 0.5).

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
from defectbook.models.decomposition import Decomposition, SsimLoss, SsimLossTorch, decompose_adam, decompose_proximal, ssim, window_weights

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


def first_within(run: Decomposition, target: float) -> int:
    """The index in the history at which the mean objective reaches the target."""
    return int(np.flatnonzero(run.history.mean(1) <= target)[0])


def solver_case(images: np.ndarray, priors: np.ndarray, weight: float, most: int, rounds: int, start: str = "prior") -> None:
    """A run that gets to the target in k iterations is timed as a run of k iterations. start: Adam's."""
    adams = {rate: partial(decompose_adam, images, priors, weight, rate=rate, start=start) for rate in RATES}
    ours_until = partial(decompose_proximal, images, priors, weight, tolerance=1e-6)
    long = ours_until(iterations=2 * most)
    lowest, theirs = long.history[-1].mean(), min(run(iterations=most).history[-1].mean() for run in adams.values())
    target = 1.01 * max(lowest, theirs)
    # Adam's rate falls over its run: the shortest run that gets there, of a geometric series of lengths, is the fair one.
    lengths = [round(most / 1.3**k) for k in range(12)][::-1]
    shortest = {rate: next((k for k in lengths if run(iterations=k).history[-1].mean() <= target), None) for rate, run in adams.items()}
    best = min((rate for rate in RATES if shortest[rate]), key=lambda rate: shortest[rate])
    ours = max(1, first_within(long, target))
    (mine, adam), values = alternate([partial(ours_until, iterations=ours), partial(adams[best], iterations=shortest[best])], rounds)
    report(f"decomposition of {len(images)} images of {images.shape[1]} px, lambda {weight:g}, against Adam from {start}", mine, adam, None,
           bool(all(value.history[-1].mean() <= target * (1 + 1e-6) for value in values)),
           evaluations={"ours": ours + 1, "adam": shortest[best]}, rate=best, adam_excess=round(theirs / lowest - 1, 4))


def inference_case(images: np.ndarray, priors: np.ndarray, weight: float, rounds: int) -> None:
    (taken,), (found,) = alternate([partial(decompose_proximal, images, priors, weight)], rounds)
    shape = " x ".join(map(str, images.shape[1:]))
    report(f"seconds an image of {shape}, lambda {weight:g}, default tolerance", taken / len(images), None, None, bool(found.converged.all()),
           bar=0.5, iterations=int(found.iterations.max()))


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
            for start in ("prior", "best"):
                solver_case(images, priors, weight, 200 if arguments.quick else 400, 2 if arguments.quick else 3, start)
        coloured = [np.stack([part, part**1.2, part**0.8], -1) for part in (images, priors)]
        for pair in ((images, priors), coloured):
            for weight in (1e-5, 6e-4):
                inference_case(*pair, weight, 3)
    ssim_cases(images, priors, arguments.peers, 5)


if __name__ == "__main__":
    main()
