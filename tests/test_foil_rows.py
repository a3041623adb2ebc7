"""The rows of FOIL: counts agree with the obvious way, a run holds what pages need, all-background answers are counted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from defectbook.core import ParameterError
from defectbook.data.regions import Regions
from defectbook.data.sampling import split_rows
from defectbook.methods.imbalance import RECIPES, ImbalancedSegmenter, Schedule
from defectbook.metrics.pixel import Counts
from defectbook.practice import foil_rows
from defectbook.practice.foil_rows import (
    SIZES,
    choose_regions,
    count_claims,
    count_table,
    judge,
    rate_rows,
    region_dice,
    region_panel,
    run_foil,
    schedule_of,
    sizes_of,
    stability_rows,
)
from defectbook.practice.grids import read_grid
from defectbook.practice.runs import RunStore


@given(st.integers(0, 2**31))
def test_counts_are_those_of_a_loop_over_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, claims = rng.integers(0, 4, (5, 6)), rng.random((3, 5, 6)) < 0.4
    counts = count_claims(claims, reference)
    for k in range(3):
        cells = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
        for claimed, true in zip(claims[k].ravel(), (reference == k + 1).ravel(), strict=True):
            cells[("t" if claimed == true else "f") + ("p" if claimed else "n")] += 1
        assert all(int(getattr(counts, name)[k]) == value for name, value in cells.items())


class Constant:
    """A segmenter that gives the same class everywhere."""

    def __init__(self, kind: int):
        self.kind = kind

    def predict(self, regions: Regions):
        for image in regions.images:
            yield np.stack([np.full(image.shape[:2], float(c == self.kind), np.float32) for c in range(len(regions.classes))])

    claims = staticmethod(lambda scores: scores.argmax(0) == np.arange(1, len(scores))[:, None, None])


def some_regions(seed: int = 0) -> Regions:
    rng = np.random.default_rng(seed)
    masks = [rng.integers(0, 3, (8, 9)).astype(np.uint8) for _ in range(4)]
    truths = [np.where(rng.random((8, 9)) < 0.2, 0, mask).astype(np.uint8) for mask in masks]
    return Regions([np.zeros((8, 9, 3), np.uint8)] * 4, masks, list("abcd"), ("sound", "crack", "cavity"), truths)


def test_annotation_and_truth_are_judged_apart() -> None:
    regions = some_regions()
    counts = judge(Constant(2), regions)
    for name, masks in (("annotation", regions.masks), ("truth", regions.truths)):
        assert counts[name].tp[:, 1].tolist() == [int((mask == 2).sum()) for mask in masks]
        assert counts[name].tp[:, 0].sum() == 0 and (counts[name].tp + counts[name].fn)[:, 0].tolist() == [int((mask == 1).sum()) for mask in masks]


def test_all_background_has_no_precision_and_says_so() -> None:
    counts = judge(Constant(0), some_regions())["annotation"]
    rows = {(category, metric): value for category, metric, value in rate_rows(counts, ("crack", "cavity"), "x_")}
    assert rows["mean", "x_tpr"] == rows["mean", "x_fpr"] == 0
    assert np.isnan(rows["mean", "x_precision"]) and rows["mean", "x_undefined_precision"] == 2
    half = judge(Constant(1), some_regions())["annotation"]
    rows = {(category, metric): value for category, metric, value in rate_rows(half, ("crack", "cavity"))}
    assert rows["mean", "undefined_precision"] == 1 and rows["mean", "precision"] == rows["crack", "precision"] > 0
    stable = dict((metric, value) for _, metric, value in stability_rows({2: counts.sum(0), 4: counts.sum(0)}, 2, 2))
    assert stable["psoi_tpr"] == 0 and np.isnan(stable["psoi_precision"])


def test_psoi_is_the_deviation_of_class_means() -> None:
    tables = {at: Counts(*(np.array(values) for values in cells)) for at, cells in
              {10: ([1, 8], [1, 0], [9, 2], [9, 10]), 15: ([5, 8], [0, 2], [5, 2], [10, 8]), 20: ([6, 6], [3, 3], [4, 4], [7, 7])}.items()}
    found = {metric: value for _, metric, value in stability_rows(tables, 10, 5)}
    assert found["psoi_tpr"] == pytest.approx(np.std([0.45, 0.65, 0.6], ddof=1))
    assert found["psoi_fpr"] == pytest.approx(np.std([0.05, 0.1, 0.3], ddof=1))


def test_regions_are_chosen_by_rule() -> None:
    regions = some_regions(3)
    tp = np.array([[5, 5], [1, 1], [3, 3], [4, 4]])
    counts = {"annotation": Counts(tp, np.full((4, 2), 2), np.full((4, 2), 2), np.full((4, 2), 60))}
    counts["truth"] = Counts(tp + np.array([[0, 0], [0, 0], [2, 2], [0, 0]]), *(getattr(counts["annotation"], name) for name in ("fp", "fn", "tn")))
    chosen = choose_regions(counts, regions)
    assert (chosen["best"], chosen["worst"], chosen["median"], chosen["most disputed"]) == (0, 1, 2, 2)
    overlooked = [int(((truth > 0) & (mask == 0)).sum()) for truth, mask in zip(regions.truths, regions.masks, strict=True)]
    assert chosen["most overlooked"] == int(np.argmax(overlooked))
    nothing = Counts(*(np.zeros((1, 2), int) for _ in range(4)))
    assert region_dice(nothing).tolist() == [1.0]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_panels_have_two_columns(count: int) -> None:
    pictures = [np.full((30, 60, 3), 40 * i, np.uint8) for i in range(count)]
    panel = region_panel(pictures, 40)
    assert panel.shape == (20 if count < 3 else 46, 86, 3) and (panel[:20, :40] == 0).all()


def test_count_tables_are_long() -> None:
    table = count_table({"truth": Counts(*(np.arange(2) + i for i in range(4)))}, ("crack", "cavity"), iteration=7)
    assert table.to_dict("records")[1] == {"iteration": 7, "reference": "truth", "class": "cavity", "tp": 1, "fp": 2, "fn": 3, "tn": 4}


def test_presets_say_what_the_thesis_says() -> None:
    assert schedule_of(sizes_of("paper")) == Schedule() and SIZES["paper"]["foils"] == 26
    assert list(range(7000, 10_001, 500)) == Schedule().kept
    for preset, sizes in SIZES.items():
        schedule = schedule_of(sizes)
        assert schedule.kept[0] / schedule.iterations == pytest.approx(0.7, abs=0.21), preset
        assert all(iteration % schedule.refresh == 0 for iteration in schedule.kept)
        assert min(split_rows(sizes["side"])[0].indices(sizes["side"])[:2][::-1]) > sizes["patch"]
    with pytest.raises(ParameterError, match="small"):
        sizes_of("smal")


@pytest.mark.parametrize("model", ["baseline", "binary"])
def test_a_run_holds_what_pages_need(model: str, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = run_foil("foil_models", model, store, preset="smoke", device="cpu")
    assert not list((tmp_path / ".fits").iterdir()) and run.params["parameters"]["networks"] == RECIPES[model].networks()
    assert sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file()) < 200_000
    wide = run.metrics.pivot(index="category", columns="metric", values="value")
    regions = run.table("regions").query("reference == 'annotation'").groupby("class", sort=False)[["tp", "fp", "fn", "tn"]].sum()
    for name, row in regions.iterrows():
        assert wide.loc[name, "true_positives"] == row.tp and wide.loc[name, "tpr"] == pytest.approx(row.tp / (row.tp + row.fn))
    assert wide.loc["mean", "truth_tpr"] == pytest.approx(wide.loc[list(regions.index), "truth_tpr"].mean())
    assert sorted(run.table("checkpoints").iteration.unique()) == [2, 4]
    assert (run.table("shifted") is None or len(run.table("shifted")) == 0) == RECIPES[model].binary
    assert [panel.choice for panel in run.panels()] == ["best", "median", "worst", "most disputed", "most overlooked", "most cavities"]
    agreement = run.table("agreement")
    for reference, column in (("annotation", "annotated"), ("truth", "true")):
        regions = run.table("regions")
        counts = regions[regions.reference == reference].groupby("class")[["tp", "fp", "fn", "tn"]].sum()
        for short, called, there in (("tp", True, True), ("fp", True, False), ("fn", False, True), ("tn", False, False)):
            cells = agreement[(agreement.called == called) & (agreement[column] == there)].groupby("class").pixels.sum()
            assert cells.equals(counts[short].rename("pixels"))
    fitted = run.table("fitted").query("reference == 'annotation'").set_index("class")
    assert (fitted.tp + fitted.fn).tolist() == run.table("classes").training_annotation.tolist()[1:]
    patches = run.table("patches")
    assert ((0 < patches.distinct) & (patches.distinct <= patches.patches)).all()
    counted = run.table("classes")
    assert counted.training_annotation.sum() == counted.training_truth.sum() > 0
    assert counted.weight.tolist() == ([0, 1, 1, 1, 1] if model == "binary" else [1] * 5) and ("rest" in counted) == (model == "binary")
    assert len(store.runs("foil_models")) == 1 and run_foil("foil_models", model, store, preset="smoke", device="cpu").id == run.id


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_foil("foil_models", "focal", RunStore(tmp_path / "whole"), preset="smoke", device="cpu")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(foil_rows, "judge_run", stop)
        with pytest.raises(KeyboardInterrupt):
            run_foil("foil_models", "focal", RunStore(tmp_path / "other"), preset="smoke", device="cpu")
    fits = list((tmp_path / "other" / ".fits").glob("*/network0/*.safetensors"))
    assert fits
    again = run_foil("foil_models", "focal", RunStore(tmp_path / "other"), preset="smoke", device="cpu")
    assert again.id == whole.id and again.metrics.equals(whole.metrics)
    pd.testing.assert_frame_equal(again.table("checkpoints"), whole.table("checkpoints"))


def test_other_channels_make_other_runs(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    runs = [run_foil("foil_channels", "baseline", store, preset="smoke", reading=reading, device="cpu") for reading in ("albedo", "lights")]
    assert len({run.id for run in runs}) == 2 and [run.params["parameters"]["channels"] for run in runs] == [1, 4]
    assert [run.params["parameters"]["parameters"] for run in runs][1] > [run.params["parameters"]["parameters"] for run in runs][0]
    with pytest.raises(ParameterError, match="truth"):
        run_foil("foil_models", "baseline", store, preset="smoke", annotation="true", device="cpu")
    with pytest.raises(ParameterError, match="normals"):
        run_foil("foil_channels", "baseline", store, preset="smoke", reading="normal", device="cpu")


def test_the_sweeps_name_every_model_and_seed() -> None:
    models = read_grid(ROOT / "nbs" / "experiments" / "foil_models.yaml")
    thesis = {(cell.given["model"], cell.given["seed"]) for cell in models.cells if "annotation" not in cell.given}
    assert thesis == {(model, seed) for model in RECIPES for seed in range(3)}
    assert {cell.given["annotation"] for cell in models.cells if "annotation" in cell.given} == {"truth"}
    channels = read_grid(ROOT / "nbs" / "experiments" / "foil_channels.yaml")
    assert {cell.experiment for cell in channels.cells} == {"foil_channels"}


def test_segmenter_counts_agree_with_its_class_map() -> None:
    """One network's claims are its class map, so that counts by claims and by confusion are the same."""
    regions = some_regions(5)
    segmenter = ImbalancedSegmenter("baseline", Schedule(), device="cpu")
    scores = np.random.default_rng(0).dirichlet(np.ones(3), (8, 9)).transpose(2, 0, 1)
    counts, called = count_claims(segmenter.claims(scores), regions.masks[0]), scores.argmax(0)
    for kind in (1, 2):
        assert counts.tp[kind - 1] == int(((called == kind) & (regions.masks[0] == kind)).sum())
