"""The house: an import points to a lower floor only, and the exported code stands on its own."""

from pathlib import Path

import pytest
from conftest import ROOT

from defectbook.practice.house import FLOORS, imported_names

PACKAGE = ROOT / "defectbook"
# Chapters that DESIGN lets build on a neighbour of their own floor.
METHODS_ON_METHODS = {"pni": {"patchcore"}, "refinement": {"patchcore", "pni"}}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))


def imports(path: Path) -> list[str]:
    """The dotted names that a module imports, also inside functions; a star import is reported as such."""
    return imported_names(path, PACKAGE)


def order(module: str) -> str:
    """The chapter's number, which orders the modules of a floor, from the header that nbdev writes."""
    path = PACKAGE / Path(*module.split(".")).with_suffix(".py")
    (line,) = [line for line in path.read_text().splitlines() if "File to edit:" in line]
    return Path(line.split("File to edit:")[1].strip().rstrip(".")).stem


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts
    floor = FLOORS[own[0]]
    for name in imports(path):
        assert not name.endswith("*"), f"{path}: star import of {name}"
        assert name.split(".")[0] not in ("fastcore", "nbdev", "IPython"), f"{path}: exported code must not import {name}"
        parts = name.split(".")
        if parts[0] != "defectbook" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        other = FLOORS[parts[1]]
        assert other <= floor, f"{path}: imports {name} from floor {other}, above its own floor {floor}"
        if other == floor and floor > 0:
            assert parts[1] == own[0], f"{path}: imports its neighbour room {name}"
            if own[0] == "methods":
                assert parts[2] in METHODS_ON_METHODS.get(own[1], set()), f"{path}: a method imports the method {name}"
            else:
                assert order(".".join(parts[1:3])) < order(".".join(own)), f"{path}: imports the later chapter {name}"


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) >= 12
    assert any("defectbook.core" in imports(path) for path in MODULES)
