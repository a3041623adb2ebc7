"""Dice tables: intervals against the bootstrap itself, pairs of runs, the paper's printed figures, panels with words of ours."""

import numpy as np
import pandas as pd
import pytest

from defectbook.core import ParameterError
from defectbook.metrics.published import published
from defectbook.practice.dice_tables import compare_dice, image_dice, percent_interval, printed_dice, side_by_side
from defectbook.practice.panels import Panel


class Run:
    """What the tables ask of a stored run."""

    def __init__(self, dice: list[float] | None):
        self.dice = dice

    def table(self, name: str) -> pd.DataFrame | None:
        assert name == "images"
        return None if self.dice is None else pd.DataFrame({"name": range(len(self.dice)), "dice": self.dice})


def test_the_interval_holds_the_mean_and_shrinks_with_more_images() -> None:
    values = np.random.default_rng(0).beta(4, 3, 200)
    low, high = (float(part) for part in percent_interval(values).strip("[]").split(","))
    assert low < 100 * values.mean() < high and high - low == pytest.approx(2 * 1.96 * 100 * values.std() / 200**0.5, rel=0.2)
    fewer = percent_interval(values[:20]).strip("[]").split(",")
    assert float(fewer[1]) - float(fewer[0]) > 2 * (high - low)


def test_one_value_has_no_interval() -> None:
    assert percent_interval([0.5]) == percent_interval([0.25, 0.25, 0.25]) == "-"


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 1, 60)
    worse, better = Run(list(0.9 * hard)), Run(list(0.9 * hard + 0.03 + 0.01 * rng.random(60)))
    found = compare_dice(better, worse)
    assert 0.03 < found.low < found.difference < found.high < 0.04
    assert compare_dice(worse, better).difference == pytest.approx(-found.difference)
    assert image_dice(Run(None)) is None and image_dice(worse).dtype == np.float64


def test_printed_figures_are_those_of_the_published_table() -> None:
    assert printed_dice("1", "Product 1")["PAEDID"] != printed_dice("1", "Product 2")["PAEDID"]
    cells = published("PAEDID", "2")
    assert printed_dice("2").to_dict() == dict(zip(cells.row, cells.number, strict=True))
    assert printed_dice("1", "Product 1").between(0, 100).all() and len(printed_dice("1", "Product 1")) >= 5


def test_panels_stand_below_one_another_under_the_words_given() -> None:
    panel = Panel(np.full((8, 26, 3), 90, np.uint8), "cell 1", "crack", "middle", 0.3, 0.2)
    figure = side_by_side({"PAE": panel, "PAEDID": panel}, ["image", "truth", "map"])
    words = [axis.texts[0].get_text() for axis in figure.axes if axis.texts]
    assert words == ["PAE", "PAEDID"]
    with pytest.raises(ParameterError):
        side_by_side({}, ["image"])
