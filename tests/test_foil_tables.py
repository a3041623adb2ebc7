"""FOIL's tables: rates agree with counting by hand, printed ones are the paper's, a half-filled store is no obstacle."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, StoreError
from defectbook.metrics.pixel import Counts
from defectbook.practice import foil_tables as tables
from defectbook.practice.foil_rows import region_panel, run_foil
from defectbook.practice.runs import RunStore, StoredRun


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    found = RunStore(tmp_path_factory.mktemp("store"))
    for model, seed in (("wce_icf", 0), ("baseline", 0), ("baseline", 1)):
        run_foil("foil_models", model, found, preset="smoke", seed=seed, device="cpu")
    return found


@pytest.fixture(scope="module")
def runs(store: RunStore) -> dict[str, list[StoredRun]]:
    return tables.foil_runs(store, preset="smoke")


def test_models_come_in_the_order_of_the_registry_and_trainings_by_seed(store: RunStore, runs: dict) -> None:
    assert list(runs) == ["baseline", "wce_icf"]
    assert [run.params["parameters"]["seed"] for run in runs["baseline"]] == [0, 1]
    assert tables.foil_runs(store) == {} and tables.foil_runs(store, preset="smoke", annotation="truth") == {}
    assert list(tables.foil_runs(store, preset="smoke", by="reading")) == ["normals"]
    assert list(tables.foil_runs(store, preset="smoke", model="wce_icf")) == ["wce_icf"]


def test_rates_are_those_of_the_stored_figures(runs: dict) -> None:
    for reference, prefix in (("annotation", ""), ("truth", "truth_")):
        rates = tables.rate_table(runs, reference)
        for model, found in runs.items():
            for metric in ("tpr", "fpr", "precision"):
                rows = pd.concat([run.metrics for run in found])
                stored = rows[rows.metric == prefix + metric].groupby("category")["value"]
                for kind in (*tables.DEFECTS, "mean"):
                    values = stored.get_group(kind).to_numpy()
                    assert rates.loc[model, (metric, kind)] == pytest.approx(np.mean(values), nan_ok=True)


def test_counts_are_read_back_in_order(runs: dict) -> None:
    run = runs["baseline"][0]
    counts, rows = tables.read_counts(run, "truth"), run.table("regions").query("reference == 'truth'")
    assert counts.tp.shape == (4, 4) and counts.fn[2, 3] == rows[rows["class"] == "blade trail"].fn.iloc[2]
    both = tables.region_counts(runs["baseline"])
    assert (both.tn == sum(tables.read_counts(one).tn for one in runs["baseline"])).all()
    with pytest.raises(ParameterError, match="annotation"):
        tables.read_counts(run, "anotation")
    with pytest.raises(StoreError, match="'nothing'"):
        tables.read_counts(run, table="nothing")


def test_printed_rates_are_table_a2() -> None:
    printed = tables.printed_rates()
    assert printed.shape == (13, 15) and printed.index[0] == "baseline"
    assert printed.loc["wce_icf", ("tpr", "cavity")] == 0.8869 and printed.loc["equal_pixels", ("precision", "blade trail")] == 0.9167
    change = tables.changes(printed)
    assert change.loc["wce_icf", ("tpr", "cavity")] == pytest.approx(0.8869 - 0.3656) and "baseline" not in change.index
    assert tables.printed_stability().loc["binary", "psoi_tpr"] == 0.068
    with pytest.raises(ParameterError, match="baseline"):
        tables.changes(printed.drop(index="baseline"))


def test_a_model_differs_from_itself_by_nothing(runs: dict) -> None:
    same = tables.compare_models(runs["baseline"], runs["baseline"], "fpr", "mean", resamples=100)
    assert same.difference == same.low == same.high == 0
    other = tables.compare_models(runs["wce_icf"], runs["baseline"], "fpr", "crack", "truth", resamples=100)
    rates = tables.rate_table(runs, "truth")
    pooled = tables.region_counts(runs["baseline"], "truth").sum(0).fpr()[1]
    assert other.difference == pytest.approx(rates.loc["wce_icf", ("fpr", "crack")] - pooled)
    for ask in (lambda: tables.compare_models(runs["baseline"], runs["baseline"], "fpr", "crak"), lambda: tables.heart_table(runs, "fpr", "crak"),
                lambda: tables.agreement_interval(runs, "fpr", "crak")):
        with pytest.raises(ParameterError, match="did you mean 'crack'"):
            ask()
    with pytest.raises(ParameterError, match="dice"):
        tables.compare_models(runs["baseline"], runs["baseline"], "dise")


def test_a_class_that_is_never_called_has_no_interval_of_precision(runs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Counts(*(np.array(column) for column in ([[0, 3, 3, 3]] * 5, [[0, 1, 1, 1]] * 5, [[4, 1, 1, 1]] * 5, [[9, 9, 9, 9]] * 5)))
    monkeypatch.setattr(tables, "read_counts", lambda run, *args, **kwargs: silent)
    with pytest.raises(DataError, match="NaN"):
        tables.compare_models(runs["baseline"], runs["wce_icf"], "precision", "agglomeration", resamples=100)
    rates = tables.rate_table(runs)
    assert np.isnan(rates.loc["baseline", ("precision", "agglomeration")]) and rates.loc["baseline", ("precision", "mean")] == 0.75
    assert rates.loc["baseline", ("dice", "agglomeration")] == 0


def test_stability_needs_two_trainings(runs: dict) -> None:
    found = tables.stability_table(runs)
    assert found.loc["wce_icf", "trainings"] == 1 and np.isnan(found.loc["wce_icf", "psomt_tpr"])
    for metric in ("tpr", "fpr", "precision"):
        rows = pd.concat([run.metrics for run in runs["baseline"]])
        means = rows[(rows.metric == metric) & (rows.category == "mean")].value.to_numpy()
        assert len(means) == 2 and found.loc["baseline", f"psomt_{metric}"] == pytest.approx(np.std(means, ddof=1), nan_ok=True), metric
    assert found.loc["baseline", "psomt_fpr"] >= 0


def test_disputed_shares_are_counted_from_the_pixels(runs: dict) -> None:
    found = tables.disputed_table(runs).set_index(["model", "class"])
    for model, kind in found.index:
        cells = pd.concat([run.table("agreement") for run in runs[model]]).query("`class` == @kind")
        alarms = cells[cells.called & ~cells.annotated]
        real = alarms[alarms["true"]].pixels.sum() / alarms.pixels.sum() if alarms.pixels.sum() else float("nan")
        assert found.loc[(model, kind), "real"] == pytest.approx(real, nan_ok=True)


def test_by_heart_is_the_gap(runs: dict) -> None:
    found = tables.heart_table(runs, "tpr", "crack")
    fitted = np.mean([tables.read_counts(run, table="fitted").sum(0).tpr()[1] for run in runs["baseline"]])
    assert found.loc["baseline", "fitted"] == pytest.approx(fitted) and (found.repeats >= 1).all()


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_swapped_pairs_are_those_of_a_double_loop(values: list[tuple[int, int]]) -> None:
    first, second = (pd.Series(column) for column in zip(*values, strict=True))
    swapped = sum((first[i] - first[j]) * (second[i] - second[j]) < 0 for i in range(len(values)) for j in range(i))
    tau, found, share = tables.rank_agreement(first, second)
    assert found == swapped and share == swapped / (len(values) * (len(values) - 1) / 2)
    assert np.isnan(tau) or -1 <= tau <= 1
    with pytest.raises(ParameterError, match="order"):
        tables.rank_agreement(first[:1], second[:1])


@pytest.mark.parametrize("side", [(30, 90), (275, 832), (448, 448)])
def test_panels_come_apart_again(side: tuple[int, int], tmp_path: Path) -> None:
    pictures = [np.full((*side, 3), shade, np.uint8) for shade in (0, 60, 120, 180)]
    parts = tables.panel_parts(region_panel(pictures))
    assert [np.unique(part).tolist() for part in parts.values()] == [[0], [60], [120], [180]]
    assert len({part.shape for part in parts.values()}) == 1
