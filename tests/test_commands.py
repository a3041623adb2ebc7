"""The command line: what it prints where, its exit codes, and one line with a suggestion for every slip."""

import json
import os
from pathlib import Path

import pytest
from test_runs import toy_run
from test_sweeps import write_grid

from defectbook.practice.cli import main
from defectbook.practice.runs import RunStore, provenance


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> RunStore:
    monkeypatch.setenv("DEFECTBOOK_STORE", str(tmp_path / "results"))
    filled = RunStore()
    for seed, value in enumerate((0.25, 0.75)):
        filled.save("toy", {"seed": seed, "data": "abc"}, {"seed": seed}, toy_run(value), provenance("cpu", "smoke", {"fit": 1.0}))
    return filled


def said(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        code = main(list(words))
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(("words", "message"), [
    (["swep", "x.yaml"], "unknown command 'swep': did you mean 'sweep'?"),
    (["sweep", "x.yaml", "--proceses", "2"], "did you mean --processes?"),
    (["sweep", "x.yaml", "--processes", "two"], "invalid int value: 'two'"),
    (["sweep", "none.yaml"], "none.yaml: cannot be read"),
    (["sweep"], "the following arguments are required: GRID"),
    (["runs", "verfy"], "did you mean 'verify'?"),
    (["runs", "tiy"], "did you mean 'toy'?"),
    (["runs", "show", "zzz"], "unknown run 'zzz'"),
    (["runs", "table", "toy", "--metric", "image_auorc"], "unknown metric 'image_auorc': did you mean 'image_auroc'?"),
    (["runs", "export", "--format", "xls"], "unknown --format 'xls'"),
    (["runs", "diff", "toy"], "required: second"),
    (["run", "pathcore_elpv"], "did you mean 'patchcore_elpv'?"),
    (["data", "chek"], "unknown action 'chek': did you mean 'check'?"),
    (["runs", "list", "--quiet", "--verbose"], "not allowed with argument"),
    ([], "required: COMMAND"),
])
def test_a_slip_is_answered_in_one_line(store, capsys, words, message) -> None:
    code, out, err = said(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("defectbook: ") and not out


@pytest.mark.parametrize("words", [["sweep"], ["runs"], ["run"], ["info"], ["runs", "export"], ["runs", "diff"], []])
def test_help_has_an_example(capsys, words) -> None:
    code, out, _ = said(capsys, *words, "--help")
    assert code == 0 and "example" in out and "defectbook " in out


def test_runs_lists_as_before(store, capsys) -> None:
    for words in (["runs"], ["runs", "list"], ["runs", "toy"], ["runs", "list", "toy"]):
        code, out, _ = said(capsys, *words)
        assert code == 0 and out.splitlines()[0] == f"2 runs in {store.path}" and "image_auroc 0.2500  [smoke]" in out
    assert said(capsys, "runs", "patchcore_elpv")[1].startswith("0 runs in")  # known, but not stored yet
    rows = json.loads(said(capsys, "runs", "--json")[1])
    assert sorted(row["value"] for row in rows) == [0.25, 0.75] and {row["experiment"] for row in rows} == {"toy"}


def test_show_diff_table_export(store, capsys, tmp_path) -> None:
    first, second = (store.find("toy", {"seed": seed, "data": "abc"}).id for seed in (0, 1))
    found = json.loads(said(capsys, "runs", "show", first, "--json")[1])
    assert found["run"] == first and found["metrics"][0]["value"] == 0.25 and found["provenance"]["schema"] == 1
    assert "image_auroc" in said(capsys, "runs", "show", first)[1]
    rows = json.loads(said(capsys, "runs", "diff", first, second, "--json")[1])
    assert [row["change"] for row in rows if row["part"] == "metrics"] == [0.5]
    (row,) = json.loads(said(capsys, "runs", "table", "toy", "--json")[1])
    assert row["mean"] == 0.5 and row["count"] == 2 and row["low"] < 0.25
    assert "| m |" in said(capsys, "runs", "export", "--format", "md")[1]
    code, out, err = said(capsys, "runs", "export", "toy", "--format", "tidy", "--out", str(tmp_path / "all.csv"))
    assert code == 0 and not out and "2 figures of 2 runs" in err and len((tmp_path / "all.csv").read_text().splitlines()) == 3
    assert said(capsys, "runs", "export", "--out", str(tmp_path / "all.csv"), "--quiet")[2] == ""


def test_verify_and_gc(store, capsys) -> None:
    code, out, err = said(capsys, "runs", "verify", "--seal")
    assert code == 0 and "no problems" in out and "2 runs were sealed" in err
    path = store.runs()[0].folder / "metrics.csv"
    path.write_text(path.read_text().replace(".25", ".95").replace(".75", ".95"))
    code, out, _ = said(capsys, "runs", "verify")
    assert code == 1 and "altered since it was sealed" in out
    assert len(json.loads(said(capsys, "runs", "verify", "--json")[1])) == 1
    draft = store.path / "toy" / ".0123456789ab.x1y2z3w4"
    draft.mkdir()
    os.utime(draft, (0, 0))
    code, out, err = said(capsys, "runs", "gc")
    assert code == 0 and "toy/.0123456789ab.x1y2z3w4  a draft" in out and "--apply" in err and draft.exists()
    assert said(capsys, "runs", "gc", "--apply")[0] == 0 and not draft.exists()
    assert said(capsys, "runs", "gc")[1].startswith("0 things")


def test_sweep_from_the_command_line(tmp_path, capsys, monkeypatch) -> None:
    """Dry run, run with a failing cell, and what is said of it."""
    monkeypatch.chdir(tmp_path)
    path = write_grid(tmp_path, seeds=[1], fixed={"fail_without": "nothing-here"})
    code, out, _ = said(capsys, "sweep", str(path), "--dry-run")
    assert code == 0 and "new" in out and not (tmp_path / "_runs").exists()
    code, out, err = said(capsys, "sweep", str(path))
    assert code == 1 and "failed" in out
    assert "ValueError: nothing-here is missing" in err and "--retry-failed" in err and "failed: tiny seed=1" in err
    (cell,) = json.loads(said(capsys, "sweep", str(path), "--json", "--quiet")[1])
    assert cell["state"] == "failed" and cell["ran"] is False and Path(cell["executed"]).is_file()


def test_run_lists_experiments_and_paths(capsys) -> None:
    paths = said(capsys, "run", "--list", "--paths")[1].split()
    assert paths and all(Path(path).is_file() for path in paths)
    listed = json.loads(said(capsys, "run", "--list", "--json")[1])
    assert [item["path"] for item in listed] == paths and "seed" in listed[0]["parameters"]


def test_info_names_what_is_missing_and_how_to_get_it(store, capsys) -> None:
    code, out, _ = said(capsys, "info", "--json")
    found = json.loads(out)
    assert code == 0 and found["runs"] == 2 and found["device"].startswith(("cpu", "cuda")) and found["versions"]["torch"] != "not installed"
    assert found["missing"] and all(item["what"] and item["get"] for item in found["missing"])
    text = said(capsys, "info")[1]
    assert "not here:" in text and all(item["what"] in text for item in found["missing"])


def test_data_list_as_json(capsys) -> None:
    rows = json.loads(said(capsys, "data", "list", "--json")[1])
    assert {"elpv"} <= {row["name"] for row in rows}
