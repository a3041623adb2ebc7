"""The guides: advice follows from numbers by its rule, the house is read as it is, and pages show what commands really say."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.practice.all_methods import METHODS
from defectbook.practice.guides import (
    GUIDES,
    Question,
    advise,
    cost_table,
    draw_tree,
    guide_to,
    rank_by_kind,
    tolerance_table,
    tree_lines,
    tree_markdown,
    undominated,
    word_table,
    worst_panel,
)
from defectbook.practice.house import arrows, draw_floors, draw_matrix, imported_names, importers, reachable, read_house, upward
from defectbook.practice.registry import DETECTORS
from defectbook.practice.runs import RunStore
from defectbook.practice.shown_commands import answer_to, inside_folder, typed

SCORES = pd.DataFrame({"best": [0.90, 0.80], "near": [0.895, 0.80], "far": [0.5, 0.99]}, index=["a", "b"])
COST = pd.Series({"best": 100.0, "near": 10.0, "far": 1.0})
values = st.floats(0, 1, width=32)


def test_the_cheapest_that_keeps_up_is_recommended() -> None:
    found = advise(SCORES, COST, within=0.01)
    assert (found.method, found.best, found.keep_up, found.sets) == ("near", "best", ("near", "best"), ("a", "b"))
    assert found.value == pytest.approx(0.8475) and found.best_value == pytest.approx(0.85)
    assert advise(SCORES, COST, within=0).method == "best"
    assert advise(SCORES, COST, within=1).method == "far"
    assert advise(SCORES, within=1).method == "best", "without a cost the best wins"


def test_nobody_below_the_floor() -> None:
    found = advise(SCORES, COST, least=0.86)
    assert found.method == "" and np.isnan(found.value) and found.best == "best"
    assert advise(SCORES, COST, least=0.85).method == "near", "the floor is for the best, not for the cheapest"


def test_sets_that_a_method_lacks_do_not_count() -> None:
    holes = SCORES.assign(far=[np.nan, 0.99])
    assert advise(holes, COST).sets == ("b",) and advise(holes, COST, within=0).method == "far"


@given(st.lists(st.tuples(values, values, st.floats(0.1, 100)), min_size=1, max_size=6), values)
def test_advice_holds_what_it_promises(rows, within) -> None:
    table = pd.DataFrame({f"m{i}": row[:2] for i, row in enumerate(rows)})
    cost = pd.Series({f"m{i}": row[2] for i, row in enumerate(rows)})
    found, means = advise(table, cost, within), table.mean()
    assert means[found.method] >= means.max() - within - 1e-9 and found.best_value == pytest.approx(means.max())
    assert cost[found.method] == cost[[name for name in means.index if means[name] >= means.max() - within - 1e-12]].min()


@pytest.mark.parametrize(("scores", "cost", "within", "error", "words"), [
    (SCORES.assign(far=np.nan), COST, 0.01, DataError, "no set on which all of best, near, far ran"),
    (SCORES.iloc[:, :0], None, 0.01, DataError, "no methods"),
    (SCORES, COST.drop("near"), 0.01, DataError, "near: has no cost"),
    (SCORES, COST, -0.1, ParameterError, "within=-0.1"),
    (SCORES, COST, float("nan"), ParameterError, "within=nan"),
])
def test_advice_refuses_by_one_line(scores, cost, within, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        advise(scores, cost, within)
    assert "\n" not in str(caught.value)


def test_ranks_and_tolerances() -> None:
    ranks = rank_by_kind(SCORES, {"one": ["a"], "none": ["z"]})
    assert list(ranks.columns) == ["all", "one"] and ranks.loc["far", "one"] == 3 and ranks.loc["best", "all"] == 1.75
    table = tolerance_table({"x": SCORES}, COST, (0.0, 1.0))
    assert list(table.loc["x"]) == ["best", "far"] and list(table.columns) == ["within 0", "within 1"]
    assert tolerance_table({"x": SCORES}, COST, (0.0,), least=0.99).loc["x", "within 0"] == "nobody"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_front_is_what_nobody_beats(points) -> None:
    cost, rank = (pd.Series(column, dtype=float) for column in zip(*points, strict=True))
    kept = undominated(cost, rank)
    assert kept and list(cost[kept]) == sorted(cost[kept])
    for one in cost.index:
        beaten = any(cost[o] <= cost[one] and rank[o] <= rank[one] and (cost[o], rank[o]) != (cost[one], rank[one]) for o in cost.index)
        assert (one in kept) != beaten


def test_every_method_of_the_comparison_has_a_guide() -> None:
    assert set(GUIDES) == set(METHODS)
    timed = set(RunStore(ROOT / "data" / "results").runs("latency")[0].metrics.method)
    for method, guide in GUIDES.items():
        assert guide.name in DETECTORS and guide.clocked in timed | {""} and guide.needs and guide.blind, method
    with pytest.raises(ParameterError, match="did you mean 'PatchCore'"):
        guide_to("Patchcore")


def test_costs_and_failures_come_from_runs() -> None:
    store = RunStore(ROOT / "data" / "results")
    runs = [run for run in store.runs("all_methods") if run.params["parameters"]["method"] in ("RPCA", "SSIM AE")]
    table = cost_table(runs, store.runs("latency")[0])
    assert set(table.index) == {"RPCA", "SSIM AE"} and (table[["fit", "ms"]] > 0).all().all()
    assert table.loc["RPCA", "alone"] > 0 and np.isnan(table.loc["SSIM AE", "alone"]), "SSIM AE was not timed alone"
    assert np.isnan(cost_table(runs).alone).all()
    run, panel = worst_panel(runs)
    assert panel.choice == "miss" and run.value("image_auroc") == min(other.value("image_auroc") for other in runs if other.panels("miss"))
    assert worst_panel([]) is None


TREE = Question("Masks?", {"yes": "U-Net\nDice 0.5", "no": Question("Alike?", {"yes": "PatchCore", "no": "nobody"})})


def test_a_tree_has_three_forms() -> None:
    lines = tree_lines(TREE)
    assert lines[0] == (0, "question", "Masks?") and (2, "leaf", "U-Net\nDice 0.5") in lines and lines[-1] == (4, "leaf", "nobody")
    assert tree_markdown(TREE).splitlines() == ["- **Masks?**", "  - yes: U-Net, Dice 0.5", "  - no", "    - **Alike?**", "      - yes: PatchCore",
                                                "      - no: nobody"]
    figure = draw_tree(TREE)
    assert len(figure.axes[0].texts) == len(lines)
    with pytest.raises(ParameterError, match="has no answers"):
        tree_lines(Question("Why?"))


def test_words_are_escaped() -> None:
    page = word_table(pd.DataFrame({"a<b": ["<script>"], "link": ["<a>"]}), raw=["link"])
    assert "<script>" not in page and "&lt;script&gt;" in page and "<a>" in page and "a&lt;b" in page


def test_commands_are_shown_as_typed(tmp_path, capsys) -> None:
    said = typed("defectbook fit ssd nowhere --out m", tmp_path, expected=2)
    assert capsys.readouterr().out == f"$ defectbook fit ssd nowhere --out m\n{said}(exit status 2)\n\n" and str(tmp_path) not in said
    assert "--out" in typed("defectbook predict --help", tmp_path)
    with pytest.raises(AssertionError, match="exit status 2, expected 0"):
        typed("defectbook fit ssd nowhere --out m", tmp_path)
    with pytest.raises(ParameterError, match="only commands of defectbook"):
        typed("rm -rf good", tmp_path)


def test_the_folder_comes_back_after_an_error(tmp_path) -> None:
    before = Path.cwd()
    with pytest.raises(ValueError), inside_folder(tmp_path):
        raise ValueError
    assert Path.cwd() == before


def test_an_answer_must_be_an_error_of_ours() -> None:
    def fail(error):
        raise error

    assert answer_to(lambda: fail(DataError("/x/y/photo.png: gone")), "/x/y") == "DataError: photo.png: gone"
    with pytest.raises(AssertionError, match="succeeded"):
        answer_to(lambda: None)
    with pytest.raises(KeyError):
        answer_to(lambda: fail(KeyError("not ours")))


@pytest.fixture
def small_house(tmp_path):
    """A house of five modules, one of which looks up."""
    package = tmp_path / "defectbook"
    files = {"core": ("00_core", "import numpy"), "data/early": ("data/10_early", "from ..core import x"),
             "data/late": ("data/11_late", "from .early import x\nfrom defectbook.core import x"),
             "data/wrong": ("data/09_wrong", "def f():\n    from ..models.net import x\n    from .late import x"),
             "models/net": ("models/30_net", "from defectbook.data import late")}
    for name, (chapter, code) in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(f"# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/{chapter}.ipynb.\n\n{code}\n")
    return package


def test_a_house_is_read_as_it_is(small_house) -> None:
    house = read_house(small_house)
    assert list(house.index) == ["core", "data.wrong", "data.early", "data.late", "models.net"], "by floor, then by chapter"
    assert house.loc["models.net", "imports"] == ("data.late",) and house.loc["core", "outside"] == ("numpy",)
    assert house.loc["data.wrong", "lines"] == 3
    assert upward(house) == [("data.wrong", "data.late"), ("data.wrong", "models.net")]
    assert importers(house)["core"] == 2 and reachable(house, ["models.net"]) == {"models.net", "data.late", "data.early", "core"}
    assert len(arrows(house)) == 6
    assert len(draw_matrix(house).axes[0].lines[0].get_xdata()) == 6 and draw_floors(house).axes


def test_a_house_with_a_stray_room_is_refused(small_house) -> None:
    (small_house / "attic.py").write_text("# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/attic.ipynb.\n")
    with pytest.raises(DataError, match="attic.py: belongs to no floor"):
        read_house(small_house)
    (small_house / "attic.py").write_text("def (:")
    with pytest.raises(DataError, match="is no Python module"):
        imported_names(small_house / "attic.py", small_house)


def test_our_house_has_no_arrow_upward() -> None:
    house = read_house()
    assert len(house) > 90 and upward(house) == []


def test_guides_and_contributors_pages_are_in_the_book() -> None:
    parts = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"][1:]
    listed = {chapter for part in parts for chapter in part["chapters"]}
    for folder in ("guide", "contribute"):
        assert {f"nbs/{folder}/{path.name}" for path in (ROOT / "nbs" / folder).glob("*.ipynb")} <= listed


@pytest.mark.parametrize("name", ["90_which_method", "94_platforms"])
def test_figures_are_not_typed(name: str) -> None:
    """No prose of these pages states a result: a number with a decimal point must come from a cell (rules and names may have one)."""
    import nbformat

    allowed = {"90_which_method": {"0.01", "0.75", "0.9", "0.85"}, "94_platforms": {"3.11"}}[name]
    for cell in nbformat.read(ROOT / "nbs" / "guide" / f"{name}.ipynb", 4).cells:
        if cell.cell_type == "markdown":
            found = set(re.findall(r"\b\d+\.\d+\b", re.sub(r"CC BY-NC-SA 4\.0|`[^`]*`|\([^)]*\)", "", cell.source)))
            assert found <= allowed, textwrap.shorten(cell.source, 200)
