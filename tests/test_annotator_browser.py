"""A real JupyterLab and a headless Chromium: click on a defect, see the mask's pixels, kill the kernel, come back, find everything.

DEFECTBOOK_SCREENSHOTS: a folder that gets the pictures taken on the way (by default they go to the test's own folder).
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import annotator_pictures as pictures  # noqa: E402

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A notebook with an annotator of three boards, open in a browser."""
    if lacking := pictures.missing():
        pytest.skip(f"the annotator was not tested in a browser: {lacking} not installed")
    folder = tmp_path_factory.mktemp("lab")
    masks = pictures.make_boards(folder / "boards")
    pictures.write_notebook(folder / "annotate.ipynb")
    shots = Path(os.environ.get("DEFECTBOOK_SCREENSHOTS") or folder / "shots")
    with pictures.running_lab(folder) as address:
        lab = pictures.Lab(address, "annotate.ipynb", masks[0].shape)
        lab.folder, lab.masks, lab.shots = folder, masks, shots
        try:
            lab.open()
            yield lab
        except TimeoutError:
            lab.driver.save_screenshot(str(folder / "timeout.png"))
            raise
        finally:
            lab.close()


def marks(lab) -> list[str]:
    return lab.js("return [...document.querySelectorAll('.dbk-row')].map((row) => row.textContent)")


def log(lab) -> list[dict]:
    return [json.loads(line) for line in (lab.folder / "annotations" / "log.jsonl").read_text().splitlines()]


def test_a_morning_of_annotation(lab) -> None:
    from selenium.webdriver.common.keys import Keys

    x, y = pictures.deepest(lab.masks[0])
    assert "board 1.png" in lab.text(".dbk-title") and "1 / 3" in lab.text(".dbk-title")
    lab.picture(lab.shots / "1-before.png")
    empty = lab.canvas()

    lab.click(x, y)  # a click brings a mask, on the screen and on the disk
    assert len(marks(lab)) == 1 and "1 click" in marks(lab)[0] and int(lab.data("milliseconds")) > 0
    first = lab.canvas()
    changed = (first != empty).any(2)
    assert changed.sum() > 30, "the mask's pixels were drawn"
    print(f"from the click to the mask: {lab.data('milliseconds')} ms")
    (file,) = (lab.folder / "annotations" / "masks").glob("*/*.png")
    from defectbook.core import read_mask

    on_disk = read_mask(file)
    assert f"{on_disk.sum():,} px" in marks(lab)[0]
    lab.picture(lab.shots / "2-click.png")

    lab.click(x + 40, y + 20, positive=False)
    assert "2 clicks" in marks(lab)[0] and [event["positive"] for event in log(lab) if event["event"] == "click"] == [True, False]
    lab.press("u", "undo")
    assert "1 click" in marks(lab)[0] and np.array_equal(lab.canvas(), first), "undo brings the picture back"

    lab.press("2", "class")  # keys reach the widget and not JupyterLab, which would make a heading of the cell
    assert "short" in marks(lab)[0] and lab.js("return document.querySelectorAll('.jp-CodeCell').length") == 1
    lab.press("1", "class")

    lab.type("b")
    lab.drag([(x - 30, y - 30), (x - 10, y - 30), (x - 10, y - 20)])
    assert "1 stroke" in marks(lab)[0] and (lab.canvas() != first).any()
    lab.picture(lab.shots / "3-brush.png")
    lab.press("u", "undo")
    lab.type("q")

    lab.press(Keys.ENTER, "accept")
    assert log(lab)[-1]["event"] == "accept" and "accepted" in lab.text(".dbk-said")
    lab.press(Keys.ARROW_RIGHT, "go")
    assert "board 2.png" in lab.text(".dbk-title") and marks(lab) == []


def test_zoom_shows_the_model_the_view(lab) -> None:
    x, y = pictures.deepest(lab.masks[1])
    lab.zoom_to(x, y)
    assert "%" in lab.text(".dbk-zoom")
    lab.click(x, y)  # the wheel keeps what is under the pointer where it is; events come in whole px of the screen
    event = [event for event in log(lab) if event["event"] == "click"][-1]
    assert max(abs(event["x"] - x), abs(event["y"] - y)) <= 1 and event["frame"][2] - event["frame"][0] < lab.size[1] / 2
    lab.picture(lab.shots / "4-view.png")
    lab.type("f")
    assert lab.text(".dbk-zoom") == "whole image"


