"""Speed of robust PCA on solar cells, and of the thresholding that it repeats: one JSON object a line.

    python benchmarks/lowrank.py [--quick]

Ours lowers the singular values through the Gram matrix of the smaller side. The references are a randomised SVD (Halko and others 2011, one
pass forth and back, 10 vectors more than the rank, which it is told) and the full SVD. `agree` is the relative distance of the two results.
The matrices are those that the solver meets on its way, so that the rank grows from 1 to what the cells end with. The last line is the
whole decomposition, without a reference. --quick: 64 px and 100 cells instead of 128 px and 400.

Ours and the reference run alternately in one process; times are the best of the rounds. OMP_NUM_THREADS limits threads.
"""

import argparse
import os

import numpy as np
from timing import alternate, report, seconds

from defectbook.data.datasets import read_elpv
from defectbook.methods.lowrank import decompose, shrink, spectral_norm, threshold_singular
from defectbook.models.detectors import read_working

os.environ.setdefault("DEFECTBOOK_PROGRESS", "0")


def randomised(matrix: np.ndarray, amount: float, rank: int) -> np.ndarray:
    start = np.random.default_rng(0).normal(size=(matrix.shape[1], min(rank + 10, matrix.shape[1])))
    space = np.linalg.qr(matrix @ start)[0]
    space = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ space)[0])[0]
    left, values, right = np.linalg.svd(space.T @ matrix, full_matrices=False)
    return (space @ left * np.maximum(values - amount, 0)) @ right


def full(matrix: np.ndarray, amount: float) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left * np.maximum(values - amount, 0)) @ right


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(f"{np.linalg.norm(one - other) / np.linalg.norm(one):.1e}")


def thresholding_cases(matrix: np.ndarray, steps: tuple[int, ...]) -> None:
    """The first iterations of the solver, once more; at `steps` the thresholding is timed."""
    spectral, weight = spectral_norm(matrix), 1 / np.sqrt(len(matrix))
    sparse, multipliers, penalty = np.zeros_like(matrix), np.zeros_like(matrix), 1.25 / spectral
    for step in range(max(steps) + 1):
        moved, amount = matrix - sparse + multipliers / penalty, 1 / penalty
        low_rank, values = threshold_singular(moved, amount)
        if step in steps:
            for name, other in (("randomised", lambda: randomised(moved, amount, len(values))), ("full", lambda: full(moved, amount))):  # noqa: B023
                (ours, theirs), found = alternate([lambda: threshold_singular(moved, amount)[0], other], 2)  # noqa: B023
                report(f"thresholding {matrix.shape[0]}x{matrix.shape[1]}, rank {len(values)}, against the {name} SVD", ours, theirs, None,
                       distance(*found))
        sparse = shrink(matrix - low_rank + multipliers / penalty, weight / penalty)
        multipliers += penalty * (matrix - low_rank - sparse)
        penalty *= 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    cells = read_elpv(category="mono", normal=100 if quick else 400, validation=1, seed=0)
    matrix = np.ascontiguousarray(read_working(cells.train, 64 if quick else 128).images.reshape(len(cells.train), -1).T, np.float64)
    thresholding_cases(matrix, (4, 11, 15, 24))
    taken, found = seconds(decompose, matrix)
    report(f"robust PCA {len(matrix)}x{len(cells.train)}: rank {found.rank}, {len(found.residuals)} iterations", taken, None, None, found.converged)


if __name__ == "__main__":
    main()
