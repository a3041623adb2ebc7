"""Markdown pages: their markers, such as `<!-- book:map data -->`, are replaced when the book is staged.

A marker stands alone on its line, so that a page stays readable where nothing replaces it.
"""

import json
import re
from functools import cache
from pathlib import Path

from bookparts import api, maps, published, store
from bookparts.outline import ROOT, all_imports, modules, quarto, read_chapter, source_link, told_time

SECONDS = ROOT / "nbs" / "parts" / "seconds.json"
MARKER = re.compile(r"^<!-- book:(\w+)(?: (\S+))? -->$", re.M)
CITATION = re.compile(r"(?<!\w)\[@([\w-]+(?:; ?@[\w-]+)*)\]")


@cache
def seconds() -> dict[str, int]:
    """Page -> the seconds it takes to run, as measured, or as its stored runs say."""
    kept = json.loads(SECONDS.read_text(encoding="utf-8"))["chapters"] if SECONDS.is_file() else {}
    return {**kept, **{path: round(found.seconds) for path, found in store.by_page().items() if found.runs}}


def chapters_of(page: str) -> list[str]:
    """The chapters of the part that `page` opens."""
    for part in quarto()["book"]["chapters"][1:]:
        if part["part"] == page:
            return part["chapters"]
    raise KeyError(f"{page}: no part of _quarto.yml is opened by this page")


def running_time(page: str, _: str) -> str:
    """How long the part takes to run, and how many exercises it has, in one paragraph."""
    chapters = chapters_of(page)
    times = [seconds()[path] for path in chapters if path in seconds()]
    exercises = sum(read_chapter(path).exercises for path in chapters)
    if not times:
        return f"{len(chapters)} pages to look things up; nothing runs."
    stored = Path(page).stem == "experiments"
    told = (f"{len(chapters)} experiments, of which {len(times)} have stored runs. Those took **{told_time(sum(times))}** in all, "
            "as their provenance says: two CPU cores, a process a run.") if stored else \
        (f"{len(chapters)} pages, which run in **{told_time(sum(times))}** altogether on one CPU core, each with a start of Python of its own."
         if len(chapters) > 1 else f"One page, which runs in **{told_time(sum(times))}** on one CPU core, the start of Python included.")
    return told + (f" **{exercises} exercises**, each with a solution folded away below it." if exercises else "")


def chapter_list(page: str, _: str) -> str:
    """The part's chapters in the order of the book, with quote, seconds and exercises."""
    lines = []
    for path in chapters_of(page):
        chapter = read_chapter(path)
        notes = [told_time(seconds()[path])] if path in seconds() else []
        notes += [f"{chapter.exercises} exercise{'s' if chapter.exercises > 1 else ''}"] if chapter.exercises else []
        lines.append(f"- [{chapter.title}]({source_link(path, page)})" + (f" ({', '.join(notes)})" if notes else "") + f"  \n  {chapter.quote}")
    return "\n".join(lines)


PAPERS = {"PatchCore": ["methods.patchcore"], "PNI": ["methods.pni", "methods.refinement", "methods.ensemble"],
          "PAEDID": ["methods.paedid", "methods.reconstruction"], "PROS": ["methods.pros", "methods.segmenters"], "ADAPT": ["methods.adaptation"],
          "FOIL": ["methods.imbalance"]}


def shared_parts(page: str, _: str) -> str:
    """Which parts of `models` and `data` two methods or more are built on, read from the imports."""
    used = {name: frozenset().union(*(all_imports(module) for module in own)) for name, own in PAPERS.items()}
    lines = ["| part | " + " | ".join(PAPERS) + " |", "|---|" + ":-:|" * len(PAPERS)]
    for module, path in modules().items():
        who = [name for name in PAPERS if module in used[name]]
        if module.startswith(("models.", "metrics.clicking", "data.synthesis", "data.mixing", "data.sampling")) and len(who) > 1:
            lines.append(f"| [{module}]({source_link(path, page)}) | " + " | ".join("●" if name in who else "" for name in PAPERS) + " |")
    return "\n".join(lines)


def bibliography(page: str, group: str) -> str:
    """The directive that prints the works of one group (a keyword of their entries)."""
    return f'```{{bibliography}}\n:list: bullet\n:filter: keywords % "{group}"\n```'


MARKERS = {"time": running_time, "chapters": chapter_list, "shared": shared_parts, "bibliography": bibliography,
           "map": lambda page, name: maps.draw(name, page), "tables": published.tables_page, "api": api.api_page, "modules": api.modules_list}


def staged_page(path: str) -> str:
    """The Markdown page at `path` (from the root) with its markers replaced and `[@key]` as a citation. Raises KeyError for an unknown marker."""
    text = (ROOT / path).read_text(encoding="utf-8")
    text = MARKER.sub(lambda found: MARKERS[found.group(1)](path, found.group(2) or ""), text)
    return CITATION.sub(lambda found: "{cite:p}`" + ",".join(key.strip().removeprefix("@") for key in found.group(1).split(";")) + "`", text)