def test_bad_input_is_one_line(lab) -> None:
    width, height = lab.js("const c = document.querySelector('.dbk-canvas'); return [c.clientWidth, c.clientHeight]")
    before = marks(lab)
    canvas = lab.driver.find_element("css selector", ".dbk-canvas")
    lab.answered(lab.hands().move_to_element_with_offset(canvas, round(5 - width / 2), 0).click().perform, "click")
    assert "lies outside of the image" in lab.text(".dbk-said.dbk-error") and marks(lab) == before


def test_a_killed_kernel_loses_nothing(lab) -> None:
    before, seen, said = marks(lab), lab.canvas(), log(lab)
    assert len(before) == 1
    pid = json.loads((lab.folder / "annotations" / "annotator.lock").read_text())["pid"]
    pictures.kill_kernel(pid)
    lab.open()
    assert "board 2.png" in lab.text(".dbk-title") and marks(lab) == before
    assert np.array_equal(lab.canvas(), seen), "the same picture, to the pixel"
    assert f"took over from process {pid}" in lab.text(".dbk-said") and log(lab)[:len(said)] == said
    from selenium.webdriver.common.keys import Keys

    lab.press(Keys.ARROW_LEFT, "go")
    assert "board 1.png" in lab.text(".dbk-title") and len(marks(lab)) == 1 and "mouse bite" in marks(lab)[0]
    lab.picture(lab.shots / "5-after-the-kill.png")


def test_a_deleted_image_and_the_export(lab) -> None:
    from selenium.webdriver.common.keys import Keys

    (lab.folder / "boards" / "board 3.png").unlink()
    lab.press(Keys.ARROW_RIGHT, "go")
    lab.press(Keys.ARROW_RIGHT, "go")
    assert "no such image file" in lab.text(".dbk-notice.dbk-problem") and "board 3.png" in lab.text(".dbk-notice")
    lab.picture(lab.shots / "6-deleted.png")
    lab.press(Keys.ARROW_LEFT, "go")
    assert "board 2.png" in lab.text(".dbk-title") and len(marks(lab)) == 1
    lab.button("Export", "export")
    assert "written to" in lab.text(".dbk-said")
    exported = lab.folder / "annotations" / "export-1"
    assert len(list((exported / "mvtec" / "test").rglob("*.png"))) == 2 and len(json.loads((exported / "coco.json").read_text())["annotations"]) == 2


def contrast(front: str, back: str) -> float:
    """WCAG's ratio, 1 to 21, of two colours as CSS computes them: rgb(r, g, b), or rgba with an alpha, or color(srgb r g b)."""
    def parts(colour: str) -> list[float]:
        numbers = [float(part) for part in re.findall(r"[0-9.]+", colour.replace("srgb", ""))]
        return [value if colour.startswith("color") else value / 255 for value in numbers[:3]] + (numbers[3:] or [1.0])

    (*behind, _), (*before, alpha) = parts(back), parts(front)
    light = []
    for colour in ([alpha * value + (1 - alpha) * under for value, under in zip(before, behind, strict=True)], behind):
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_words_can_be_read_in_both_themes(lab, theme: str) -> None:
    """Each text against the background that it stands on: a contrast of 4.5 (WCAG AA)."""
    lab.theme(theme)
    lab.resize(1120)
    lab.picture(lab.shots / f"7-{theme.split()[-1].lower()}.png")
    found = lab.js("""
      const opaque = (node) => { for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (!/^rgba\\(.*, 0\\)$|transparent/.test(colour)) return colour; } return "rgb(255, 255, 255)"; };
      return [...document.querySelectorAll('.dbk *')].filter((node) => [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
          && node.offsetParent && !node.closest(':disabled') && !node.closest('.dbk-stage'))
        .map((node) => [node.className || node.tagName, node.textContent, getComputedStyle(node).color, opaque(node)])""")
    assert len(found) > 15
    for name, text, front, back in found:
        assert contrast(front, back) >= 4.5, f"{name} {text!r}: {front} on {back}"


def test_a_narrow_page_loses_nothing(lab) -> None:
    lab.resize(390)
    lab.picture(lab.shots / "8-narrow.png")
    hidden = lab.js("""
      const root = document.querySelector('.dbk'), box = root.getBoundingClientRect();
      return [...root.querySelectorAll('button, input, .dbk-total')].filter((node) => node.offsetParent)
        .filter((node) => { const b = node.getBoundingClientRect(); return b.left < box.left - 1 || b.right > box.right + 1 || b.width < 8; })
        .map((node) => node.className + ' ' + node.textContent)""")
    assert hidden == []
    lab.resize(1120)


def test_two_kernels_on_one_folder(lab) -> None:
    from defectbook.core import StoreError
    from defectbook.practice.folders import FolderLock

    with pytest.raises(StoreError, match="is open in another annotator"):
        FolderLock(lab.folder / "annotations", "annotator")
