"""Speed and memory of the pixel and region metrics: one JSON object a line.

    python benchmarks/metrics.py [--peers] [--quick]

The reference is the obvious way (an argsort of all pixels, scikit-learn), or with --peers the packages adeval and anomalib
where they are installed. Ours and the reference run alternately in one process, both warm; times are the best of the rounds.
`floor_seconds` is one float32 sort of the same pixels by numpy or torch, whichever is faster. `agree` is the absolute
difference of the values (adeval's own are approximate); in the lines on memory it is the figure itself. OMP_NUM_THREADS limits threads.
"""

import argparse
import json
from collections.abc import Callable

import cv2
import numpy as np
from timing import alternate, peak_of, report

from defectbook.metrics.auroc_intervals import auroc_interval
from defectbook.metrics.pixel import auroc, rank_pixels
from defectbook.metrics.region import RegionStream, label_regions, rank_regions
from defectbook.metrics.statistics import bootstrap_interval


def make_set(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps (float32, heavy-tailed) and masks (uint8), (count, size, size); half of the images carry one to six defects."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), np.uint8)
    maps = np.empty((count, size, size), np.float32)
    for index, mask in enumerate(masks):
        for _ in range(rng.integers(1, 7) if index % 2 else 0):
            x, y = rng.integers(0, size, 2).tolist()
            cv2.circle(mask, (x, y), int(rng.integers(2, size // 10)), 1, -1)
        noise = cv2.GaussianBlur(rng.standard_normal((size, size), dtype=np.float32), (0, 0), 2) * 7
        maps[index] = np.exp(0.5 * (noise + 2 * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 4)))
    return maps, masks


def floor_sort(scores: np.ndarray) -> Callable[[], object]:
    """One sort of all scores, by numpy or torch: the faster of the two on this machine."""
    candidates = [lambda: np.sort(scores.reshape(-1))]
    try:
        import torch

        tensor = torch.from_numpy(scores.reshape(-1))
        candidates.append(lambda: torch.sort(tensor))
    except ImportError:
        pass
    times, _ = alternate(candidates, 1)
    return candidates[int(np.argmin(times))]


def ours_both(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    ranking = rank_regions(maps, masks)
    return ranking.pixels.auroc(), ranking.aupro()


def streamed_both(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    stream = RegionStream()
    for one, mask in zip(maps, masks, strict=True):
        stream.update(one, mask)
    ranking = stream.ranking()
    return ranking.pixels.auroc(), ranking.aupro()


def obvious_both(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> tuple[float, float]:
    """AUROC and AUPRO from one argsort of all pixels and cumulative sums, ties together."""
    labels, regions = np.zeros(masks.shape, np.int64), 0
    for index, mask in enumerate(masks):
        here = label_regions(mask)
        labels[index] = np.where(here > 0, here + regions, 0)
        regions += int(here.max())
    order = np.argsort(-maps.reshape(-1), kind="stable")
    owners = labels.reshape(-1)[order]
    areas = np.bincount(owners)
    weights = np.where(owners > 0, 1 / areas[owners] / regions, 0)
    ends = np.r_[np.flatnonzero(np.diff(maps.reshape(-1)[order])), owners.size - 1]
    fpr = np.r_[0, np.cumsum(owners == 0)[ends] / areas[0]]
    tpr = np.r_[0, np.cumsum(owners > 0)[ends] / (owners.size - areas[0])]
    pro = np.r_[0, np.cumsum(weights)[ends]]
    inside = fpr < limit
    x, y = np.r_[fpr[inside], limit], np.r_[pro[inside], np.interp(limit, fpr, pro)]
    return float(np.diff(fpr) @ (tpr[1:] + tpr[:-1]) / 2), float(np.diff(x) @ (y[1:] + y[:-1]) / 2 / limit)


def sklearn_auroc(maps: np.ndarray, masks: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(masks.reshape(-1), maps.reshape(-1)))


def adeval_both(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    import adeval

    if not hasattr(np, "trapz"):  # adeval 1.1 calls a function that NumPy 2.4 removed
        np.trapz = np.trapezoid
    area, _, pro = adeval.auroc_aupr_aupro(maps, masks)
    return area, pro


def anomalib_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    import torch
    from anomalib.metrics.aupro import _AUPRO

    metric = _AUPRO(fpr_limit=0.3)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks).to(torch.int64))
    return float(metric.compute())


def difference(one: object, other: object) -> float:
    return float(np.max(np.abs(np.subtract(one, other))))


def compare(case: str, ours: Callable[[], object], reference: Callable[[], object], floor: Callable[[], object], rounds: int) -> None:
    (own, other, least), (value, expected, _) = alternate([ours, reference, floor], rounds)
    report(case, own, other, least, difference(value, expected))


def compare_intervals(images: int, resamples: int, rounds: int) -> None:
    """The bootstrap interval of an image AUROC against an AUROC a draw; the floor is to draw the images alone."""
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3 == 0
    scores = rng.standard_normal(images) + labels

    def ours() -> tuple[float, float]:
        found = auroc_interval(scores, labels, resamples)
        return found.low, found.high

    def obvious() -> tuple[float, float]:
        found = bootstrap_interval(auroc, scores, labels, strata=labels, resamples=resamples, rng=0)
        return found.low, found.high

    compare(f"bootstrap interval of auroc, {images} images, {resamples} draws", ours, obvious,
            lambda: [np.random.default_rng(0).integers(0, images, images) for _ in range(resamples)], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="compare with adeval and anomalib, where installed")
    parser.add_argument("--quick", action="store_true", help="10 maps of 128x128 instead of 100 of 512x512")
    arguments = parser.parse_args()
    count, size, rounds = (10, 128, 3) if arguments.quick else (100, 512, 3)
    maps, masks = make_set(count, size)
    suffix, floor = f"{count}x{size}x{size}", floor_sort(maps)


    def both() -> tuple[float, float]:
        return ours_both(maps, masks)

    (own, least), _ = alternate([both, floor], rounds)
    report(f"auroc and aupro against one sort, {suffix}", own, least, least, None)
    compare(f"auroc and aupro against one argsort, {suffix}", both, lambda: obvious_both(maps, masks), floor, 1)
    compare(f"auroc against scikit-learn, {suffix}", lambda: rank_pixels(maps, masks).auroc(), lambda: sklearn_auroc(maps, masks), floor, 1)
    if arguments.peers:
        peers = {"auroc and aupro against adeval (1000 bins)": (ours_both, adeval_both),
                 "streamed auroc and aupro against adeval (1000 bins)": (streamed_both, adeval_both),
                 "aupro against anomalib": (lambda *data: rank_regions(*data).aupro(), anomalib_aupro)}
        for name, (ours, peer) in peers.items():
            try:
                compare(f"{name}, {suffix}", lambda ours=ours: ours(maps, masks), lambda peer=peer: peer(maps, masks), floor, rounds)
            except ImportError as error:
                print(json.dumps({"case": f"{name}, {suffix}", "skipped": f"not installed: {error.name}"}), flush=True)

    compare(f"streaming against exact, {suffix}", lambda: streamed_both(maps, masks), both, floor, rounds)
    exact_peak, stream_peak = peak_of(both), peak_of(lambda: streamed_both(maps, masks))
    report(f"memory: peak of exact over the score array, {suffix}", None, None, None, round(exact_peak / maps.nbytes, 2))
    report(f"memory: peak of streaming in MB, {suffix}", None, None, None, round(stream_peak / 1e6, 1))
    compare_intervals(*((200, 100) if arguments.quick else (1000, 1000)), rounds)


if __name__ == "__main__":
    main()
