"""Whether a training on foils ever waits for its patches, and how fast claims are counted: one JSON object a line.

    python benchmarks/imbalance.py [--peers] [--quick]

Loading: ours_seconds is what one batch costs to choose, cut and paste (a round's choice spread over its batches), reference_seconds one step of
training on it, so that the ratio is how many batches are ready when one is used up; on a GPU the step is faster and the loading the same.
Counting: the reference is scikit-learn's multilabel_confusion_matrix, floor_seconds one pass over the pixels; "agree" whether all counts
are equal. --quick takes smaller foils and skips the paper's size.
"""
import argparse
from collections import deque
from functools import partial
from time import perf_counter

import numpy as np
import torch
from timing import alternate, report, seconds

from defectbook.core import generator
from defectbook.data.regions import Regions
from defectbook.methods.imbalance import RECIPES, find_recipe, loss_of, patch_batches
from defectbook.models.foil_unet import build_foil_unet
from defectbook.models.iterations import step_loss
from defectbook.practice.foil_rows import count_claims, open_foils, schedule_of, sizes_of


def loading(preset: str, sizes: dict, training: Regions, models: list[str], share: int = 1) -> None:
    """One line a model: a batch loaded against a step on it; with `share`, a step on a fraction of the batch, multiplied."""
    schedule = schedule_of(sizes)
    network = build_foil_unet(3, len(training.classes), schedule.width)
    for model in models:
        batches = patch_batches(training, find_recipe(model), schedule, seed=0)
        images, masks = next(iter(batches(0)))
        loss, part = loss_of(find_recipe(model), training.pixels(), training.classes), max(1, schedule.batch // share)
        taken, _ = seconds(lambda batches=batches: deque(batches(0), maxlen=0))

        def step(loss=loss, images=images[:part], masks=masks[:part]) -> None:
            network.zero_grad(set_to_none=True)
            step_loss(network, loss, images, masks, "cpu").backward()

        (stepping,), _ = alternate([step], 2)
        case = f"loading, {preset}, {model}: {schedule.batch} patches of {schedule.patch} px"
        report(case, taken / schedule.refresh, stepping * schedule.batch / part, None, None)


def counting(side: int, classes: int = 4) -> None:
    """One line: claims of `classes` defects on a region counted, ours and scikit-learn's."""
    from sklearn.metrics import multilabel_confusion_matrix

    rng = generator(0)
    reference = rng.integers(0, classes + 1, (side, side)).astype(np.uint8)
    claims = rng.random((classes, side, side)) < 0.2

    def theirs() -> np.ndarray:
        true = np.stack([(reference == kind).ravel() for kind in range(1, classes + 1)], 1)
        return multilabel_confusion_matrix(true.astype(int), claims.reshape(classes, -1).T.astype(int))

    (ours, peer), (counts, matrices) = alternate([partial(count_claims, claims, reference), theirs], 3)
    started = perf_counter()
    claims.sum()
    floor = perf_counter() - started
    agree = bool((matrices == np.stack([np.stack([counts.tn, counts.fp], 1), np.stack([counts.fn, counts.tp], 1)], 1)).all())
    report(f"counting claims of {classes} defects on {side}x{side} px, beside scikit-learn", ours, peer, floor, agree)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; scikit-learn is always compared with")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller foils")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    counting(256 if quick else 1024)
    models = [name for name in RECIPES if not RECIPES[name].binary and RECIPES[name].loss == "ce" and RECIPES[name].weights == "none"]
    sizes = sizes_of("small") | ({"foils": 6} if quick else {})
    loading("small", sizes, open_foils(sizes)[0], models)
    if not quick:
        sizes = sizes_of("paper") | {"foils": 12}
        loading("paper, 12 foils", sizes, open_foils(sizes)[0], models, share=16)
