"""A public docstring names every parameter: what it is, its shape, unit or range."""

import inspect
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from bookparts import api  # noqa: E402
from bookparts.outline import PACKAGE, modules  # noqa: E402

# What needs no words of its own: it means the same everywhere, and the ground floor says what.
EVERYWHERE = {"device", "seed", "rng", "batch_size", "store", "folder", "path", "samples", "image", "images", "mask", "masks",
              "dataset", "args", "parser"}


def owed() -> set[str]:
    """Module.name of every public function and class whose docstring, or a comment beside the parameter, leaves a parameter unnamed."""
    found = set()
    for module in modules():
        source = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
        commented = set(re.findall(r"^\s+(\w+)\s*(?::[^#\n]*|=[^#\n]*|,)#", source, re.M))
        for entry in api.read_module(module)[1]:
            known = EVERYWHERE | commented | set(re.findall(r"\w+", entry.doc))
            missing = [name for name in entry.parameters if name not in known]
            if entry.kind in ("function", "class") and (missing or not entry.doc):
                found.add(f"{module}.{entry.name}: {', '.join(missing) or 'no docstring'}")
    return found


def test_docstrings_name_their_parameters() -> None:
    assert not (found := owed()), "these leave parameters unnamed:\n" + "\n".join(sorted(found))


@pytest.mark.parametrize("name", ["PatchCore", "MemoryBank"])
def test_help_says_what_the_page_says(name: str) -> None:
    from defectbook.methods.patchcore import PatchCore
    from defectbook.models.memory import MemoryBank

    shown = {"PatchCore": PatchCore, "MemoryBank": MemoryBank}[name]
    module = shown.__module__.removeprefix("defectbook.")
    (entry,) = [entry for entry in api.read_module(module)[1] if entry.name == name]
    assert inspect.getdoc(shown) == entry.doc
