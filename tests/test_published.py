"""The published tables as data: complete, as printed, and consistent with each other but for the known misprints."""

import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.metrics.published import COLUMNS, PAPERS, printed_number, printed_range, published
from defectbook.metrics.recomputed import Check, misprints, recomputations, recomputed_range

# paper, table: number of cells, lost cells, and the sum of all its numbers (ratios and ticks left out). Any slip of a digit moves the sum.
# The sums of the numbered tables were taken from the papers' texts by another route than the files: every number between a table's first
# and last line, whatever its column. (B1's and B2's texts hold 36 and 2 more: the repeated cells of conv10, and a stray 2 in the totals.)
TABLES = {
    ("ADAPT", "1"): (162, 9, "6887.05"),
    ("ADAPT", "2"): (162, 9, "4785.238"),
    ("ADAPT", "3"): (90, 9, "668.053"),
    ("ADAPT", "4"): (84, 0, "1102.237"),
    ("ADAPT", "cost"): (7, 0, "1212.66"),
    ("ADAPT", "text"): (14, 0, "307.381"),
    ("FOIL", "3.1"): (6, 0, "67091958"),
    ("FOIL", "3.2"): (11, 0, "0"),
    ("FOIL", "3.3"): (11, 0, "97084566"),
    ("FOIL", "3.4"): (11, 0, "104164531"),
    ("FOIL", "3.5"): (11, 0, "88553223"),
    ("FOIL", "3.6"): (10, 0, "10.003"),
    ("FOIL", "3.7"): (8, 0, "4"),
    ("FOIL", "4.1"): (48, 0, "0.5023"),
    ("FOIL", "A1"): (312, 0, "3289060400"),
    ("FOIL", "A2"): (195, 0, "84.4997"),
    ("FOIL", "B1"): (314, 8, "35784399.41"),
    ("FOIL", "B2"): (315, 0, "90841272.13"),
    ("FOIL", "text"): (19, 0, "17650.0296"),
    ("PAEDID", "1"): (10, 0, "668.4"),
    ("PAEDID", "2"): (6, 0, "152.6"),
    ("PAEDID", "text"): (20, 0, "8587.6"),
    ("PNI", "1"): (288, 30, "25010.23"),
    ("PNI", "2"): (86, 0, "8191.33"),
    ("PNI", "4"): (15, 0, "1463.24"),
    ("PNI", "3"): (36, 0, "3124.69"),
    ("PNI", "5"): (20, 0, "1868.7"),
    ("PNI", "6"): (16, 0, "1502.4"),
    ("PNI", "text"): (31, 0, "39005.12"),
    ("PROS", "1"): (12, 2, "20522"),
    ("PROS", "2"): (32, 0, "904.81"),
    ("PROS", "3"): (12, 0, "225.37"),
    ("PROS", "text"): (6, 0, "10566.07"),
}

