"""Judging segmenters and the rows of PROS: figures against plain loops, stored runs that are read again, sets of the three kinds, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.datasets import Dataset
from defectbook.metrics.published import published
from defectbook.models.sam_lite import imagenet_lite, save_lite
from defectbook.models.segmentation import Segmented
from defectbook.practice.pros_rows import (
    ADAPTERS,
    LOSS_WORDS,
    PRINTED,
    SIZES,
    baseline_rows,
    open_workshop,
    pros_rows,
    shrink,
    sizes_of,
)
from defectbook.practice.runs import RunStore
from defectbook.practice.segmenters import SegmenterRow, defect_maps, judge_segmenter, one_of_each, overlaps, run_segmenters


class Known:
    """A segmenter that answers with given probabilities of a defect at 8 x 8."""

    def __init__(self, maps: list[np.ndarray]):
        self.maps = maps

    def stream(self, samples):
        for sample, found in zip(samples, self.maps, strict=True):
            yield Segmented([sample], [sample.image.shape[:2]], np.stack([1 - found, found]).astype(np.float32)[None])


def samples_of(masks: list[np.ndarray], kinds: list[str] | None = None) -> list[Sample]:
    kinds = kinds or ["dot"] * len(masks)
    return [Sample(np.full((*mask.shape, 3), 90, np.uint8), mask, int(mask.any()), f"{i}", {"kind": kind}, mask_threshold=None)
            for i, (mask, kind) in enumerate(zip(masks, kinds, strict=True))]


def dataset_of(samples: list[Sample], simulated: bool = True) -> Dataset:
    return Dataset("toy", "all", Path("."), [], [], samples, simulated=simulated)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_figures_are_those_of_the_loop(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [(rng.random((8, 8)) > 0.7).astype(np.uint8) for _ in range(count)]
    masks[0][0, 0] = 1
    masks.append(np.zeros((8, 8), np.uint8))  # a sound image: counts in the pixel figures only
    maps = [rng.random((8, 8)).astype(np.float32) for _ in masks]
    run, images = judge_segmenter(Known(maps), dataset_of(samples_of(masks)), "known")
    dices, ious, hits, called, there = [], [], 0, 0, 0
    for found, mask in zip(maps, masks, strict=True):
        answer, truth = found > 0.5, mask > 0
        hits, called, there = hits + int((answer & truth).sum()), called + int(answer.sum()), there + int(truth.sum())
        if truth.any():
            dices.append(2 * (answer & truth).sum() / (answer.sum() + truth.sum()))
            ious.append((answer & truth).sum() / (answer | truth).sum())
    figures = dict(zip(run.metrics.metric, run.metrics.value, strict=True))
    assert figures["dice"] == pytest.approx(np.mean(dices)) and figures["miou"] == pytest.approx(np.mean(ious))
    assert figures["dice_pixels"] == pytest.approx(2 * hits / (called + there))
    assert figures["iou_pixels"] == pytest.approx(hits / (called + there - hits))
    assert figures["dice_oracle"] >= figures["dice"] - 1e-9 and len(images) == len(dices)
    assert run.threshold == 0.5 and (run.prediction.scores == [found.max() for found in maps]).all()


def test_maps_are_at_each_images_own_size() -> None:
    masks = [np.ones((8, 8), np.uint8), np.ones((20, 12), np.uint8)]
    found = defect_maps(Known([np.full((8, 8), 0.7)] * 2), samples_of(masks))
    assert [part.shape for part in found.maps] == [(8, 8), (20, 12)] and all(np.allclose(part, 0.7) for part in found.maps)


def test_no_defect_no_figure() -> None:
    with pytest.raises(DataError, match="no test image"):
        overlaps([np.zeros((8, 8))], samples_of([np.zeros((8, 8), np.uint8)]))


def test_one_picture_of_each_kind_in_the_middle() -> None:
    masks = []
    for area in (3, 9, 6, 30, 1):
        mask = np.zeros((8, 8), np.uint8)
        mask.flat[:area] = 1
        masks.append(mask)
    assert one_of_each(samples_of(masks, ["dot", "dot", "dot", "line", "circle"])) == [2, 3, 4]
    assert one_of_each(samples_of(masks, ["dot", "dot", "dot", "line", "circle"]), most=1) == [2]


def row(name: str, maps: list[np.ndarray], made: list[str], further: dict | None = None) -> SegmenterRow:
    def make():
        made.append(name)
        return Known(maps), {"fit": 1.5}, further or {}

    return SegmenterRow(name, {"maps": float(np.sum(maps))}, make, {"printed": "x"})


def test_rows_are_made_once_and_told(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = 1
    maps, made, store = [0.4 * mask.astype(np.float32)], [], RunStore(tmp_path)
    rows = [row("shy", maps, made, {"tuned_threshold": 0.3, "synthetic_dice": 0.25}), row("blind", [np.zeros((8, 8))], made)]
    data = dataset_of(samples_of([mask]))
    first, second = (run_segmenters("toy", rows, data, store) for _ in range(2))
    assert made == ["shy", "blind"] and [run.id for run in first] == [run.id for run in second]
    assert first[0].value("dice") == 0 and first[0].value("dice_tuned") == 1 == first[0].value("dice_oracle")
    assert first[0].value("synthetic_dice") == 0.25
    assert first[0].params["parameters"]["printed"] == "x" and first[0].provenance["seconds"]["fit"] == 1.5
    assert len(first[0].table("images")) == 1 and len(first[0].panels()) == 1
    with pytest.raises(ParameterError, match="one name twice"):
        run_segmenters("toy", [rows[0], rows[0]], data, store)


def test_pictures_of_real_sets_stay_out_of_the_store(tmp_path: Path) -> None:
    mask = np.eye(8, dtype=np.uint8)
    run = run_segmenters("toy", [row("any", [mask * 0.9], [])], dataset_of(samples_of([mask]), simulated=False), RunStore(tmp_path))[0]
    assert run.panels() == []


# The rows of PROS

@pytest.fixture(scope="module")
def workshop():
    return open_workshop("pcb", sizes_of("smoke"))


@pytest.fixture(scope="module")
def sam_lite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam_lite.safetensors"
    save_lite(imagenet_lite(64), path)
    return path


def test_table_2_has_its_sixteen_rows(workshop, sam_lite: Path) -> None:
    rows = baseline_rows(workshop, "cpu") + pros_rows(workshop, "cpu", checkpoint=sam_lite)
    theirs = list(dict.fromkeys(published("PROS", "2").row))
    assert [row.told["printed"] for row in rows] == theirs and len({row.method for row in rows}) == 16
    assert {row.told["printed"].rsplit(" / ", 1)[1] for row in rows} == set(LOSS_WORDS.values())
    assert sum("random weights" in row.method for row in rows) == 3 and sum("stands in" in row.method for row in rows) == 3
    assert len({json.dumps(row.identity, sort_keys=True, default=str) for row in rows}) == 16


def test_table_3_has_its_six(workshop, sam_lite: Path) -> None:
    rows = pros_rows(workshop, "cpu", ADAPTERS, checkpoint=sam_lite)
    theirs = set(published("PROS", "3").column.str.removeprefix("K=").astype(int))
    assert {row.identity["parameters"]["adapters"] for row in rows} == theirs == set(ADAPTERS)
    counts = [row.told["learned"] for row in rows]
    assert counts == sorted(counts, reverse=True)


def test_painted_defects_of_training_and_judgement_are_apart(workshop) -> None:
    assert len(workshop.painted) == workshop.sizes["synthetic"] and len(workshop.held_out) == workshop.sizes["held_out"]
    pictures = [{sample.meta["template"].tobytes() for sample in part} for part in (workshop.painted, workshop.held_out)]
    assert not pictures[0] & pictures[1]
    assert all(sample.image.shape == (64, 64, 3) and sample.mask.any() for sample in (*workshop.painted, *workshop.held_out))
    assert {sample.meta["kind"] for sample in workshop.painted} <= {"line", "dot", "circle"}
    other = open_workshop("pcb", sizes_of("smoke"), seed=1)
    assert other.dataset.fingerprint() == workshop.dataset.fingerprint()  # the test is the same for all seeds
    assert any((a.mask != b.mask).any() for a, b in zip(workshop.painted, other.painted, strict=True))


def test_a_row_is_made_and_judged(workshop, sam_lite: Path) -> None:
    for made in (baseline_rows(workshop, "cpu", ("soft_dice",))[4], pros_rows(workshop, "cpu", checkpoint=sam_lite)[0]):
        segmenter, seconds, further = made.make()
        assert segmenter.is_fitted and seconds["fit"] > 0 and set(further) == {"synthetic_dice", "synthetic_miou", "tuned_threshold"}
        assert len(defect_maps(segmenter, workshop.dataset.test)) == len(workshop.dataset.test)


def test_real_sets(data_root: Path) -> None:
    for name, siamese in (("deeppcb", 2), ("magnetic_tile", 0)):
        opened = open_workshop(name, sizes_of("smoke"))
        rows = baseline_rows(opened, "cpu", ("bce",))
        assert not opened.dataset.simulated and sum("Siamese" in row.method for row in rows) == siamese
        assert all(sample.label == 1 and sample.mask.any() for sample in opened.dataset.test)
        assert all(sample.label == 0 for sample in opened.dataset.train)
        if siamese:
            assert all(sample.meta["template"].shape == sample.image.shape for sample in opened.dataset.test)


def test_shrinking_keeps_thin_defects_where_it_can() -> None:
    mask = np.zeros((100, 60), np.uint8)
    mask[40:60, 20:40] = 3
    template = np.full((100, 60, 3), 30, np.uint8)
    meta = {"kind": "dot", "template": template, "boxes": 1}
    small = shrink(Sample(np.full((100, 60, 3), 90, np.uint8), mask, 3, "a", meta, mask_threshold=None), 32)
    assert small.image.shape == (32, 32, 3) and set(np.unique(small.mask)) == {0, 1} and small.label == 1
    assert small.meta.keys() == {"kind", "template"} and (small.meta["template"] == 30).all()


def test_presets() -> None:
    assert set(SIZES) == {"smoke", "small", "paper"} and len({tuple(sizes) for sizes in SIZES.values()}) == 1
    paper = sizes_of("paper")
    assert (paper["side"], paper["epochs"], paper["unet_rate"], paper["pros_rate"], paper["width"]) == (256, 10, 1e-4, 1e-4, None)
    assert set(PRINTED) == {"unet", "unet_mri", "unet_imagenet", "siamese", "siamese_difference", "pros"}


@pytest.mark.parametrize("call", [lambda: sizes_of("tiny"), lambda: open_workshop("pcbs", SIZES["smoke"])])
def test_refused(call) -> None:
    with pytest.raises(ParameterError, match="did you mean|valid names"):
        call()


def test_a_set_with_few_normal_pictures_gives_what_it_has(data_root: Path) -> None:
    workshop = open_workshop("deeppcb", {**SIZES["small"], "side": 32, "test": 6})
    learned, all_of_them = workshop.sizes["normal"], len(workshop.dataset.train)
    assert all_of_them < SIZES["small"]["normal"] and learned == all_of_them * 5 // 6
    assert f"painted on {learned}" in workshop.dataset.summary()
    assert len(workshop.painted) == SIZES["small"]["synthetic"] and len(workshop.held_out) == SIZES["small"]["held_out"]
    pictures = [{sample.meta["template"].tobytes() for sample in part} for part in (workshop.painted, workshop.held_out)]
    assert not pictures[0] & pictures[1]


def test_one_normal_picture_is_too_few(data_root: Path) -> None:
    with pytest.raises(DataError, match="1 normal pictures"):
        open_workshop("deeppcb", {**SIZES["smoke"], "normal": 0})
