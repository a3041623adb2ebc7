"""What a page of the built book weighs, and the theme's largest part made small: of 2,000 icons, pages use about twenty."""

import gzip
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

ICON = re.compile(r'"?([\w-]+)"?:\[\d+,\d+,\[([^\]]*)\],"[0-9a-f]*",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?')
FONTAWESOME = "_static/scripts/fontawesome.js"
MEGABYTE = 1e6
PACKED = {".webp", ".png", ".jpg", ".woff2"}  # a server sends these as they are, and everything else compressed


def used_icons(site: Path) -> set[str]:
    """Names of icons in the site's pages and scripts."""
    files = [path for kind in ("html", "js") for path in site.rglob(f"*.{kind}") if path.name != Path(FONTAWESOME).name]
    return {name for path in files for name in re.findall(r"fa-([a-z0-9-]+)", path.read_text(errors="replace"))}


def slim_icons(script: str, keep: set[str]) -> str:
    """Font Awesome's script with the icons in `keep` only, by their names or older ones; its other parts stay as they are."""
    return ICON.sub(lambda icon: icon[0] if keep & {icon[1], *re.findall(r'"([\w-]+)"', icon[2])} else "", script)


def slim_site(site: Path) -> None:
    """Remove unused icons and the maps of minified sources, which only their authors' tools read."""
    for path in site.rglob("*.map"):
        path.unlink()
    path = site / FONTAWESOME
    path.write_text(slim_icons(path.read_text(), used_icons(site)))


def loaded_by(page: Path) -> set[Path]:
    """The files that a browser loads for a page: itself, scripts, styles and pictures; not what a link leads to."""
    text = page.read_text()
    links = re.findall(r"<(?:img|script)[^>]*?\ssrc=[\"']([^\"']+)[\"']", text)
    links += [link for tag in re.findall(r"<link[^>]+>", text) if re.search(r'rel="(?:stylesheet|icon|shortcut icon)"', tag)
              for link in re.findall(r'href="([^"]+)"', tag)]
    local = {unquote(urlsplit(link).path) for link in links if not re.match(r"\w+:", link)}
    return {page, *(path for link in local if (path := (page.parent / link).resolve()).is_file())}


@cache
def sent(path: Path) -> int:
    """Bytes of a file on its way from a web server."""
    return path.stat().st_size if path.suffix in PACKED else len(gzip.compress(path.read_bytes(), 6))


def weight_of(page: Path) -> float:
    """Megabytes that a browser fetches for a page from a server that compresses text, as common measures of page weight count."""
    return sum(map(sent, loaded_by(page))) / MEGABYTE