# Every printed figure that contradicts its own inputs: paper, table, row, column, category, printed, and a value from its inputs.
MISPRINTS = [
    ("ADAPT", "1", "HQ-SAM", "FR", "", "3646", "at most 48.3: a missing point"),
    ("FOIL", "3.2", "Blade trail", "Background", "blade_trail", "1:82", 61_341_642 / 752_734),
    ("FOIL", "3.6", "ICF", "Cavity", "cavity", "4.355", 4.3521),
    ("FOIL", "3.7", "Positive", "Cavity", "cavity", "0.915", 0.976),
    ("FOIL", "3.7", "Negative", "Cavity", "cavity", "0.085", 0.0241),
    ("FOIL", "3.7", "Positive", "Crack", "crack", "0.976", 0.915),
    ("FOIL", "3.7", "Negative", "Crack", "crack", "0.024", 0.085),
    ("FOIL", "A1", "wCE ICF", "FP", "crack", "22,574", 31_347_942 - 31_115_368),
    ("FOIL", "A2", "Eq. Pixels", "Mean TPR", "mean", "0.2958", (0.2604 + 0.4285 + 0.4078 + 0.0836) / 4),
    ("FOIL", "text", "FL ISCF against Baseline", "relative TPR gain", "", "47", 100 * (0.7823 / 0.5341 - 1)),
    ("FOIL", "B1", "input", "Flops (M)", "", "108", 0),
    ("FOIL", "B1", "conv1", "Flops (M)", "", "1152", 108),
    ("FOIL", "B1", "Totals", "Flops (M)", "total", "1756675", 17586.75),
    ("FOIL", "B2", "input", "Flops (M)", "", "108", 0),
    ("FOIL", "B2", "conv1", "Flops (M)", "", "1152", 108),
    ("FOIL", "B2", "conv10", "Stride", "", "2", 1),
    ("FOIL", "B2", "conv10", "Padding", "", "0", 1),
    ("FOIL", "B2", "conv10", "#Params", "", "2353808", 512 * 512 * 9 + 512),
    ("FOIL", "B2", "up1", "Padding", "", "1", 0),
    ("FOIL", "B2", "pool4", "Skip Connections (MB)", "", "32", 0),
    ("FOIL", "B2", "Totals", "#Params", "total", "63280482", 6_281_349 - (9 * 32 + 1) * 3),
    ("PAEDID", "text", "MemAE", "Product 1", "product_1", "73.6", 66.1),
    ("PNI", "2", "CFLOW-AD", "AUROC Pixel", "average", "98.62", 97.87),
    ("PNI", "3", "none", "P-F1-max Avg.", "average", "57.08", (10 * 60.06 + 5 * 49.92) / 15),
]


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    return pd.concat([published(paper) for paper in PAPERS], ignore_index=True)


@pytest.fixture(scope="module")
def checks() -> pd.DataFrame:
    return recomputations()


def test_every_table_is_there(everything):
    assert set(zip(everything["paper"], everything["table"], strict=True)) == set(TABLES)


@pytest.mark.parametrize("paper, table", TABLES)
def test_cells_and_sum_of_a_table(paper, table):
    frame = published(paper, table)
    cells, lost, total = TABLES[paper, table]
    printed = [text for text in frame["value"] if ":" not in text and not math.isnan(printed_number(text))]
    numbers = [Fraction(text.replace(",", "").rstrip("*")) for text in printed]
    assert (len(frame), int((frame["status"] == "lost_in_text").sum()), sum(numbers)) == (cells, lost, Fraction(total))


def test_long_form(everything):
    assert tuple(everything.columns[:-1]) == COLUMNS
    assert set(everything["status"]) == {"", "lost_in_text", "misprint"}
    assert not everything.duplicated(list(COLUMNS[:7])).any()
    assert ((everything["value"] == "") == (everything["status"] == "lost_in_text")).all()
    assert (everything[["paper", "table", "row", "metric"]] != "").all().all()
    assert not any(text != text.strip() for name in COLUMNS for text in everything[name])


def test_metric_names_are_the_books(everything):
    assert {"image_auroc", "pixel_auroc", "aupro", "pixel_f1_max", "dice", "dice_oracle", "miou", "noc20@85", "fr20@85", "noc30@90",
            "fr30@90", "tpr", "fpr", "precision"} <= set(everything["metric"])


def test_marked_misprints_are_the_known_ones(everything):
    marked = everything[everything["status"] == "misprint"]
    names = ["paper", "table", "row", "column", "category", "value"]
    assert sorted(map(tuple, marked[names].values)) == sorted(entry[:6] for entry in MISPRINTS)


def test_failing_checks_are_the_known_misprints(checks):
    wrong = misprints()
    names = ["paper", "table", "row", "column", "category", "printed"]
    assert sorted(map(tuple, wrong[names].values)) == sorted(entry[:6] for entry in MISPRINTS)
    assert set(wrong.index) and len(wrong) == len(checks.loc[~checks["follows"]].drop_duplicates(names + ["dataset"]))


@pytest.mark.parametrize("entry", [entry for entry in MISPRINTS if not isinstance(entry[6], str)], ids=lambda entry: "-".join(entry[:4]))
def test_misprint_by_hand(entry, checks):
    """The value from a misprint's inputs, worked out here by hand, lies in the recomputed range and not in the printed one."""
    *where, printed, value = entry
    rows = checks[(checks[["paper", "table", "row", "column", "category"]] == where).all(axis=1) & ~checks["follows"]]
    assert len(rows) == 1
    if ":" in printed:
        assert round(value) != int(printed.split(":")[1])
    else:
        low, high = printed_range(printed)
        assert not low <= value <= high
        assert rows["low"].item() - 2e-3 * value <= value <= rows["high"].item() + 2e-3 * value


