"""The book: a valid table of contents, staged notebooks without directives, and pages that a browser opens without a network."""

import os
import re
import shutil
import subprocess
import sys
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from browser import browser
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import book  # noqa: E402
from bookparts import figures  # noqa: E402
from bookparts.slim import slim_icons, weight_of  # noqa: E402


def test_quarto_file_is_a_book_project() -> None:
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert quarto["project"]["type"] == "book"
    assert set(quarto["book"]) >= {"title", "author", "chapters"} and quarto["book"]["chapters"][0] == "index.ipynb"
    for part in quarto["book"]["chapters"][1:]:
        assert set(part) == {"part", "chapters"} and part["part"].endswith(".md"), "a part is opened by a page of its own"
        for chapter in [part["part"], *part["chapters"]]:
            assert (ROOT / chapter).is_file(), f"_quarto.yml names {chapter}, which does not exist"


def test_toc_follows_the_quarto_file() -> None:
    landing, parts = book.read_chapters()
    toc = book.table_of_contents(landing, parts)
    assert landing == "index.ipynb" and toc["root"] == "index" and len(toc["chapters"]) == len(parts)
    assert toc["chapters"][0] == {"file": "nbs/parts/ground", "sections": [{"file": "nbs/00_core"}]}, "chapters hang below the part's opening page"


def test_directives_become_tags() -> None:
    def staged(source: str):
        return book.stage_cell(nbformat.v4.new_code_cell(source))

    assert staged("#| default_exp core") is None
    assert staged("#| export\nx = 1").source == "x = 1"
    assert staged("#| hide\nx = 1").metadata["tags"] == ["remove-cell"]
    assert staged("#| echo: false\nx = 1").metadata["tags"] == ["remove-input"]
    assert staged("x = 1\n# | not one").source == "x = 1\n# | not one"


def test_outputs_are_tidied(monkeypatch) -> None:
    monkeypatch.setenv("DEFECTBOOK_DATA", "/somewhere/sets")

    def printed(text: str, name: str = "stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    table = nbformat.v4.new_output("display_data", data={"text/html": "<td>NaN</td><td>0.5</td>", "image/png": "NaN"})
    outputs = book.tidy([printed("read from /somewhere/sets/tiles\n"), printed("50%|#####", "stderr"), printed("done\n"), table, printed("end\n")])
    assert [out.get("text") for out in outputs] == ["read from $DEFECTBOOK_DATA/tiles\ndone\n", None, "end\n"]
    assert outputs[1].data == {"text/html": "<td>–</td><td>0.5</td>", "image/png": "NaN"}


def png(width: int = 40, height: int = 20) -> str:
    import base64
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * height, dtype=np.uint8).reshape(height, width)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_figures_get_words_and_a_file(tmp_path) -> None:
    from PIL import Image

    def shown(said: str, after: str = "", **metadata):
        output = nbformat.v4.new_output("display_data", data={"image/png": png(), "text/plain": said})
        drawn = nbformat.v4.new_code_cell("draw()", outputs=[output], metadata=metadata)
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Chapter\n\n## The question"), drawn,
                                                   nbformat.v4.new_markdown_cell(after)])
        figures.place_figures(notebook, tmp_path, "../..")
        return notebook.cells[1].outputs[0].data["text/html"]

    tag = shown("image; map. score over area", "*A claim with `code`.*\n\nMore *words*.")
    assert 'alt="A claim with code. image; map. score over area"' in tag and 'width="40" height="20"' in tag
    assert 'alt="Figure of the section The question"' in shown("<Figure size 4x2 with 1 Axes>", "*emphasis* opens this sentence.")
    assert 'alt="&lt;b&gt; &quot;said&quot;"' in shown("image", alt='<b> "said"')
    (file,) = tmp_path.iterdir()
    with Image.open(file) as image:
        assert image.format == "WEBP" and image.size == (40, 20) and list(image.convert("L").getdata())[:3] == [0, 1, 2], "small pictures stay exact"


