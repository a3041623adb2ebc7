"""The way through the book: opening pages with maps, boxes that make a page again, exercises whose solutions work."""

import ast
import contextlib
import io
import re
import shlex
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from conftest import ROOT

from defectbook.practice.experiments import check_parameters, default_parameters, find_experiment, parse_value

sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402
from bookparts import maps, pages, published, reproduce, store  # noqa: E402
from bookparts.additions import add_parts  # noqa: E402
from bookparts.outline import all_imports, cells, find_chapter, modules, read_chapter  # noqa: E402

PARTS = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"][1:]
LISTED = [path for part in PARTS for path in [part["part"], *part["chapters"]]]
CHAPTERS = [path for path in LISTED if path.endswith(".ipynb") and Path(path).parent.name not in ("experiments", "results")]
RESULTS = [path for path in LISTED if Path(path).parent.name == "results"]
EXPERIMENTS = [path for path in LISTED if Path(path).parent.name == "experiments"]


def name_of(path: str) -> str:
    return Path(path).stem


@pytest.mark.parametrize("part", PARTS, ids=lambda part: name_of(part["part"]))
def test_an_opening_page_has_what_a_reader_needs(part) -> None:
    source, staged = (ROOT / part["part"]).read_text(), pages.staged_page(part["part"])
    assert source.startswith("# ") and "\n> " in source
    for needed in ("**You will be able to**", "**You need**", "## The map of ideas", "## In which order to read"):
        assert needed in source, f"{part['part']}: {needed} is missing"
    assert "<svg" in staged and "book:" not in staged
    for path in part["chapters"]:
        assert f"]({pages.source_link(path, part['part'])})" in staged, f"{part['part']} does not lead to {path}"


def test_pages_are_readable_by_both_builders() -> None:
    """No directives in a source page: what jupyter-book needs is put in when the book is staged."""
    for path in (ROOT / "nbs").rglob("*.md"):
        text = path.read_text()
        assert ":::" not in text and "{" not in re.sub(r"\$[^$\n]*\$|`[^`\n]*`", "", text), f"{path}: a directive, or braces outside of code"


@pytest.mark.parametrize("name", maps.read_maps())
def test_a_map_is_drawn_well(name: str) -> None:
    """Well-formed, with words for those who do not see it, nothing outside the drawing, no words wider than their box, no arrow through a box."""
    drawing = maps.draw(name, f"nbs/parts/{name}.md")
    assert "\n\n" not in drawing, "a blank line ends a block of HTML in Markdown"
    svg = next(iter(ElementTree.fromstring(drawing)))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.find(f"{space}title").text and len(svg.find(f"{space}desc").text) > 40
    boxes, arrows, height = maps.lay_out(name)
    for box in boxes:
        assert 0 <= box.x and box.x + box.width <= maps.width_of(name) and box.y + box.height <= height
        for line, _ in box.lines:
            assert len(line) * maps.CHARACTER <= box.width + 2, f"{name}: {line!r} is wider than its box {box.name}"
    assert maps.crossings(name) == []
    for link in re.findall(r'href="([^"]+)"', drawing):
        target = (ROOT / "nbs" / "parts" / link).resolve()
        assert any(target.with_suffix(kind).is_file() for kind in (".ipynb", ".md")), f"{name}: a box leads to {link}"


@pytest.mark.parametrize("name", maps.read_maps())
def test_an_arrow_is_true(name: str) -> None:
    """What an arrow leads to imports what it comes from, or links to it, or shows its runs; a part's page stands for its chapters."""
    boxes = {box.name: box for box in maps.lay_out(name)[0]}
    arrows = [(boxes[first], boxes[second]) for first, second, *why in maps.read_maps()[name].get("arrows", []) if not why]
    exported = {path: module for module, path in modules().items()}

    def stands_for(path: str) -> set[str]:
        part = next((part for part in PARTS if part["part"] == path), None)
        return set(part["chapters"]) if part else {path}

    def built_on(later: str, earlier: str) -> bool:
        if (later in exported and exported.get(earlier) in all_imports(exported[later])) or earlier in read_chapter(later).links:
            return True
        if "/experiments/" in later and "/practice/" in earlier:
            return f"defectbook.{exported.get(earlier)} import" in "\n".join(source for _, source in cells(later))
        return "/results/" in later and (name_of(earlier) in reproduce.read_experiments(later) or "/practice/" in earlier)

    for first, second in arrows:
        pairs = ((later, earlier) for later in second.chapters for earlier in first.chapters)
        assert any(exported.get(b) == "core" or built_on(a, b) for later, earlier in pairs for a in stands_for(later) for b in stands_for(earlier)), \
            f"{name}: nothing in {second.name} is built on {first.name}"


