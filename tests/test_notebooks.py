"""The notebooks are the source: clean, exported, listed in the book, and they run."""

import ast
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BUDGET, NOTEBOOK_SECONDS, ROOT

from defectbook.practice.experiments import default_parameters, run_experiment

NBS = ROOT / "nbs"
NOTEBOOKS = sorted(path for path in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
CHAPTERS = [path for path in NOTEBOOKS if path.parent.name not in ("experiments", "results")]
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name == "experiments"]


def name_of(path: Path) -> str:
    return path.relative_to(NBS).as_posix()


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


@contextlib.contextmanager
def within_budget(path: Path) -> Iterator[None]:
    """Notes a notebook's seconds for the summary. The smaller of wall and processor time counts: other work on the machine stretches the one,
    two threads at a time the other. Between machines a processor second still differs by a third, so a test fails at twice the budget only."""
    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    # One thread: a chapter's arrays are small, and threads that wait for each other on a busy machine cost many times their work.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    started, used = time.perf_counter(), processor()
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
    NOTEBOOK_SECONDS[name_of(path)] = seconds = min(time.perf_counter() - started, processor() - used)
    assert seconds < 2 * BUDGET, f"{name_of(path)} took {seconds:.1f} s, its budget is {BUDGET}; make its examples smaller"


def test_export_and_clean_leave_no_difference(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "defectbook"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("settings.ini", "pyproject.toml", "index.ipynb"):
        shutil.copy(ROOT / file, copy / file)
    for command in (["nbdev_export"], ["nbdev_clean"], ["nbdev_clean", "--fname", "index.ipynb"]):
        subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], cwd=copy, check=True, capture_output=True)
    for path in sorted([*copy.rglob("*.ipynb"), *copy.rglob("*.py")]):
        original = ROOT / path.relative_to(copy)
        assert original.is_file(), f"{original} is not exported; run make export"
        assert original.read_text() == path.read_text(), f"{original} is not clean or not exported; run make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_figure_is_not_printed_as_text(path: Path) -> None:
    """A cell that draws and ends with a call that returns artists prints them above the figure; plt.show() ends it."""
    for cell in cells(path):
        if cell["cell_type"] != "code" or "plt." not in source(cell):
            continue
        last = ast.parse(source(cell)).body[-1]
        value = last.value if isinstance(last, ast.Expr) else None
        called = value.func.attr if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else ""
        assert not isinstance(value, ast.Tuple) and called not in ("suptitle", "set_title", "set", "legend", "colorbar", "plot", "imshow", "bar"), \
            f"{name_of(path)}: a cell ends with {source(cell).splitlines()[-1]!r}; end it with plt.show()"


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_chapter_runs_within_its_budget(path: Path) -> None:
    """In a process of its own, as nbdev_test would run it, so that one chapter's imports do not speed up the next."""
    with within_budget(path):
        done = subprocess.run([Path(sys.executable).with_name("nbdev_test"), "--path", path], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Success" in done.stdout


# all fourteen methods at once run in tests/test_all_methods.py
FEWER = {"all_methods": {"methods": "PatchCore; PNI-NP; PAEDID; RPCA; SSD"}}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiment_runs_at_smoke(path: Path, tmp_path: Path) -> None:
    given = {"preset": "smoke", "store": str(tmp_path / "store"), **FEWER.get(path.stem, {})}
    with within_budget(path):
        executed = run_experiment(path.stem, given, tmp_path / "runs", live=False)
    assert executed.is_file()
    assert list((tmp_path / "store" / path.stem).glob("*/metrics.csv")), "the experiment stored nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_chapter_is_in_order(path: Path) -> None:
    first = source(cells(path)[0])
    assert first.startswith("# ") and "\n> " in first, "a chapter opens with its title and a one-line quote"
    for cell in cells(path):
        assert cell["cell_type"] != "code" or not cell["outputs"], "source notebooks carry no outputs"
        assert ":::" not in source(cell) and "import *" not in source(cell)
    if path in CHAPTERS:
        text = "\n".join(source(cell) for cell in cells(path))
        for part in ("**You will be able to**", "## The question", "## Where it fails", "## Recap", "## Exercises", "## References", "<details>"):
            assert part in text, f"{name_of(path)}: {part!r} is missing"
        assert sum("assert " in source(cell) for cell in cells(path)) >= 1, "a chapter asserts the values that it shows"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_parameters_tag_survives_cleaning(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", copy], cwd=ROOT, check=True, capture_output=True)
    before, after = default_parameters(path), default_parameters(copy)
    assert before == after and {"preset", "seed", "store"} <= set(after)


def test_every_notebook_is_a_chapter_of_the_book() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import book

    landing, parts = book.read_chapters()
    listed = [chapter for chapters in parts for chapter in chapters]
    assert landing == "index.ipynb" and len(listed) == len(set(listed))
    pages = {path.relative_to(ROOT).as_posix() for path in NBS.rglob("*.md")}
    assert {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS} | pages == set(listed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_code_cells_parse(path: Path) -> None:
    for cell in cells(path):
        if cell["cell_type"] == "code":
            ast.parse(source(cell))
