"""How much faster an epoch of PROS is when the frozen prefix is cached: one JSON object a line.

    python benchmarks/pros.py [--peers] [--quick]

The bar is 5 at K = 1 for a ViT-B. Ours trains one epoch from the cached prefix, the reference from the images, alternately and from the same
start, on one thread; floor_seconds is the time to fill the cache once. "agree" is the largest difference of the learned weights after the
epoch. Random weights cost what trained ones cost. There is no peer to install; --peers is accepted and changes nothing.
"""
import argparse
import sys

import torch
from timing import alternate, report, seconds

from defectbook.core import generator
from defectbook.methods.pros import AdaptedSam, Rest, at_side, cached_prefix, count_learned
from defectbook.models.sam import PromptModel, build_sam
from defectbook.models.sam_lite import imagenet_lite
from defectbook.models.segmentation import Inputs, TrainedPart, train_segmenter


def compare(name: str, model: PromptModel, side: int, adapters: int, count: int, rounds: int) -> None:
    """One line: an epoch of `count` images with and without the cache."""
    network = AdaptedSam(at_side(model, side), adapters)
    rng = generator(0)
    images = torch.from_numpy(rng.integers(0, 255, (count, 3, side, side), dtype="uint8"))
    targets = torch.zeros(count, side, side, dtype=torch.uint8)
    targets[:, side // 4:side // 2, side // 4:side // 2] = 1
    part = TrainedPart(network)
    start = {key: value.clone() for key, value in part.state_dict().items()}

    def epoch(module: torch.nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
        part.load_state_dict(start)
        train_segmenter(module, inputs, targets, "ce", epochs=1, device="cpu")
        return {key: value.clone() for key, value in part.state_dict().items()}

    def fill() -> float:
        with cached_prefix(network, images) as arrays:
            return sum(array[0].nelement() * array.element_size() for array in arrays) / 2**20

    filling, megabytes = seconds(fill)
    with cached_prefix(network, images) as arrays:
        (ours, reference), (cached, plain) = alternate([lambda: epoch(Rest(network), arrays), lambda: epoch(network, images)], rounds)
    agree = max(float((cached[key] - plain[key]).abs().max()) for key in plain)
    report(f"{name}, K = {adapters}, {count} images of {side} px, batches of 4", ours, reference, filling, agree,
           megabytes_an_image=round(megabytes, 2), learned=count_learned(network))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="accepted for uniformity; there is no peer")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller images, half a minute in all")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, rounds = (4, 1) if quick else (8, 3)
    for side in (128,) if quick else (128, 256):
        for adapters in (1, 12):
            compare("sam_lite", imagenet_lite(side).eval(), side, adapters, count, rounds)
    compare("vit_b", build_sam("vit_b"), 128 if quick else 256, 1, count, 1 if quick else 2)
    print("# the cache saves the encoder's forward pass only: sam_lite's is cheap beside its decoder, a ViT-B's is not", file=sys.stderr)