def test_a_figure_says_its_own_words() -> None:
    """Whoever draws with matplotlib in the book's kernels leaves words, whether the kernel started warm or cold."""
    from nbclient import NotebookClient

    draw = "import matplotlib.pyplot as plt\nfigure, axis = plt.subplots()\naxis.set(title='T', xlabel='x', ylabel='y')\nplt.show()"
    describe = ROOT / "tools" / "bookparts" / "describe_figures.py"
    with book.warm_kernels() as warm:
        for kernel in {warm, "python3"}:
            notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, (draw, "import os; os.getcwd(), __name__"))))
            NotebookClient(notebook, kernel_name=kernel, extra_arguments=[f"--IPKernelApp.exec_files={describe}"],
                           resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
            (output,) = notebook.cells[0].outputs
            assert output.data["text/plain"] == "T. y over x" and "image/png" in output.data, kernel
            assert notebook.cells[1].outputs[0].data["text/plain"] == f"({str(ROOT / 'nbs')!r}, '__main__')"


def test_unused_icons_go() -> None:
    script = 'var p={sun:[5,5,[9728],"f1","M1z"],"arrow-up":[3,5,[8593,"up"],"f2",["M2","M3"]],moon:[3,5,[],"f3","M4z"]};rest()'
    assert slim_icons(script, {"sun", "up"}) == 'var p={sun:[5,5,[9728],"f1","M1z"],"arrow-up":[3,5,[8593,"up"],"f2",["M2","M3"]],};rest()'


def test_pages_are_read_side_by_side(monkeypatch, tmp_path, capfd) -> None:
    """From six pages on Sphinx asks each extension whether it may; one that does not say is a warning, which is an error here."""
    monkeypatch.setattr(book, "BOOK", tmp_path)
    pages = ["index.md", *(f"page{number}.md" for number in range(7))]
    (tmp_path / "src").mkdir()
    for page in pages:
        (tmp_path / "src" / page).write_text(f"# {page}\n\nSome words.\n")
    shown = book.build(pages[0], [pages[1:]], workers=2)
    said = re.sub(r"\x1b\[[0-9;]*m", "", capfd.readouterr().out)
    assert "page6" in shown.read_text() and re.search(r"reading sources.*index \.\. page", said), "pages were read one after another"


@pytest.fixture(scope="module")
def site():
    """The built book; building it executes every notebook."""
    done = subprocess.run([sys.executable, "tools/book.py"], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return ROOT / "_book" / "_build" / "html"


def pages(site):
    return [path for path in sorted(site.rglob("*.html")) if path.name not in ("genindex.html", "search.html") and "_static" not in path.parts]


def article_of(page) -> str:
    """A page's own part, without its code: that may hold HTML as text."""
    found = re.search(r"<article.*?</article>", page.read_text(), re.S)
    return re.sub(r"<pre.*?</pre>", "", found.group(0), flags=re.S) if found else ""


@pytest.mark.slow
def test_pages_hold_no_directives_and_no_network(site) -> None:
    assert len(pages(site)) >= 15
    for page in pages(site):
        text = page.read_text()
        assert not re.search(r'(?m)(?:^|class="c\w">)#\|', text), f"{page}: a raw directive"  # a string of chapter 80 holds one, as text
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)\"", text)
        assert not [url for url in loaded if "rel=\"canonical\"" not in url], f"{page} loads {loaded}"


@pytest.mark.slow
def test_links_lead_to_pages(site) -> None:
    """Every link inside the book leads to a file; jupyter-book does not look at links in outputs."""
    for page in pages(site):
        article = article_of(page)
        for link in re.findall(r'href="([^"#?]+)[^"]*"', article):
            if not re.match(r"\w+:", link):
                assert (page.parent / unquote(link)).exists(), f"{page}: a link to {link}, which does not exist"


@pytest.mark.slow
def test_pictures_have_words_and_pages_are_light(site) -> None:
    """Every picture has an alternative text that says something, is WebP or SVG, and no page is heavier than 2 MB."""
    heavy, wordless, fat = {}, [], []
    for page in pages(site):
        article = article_of(page)
        for tag in re.findall(r"<img[^>]*>", article):
            words = re.search(r'alt="([^"]*)"', tag)
            layer = words and not words[1] and 'class="dbx-' in tag  # an explorer's mask lies on a picture that has the words
            if not words or len(words[1]) < 12 and not layer:
                wordless.append((page.name, tag[:120]))
            source = re.search(r'src="([^"]+)"', tag)[1]
            if not re.match(r"data:image/(webp|svg|png)", source) and not source.endswith((".webp", ".svg")):
                fat.append((page.name, source))
        if (weight := weight_of(page)) > 2:
            heavy[page.name] = weight
    assert (wordless, fat, heavy) == ([], [], {})


