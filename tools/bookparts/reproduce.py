"""Boxes that say how to make a page again: the commands, the preset, the time, and what a laptop needs."""

import ast
import fnmatch
import re
from functools import cache
from pathlib import Path

from bookparts.outline import PACKAGE, ROOT, cells, find_chapter, page_link, told_time
from bookparts.store import EXPERIMENTS, papermill_commands, run_commands, stored, sweeps

SHOWN = 3  # commands of one experiment on a results page


@cache
def experiment_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (ROOT / EXPERIMENTS).glob("*.ipynb")))


def _texts(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """The top-level names of an exported module with the code that defines them."""
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.is_file():
        return {}
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return found


def read_experiments(path: str) -> list[str]:
    """The experiments whose runs the results page at `path` reads, in the order of their names.

    An experiment counts as read when its name, or a pattern that means it, stands in the page's code, or is written in a function of
    `practice` that the page imports, as a default such as `foil_runs(store, experiment="foil_models")`.
    """
    code = "\n".join(re.sub(r"(?m)^\s*[%!].*$", "", source) for kind, source in cells(path) if kind == "code")
    tree = ast.parse(code)
    words = {word for text in _texts(tree) for word in re.findall(r"[\w*]+", text)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("defectbook.practice."):
            defined = _definitions(node.module.removeprefix("defectbook."))
            for alias in node.names:
                if alias.name in defined:
                    words |= _texts(defined[alias.name])
    patterns = {word for word in words if word in experiment_names() or re.fullmatch(r"\w+_\*", word)}
    return [name for name in experiment_names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _stored(experiment: str) -> str:
    found = stored(experiment)
    if not found.runs:
        return "No run of it is stored yet."
    where = f", on {', '.join(found.devices)}" if found.devices else ""
    told = f"{found.runs} stored run{'s' if found.runs > 1 else ''}, preset `{'`, `'.join(found.presets)}`{where}"
    if found.seconds:
        told += f": {told_time(found.seconds)} in all, as they say themselves (rows that share a fit each count it)"
    told += f"; at most {found.memory / 1000:.1f} GB of memory." if found.memory else "."
    return told + (f" {found.stale} of them stale." if found.stale else "")


LAPTOP = ("**On a laptop**: no GPU and no account is needed. In a checkout, `make demo` once, then `. .venv/bin/activate`; elsewhere "
          "`pip install 'defectbook[elpv,run,sam]'`, and the commands make runs in `data/results` where you are. `defectbook info` says which data "
          "sets are here and how to get the others. Runs that are stored already are read, not made again; "
          "`-p preset=smoke` tries a command in seconds.")


def box(title: str, lines: list[str]) -> str:
    """An admonition of jupyter-book that is folded until somebody opens it."""
    return "\n".join([f"````{{admonition}} {title}", ":class: tip dropdown reproduce", "", *lines, "````"])


def _commands(lines: list[str]) -> list[str]:
    return ["```bash", *lines, "```", ""]


def experiment_box(path: str) -> str:
    """The box of an experiment's page."""
    name = Path(path).stem
    lines = [_stored(name), "", "From the folder of the checkout:", "", *_commands(run_commands(name))]
    if grids := sweeps().get(name):
        lines += ["All of its stored runs, a process each:", "", *_commands([f"defectbook sweep {grid}" for grid in grids])]
    return box("Reproduce this page", [*lines, "The same through papermill:", "", *_commands(papermill_commands(name)), LAPTOP])


def results_box(path: str) -> str:
    """The box of a results page: what it reads, and the commands that make it."""
    names = read_experiments(path)
    if not names:
        return ""
    lines = ["This page reads stored runs and computes nothing that takes long. They come from:", ""]
    for name in names:
        link = page_link(find_chapter(name), path)
        grids = sweeps().get(name)
        commands = [f"defectbook sweep {grid}" for grid in grids] if grids else run_commands(name)[:SHOWN]
        lines += [f'<a href="{link}">{name}</a>: {_stored(name)}', "", *_commands([*commands, papermill_commands(name)[0]])]
    return box("Reproduce this page", [*lines, "The page itself, when the runs are there:", "",
                                       *_commands([f"python tools/book.py --only {Path(path).stem}"]), LAPTOP])


def box_for(path: str) -> str:
    """The box of a chapter, "" for one that has none."""
    folder = Path(path).parent.name
    return experiment_box(path) if folder == "experiments" else results_box(path) if folder == "results" else ""
