"""Sweeps: what a grid file may say, what runs and what is skipped, and that no kill costs a run or makes one twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from defectbook.core import DataError, DefectbookError, ParameterError, StoreError
from defectbook.practice import cells, sweeps
from defectbook.practice.cells import content_hash, error_lines, read_record, start_cell
from defectbook.practice.folders import FolderLock
from defectbook.practice.grids import MOST_CELLS, Cell, Grid, read_grid
from defectbook.practice.store_tools import find_rubbish, verify
from defectbook.practice.sweeps import divide, failures, plan, run_sweep, sweep_folder

# A tiny experiment: it stores one run of today's library, slowly enough to be killed in between.
CODE = '''
if fail_without and not Path(fail_without).exists():
    raise ValueError(f"{fail_without} is missing")
if kill_worker and not Path(kill_worker).exists():
    Path(kill_worker).write_text("once")
    cell = os.getppid()
    worker = int(Path(f"/proc/{cell}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, 9)
    time.sleep(30)
while wait_for and not Path(wait_for).exists():
    time.sleep(0.05)
store = Path(os.environ["DEFECTBOOK_STORE"])
target = store / "tiny" / run_id("tiny", {"seed": seed, "factor": factor})
if not target.exists():
    with whole_folder(target) as draft:
        (draft / "params.json").write_text(json.dumps({"experiment": "tiny", "parameters": {"seed": seed, "factor": factor},
                                                       "identity": {"seed": seed, "factor": factor}}))
        time.sleep(pause / 2)
        (draft / "metrics.csv").write_text(f"dataset,category,method,seed,metric,value\\ntoy,toy,tiny,{seed},value,{seed * factor}\\n")
        (draft / "scores.csv").write_text("name,kind,label,score\\n")
        (draft / "panels").mkdir()
        (draft / "panels" / "panels.json").write_text("[]\\n")
        time.sleep(pause / 2)
        (draft / "provenance.json").write_text(json.dumps({"schema": 1, "modules": ["core"], "library": LIBRARY, "preset": "smoke",
                                                           "device": "cpu", "seconds": {"all": time.perf_counter() - started}}))
'''
HEAD = '''
import json, os, time
from pathlib import Path
started = time.perf_counter()
from defectbook.core import sha256_json, whole_folder
def run_id(experiment, identity):  # as practice.runs has it, without its imports
    return sha256_json({"schema": 1, "experiment": experiment, **identity})[:12]
'''


def code_cell(source: str, name: str, tags: list[str]) -> dict:
    return {"cell_type": "code", "metadata": {"tags": tags} if tags else {}, "source": source, "outputs": [], "execution_count": None, "id": name}


def write_tiny(folder: Path, library: str | None = None) -> Path:
    from defectbook.practice.runs import library_hash

    code = CODE.replace("LIBRARY", repr(library or library_hash(("core",))))
    parameters = 'seed = 0\nfactor = 1.0\npause = 0.0\nfail_without = ""\nkill_worker = ""\nwait_for = ""'
    cells = [code_cell(parameters, "a", ["parameters"]), code_cell(HEAD, "b", []),
             {"cell_type": "markdown", "metadata": {}, "source": "## Storing", "id": "c"}, code_cell(code, "d", [])]
    notebook = {"cells": cells, "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}},
                "nbformat": 4, "nbformat_minor": 5}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.ipynb").write_text(json.dumps(notebook))
    return folder / "tiny.ipynb"


def write_grid(folder: Path, seeds: object = 2, fixed: dict | None = None, **top: object) -> Path:
    if not (folder / "tiny.ipynb").exists():
        write_tiny(folder)
    text = {"store": "results", "memory": 0.2, **top, "grids": [{"experiment": "tiny.ipynb", "seeds": seeds, "fixed": fixed or {}}]}
    (folder / "tiny.yaml").write_text(json.dumps(text))  # JSON is YAML
    return folder / "tiny.yaml"


def runs_in(store: Path) -> dict[str, dict[str, object]]:
    """All files of a store, seconds apart."""
    found = {}
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        content: object = path.read_bytes()
        if path.name == "provenance.json":
            content = {name: value for name, value in json.loads(content).items() if name != "seconds"}
        found[path.relative_to(store).as_posix()] = content
    return found


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# What a file may say ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "message"), [
    ("grid: []", "grid.yaml: unknown key 'grid': did you mean 'grids'"),
    ("[1, 2]", "no mapping; write `grids:`"),
    ("", "no mapping"),
    ("grids: []", r"grids=\[\] is not a list of grids"),
    ("grids: [7]", "grid 1: experiment=7 is not a name"),
    ("grids: [{experiment: pathcore_elpv}]", "did you mean 'patchcore_elpv'"),
    ("grids: [{experiment: nowhere.ipynb}]", "no such notebook"),
    ("grids: [{experiment: tiny.ipynb, varry: {}}]", "did you mean 'vary'"),
    ("grids: [{experiment: tiny.ipynb, fixed: [1]}]", "fixed=.* is not a mapping"),
    ("grids: [{experiment: tiny.ipynb, fixed: {sede: 1}}]", "unknown parameter 'sede': did you mean 'seed'"),
    ("grids: [{experiment: tiny.ipynb, fixed: {factor: many}}]", "factor='many' is str, expected float"),
    ("grids: [{experiment: tiny.ipynb, fixed: {factor: .nan}}]", "factor=nan is no literal"),
    ("grids: [{experiment: tiny.ipynb, fixed: {seed: 2026-01-01}}]", "seed=datetime.date.* is no literal; give text in quotes"),
    ("grids: [{experiment: tiny.ipynb, fixed: {store: elsewhere}}]", "parameter store: set it at the top"),
    ("grids: [{experiment: tiny.ipynb, fixed: {seed: 1}, seeds: 2}]", "parameter seed: it is fixed and varied"),
    ("grids: [{experiment: tiny.ipynb, vary: {factor: 1.0}}]", r"factor=1.0 is no list of values; write `factor: \[a, b\]`"),
    ("grids: [{experiment: tiny.ipynb, seeds: 0}]", "seeds=0 is not a number of seeds"),
    ("grids: [{experiment: tiny.ipynb, seeds: [1, 1]}]", r"seeds=\[1, 1\] is not"),
    ("grids: [{experiment: tiny.ipynb, seeds: 10000, vary: {factor: [1, 2]}}]", "20000 cells are more than the 10000"),
    ("processes: 0\ngrids: [1]", "processes=0 is not a whole number above 0"),
    ("memory: lots\ngrids: [1]", "memory='lots' is not GB"),
    ("threads: 1.5\ngrids: [1]", "threads=1.5"),
    ("gpus: -1\ngrids: [1]", "gpus=-1"),
    ("timeout: 0\ngrids: [1]", "timeout=0 is not seconds a cell"),
    ("store: [a]\ngrids: [1]", "store=.* is not a folder"),
    ("store: a\nstore: b\ngrids: [1]", "'store' is given twice, line 1"),
    ("grids: &a [*a]", "an alias, line 1"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("[" * 5000, "is not valid YAML"),
    (b"\xff\xfe\xff", "is not valid YAML"),
    ("grids: [{", "is not valid YAML"),
    ("#" * (65 << 10), "bytes, the limit is 65536"),
])
def test_a_wrong_grid_is_refused_in_one_line(tmp_path, text, message) -> None:
    write_tiny(tmp_path)
    with pytest.raises(ParameterError, match=message) as caught:
        read_grid(written(tmp_path, text))
    assert "\n" not in str(caught.value) and "grid.yaml" in str(caught.value) and len(str(caught.value)) < 600


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["grids", "experiment", "fixed", "vary", "seeds", "seed", "store", "memory", "factor", "tiny.ipynb"]) | st.text(max_size=5),
        inner | st.just("tiny.ipynb"), max_size=4), max_leaves=12).map(lambda value: json.dumps(value).encode())))
def test_only_our_errors_escape_from_any_file(tmp_path, data) -> None:
    write_tiny(tmp_path)
    try:
        assert isinstance(read_grid(written(tmp_path, data)), Grid)
    except DefectbookError as error:
        assert "\n" not in str(error)


def test_a_missing_or_broken_file_is_named(tmp_path) -> None:
    with pytest.raises(ParameterError, match="none.yaml: cannot be read"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "tiny.ipynb").write_text("{}")
    with pytest.raises(ParameterError, match="grid 1: .*tiny.ipynb: cannot be read as a notebook"):
        read_grid(written(tmp_path, "grids: [{experiment: tiny.ipynb}]"))


def test_the_product_and_its_keys(tmp_path) -> None:
    write_tiny(tmp_path)
    grid = read_grid(written(tmp_path, "grids: [{experiment: tiny.ipynb, vary: {factor: [1, 2.5]}, seeds: [0, 3]}, {experiment: tiny.ipynb}]"))
    assert [(cell.given["factor"], cell.given["seed"]) for cell in grid.cells] == [(1.0, 0), (1.0, 3), (2.5, 0), (2.5, 3)]
    assert grid.duplicates == 1  # the second grid's cell has the defaults, which are the first grid's first
    assert len({cell.key for cell in grid.cells}) == 4 and MOST_CELLS >= 10_000
    key = grid.cells[0].key
    notebook = json.loads((tmp_path / "tiny.ipynb").read_text())
    notebook["cells"][2]["source"] = "## Other words"
    (tmp_path / "tiny.ipynb").write_text(json.dumps(notebook))
    assert read_grid(tmp_path / "grid.yaml").cells[0].key == key  # prose does not count
    notebook["cells"][3]["source"] += "\nprint(1)"
    (tmp_path / "tiny.ipynb").write_text(json.dumps(notebook))
    assert read_grid(tmp_path / "grid.yaml").cells[0].key != key  # code does


# How a machine is divided ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cores", "free", "asked", "jobs", "expected"), [
    (8, 100.0, None, 20, (8, 1)), (8, 100.0, 2, 20, (2, 4)), (8, 100.0, 3, 20, (3, 2)), (8, 100.0, 16, 20, (16, 1)),
    (8, 100.0, None, 2, (2, 4)), (8, 5.0, None, 20, (2, 4)), (8, None, None, 20, (8, 1))])
def test_threads_are_divided_and_memory_is_checked(monkeypatch, cores, free, asked, jobs, expected) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(sweeps, "available_memory", lambda: free)
    share = divide(Grid(Path("g.yaml"), (), memory=2.0), jobs, processes=asked)
    assert (share.processes, share.threads) == expected


def test_too_little_memory_is_said_before_anything_runs(monkeypatch) -> None:
    monkeypatch.setattr(sweeps, "available_memory", lambda: 1.5)
    with pytest.raises(ParameterError, match="needs 2.0 GB and 1.5 are available"):
        divide(Grid(Path("g.yaml"), ()), 1)
    assert divide(Grid(Path("g.yaml"), ()), 4, peak_mb=700.0, processes=4).processes == 2  # what a cell was seen to need


# Running ------------------------------------------------------------------------------------------------------------------------------

def test_done_is_skipped_failed_is_listed_and_retried(tmp_path) -> None:
    flag = tmp_path / "flag"
    write_tiny(tmp_path)
    path = written(tmp_path, json.dumps({"store": "results", "memory": 0.2, "grids": [
        {"experiment": "tiny.ipynb", "fixed": {"seed": 1}}, {"experiment": "tiny.ipynb", "fixed": {"seed": 2, "fail_without": str(flag)}}]}))
    grid, folder = read_grid(path), sweep_folder(path, tmp_path / "_runs")
    assert plan(grid, folder).state.tolist() == ["new", "new"] and not (tmp_path / "_runs").exists()  # a dry run writes nothing

    first = run_sweep(grid, folder, processes=2)
    assert first.state.tolist() == ["done", "failed"] and first.ran.all()
    (run,) = (tmp_path / "results" / "tiny").iterdir()
    record = read_record(folder / "cells" / first.key[0])
    assert record["runs"] == {f"tiny/{run.name}": content_hash(run)} and record["peak_memory_mb"] > 10
    lines = failures(first, folder)
    assert lines[0] == "failed: tiny" and f"ValueError: {flag} is missing" in lines[-2] and Path(lines[-1].strip()).is_file()
    assert error_lines(Path(first.executed[1]))[-1] == f"ValueError: {flag} is missing"

    second = run_sweep(grid, folder)
    assert not second.ran.any() and second.state.tolist() == ["done", "failed"]

    flag.write_text("")
    third = run_sweep(grid, folder, retry_failed=True)
    assert third.state.tolist() == ["done", "done"] and third.ran.tolist() == [False, True]
    assert verify(sweeps_store(tmp_path)) == []


def sweeps_store(tmp_path: Path):
    from defectbook.practice.runs import RunStore

    return RunStore(tmp_path / "results")


def test_the_store_is_believed_more_than_the_record(tmp_path) -> None:
    """A lost run is made again; a stale or altered one is named, and computed again when asked for, the old one kept aside."""
    from defectbook.practice.runs import library_hash

    grid = read_grid(write_grid(tmp_path, seeds=[0]))
    folder = tmp_path / "sweep"
    run_sweep(grid, folder)
    (run,) = (tmp_path / "results" / "tiny").iterdir()
    whole = runs_in(tmp_path / "results")

    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().replace(",0.0", ",0.9"))
    altered = run_sweep(grid, folder)
    assert altered.state.tolist() == ["altered"] and not altered.ran.any()
    refreshed = run_sweep(grid, folder, refresh=True)
    assert refreshed.state.tolist() == ["done"] and refreshed.ran.all() and runs_in(tmp_path / "results") == whole
    (kept,) = (folder / "superseded" / "tiny").iterdir()
    assert ",0.9" in (kept / "metrics.csv").read_text()

    for path in sorted(run.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run.rmdir()
    assert plan(grid, folder).state.tolist() == ["lost"]
    assert run_sweep(grid, folder).state.tolist() == ["done"] and runs_in(tmp_path / "results") == whole

    made = json.loads((run / "provenance.json").read_text())
    assert made["library"] == library_hash(("core",))
    (run / "provenance.json").write_text(json.dumps({**made, "library": "0" * 16}))
    record = read_record(folder / "cells" / grid.cells[0].key)
    record["runs"] = {f"tiny/{run.name}": content_hash(run)}
    (folder / "cells" / grid.cells[0].key / "record.json").write_text(json.dumps(record))
    assert plan(grid, folder).state.tolist() == ["stale"]


def test_a_killed_kernel_is_a_failed_cell_and_the_others_go_on(tmp_path) -> None:
    write_tiny(tmp_path)
    notebook = json.loads((tmp_path / "tiny.ipynb").read_text())
    notebook["cells"][1]["source"] = "import os\nif seed == 1: os.kill(os.getppid(), 9)\n" + notebook["cells"][1]["source"]
    (tmp_path / "tiny.ipynb").write_text(json.dumps(notebook))
    table = run_sweep(read_grid(write_grid(tmp_path, seeds=[0, 1])), tmp_path / "sweep", processes=2)
    assert table.state.tolist() == ["done", "failed"] and "ended by SIGKILL" in table.why[1]


def test_a_kernel_that_dies_before_its_first_word_is_started_again() -> None:
    calls = []

    def act(good: int, words: str = "Kernel died before replying to kernel_info") -> Path:
        calls.append(good)
        if len(calls) < good:
            raise RuntimeError(words)
        return Path("executed.ipynb")

    assert cells._with_kernel(lambda: act(3)) == Path("executed.ipynb") and len(calls) == 3
    for good, words, tries in ((9, "Kernel died before replying to kernel_info", 3), (9, "another error", 1)):
        calls.clear()
        with pytest.raises(RuntimeError, match=words):
            cells._with_kernel(lambda good=good, words=words: act(good, words))
        assert len(calls) == tries


def test_two_sweeps_at_once(tmp_path) -> None:
    grid = read_grid(write_grid(tmp_path))
    with FolderLock(tmp_path / "sweep", "sweep"), pytest.raises(StoreError, match=rf"another sweep \(process {os.getpid()} on"):
        run_sweep(grid, tmp_path / "sweep")
    assert not (tmp_path / "results").exists()


def test_a_cell_that_takes_too_long_is_stopped_and_the_others_go_on(tmp_path) -> None:
    write_tiny(tmp_path)
    path = written(tmp_path, json.dumps({"store": "results", "memory": 0.2, "timeout": 25, "grids": [
        {"experiment": "tiny.ipynb", "fixed": {"seed": 1, "wait_for": str(tmp_path / "never")}},
        {"experiment": "tiny.ipynb", "fixed": {"seed": 2}}]}))
    table = run_sweep(read_grid(path), tmp_path / "sweep", processes=2)
    assert table.state.tolist() == ["failed", "done"] and "took more than 25 s" in table.why[0] and processes_of(tmp_path / "sweep") == []
    record = sweeps._run_one(read_grid(path).cells[0], tmp_path / "cell", tmp_path / "results", 1, timeout=0.5)  # what a Ray task does
    assert record["state"] == "failed" and "took more than 0.5 s" in record["error"][-1] and processes_of(tmp_path / "cell") == []


def test_unknown_engine_and_missing_ray(tmp_path, monkeypatch) -> None:
    grid = read_grid(write_grid(tmp_path))
    with pytest.raises(ParameterError, match="unknown engine 'rya': did you mean 'ray'"):
        run_sweep(grid, tmp_path / "sweep", engine="rya")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ParameterError, match=r"needs Ray; pip install 'defectbook\[ray\]'"):
        run_sweep(grid, tmp_path / "sweep", engine="ray")
    assert not (tmp_path / "sweep").exists()


def test_damaged_records_are_named(tmp_path) -> None:
    grid = read_grid(write_grid(tmp_path, seeds=[0]))
    place = tmp_path / "sweep" / "cells" / grid.cells[0].key
    place.mkdir(parents=True)
    (place / "record.json").write_text("{")
    with pytest.raises(StoreError, match="record.json: cannot be read"):
        plan(grid, tmp_path / "sweep")
    (place / "record.json").write_text('{"schema": 99}')
    with pytest.raises(StoreError, match="schema 99 is not 1"):
        plan(grid, tmp_path / "sweep")


# Kills --------------------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it from birth
from pathlib import Path
from defectbook.practice.grids import read_grid
from defectbook.practice.sweeps import run_sweep
table = run_sweep(read_grid(sys.argv[1]), Path(sys.argv[2]), processes=2)
sys.exit(0 if (table.state == "done").all() else 1)
"""


