"""Maps of ideas: rows of boxes, each a chapter or a few that belong together, and arrows from what is built on to what builds on it.

What a map shows is written in nbs/parts/maps.yml; the drawing is an inline SVG, whose text can be selected and whose titles are links.
"""

import html
import textwrap
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from bookparts.outline import ROOT, find_chapter, page_link, read_chapter

WIDTH, GAP, LEVEL, LINE, PADDING = 760, 20, 56, 17, 9  # px: drawing, between boxes and rows, line, inside a box
CHARACTER, BOLD = 6.7, 7.3  # px a character of 12.5 px text takes, on the safe side
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0568c", "#8a6d00", "#5b7fd0")  # told apart by the colour-blind, seen on white and on black


@dataclass
class Box:
    """A box: its chapters' paths, and where it lies, in px."""

    name: str
    title: str
    chapters: list[str]
    kind: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)  # (text, path of the chapter it leads to, or "")
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0
    heads: int = 0  # how many of the lines are the title's


@cache
def read_maps() -> dict:
    return yaml.safe_load((ROOT / "nbs" / "parts" / "maps.yml").read_text(encoding="utf-8"))


def wrapped(text: str, width: float, character: float = CHARACTER) -> list[str]:
    return textwrap.wrap(text, max(8, int((width - 2 * PADDING + 4) / character)), break_long_words=False)


def width_of(name: str) -> int:
    return read_maps()[name].get("width", WIDTH)


def lay_out(name: str) -> tuple[list[Box], list[tuple[Box, Box]], float]:
    """Boxes with places, arrows, and the drawing's height. Raises KeyError for a chapter that the book has not."""
    plan, boxes, y = read_maps()[name], {}, 2.0
    level = plan.get("level", LEVEL)
    for row in plan["rows"]:
        shares = [box.get("share", 1) for box in row]
        room, x, row_boxes = width_of(name) - GAP * (len(row) - 1) - 4, 2.0, []
        for entry, share in zip(row, shares, strict=True):
            named = [stem.partition(" = ") for stem in entry.get("chapters", [])]  # "44_paedid", or "44_paedid = decompose" with words of its own
            chapters = [find_chapter(stem) for stem, _, _ in named]
            box = Box(entry["name"], entry["title"], chapters, entry.get("kind", ""), x=x, y=y, width=room * share / sum(shares))
            own = chapters[0] if len(chapters) == 1 else ""
            box.lines = [(line, own) for line in wrapped(entry["title"], box.width, BOLD)]
            box.heads = len(box.lines)
            if len(chapters) != 1:
                for path, (_, _, words) in zip(chapters, named, strict=True):
                    chapter = read_chapter(path)
                    box.lines += [(line, path) for line in wrapped(f"{chapter.number} {words or chapter.short}".strip(), box.width)]
            box.height = 2 * PADDING + LINE * len(box.lines)
            x += box.width + GAP
            row_boxes.append(box)
        tallest = max(box.height for box in row_boxes)
        for box in row_boxes:
            box.height = tallest
            boxes[box.name] = box
        y += tallest + level
    return list(boxes.values()), [(boxes[first], boxes[second]) for first, second, *_ in plan.get("arrows", [])], y - level + 2


def ports(arrows: list[tuple[Box, Box]]) -> dict[tuple[str, str, str], float]:
    """Where on its box each end of each arrow lies: ends at one edge are spread in the order of what they lead to. (first, second, end) -> x."""
    edges: dict[tuple[str, str], list] = {}
    for first, second in arrows:
        if first.y == second.y:
            continue
        down = first.y < second.y
        edges.setdefault((first.name, "below" if down else "above"), []).append((second.x + second.width / 2, first, second, "from"))
        edges.setdefault((second.name, "above" if down else "below"), []).append((first.x + first.width / 2, first, second, "to"))
    places = {}
    for ends in edges.values():
        ends.sort(key=lambda end: end[0])
        for index, (_, first, second, end) in enumerate(ends):
            box = first if end == "from" else second
            places[first.name, second.name, end] = box.x + box.width * (index + 1) / (len(ends) + 1)
    return places


