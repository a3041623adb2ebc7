"""The simulated annotator against a slow one that measures every distance, and the ends of a session."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from defectbook.core import DataError
from defectbook.metrics.clicking import Click, next_click


def slow_click(truth: np.ndarray, prediction: np.ndarray, clicked: list[tuple]) -> Click | None:
    """Every wrong pixel's squared distance to every pixel outside of its error, and to the ring around the image."""
    height, width = truth.shape
    best = {}
    for positive, error in ((False, prediction & ~truth), (True, truth & ~prediction)):
        outside = [(y, x) for y in range(-1, height + 1) for x in range(-1, width + 1)
                   if not (0 <= y < height and 0 <= x < width and error[y, x])]
        best[positive] = (0, None)
        for y, x in zip(*error.nonzero(), strict=True):
            squared = min((y - v) ** 2 + (x - u) ** 2 for v, u in outside)
            if squared > best[positive][0] and (x, y) not in {tuple(click[:2]) for click in clicked}:
                best[positive] = (squared, Click(int(x), int(y), positive))
    return best[True][1] if best[True][0] > best[False][0] else best[False][1]


shapes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@st.composite
def situations(draw) -> tuple[np.ndarray, np.ndarray, list[tuple]]:
    shape = draw(shapes)
    masks = [draw(arrays(bool, shape, elements=st.booleans(), fill=st.just(draw(st.booleans())))) for _ in range(2)]
    places = st.tuples(st.integers(0, shape[1] - 1), st.integers(0, shape[0] - 1))
    return *masks, draw(st.lists(places, max_size=6))


@given(situations())
@settings(max_examples=200, deadline=None)
def test_as_the_slow_annotator(situation) -> None:
    assert next_click(*situation) == slow_click(*situation)


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_as_the_slow_annotator_on_blobs(seed: int) -> None:
    """Smooth errors, deeper than a pixel or two, at all borders."""
    import cv2

    rng = np.random.default_rng(seed)
    truth, prediction = (cv2.GaussianBlur(rng.random((18, 24)), (0, 0), 3) > 0.5 for _ in range(2))
    assert next_click(truth, prediction) == slow_click(truth, prediction, [])


@given(situations())
@settings(max_examples=50, deadline=None)
def test_a_click_is_on_an_error_of_its_sign_and_new(situation) -> None:
    truth, prediction, clicked = situation
    click = next_click(truth, prediction, clicked)
    wrong = truth != prediction
    for x, y in clicked:
        wrong[y, x] = False
    assert (click is None) == (not wrong.any())
    if click is not None:
        assert wrong[click.y, click.x] and bool(truth[click.y, click.x]) == click.positive


def test_a_session_that_changes_nothing_clicks_every_wrong_pixel_once() -> None:
    truth, prediction, clicks = np.eye(6, 8, dtype=bool), np.zeros((6, 8), bool), []
    prediction[2:5, 2:6] = True
    while (click := next_click(truth, prediction, clicks)) is not None:
        clicks.append(click)
    assert len(clicks) == len({click[:2] for click in clicks}) == int((truth != prediction).sum())


def test_ties() -> None:
    assert next_click(np.array([[1, 0]]), np.array([[0, 1]])) == (1, 0, False)
    two = np.zeros((7, 16), bool)
    two[1:6, 9:14] = two[1:6, 1:6] = True  # equally deep: the left one comes first in reading order
    assert next_click(two, np.zeros_like(two)) == (3, 3, True)
    assert next_click(two, np.zeros_like(two), [(3, 3, True)])[:2] == (11, 3)


def test_masks_of_any_whole_numbers() -> None:
    truth = np.zeros((9, 9), np.uint8)
    truth[2:7, 2:7] = 255
    assert next_click(truth, np.zeros((9, 9), np.int64)) == (4, 4, True)
    assert next_click(truth, truth // 255) is None
    assert isinstance(next_click(truth, truth * 0).x, int)


def test_long_distances_are_exact() -> None:
    """Two squares that differ by one row: rounding must not make them a tie."""
    truth = np.zeros((500, 1100), bool)
    truth[1:460, 1:460] = truth[1:462, 600:1061] = True
    assert next_click(truth, np.zeros_like(truth)) == (830, 231, True)


@pytest.mark.parametrize(("truth", "prediction", "clicked", "message"), [
    (np.ones((4, 4), bool), np.ones((4, 5), bool), (), "truth of 4x4 px and a prediction of 5x4 px"),
    (np.ones((4, 4)), np.ones((4, 4), bool), (), "truth of shape .* float64"),
    (np.ones((4, 4), bool), np.full((4, 4), np.nan), (), "prediction of shape .* float64"),
    (np.ones((4, 4), bool), np.ones((1, 4, 4), bool), (), r"prediction of shape \(1, 4, 4\)"),
    (np.ones((4, 4), bool), np.ones((4, 4), bool), [(4, 0, True)], r"at \(4, 0\) lies outside of the image, 4x4 px"),
    (np.ones((4, 4), bool), np.ones((4, 4), bool), [(0, -1, True)], r"at \(0, -1\) lies outside"),
])
def test_bad_input(truth, prediction, clicked, message: str) -> None:
    with pytest.raises(DataError, match=message):
        next_click(truth, prediction, clicked)