def test_a_map_refuses_what_the_book_has_not(monkeypatch) -> None:
    monkeypatch.setattr(maps, "read_maps", lambda: {"wrong": {"title": "t", "rows": [[{"name": "a", "title": "A", "chapters": ["99_nothing"]}]]}})
    with pytest.raises(KeyError, match="99_nothing"):
        maps.draw("wrong", "nbs/parts/wrong.md")


def test_a_crossing_is_found(monkeypatch) -> None:
    row = [[{"name": name, "title": name}] for name in ("a", "b", "c")]
    monkeypatch.setattr(maps, "read_maps", lambda: {"stack": {"title": "t", "rows": row, "arrows": [["a", "c"]]}})
    assert maps.crossings("stack") == ["stack: the arrow from a to c runs through b"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: name_of(part["part"]))
def test_a_map_shows_its_part(part) -> None:
    """Every chapter of the first six parts is on its map; results and experiments may leave some out, the reference names its kinds."""
    name = name_of(part["part"])
    shown = {path for box in maps.lay_out(name)[0] for path in box.chapters}
    if name not in ("ground", "methods", "results", "reference"):
        assert set(part["chapters"]) <= shown, f"nbs/parts/maps.yml: {name} lacks {sorted(set(part['chapters']) - shown)}"
    if name == "methods":
        assert set(part["chapters"]) <= shown


def test_unknown_markers_are_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("# T\n\n<!-- book:nonsense -->\n")
    with pytest.raises(KeyError, match="nonsense"):
        pages.staged_page("page.md")
    (tmp_path / "page.md").write_text("as [@pni; @roth2022] say, and `[@x]` stays\n")
    assert pages.staged_page("page.md").startswith("as {cite:p}`pni,roth2022` say")


# What a page reads, written down by a person who read it.
READS = {"70_patchcore_elpv": {"patchcore_elpv"},
         "71_pni": {"patchcore_sizes", "pni_ablation", "pni_btad_visa", "pni_curves", "pni_mvtec", "pni_refinement"},
         "72_paedid": {"paedid_alpha", "paedid_cells", "paedid_latent", "paedid_masks", "paedid_simulated"},
         "73_pros": {"pros_adapters", "pros_baselines"}, "74_adaptation": {"adapt_clicks", "adapt_cost", "adapt_rates"},
         "75_foil": {"foil_channels", "foil_cost", "foil_models"}, "76_foil_truth": {"foil_models"}, "77_all_methods": {"all_methods"}}


@pytest.mark.parametrize("path", RESULTS, ids=name_of)
def test_what_a_results_page_reads_is_found(path: str) -> None:
    found = set(reproduce.read_experiments(path))
    assert found >= READS.get(name_of(path), set()), f"{path}: {READS[name_of(path)] - found} were not found"
    if name_of(path) in READS:
        assert found <= READS[name_of(path)] | {name for name in found if name in "\n".join(source for _, source in cells(path))}
    if found:
        box = reproduce.box_for(path)
        assert all(f">{name}</a>" in box for name in found) and "papermill" in box


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_a_reproduce_box_holds_commands_that_are_accepted(path: str) -> None:
    """Each command of the box names parameters that the notebook has, with values of their kinds."""
    name, box = name_of(path), reproduce.box_for(path)
    told = store.stored(name)
    assert "Reproduce this page" in box and (f"{told.runs} stored run" in box if told.runs else "No run" in box)
    commands = [shlex.split(line) for line in box.splitlines() if line.startswith(("defectbook run", "papermill"))]
    assert len(commands) == 2 * len(store.run_commands(name))
    for words in commands:
        if words[0] == "papermill":
            assert (ROOT / words[1]).is_file()
            given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
        else:
            assert words[2] == name
            given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-p")
        defaults = {key: value for key, (value, _) in default_parameters(ROOT / path).items()}
        read = {key: value if isinstance(defaults.get(key), str) else parse_value(value) for key, value in given.items()}
        assert check_parameters(find_experiment(name), read)["preset"] == "small"
    for grid in store.sweeps().get(name, []):
        assert f"defectbook sweep {grid}" in box


def test_settings_name_experiments_that_exist() -> None:
    assert set(store.settings()) <= {name_of(path) for path in EXPERIMENTS}


