"""The greedy coreset against the rule as it is written, and what surrounds it: checkpoints, memory maps, projections."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, ParameterError
from defectbook.models import coreset
from defectbook.models.coreset import (
    _full_precision,
    _LazyGreedy,
    _run,
    collect_features,
    covering_radius,
    estimate_coreset_memory,
    jl_dimensions,
    project_features,
    select_greedy,
    select_greedy_approximate,
    select_greedy_naive,
    select_random,
    square_distances,
)

KINDS = ("normal", "grid", "copies", "constant", "nearly", "offset", "tiny", "huge", "sparse")


def make_features(kind: str, seed: int, count: int, dimensions: int) -> np.ndarray:
    """float32 features that are easy or hard to tell apart."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(count, dimensions))
    features = {
        "normal": lambda: normal,
        "grid": lambda: rng.integers(-1, 2, (count, dimensions)),  # many equal distances
        "copies": lambda: normal[rng.integers(0, max(1, count // 4), count)],
        "constant": lambda: np.full((count, dimensions), 0.1),
        "nearly": lambda: 1 + 1e-7 * rng.integers(-3, 4, (count, dimensions)),  # neighbouring float32 numbers
        "offset": lambda: normal * 1e-2 + 1e4,  # |x|^2 - 2xc + |c|^2 cancels completely
        "tiny": lambda: normal * 1e-22,  # squares underflow
        "huge": lambda: normal * 1e15,
        "sparse": lambda: normal * (rng.random((count, dimensions)) < 0.1),
    }[kind]()
    return features.astype(np.float32)


def use_small_pools(patch: pytest.MonkeyPatch) -> None:
    """Levels that few points reach, so that small inputs need many rounds."""
    def level(self) -> float:
        last = len(self.high) - min(len(self.high), 5)
        return max(0.0, float(np.partition(self.high, last)[last]))

    patch.setattr(_LazyGreedy, "_level", level)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 9), st.data())
def test_greedy_is_the_naive_rule(kind: str, seed: int, count: int, dimensions: int, data) -> None:
    features = make_features(kind, seed, count, dimensions)
    keep, start = data.draw(st.integers(1, count)), data.draw(st.integers(0, count - 1))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            use_small_pools(patch)
        assert select_greedy(features, keep, start).tolist() == select_greedy_naive(features, keep, start).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_naive_rule_beyond_one_pool(kind: str) -> None:
    features = make_features(kind, 1, 3000, 12)
    assert select_greedy(features, 60).tolist() == select_greedy_naive(features, 60).tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 8))
def test_naive_rule_on_integers_is_exact(seed: int, count: int, dimensions: int) -> None:
    """Integers leave no rounding: the rule in integer arithmetic, written without any of the library's functions."""
    features = np.random.default_rng(seed).integers(-3, 4, (count, dimensions))
    chosen = [0]
    while len(chosen) < min(count, 12):
        distances = ((features[:, None] - features[chosen][None]) ** 2).sum(2).min(1)
        distances[chosen] = -1
        chosen.append(int(np.argmax(distances)))
    assert select_greedy_naive(features, len(chosen)).tolist() == chosen
    assert select_greedy(features, len(chosen)).tolist() == chosen


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 700))
def test_a_pair_has_the_same_bits_in_any_company(seed: int, count: int, dimensions: int) -> None:
    rng = np.random.default_rng(seed)
    points, others = rng.normal(size=(2, count, dimensions)).astype(np.float32)
    together = square_distances(points, others)
    alone = [square_distances(points[i:i + 1], others[i:i + 1])[0] for i in range(count)]
    assert together.tolist() == alone
    assert square_distances(np.asfortranarray(points), others[::1]).tolist() == alone
    assert square_distances(points, others[0])[0] == alone[0]


