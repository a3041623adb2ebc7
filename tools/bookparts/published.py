"""The index of printed tables and figures: where each is made again, which page shows it, and what the store holds."""

from functools import cache
from pathlib import Path

import yaml

from bookparts.outline import ROOT, find_chapter, read_chapter, source_link
from bookparts.store import stored

ITEMS = ROOT / "nbs" / "reference" / "published.yml"


@cache
def read_items() -> list[dict]:
    """The entries: paper, items, what, and any of experiments, pages, chapters (names of files) and without (why nothing makes it)."""
    return yaml.safe_load(ITEMS.read_text(encoding="utf-8"))


def _links(stems: list[str], page: str) -> str:
    found = [read_chapter(find_chapter(stem)) for stem in stems]
    return ", ".join(f"[{chapter.number or Path(chapter.path).stem}]({source_link(chapter.path, page)})" for chapter in found)


def told_runs(experiment: str) -> str:
    """"54 runs, small" with how many of them are stale."""
    found = stored(experiment)
    if not found.runs:
        return "no run yet"
    stale = "" if not found.stale else ", stale" if found.stale == found.runs else f", {found.stale} stale"
    return f"{found.runs} run{'s' if found.runs > 1 else ''}, {'/'.join(found.presets)}{stale}"


def tables_page(page: str, _: str = "") -> str:
    """A table a paper: item, what it shows, experiment with its runs, pages."""
    lines = []
    for paper in dict.fromkeys(item["paper"] for item in read_items()):
        lines += [f"## {paper}", "", "| printed | what it shows | made again by | runs | shown and checked on |", "|---|---|---|---|---|"]
        for item in (one for one in read_items() if one["paper"] == paper):
            experiments = item.get("experiments", [])
            made = "<br>".join(f"[{name}]({source_link(find_chapter(name), page)})" for name in experiments) or item.get("without", "")
            runs = "<br>".join(told_runs(name) for name in experiments)
            shown = _links([*item.get("pages", []), *item.get("chapters", [])], page)
            lines.append(f"| {', '.join(item['items'])} | {item['what']} | {made} | {runs} | {shown} |")
        lines.append("")
    return "\n".join(lines)
