"""Rows that share a fit, what a killed comparison keeps, averages and differences in tables."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import noise

from defectbook.core import DataError, ParameterError, Prediction, Sample, make_folder
from defectbook.data.datasets import Dataset
from defectbook.metrics.pixel import auroc
from defectbook.metrics.published import published
from defectbook.practice.comparisons import KeptFit, Row, fit_folder, metrics_for, open_sets, run_rows, study
from defectbook.practice.experiments import run_experiment
from defectbook.practice.pni_rows import TERM_ROWS
from defectbook.practice.protocol import METRICS, by_kind, compute_metric, compute_metrics, evaluate, evaluate_fitted
from defectbook.practice.runs import RunStore
from defectbook.practice.tables import (
    CATEGORY_GROUPS,
    OBJECTS,
    beside_published,
    group_averages,
    image_auroc_interval,
    published_cells,
    seed_interval,
    written,
)

COLUMNS = ["dataset", "category", "method", "seed", "metric", "value"]


class Mean:
    """Distance to the mean good image, times `gain`; counts its fits."""

    fits = 0

    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def fit(self, samples, checkpoint=None):
        Mean.fits += 1
        self.mean = np.mean([s.image.astype(np.float64) for s in samples], axis=(0, 3))
        return self

    def predict(self, samples):
        maps = [(self.gain * np.abs(s.image.mean(2) - self.mean)).astype(np.float32) for s in samples]
        return Prediction(maps, [m.max() for m in maps])

    def save(self, folder):
        np.save(make_folder(folder) / "mean.npy", self.mean)

    @classmethod
    def load(cls, folder):
        made = cls()
        made.mean = np.load(Path(folder) / "mean.npy")
        return made

    def with_gain(self, gain):
        made = Mean(gain)
        made.mean = self.mean
        return made


def plates(kind: str, count: int, start: int, masked: bool = True) -> list[Sample]:
    made = []
    for i in range(count):
        image, mask = noise(start + i).copy(), np.zeros((64, 64), np.uint8)
        if kind != "good":
            mask[8 * i % 40:8 * i % 40 + 12, 10:30] = 255
            image[mask > 0] = image[mask > 0] // (3 if kind == "hole" else 1.3)
        made.append(Sample(image, mask if kind != "good" and masked else None, int(kind != "good"), f"{kind}{start + i}", {"kind": kind}))
    return made


@pytest.fixture
def plate_set(tmp_path) -> Dataset:
    tests = plates("good", 6, 50) + plates("hole", 5, 60) + plates("stain", 4, 70)
    return Dataset("plates", "toy", tmp_path, plates("good", 8, 0), plates("good", 6, 20), tests, simulated=True)


# the protocol's new halves

def test_a_fitted_detector_is_judged_as_evaluate_does(plate_set):
    whole = evaluate(Mean(), plate_set, tuple(METRICS), verbose=False)
    half = evaluate_fitted(Mean().fit(plate_set.train), plate_set, tuple(METRICS), seconds={"fit": 2.0})
    pd.testing.assert_frame_equal(whole.metrics, half.metrics)
    assert whole.threshold == half.threshold and whole.map_range == half.map_range
    assert (whole.prediction.scores == half.prediction.scores).all() and half.seconds["fit"] == 2.0


def test_a_fitted_detector_needs_no_training_images(plate_set):
    fitted = Mean().fit(plate_set.train)
    assert evaluate_fitted(fitted, replace(plate_set, train=[])).metrics.metric.tolist() == ["image_auroc"]
    for split in ("validation", "test"):
        with pytest.raises(DataError, match=f"split '{split}' is empty"):
            evaluate_fitted(fitted, replace(plate_set, **{split: []}))
    with pytest.raises(ParameterError, match="unknown metric 'auroc'"):
        evaluate_fitted(fitted, plate_set, ("auroc",))


def test_all_metrics_at_once_are_the_single_ones(plate_set):
    prediction = Mean().fit(plate_set.train).predict(plate_set.test)
    singly = {name: compute_metric(name, prediction, plate_set.test) for name in METRICS}
    assert compute_metrics(tuple(METRICS), prediction, plate_set.test) == singly


def test_by_kind_is_the_metric_on_that_part(plate_set):
    prediction = Mean().fit(plate_set.train).predict(plate_set.test)
    table = by_kind(prediction, plate_set.test, ("image_auroc", "pixel_auroc", "aupro"))
    assert table.groupby("kind").images.first().to_dict() == {"hole": 5, "stain": 4} and len(table) == 6
    for kind in ("hole", "stain"):
        chosen = [i for i, s in enumerate(plate_set.test) if s.meta["kind"] in ("good", kind)]
        part = Prediction([prediction.maps[i] for i in chosen], prediction.scores[chosen])
        for row in table[table.kind == kind].itertuples():
            assert row.value == compute_metric(row.metric, part, [plate_set.test[i] for i in chosen])


def test_by_kind_without_pixels(plate_set):
    tests = plate_set.test[:11] + plates("stain", 4, 70, masked=False)
    prediction = Mean().fit(plate_set.train).predict(tests)
    table = by_kind(prediction, tests, ("image_auroc", "pixel_auroc"))
    assert table[["kind", "metric"]].values.tolist() == [["hole", "image_auroc"], ["hole", "pixel_auroc"], ["stain", "image_auroc"]]
    with pytest.raises(ParameterError, match="unknown metric"):
        by_kind(prediction, tests, ("nothing",))


# rows

def rows_of(fit: KeptFit, broken: bool = False) -> list[Row]:
    def fails():
        fit()
        raise KeyboardInterrupt

    return [Row("one", {"gain": 1}, lambda: (fit(), {"fit": fit.seconds})),
            Row("two", {"gain": 2}, fails if broken else lambda: (fit().with_gain(2.0), {"fit": fit.seconds}))]


def test_a_killed_comparison_goes_on(plate_set, tmp_path):
    Mean.fits, store = 0, RunStore(tmp_path / "store")
    folder = fit_folder(store, {"a": 1})
    with pytest.raises(KeyboardInterrupt):
        run_rows("toy", rows_of(KeptFit(Mean, Mean.load, plate_set.train, folder), broken=True), plate_set, store)
    assert [run.params["parameters"]["method"] for run in store.runs("toy")] == ["one"] and folder.is_dir()
    first = (store.runs("toy")[0].folder / "provenance.json").stat().st_mtime_ns
    fit = KeptFit(Mean, Mean.load, plate_set.train, folder)
    done = run_rows("toy", rows_of(fit), plate_set, store)
    assert Mean.fits == 1, "the fit was kept"
    assert (done[0].folder / "provenance.json").stat().st_mtime_ns == first
    assert done[1].provenance["seconds"]["fit"] == pytest.approx(fit.seconds, abs=0.01)
    assert json.loads((folder / "seconds.json").read_text()) == fit.seconds and (folder.parent / ".gitignore").read_text() == "*\n"
    fit.forget()
    assert not folder.exists() and len(store.runs()) == 2


def test_a_fit_cut_off_before_it_was_saved_is_made_again(plate_set, tmp_path):
    folder = tmp_path / "fits" / "one"
    (folder / "fitted").mkdir(parents=True)  # no seconds.json: something stopped before the end
    Mean.fits = 0
    assert KeptFit(Mean, Mean.load, plate_set.train, folder)().mean.shape == (64, 64) and Mean.fits == 1
    assert KeptFit(Mean, Mean.load, plate_set.train, folder)().mean.shape == (64, 64) and Mean.fits == 1


def test_rows_are_taken_from_another_experiment(plate_set, tmp_path):
    store, fitted = RunStore(tmp_path / "store"), Mean().fit(plate_set.train)
    rows = [Row("one", {"gain": 1}, lambda: (fitted, {}))]
    (made,) = run_rows("first", rows, plate_set, store)
    (taken,) = run_rows("second", rows, plate_set, store, also=("first",))
    assert taken.folder == made.folder and not (store.path / "second").exists()
    other = replace(plate_set, test=plate_set.test[:-1])
    assert run_rows("second", rows, other, store, also=("first",))[0].folder != made.folder


def test_names_tell_rows_apart(plate_set, tmp_path):
    row = Row("one", {}, lambda: (Mean(), {}))
    with pytest.raises(ParameterError, match="one name twice"):
        run_rows("toy", [row, row], plate_set, RunStore(tmp_path))


def test_what_a_row_stores(plate_set, tmp_path):
    fitted = Mean().fit(plate_set.train)
    (stored,) = run_rows("toy", [Row("one", {}, lambda: (fitted, {}))], plate_set, RunStore(tmp_path), preset="smoke")
    run = evaluate_fitted(fitted, plate_set, metrics_for(plate_set))
    figures, tables = study(run)
    for name, value in {**figures, **dict(zip(run.metrics.metric, run.metrics.value, strict=True))}.items():
        assert stored.value(name) == pytest.approx(value)
    scores, labels = run.scores().score.to_numpy(), run.scores().label.to_numpy() > 0
    assert stored.value("image_false_positives") == ((scores > run.threshold) & ~labels).sum()
    assert stored.value("image_false_negatives") == ((scores <= run.threshold) & labels).sum()
    curve, counts = stored.table("pr_curve"), stored.table("histogram")
    assert np.diff(curve.recall, prepend=0) @ curve.precision == pytest.approx(figures["pixel_average_precision"], abs=1e-4)
    assert counts.defective.sum() == sum(int((s.mask > 0).sum()) for s in plate_set.test)
    assert counts.normal.sum() + counts.defective.sum() == 64 * 64 * len(plate_set.test)
    assert set(stored.table("kinds").kind) == {"hole", "stain"} and stored.panels() and stored.table("none") is None


def test_pictures_of_real_sets_stay_out_of_the_store(plate_set, tmp_path):
    fitted = Mean().fit(plate_set.train)
    (stored,) = run_rows("toy", [Row("one", {}, lambda: (fitted, {}))], replace(plate_set, simulated=False), RunStore(tmp_path))
    assert stored.panels() == [] and not list(stored.folder.glob("panels/*.webp"))


def test_image_truth_alone(plate_set, tmp_path):
    tests = plate_set.test[:6] + plates("stain", 4, 70, masked=False)
    fitted = Mean().fit(plate_set.train)
    (stored,) = run_rows("toy", [Row("one", {}, lambda: (fitted, {}))], replace(plate_set, test=tests), RunStore(tmp_path))
    assert "pixel_auroc" not in set(stored.metrics.metric) and stored.table("pr_curve") is None
    assert set(stored.table("kinds").metric) == {"image_auroc"}


def test_sets_are_opened_by_category(mvtec_tree, elpv_tree):
    (plate,) = open_sets("folder", "all", mvtec_tree, {"train": 3}, crop=(32, 24))
    assert plate.category == "plate" and len(plate.train) == 3 and plate.test[0].image.shape == (24, 24, 3)
    (mono,) = open_sets("elpv", "mono", elpv_tree, {"train": 7, "validation": 3, "test": 8}, seed=2)
    assert [len(split) for split in mono.splits.values()] == [7, 3, 8]
    with pytest.raises(DataError, match="did you mean 'plate'"):
        list(open_sets("folder", "plte", mvtec_tree))


# tables

def long(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def test_averages_of_the_printed_categories_are_the_printed_averages():
    """PatchCore's column of Table 1 is complete but for one cell; its texture average follows from its five rows."""
    cells = published_cells("1").query("published_method == 'PatchCore'")
    cells = cells[cells.category.isin(CATEGORY_GROUPS["mvtec"]["texture"])]
    metrics = long([("mvtec", row.category, "PatchCore", 0, row.metric, row.published) for row in cells.itertuples()])
    ours = group_averages(metrics).query("category == 'texture'").set_index("metric").value
    printed = published_cells("1").query("published_method == 'PatchCore' and category == 'texture'").set_index("metric").published
    assert (100 * (ours - printed)).abs().max() < 0.06


