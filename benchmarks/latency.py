"""How long one image takes, from a file's pixels to its map and score (CPU, one thread, batch 1): one JSON object a line.

    python benchmarks/latency.py [--peers] [--quick]

Ours is `predict` of a fitted detector on one image; the reference, where there is one, is the same with the network run by onnxruntime
(--peers, or wherever onnxruntime is installed), so a ratio below 1 says that torch is quicker. floor_seconds is the backbone alone, or the
network alone. Every figure is the best of several rounds, measured alternately. "agree" is the largest difference of map values (features, or
probabilities, for the exported graphs) relative to the largest. Images are drawn, 300 px; what they show does not change the time.
"""
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import alternate, report

from defectbook.core import ParameterError, Sample, generator, resize_image
from defectbook.methods.lowrank import RPCA
from defectbook.methods.paedid import PAEDID
from defectbook.methods.patchcore import PatchCore
from defectbook.methods.pni import PNI
from defectbook.methods.pros import PROS
from defectbook.methods.reconstruction import ssim_ae
from defectbook.methods.segmenters import UNetSegmenter
from defectbook.methods.smooth_sparse import SmoothSparse
from defectbook.models.features import embed_patches
from defectbook.models.priors import PatchPrior
from defectbook.models.tiling import Tiled, Tiling
from defectbook.practice.export import export_features, export_pros

SIZE = 300


def parts(count: int, size: int = SIZE) -> list[Sample]:
    """Coarse random surfaces, uint8 (size, size, 3)."""
    rng = generator(0, "latency")
    coarse = [np.repeat(rng.integers(80, 170, (12, 12, 1), np.uint8), 3, axis=2) for _ in range(count)]
    return [Sample(resize_image(image, (size, size)), name=f"part {number}") for number, image in enumerate(coarse)]


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The exported graph on one thread: uint8 (S, S, 3) -> what it gives."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: graph.run(None, {"image": image[None]})[0]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def patchcore(samples: list[Sample], image_size: int, rounds: int, peers: bool, folder: Path) -> None:
    """One line: PatchCore against itself on exported features."""
    detector = PatchCore(image_size=image_size, coreset="random", ratio=0.1, device="cpu").fit(samples[1:])
    sample, side = samples[0], detector.parameters["image_size"]
    small = resize_image(sample.image, (side, side))
    functions = [lambda: detector.predict([sample]).maps[0], lambda: detector.backbone(small[None])]
    if peers:
        export_features(detector.backbone, folder / f"features{side}.onnx", side)
        network = session(folder / f"features{side}.onnx")

        def through_onnx() -> np.ndarray:
            grids, _ = detector.compare(network(resize_image(sample.image, (side, side))))
            return detector.full_size(grids[0], sample.image.shape[:2])

        functions.append(through_onnx)
    (ours, floor, *reference), (expected, _, *found) = alternate(functions, rounds)
    report(f"PatchCore, Lite0, {side} px, bank of {len(detector.bank)}", ours, reference[0] if reference else None, floor,
           relative(found[0], expected) if found else None)
    if peers:
        (ours, reference), (expected, found) = alternate(
            [lambda: embed_patches(detector.backbone(small[None])).numpy(), lambda: network(small)], rounds)
        report(f"features of Lite0, {side} px", ours, reference, None, relative(found, expected))


def pros(samples: list[Sample], side: int, rounds: int, peers: bool, folder: Path) -> None:
    """One line: PROS in torch and exported. Random adapters cost what trained ones cost."""
    segmenter = PROS(side=side, device="cpu")
    segmenter.is_fitted = True
    image = resize_image(samples[0].image, (side, side))
    functions = [lambda: segmenter.predict([Sample(image)])[:, 1]]
    if peers:
        export_pros(segmenter, folder / f"pros{side}.onnx")
        network = session(folder / f"pros{side}.onnx")
        functions.append(lambda: network(image))
    (ours, *reference), (expected, *found) = alternate(functions, rounds)
    report(f"PROS, sam_lite, {side} px", ours, reference[0] if reference else None, None, relative(found[0], expected) if found else None)


def plain(name: str, detector: Any, samples: list[Sample], rounds: int) -> None:
    """One line without a reference."""
    (ours,), _ = alternate([lambda: detector.predict(samples[:1])], rounds)
    report(name, ours, None, None, None)


def others(samples: list[Sample], quick: bool, rounds: int) -> None:
    """Detectors that have no exported twin. Few epochs: what was learned does not change the time."""
    normal = samples[1:]
    pni = PNI("efficientnet_lite0", image_size=256, ratio=0.05, words=64, depth=3, width=256, epochs=1, device="cpu")
    if not quick:
        plain("PNI, Lite0, 256 px", pni.fit(normal), samples, rounds)
    plain("RPCA, 128 px, 20 images", RPCA(columns=20).fit(normal), samples, rounds)
    plain("smooth-sparse, 128 px", SmoothSparse().fit(normal), samples, rounds)
    plain("SSIM-AE, 128 px", ssim_ae(epochs=1).fit(normal), samples, rounds)
    plain("PAEDID, 128 px", PAEDID(PatchPrior(epochs=1)).fit(normal), samples, rounds)
    for side in (128,) if quick else (128, 256):
        unet = UNetSegmenter("unet", width=None if not quick else 8, side=side, weights=None, device="cpu")
        unet.is_fitted = True
        plain(f"U-Net, {side} px", unet, samples, rounds)


def tiled(samples: list[Sample], rounds: int, size: int) -> None:
    """One line: a large image in tiles; the floor is as many single predictions as its area has tiles without overlap."""
    detector = PatchCore(image_size=256, coreset="random", ratio=0.1, device="cpu").fit(samples[1:])
    large, tile = parts(1, size)[0], Sample(resize_image(samples[0].image, (256, 256)))
    (ours, one), _ = alternate([lambda: Tiled(detector, Tiling(256, 32, 4)).predict([large]), lambda: detector.predict([tile])], rounds)
    report(f"PatchCore in tiles of 256 px, {size} px", ours, None, one * (size / 256) ** 2, None, tiles=len(Tiling(256, 32, 4).starts(size)) ** 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="require onnxruntime; without it, it is used where it is installed")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller images, about half a minute")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        peers = True
    except ImportError as error:
        if args.peers:
            raise ParameterError(f"--peers needs onnx and onnxruntime ({error}); pip install 'defectbook[onnx]'") from error
        peers = False
    samples, rounds = parts(9 if args.quick else 21), 3 if args.quick else 10
    with tempfile.TemporaryDirectory() as place:
        for side in (128,) if args.quick else (128, 256):
            patchcore(samples, side, rounds, peers, Path(place))
            pros(samples, side, rounds, peers, Path(place))
    others(samples, args.quick, rounds)
    tiled(samples, 1 if args.quick else 3, 512 if args.quick else 1024)
