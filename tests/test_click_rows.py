"""Sessions of clicks: stopping, replaying, counting, comparing, storing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import noise

from defectbook.core import DataError, ParameterError, generator
from defectbook.data.objects import ClickObject
from defectbook.methods.adaptation import AdaptiveSam
from defectbook.models.embeddings import EmbeddingCache
from defectbook.models.sam import toy_sam
from defectbook.practice.click_rows import (
    Goal,
    against,
    click_rows,
    clicks_interval,
    clicks_needed,
    failed,
    object_set,
    overlap,
    picture_of,
    play_objects,
    replay,
    run_clicks,
    session_figures,
    traces,
)
from defectbook.practice.runs import RunStore


@pytest.fixture(scope="module")
def sam():
    return toy_sam(64).eval()


@pytest.fixture(scope="module")
def objects() -> list[ClickObject]:
    found = []
    for number in range(5):
        mask = np.zeros((64, 64), bool)
        y, x = generator(number, "places").integers(5, 40, 2)
        mask[y:y + 15, x:x + 12] = True
        found.append(ClickObject(noise(number), mask, f"thing {number}", "ab"[number % 2]))
    return found


def session_of(*tables: list[float]) -> pd.DataFrame:
    rows = [(number, f"thing {number}", "a", click, 1, 2, True, iou, 0.5) for number, ious in enumerate(tables) for click, iou in enumerate(ious, 1)]
    return pd.DataFrame(rows, columns=["object", "name", "kind", "click", "x", "y", "positive", "iou", "estimate"])


@pytest.mark.parametrize(("text", "target", "limit"), [("85@20", 0.85, 20), ("90@30", 0.9, 30), ("62.5@4", 0.625, 4)])
def test_goals_are_written_and_read(text: str, target: float, limit: int) -> None:
    assert Goal.parse(text) == Goal(target, limit) and Goal.parse(text).name == text


@pytest.mark.parametrize("text", ["85", "85@", "a@3", "0@5", "101@5", "85@0", "85@2.5", ""])
def test_other_goals_are_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="goal"):
        Goal.parse(text)


def test_figures_of_a_session_by_hand() -> None:
    session, goal = session_of([0.5, 0.9], [0.1, 0.2, 0.3], [0.95]), Goal(0.85, 3)
    assert [list(trace) for trace in traces(session)] == [[0.5, 0.9], [0.1, 0.2, 0.3], [0.95]]
    assert clicks_needed(session, goal).tolist() == [2, 3, 1] and failed(session, goal).tolist() == [0, 1, 0]
    figures = session_figures(session, goal)
    assert figures["noc"] == 2 and np.isclose(figures["fr"], 1 / 3) and np.isclose(figures["iou"], (0.9 + 0.3 + 0.95) / 3)
    assert np.isclose(figures["iou@1"], (0.5 + 0.1 + 0.95) / 3) and np.isclose(figures["iou@3"], figures["iou"])
    found = clicks_interval(session, goal)
    assert 1 <= found.low <= 2 <= found.high <= 3


def test_a_row_is_compared_with_the_same_objects() -> None:
    goal = Goal(0.85, 3)
    plain, better = session_of([0.1, 0.2, 0.3], [0.5, 0.9], [0.95]), session_of([0.1, 0.9], [0.9], [0.95])
    assert np.isclose(against(better, plain, goal).difference, -2 / 3) and against(plain, plain, goal).difference == 0
    assert np.isclose(against(better, plain, goal, failed).difference, -1 / 3)
    with pytest.raises(DataError, match="not the same in the same order"):
        against(better, session_of([0.9], [0.9]), goal)


def test_a_session_stops_at_its_goal(sam, objects) -> None:
    session = play_objects(AdaptiveSam(sam, "none"), objects, Goal(0.2, 4))
    for number, part in session.groupby("object"):
        assert part.click.tolist() == list(range(1, len(part) + 1)) and (part.name == objects[number].name).all()
        assert (part.iou.iloc[:-1] < 0.2).all() and (len(part) == 4 or part.iou.iloc[-1] >= 0.2)
        assert not part.duplicated(["x", "y"]).any()
    first = session.groupby("object").first()
    assert first.positive.all()  # nothing is outlined yet, so something is missed
    assert all(objects[number].mask[row.y, row.x] for number, row in zip(first.index, first.itertuples(), strict=True))


@pytest.mark.parametrize("configuration", ["none", "CA=R RM=E CM", "CA=C"])
def test_a_session_can_be_played_again(sam, objects, configuration: str) -> None:
    session = play_objects(AdaptiveSam(sam, configuration, rates=(1e-3,) * 3), objects, Goal(0.9, 3), EmbeddingCache(sam))
    found = replay(AdaptiveSam(sam, configuration, rates=(1e-3,) * 3), objects, session)
    assert np.allclose(found, session.iou, atol=1e-6)
    with pytest.raises(DataError, match="give its objects in its order"):
        replay(AdaptiveSam(sam, configuration), objects[::-1], session)


def test_adaptation_changes_later_objects_only(sam, objects) -> None:
    goal = Goal(0.99, 2)
    plain = play_objects(AdaptiveSam(sam, "none"), objects, goal)
    adapted = play_objects(AdaptiveSam(sam, "CM", rates=(1e-2,) * 3), objects, goal)
    assert adapted[adapted.object == 0].equals(plain[plain.object == 0])
    assert not np.allclose(adapted[adapted.object > 1].estimate.to_numpy()[:2], plain[plain.object > 1].estimate.to_numpy()[:2])


def test_each_kind_has_its_decoder(sam, objects) -> None:
    goal, classes = Goal(0.99, 2), ("a", "b")
    session = play_objects(AdaptiveSam(sam, "CM", classes, rates=(1e-2,) * 3), objects, goal)
    alone = play_objects(AdaptiveSam(sam, "CM", rates=(1e-2,) * 3), [item for item in objects if item.kind == "b"], goal)
    assert np.allclose(session[session.kind == "b"].iou, alone.iou) and np.allclose(session[session.kind == "b"].estimate, alone.estimate, atol=1e-6)


def test_an_object_right_to_the_pixel_is_clicked_no_more(sam, objects) -> None:
    class Knows(AdaptiveSam):
        def click(self, x: int, y: int, positive: bool = True) -> np.ndarray:
            super().click(x, y, positive)
            self.mask = objects[0].mask
            return self.mask

    session = play_objects(Knows(sam, "none"), objects[:1], Goal(1.0, 5))
    assert len(session) == 1 and session.iou.iloc[0] == 1.0


def test_rows_are_named_stored_once_and_read(sam, objects, tmp_path: Path) -> None:
    goal, store = Goal(0.9, 2), RunStore(tmp_path)
    rows = click_rows(["none", "CA=R"]) + click_rows(["CA=R"], ("a", "b"), steps=2)
    assert [row.method for row in rows] == ["none", "CA=R", "CA=R, a decoder a kind, steps 2"]
    first = run_clicks("sessions", rows, objects, "things", sam, goal, store, simulated=True)
    second = run_clicks("sessions", rows, objects, "things", sam, goal, store, simulated=True)
    assert [run.id for run in first] == [run.id for run in second] and len({run.id for run in first}) == 3
    session = first[1].table("clicks")
    assert first[1].value("noc") == clicks_needed(session, goal).mean() and first[1].value("fr") == failed(session, goal).mean()
    other = run_clicks("sessions", rows[:1], objects[::-1], "things", sam, goal, store, order=1, simulated=True)
    assert other[0].id != first[0].id
    with pytest.raises(ParameterError, match="one name twice"):
        run_clicks("sessions", [rows[0], rows[0]], objects, "things", sam, goal, store)


def test_the_picture_shows_truth_answer_and_what_is_left(objects) -> None:
    item = objects[0]
    clicks = session_of([0.5])
    picture = picture_of(item, clicks, item.mask, erosion=2)
    assert picture.shape == (64, 192, 3) and picture.dtype == np.uint8
    truth, _, eroded = np.split(picture.astype(int), 3, axis=1)
    assert (truth[item.mask] != item.image[item.mask]).any() and np.array_equal(truth[~item.mask], item.image[~item.mask])
    tinted = eroded - (0.55 * item.image)  # of blue 178, green 115, vermilion 0: 45 % each
    blue = tinted[..., 2] > 70
    assert blue.any() and (blue & item.mask).any() and (blue & ~item.mask).any()


def test_sets() -> None:
    objects, simulated = object_set("foil", 4)
    assert len(objects) == 4 and simulated
    with pytest.raises(ParameterError, match="did you mean 'foil'"):
        object_set("foils", 4)


def test_overlap() -> None:
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool).numpy()
    assert overlap(a, b) == 0
    a[0], b[0, :2] = True, True
    assert overlap(a, b) == 0.5
