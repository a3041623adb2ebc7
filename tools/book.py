"""Build the book: stage the notebooks of _quarto.yml, execute them side by side, and have jupyter-book's Sphinx build the pages.

    python tools/book.py [--workers N] [--only PATTERN]

The staged sources, with outputs, lie in _book/src, the pages in _book/_build/html. An executed notebook is used again as
long as its source, the library and the store are what they were. With --only, a book of the landing page and the chapters
whose path holds PATTERN is built; links to other chapters lead nowhere there, and are only warned of.
"""

import argparse
import concurrent.futures
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import nbformat
import yaml
from bookparts.additions import add_parts
from bookparts.figures import place_figures
from bookparts.pages import seconds, staged_page
from bookparts.slim import slim_site
from bookparts.warm_kernels import warm_kernels
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "_book"
SECONDS_A_NOTEBOOK = 600
LOOK_BACK = 8  # seconds that an experiment's page takes to read its runs; what its runs took is another matter


def read_chapters(quarto: Path = ROOT / "_quarto.yml") -> tuple[str, list[list[str]]]:
    """The landing page, and for each part its pages, the opening page first, from the only table of contents."""
    first, *parts = yaml.safe_load(quarto.read_text())["book"]["chapters"]
    return first, [[part["part"], *part["chapters"]] for part in parts]


def table_of_contents(landing: str, parts: list[list[str]]) -> dict:
    """The same in the form jupyter-book wants: a part's pages hang below its opening page, so that the sidebar unfolds one part at a time."""
    def files(pages: list[str]) -> list[dict]:
        return [{"file": Path(page).with_suffix("").as_posix()} for page in pages]

    return {"format": "jb-book", "root": Path(landing).with_suffix("").as_posix(),
            "chapters": [files([opener])[0] | ({"sections": files(chapters)} if chapters else {}) for opener, *chapters in parts]}


