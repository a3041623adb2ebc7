"""Simulated boards: nets, structure of defects, exact masks, determinism, long tail, bad input."""
import hashlib
import pickle
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from defectbook.core import DataError, ParameterError, Sample, generator
from defectbook.data import pcb, pcb_boards, pcb_defects
from defectbook.data.pcb import PUBLISHED_IMAGES, PcbBoards, PcbOptions, long_tail, pcb_sample, take_shot
from defectbook.data.pcb_boards import STYLES, Layers, draw_layers, expose, make_board, random_exposure, render
from defectbook.data.pcb_defects import KINDS, Bench, add_defects, nets
from defectbook.data.pcb_layout import design_board, fill_board

LAYERS = ("copper", "opening", "finish", "hole", "silk", "dome", "wear", "stain")
SEEDS = range(6)


def board(seed: int, size: int = 256, style: str | None = None):
    return make_board(size, generator(seed, "design"), generator(seed, "photo"), style)


def broken(kind: str, seed: int, count: int = 1):
    """A board with the kind; boards without a place for it are skipped over, as the data set does."""
    for attempt in range(20):
        try:
            return add_defects(board(100 * attempt + seed), kind, generator(seed, kind), count)
        except DataError:
            continue
    raise AssertionError(f"twenty boards have no place for {kind}")


