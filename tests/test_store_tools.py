"""After the store: every kind of damage is found and named, only rubbish goes, and tables say what the files say."""

import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runs import toy_run

from defectbook.core import ParameterError, StoreError
from defectbook.practice.panels import Panel
from defectbook.practice.runs import RunStore, provenance, run_id
from defectbook.practice.store_tools import (
    collect,
    diff_runs,
    export_table,
    find_rubbish,
    find_run,
    read_seals,
    seal,
    summary_table,
    tidy,
    verify,
)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    filled = RunStore(tmp_path / "results")
    panel = Panel(np.full((8, 38, 3), 120, np.uint8), "s1", "NA", "false alarm", 0.2, 0.15)
    for seed, value in enumerate((0.25, 0.5, 0.75)):
        filled.save("toy", {"detector": "toy 1", "seed": seed, "data": "abc"}, {"seed": seed}, toy_run(value),
                    provenance("cpu", "smoke", {"fit": 1.0}), [panel], {"kinds": pd.DataFrame({"kind": ["NA"], "value": [value]})})
    return filled


def first(store: RunStore) -> Path:
    return store.find("toy", {"detector": "toy 1", "seed": 0, "data": "abc"}).folder


def age(path: Path, seconds: float) -> None:
    for file in [*path.rglob("*"), path]:
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_clean_store_is_clean_and_seals_agree_with_sha256sum(store) -> None:
    assert verify(store) == [] and seal(store) == 3 and verify(store) == []
    assert set(read_seals(store.path / "toy")) == {run.id for run in store.runs()}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=store.path / "toy", check=True)


@pytest.mark.parametrize(("file", "act", "message"), [
    ("metrics.csv", lambda path: path.write_bytes(path.read_bytes()[:-5]), "cut off in its last line"),
    ("metrics.csv", lambda path: path.write_bytes(b""), "missing or empty"),
    ("metrics.csv", lambda path: path.unlink(), "missing or empty"),
    ("metrics.csv", lambda path: path.write_text("a,b\n1,2\n"), r"has columns \['a', 'b'\]"),
    ("metrics.csv", lambda path: path.write_bytes(b"\xff\xfe\n"), "metrics.csv"),
    ("scores.csv", lambda path: path.write_bytes(path.read_bytes()[:-5]), "scores.csv: cut off"),
    ("tables/kinds.csv", lambda path: path.write_bytes(path.read_bytes()[:-2]), "kinds.csv: cut off"),
    ("params.json", lambda path: path.write_text("{"), "params.json: cannot be read"),
    ("params.json", lambda path: path.write_text("[]"), "TypeError"),
    ("params.json", lambda path: path.write_text(path.read_text().replace("abc", "abd")), "its identity belongs to run toy/"),
    ("params.json", lambda path: path.write_text(path.read_text().replace('"toy"', '"toys"')), "its identity belongs to run toys/"),
    ("provenance.json", lambda path: path.write_text(path.read_text().replace('"schema": 1', '"schema": 2')), "schema 2 is not 1"),
    ("provenance.json", lambda path: path.unlink(), "provenance.json: cannot be read"),
    ("panels/00_false_alarm.webp", lambda path: path.write_bytes(path.read_bytes()[:30]), "cannot be read as a picture"),
    ("panels/00_false_alarm.webp", lambda path: path.unlink(), "cannot be read as a picture"),
    ("panels/panels.json", lambda path: path.write_text("[1]"), "TypeError"),
])
def test_damage_is_found_without_seals(store, file, act, message) -> None:
    act(first(store) / file)
    problems = verify(store)
    assert problems and all("\n" not in line for line in problems)
    with pytest.raises(StoreError, match=message):
        raise StoreError(" ".join(problems))
    assert all(str(first(store)) in line for line in problems)  # and only this run is accused


@pytest.mark.parametrize(("act", "what"), [
    (lambda run: (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace("0.25", "0.99")), "altered"),
    (lambda run: (run / "note.txt").write_text("ours"), "added"),
    (lambda run: (run / "tables" / "kinds.csv").unlink(), "removed"),
])
def test_tampering_is_found_with_seals(store, act, what) -> None:
    seal(store)
    act(first(store))
    (problem,) = verify(store)
    assert f"{what} since it was sealed" in problem
    assert seal(store) == 0 and verify(store) == [problem]  # sealing again does not bless it


