"""The store: identity, wholeness, staleness, and tables read back as written."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from defectbook.core import Prediction, Sample, StoreError
from defectbook.data.datasets import Dataset
from defectbook.practice import runs as runs_module
from defectbook.practice.panels import Panel
from defectbook.practice.protocol import Run
from defectbook.practice.runs import RunStore, find_store, library_hash, provenance, run_id, table_of

IDENTITY = {"parameters": {"seed": 3}, "data": "abc"}


def toy_run(value: float = 0.25) -> Run:
    samples = [Sample(np.zeros((4, 4, 3), np.uint8), label=i % 2, name=f"s{i}", meta={"kind": "NA" if i else "good"}) for i in range(3)]
    metrics = pd.DataFrame([("toy", "NA", "m", 3, "image_auroc", value)],
                           columns=["dataset", "category", "method", "seed", "metric", "value"])
    return Run(Dataset("toy", "NA", Path("."), [], [], samples), "m", 3, metrics, Prediction([np.zeros((4, 4))] * 3, [0.1, 0.2, 0.3]), 0.15, (0, 1))


def save(root: Path, value: float = 0.25):
    panel = Panel(np.full((8, 38, 3), 120, np.uint8), "s1", "NA", "false alarm", 0.2, 0.15)
    return RunStore(root).save("toy", IDENTITY, {"seed": 3}, toy_run(value), provenance("cpu", "smoke", {"fit": 1.0}), [panel])


def test_a_run_is_read_back_as_written(tmp_path) -> None:
    stored = save(tmp_path)
    assert stored.value("image_auroc") == 0.25
    assert stored.metrics.category.tolist() == ["NA"]  # text, not a missing value
    assert stored.scores.kind.tolist() == ["good", "NA", "NA"] and stored.scores.score.tolist() == [0.1, 0.2, 0.3]
    (panel,) = stored.panels("false alarm")
    assert panel.strip.shape == (8, 38, 3) and panel.score == 0.2
    assert table_of([stored], "image_auroc").run.tolist() == [run_id("toy", IDENTITY)]


def test_the_first_writer_wins_and_nothing_else_is_left(tmp_path) -> None:
    save(tmp_path, 0.25)
    assert save(tmp_path, 0.75).value("image_auroc") == 0.25
    assert [path.name for path in (tmp_path / "toy").iterdir()] == [run_id("toy", IDENTITY)]


def test_many_writers_leave_one_whole_run(tmp_path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(save, [tmp_path] * 6)
    assert [path.name for path in (tmp_path / "toy").iterdir()] == [run_id("toy", IDENTITY)]
    assert RunStore(tmp_path).find("toy", IDENTITY).value("image_auroc") == 0.25


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs_module, "_write_panels", full_disk)
    with pytest.raises(StoreError, match="No space left on device"):
        save(tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


def test_another_library_makes_a_run_stale(tmp_path) -> None:
    stored = save(tmp_path)
    assert not stored.stale and stored.provenance["library"] == library_hash(tuple(stored.provenance["modules"]))
    path = stored.folder / "provenance.json"
    path.write_text(json.dumps({**stored.provenance, "library": "0" * 16}))
    assert stored.stale and table_of([stored], "image_auroc").stale.tolist() == [True]


def test_a_broken_run_is_named(tmp_path) -> None:
    stored = save(tmp_path)
    (stored.folder / "params.json").write_text("{")
    with pytest.raises(StoreError, match="params.json: cannot be read"):
        _ = stored.params
    with pytest.raises(StoreError, match="0 rows for metric 'aupro'"):
        stored.value("aupro")


def test_what_decides_the_result_decides_the_name() -> None:
    ids = {run_id("toy", {"seed": seed, "data": data}) for seed in range(3) for data in "ab"}
    assert len(ids) == 6 and run_id("toy", {"a": 1, "b": 2}) == run_id("toy", {"b": 2, "a": 1})
    assert run_id("toy", {}) != run_id("other", {})


def test_store_is_found_by_argument_variable_then_parents(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("DEFECTBOOK_STORE", raising=False)
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find_store() == tmp_path / "data" / "results"
    monkeypatch.setenv("DEFECTBOOK_STORE", str(tmp_path / "mine"))
    assert find_store() == tmp_path / "mine"
    assert find_store("here") == Path("here")


def test_a_finished_experiment_is_skipped(tmp_path, elpv_tree) -> None:
    """The second run of the same parameters reads the store: same run, no second fit."""
    from defectbook.practice.experiments import run_experiment

    given = {"preset": "smoke", "normal": 6, "device": "cpu", "data_root": str(elpv_tree), "store": str(tmp_path / "store")}
    run_experiment("patchcore_elpv", given, tmp_path / "one", live=False)
    (first,) = RunStore(tmp_path / "store").runs()
    written = (first.folder / "provenance.json").stat().st_mtime_ns
    run_experiment("patchcore_elpv", given, tmp_path / "two", live=False)
    (second,) = RunStore(tmp_path / "store").runs()
    assert second.id == first.id and (second.folder / "provenance.json").stat().st_mtime_ns == written


def test_a_declared_change_leaves_runs_fresh_and_any_other_does_not(tmp_path) -> None:
    stored = save(tmp_path)
    now = stored.provenance["library"]
    path = stored.folder / "provenance.json"
    path.write_text(json.dumps({**stored.provenance, "library": "0" * 16}))
    assert stored.stale
    ledger = tmp_path / "equal_code.json"

    def declare(*pairs: dict[str, str]) -> None:
        before = ledger.stat().st_mtime_ns if ledger.exists() else 0
        ledger.write_text(json.dumps({"declarations": [{"since": "", "reason": "", "checked": "", "pairs": entry} for entry in pairs]}))
        os.utime(ledger, ns=(before + 10**9, before + 10**9))  # two writes within one tick of the clock are still two

    declare({"0" * 16: "1" * 16})
    assert stored.stale, "the code has changed again since"
    declare({"0" * 16: "1" * 16}, {"1" * 16: now})
    assert not stored.stale
    declare({"0" * 16: "1" * 16}, {"1" * 16: "0" * 16})
    assert stored.stale, "a circle ends"
    for broken in ("[]", "{", '{"declarations": [1]}'):
        ledger.write_text(broken)
        os.utime(ledger, ns=(len(broken), len(broken)))
        with pytest.raises(StoreError, match="equal_code.json"):
            _ = stored.stale


def test_docstrings_are_told_from_code() -> None:
    import sys

    from conftest import ROOT

    sys.path.insert(0, str(ROOT / "tools"))
    from equal_code import without_docstrings

    code = 'def f(x):\n    """Old."""\n    return x  # why\n\n\nclass A:\n    """Old."""\n'
    assert without_docstrings(code) == without_docstrings(code.replace("Old", "New").replace("  # why", ""))
    for change in ("return x + 1", "return y"):
        assert without_docstrings(code) != without_docstrings(code.replace("return x", change))
    assert without_docstrings('x = "text"') != without_docstrings('x = "other"'), "a string that is no docstring is code"
