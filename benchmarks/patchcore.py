"""How fast PatchCore is beyond its backbone: one JSON object a line.

    python benchmarks/patchcore.py [--peers] [--quick]

Both sides get the same patch embeddings; timed are the fit (greedy coreset, bank) and the prediction (search, maps, image scores).
Without --peers the reference is the obvious way: naive greedy selection and the full matrix of distances. With it, anomalib 2.7's
PatchcoreModel is fed the same embeddings through its own methods (pip install anomalib==2.7.*); the bar is 5 times faster.
Images: MVTec's transistors where DEFECTBOOK_DATA has them (100 to fit and 100 to test at 256 px; 50 and 25 against
the obvious way), else solar cells (ELPV).
"agree": image AUROC, and pixel AUROC where there are masks, differ by less than 0.002. anomalib starts its coreset at a random
patch and searches in a random projection, so its figure is the mean over three seeds; floor_seconds is one pass over all features.
"""
import argparse

import numpy as np
from timing import report, seconds

from defectbook.core import DataError, Prediction
from defectbook.data.catalogue import load
from defectbook.data.datasets import Dataset, read_elpv
from defectbook.methods.patchcore import PatchCore, reduce_features
from defectbook.metrics.pixel import auroc
from defectbook.models.coreset import coreset_size, select_greedy_naive
from defectbook.models.memory import MemoryBank