def test_checks_reach_every_computable_table(checks):
    reached = set(zip(checks["paper"], checks["table"], strict=True))
    unreachable = {("PROS", "1"), ("PROS", "2"), ("PAEDID", "1"), ("PAEDID", "2"), ("ADAPT", "cost"), ("FOIL", "4.1")}
    assert reached == set(TABLES) - unreachable
    assert len(checks) == 1511


def _column(frame: pd.DataFrame, **where: str) -> pd.Series:
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame.set_index("row")["number"]


def test_pni_total_is_the_mean_of_its_rows():
    frame = published("PNI", "1").query("column == 'FastFlow' and metric == 'image_auroc'")
    rows = frame[~frame["row"].str.endswith("Average")]["number"]
    assert len(rows) == 15 and round(rows.mean(), 1) == frame.query("row == 'Average'")["number"].item() == 99.4


def test_pnis_own_column_is_lost_but_for_two_rows():
    frame = published("PNI", "1").query("column == 'PNI'")
    kept = frame[(frame["value"] != "") & ~frame["row"].str.endswith("Average")]
    assert dict(zip(kept["row"] + " " + kept["metric"], kept["value"], strict=True)) == {
        "Object / Bottle image_auroc": "100", "Object / Bottle pixel_auroc": "98.87",
        "Object / Cable image_auroc": "99.76", "Object / Cable pixel_auroc": "99.10"}


def test_foil_rates_follow_from_counts():
    counts = published("FOIL", "A1").pivot(index=["row", "category"], columns="column", values="number")
    assert ((counts["P"] - counts["TP"]) == counts["FN"]).all()
    off = counts[(counts["N"] - counts["TN"]) != counts["FP"]]
    assert off.index.tolist() == [("wCE ICF", "crack")] and off["FP"].item() == 22_574
    assert (counts["N"] - counts["TN"])["wCE ICF", "crack"] == 232_574
    rates = published("FOIL", "A2").query("category != 'mean'").pivot(index=["row", "category"], columns="column", values="number")
    assert np.abs(counts["TP"] / counts["P"] - rates["TPR"]).max() <= 5.0001e-5
    assert np.abs(1 - counts["TN"] / counts["N"] - rates["FPR"]).max() <= 5.0001e-5


def test_foil_precision_does_not_follow_from_counts():
    """Not a misprint but another average: nearly no printed precision is TP / (TP + FP) of the totals."""
    counts = published("FOIL", "A1").pivot(index=["row", "category"], columns="column", values="number")
    rates = published("FOIL", "A2").query("category != 'mean'").pivot(index=["row", "category"], columns="column", values="number")
    positives = counts["TP"] + (counts["N"] - counts["TN"])
    off = np.abs(counts["TP"] / positives - rates["Precision"]) > 1e-4
    assert off.sum() >= 50 and off["Baseline", "agglomeration"]
    assert round(485_695 / 706_671, 3) == 0.687


def test_foil_weights_divide_by_the_sum_and_multiply_by_the_classes():
    pixels = _column(published("FOIL", "3.1"), column="Background")["Pixels"]
    assert pixels == 61_341_642
    counts = published("FOIL", "3.1").query("category != 'defects'")["number"].to_numpy()
    printed = published("FOIL", "3.6").query("row == 'ISCF'")["number"].to_numpy()
    frequency = 1 / np.sqrt(counts)
    assert np.abs(5 * frequency / frequency.sum() - printed).max() < 5.1e-4
    assert np.abs(frequency / (frequency.sum() * 5) - printed).max() > 2.8  # eq. 3.5 as typeset