@pytest.mark.slow
def test_every_page_is_reached_from_the_landing_page(site) -> None:
    """By following links, those of the table of contents at the side among them."""
    reached, waiting = set(), [(site / "index.html").resolve()]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in re.findall(r'href="([^"#?:]+\.html)', page.read_text()):
            target = (page.parent / unquote(link)).resolve()
            if target.is_file() and target not in reached:
                waiting.append(target)
    assert {page.resolve() for page in pages(site)} <= reached


def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no chromium on this machine: the pages were not opened in a browser")
    return path


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--virtual-time-budget=8000"]


@pytest.mark.slow
def test_formulas_are_typeset_from_file(site, tmp_path) -> None:
    """Chromium opens a page with mathematics from file:// and MathJax, from the book itself, typesets it."""
    page = site / "nbs" / "methods" / "40_patchcore.html"
    dom = subprocess.run([chromium(), *FLAGS, f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()], capture_output=True, text=True,
                         timeout=120).stdout
    assert "<mjx-container" in dom, "MathJax did not typeset"
    assert "Remembering" in dom or "remembering" in dom


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_do_not_overflow(site, width, tmp_path) -> None:
    """No page is wider than the window, on a phone and on a desk."""
    probe = tmp_path / "probe.html"
    names = [path.relative_to(site).as_posix() for path in pages(site)]
    # Each page is opened in a frame of the given width; the widths found are written into the title.
    probe.write_text(f"""<body style="margin:0"><script>
const names = {names!r}, found = [];
async function measure() {{
  for (const name of names) {{
    const frame = document.createElement("iframe");
    frame.style = "width:{width}px;height:800px;border:0";
    frame.src = "{site.as_uri()}/" + name;
    document.body.append(frame);
    await new Promise(done => frame.onload = done);
    const page = frame.contentDocument.documentElement;
    found.push(name + " " + page.scrollWidth);
    frame.remove();
  }}
  document.title = "measured";
  document.body.textContent = found.join("\\n");
}}
measure();
</script></body>""")
    dom = subprocess.run([chromium(), *[flag for flag in FLAGS if "virtual" not in flag], "--virtual-time-budget=120000", "--window-size=1400,900",
                          f"--user-data-dir={tmp_path / 'profile'}", "--disable-web-security", "--dump-dom", probe.as_uri()],
                         capture_output=True, text=True, timeout=300).stdout
    measured = {name: int(size) for name, size in re.findall(r"([\w./-]+\.html) (\d+)", dom)}
    assert set(measured) == set(names), dom[:500]
    assert {name: size for name, size in measured.items() if size > width} == {}


@pytest.mark.slow
def test_search_finds_chapters_and_functions(site) -> None:
    """A reader presses Ctrl+K anywhere, types a word, and gets to its chapter; a function's name leads to the reference."""
    with browser(1280) as driver:
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import WebDriverWait

        def wait(found):
            return WebDriverWait(driver, 30).until(lambda _: found())

        def results(word: str) -> list[str]:
            driver.get((site / "nbs" / "methods" / "40_patchcore.html").as_uri())
            ActionChains(driver).key_down(Keys.CONTROL).send_keys("k").key_up(Keys.CONTROL).perform()
            wait(lambda: next((box for box in driver.find_elements("css selector", "input[type=search]") if box.is_displayed()), None)).send_keys(
                word, Keys.ENTER)
            return [link.get_attribute("href") for link in wait(lambda: driver.find_elements("css selector", "ul.search li a"))]

        found = results("coreset")
        driver.get(next(link for link in found if "31_coreset.html" in link))
        assert "Coreset" in driver.title
        assert any("reference/api/models.html#" in link for link in results("select_greedy")), "functions are found in the reference"


@pytest.mark.slow
def test_figures_keep_their_shape_on_a_phone(site) -> None:
    with browser(500) as driver:
        for name in ("contribute/81_architecture", "data/12b_pcb_boards"):
            driver.get((site / "nbs" / f"{name}.html").as_uri())
            driver.execute_script("document.querySelectorAll('img.figure').forEach(figure => { figure.loading = 'eager' })")
            shapes = driver.execute_async_script("""const done = arguments[0], figures = [...document.querySelectorAll('img.figure')];
                Promise.all(figures.map(figure => figure.decode())).then(() => done(figures.map(
                    figure => [figure.clientWidth, figure.clientWidth / figure.clientHeight * figure.naturalHeight / figure.naturalWidth])))""")
            assert shapes and all(width <= 500 and abs(stretched - 1) < 0.05 for width, stretched in shapes), (name, shapes)