def pieces(copper: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected copper by another library than the simulator's: corners count."""
    return ndimage.label(copper >= 128, np.ones((3, 3)))


def spaces(copper: np.ndarray) -> int:
    return ndimage.label(copper < 128)[1]


# Nets


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_nets_keep_their_gap(seed):
    router, _ = fill_board(360, np.random.default_rng(seed))
    window = np.ones((int(router.gap) - 1,) * 2, np.uint8)
    highest = cv2.dilate(router.owner, window)
    lowest = cv2.erode(np.where(router.owner == 0, np.int16(32767), router.owner), window)
    assert not ((highest > 0) & (lowest < 32767) & (lowest != highest)).any()


def test_drawn_traces_join_their_pads():
    """What the router calls one net is one piece of copper in the drawing."""
    router, _ = fill_board(360, np.random.default_rng(5))
    layout = design_board(360, np.random.default_rng(5))
    labels, _ = pieces(draw_layers(layout, 360).copper)
    inside = [i for i, pad in enumerate(router.pads) if not pad.ground and 30 < pad.x < 330 and 30 < pad.y < 330]
    joined = 0
    for i in inside:
        pad = router.pads[i]
        x, y = round(pad.x + (pad.width / 2 - 2)), round(pad.y)
        partners = [j for j in inside if j != i and router.nets[j] == router.nets[i]]
        for j in partners:
            other = router.pads[j]
            assert labels[y, x] == labels[round(other.y), round(other.x + (other.width / 2 - 2))] > 0
            joined += 1
    assert joined >= 4


def test_no_copper_in_holes_and_no_ink_on_lands():
    layers = board(3).layers
    assert (layers.copper.astype(int) + layers.hole <= 255).all()
    assert (layers.silk.astype(int) + layers.finish <= 255).all()
    assert layers.hole.any() and layers.silk.any()


# Structure of the ten kinds


@pytest.mark.parametrize("seed", SEEDS)
def test_open_breaks_a_net(seed):
    made = broken("open", seed)
    before, n = pieces(made.board.layers.copper)
    after, m = pieces(made.layers.copper)
    assert m == n + 1
    split = [net for net in range(1, n + 1) if len(np.unique(after[(before == net) & (after > 0)])) == 2]
    assert len(split) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_short_joins_two_nets(seed):
    made = broken("short", seed)
    before, n = pieces(made.board.layers.copper)
    after, m = pieces(made.layers.copper)
    assert m == n - 1
    joined = [net for net in range(1, m + 1) if len(np.unique(before[(after == net) & (before > 0)])) == 2]
    assert len(joined) == 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kind", "sign"), [("mouse_bite", -1), ("spur", 1)])
def test_bite_and_spur_leave_the_circuit_whole(kind, sign, seed):
    made = broken(kind, seed)
    before, after = made.board.layers.copper, made.layers.copper
    assert pieces(after)[1] == pieces(before)[1] and spaces(after) == spaces(before)
    change = (after >= 128).astype(int) - (before >= 128)
    assert np.all(change * sign >= 0) and np.abs(change).sum() >= 5
    # Both happen at a rim: the changed region touches copper and empty space.
    around = ndimage.binary_dilation(change != 0, np.ones((3, 3))) & (change == 0)
    assert (before[around] >= 128).any() and (before[around] < 128).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_spurious_copper_is_an_island(seed):
    made = broken("spurious_copper", seed)
    before, after = made.board.layers.copper >= 128, made.layers.copper >= 128
    island = after & ~before
    assert island.any() and not (before & ~after).any()
    assert not (ndimage.binary_dilation(island, np.ones((3, 3))) & before).any()
    assert pieces(made.layers.copper)[1] == pieces(made.board.layers.copper)[1] + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_pin_hole_is_surrounded_by_copper(seed):
    made = broken("pin_hole", seed)
    before, after = made.board.layers.copper >= 128, made.layers.copper >= 128
    lost = before & ~after
    rim = ndimage.binary_dilation(lost) & ~lost
    assert lost.any() and after[rim].all()
    assert spaces(made.layers.copper) == spaces(made.board.layers.copper) + 1


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_hole_closes_a_drilled_land(seed):
    made = broken("missing_hole", seed)
    before, after = made.board.layers, made.layers
    gone = (before.hole >= 128) & (after.hole < 128)
    assert ndimage.label(before.hole >= 128)[1] == ndimage.label(after.hole >= 128)[1] + 1
    assert (after.copper[gone] >= 128).all() and (before.copper[gone] < 128).all()


@pytest.mark.parametrize("kind", ["scratch", "stain"])
@pytest.mark.parametrize("seed", SEEDS)
def test_scratch_and_stain_leave_the_copper_alone(kind, seed):
    made = broken(kind, seed)
    assert np.array_equal(made.layers.copper, made.board.layers.copper)
    assert getattr(made.layers, "wear" if kind == "scratch" else "stain").any()


def test_pad_defects_take_copper_or_plating_from_one_land():
    missing, unwet = 0, 0
    for seed in range(14):
        made = broken("pad_defect", seed)
        before, after = made.board.layers, made.layers
        lost = before.finish.astype(int) - after.finish > 127
        assert lost.any() and (before.finish[lost] >= 128).all() and (after.finish <= before.finish).all()
        no_copper = (before.copper >= 128) & (after.copper < 128)
        missing, unwet = missing + no_copper.any(), unwet + (not no_copper.any())
        near = [pad for pad in made.board.pads if pad.opening
                and (np.abs(np.argwhere(lost)[:, ::-1] - (pad.x, pad.y)) <= (pad.width / 2 + 4, pad.height / 2 + 4)).all()]
        assert near
    assert missing >= 2 and unwet >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_several_defects_keep_apart(kind):
    made = broken(kind, 1, count=3)
    assert 1 <= len(made.windows) <= 3
    _, _, mask = made.scenes()
    for window in made.windows:
        assert mask[window].any()
    if kind in ("open", "short"):
        change = nets(made.layers.copper)[0] - nets(made.board.layers.copper)[0]
        assert change == len(made.windows) * (1 if kind == "open" else -1)


def plain_bench(copper: np.ndarray) -> Bench:
    """A bench whose board has this copper and nothing else."""
    one = board(0, size=128)
    empty = np.zeros_like(copper)
    layers = Layers(copper, empty, empty.copy(), empty.copy(), empty.copy(), empty.copy(), empty.copy(), empty.copy())
    return Bench(replace(one, layers=layers), generator(0))


def square(x: float, y: float, half: float) -> np.ndarray:
    return np.array([(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)])


def test_etching_is_refused_unless_the_circuit_changes_as_demanded():
    copper = np.zeros((128, 128), np.uint8)
    copper[20:28, 10:118] = copper[60:68, 10:118] = copper[90:120, 20:50] = 255
    bench = plain_bench(copper)
    through, nibble, inside = square(60, 24, 8), square(60, 20, 3), square(35, 105, 4)
    bridge, island = np.array([(58, 26), (62, 26), (62, 62), (58, 62)]), square(100, 100, 5)
    for polygon, add, pieces_, holes in ((through, False, 0, 0), (nibble, False, 1, None), (inside, False, 0, 0), (bridge, True, 0, 0),
                                         (island, True, 0, 0), (bridge, True, 1, None), (square(35, 105, 1), False, 0, 0)):
        assert not bench.etch(polygon, add, pieces_, holes)
    assert np.array_equal(bench.layers.copper, copper) and bench.windows == []
    for polygon, add, pieces_, holes in ((through, False, 1, 0), (inside, False, 0, 1), (island, True, 1, 0)):
        assert bench.etch(polygon, add, pieces_, holes)
    assert bench.etch(square(90, 60, 3), False, 0, 0)  # a bite
    assert not bench.etch(square(104, 100, 5), False, 0, 0)  # too near to the island just made
    assert pieces(bench.layers.copper)[1] == 5 and spaces(bench.layers.copper) == 2


# Masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", ["green", "white", "bare"])
def test_mask_is_where_noise_free_photographs_differ(kind, style):
    for seed in range(20):
        try:
            made = add_defects(board(seed, style=style), kind, generator(seed), 2)
            break
        except DataError:
            continue
    clean, scene, mask = made.scenes()
    without, with_ = made.board.photograph(), made.board.photograph(made.layers)
    assert np.array_equal(mask, (without != with_).any(axis=2)) and mask.any()
    assert np.array_equal(expose(clean, made.board.exposure), without) and np.array_equal(expose(scene, made.board.exposure), with_)
    # The mask stays within a pixel of what changed on the board.
    changed = np.any([getattr(made.layers, name) != getattr(made.board.layers, name) for name in LAYERS], axis=0)
    assert not (mask.astype(bool) & ~ndimage.binary_dilation(changed, np.ones((3, 3)))).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 127), st.integers(0, 127), st.integers(1, 128), st.integers(1, 128))