@pytest.mark.parametrize("resident", [None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quick_distances_stay_within_their_bound(kind: str, resident: bool | None) -> None:
    """low <= yardstick <= high for every point that is up to date: the fact that everything rests on."""
    features = make_features(kind, 3, 300, 40)
    for chosen in ([0], [5, 17, 230], list(range(0, 300, 9))):
        greedy = _LazyGreedy(features, 60, chosen, resident=resident)
        rest = greedy._refresh(0.0)
        true = np.min([square_distances(features, features[index]) for index in chosen], axis=0)[rest]
        assert len(rest) == 300 - len(chosen)
        assert (greedy.low[rest] <= true).all() and (true <= greedy.high[rest]).all()
        assert kind in ("tiny", "offset", "constant", "nearly", "huge") or (greedy.high[rest] - greedy.low[rest]).max() < 1e-3 * true.max()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_chooses_the_same(kind: str, resident: bool) -> None:
    features = make_features(kind, 5, 2500, 24)
    greedy = _LazyGreedy(features, 50, [7], device="cpu", resident=resident)
    assert isinstance(greedy.products.centres, torch.Tensor)
    assert _run(greedy, "cpu").tolist() == select_greedy(features, 50, 7).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_chooses_the_same() -> None:
    features = make_features("normal", 5, 20_000, 64)
    assert select_greedy(features, 200, device="cuda").tolist() == select_greedy(features, 200).tolist()


def test_torch_multiplies_in_full_precision_and_puts_the_setting_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with _full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_device_is_named() -> None:
    with pytest.raises(ParameterError, match="'gpu' is not a torch device"):
        select_greedy(np.eye(3), 2, device="gpu")


def test_lazy_selection_visits_less_than_all() -> None:
    features = make_features("normal", 0, 20_000, 16)
    greedy = _LazyGreedy(features, 200, [0])
    _run(greedy, "cpu")
    assert greedy.visited < 0.5 * len(features) * 199


def test_smaller_coresets_are_prefixes() -> None:
    features = make_features("normal", 2, 4000, 10)
    large = select_greedy(features, 80)
    assert all((select_greedy(features, keep) == large[:keep]).all() for keep in (1, 2, 33))


@pytest.mark.parametrize("change, error, message", [
    (dict(keep=0), ParameterError, "keep at least 1"), (dict(keep=11), ParameterError, "a coreset of 11 from 10 features"),
    (dict(start=10), ParameterError, "start 10 of 10"), (dict(features=np.zeros(5)), ParameterError, r"shape \(5,\)"),
    (dict(features=np.array([[0.0], [np.nan], [1.0]])), DataError, "row 1 is not finite"),
    (dict(features=np.array([[0.0], [1e25], [1.0]])), DataError, "too large for float32"),
])
def test_greedy_refuses_nonsense(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        select_greedy(**{"features": np.eye(10), "keep": 2, **change})


# -- checkpoints ------------------------------------------------------------------------------------------------------

class Interrupted(Exception):
    pass


def test_interrupted_selection_goes_on_from_its_checkpoint(tmp_path, monkeypatch) -> None:
    features, path = make_features("copies", 4, 3000, 8), tmp_path / "coreset.json"
    whole = select_greedy(features, 90).tolist()
    add = _LazyGreedy._add

    def failing(self, index: int) -> None:
        if len(self.chosen) == 41:
            raise Interrupted
        add(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(_LazyGreedy, "_add", failing)
        with pytest.raises(Interrupted):
            select_greedy(features, 90, checkpoint=path)
    assert json.loads(path.read_text())["chosen"] == whole[:41]
    assert select_greedy(features, 90, checkpoint=path).tolist() == whole
    assert select_greedy(features, 20, checkpoint=path).tolist() == whole[:20]
    assert json.loads(path.read_text())["chosen"] == whole
    assert select_greedy(features, 120, checkpoint=path).tolist() == select_greedy(features, 120).tolist()
    assert [entry.name for entry in tmp_path.iterdir()] == ["coreset.json"]


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch) -> None:
    features, lengths = make_features("normal", 4, 500, 8), []
    monkeypatch.setattr(coreset, "write_whole", lambda path, text: lengths.append(len(json.loads(text)["chosen"])))
    select_greedy(features, 30, checkpoint=tmp_path / "c.json", checkpoint_seconds=0)
    assert lengths[-1] == 30 and len(lengths) > 10 and lengths == sorted(lengths)


@pytest.mark.parametrize("damage, message", [
    (lambda text: text[:20], "not a checkpoint of a coreset"), (lambda text: "[]", "not a checkpoint"),
    (lambda text: json.dumps({**json.loads(text), "chosen": [0, 5, 5]}), "impossible indices"),
    (lambda text: json.dumps({**json.loads(text), "chosen": [0, 999]}), "impossible indices"),
    (lambda text: json.dumps({**json.loads(text), "chosen": []}), "starts at index"),
])
def test_damaged_checkpoint_is_refused(damage, message: str, tmp_path) -> None:
    features, path = make_features("normal", 4, 100, 8), tmp_path / "coreset.json"
    select_greedy(features, 10, checkpoint=path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message) as caught:
        select_greedy(features, 20, checkpoint=path)
    assert str(path) in str(caught.value)


def test_checkpoint_of_others_is_refused(tmp_path) -> None:
    features, path = make_features("normal", 4, 100, 8), tmp_path / "coreset.json"
    select_greedy(features, 10, checkpoint=path)
    with pytest.raises(DataError, match=f"{path}: a checkpoint of other features"):
        select_greedy(features + 1, 10, checkpoint=path)
    with pytest.raises(DataError, match="of other features"):
        select_greedy(features[:50], 10, checkpoint=path)
    with pytest.raises(DataError, match=r"starts at index \[0\], not at 3"):
        select_greedy(features, 10, start=3, checkpoint=path)


@pytest.mark.slow
def test_killed_selection_resumes(tmp_path) -> None:
    path = tmp_path / "coreset.json"
    script = textwrap.dedent("""
        import sys, numpy as np
        from defectbook.models.coreset import select_greedy
        features = np.random.default_rng(0).standard_normal((60000, 256), dtype=np.float32)
        print(select_greedy(features, 3000, checkpoint=sys.argv[1], checkpoint_seconds=0.05).tolist()[:600])
    """)
    command, environment = [sys.executable, "-c", script, str(path)], {**os.environ, "PYTHONPATH": str(ROOT), "DEFECTBOOK_PROGRESS": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    before = json.loads(path.read_text())["chosen"]
    assert 1 < len(before) < 3000
    features = np.random.default_rng(0).standard_normal((60000, 256), dtype=np.float32)
    keep = len(before) + 20
    assert select_greedy(features, keep, checkpoint=path).tolist() == select_greedy(features, keep).tolist()


# -- memory -----------------------------------------------------------------------------------------------------------

def test_memory_map_gives_the_same_and_is_not_loaded(tmp_path) -> None:
    features = make_features("normal", 6, 40_000, 64)
    mapped = np.memmap(tmp_path / "features", np.float32, "w+", shape=features.shape)
    mapped[:] = features
    expected = select_greedy(features, 40).tolist()
    tracemalloc.start()
    assert select_greedy(mapped, 40).tolist() == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.9 * features.nbytes
    assert project_features(mapped, 5, 1).tolist() == project_features(features, 5, 1).tolist()
    assert covering_radius(mapped, np.array(expected)) == covering_radius(features, np.array(expected))


@pytest.mark.parametrize("kind, count, dimensions, keep",
                         [("normal", 20_000, 64, 200), ("normal", 5_000, 400, 50), ("grid", 30_000, 8, 3_000)])
def test_estimate_holds_and_is_not_far_off(kind: str, count: int, dimensions: int, keep: int) -> None:
    features = make_features(kind, 0, count, dimensions)
    tracemalloc.start()
    select_greedy(features, keep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = estimate_coreset_memory(count, dimensions, keep, mapped=True)
    assert 0.2 * estimate < peak < estimate
    assert estimate_coreset_memory(count, dimensions, keep) == estimate + features.nbytes


def test_too_little_memory_is_said_before_it_starts(monkeypatch) -> None:
    monkeypatch.setattr(coreset, "available_memory", lambda: 1000.0)
    with pytest.raises(ParameterError, match="a coreset of 2 from 3 x 3 features needs .* MB beside them, 0 MB are free"):
        select_greedy(np.eye(3), 2)


def test_available_memory_is_plausible() -> None:
    assert 2**20 < coreset.available_memory()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 4), st.booleans())
def test_collected_features_are_the_blocks(sizes: list[int], dimensions: int, mapped: bool) -> None:
    blocks = [np.random.default_rng(i).normal(size=(size, 2, dimensions)).astype(np.float32) for i, size in enumerate(sizes)]
    if not sum(sizes):
        return
    features = collect_features(iter(blocks), 2 * sum(sizes), dimensions, limit_mb=0 if mapped else None)
    assert isinstance(features, np.memmap) is mapped
    assert features.dtype == np.float32 and (features == np.concatenate([block.reshape(-1, dimensions) for block in blocks])).all()


@pytest.mark.parametrize("limit", [None, 0])
def test_collected_features_must_be_as_announced(limit, tmp_path) -> None:
    collect = lambda blocks, count=4: collect_features(iter(blocks), count, 3, limit, tmp_path)  # noqa: E731
    cases = ([np.eye(3)], "3 features where 4"), ([np.eye(3)] * 2, "at least 6 features where 4"), ([np.eye(4)], "4 dimensions among")
    for blocks, message in cases:
        with pytest.raises(DataError, match=message):
            collect(blocks)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_collecting_says_what_it_does_and_names_a_bad_folder(tmp_path, capsys) -> None:
    collect_features(iter([np.eye(3)]), 3, 3, limit_mb=0, folder=tmp_path)
    assert f"kept in a file in {tmp_path}" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be made a folder"):
        collect_features(iter([np.eye(3)]), 3, 3, limit_mb=0, folder=tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(coreset.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb", buffering=0))
    with pytest.raises(DataError, match="cannot hold 0 MB of features .No space left"):
        collect_features(iter([np.eye(3)]), 3, 3, limit_mb=0, folder=tmp_path)


# -- shortcuts --------------------------------------------------------------------------------------------------------

def naive_approximate(features: np.ndarray, keep: int, starts: np.ndarray) -> list[int]:
    """PatchCore's approximate greedy sampler, as its code reads, in float64."""
    anchor = np.mean([np.sqrt(square_distances(features, features[index])) for index in starts], axis=0)
    chosen = []
    for _ in range(keep):
        anchor[chosen] = -1
        chosen.append(int(np.argmax(anchor)))
        anchor = np.minimum(anchor, np.sqrt(square_distances(features, features[chosen[-1]])))
    return chosen


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(1, 6), st.data())
def test_approximate_start_is_the_original_codes(seed: int, count: int, dimensions: int, data) -> None:
    features = make_features("normal", seed, count, dimensions)
    starts, keep = data.draw(st.integers(1, min(count, 10))), data.draw(st.integers(1, count))
    places = coreset.generator(seed, "starts").choice(count, starts, replace=False)
    assert select_greedy_approximate(features, keep, starts, seed).tolist() == naive_approximate(features, keep, places)


def test_approximate_start_refuses_too_many_starts() -> None:
    with pytest.raises(ParameterError, match="10 start points of 3 features"):
        select_greedy_approximate(np.eye(3), 2)


@pytest.mark.parametrize("kind", ["sparse", "gaussian"])
def test_projection_keeps_squared_distances_in_the_mean(kind: str) -> None:
    features = make_features("normal", 0, 40, 100)
    ratios = []
    for seed in range(60):
        projected = project_features(features, 30, seed, kind)
        ratios.append(square_distances(projected[::2], projected[1::2]).sum() / square_distances(features[::2], features[1::2]).sum())
    assert abs(np.mean(ratios) - 1) < 0.05
    assert (project_features(features, 30, 1, kind) == project_features(features, 30, 1, kind)).all()


@settings(deadline=None)
@given(st.integers(2, 10**7), st.floats(0.05, 0.95))
def test_dimensions_of_the_lemma(count: int, eps: float) -> None:
    from sklearn.random_projection import johnson_lindenstrauss_min_dim

    assert jl_dimensions(count, eps) == max(1, johnson_lindenstrauss_min_dim(count, eps=eps))


def test_projection_refuses_nonsense() -> None:
    for change, message in ((dict(dimensions=0), "0 dimensions"), (dict(kind="dense"), "gaussian, sparse")):
        with pytest.raises(ParameterError, match=message):
            project_features(**{"features": np.eye(3), "dimensions": 2, **change})
    with pytest.raises(ParameterError, match="eps 1"):
        jl_dimensions(10, 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_greedy_radius_is_within_twice_any_other(seed: int, keep: int) -> None:
    features = make_features("normal", seed, 80, 3)
    assert covering_radius(features, select_greedy(features, keep)) <= 2 * covering_radius(features, select_random(80, keep, seed)) + 1e-4