def test_seeds_weigh_less_than_categories():
    rows = [("mvtec", "bottle", "a", seed, "image_auroc", value) for seed, value in enumerate((0.2, 0.4, 0.6))]
    averages = group_averages(long([*rows, ("mvtec", "cable", "a", 0, "image_auroc", 0.8)])).set_index("category")
    assert averages.value["object"] == pytest.approx(0.6) and averages.categories["object"] == 2 and "texture" not in averages.index


def test_differences_only_for_complete_groups():
    full = long([("mvtec", name, "PNI", 0, "image_auroc", 0.99) for name in OBJECTS])
    table = beside_published(full, "1", {"PNI": "PNI"}).set_index("category")
    assert table.complete["object"] and not table.complete["average"] and np.isnan(table.delta["average"])
    printed = published("PNI", "1").query("category == 'object' and column == 'PNI' and metric == 'image_auroc'").number.iloc[0]
    assert table.delta["object"] == pytest.approx(99 - printed)
    assert np.isnan(table.delta["transistor"]), "PNI's own cell is lost in the text"


@pytest.mark.parametrize("table, method, category", [("3", "NPR", "texture"), ("4", "Trained by focal loss", "average"), ("5", "PNI", "02"),
                                                     ("6", "PNI", "complex_structure"), ("2", "PNI (Ensemble)", "object")])
