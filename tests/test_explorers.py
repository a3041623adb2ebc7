"""Explorers: numbers that equal numpy's, bad input by name, pages without a network, and in Chromium by keyboard, pointer and without scripts."""

import base64
import io
import json
import re
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from browser import open_browser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from defectbook.core import ParameterError
from defectbook.metrics.curves import score_histograms
from defectbook.metrics.pixel import Counts, Curve, auroc, count_at, rank_pixels, roc_curve
from defectbook.metrics.region import pro_curve, rank_regions
from defectbook.practice.curve_explorers import area_within, budget_points, curve_explorer, histogram_curve
from defectbook.practice.explorers import count_steps, explorer_head, mask_url, picture_url, rim_of, slide_explorer, threshold_explorer, tile_of, told
from defectbook.practice.step_explorers import PlayedSession, click_player, play_again, step_explorer

GREY = np.full((6, 8), 90, np.uint8)
WORDS = {"alt": "a grey plate", "caption": "A plate."}


def a_map(seed: int, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def data_of(page: str) -> dict:
    """What an explorer's page holds for JavaScript."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def pixels_of(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))


# -- numbers ----------------------------------------------------------------------------------------------------------------------
def same_counts(steps, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
    for k, threshold in enumerate(steps.thresholds):
        exact = count_at([anomaly_map], [mask], threshold)
        assert np.array_equal(steps.levels > k, anomaly_map >= threshold)
        for name in ("tp", "fp", "fn", "tn"):
            assert getattr(steps.counts, name)[k] == getattr(exact, name)[0, 0]


AWKWARD = {
    "constant": (np.full((5, 4), 0.3, np.float32), np.eye(5, 4)),
    "zero": (np.zeros((3, 3), np.float32), np.eye(3)),
    "empty mask": (a_map(0), np.zeros((6, 8))),
    "full mask": (a_map(1), np.ones((6, 8))),
    "ties": (np.round(a_map(2)), a_map(3) > 0.5),
    "one pixel": (np.array([[0.7]], np.float32), np.array([[1]])),
    "one bad pixel of one": (np.array([[0.7]], np.float32), np.array([[0]])),
    "double": (a_map(4).astype(np.float64) * 1e-12 + 1, a_map(5) > 0),
    "bytes": (np.arange(48, dtype=np.uint8).reshape(6, 8), a_map(5) > 0),
    "huge": (a_map(6) * np.float32(1e38), a_map(7) > 0),
    "tiny": (a_map(8) * np.float32(1e-42), a_map(7) > 0),
    "glaring": (np.where(np.arange(48).reshape(6, 8) == 7, 1e9, a_map(9)).astype(np.float32), a_map(7) > 0),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("threshold", [0.0, 0.3, -5.0, 5.0])
def test_counts_at_each_step_are_those_of_the_raw_map(name: str, threshold: float) -> None:
    anomaly_map, mask = AWKWARD[name]
    steps = count_steps(anomaly_map, mask, threshold)
    values = anomaly_map.astype(np.float32) if anomaly_map.dtype.kind != "f" else anomaly_map
    same_counts(steps, values, mask)
    assert len(steps.thresholds) <= 255 and steps.levels.dtype == np.uint8 and (np.diff(steps.thresholds) > 0).all()
    assert steps.thresholds.dtype.type(threshold) in steps.thresholds, "the run's own threshold is one of the steps"
    assert steps.counts.tp[0] + steps.counts.fp[0] == mask.size and (steps.levels <= np.searchsorted(steps.thresholds, values.max(), "right")).all()
    assert (values < steps.thresholds[-1]).all(), "the last step calls nothing"
    page = threshold_explorer(np.full(mask.shape, 9, np.uint8), anomaly_map, mask, threshold, **WORDS)
    assert "NaN" not in page and "inf" not in re.sub(r"base64,[^\"]*", "", page)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(2, 253), st.floats(-3, 3))
def test_any_map_keeps_its_counts(seed: int, height: int, width: int, steps: int, threshold: float) -> None:
    anomaly_map = np.round(a_map(seed, (height, width)), seed % 4)
    mask = a_map(seed + 1, (height, width)) > seed % 3
    same_counts(count_steps(anomaly_map, mask, threshold, steps), anomaly_map, mask)


def test_the_page_holds_the_numbers_of_the_threshold() -> None:
    anomaly_map, mask = a_map(2, (12, 12)), a_map(3, (12, 12)) > 0.4
    page = threshold_explorer(np.zeros((12, 12, 3), np.uint8), anomaly_map, mask, 0.25, **WORDS)
    exact = count_at([anomaly_map], [mask], 0.25)
    for name, value in (("dice", exact.dice()), ("precision", exact.precision()), ("recall", exact.tpr()), ("iou", exact.iou())):
        assert re.search(f'data-say="{name}">([^<]*)<', page)[1] == told(float(value[0, 0]))
    data = data_of(page)
    assert data["thresholds"][data["start"]] == "0.25" and data["positives"] == mask.sum()
    marked = re.search(r'<tr aria-current="true"><th scope="row">([^<]*)</th><td>([^<]*)</td>', page)
    assert marked[1] == "0.25" and marked[2] == told(float(exact.dice()[0, 0])), "and the table has its row"
    levels = pixels_of(re.search(r'dbx-levels[^>]*src="([^"]*)"', page)[1])[..., 0]
    assert np.array_equal(levels > data["start"], anomaly_map >= np.float32(0.25)), "the picture carries the map without loss"


@given(st.integers(0, 4000), st.integers(1, 4000))
def test_ratios_are_rounded_as_a_browser_does(part: int, whole: int) -> None:
    from decimal import Decimal

    value = min(part, whole) / whole
    exact = Decimal(value)  # toFixed takes the nearest thousandth of the exact binary value, of two the larger
    below = exact // Decimal("0.001") * Decimal("0.001")
    nearest = below + (Decimal("0.001") if exact - below >= below + Decimal("0.001") - exact else 0)
    assert told(value) == f"{nearest:.3f}"


def test_masks_and_rims() -> None:
    mask = np.zeros((5, 7), bool)
    mask[1:4, 1:5] = True
    drawn = pixels_of(mask_url(mask, (230, 159, 0), 0.5))
    assert (drawn[mask] == (230, 159, 0, 128)).all() and (drawn[~mask][:, 3] == 0).all()
    assert rim_of(mask).sum() == 10 and not rim_of(mask)[2, 2:4].any() and rim_of(np.ones((3, 3), bool)).sum() == 8
    assert np.array_equal(pixels_of(picture_url(GREY, lossless=True))[..., 0], GREY)
    for bad in (GREY.astype(float), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 3), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ParameterError, match="expected uint8"):
            picture_url(bad)


def test_budgets_are_reached_by_real_thresholds() -> None:
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.normal(size=400), 1), rng.random(400) < 0.3  # many ties
    scores[labels] += 1
    curve = roc_curve(rank_pixels(scores, labels))
    found = budget_points(curve, 1.0)
    for budget, fpr, tpr, threshold in zip(*found, strict=True):
        assert fpr <= budget and fpr == np.mean(scores[~labels] >= threshold) and tpr == np.mean(scores[labels] >= threshold)
        better = [np.mean(scores[labels] >= t) for t in np.unique(scores) if np.mean(scores[~labels] >= t) <= budget]
        assert tpr == max(better, default=0.0), "no other threshold finds more within the budget"
    assert area_within(curve) == pytest.approx(auroc(scores, labels), abs=1e-12)
    maps, masks = [a_map(1, (20, 20)) + 2 * (a_map(2, (20, 20)) > 1)], [a_map(2, (20, 20)) > 1]
    ranking = rank_regions(maps, masks)
    for limit in (0.01, 0.3, 1.0):
        assert area_within(pro_curve(ranking, limit), limit) == pytest.approx(ranking.aupro(limit), abs=1e-12)


def test_histogram_curve_is_exact_at_its_edges() -> None:
    scores, labels = a_map(0, (1, 900)), a_map(1, (1, 900)) > 0.5
    made = score_histograms(scores, labels, 30)
    table = pd.DataFrame({"low": made.edges[:-1], "high": made.edges[1:], "normal": made.normal, "defective": made.defective})
    for x, y, threshold in zip(*histogram_curve(table), strict=True):
        called = scores.astype(np.float64) >= threshold
        assert x == np.mean(called[~labels]) and y == np.mean(called[labels])
    with pytest.raises(ParameterError, match="without defective, normal"):
        histogram_curve(table[["low"]])
    with pytest.raises(ParameterError, match="NaN"):
        curve_explorer({"one": histogram_curve(table.assign(defective=0))}, **WORDS)


class Answers:
    """An annotator that calls a square around each click."""

    def set_image(self, image: np.ndarray) -> None:
        self.mask = np.zeros(image.shape[:2], bool)

    def click(self, x: int, y: int, positive: bool) -> np.ndarray:
        self.mask[max(0, y - 1):y + 2, max(0, x - 1):x + 2] = positive
        return self.mask


def test_sessions_are_played_again() -> None:
    clicks = pd.DataFrame({"x": [2, 5, 2], "y": [2, 3, 2], "positive": [True, True, False], "iou": 0.0})
    session = play_again("plain", Answers(), GREY, clicks.itertuples())
    assert session.clicks == [(2, 2, True), (5, 3, True), (2, 2, False)] and session.masks.sum((1, 2)).tolist() == [9, 18, 9], "masks are copies"
    truth = np.zeros((6, 8), bool)
    truth[1:5, 1:7] = True
    page = click_player(GREY, truth, [session, PlayedSession("short", session.clicks[:1], session.masks[:1])], **WORDS)
    data = data_of(page)["sessions"]
    assert data[0]["iou"] == [told(np.sum(mask & truth) / np.sum(mask | truth)) for mask in session.masks] and data[1]["iou"] == data[0]["iou"][:1]
    assert [np.array_equal(pixels_of(url)[..., 3] > 0, mask) for url, mask in zip(data[0]["masks"], session.masks, strict=True)] == [True] * 3
    for number in data[0]["iou"]:
        assert f"<td>{number}, " in page


# -- bad input ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change, message", [
    ({"mask": np.zeros((6, 7))}, r"mask of shape \(6, 7\)"),
    ({"anomaly_map": a_map(0, (8, 6)), "mask": np.zeros((8, 6))}, r"image of shape \(6, 8\)"),
    ({"anomaly_map": np.full((6, 8), np.nan)}, "NaN"),
    ({"anomaly_map": np.where(np.eye(6, 8) > 0, np.inf, 0.0)}, "infinity"),
    ({"anomaly_map": np.zeros((2, 6, 8))}, r"both are \(H, W\)"),
    ({"anomaly_map": np.zeros((0, 8)), "mask": np.zeros((0, 8))}, r"both are \(H, W\)"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"alt": " "}, "alt=' '"),
    ({"alt": None}, "alt=None"),
    ({"caption": ""}, "caption=''"),
    ({"steps": 1}, "outside 2..253"),
    ({"steps": 254}, "outside 2..253"),
    ({"image": GREY / 255}, "expected uint8"),
])
def test_a_bad_threshold_explorer_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        threshold_explorer(**{"image": GREY, "anomaly_map": a_map(0), "mask": np.eye(6, 8), "threshold": 0.0, **WORDS, **change})


RISING = Curve(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.75, 1.0]), np.array([np.inf, 1.0, -np.inf]))
ONE = PlayedSession("one", [(1, 1, True)], np.ones((1, 6, 8), bool))


@pytest.mark.parametrize("make, message", [
    (lambda: slide_explorer(GREY, GREY[:3], alts=("a", "b"), caption="c"), "one size"),
    (lambda: slide_explorer(GREY, GREY, alts=("a", ""), caption="c"), "alts=''"),
    (lambda: curve_explorer({}, **WORDS), "0 curves"),
    (lambda: curve_explorer(dict.fromkeys("abcdefg", RISING), **WORDS), "7 curves"),
    (lambda: curve_explorer({"a": RISING}, kind="RoC", **WORDS), "did you mean 'ROC'"),
    (lambda: curve_explorer({"a": RISING}, limit=0.0, **WORDS), "start="),
    (lambda: curve_explorer({"a": RISING}, limit=2.0, **WORDS), r"in \(0, 1\]"),
    (lambda: curve_explorer({"a": RISING._replace(x=RISING.x[::-1])}, **WORDS), "has to rise"),
    (lambda: curve_explorer({"a": RISING._replace(x=RISING.x * 0.2)}, limit=0.3, **WORDS), "limit of 0.3"),
    (lambda: curve_explorer({" ": RISING}, **WORDS), "a method=' '"),
    (lambda: step_explorer([GREY], ["1", "2"], [{}], what="K", alts=["a"], caption="c"), "2 labels"),
    (lambda: step_explorer([], [], [], what="K", alts=[], caption="c"), "0 frames"),
    (lambda: step_explorer([GREY], ["1"], [{"a": 1.0}], what="K", alts=[""], caption="c"), "alts=''"),
    (lambda: step_explorer([GREY], ["1"], [{"a": 1.0}], what="K", alts=["a"], caption="c", start=1), "start=1"),
    (lambda: step_explorer([GREY, GREY[:2]], ["1", "2"], [{"a": 1.0}] * 2, what="K", alts=["a"] * 2, caption="c"), "several sizes"),
    (lambda: step_explorer([GREY, GREY], ["1", "2"], [{"a": 1.0}, {"b": 1.0}], what="K", alts=["a"] * 2, caption="c"), "several names"),
    (lambda: click_player(GREY, np.zeros((6, 8)), [ONE], **WORDS), "0 pixels"),
    (lambda: click_player(GREY, np.ones((5, 8)), [ONE], **WORDS), r"truth of shape \(5, 8\)"),
    (lambda: click_player(GREY, np.ones((6, 8)), [], **WORDS), "0 sessions"),
    (lambda: click_player(GREY, np.ones((6, 8)), [ONE._replace(clicks=[])], **WORDS), "one: 0 clicks"),
    (lambda: click_player(GREY, np.ones((6, 8)), [ONE._replace(masks=ONE.masks[:, :2])], **WORDS), r"shape \(1, 2, 8\)"),
    (lambda: click_player(GREY, np.ones((6, 8)), [ONE._replace(clicks=[(8, 1, True)])], **WORDS), "outside of the image of 8 x 6"),
    (lambda: tile_of(np.zeros((4, 14, 3), np.uint8), 2), "place 2"),
    (lambda: tile_of(np.zeros((4, 14, 3), np.uint8), -1), "place -1"),
])
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        make()


# -- pages --------------------------------------------------------------------------------------------------------------------------
NASTY = "</script><b>\"x\" & 'y'"


def blob(side: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, map and mask of a stain with a glare beside it."""
    yy, xx = np.mgrid[:side, :side]
    stain, glare = np.exp(-((yy - 20) ** 2 + (xx - 10) ** 2) / 20), np.exp(-((yy - 8) ** 2 + (xx - 24) ** 2) / 12)
    found = (90 * stain + 40 * glare + np.random.default_rng(0).random((side, side))).astype(np.float32)
    return (150 - 80 * stain + 60 * glare).astype(np.uint8), found, stain > 0.4


def all_explorers(name: str = "plain") -> str:
    """One of each, with `name` wherever a name goes."""
    image, found, mask = blob()
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], [200, 50])
    curves = {f"{name} {k}": roc_curve(rank_pixels(rng.normal(size=250) + k * labels, labels)) for k in (1, 2)}
    sessions = [play_again(name, Answers(), image, pd.DataFrame({"x": [10, 13, 24], "y": [20, 20, 8], "positive": [True, True, False]}).itertuples()),
                play_again("other", Answers(), image, pd.DataFrame({"x": [10], "y": [20], "positive": [True]}).itertuples())]
    told_words = {"alt": name, "caption": name}
    return explorer_head() + "".join([
        threshold_explorer(image, found, mask, 30.0, **told_words),
        slide_explorer(image, (255 - image), names=(name, "map"), alts=(name, name), caption=name),
        curve_explorer(curves, start=0.1, **told_words),
        step_explorer([image, 255 - image, image // 2], ["1", "2", name], [{name: 0.0625}, {name: 0.5}, {name: "–"}], what=name, alts=[name] * 3,
                      caption=name),
        click_player(image, mask, sessions, target=0.85, **told_words)])


def test_names_are_escaped_ids_unique_and_nothing_is_fetched() -> None:
    from html.parser import HTMLParser

    page = all_explorers(NASTY) + all_explorers(NASTY)
    assert "<b>" not in page and page.count("<script") == page.count("</script>")
    ids, void, open_tags = [], {"img", "input", "path", "circle", "line", "rect", "polyline", "br"}, []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            ids.extend([given["id"]] if "id" in given else [])
            assert tag != "img" or "alt" in given
            assert not (given.get("src") or given.get("href") or "").startswith(("http", "//"))
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert tag in void or open_tags.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert not open_tags and len(ids) == 10 and len(set(ids)) == 10
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|eval\(", page), "all of it lies in the page"
    assert data_of(page[len(explorer_head()):])["start"] >= 0


def test_code_is_small() -> None:
    sizes = {kind: len(files("defectbook").joinpath("assets", f"explorers.{kind}").read_bytes()) for kind in ("js", "css")}
    assert sum(sizes.values()) <= 25_000 and "</" not in files("defectbook").joinpath("assets", "explorers.js").read_text().replace("</script", "")
    assert 'src="data:' in all_explorers() and len(all_explorers()) < 120_000


# -- in a browser -------------------------------------------------------------------------------------------------------------------
DARK = {"light": "", "dark": ' data-theme="dark" style="--pst-color-text-base:#ced6dd;--pst-color-background:#14181e"'}


def write_page(folder, theme: str = "light") -> str:
    page = folder / f"{theme}.html"
    page.write_text(f"<!doctype html><html lang=en{DARK[theme]}><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                    f"<title>explorers</title><body style='margin:8px;font-family:sans-serif'>{all_explorers()}</body></html>")
    return page.as_uri()


class Page:
    """The page of all explorers, open in a browser."""

    def __init__(self, folder, theme: str = "light", width: int = 1000):
        self.driver = open_browser(width)
        self.js = self.driver.execute_script
        self.driver.get(write_page(folder, theme))
        self.wait(lambda: self.js("return document.querySelectorAll('figure.dbx[data-live=yes]').length") == 5)

    def wait(self, done) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: done())

    def figure(self, kind: str):
        return self.driver.find_element("css selector", f"figure.dbx[data-kind={kind}]")

    def said(self, figure, name: str) -> str:
        return figure.find_element("css selector", f"[data-say={name}]").text

    def data(self, figure) -> dict:
        return json.loads(self.js("return arguments[0].querySelector('script[type=\"application/json\"]').textContent", figure))

    def hands(self):
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver, duration=20)

    def at(self, node, share: float):
        """Hands over `node`, at a share of its width."""
        self.js("arguments[0].scrollIntoView({block: 'center'})", node)
        return self.hands().move_to_element_with_offset(node, round((share - 0.5) * node.rect["width"]), 0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("explorers"))
    yield page
    page.driver.quit()


def keys(figure, *pressed) -> None:
    figure.find_element("css selector", "input[type=range]").send_keys(*pressed)


@pytest.mark.slow
def test_threshold_by_keyboard_and_pointer(page) -> None:
    from selenium.webdriver.common.keys import Keys

    figure, (_, found, mask) = page.figure("threshold"), blob()
    steps = count_steps(found, mask, 30.0)
    box = figure.find_element("css selector", "input[type=range]")

    def shows(k: int) -> None:
        counts = Counts(*(part[k] for part in (steps.counts.tp, steps.counts.fp, steps.counts.fn, steps.counts.tn)))
        assert int(box.get_property("value")) == k
        for name, value in (("dice", counts.dice()), ("precision", counts.precision()), ("recall", counts.tpr()), ("iou", counts.iou())):
            assert page.said(figure, name) == told(float(value)), (name, k)
        assert page.said(figure, "called") == f"{np.count_nonzero(found >= steps.thresholds[k]):,}"
        assert f"Dice {told(float(counts.dice()))}" in box.get_attribute("aria-valuetext")

    start = int(np.searchsorted(steps.thresholds, np.float32(30)))
    shows(start)
    keys(figure, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    shows(start + 2)
    keys(figure, Keys.HOME)
    shows(0)
    keys(figure, Keys.END)
    shows(len(steps.thresholds) - 1)
    keys(figure, Keys.PAGE_DOWN)
    best, first = figure.find_elements("css selector", "button[data-to]")[::-1]
    best.click()
    shows(int(np.nanargmax(steps.counts.dice())))
    first.click()
    shows(start)
    page.at(box, 0.5).click().perform()
    middle = int(box.get_property("value"))
    assert abs(middle - len(steps.thresholds) / 2) < 4
    shows(middle)


@pytest.mark.slow
def test_the_outline_is_that_of_the_mask(page) -> None:
    """Orange only where a pixel of the mask meets one of the others."""
    figure, (_, found, mask) = page.figure("threshold"), blob()
    steps = count_steps(found, mask, 30.0)
    figure.find_element("css selector", "button[data-to]").click()
    wide, high, drawn = page.js("""const sheet = arguments[0].querySelector('canvas');
        return [sheet.width, sheet.height, [...sheet.getContext('2d').getImageData(0, 0, sheet.width, sheet.height).data]]""", figure)
    alpha = np.array(drawn, np.uint8).reshape(high, wide, 4)[..., 3] > 200
    called = found >= np.float32(30)
    scale = wide // called.shape[1]
    big = np.kron(called, np.ones((scale, scale))) > 0
    edge = np.zeros_like(big)
    for axis in (0, 1):
        edge |= big != np.roll(big, 1, axis)
    assert alpha[edge].mean() > 0.95, "the edge is drawn"
    far = np.ones_like(big)
    for y, x in np.argwhere(edge):
        far[max(0, y - scale):y + scale, max(0, x - scale):x + scale] = False
    assert not alpha[far].any() and len(steps.thresholds) > 200
    assert not page.js("return arguments[0].querySelector('.dbx-truth').hidden", figure)
    figure.find_element("css selector", "input[name=truth]").click()
    assert page.js("return arguments[0].querySelector('.dbx-truth').hidden", figure), "the annotation can be turned off"


@pytest.mark.slow
def test_slide_follows_keys_and_drag(page) -> None:
    from selenium.webdriver.common.keys import Keys

    figure = page.figure("slide")
    stage = figure.find_element("css selector", ".dbx-stage")

    def place() -> str:
        return page.js("return getComputedStyle(arguments[0]).getPropertyValue('--place')", stage)

    keys(figure, Keys.ARROW_RIGHT)
    assert place() == "51%"
    page.at(stage, 0.25).click_and_hold().perform()
    assert place() == "25%"
    page.hands().move_by_offset(round(stage.rect["width"] / 2), 0).release().perform()
    assert place() == "75%"
    page.hands().move_by_offset(-20, 0).perform()
    assert place() == "75%", "a pointer that is not held down moves nothing"
    assert "75 % plain" in figure.find_element("css selector", "input").get_attribute("aria-valuetext")


@pytest.mark.slow
def test_curves_follow_pointer_and_keys(page) -> None:
    from selenium.webdriver.common.keys import Keys

    figure = page.figure("curves")
    data, chart = page.data(figure), figure.find_element("css selector", "svg.dbx-chart")

    def shows(place: int) -> None:
        assert page.said(figure, "budget") == data["budgets"][place]
        for number, method in enumerate(data["methods"]):
            row = figure.find_element("css selector", f"[data-method='{number}']")
            assert [page.said(row, name) for name in ("fpr", "tpr", "threshold")] == [method[name][place] for name in ("x", "y", "thresholds")]

    shows(20)
    keys(figure, Keys.ARROW_LEFT)
    shows(19)
    keys(figure, Keys.HOME)
    shows(0)
    left, _, width, _ = data["box"]
    page.at(chart, (left + 0.6 * width) / 460).perform()  # over it, without a click
    assert abs(float(page.said(figure, "budget").split()[0]) - 60) <= 1
    dots = figure.find_elements("css selector", "[data-dot]")
    assert len(dots) == 2 and all(dot.get_attribute("visibility") == "visible" for dot in dots)


@pytest.mark.slow
def test_steps_change_picture_words_and_row(page) -> None:
    from selenium.webdriver.common.keys import Keys

    figure = page.figure("steps")
    data, picture = page.data(figure), figure.find_element("css selector", ".dbx-frame")
    keys(figure, Keys.ARROW_RIGHT)
    assert picture.get_attribute("src") == data["frames"][1] and page.said(figure, "words") == "plain 2: plain 0.500"
    rows = figure.find_elements("css selector", "tbody tr")
    assert [row.get_attribute("aria-current") for row in rows] == [None, "true", None]
    figure.find_element("css selector", "button[data-by='1']").click()
    figure.find_element("css selector", "button[data-by='1']").click()
    assert picture.get_attribute("src") == data["frames"][2], "it stops at the end"


@pytest.mark.slow
def test_clicks_are_played(page) -> None:
    from selenium.webdriver.common.keys import Keys

    figure = page.figure("clicks")
    first, second = figure.find_elements("css selector", ".dbx-session")
    told_data = page.data(figure)["sessions"]

    def visible(node) -> int:
        return len([mark for mark in node.find_elements("css selector", ".dbx-mark") if mark.get_attribute("visibility") != "hidden"])

    keys(figure, Keys.HOME)
    assert (visible(first), visible(second), page.said(first, "iou")) == (0, 0, "–")
    assert page.js("return arguments[0].querySelector('.dbx-mask').hidden", first)
    keys(figure, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (visible(first), visible(second)) == (2, 1) and page.said(first, "click") == "2 of 3" and page.said(second, "click") == "1 of 1"
    assert page.said(first, "iou") == told_data[0]["iou"][1]
    assert first.find_element("css selector", ".dbx-mask").get_attribute("src") == told_data[0]["masks"][1]
    assert "ended" in figure.find_element("css selector", "input").get_attribute("aria-valuetext")
    keys(figure, Keys.HOME)
    play = figure.find_element("css selector", ".dbx-play")
    play.send_keys(Keys.ENTER)
    assert play.text == "Stop"
    page.wait(lambda: page.said(first, "click") == "3 of 3" and play.text == "Play")
    assert page.said(first, "where") == "beside it" and page.said(first, "iou") == told_data[0]["iou"][2]


@pytest.mark.slow
def test_keyboard_reaches_everything_and_shows_where_it_is(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.driver.refresh()
    page.wait(lambda: page.js("return document.querySelectorAll('figure.dbx[data-live=yes]').length") == 5)
    body, reached = page.driver.find_element("css selector", "body"), []
    body.send_keys(Keys.TAB)
    for _ in range(40):
        tag, kind, ring, label = page.js("""const node = document.activeElement, name = node.labels && node.labels[0] || node;
            return [node.tagName, node.type || '', getComputedStyle(node).outlineStyle, name.textContent.trim()]""")
        if tag == "BODY":
            break
        reached.append(kind or tag.lower())
        assert ring not in ("none", "") and label, f"{tag} {kind} has no ring or no name"
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert [reached.count(kind) for kind in ("range", "button", "checkbox", "summary")] == [5, 2 + 2 + 3, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("theme", DARK)
@pytest.mark.parametrize("width", [390, 1000])
def test_nothing_overflows_and_words_can_be_read(tmp_path, theme: str, width: int) -> None:
    from test_annotator_browser import contrast

    page = Page(tmp_path, theme, width)
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": width < 500}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        found = page.js("""
          const opaque = (node) => { for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if (!/^rgba\\(.*, 0\\)$|transparent/.test(colour)) return colour; } return "rgb(255, 255, 255)"; };
          return [...document.querySelectorAll('.dbx :is(dt, dd, th, td, p, label, button, summary, figcaption, strong)')]
            .filter((node) => node.offsetParent && node.textContent.trim())
            .map((node) => [node.textContent, getComputedStyle(node).color, opaque(node)])""")
        assert len(found) > 40
        for text, front, back in found:
            assert contrast(front, back) >= 4.5, f"{text!r}: {front} on {back}"
    finally:
        page.driver.quit()


@pytest.mark.slow
def test_without_javascript_the_numbers_are_there(tmp_path) -> None:
    driver = open_browser(scripts=False)
    try:
        driver.get(write_page(tmp_path))
        figures = driver.find_elements("css selector", "figure.dbx")
        assert len(figures) == 5 and not [node for node in driver.find_elements("css selector", ".dbx-controls") if node.is_displayed()]
        _, found, mask = blob()
        exact = count_at([found], [mask], 30.0)
        threshold, slide, curves, steps, clicks = figures
        assert threshold.find_element("css selector", "[data-say=dice]").text == told(float(exact.dice()[0, 0]))
        assert len(threshold.find_elements("css selector", "tbody tr")) >= 8 and threshold.find_element("css selector", ".dbx-still").is_displayed()
        pair = slide.find_elements("css selector", "img")
        assert pair[0].rect["x"] + pair[0].rect["width"] <= pair[1].rect["x"], "side by side"
        assert len(curves.find_elements("css selector", "polyline")) == 2 and "TPR" in curves.text and "area" in curves.text
        assert "0.063" in steps.text and "0.500" in steps.text and steps.find_element("css selector", "img").is_displayed()
        assert len(clicks.find_elements("css selector", "tbody tr")) == 3 and len(clicks.find_elements("css selector", ".dbx-mark")) == 4
        assert all(node.is_displayed() for node in driver.find_elements("css selector", ".dbx-table"))
    finally:
        driver.quit()