def images(train: int, tests: int) -> Dataset:
    """`train` normal images and every k-th test image, so that about `tests` remain."""
    try:
        dataset = load("mvtec_transistor_384", category="transistor", validation=0)
    except DataError:
        dataset = read_elpv(normal=train, validation=0)
    step = max(1, len(dataset.test) // tests)
    return Dataset(dataset.name, dataset.category, dataset.root, dataset.train[:train], [], dataset.test[::step])


class Ours:
    """PatchCore, from embeddings on."""

    def __init__(self, detector: PatchCore):
        self.detector = detector

    def fit(self, embeddings: np.ndarray) -> None:
        rows = embeddings.reshape(-1, embeddings.shape[-1])
        self.detector.bank = MemoryBank(reduce_features(rows, "greedy", self.detector.parameters["ratio"], 0))

    def predict(self, embeddings: np.ndarray, sizes: list[tuple[int, int]]) -> Prediction:
        maps, scores = [], []
        for batch in np.array_split(embeddings, max(1, len(embeddings) // 16)):
            for features, grid, matched in zip(batch, *self.detector.compare(batch), strict=True):
                maps.append(self.detector.full_size(grid, sizes[len(maps)]))
                scores.append(self.detector.image_score(features, grid, matched, maps[-1]))
        return Prediction(maps, np.array(scores))


class Obvious(Ours):
    """The same with naive greedy selection and every distance formed."""

    def fit(self, embeddings: np.ndarray) -> None:
        rows = embeddings.reshape(-1, embeddings.shape[-1])
        self.bank = rows[select_greedy_naive(rows, coreset_size(len(rows), self.detector.parameters["ratio"]))].astype(np.float64)

    def predict(self, embeddings: np.ndarray, sizes: list[tuple[int, int]]) -> Prediction:
        maps, scores = [], []
        for features, size in zip(embeddings, sizes, strict=True):
            rows = features.reshape(-1, features.shape[-1])
            grid = np.stack([np.sqrt(((row - self.bank) ** 2).sum(1)).min() for row in rows]).reshape(features.shape[:2])
            maps.append(self.detector.full_size(grid.astype(np.float32), size))
            scores.append(grid.max())
        return Prediction(maps, np.array(scores))


class Anomalib:
    """anomalib's own methods on the same embeddings; its map is made at 256 px and brought to the image's size as ours is."""

    def __init__(self, ratio: float, side: int, seed: int):
        import torch
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        torch.manual_seed(seed)
        np.random.seed(seed)  # its random projection draws from the global generator
        self.torch, self.ratio, self.side = torch, ratio, side
        # Its backbone is not used; with one neighbour the image score is the largest patch's, as ours.
        self.model = PatchcoreModel(layers=["layer2"], backbone="resnet18", pre_trained=False, num_neighbors=1).eval()

    def fit(self, embeddings: np.ndarray) -> None:
        rows = self.torch.from_numpy(embeddings.reshape(-1, embeddings.shape[-1]))
        self.model.embedding_store = [rows]
        with self.torch.inference_mode():
            self.model.subsample_embedding(self.ratio)

    def predict(self, embeddings: np.ndarray, sizes: list[tuple[int, int]]) -> Prediction:
        from defectbook.core import resize_map

        maps, scores = [], []
        with self.torch.inference_mode():
            for batch in np.array_split(embeddings, max(1, len(embeddings) // 16)):
                rows = self.torch.from_numpy(batch.reshape(-1, batch.shape[-1]))
                distances, places = self.model.nearest_neighbors(rows, n_neighbors=1)
                distances, places = distances.reshape(len(batch), -1), places.reshape(len(batch), -1)
                scores.append(self.model.compute_anomaly_score(distances, places, rows).numpy())
                grids = distances.reshape(len(batch), 1, *batch.shape[1:3])
                for anomaly_map in self.model.anomaly_map_generator(grids, (self.side, self.side)).numpy():
                    maps.append(resize_map(anomaly_map[0], sizes[len(maps)]))
        return Prediction(maps, np.concatenate(scores))


def figures(prediction: Prediction, dataset: Dataset) -> np.ndarray:
    """Image AUROC and, where there are masks, pixel AUROC."""
    values = [auroc(prediction.scores, np.array([sample.label > 0 for sample in dataset.test]))]
    if any(sample.mask_source is not None for sample in dataset.test):
        values.append(auroc([m[::2, ::2] for m in prediction.maps], [sample.mask[::2, ::2] > 0 for sample in dataset.test]))
    return np.array(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="against anomalib 2.7 instead of the obvious way")
    parser.add_argument("--quick", action="store_true", help="20 images to fit and to test, 128 px")
    options = parser.parse_args()
    train, tests, side, repeats = (20, 20, 128, 1) if options.quick else (100, 100, 256, 3) if options.peers else (50, 25, 256, 1)
    dataset = images(train, tests)
    detector = PatchCore(image_size=side, ratio=0.01, device="cpu")
    normal = np.concatenate([batch.embeddings for batch in detector.embeddings(dataset.train)])
    batches = list(detector.embeddings(dataset.test))
    queries, sizes = np.concatenate([batch.embeddings for batch in batches]), [size for batch in batches for size in batch.sizes]
    floor = seconds(lambda: float(np.square(normal).sum()))[0]

    rows = []
    for seed in range(repeats):
        reference = Anomalib(0.01, side, seed) if options.peers else Obvious(detector)
        times, results = [], []
        for way in (Ours(detector), reference):  # alternately
            fitted, _ = seconds(way.fit, normal)
            predicted, prediction = seconds(way.predict, queries, sizes)
            times.append((fitted, predicted, fitted + predicted))
            results.append(figures(prediction, dataset))
        rows.append((times, results))
    times = np.median([row[0] for row in rows], axis=0)
    ours, theirs = rows[0][1][0], np.mean([row[1][1] for row in rows], axis=0)
    agree = bool((np.abs(ours - theirs) < 0.002).all())
    against = "anomalib" if options.peers else "the obvious way"
    name = f"{len(normal)} images of {dataset.name} at {side} px, {len(queries)} tested, against {against}"
    for part, own, other in zip(("fit", "predict", "fit + predict"), *times, strict=True):
        report(f"{part}, {name}", own, other, floor, agree, auroc=ours.round(4).tolist(), reference_auroc=theirs.round(4).tolist())


if __name__ == "__main__":
    main()