def stage_cell(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The cell as a reader sees it: no `#|` lines; what they ask for becomes tags. None for a cell that only names the module."""
    if cell.cell_type != "code":
        return cell
    lines = cell.source.splitlines()
    directives = [line[2:].strip() for line in lines if line.startswith("#|")]
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
    if not source.strip():
        return None
    tags = set(cell.metadata.get("tags", []))
    if "hide" in directives:
        tags.add("remove-cell")
    if "echo: false" in directives:
        tags.add("remove-input")
    if "eval: false" in directives:
        tags.add("skip-execution")
    cell.source = source
    alt = next((directive.removeprefix("fig-alt:").strip() for directive in directives if directive.startswith("fig-alt:")), None)
    cell.metadata = nbformat.from_dict({**({"tags": sorted(tags)} if tags else {}), **({"alt": alt} if alt else {})})
    return cell


def stage(chapter: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(ROOT / chapter, as_version=4)
    notebook.cells = [staged for cell in notebook.cells if (staged := stage_cell(cell)) is not None]
    notebook.metadata = nbformat.from_dict({"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    return notebook


def digest(*values: bytes) -> str:
    return hashlib.sha256(b"\0".join(values)).hexdigest()[:20]


def surroundings() -> bytes:
    """What a chapter's outputs depend on beside its own source: the library, the packaged data, the names of the stored runs."""
    files = [path for path in sorted((ROOT / "defectbook").rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    store = Path(os.environ["DEFECTBOOK_STORE"])
    names = "\n".join(sorted(str(path.relative_to(store)) for path in store.rglob("params.json"))) if store.is_dir() else ""
    files += [ROOT / "tools" / "bookparts" / name for name in ("matplotlibrc", "describe_figures.py")]
    return digest(names.encode(), os.environ.get("DEFECTBOOK_DATA", "").encode(), *(path.read_bytes() for path in files)).encode()


def unexecuted(chapter: str, reason: str) -> nbformat.NotebookNode:
    """The staged chapter without outputs, with a note under its title that says why."""
    notebook = stage(chapter)
    note = f"**Not executed in this build.** {reason}"
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("\n".join(f"> {line}" for line in note.splitlines())))
    return notebook


def tidy(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """A cell's outputs as a page shows them: no progress bars and warnings, what was printed in one piece, no paths of this machine,
    and a dash where a table has no figure."""
    places = {os.environ.get("DEFECTBOOK_DATA") or "": "$DEFECTBOOK_DATA", sysconfig.get_paths()["purelib"]: "site-packages", str(ROOT): "."}

    def told(text: str) -> str:
        for place, name in places.items():
            text = text.replace(place, name) if place else text
        return text.replace(">NaN</td>", ">–</td>")

    shown: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if "text" in output:
            output.text = told(output.text)
        for kind in [kind for kind in output.get("data", {}) if kind.startswith("text/")]:
            output.data[kind] = told(output.data[kind])
        if output.output_type == "stream" and shown and shown[-1].output_type == "stream":
            shown[-1].text += output.text
        else:
            shown.append(output)
    return shown


ANNOTATOR = "64_annotator"  # the chapter that shows pictures of the widget


def take_pictures(chapters: list[str]) -> None:
    """Pictures of the annotator in a browser, for its chapter, where a browser is; kept until the widget or its chapter's tool changes."""
    if os.environ.get("DEFECTBOOK_SCREENSHOTS") or not any(ANNOTATOR in chapter for chapter in chapters):
        return
    tool = ROOT / "tools" / "annotator_pictures.py"
    sources = [tool, *(ROOT / "defectbook" / "assets").glob("annotator.*"), *sorted((ROOT / "defectbook" / "practice").glob("*.py"))]
    pictures = BOOK / "pictures" / digest(*(path.read_bytes() for path in sources))
    if not pictures.is_dir():
        draft = pictures.with_name("draft")
        shutil.rmtree(draft, ignore_errors=True)
        tqdm.write("taking pictures of the annotator in a browser; this can take a minute or two")
        try:
            done = subprocess.run([sys.executable, tool, draft], capture_output=True, text=True, timeout=SECONDS_A_NOTEBOOK)
            said = done.stderr.strip().splitlines() or ["tools/annotator_pictures.py said nothing"]
        except subprocess.TimeoutExpired:
            done, said = None, [f"it took more than {SECONDS_A_NOTEBOOK} s"]
        if done is None or done.returncode:
            tqdm.write(f"the annotator's chapter goes without pictures: {said[-1][:200]}")
            return
        draft.rename(pictures)
    os.environ["DEFECTBOOK_SCREENSHOTS"] = str(pictures)


def run_cells(notebook: nbformat.NotebookNode, path: Path, kernel: str = "python3", *arguments: str) -> None:
    """Execute a staged notebook in the folder of its `path`; the outputs go into it. arguments: more of them for the kernel."""
    NotebookClient(notebook, timeout=SECONDS_A_NOTEBOOK, kernel_name=kernel, extra_arguments=["--IPKernelApp.log_level=40", *arguments],
                   skip_cells_with_tag="skip-execution", resources={"metadata": {"path": str(path.parent)}}).execute()


def execute(chapter: str, around: bytes, kernel: str = "python3") -> tuple[nbformat.NotebookNode, float]:
    """The chapter with its outputs, and the seconds that it took; kept outputs are taken where they still hold.

    An experiment on data that is not here comes without outputs and says how to get the data; that is not kept.
    """
    started = time.perf_counter()
    notebook = stage(chapter)
    pictures = os.environ.get("DEFECTBOOK_SCREENSHOTS", "") if ANNOTATOR in chapter else ""
    kept = BOOK / "kept" / f"{digest(nbformat.writes(notebook).encode(), pictures.encode(), around)}.ipynb"
    if not kept.is_file():
        try:
            run_cells(notebook, ROOT / chapter, kernel, f"--IPKernelApp.exec_files={ROOT / 'tools' / 'bookparts' / 'describe_figures.py'}")
        except CellExecutionError as error:
            if error.ename != "DataError" or Path(chapter).parent.name != "experiments":
                raise
            return unexecuted(chapter, error.evalue), time.perf_counter() - started
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, kept)
    return nbformat.read(kept, as_version=4), time.perf_counter() - started


def place(chapter: str, notebook: nbformat.NotebookNode | None = None) -> None:
    """Write the page of a chapter into _book/src: a Markdown page with its markers replaced, an executed notebook with its parts added."""
    target = BOOK / "src" / chapter
    target.parent.mkdir(parents=True, exist_ok=True)
    if notebook is None:
        target.write_text(staged_page(chapter))
        return
    notebook.metadata.pop("widgets", None)  # a widget needs its kernel, and its state would make the page load scripts from the network
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    place_figures(notebook, BOOK / "src" / "_static" / "figures", os.path.relpath(BOOK / "src", target.parent))
    nbformat.write(add_parts(chapter, notebook), target)


def execute_all(chapters: list[str], workers: int) -> None:
    """Execute the chapters `workers` at a time, with a bar; stops with one line at the first that fails.

    Pages are put together in this thread alone: they read sources with `ast`, which CPython 3.11 does not bear in several threads.
    """
    around = surroundings()
    notebooks = [chapter for chapter in chapters if chapter.endswith(".ipynb")]
    with warm_kernels() as kernel, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pictures = pool.submit(take_pictures, chapters)

        def execute_in_turn(chapter: str) -> tuple[nbformat.NotebookNode, float]:
            if ANNOTATOR in chapter:
                pictures.result()
            return execute(chapter, around, kernel)

        def expected(chapter: str) -> float:
            return LOOK_BACK if "/experiments/" in chapter else 0 if ANNOTATOR in chapter else seconds().get(chapter, 1)

        # What takes longest begins first, so that no worker waits at the end for the other's last page; what waits for pictures comes last.
        waiting = {pool.submit(execute_in_turn, chapter): chapter for chapter in sorted(notebooks, key=expected, reverse=True)}
        for page in chapters:
            if page not in notebooks:
                place(page)
        bar = tqdm(concurrent.futures.as_completed(waiting), total=len(waiting), desc="executing chapters", dynamic_ncols=True)
        for done in bar:
            chapter = waiting.pop(done)
            try:
                notebook, taken = done.result()
                place(chapter, notebook)
                bar.write(f"{taken:6.1f} s  {chapter}")
            except CellExecutionError as error:
                bar.write(f"{error}\n{chapter} failed; waiting for the chapters that are under way")
                pool.shutdown(cancel_futures=True)
                sys.exit(f"tools/book.py: {chapter} failed, as said above; open it in Jupyter and run it there")


# Sphinx reads pages side by side only if every extension says that it may. These three do not say: one numbers chapters, which
# this book does not, one only names a file, one serves LaTeX alone.
SIDE_BY_SIDE = """

def setup(app):
    for name in ("sphinx_multitoc_numbering", "sphinx-mathjax-offline", "sphinx_jupyterbook_latex"):
        app.extensions[name].parallel_read_safe = True
"""


def build(landing: str, parts: list[list[str]], workers: int, strict: bool = True) -> Path:
    """Have Sphinx build the pages from the staged sources as jupyter-book configures it; any warning is an error where `strict`."""
    source, page = BOOK / "src", BOOK / "_build" / "html" / "index.html"
    (source / "_toc.yml").write_text(yaml.safe_dump(table_of_contents(landing, parts), sort_keys=False))
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["execute"]["execute_notebooks"] = "off"  # they carry their outputs already
    (source / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.copytree(ROOT / "tools" / "static", source / "_static", dirs_exist_ok=True)
    for works in config.get("bibtex_bibfiles", []):
        (source / works).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / works, source / works)
    configure = [Path(sys.executable).with_name("jupyter-book"), "config", "sphinx", source]
    if subprocess.run(configure, stdout=subprocess.DEVNULL).returncode:
        sys.exit("tools/book.py: jupyter-book could not read _config.yml; the lines above say why")
    with (source / "conf.py").open("a") as file:
        file.write(SIDE_BY_SIDE)
    page.unlink(missing_ok=True)
    # -n reports references that lead nowhere, -W turns warnings into errors.
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-j", str(workers), "-d", page.parent.with_name(".doctrees"),
               *(["-n", "-W", "--keep-going"] if strict else []), source, page.parent]
    if subprocess.run(command).returncode or not page.is_file():
        sys.exit("tools/book.py: the book has warnings or errors; the first one above names the page")
    slim_site(page.parent)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="chapters executed at a time (default: 2)")
    parser.add_argument("--only", metavar="PATTERN", help="a regular expression: build these chapters and the landing page")
    args = parser.parse_args()
    os.environ.setdefault("DEFECTBOOK_STORE", str(ROOT / "data" / "results"))
    os.environ["DEFECTBOOK_STORE"] = str(Path(os.environ["DEFECTBOOK_STORE"]).resolve())
    if os.environ.get("DEFECTBOOK_DATA"):
        os.environ["DEFECTBOOK_DATA"] = str(Path(os.environ["DEFECTBOOK_DATA"]).resolve())
    os.environ["DEFECTBOOK_PROGRESS"] = "0"
    os.environ.setdefault("MATPLOTLIBRC", str(ROOT / "tools" / "bookparts" / "matplotlibrc"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    # As in the Makefile, which says why: kernels keep the memory of large arrays. The warm process reads these when it starts.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
    shutil.rmtree(BOOK / "src", ignore_errors=True)
    landing, parts = read_chapters()
    if args.only:
        # The opening page of a chosen chapter comes along: it is what the chapter hangs below.
        parts = [found for opener, *chapters in parts
                 if len(found := [opener, *(chapter for chapter in chapters if re.search(args.only, chapter))]) > 1 or re.search(args.only, opener)]
        if not parts:
            sys.exit(f"tools/book.py: no chapter's path holds {args.only!r}; see _quarto.yml")
    execute_all([landing, *itertools.chain.from_iterable(parts)], args.workers)
    print(f"\nthe book: {build(landing, parts, args.workers, not args.only)}")


if __name__ == "__main__":
    main()