def test_windows_render_as_the_whole(row, col, height, width):
    one = board(2, size=128)
    window = slice(row, min(128, row + height)), slice(col, min(128, col + width))
    whole = render(one.layers, one.style, one.surface)
    assert np.array_equal(render(one.layers, one.style, one.surface, window), whole[(slice(None), *window)])


# The data set


def digest(sample: Sample) -> str:
    arrays = sample.image, sample.mask, sample.meta["template"]()
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_items_do_not_depend_on_each_other_or_on_the_process():
    options = {"size": 160, "seed": 4, "beta": 1.0, "train": 3}
    forward = [digest(sample) for sample in PcbBoards(10, **options).test]
    take_shot.cache_clear()
    backward = [digest(sample) for sample in reversed(PcbBoards(10, **options).test)]
    assert forward == backward[::-1] and len(set(forward)) == 10
    code = ("from test_pcb import digest, PcbBoards;"
            f"print(digest(PcbBoards(10, **{options}).test[6]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=__file__.rsplit("/", 1)[0], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == forward[6]


def test_other_seeds_and_splits_are_other_boards():
    boards = [PcbBoards(10, size=128, seed=seed, train=2, validation=1) for seed in (0, 1)]
    images = [sample.image for one in boards for sample in (*one.train, *one.validation, *one.test[:2])]
    assert len({image.tobytes() for image in images}) == len(images)
    assert boards[0].fingerprint() != boards[1].fingerprint()
    assert boards[0].fingerprint() == PcbBoards(10, size=128, seed=0, train=2, validation=1).fingerprint()


def test_samples_follow_the_contract():
    boards = PcbBoards(12, size=128, seed=2, train=2, validation=1, good=1)
    assert boards.simulated and boards.classes == ("normal", *KINDS) and len(boards.test) == 13
    assert len({sample.name for split in boards.splits.values() for sample in split}) == 16
    for sample in boards.test:
        assert sample.image.dtype == np.uint8 and sample.image.shape == (128, 128, 3) and sample.meta["simulated"]
        assert sample.label == ("good", *KINDS).index(sample.meta["kind"])
        assert set(np.unique(sample.mask)) == ({0, sample.label} if sample.label else {0})
    assert all(sample.label == 0 and sample.meta["kind"] == "good" for sample in (*boards.train, *boards.validation))


def test_what_a_caller_writes_does_not_leak_into_the_next_reading():
    sample = PcbBoards(10, size=128).test[0]
    image, mask = sample.image.copy(), sample.mask.copy()
    sample.image[:] = 0
    sample.mask[:] = 0
    assert np.array_equal(sample.image, image) and np.array_equal(sample.mask, mask)


def test_samples_travel_to_other_processes():
    sample = PcbBoards(10, size=128).test[3]
    assert digest(pickle.loads(pickle.dumps(sample))) == digest(sample)


def test_templates_are_aligned_and_free_of_the_defect():
    sample = pcb_sample(PcbOptions(size=256, seed=9, residual=0.5), "test", 0, "pad_defect")
    image, template = (cv2.cvtColor(a, cv2.COLOR_RGB2GRAY).astype(np.float64) for a in (sample.image, sample.meta["template"]()))
    shift, _ = cv2.phaseCorrelate(image, template)
    assert np.abs(shift).max() < 0.7
    exact = pcb_sample(PcbOptions(size=256, seed=9, residual=0.0), "test", 0, "pad_defect")
    difference = cv2.GaussianBlur(np.abs(exact.image.astype(float) - exact.meta["template"]()).max(axis=2), (0, 0), 2)
    assert np.median(difference[exact.mask > 0]) > 1.5 * np.median(difference[exact.mask == 0])


def test_every_kind_finds_a_place_on_the_smallest_boards():
    for sample in PcbBoards(60, size=128, seed=11, beta=1.0).test:
        assert (sample.mask == sample.label).any()


def test_designs_are_shared_between_splits():
    boards = PcbBoards(10, size=128, seed=1, train=4, designs=2)
    assert {sample.meta["group"] for sample in (*boards.train, *boards.test)} == {"design/0", "design/1"}
    one, two = (pcb_boards.make_board(256, generator(1, "d"), generator(seed, "p")) for seed in (1, 2))
    assert one.layout == two.layout and one.style == two.style
    assert not np.array_equal(one.photograph(), two.photograph())


def test_published_figures():
    boards = PcbBoards()
    counts = boards.class_counts()
    assert sum(counts.values()) == len(boards.test) == PUBLISHED_IMAGES == 10261 and len(counts) == 10
    assert boards.imbalance_factor == 271
    found = {kind: sum(sample.meta["kind"] == kind for sample in boards.test) for kind in KINDS}
    assert found == counts


def test_plan_and_summary_render_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("rendered")

    monkeypatch.setattr(pcb, "take_shot", refuse)
    summary = PcbBoards(300, good=5).summary()
    assert "simulated" in summary and "stain" in summary and "allow beta" in summary
    with pytest.raises(AssertionError, match="rendered"):
        PcbBoards(10).test[0].image  # noqa: B018 - the property is what renders


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3000), st.floats(1, 500))
def test_long_tail(classes, extra, beta):
    total = classes + extra
    counts = long_tail(total, classes, beta)
    assert len(counts) == classes and counts.sum() == total and counts.min() >= 1
    assert (np.diff(counts) <= 0).all()
    ideal = total / np.sum(beta ** (1 - np.linspace(0, 1, classes)))
    if classes > 2 and ideal >= 20 and beta > 3:
        assert counts.max() / counts.min() == pytest.approx(beta, rel=0.1)


