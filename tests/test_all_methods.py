"""One protocol: the same images for all methods, and ranks that agree with a library."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import friedmanchisquare

from defectbook.core import DataError, ParameterError
from defectbook.practice.all_methods import METHODS, SETS, compare_methods, method_rows, open_set, rank_table, score_table, sizes_of
from defectbook.practice.runs import RunStore

SMOKE = sizes_of("smoke")
CHEAP = ["AE", "PAEDID", "SSD"]


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith(("elpv", "pcb", "wood"))])
def test_every_set_opens_at_one_size_with_both_kinds_in_its_test(name: str) -> None:
    opened = open_set(name, SMOKE)
    assert {sample.image.shape for split in opened.splits.values() for sample in split[:2]} == {(64, 64, 3)}
    assert {min(sample.label, 1) for sample in opened.test} == {0, 1}
    assert not any(sample.label for sample in [*opened.train, *opened.validation])
    assert len(opened.train) <= 10 and len(opened.test) <= 20
    assert open_set(name, SMOKE).fingerprint() == opened.fingerprint()
    assert open_set(name, SMOKE, seed=1).fingerprint() != opened.fingerprint()


@pytest.mark.parametrize(("name", "error", "words"), [
    ("elpv", ParameterError, "has [0-9]+ categories; name one, such as elpv/"),
    ("pcb/boards", ParameterError, "neither category nor folder"),
    ("elpw/mono", DataError, "did you mean 'elpv'"),
])
def test_a_set_that_is_not_one_is_refused(name: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        open_set(name, SMOKE)


def test_unknown_names_are_refused_before_anything_is_fitted(tmp_path) -> None:
    with pytest.raises(ParameterError, match="unknown preset"):
        sizes_of("big")
    with pytest.raises(ParameterError, match="unknown method 'PaDiM'"):
        method_rows(["AE", "PaDiM"], open_set("wood_simulated_cracks", SMOKE), SMOKE, RunStore(tmp_path))


def test_a_subset_first_or_all_at_once_gives_the_same_runs(tmp_path, capsys) -> None:
    name = "wood_simulated_cracks"
    first = compare_methods("all_methods", name, RunStore(tmp_path / "a"), "smoke", methods=CHEAP[::-1])
    whole = compare_methods("all_methods", name, RunStore(tmp_path / "b"), "smoke", methods=CHEAP)
    assert {run.id for run in first} == {run.id for run in whole}
    for run in first:
        other = next(one for one in whole if one.id == run.id)
        pd.testing.assert_frame_equal(run.metrics, other.metrics, rtol=1e-5)
    assert not list((tmp_path / "a").glob(".fits/*/fitted")), "kept fits are removed when all rows are stored"
    data = {run.params["identity"]["data"] for run in whole}
    assert len(data) == 1, "all methods see the same images"


def test_every_method_runs(tmp_path, capsys) -> None:
    runs = compare_methods("all_methods", "elpv_simulated_cracks/mono", RunStore(tmp_path), "smoke")
    assert [run.params["parameters"]["method"] for run in runs] == list(METHODS)
    table = score_table(runs, "pixel_auroc")
    assert list(table.columns) == list(METHODS) and table.notna().all(axis=None)
    assert score_table(runs, "no such metric").empty


def test_the_table_takes_means_over_seeds(tmp_path, capsys) -> None:
    runs = [run for seed in (0, 1) for run in compare_methods("all_methods", "wood_simulated_cracks", RunStore(tmp_path), "smoke", seed, ["SSD"])]
    values = [run.value("image_auroc") for run in runs]
    assert score_table(runs, "image_auroc").loc["wood_simulated_cracks/grain", "SSD"] == pytest.approx(np.mean(values))


def test_ranks_agree_with_scipy_and_leave_incomplete_sets_out() -> None:
    rng = np.random.default_rng(3)
    scores = pd.DataFrame(rng.normal(size=(8, 4)) + [0.9, 0.4, 0.2, 0], columns=list("abcd"))
    ranking, names = rank_table(scores)
    expected = friedmanchisquare(*scores.to_numpy().T)
    assert names == list("abcd") and ranking.statistic == pytest.approx(expected.statistic) and ranking.p_value == pytest.approx(expected.pvalue)
    holed = pd.concat([scores, pd.DataFrame([[9, np.nan, 1, 2]], columns=list("abcd"))])
    np.testing.assert_array_equal(rank_table(holed)[0].ranks, ranking.ranks)
    with pytest.raises(DataError):
        rank_table(holed.iloc[-2:])
