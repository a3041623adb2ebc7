"""The template of a method: written into a copy it is in order, exports, runs, and slips are one line."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import new_method  # noqa: E402


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the tool looks at: names of chapters and modules, and the table of contents."""
    for folder, pattern in (("nbs/methods", "*.ipynb"), ("defectbook", "*.py"), ("defectbook/methods", "*.py")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for path in (ROOT / folder).glob(pattern):
            (tmp_path / folder / path.name).touch()
    shutil.copy(ROOT / "_quarto.yml", tmp_path)
    return tmp_path


def test_the_chapter_is_in_order_and_listed(checkout: Path, capsys) -> None:
    assert new_method.main(["51", "mean_image", 'How "far" from the mean', "--root", str(checkout)]) == 0
    said = capsys.readouterr().out
    assert "nbs/methods/51_mean_image.ipynb is written" in said and "is listed in _quarto.yml" in said and "DETECTORS" in said
    path = checkout / "nbs" / "methods" / "51_mean_image.ipynb"
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.startswith('# How "far" from the mean\n') and "class MeanImage:" in text and "default_exp methods.mean_image" in text
    assert "my_method" not in text and "MyMethod" not in text
    for part in ("**You will be able to**", "## The question", "## Where it fails", "## Recap", "## Exercises", "## References", "<details>"):
        assert part in text
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    lines = (checkout / "_quarto.yml").read_text().splitlines()
    place = lines.index("        - nbs/methods/51_mean_image.ipynb")
    assert lines[place - 1].strip() < "- nbs/methods/51_mean_image.ipynb" and "nbs/methods/" in lines[place - 1]
    assert len(lines) == len((ROOT / "_quarto.yml").read_text().splitlines()) + 1


def test_a_letter_may_follow_and_order_holds(checkout: Path) -> None:
    for number, name in (("53", "third"), ("40b", "second")):
        path = new_method.write_chapter(number, name, "T", checkout)
        assert new_method.list_chapter(path, checkout)
    listed = [line.strip() for line in (checkout / "_quarto.yml").read_text().splitlines() if "nbs/methods/" in line]
    assert listed == sorted(listed) and "- nbs/methods/40b_second.ipynb" in listed


def test_without_a_table_of_contents_it_says_so(checkout: Path, capsys) -> None:
    (checkout / "_quarto.yml").unlink()
    assert new_method.main(["51", "mean_image", "T", "--root", str(checkout)]) == 0
    assert "add it to _quarto.yml" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "name", "title", "words"), [
    ("40", "mine", "T", "40 is 40_patchcore.ipynb; the next free number is 51"),
    ("42b", "mine", "T", "42b is 42b_ensemble.ipynb"),
    ("5", "mine", "T", "'5' is no chapter's number; methods have 40 to 59, such as 51"),
    ("60", "mine", "T", "methods have 40 to 59"),
    ("51bb", "mine", "T", "is no chapter's number"),
    ("../51", "mine", "T", "is no chapter's number"),
    ("51", "pni", "T", "pni is a module of methods already"),
    ("51", "core", "T", "core is a module of defectbook already"),
    ("51", "MyMethod", "T", "'MyMethod' is no module's name"),
    ("51", "class", "T", "'class' is no module's name"),
    ("51", "../mine", "T", "is no module's name"),
    ("51", "my__method", "T", "is no module's name"),
    ("51", "mine", "  ", "the title is empty"),
    ("51", "mine", "a\nb", "several lines"),
])
def test_slips_are_one_line(checkout: Path, capsys, number: str, name: str, title: str, words: str) -> None:
    before = sorted(checkout.rglob("*"))
    assert new_method.main([number, name, title, "--root", str(checkout)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("new_method: ") and words in said.err and said.err.count("\n") == 1
    assert sorted(checkout.rglob("*")) == before


def test_outside_a_checkout_it_says_so(tmp_path: Path, capsys) -> None:
    assert new_method.main(["51", "mine", "T", "--root", str(tmp_path)]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_the_template_exports_and_runs(tmp_path: Path) -> None:
    """As a contributor does it: the tool, the export, and then every cell of the new chapter against the new module."""
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("nbs", "defectbook"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    for file in ("settings.ini", "pyproject.toml", "_quarto.yml"):
        shutil.copy(ROOT / file, tmp_path / file)
    path = new_method.write_chapter("51", "mean_image", "How far from the mean", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    tools = Path(sys.executable).parent
    before = path.read_bytes()
    for command in (["nbdev_export"], ["nbdev_clean", "--fname", str(path)], ["nbdev_test", "--path", str(path)]):
        done = subprocess.run([tools / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    assert path.read_bytes() == before, "a chapter from the template is clean"
    module = (tmp_path / "defectbook" / "methods" / "mean_image.py").read_text()
    assert "MeanImage" in [node.name for node in ast.parse(module).body if isinstance(node, ast.ClassDef)]
    style = subprocess.run([tools / "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache", "defectbook/methods/mean_image.py"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert style.returncode == 0, style.stdout


def test_the_template_has_no_outputs() -> None:
    for cell in json.loads(new_method.TEMPLATE.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (not cell["outputs"] and cell["execution_count"] is None)