def curve(first: Box, second: Box, places: dict) -> tuple[tuple[float, float], ...]:
    """The four points of the arrow's Bézier curve."""
    if first.y == second.y:
        y, right = first.y + min(first.height, second.height) / 2, first.x < second.x
        start, end = (first.x + first.width, second.x - 7) if right else (first.x, second.x + second.width + 7)
        return (start, y), (start, y), (end, y), (end, y)
    down = first.y < second.y
    x0, x1 = places[first.name, second.name, "from"], places[first.name, second.name, "to"]
    y0, y1 = (first.y + first.height, second.y - 7) if down else (first.y, second.y + second.height + 7)
    bend = (y1 - y0) * 0.55
    return (x0, y0), (x0, y0 + bend), (x1, y1 - bend), (x1, y1)


def point(curve: tuple[tuple[float, float], ...], t: float) -> tuple[float, float]:
    """The place at t in [0, 1] on a Bézier curve."""
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3)
    return tuple(sum(weight * place[axis] for weight, place in zip(weights, curve, strict=True)) for axis in (0, 1))


def draw(name: str, page: str) -> str:
    """The map as inline SVG without blank lines, for the page at `page` (a path from the root, to which links are relative)."""
    plan, (boxes, arrows, height) = read_maps()[name], lay_out(name)
    sources = list(dict.fromkeys(first.name for first, _ in arrows))
    places = ports(arrows)
    parts = [f'<div class="idea-map" tabindex="0" role="group" aria-label="{html.escape(plan["title"])}">',
             f'<svg viewBox="0 0 {width_of(name)} {height:.0f}" xmlns="http://www.w3.org/2000/svg" role="group" '
             f'aria-labelledby="map-{name}-title map-{name}-desc">',
             f'<title id="map-{name}-title">{html.escape(plan["title"])}</title>',
             f'<desc id="map-{name}-desc">{html.escape(describe(name))}</desc>', "<defs>"]
    for index, colour in enumerate(COLOURS):
        parts.append(f'<marker id="map-{name}-head{index}" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
                     f'markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>')
    parts.append("</defs>")
    for first, second in arrows:
        index = sources.index(first.name) % len(COLOURS)
        p = curve(first, second, places)
        parts.append(f'<path class="idea-arrow" d="M{p[0][0]:.1f} {p[0][1]:.1f}C' + " ".join(f"{x:.1f} {y:.1f}" for x, y in p[1:])
                     + f'" stroke="{COLOURS[index]}" marker-end="url(#map-{name}-head{index})"/>')
    for box in boxes:
        parts.append(f'<rect class="idea-box {box.kind}" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>')
        top = box.y + (box.height - LINE * len(box.lines)) / 2
        for row, (text, path) in enumerate(box.lines):
            place = f'x="{box.x + box.width / 2:.1f}" y="{top + LINE * row + 12.5:.1f}"'
            words = f'<text class="{"idea-title" if row < box.heads else "idea-chapter"}" {place}>{html.escape(text)}</text>'
            parts.append(f'<a href="{page_link(path, page)}">{words}</a>' if path else words)
    return "\n".join([*parts, "</svg>", "</div>"])


def describe(name: str) -> str:
    """The map in words: what builds on what."""
    boxes, arrows, _ = lay_out(name)
    told = []
    for box in boxes:
        below = [first.title for first, second in arrows if second is box]
        told.append(f"{box.title} builds on {', '.join(below)}." if below else f"{box.title}.")
    return " ".join(told)


def crossings(name: str) -> list[str]:
    """Arrows that run through a box that is not theirs."""
    boxes, arrows, _ = lay_out(name)
    places, found = ports(arrows), []
    for first, second in arrows:
        path = curve(first, second, places)
        for box in boxes:
            if box not in (first, second) and any(box.x < x < box.x + box.width and box.y < y < box.y + box.height
                                                  for x, y in (point(path, step / 60) for step in range(61))):
                found.append(f"{name}: the arrow from {first.name} to {second.name} runs through {box.name}")
    return found


def pages() -> dict[str, str]:
    """Map -> the page that shows it."""
    return {name: f"nbs/parts/{name}.md" for name in read_maps() if (Path(ROOT) / "nbs" / "parts" / f"{name}.md").is_file()}
