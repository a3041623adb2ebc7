"""What is installed: the lists agree, and the wheel stands without the repository."""

import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_settings_and_pyproject_agree() -> None:
    assert sorted(settings()["requirements"].split()) == sorted(project()["dependencies"])
    assert f">={settings()['min_python']}" == project()["requires-python"]
    assert settings()["description"] == project()["description"]
    assert settings()["console_scripts"].replace("=", " = ", 1) == f"defectbook = {project()['scripts']['defectbook']}"


def test_nbdev_keeps_the_parameters_tag() -> None:
    assert settings()["allowed_cell_metadata_keys"] == "tags"


def test_environment_is_in_step() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (by_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert set(settings()["requirements"].split()) <= set(by_pip)
    named = {re.split(r"[<>=\[ ]", line)[0] for line in by_pip}
    # The packages that the project was commissioned with.
    assert {"jupyterlab", "jupyter-book", "nbdev", "torch", "segment-anything", "opencv-python", "faiss-cpu", "matplotlib",
            "ipywidgets", "papermill"} <= named
    assert "-e .[dev]" in by_pip and "-c constraints.txt" in by_pip


def test_constraints_satisfy_the_lower_bounds() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    for requirement in project()["dependencies"]:
        name, bound = requirement.split(">=")
        numbers = [tuple(int(part) for part in re.findall(r"\d+", text)[:3]) for text in (pinned[name], bound)]
        assert numbers[0] >= numbers[1], f"{name}: pinned {pinned[name]} is below {bound}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_library_assets_and_experiments(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "nbs" / "experiments").glob("*.ipynb"):
        assert f"defectbook/experiments/{path.name}" in names
    assert {"defectbook/core.py", "defectbook/assets/sources.json"} <= set(names)
    assert not [name for name in names if name.startswith(("nbs/", "tests/", "data/"))]


def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """No nbdev, no Jupyter, no repository: the library imports, the command answers, and PatchCore detects."""
    environment = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    install = [uv, "pip", "install", "--quiet", "--python", python] if uv else [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", f"{wheel}[elpv]"], check=True, capture_output=True)
    if subprocess.run([python, "-c", "import cv2"], capture_output=True).returncode:  # no libGL here
        subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "opencv-python"], check=True)
        subprocess.run([*install, "-c", ROOT / "constraints.txt", "opencv-python-headless"], check=True, capture_output=True)
    code = """
import importlib, importlib.util, pkgutil
import defectbook
for name in ("nbdev", "jupyterlab", "papermill", "fastcore"):
    assert importlib.util.find_spec(name) is None, name
for module in pkgutil.walk_packages(defectbook.__path__, "defectbook."):
    importlib.import_module(module.name)
from defectbook.data.datasets import read_elpv
from defectbook.methods.patchcore import PatchCore
cells = read_elpv(normal=6, validation=0)
detector = PatchCore(image_size=96, coreset="none", device="cpu").fit(cells.train)
assert detector.predict(cells.test[:1]).maps[0].shape == (300, 300)
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([environment / "bin" / "defectbook", "run", "--list", "--paths"], cwd=tmp_path, capture_output=True, text=True)
    assert str(environment) in listed.stdout and "patchcore_elpv.ipynb" in listed.stdout, listed.stderr
    refused = subprocess.run([environment / "bin" / "defectbook", "run", "patchcore_elpv"], cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2 and "pip install 'defectbook[run]'" in refused.stderr


def brought_by(extra: str) -> set[str]:
    """The distributions that installing defectbook[extra] brings, as they are installed here."""
    found: set[tuple[str, str]] = set()
    waiting = [("defectbook", extra)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            required = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        for one in required:
            if one.marker is None or one.marker.evaluate({"extra": wanted}):
                waiting += [(canonicalize_name(one.name), part) for part in ("", *one.extras)]
    return {name for name, _ in found}


def test_demo_brings_what_chapters_import() -> None:
    """`make demo` executes every chapter: what one of them imports itself may not come with the tests' extra alone."""
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"]
    here, brought = metadata.packages_distributions(), brought_by("demo")
    missing: dict[str, str] = {}
    for chapter in [quarto[0], *(chapter for part in quarto[1:] for chapter in part["chapters"])]:
        cells = json.loads((ROOT / chapter).read_text())["cells"] if chapter.endswith(".ipynb") else []
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        lines = "\n".join(line for source in sources if "eval: false" not in source for line in source.splitlines())
        # Imports inside a function are made when it is called, and say themselves which extra they need.
        for name in re.findall(r"^(?:import|from) ([A-Za-z_]\w*)", lines, re.M):
            packages = {canonicalize_name(one) for one in here.get(name, [])}
            if name not in {*sys.stdlib_module_names, "defectbook"} and not packages & brought:
                missing[name] = chapter
    assert not missing, f"not in the extra demo: {missing}"
