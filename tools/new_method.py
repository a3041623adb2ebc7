"""Write the chapter of a new method from the template, and list it in the book.

    python tools/new_method.py 51 my_method "A title of your own"

The chapter nbs/methods/51_my_method.ipynb runs and exports as it is, with a small detector for an example: change it from there.
"""

import argparse
import hashlib
import json
import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).resolve().parent / "templates" / "method.ipynb"
FIRST, LAST = 40, 59  # the numbers of the floor of methods


class Slip(Exception):
    """What was asked for cannot be written; one line that says what to type in its place."""


def class_name(name: str) -> str:
    """my_method -> MyMethod."""
    return "".join(part.capitalize() for part in name.split("_"))


def free_number(taken: set[str]) -> str:
    return next((str(number) for number in range(FIRST, LAST + 1) if str(number) not in taken), "none")


def check(number: str, name: str, title: str, root: Path) -> None:
    """Raises `Slip` for a number or name that is malformed or taken, and for an empty title."""
    methods = root / "nbs" / "methods"
    if not methods.is_dir():
        raise Slip(f"{methods}: no such folder; run this in a checkout of the project")
    chapters = {path.name.partition("_")[0]: path.name for path in sorted(methods.glob("*.ipynb"))}
    if not re.fullmatch(r"\d\d[a-z]?", number) or not FIRST <= int(number[:2]) <= LAST:
        raise Slip(f"{number!r} is no chapter's number; methods have {FIRST} to {LAST}, such as {free_number(set(chapters))}")
    if number in chapters:
        raise Slip(f"{number} is {chapters[number]}; the next free number is {free_number(set(chapters))}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise Slip(f"{name!r} is no module's name; give lower case words joined by _, such as my_method")
    modules = {path.stem: path.parent.name for path in (root / "defectbook").rglob("*.py")}
    if name in modules:
        raise Slip(f"{name} is a module of {modules[name]} already; choose another name")
    if not title.strip() or "\n" in title:
        raise Slip("the title is empty or has several lines; give a few words in quotes")


def write_chapter(number: str, name: str, title: str, root: Path) -> Path:
    """The template as chapter `number` of the module `name`; returns its path. Raises as `check`."""
    check(number, name, title, root)
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("my_method", name).replace("MyMethod", class_name(name)).replace("A title of your own", json.dumps(title.strip())[1:-1])
    notebook = json.loads(text)
    for place, cell in enumerate(notebook["cells"]):  # the same words make the same file
        cell["id"] = hashlib.sha256(f"{name} {place}".encode()).hexdigest()[:8]
    path = root / "nbs" / "methods" / f"{number}_{name}.ipynb"
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def list_chapter(path: Path, root: Path) -> bool:
    """Add the chapter to _quarto.yml, after the last method with a smaller number; whether that could be done."""
    quarto = root / "_quarto.yml"
    lines = quarto.read_text(encoding="utf-8").splitlines(keepends=True) if quarto.is_file() else []
    places = [(match[2], number, match[1]) for number, line in enumerate(lines) if (match := re.match(r"(\s*- )nbs/methods/(\S+)\.ipynb\s*$", line))]
    before = [place for place in places if place[0] < path.stem]
    if not before:
        return False
    _, number, indent = max(before)
    lines.insert(number + 1, f"{indent}nbs/methods/{path.name}\n")
    quarto.write_text("".join(lines), encoding="utf-8")
    return True


NEXT = """{path} is written and runs as it is{listed}. Next:
  1. jupyter lab {path}, or as text: jupytext --to py:percent -o {name}.py {path}
  2. make export                        writes defectbook/methods/{name}.py
  3. nbs/practice/62q_registry.ipynb    a line "{name}": Method(...) in DETECTORS
  4. nbs/practice/63e_saved_detectors.ipynb   a line "{kind}" in LOADERS, so that saved ones come back
  5. tests/test_registry.py             small options for "{name}" in SMALL
  6. make test
The chapter nbs/contribute/80_add_a_method.ipynb goes this way once."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("number", help=f"of the chapter, {FIRST} to {LAST}")
    parser.add_argument("name", help="of the module, such as my_method")
    parser.add_argument("title", help="of the chapter, in quotes")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: this one)")
    args = parser.parse_args(arguments)
    try:
        path = write_chapter(args.number, args.name, args.title, args.root)
    except Slip as slip:
        print(f"new_method: {slip}", file=sys.stderr)
        return 2
    listed = " and is listed in _quarto.yml" if list_chapter(path, args.root) else "; add it to _quarto.yml"
    print(NEXT.format(path=path.relative_to(args.root), name=args.name, kind=class_name(args.name), listed=listed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