def test_a_sealed_run_that_is_gone_is_missed(store) -> None:
    seal(store)
    shutil.rmtree(first(store))
    (problem,) = verify(store)
    assert "was sealed and is gone" in problem
    (store.path / "toy" / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(StoreError, match="line 1: 'nonsense' is no checksum"):
        verify(store)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_any_changed_byte_is_found_with_seals_and_nothing_escapes(store, seed) -> None:
    rng = random.Random(seed)
    seal(store)
    path = rng.choice([path for path in sorted(first(store).rglob("*")) if path.is_file()])
    content = bytearray(path.read_bytes())
    before = bytes(content)
    if rng.random() < 0.5:
        content = content[:rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    assert verify(store)
    path.write_bytes(before)
    assert verify(store) == []


def test_only_rubbish_goes(store) -> None:
    old, young = store.path / "toy" / ".0123456789ab.x1y2z3w4", store.path / "toy" / ".0123456789ab.x1y2z3w5"
    fit, fresh_fit = store.path / ".fits" / "aa", store.path / ".fits" / "bb"
    for path in (old, young, fit, fresh_fit):
        path.mkdir(parents=True)
        (path / "part").write_text("half")
    (store.path / "toy" / ".metrics.csv.99.1").write_text("half a file")
    age(old, 2 * 86400), age(fit, 40 * 86400), age(store.path / "toy" / ".metrics.csv.99.1", 90000)
    others = [store.path / ".bash_history.1", store.path / ".config.d" / "x", store.path / "toy" / ".notes.txt", store.path / ".fits" / ".gitignore"]
    for path in others:  # a store may lie among other things
        path.parent.mkdir(exist_ok=True)
        path.write_text("*\n")
        age(path, 90 * 86400)
    rubbish = find_rubbish(store)
    assert {item.path.name for item in rubbish} == {old.name, ".metrics.csv.99.1", "aa"}
    before = [run.id for run in store.runs()]
    assert collect(rubbish) == sum(item.size for item in rubbish) > 0
    assert find_rubbish(store) == [] and young.is_dir() and fresh_fit.is_dir() and [run.id for run in store.runs()] == before
    assert all(path.is_file() for path in others)


def test_a_stale_run_goes_only_with_a_successor(store) -> None:
    made = json.loads((first(store) / "provenance.json").read_text())
    (first(store) / "provenance.json").write_text(json.dumps({**made, "library": "0" * 16}))
    assert find_rubbish(store) == []
    # Another data set, or another parameter, is another question.
    for identity in ({"detector": "toy 1", "seed": 0, "data": "other"}, {"detector": "toy 1", "seed": 0, "data": "abc", "size": 2}):
        store.save("toy", identity, {"seed": 0}, toy_run(), provenance("cpu", "smoke", {"fit": 1.0}))
    assert find_rubbish(store) == []
    newer = store.save("toy", {"detector": "toy 2", "seed": 0, "data": "abc"}, {"seed": 0}, toy_run(), provenance("cpu", "smoke", {"fit": 1.0}))
    (item,) = find_rubbish(store)
    assert item.path == first(store) and newer.id in item.reason


def test_runs_are_found_by_the_beginning_of_their_name(store) -> None:
    run = store.runs()[0]
    for text in (run.id, run.id[:6], f"toy/{run.id}", f"toy/{run.id[:5]}"):
        assert find_run(store, text).id == run.id
    for text, message in (("toy", "'toy' names 3 runs"), ("", "names 3 runs"), ("zzz", "unknown run 'zzz'")):
        with pytest.raises(ParameterError, match=message):
            find_run(store, text)


def test_diff_shows_what_differs_and_nothing_else(store) -> None:
    runs = [store.find("toy", {"detector": "toy 1", "seed": seed, "data": "abc"}) for seed in (0, 1)]
    found = diff_runs(*runs)
    assert found[found.part == "identity"].name.tolist() == ["seed"] and found[found.part == "metrics"].change.tolist() == [0.25]
    assert diff_runs(runs[0], runs[0]).empty


def test_the_tables_say_what_the_files_say(store) -> None:
    figures = tidy(store.runs())
    assert len(figures) == 3 and sorted(figures.value) == [0.25, 0.5, 0.75] and not figures.stale.any()
    (row,) = summary_table(figures).itertuples()
    half = 4.30265273 * 0.25 / 3 ** 0.5  # Student's t, two degrees of freedom, 97.5 %
    assert (row.mean, row.count, row.stale) == (0.5, 3, 0) and abs(row.high - 0.5 - half) < 1e-8 and abs(0.5 - row.low - half) < 1e-8
    alone = summary_table(figures.head(1)).iloc[0]
    assert np.isnan(alone.low) and np.isnan(alone.high)
    assert export_table(summary_table(figures.head(1)), "md").count("[") == 0
    assert tidy([]).empty and summary_table(tidy([])).empty


def test_export_escapes_and_refuses(store) -> None:
    table = summary_table(tidy(store.runs())).assign(method="a|b_c&d%")
    assert r"a\|b_c&d%" in export_table(table, "md") and r"a|b\_c\&d\%" in export_table(table, "tex")
    assert pd.read_csv(io.StringIO(export_table(table, "csv"))).shape == table.shape
    with pytest.raises(ParameterError, match="unknown format 'xls'"):
        export_table(table, "xls")


def _seal_and_save(root: Path, seed: int) -> None:
    store = RunStore(root)
    store.save("toy", {"seed": seed % 4}, {"seed": seed % 4}, toy_run(seed % 4), provenance("cpu", "smoke", {"fit": 1.0}))
    for _ in range(20):
        try:
            seal(store)
            return
        except StoreError as error:  # another sealer holds it: that is what the lock is for
            assert "is open in another .seal" in str(error)
            time.sleep(0.05)


def test_many_writers_and_sealers_leave_a_whole_store(tmp_path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_seal_and_save, [(tmp_path, seed) for seed in range(6)])
    store = RunStore(tmp_path)
    seal(store)
    assert {run.id for run in store.runs()} == {run_id("toy", {"seed": seed}) for seed in range(4)} == set(read_seals(tmp_path / "toy"))
    assert verify(store) == [] and find_rubbish(store, draft_age=0) == []
