"""Figures of executed chapters as a page shows them: WebP files beside the pages, with words for who cannot see them.

A figure says its own words: `describe_figures.py` makes a kernel answer a figure's text/plain form with its titles, axes and legends.
Where a figure has none, `#| fig-alt: ...` in its cell gives them, or the heading above it does.
"""

import base64
import hashlib
import html
import io
import re
from pathlib import Path

import nbformat
from PIL import Image

LOSSLESS_UP_TO = 40_000  # bytes; line drawings stay exact, photographs do not pay for it
QUALITY = 86
LONGEST_ALT = 600


def heading_of(source: str) -> str | None:
    """The last heading of a Markdown cell, without its signs."""
    found = re.findall(r"^#+ +(.+)$", source, re.M)
    return re.sub(r"[`*$]", "", found[-1]).strip() if found else None


def caption_of(source: str) -> str | None:
    """The caption that opens a Markdown cell: a paragraph in italics, without its signs."""
    found = re.match(r"\*([^*].*?)\*(?:\n\n|\s*$)", source, re.S)
    return re.sub(r"[`*$]", "", " ".join(found[1].split())) if found else None


def words_for(said: str, wanted: str | None, caption: str | None, heading: str | None) -> str:
    """Alternative text: what the cell asks for, else the caption (or the section's heading) and what the figure says itself."""
    own = "" if re.fullmatch(r"<.*>", said.strip(), re.S) else " ".join(said.split())
    place = f"Figure of the section {heading}" if heading else "Figure"
    text = wanted or ". ".join(part.rstrip(".") for part in (caption or place, own) if part)
    return text if len(text) <= LONGEST_ALT else text[: LONGEST_ALT - 1].rsplit(" ", 1)[0] + "…"


def as_webp(picture: bytes) -> bytes:
    """A PNG or JPEG as WebP: exact where that is small, else lossy."""
    image = Image.open(io.BytesIO(picture))
    image = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, quality=40, method=2)
    if exact.tell() <= LOSSLESS_UP_TO:
        return exact.getvalue()
    image.save(lossy, "WEBP", quality=QUALITY, method=4)
    return min(exact.getvalue(), lossy.getvalue(), key=len)


def figure_file(picture: bytes, folder: Path) -> Path:
    """The WebP file of a picture in `folder`, made when it is not there; its name is the picture's hash."""
    path = folder / f"{hashlib.sha256(picture).hexdigest()[:16]}.webp"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{id(picture)}.draft")
        draft.write_bytes(as_webp(picture))
        draft.replace(path)
    return path


def place_figures(notebook: nbformat.NotebookNode, folder: Path, to_root: str) -> None:
    """Replace the pictures among a chapter's outputs by links to files in `folder`, which pages reach as `to_root/_static/figures`."""
    heading = None
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            heading = heading_of(cell.source) or heading
        if cell.cell_type != "code":
            continue
        after = notebook.cells[number + 1] if number + 1 < len(notebook.cells) else None
        caption = caption_of(after.source) if after is not None and after.cell_type == "markdown" else None
        for output in cell.outputs:
            data = output.get("data", {})
            kind = next((kind for kind in ("image/png", "image/jpeg") if kind in data), None)
            if kind is None:
                continue
            path = figure_file(base64.b64decode(data[kind]), folder)
            with Image.open(path) as image:
                width, height = image.size
            shown = int(output.metadata.get(kind, {}).get("width", width))
            alt = html.escape(words_for(data.get("text/plain", ""), cell.metadata.get("alt"), caption, heading))
            size = f'width="{shown}" height="{round(height * shown / width)}"'
            picture = f'<img class="figure" src="{to_root}/_static/figures/{path.name}" alt="{alt}" {size} loading="lazy">'
            output.data = nbformat.from_dict({"text/html": picture})
            output.metadata = nbformat.from_dict({})