def test_adapt_rows_keep_their_order_across_tables():
    """Configurations are matched by order; Tables 1 and 2 rank them alike, which a shifted row would break."""
    noc = [published("ADAPT", table).query("column == 'NoC'").pivot(index="dataset", columns="row", values="number") for table in "12"]
    easy, hard = (frame.rank(axis=1).mean() for frame in noc)
    assert easy.corr(hard, method="spearman") > 0.8


def test_known_cells_by_eye():
    """Cells picked at random and read off the papers' texts by a person, one or more a table."""
    cells = {("PROS", "2", "Siamese UNet Diff / N/A / Cross Entropy", "Mean IOU"): "39.15", ("PROS", "3", "Mean IOU", "K=4"): "42.7",
             ("PROS", "3", "# of Param. (M)", "K=9"): "2.86", ("PNI", "2", "DRAEM", "AUROC Image"): "98.0",
             ("PNI", "2", "Uniformed Students", "AUPRO Texture"): "92.7", ("PNI", "4", "Trained by focal loss", "AUPRO Texture"): "96.11",
             ("PNI", "3", "NP", "P-F1-max Texture"): "58.43", ("PNI", "5", "2", "P-SVDD"): "92.7",
             ("PNI", "6", "SPD", "I-AUROC Multiple instances"): "78.4", ("PAEDID", "1", "MemAE", "Product 2"): "73.8",
             ("PAEDID", "2", "RASL", "Manually annotated defect (Dice coefficient)"): "26.7",
             ("FOIL", "4.1", "Binary", "PSoI TPR SD"): "0.068*", ("FOIL", "4.1", "Focal Loss", "PSoMT TPR SD"): "0.043",
             ("FOIL", "3.5", "Samples", "Cavity"): "1303", ("FOIL", "B1", "pool4", "Flops (M)"): "0.25",
             ("FOIL", "B2", "out", "#Params"): "578"}
    for (paper, table, row, column), value in cells.items():
        frame = published(paper, table)
        assert frame[(frame["row"] == row) & (frame["column"] == column)]["value"].tolist() == [value], (paper, table, row, column)
    adapt = published("ADAPT", "3").query("row == 'E' and dataset == 'GlaS'")
    assert adapt["value"].tolist() == ["8.437", "20.65"]
    pni = published("PNI", "1").query("row == 'Texture / Grid' and column == 'CFLOW-AD'")
    assert pni["value"].tolist() == ["99.60", "96.89"]


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ParameterError, match="did you mean 'PROS'"):
        published("PROSE")
    with pytest.raises(ParameterError, match="table of FOIL 'A3'.*A1, A2"):
        published("FOIL", "A3")


def test_a_reader_cannot_spoil_the_tables_for_the_next():
    frame = published("PROS")
    frame["value"] = "0"
    assert published("PROS", "3")["value"].iloc[0] == "3.76"


@given(st.decimals(-10**6, 10**6, places=3), st.integers(0, 3))
def test_printed_range_holds_the_number_it_was_rounded_from(exact, places):
    text = f"{round(exact, places):.{places}f}"
    low, high = printed_range(text)
    assert low - 1e-6 <= float(exact) <= high + 1e-6
    assert high - low == pytest.approx(10.0 ** -places, rel=1e-6)


@given(st.lists(st.decimals(0, 100, places=4), min_size=1, max_size=12), st.integers(0, 2))
def test_an_honestly_rounded_mean_always_follows(exact, places):
    inputs = [f"{value:.{places}f}" for value in exact]
    printed = f"{sum(exact) / len(exact):.{places}f}"
    low, high = recomputed_range(lambda *values: sum(values) / len(values), inputs)
    assert Check("", "", "", "", "", "", "", printed, low, high, "").follows


def test_recomputed_range_falls_and_rises():
    low, high = recomputed_range(lambda new, old: 1 - new / old, ["1.0", "2.0"])
    assert (low, high) == pytest.approx((1 - 1.05 / 1.95, 1 - 0.95 / 2.05))
    assert recomputed_range(lambda a, b: a + b, [2.0, 3.0]) == (5.0, 5.0)


@pytest.mark.parametrize("text", ["", "✓", "R", "No", "1:0"])
def test_words_have_no_range(text):
    assert math.isnan(printed_number(text))
    with pytest.raises(DataError, match="prints no number"):
        printed_range(text)
