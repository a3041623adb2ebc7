"""Groups of repeats, splits that keep them together, and the measure of leakage."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_trees import smooth, tile_tree

from defectbook.core import DataError, ParameterError, Sample
from defectbook.data.datasets import Dataset
from defectbook.data.groups import find_groups, look_hash, mask_shape, number_runs, same_look, same_mask, split_groups
from defectbook.data.leakage import leaked_share, resplit
from defectbook.data.public_sets import read_magnetic_tile


def surface(seed: int, gain: float = 1.0) -> np.ndarray:
    return np.repeat(np.clip(smooth(seed, (60, 80)) * gain, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def sample(name: str, seed: int = 0, gain: float = 1.0, **meta) -> Sample:
    return Sample(surface(seed, gain), name=name, meta=meta)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40), st.integers(0, 500))
def test_number_runs_against_a_loop(numbers, gap):
    runs = number_runs(numbers, gap)
    ordered = sorted(zip(numbers, runs.tolist(), strict=True))
    for (a, run_a), (b, run_b) in zip(ordered, ordered[1:], strict=False):
        assert (run_a == run_b) == (b - a <= gap)


def test_hash_survives_exposure_and_tells_surfaces_apart():
    for seed in range(5):
        near = np.mean(look_hash(surface(seed)) != look_hash(surface(seed, 0.6)))
        far = np.mean(look_hash(surface(seed)) != look_hash(surface(seed + 50)))
        assert near < 0.18 < 0.35 < far


def test_look_pairs_against_a_double_loop():
    samples = [sample(str(i), i // 3, 1 - 0.15 * (i % 3)) for i in range(12)]
    hashes = [look_hash(s.image) for s in samples]
    expected = [[i, j] for i in range(12) for j in range(i + 1, 12) if np.mean(hashes[i] != hashes[j]) <= 0.18]
    assert sorted(same_look(samples, 0.18).tolist()) == expected and len(expected) >= 12


def test_mask_shape_is_the_occupied_cells():
    rng = np.random.default_rng(0)
    mask = (rng.random((64, 96)) > 0.99).astype(np.uint8)
    cells = [[mask[4 * r:4 * r + 4, 6 * c:6 * c + 6].any() for c in range(16)] for r in range(16)]
    assert (mask_shape(mask).reshape(16, 16) == cells).all()


def test_tiny_masks_say_nothing():
    small = np.zeros((64, 64), np.uint8)
    small[1:3, 1:3] = 255
    large = np.zeros((64, 64), np.uint8)
    large[1:30, 1:3] = 255
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(same_mask([Sample(image, small, 1, "a"), Sample(image, small, 1, "b")])) == 0
    assert same_mask([Sample(image, large, 1, "a"), Sample(image, large, 1, "b"), Sample(image, None, 0, "c")]).tolist() == [[0, 1]]


def test_evidence_is_joined_across_rules():
    line = np.zeros((60, 80), np.uint8)
    line[5:50, 30] = 255
    a, b = sample("a", 1, group=7), sample("b", 2, group=7)
    c = Sample(surface(2, 0.8), line, 1, "c")  # looks like b
    d = Sample(surface(9), line, 1, "d")  # has the mask of c
    e = sample("e", 20)
    groups = find_groups([a, b, c, d, e])
    assert groups.members() == [("a", "b", "c", "d"), ("e",)] and groups.ids.tolist() == [0, 0, 0, 0, 1]
    assert groups.links == {"name": 1, "mask": 1, "look": 1}
    assert len(find_groups([a, b, c, d, e], mask=False, look=None)) == 4
    assert groups.leaks({"train": ["a", "e"], "test": ["c", "d"]}) == [{"train": ("a",), "test": ("c", "d")}]
    assert "5 images of 2 parts" in groups.summary()


def test_no_samples():
    assert len(find_groups([])) == 0 and find_groups([]).members() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 5), st.booleans())
def test_split_is_a_partition_by_groups(ids, seed, with_kinds):
    kinds = [f"kind{i % 3}" for i in ids] if with_kinds else None
    fractions = (0.6, 0.15, 0.25)
    parts = split_groups(ids, fractions, seed, kinds)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(ids)))
    owners = [set(np.asarray(ids)[part].tolist()) for part in parts]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    again = split_groups(ids, fractions, seed, kinds)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    if not with_kinds:
        largest = max(map(ids.count, ids))
        assert all(len(part) <= f * len(ids) + largest for part, f in zip(parts, fractions, strict=True))


def test_split_meets_shares_and_spreads_kinds():
    ids = np.arange(400) // 4
    kinds = np.where(ids < 20, "rare", "common")
    train, test = split_groups(ids, (0.75, 0.25), 0, kinds.tolist())
    assert (len(train), len(test)) == (300, 100) and (kinds[test] == "rare").sum() == 20
    assert any((a != b).any() for a, b in zip(split_groups(ids, (0.75, 0.25), 0), split_groups(ids, (0.75, 0.25), 1), strict=True))


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.2, -0.2), (1.0, 0.0)])
def test_bad_fractions(fractions):
    with pytest.raises(ParameterError, match="sum to 1"):
        split_groups([0, 1], fractions)


def test_leaked_share_counts_test_images():
    parts = [sample(f"{p}{s}", p, group=p) for p in range(4) for s in range(2)]
    dataset = Dataset("x", "", Path(), [parts[0], parts[2]], [parts[4]], [parts[1], parts[3], parts[5], parts[6]])
    assert leaked_share(dataset, dataset.groups(mask=False, look=None)) == 0.75
    with pytest.raises(DataError, match="the test is empty"):
        leaked_share(Dataset("x", "", Path(), parts, [], []))


@pytest.mark.parametrize("seed", range(4))
def test_resplit_by_part_does_not_leak(tmp_path, seed):
    dataset = read_magnetic_tile(tile_tree(tmp_path, ("Crack", "Break")), task="segmentation")
    groups = dataset.groups()
    assert len(groups) == 8 and groups.links["look"] and groups.links["mask"] and groups.links["name"]
    by_part = resplit(dataset, (0.5, 0.25, 0.25), seed, groups)
    assert leaked_share(by_part) == 0
    assert sorted(s.name for s in by_part.samples) == sorted(s.name for s in dataset.samples)
    assert leaked_share(resplit(dataset, (0.75, 0.25), seed), groups) > 0.5
    assert "by part: 8 groups" in by_part.summary()


def test_real_cracks_are_nine_tiles():
    root = os.environ.get("DEFECTBOOK_DATA")
    if not root or not (Path(root) / "MagneticTile").is_dir():
        pytest.skip("data set MagneticTile is not at hand: set DEFECTBOOK_DATA to the folder that holds MagneticTile/")
    cracks = read_magnetic_tile(Path(root) / "MagneticTile", "crack", task="segmentation")
    assert len({s.mask.tobytes() for s in cracks.samples}) == 57
    assert len({mask_shape(s.mask).tobytes() for s in cracks.samples}) == 36
    groups = cracks.groups()
    assert len(groups) == 9
    # Three series of one tile, far apart in number, are joined by their masks and looks.
    (series,) = [set(group) for group in groups.members() if "crack/exp4_num_85602" in group]
    assert len(series) == 15 and {"crack/exp1_num_86828", "crack/exp6_num_88201"} <= series
    assert leaked_share(cracks, groups) == 0
