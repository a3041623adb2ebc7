"""Speed of the greedy coreset and of the memory's search: one JSON object a line.

    python benchmarks/coreset.py [--peers] [--quick]

Coreset: 102,400 x 384 features -> 1,024 choices, once of real patches (solar cells of the package elpv_dataset) and once of normal noise.
The reference is the obvious way (one matrix-vector product and an argmax for each choice), or with --peers anomalib 2.7's KCenterGreedy,
which searches after a sparse random projection to 284 dimensions: as each is called, and on the very same projected features from the same
start. `agree` is the share of equal indices, in order; in the lines "against the rule" it says whether all equal those of the rule as it
is written (differences in float64), which is slow and so asked for the first choices only. `floor_seconds` is one matrix product of all
features with all chosen centres: what computing every distance once would cost.

Memory: `search` against faiss (same neighbours, distances by its formula) and against all differences in float64. `floor_seconds` is the
matrix product alone.

Ours and the reference run alternately in one process; times are the best of the rounds (anomalib: one). OMP_NUM_THREADS limits threads.
anomalib wants its own environment: pip install "anomalib==2.7.*" there, beside this package.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
from timing import alternate, report

from defectbook.core import Sample
from defectbook.models.coreset import coreset_size, select_greedy, select_greedy_naive, square_distances
from defectbook.models.memory import MemoryBank

os.environ.setdefault("DEFECTBOOK_PROGRESS", "0")


def real_patches(images: int) -> np.ndarray:
    """(images * 1,024, 384): three layers of EfficientNet-Lite0 on solar cells at 128 px."""
    import elpv_dataset

    from defectbook.models.features import Backbone, stream_embeddings

    paths = sorted((Path(elpv_dataset.__file__).parent / "data/images").glob("*.png"))[:images]
    batches = stream_embeddings(Backbone("efficientnet_lite0", (1, 2, 4), device="cpu"), [Sample(path) for path in paths], image_size=128)
    return np.concatenate([batch.embeddings.reshape(-1, batch.embeddings.shape[-1]) for batch in batches])


def obvious_greedy(features: np.ndarray, keep: int) -> np.ndarray:
    """One pass over all features for each choice, as fast as that goes: |x|^2 - 2xc + |c|^2 by a matrix-vector product."""
    norms = np.einsum("ij,ij->i", features, features)
    distances, chosen = np.full(len(features), np.inf, np.float32), [0]
    while len(chosen) < keep:
        last = chosen[-1]
        np.minimum(distances, norms + norms[last] - 2 * (features @ features[last]), out=distances)
        distances[chosen] = -1
        chosen.append(int(np.argmax(distances)))
    return np.array(chosen)


def obvious_search(stored: np.ndarray, queries: np.ndarray, keep: int) -> np.ndarray:
    return np.array([np.argsort(square_distances(stored, query), kind="stable")[:keep] for query in queries])


def share_equal(one: np.ndarray, other: np.ndarray) -> float:
    return round(float(np.mean(np.asarray(one) == np.asarray(other))), 4)


def greedy_cases(name: str, features: np.ndarray, keep: int, checked: int) -> None:
    case = f"greedy coreset of {name}, {len(features)}x{features.shape[1]} -> {keep}"
    chosen = select_greedy(features, keep)
    # A warm start for all; the product goes block by block, since all distances at once would fill the memory.
    floor = lambda: [block @ features[chosen].T for block in np.array_split(features, 64)]  # noqa: E731
    (ours, reference, least), values = alternate([lambda: select_greedy(features, keep), lambda: obvious_greedy(features, keep), floor], 2)
    report(f"{case}, against one pass for each choice", ours, reference, least, share_equal(*values[:2]))
    (ours, reference), values = alternate([lambda: select_greedy(features, checked), lambda: select_greedy_naive(features, checked)], 1)
    report(f"{case}, first {checked} against the rule as written", ours, reference, None, bool((values[0] == values[1]).all()))


def peer_cases(name: str, features: np.ndarray, keep: int) -> None:
    """anomalib as it is called, then both on the features that its projection made."""
    import torch
    from anomalib.models.components.sampling import KCenterGreedy

    torch.manual_seed(0)
    peer = KCenterGreedy(torch.from_numpy(features), keep / len(features))
    (ours, theirs), _ = alternate([lambda: select_greedy(features, keep), peer.select_coreset_idxs], 1)
    projected = peer.features.numpy()
    shapes = f"ours searches {len(features)}x{features.shape[1]}, anomalib {projected.shape[0]}x{projected.shape[1]}"
    report(f"greedy coreset of {name} -> {keep}, against anomalib as called: {shapes}", ours, theirs, None, None)

    alike = KCenterGreedy(peer.features[:, None], keep / len(features))  # three axes: anomalib then leaves the projection out
    torch.manual_seed(1)
    start = int(torch.randint(high=len(features), size=(1,)))

    def seeded() -> list[int]:
        torch.manual_seed(1)
        return alike.select_coreset_idxs()

    (ours, theirs), values = alternate([lambda: select_greedy(projected, keep, start), seeded], 1)
    shape = f"{projected.shape[0]}x{projected.shape[1]}"
    report(f"greedy coreset of {name} -> {keep}, against anomalib on the same {shape} features", ours, theirs, None, share_equal(*values))


def search_cases(features: np.ndarray, rng: np.random.Generator, rounds: int) -> None:
    order = rng.permutation(len(features))
    for count, queries, keep in ((1024, 1024, 1), (1024, 1024, 9), (1024, 256, 1), (8192, 1024, 1), (8192, 1024, 9), (8192, 256, 9)):
        stored, asked = features[order[:count]], features[order[count:count + queries]]
        bank, index = MemoryBank(stored), faiss.IndexFlatL2(stored.shape[1])
        index.add(stored)
        functions = [partial(bank.search, asked, keep), partial(index.search, asked, keep), partial(np.matmul, asked, stored.T)]
        (ours, reference, floor), values = alternate(functions, rounds)
        case = f"search {keep} of {count}x{stored.shape[1]}, {queries} queries"
        report(f"{case}, against faiss", ours, reference, floor, share_equal(values[0][1], values[1][1]))
        start = time.perf_counter()
        expected = obvious_search(stored, asked[:64], keep)
        slow = (time.perf_counter() - start) * queries / 64
        report(f"{case}, against all differences (64 queries, scaled)", ours, slow, floor, share_equal(values[0][1][:64], expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="compare with anomalib, where installed")
    parser.add_argument("--quick", action="store_true", help="12 images instead of 100")
    arguments = parser.parse_args()
    images, checked = (12, 40) if arguments.quick else (100, 24)
    patches = real_patches(images)
    keep, rng = coreset_size(len(patches), 0.01), np.random.default_rng(0)
    sets = {"solar cells": patches, "normal noise": rng.standard_normal(patches.shape, dtype=np.float32)}
    for name, features in sets.items():
        greedy_cases(name, features, keep, checked)
        if arguments.peers:
            try:
                peer_cases(name, features, keep)
            except ImportError as error:
                print(json.dumps({"case": f"greedy coreset of {name} against anomalib", "skipped": f"not installed: {error.name}",
                                  "remedy": 'pip install "anomalib==2.7.*" in an environment of its own, beside this package'}), flush=True)
    search_cases(patches, rng, 5)


if __name__ == "__main__":
    main()
