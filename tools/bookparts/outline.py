"""What a chapter says about itself, read from its notebook: title, quote, exercises, module, and what it imports and links to."""

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import yaml

from defectbook.practice.house import reachable, read_house

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "defectbook"


@dataclass(frozen=True)
class Chapter:
    """One page of the book. path: from the repository's root; module: what it exports, "data.foil", or "" where it exports nothing."""

    path: str
    title: str
    quote: str
    module: str
    exercises: int
    links: frozenset[str]

    @property
    def number(self) -> str:
        """"14b" of nbs/data/14b_inputs.ipynb; "" where the file has none."""
        found = re.match(r"\d+[a-z]*(?=_)", Path(self.path).name)
        return found.group(0).lstrip("0") if found else ""

    @property
    def short(self) -> str:
        """The title up to its colon."""
        title = self.title.replace("`", "")
        head = title.split(":")[0]
        return head if len(head) >= 8 else title


def cells(path: str) -> list[tuple[str, str]]:
    """(kind, source) of a notebook's cells; a Markdown file is one cell."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return [("markdown", text)]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]


@cache
def read_chapter(path: str) -> Chapter:
    """What the page at `path` (from the repository's root) says about itself."""
    found = cells(path)
    prose = "\n".join(source for kind, source in found if kind == "markdown")
    code = "\n".join(source for kind, source in found if kind == "code")
    title = re.search(r"^# (.+)$", prose, re.M)
    quote = re.search(r"^> (.+)$", prose, re.M)
    module = re.search(r"^#\| default_exp (\S+)$", code, re.M)
    exercises = prose.partition("## Exercises")[2].partition("\n## ")[0]
    links = {os.path.normpath((Path(path).parent / link).as_posix()) for link in re.findall(r"\]\(([^)#\s]+\.ipynb)[^)]*\)", prose)}
    return Chapter(path, title.group(1).strip() if title else "", quote.group(1).strip() if quote else "", module.group(1) if module else "",
                   exercises.count("<details>"), frozenset(links))


@cache
def house() -> pd.DataFrame:
    return read_house(PACKAGE)


def imported_modules(module: str) -> frozenset[str]:
    """The library's modules that `module` ("models.memory") imports itself, without `core`, which nearly all do."""
    return frozenset(house().loc[module, "imports"]) - {"core"}


@cache
def all_imports(module: str) -> frozenset[str]:
    """What `module` imports, and what that imports, down to the ground."""
    return frozenset(reachable(house(), [module])) - {module, "core"}


@cache
def quarto() -> dict:
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


def find_chapter(stem: str) -> str:
    """The path of the page whose file is called `stem`, such as "14b_inputs" or the part "data"; KeyError where the book has none."""
    for part in (parts := quarto()["book"]["chapters"][1:]):
        if Path(part["part"]).stem == stem:
            return part["part"]
    for part in parts:
        for path in part["chapters"]:
            if Path(path).stem == stem:
                return path
    raise KeyError(f"{stem}: no page of this name in _quarto.yml")


@cache
def modules() -> dict[str, str]:
    """Module -> the notebook that exports it, in the order of the book."""
    return {read_chapter(path).module: path for part in quarto()["book"]["chapters"][1:] for path in part["chapters"]
            if path.endswith(".ipynb") and read_chapter(path).module}


def page_link(target: str, source: str) -> str:
    """The address of the built page of `target` from that of `source`, both paths from the root."""
    return os.path.relpath(Path(target).with_suffix(".html"), Path(source).parent).replace(os.sep, "/")


def source_link(target: str, source: str) -> str:
    """The same between source files, for Markdown links that jupyter-book and Quarto resolve."""
    return os.path.relpath(target, Path(source).parent).replace(os.sep, "/")


def told_time(seconds: float) -> str:
    """"8 s", "3 min" or "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