def start(path: Path, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, path, folder], env=environment, cwd=path.parent, stderr=subprocess.PIPE)


def processes_of(folder: Path) -> list[int]:
    """The cells that still run for a sweep's folder (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def undisturbed(tmp_path: Path, seeds: int, pause: float) -> dict:
    grid = read_grid(write_grid(tmp_path / "calm", seeds, {"pause": pause}))
    assert (run_sweep(grid, tmp_path / "calm" / "sweep", processes=2).state == "done").all()
    return runs_in(tmp_path / "calm" / "results")


def killed(tmp_path: Path, seeds: int, pause: float, moments: list[float]) -> int:
    """Kill a sweep at each of `moments`, seconds after its start, then let it end; returns how many kills met a running sweep."""
    path = write_grid(tmp_path / "rough", seeds, {"pause": pause})
    folder, met = tmp_path / "rough" / "sweep", 0
    for moment in moments:
        process = start(path, folder)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            met += 1
        process.wait()
        process.stderr.close()
    last = start(path, folder)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()[-2000:]
    return met


def assert_nothing_lost(tmp_path: Path, calm: dict, seeds: int) -> None:
    rough = tmp_path / "rough"
    assert runs_in(rough / "results") == calm  # nothing lost, nothing twice, no draft left, seconds apart byte for byte
    assert plan(read_grid(rough / "tiny.yaml"), rough / "sweep").state.tolist() == ["done"] * seeds
    table = plan(read_grid(rough / "tiny.yaml"), rough / "sweep")
    assert table.why.tolist() == ["1 run"] * seeds  # also of cells whose run was stored before the kill and only met again
    assert find_rubbish(sweeps_store(rough), draft_age=0) == [] and processes_of(rough / "sweep") == []


@pytest.mark.skipif(sys.platform != "linux", reason="orphaned cells are ended by Linux only; elsewhere they finish first")
def test_a_sweep_killed_twice_ends_as_if_it_had_not_been(tmp_path) -> None:
    calm = undisturbed(tmp_path, 2, 0.4)
    assert killed(tmp_path, 2, 0.4, [1.5, 3.0]) >= 1
    assert_nothing_lost(tmp_path, calm, 2)


def test_interrupting_leaves_no_process(tmp_path) -> None:
    path = write_grid(tmp_path, 2, {"pause": 60.0})
    process = start(path, tmp_path / "sweep")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "results" / "tiny").glob(".*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)  # its cells get time to end by themselves; a busy machine takes its own
    assert process.returncode != 0 and b"KeyboardInterrupt" in errors
    assert processes_of(tmp_path / "sweep") == []
    assert plan(read_grid(path), tmp_path / "sweep").state.tolist() == ["new", "new"]  # interrupted is not failed


# Ray ----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_ray_worker_is_killed_and_its_cell_done_elsewhere(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="the optional extra ray is not installed: pip install 'defectbook[ray]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    calm = undisturbed(tmp_path, 2, 0.2)
    marker = tmp_path / "killed"
    path = write_grid(tmp_path / "rough", 2, {"pause": 0.2, "kill_worker": str(marker)})
    table = run_sweep(read_grid(path), tmp_path / "rough" / "sweep", processes=2, engine="ray")
    assert marker.exists(), "no worker was killed"
    assert table.state.tolist() == ["done", "done"], failures(table, tmp_path / "rough" / "sweep")
    assert runs_in(tmp_path / "rough" / "results") == calm


def test_a_node_that_does_not_see_the_folder_sends_its_runs_back(tmp_path) -> None:
    """What a Ray task does on another computer, without Ray: nothing is written where the sweep lies, all comes back as bytes."""
    grid = read_grid(write_grid(tmp_path, [3]))
    (cell,) = grid.cells
    folder, store = tmp_path / "sweep" / "cells" / cell.key, tmp_path / "results"
    record, files = sweeps._cell_on_node(cell, folder, store, 1, (tmp_path / "no.lock", "token"), cell.notebook.read_bytes())
    assert record["state"] == "done" and not folder.exists() and not store.exists()
    job = sweeps._Job(cell, folder, store, None, "new", "")
    taken = sweeps._take_over(job, record, files)
    assert Path(taken["executed"]).is_file() and plan(grid, tmp_path / "sweep").state.tolist() == ["done"]
    with pytest.raises(DataError, match="would be written outside"):
        sweeps._take_over(job, record, {**files, "../../../from_a_node": b"x"})
    assert not list(tmp_path.parent.rglob("from_a_node"))
    with pytest.raises(StoreError, match="another version of the notebook"):
        sweeps._cell_on_node(cell, folder, store, 1, (tmp_path / "no.lock", "token"), cell.notebook.read_bytes().replace(b"seed * factor", b"seed"))


def test_drafts_of_a_killed_cell_are_removed_when_it_starts_again(tmp_path) -> None:
    grid = read_grid(write_grid(tmp_path, [0]))
    cell: Cell = grid.cells[0]
    store, folder = tmp_path / "results", tmp_path / "cell"
    draft, other = store / "tiny" / ".abc.xyz", store / "tiny" / ".def.uvw"
    for path in (draft, other):
        path.mkdir(parents=True)
    folder.mkdir()
    (folder / "seen.txt").write_text("draft tiny/.abc.xyz\nrun tiny/0\n")
    process = start_cell(cell, folder, store)
    process.kill(), process.wait()
    assert not draft.exists() and other.exists()  # somebody else's stays
