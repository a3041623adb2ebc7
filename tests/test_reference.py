"""The reference: every public name has its entry, as `help()` shows it, and every link of the reference's pages leads somewhere."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from bookparts import api, pages  # noqa: E402
from bookparts.outline import PACKAGE, cells, modules, read_chapter  # noqa: E402

API = sorted((ROOT / "nbs" / "reference" / "api").glob("*.md"))
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
                 if path.name not in ("__init__.py", "_modidx.py"))
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.md"))


def test_every_module_is_exported_by_a_chapter_and_has_a_page() -> None:
    assert set(modules()) == set(MODULES)
    assert {path.stem for path in API} == {module.split(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """With the docstring that `help()` shows, read from the imported object."""
    imported = importlib.import_module(f"defectbook.{module}")
    entries = {entry.name: entry for entry in api.read_module(module)[1]}
    staged = pages.staged_page(f"nbs/reference/api/{module.split('.')[0]}.md")
    section = staged.partition(f"\n## {module}\n")[2].split("\n## ")[0]
    assert f"]({pages.source_link(modules()[module], API[0].relative_to(ROOT).as_posix())})" in section, f"{module} does not lead to its chapter"
    for name in imported.__all__:
        assert name in entries, f"defectbook.{module}.{name} is not in the reference"
        entry, value = entries[name], getattr(imported, name)
        assert f"{{py:{entry.kind}}} {name}" in section
        if inspect.isfunction(value) or inspect.isclass(value) and entry.doc:
            assert inspect.cleandoc(value.__doc__ or "") == entry.doc, f"{module}.{name}: help() shows another text"
        if inspect.isfunction(value):
            assert tuple(inspect.signature(value).parameters) == entry.parameters
        for member in entry.members:
            assert hasattr(value, member.name) and f"}} {name}.{member.name}" in section


@pytest.mark.parametrize("path", PAGES)
def test_links_of_a_page_lead_somewhere(path: str) -> None:
    staged = pages.staged_page(path)
    folder = (ROOT / path).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", staged)):
        if not re.match(r"\w+:", link):
            assert (folder / link.split("#")[0]).is_file(), f"{path}: a link to {link}"
    for link in re.findall(r'href="([^"]+)"', staged):
        page, _, anchor = link.partition("#")
        target = (folder / page).resolve()
        assert any(target.with_suffix(kind).is_file() for kind in (".ipynb", ".md")), f"{path}: a link to {link}"
        if anchor.startswith("module-"):
            assert anchor.removeprefix("module-defectbook.") in MODULES


def test_a_chapter_leads_to_its_entries() -> None:
    line = api.api_line("nbs/00_core.ipynb")
    for link in re.findall(r'href="reference/api/core.html#defectbook\.core\.(\w+)"', line):
        assert link in {entry.name for entry in api.read_module("core")[1]}
    assert "#defectbook.core.Sample" in line and "#module-defectbook.core" in line
    assert api.api_line("nbs/results/70_patchcore_elpv.ipynb") == ""


def test_a_docstring_is_taken_literally() -> None:
    page = "nbs/reference/api/models.md"
    assert api._escaped("a *b* <c> [d](e) $f$ `x * y`", page) == r"a \*b\* \<c\> \[d\](e) \$f\$ `x * y`"
    assert api._escaped("see `models.memory`", page) == "see [`models.memory`](../../models/32_memory.ipynb)"
    assert api._escaped("- a\n1. b", page) == "\\- a\n\\1. b"


def test_symbols_are_the_codes_own() -> None:
    """A name in the table of symbols occurs in the chapter that its row names."""
    text = (ROOT / "nbs" / "reference" / "notation.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ") and "](" in line]
    assert len(rows) > 25 and all(len(row) == 6 for row in rows), "a | inside of a cell ends it"
    for symbol, _, _, _, code, chapter in rows:
        path = Path("nbs/reference", re.search(r"\((.+)\)", chapter).group(1))
        source = "\n".join(source for _, source in cells(Path(*path.parts[:1], *path.parts[3:]).as_posix()))
        for name in re.findall(r"`([^`]+)`", code):
            assert re.search(rf"\b{re.escape(name)}\b" if name.isidentifier() else re.escape(name), source), f"{symbol}: {name} is not in {path}"


def test_glossary_is_sorted_and_leads_to_chapters() -> None:
    text = (ROOT / "nbs" / "reference" / "glossary.md").read_text()
    terms = re.findall(r'<a id="([\w-]+)"></a>(.+)\n: (.+)', text)
    assert len(terms) > 50 and [term for _, term, _ in terms] == sorted((term for _, term, _ in terms), key=str.lower)
    assert len({anchor for anchor, _, _ in terms}) == len(terms)
    for _, term, said in terms:
        assert said.rstrip(".").endswith(")") and "[Chapter](" in said, f"{term} leads to no chapter"
    words = text.lower()
    for word in ("anomaly map", "image score", "mask", "region", "coreset", "memory bank", "backbone", "embedding", "prompt", "click",
                 "backbone layer", "auroc", "aupro", "dice", "iou", "noc", "failure rate"):
        assert f"</a>{word}" in words or f"({word.upper()})" in text, f"{word} is not in the glossary"


def test_bibliography_is_whole() -> None:
    """Every entry says where its details come from and belongs to a group of the page; every group of the page has entries; keys are there once."""
    works = (ROOT / "nbs" / "reference" / "references.bib").read_text()
    entries = re.findall(r"@\w+\{(\w+),\n(.*?)\n\}", works, re.S)
    assert len(entries) > 40 and len({key for key, _ in entries}) == len(entries)
    groups = set(re.findall(r"book:bibliography (\w+)", (ROOT / "nbs" / "reference" / "bibliography.md").read_text()))
    fields = {key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M)) for key, body in entries}
    assert {found["keywords"] for found in fields.values()} == groups
    for key, found in fields.items():
        assert {"author", "title", "listed"} <= set(found), key
        assert found["listed"] in ("PNI", "PROS", "PAEDID", "ADAPT", "FOIL", "arXiv") or "own text" in found["listed"], key
        assert found.get("year", "2000").isdigit(), key
    groups = (group for path in PAGES for group in pages.CITATION.findall((ROOT / path).read_text()))
    cited = {key.strip().removeprefix("@") for group in groups for key in group.split(";")}
    assert cited <= set(fields)
    assert read_chapter("nbs/methods/40_patchcore.ipynb").title.startswith("PatchCore")