def test_additions_are_not_in_the_sources() -> None:
    path = "nbs/results/70_patchcore_elpv.ipynb"
    before = nbformat.read(ROOT / path, 4)
    after = add_parts(path, nbformat.read(ROOT / path, 4))
    assert len(after.cells) == len(before.cells) + 1 and "Reproduce this page" in after.cells[1].source
    assert "Reproduce this page" not in (ROOT / path).read_text()
    nbformat.validate(after)
    chapter = "nbs/methods/40_patchcore.ipynb"
    last = add_parts(chapter, nbformat.read(ROOT / chapter, 4)).cells[-1].source
    assert "reference/api/methods.html#defectbook.methods.patchcore.PatchCore" in last


def test_every_published_table_is_in_the_index() -> None:
    """The papers' tables as packaged, one by one, and the pages that the index names."""
    from defectbook.metrics.published import PAPERS
    from defectbook.metrics.published import published as read_published

    words = {"text": "figures in the text", "cost": "cost of a step"}
    for paper in PAPERS:
        for table in read_published(paper)["table"].unique():
            item = words.get(table, f"Table {table}")
            listed = (entry["items"] for entry in published.read_items() if entry["paper"] == paper)
            assert any(item in items for items in listed), f"{paper}: {item} is not in published.yml"
    staged = pages.staged_page("nbs/reference/tables.md")
    for entry in published.read_items():
        assert entry.get("experiments") or entry.get("without"), f"{entry}: what makes it again, or why nothing does"
        assert ", ".join(entry["items"]) in staged
        for name in [*entry.get("experiments", []), *entry.get("pages", []), *entry.get("chapters", [])]:
            find_chapter(name)
        read = {name for page in entry.get("pages", []) for name in reproduce.read_experiments(find_chapter(page))}
        assert set(entry.get("experiments", [])) <= read, f"{entry['items']}: no page of {entry.get('pages')} reads {entry['experiments']}"


def test_seconds_are_kept_for_chapters_that_exist() -> None:
    assert set(pages.seconds()) <= {"index.ipynb", *LISTED}
    missing = [path for path in CHAPTERS if path not in pages.seconds()]
    assert len(missing) < 12, f"python tools/bookparts/measure.py measures {missing}"


def test_staging_is_quick() -> None:
    """All pages and boxes are made within seconds: the store is read once."""
    started = time.process_time()
    for path in LISTED:
        pages.staged_page(path) if path.endswith(".md") else reproduce.box_for(path)
    assert time.process_time() - started < 15


# -- Exercises -----------------------------------------------------------------------------------------------------------------------


def exercises(path: str) -> str:
    prose = "\n".join(source for kind, source in cells(path) if kind == "markdown")
    return prose.partition("## Exercises")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_exercises_have_folded_solutions(path: str) -> None:
    text = exercises(path)
    asked = len(re.findall(r"(?m)^(?:\d+\.|\*\*\d+\.\*\*) ", text))
    assert asked >= 2, f"{path}: {asked} exercises"
    assert text.count("<details>") == text.count("</details>") == asked, f"{path}: {asked} exercises, {text.count('<details>')} solutions"
    for solution in re.findall(r"<details>(.*?)</details>", text, re.S):
        assert "<summary>" in solution and "\n\n" in solution, f"{path}: Markdown inside <details> needs blank lines around it"
        assert len(re.sub(r"<summary>.*?</summary>|\s", "", solution)) > 8, f"{path}: an empty solution"


SOLUTIONS = [(path, code) for path in CHAPTERS for code in re.findall(r"```python\n(.*?)```", exercises(path), re.S)]


@pytest.mark.parametrize("path, code", SOLUTIONS, ids=[f"{name_of(path)}-{index}" for index, (path, _) in enumerate(SOLUTIONS)])
def test_solutions_in_python_run(path: str, code: str, tmp_path, monkeypatch) -> None:
    """In a fresh namespace that holds what the chapter imports and exports, and nothing else."""
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "solution"}
    for kind, source in cells(path):
        if kind == "code":
            imported = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imported, []), path, "exec"), space)
    exec(f"from defectbook.{read_chapter(path).module} import *", space)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, f"{path}, a solution", "exec"), space)


def test_every_page_can_be_reached() -> None:
    """From the table of contents, and each of the notebooks' links leads to a page of it."""
    landing, parts = book.read_chapters()
    listed = {landing, *(path for paths in parts for path in paths)}
    for path in listed:
        for target in read_chapter(path).links:
            assert target in listed, f"{path} links to {target}, which is no page of the book"
