"""The stored runs behind a page: how many, how long they took, and which commands make them again."""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from bookparts.outline import ROOT
from defectbook.practice.runs import RunStore

COMMANDS = ROOT / "nbs" / "reference" / "commands.yml"
EXPERIMENTS = "nbs/experiments"


@dataclass(frozen=True)
class Stored:
    """What the store holds of an experiment. seconds: summed over runs; memory: the largest, in MB."""

    runs: int
    stale: int
    presets: tuple[str, ...]
    devices: tuple[str, ...]
    seconds: float
    memory: int


@cache
def stored(experiment: str) -> Stored:
    """What the store of this checkout, or the one that DEFECTBOOK_STORE names, holds of `experiment`."""
    runs = RunStore(_store()).runs(experiment)
    made = [run.provenance for run in runs]
    devices = {one["device"] for one in made} - {"auto"}  # "auto" says nothing about what was there
    return Stored(len(runs), sum(run.stale for run in runs), tuple(sorted({one["preset"] for one in made})), tuple(sorted(devices)),
                  sum(sum(one["seconds"].values()) for one in made), max((one.get("peak_memory_mb", 0) for one in made), default=0))


def _store() -> str:
    return os.environ.get("DEFECTBOOK_STORE") or str(ROOT / "data" / "results")


def by_page() -> dict[str, Stored]:
    """Page of an experiment -> what is stored of it."""
    return {path.relative_to(ROOT).as_posix(): stored(path.stem) for path in sorted((ROOT / EXPERIMENTS).glob("*.ipynb"))}


@cache
def settings() -> dict[str, list[dict]]:
    """Experiment -> the parameters with which its stored runs were made, a mapping a command; [{}] where the defaults did."""
    return yaml.safe_load(COMMANDS.read_text(encoding="utf-8"))


def run_commands(experiment: str) -> list[str]:
    """`defectbook run ...` for each setting."""
    return [" ".join(["defectbook run", experiment, "-p preset=small", *(f"-p {name}={shlex.quote(_text(value))}" for name, value in given.items())])
            for given in settings().get(experiment, [{}])]


def papermill_commands(experiment: str) -> list[str]:
    """The same without defectbook's own command, from the repository's root."""
    notebook = f"{EXPERIMENTS}/{experiment}.ipynb"
    return [" ".join(["papermill", notebook, "out.ipynb -p preset small",
                      *(f"-p {name} {shlex.quote(_text(value))}" for name, value in given.items())])
            for given in settings().get(experiment, [{}])]


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


@cache
def sweeps() -> dict[str, list[str]]:
    """Experiment -> the grids beside the experiments that hold it, by name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / EXPERIMENTS).glob("*.yaml")):
        for name in dict.fromkeys(_experiments_of(path)):
            found.setdefault(name, []).append(path.stem)
    return found


def _experiments_of(path: Path) -> Iterator[str]:
    for grid in yaml.safe_load(path.read_text(encoding="utf-8"))["grids"]:
        yield grid["experiment"]