# Looks and light


def test_styles_have_their_colours():
    def middle(style):
        return np.median(board(0, style=style).photograph().reshape(-1, 3), axis=0)

    assert np.argmax(middle("green")) == 1 and np.argmax(middle("blue")) == 2 and np.argmax(middle("red")) == 0
    assert middle("white").min() > 120 > 70 > middle("black").max()
    drawn = {make_board(128, generator(seed, "d"), generator(seed, "p")).style.name for seed in range(60)}
    assert len(drawn) >= 7 and drawn <= set(STYLES)


def test_light_is_mild_and_noise_is_as_declared():
    for seed in range(10):
        light = random_exposure(256, generator(seed))
        assert 0.6 < light.gain.min() and light.gain.max() < 1.4
    grey = np.full((3, 256, 256), 120, np.float32)
    noisy, quiet = expose(grey, light, generator(1)).astype(float), expose(grey, light)
    assert np.std(noisy - quiet) == pytest.approx(light.noise, rel=0.05)


# Bad input


@pytest.mark.parametrize(("arguments", "words"), [
    ({"size": 100}, "size 100"), ({"size": 256.0}, "256.0"), ({"count": -1}, "count -1"), ({"count": 9}, "at least 10"),
    ({"train": -2}, "train -2"), ({"kinds": ["opens"]}, "'open'"), ({"style": "gren"}, "'green'"), ({"beta": 0.5}, "beta 0.5"),
    ({"most": 0}, "most 0"), ({"designs": 0}, "designs 0"), ({"residual": -1}, "residual -1"), ({"seed": -3}, "seed -3"),
])
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ParameterError) as caught:
        PcbBoards(**arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_defects_are_named():
    one = board(0, 128)
    with pytest.raises(ParameterError, match="did you mean 'short'"):
        add_defects(one, "shrt", generator(0))
    with pytest.raises(ParameterError, match="count 0"):
        add_defects(one, "short", generator(0), count=0)
    with pytest.raises(ParameterError, match="unknown board style"):
        make_board(128, generator(0), generator(0), "pink")
    with pytest.raises(ParameterError, match="too small"):
        make_board(127, generator(0), generator(0))


def test_a_kind_without_a_place_is_reported(monkeypatch):
    monkeypatch.setitem(pcb_defects.DEFECTS, "open", lambda bench: False)
    with pytest.raises(DataError, match="no place for a defect of kind 'open'"):
        add_defects(board(0, 128), "open", generator(0))
    take_shot.cache_clear()
    with pytest.raises(DataError, match="'open'"):
        take_shot(PcbOptions(size=128), "test", 0, "open")


def test_an_empty_test_split_is_allowed():
    boards = PcbBoards(0, size=128, train=1)
    assert boards.test == [] and boards.imbalance_factor == 1.0 and set(boards.class_counts().values()) == {0}