def test_every_table_names_its_methods(table, method, category):
    cells = published_cells(table)
    assert len(cells.query("published_method == @method and category == @category")) and cells.published.between(0, 1).all()


def test_tables_of_other_papers_are_refused():
    with pytest.raises(ParameterError, match="unknown table of PNI '7'"):
        published_cells("7")


def test_intervals(plate_set, tmp_path):
    (stored,) = run_rows("toy", [Row("one", {}, lambda: (Mean().fit(plate_set.train), {}))], plate_set, RunStore(tmp_path))
    interval, scores = image_auroc_interval(stored, 300), stored.scores
    assert interval.low <= stored.value("image_auroc") <= interval.high
    assert stored.value("image_auroc") == pytest.approx(auroc(scores.score, scores.label))
    assert seed_interval([0.5]) is None and written(None, 0.5) == "0.500"
    assert written(seed_interval([0.4, 0.5, 0.6]), 0.5) == "0.500 [0.252, 0.748]"


# experiments

def test_experiments_read_other_layouts_and_share_rows(mvtec_tree, tmp_path):
    given = {"preset": "smoke", "store": str(tmp_path / "store"), "dataset": "folder", "category": "all", "device": "cpu",
             "data_root": str(mvtec_tree)}
    run_experiment("pni_ablation", given, tmp_path / "one", live=False)
    runs = RunStore(tmp_path / "store").runs("pni_ablation")
    assert {run.params["parameters"]["method"] for run in runs} == {*TERM_ROWS, "PNI-NPR"}
    assert {run.params["parameters"]["category"] for run in runs} == {"plate"} and not any(run.panels() for run in runs)
    run_experiment("pni_curves", given, tmp_path / "two", live=False)
    assert len(RunStore(tmp_path / "store").runs()) == len(runs), "the curves read the ablation's rows"
