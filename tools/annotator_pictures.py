"""Pictures of the annotator at work: a real JupyterLab, a headless Chromium, real clicks.

    python tools/annotator_pictures.py FOLDER

writes one PNG a scene into FOLDER. Needs jupyterlab, selenium, and Debian's chromium and chromium-driver; without them it says which
is missing and ends with status 2.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import nbformat
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds: a busy machine may take a minute to import torch
CODE = """from defectbook.practice.annotator import Annotator

annotator = Annotator("boards", classes=["mouse bite", "short", "spur"], out="annotations", device="cpu", height=440)
annotator"""


def missing() -> str:
    """What a browser session needs and is not here, or an empty text."""
    lacking = [name for name in ("jupyterlab", "selenium", "anywidget") if importlib.util.find_spec(name) is None]
    lacking += [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return ", ".join(lacking)


def make_boards(folder: Path, count: int = 3, side: int = 384) -> list[np.ndarray]:
    """Simulated boards with a defect each, as PNG files; their masks (H, W)."""
    from defectbook.data.pcb import PcbBoards

    folder.mkdir(parents=True)
    wanted = ("mouse_bite", "short", "spur")
    samples = list(PcbBoards(12, side, seed=5, train=1, validation=1, kinds=wanted).test)
    chosen = [max((sample for sample in samples if sample.meta["kind"] == kind), key=lambda sample: sample.mask.sum()) for kind in wanted][:count]
    for number, sample in enumerate(chosen, 1):
        Image.fromarray(sample.image).save(folder / f"board {number}.png")
    return [sample.mask for sample in chosen]


def deepest(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the pixel that lies deepest in a mask."""
    largest = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    label = 1 + int(largest[2][1:, cv2.CC_STAT_AREA].argmax())
    depth = cv2.distanceTransform(np.pad((largest[1] == label).astype(np.uint8), 1), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


# -- the server ------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def running_lab(folder: Path) -> Iterator[str]:
    """A JupyterLab on `folder` with settings of its own; its address, with the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = folder / ".home"
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": "JupyterLab Light"}))
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {**kept, "HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
                 "JUPYTER_NO_CONFIG": "1", "PYTHONPATH": paths, "DEFECTBOOK_PROGRESS": "0"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}",
               "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=secret", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: answers(f"{address}/api?token=secret") or server.poll() is not None, "JupyterLab")
        if server.poll() is not None:
            raise OSError(f"JupyterLab did not start: {(home / 'lab.log').read_text()[-2000:]}")
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(url, timeout=20).status == 200
    return False


def wait(ready: Callable[[], Any], what: str, complaint: Callable[[], str] = lambda: "", patience: float = PATIENCE) -> Any:
    """The first true value of ready(). Raises `TimeoutError` that says what was waited for, and what complaint() says then."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if value := ready():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"waited for {what} in vain {complaint()}")


# -- the browser -----------------------------------------------------------------------------------------------------------------
class Lab:
    """A notebook with one annotator in a browser. images: of one size each, as (height, width)."""

    def __init__(self, address: str, notebook: str, size: tuple[int, int], window: str = "1320,1160"):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
                     f"--window-size={window}", "--force-device-scale-factor=1"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(PATIENCE)
        self.driver.set_script_timeout(PATIENCE)
        self.driver.command_executor.set_timeout(PATIENCE) if hasattr(self.driver.command_executor, "set_timeout") else None
        self.address, self.notebook, self.size = address, notebook, size

    def open(self) -> None:
        """Open the notebook as somebody who comes back would, and run all its cells."""
        self.driver.get(f"{self.address}/lab/tree/{self.notebook}?token=secret&reset")
        wait(lambda: self.js("return document.querySelector('.jp-Notebook .jp-Cell') !== null && window.jupyterapp !== undefined"), "the notebook")
        wait(lambda: self.js("return document.querySelector('.jp-NotebookPanel-toolbar') !== null"), "the toolbar")
        self.js("jupyterapp.commands.execute('application:set-mode', {mode: 'single-document'})")
        self.js("if (jupyterapp.shell.leftCollapsed === false) jupyterapp.commands.execute('application:toggle-left-area')")
        self.js("document.querySelectorAll('.dbk').forEach((node) => node.remove())")  # a picture of an older run
        for attempt in range(3):
            self.execute("notebook:run-all-cells")
            try:
                wait(lambda: self.data("done") or self.failed(), "the widget", self.complaint, PATIENCE / 2)
            except TimeoutError as error:
                print(error, file=sys.stderr)
            if self.data("done"):
                break
            # anywidget gives a page two seconds to load a widget, and a machine that does other work may need more.
            print(f"no widget after attempt {attempt + 1}; running the cell again, as a person would", file=sys.stderr)
            self.js("document.querySelectorAll('.dbk').forEach((node) => node.remove())")
        else:
            raise TimeoutError(f"waited for the widget in vain {self.complaint()}")
        # JupyterLab's own margins are not the same each time; pictures that are to be compared need one width.
        self.resize(1120)

    def resize(self, width: int) -> None:
        """Make the widget so many CSS px wide."""
        self.js("const root = document.querySelector('.dbk'); root.style.width = `${arguments[0]}px`; root.scrollIntoView({block: 'center'})", width)
        time.sleep(0.5)

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme, and wait until its colours are there."""
        dark = "true" if "Dark" in name else "false"
        self.js("jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})", name)
        wait(lambda: self.js("return document.body.dataset.jpThemeLight !== arguments[0]", dark), name)
        time.sleep(0.5)

    def zoom_to(self, x: float, y: float, turns: int = 4) -> None:
        """Turn the wheel over pixel (x, y), which stays where it is."""
        self.focus()
        for _ in range(turns):
            self.js("const c = document.querySelector('.dbk-canvas'), b = c.getBoundingClientRect();"
                    "c.dispatchEvent(new WheelEvent('wheel', {deltaY: -300, clientX: Math.round(b.left + arguments[0]), "
                    "clientY: Math.round(b.top + arguments[1]), cancelable: true, bubbles: true}))", *self.place(x, y))
        time.sleep(0.5)

    def execute(self, command: str) -> None:
        """Run a command once a kernel is there; the answer is not waited for."""
        wait(lambda: self.js("const session = jupyterapp.shell.currentWidget?.sessionContext;"
                             "return session?.session?.kernel?.connectionStatus === 'connected' && session.session.kernel.status === 'idle'"),
             "a kernel")
        self.js(f"jupyterapp.commands.execute('{command}')")

    def js(self, code: str, *values: Any) -> Any:
        return self.driver.execute_script(code, *values)

    def data(self, name: str) -> str | None:
        """What the widget says of itself."""
        return self.js("return document.querySelector('.dbk')?.dataset[arguments[0]]", name)

    def failed(self) -> bool:
        """Whether anywidget has given up on the widget since the last question."""
        return any("Failed to initialize model" in entry["message"] for entry in self.driver.get_log("browser"))

    def complaint(self) -> str:
        """What the page and the browser's console say."""
        return f"({self.text('.dbk-said')}) {[entry['message'][:300] for entry in self.driver.get_log('browser')][-5:]}"

    def text(self, part: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", part)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where the centre of pixel (x, y) is on the canvas while the whole image is shown, in CSS px from its left upper corner."""
        width, height = self.js("const c = document.querySelector('.dbk-canvas'); return [c.clientWidth, c.clientHeight]")
        scale = min(width / self.size[1], height / self.size[0])
        return (width - self.size[1] * scale) / 2 + (x + 0.5) * scale, (height - self.size[0] * scale) / 2 + (y + 0.5) * scale

    def colour(self, x: float, y: float) -> list[int]:
        """Red, green, blue of the canvas at pixel (x, y) of the image."""
        return self.js("const c = document.querySelector('.dbk-canvas'), r = c.width / c.clientWidth;"
                       "return [...c.getContext('2d').getImageData(arguments[0] * r, arguments[1] * r, 1, 1).data].slice(0, 3)", *self.place(x, y))

    def canvas(self) -> np.ndarray:
        """All the canvas's pixels, uint8 (H, W, 4)."""
        import base64
        import io

        url = self.js("return document.querySelector('.dbk-canvas').toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))

    def hands(self) -> Any:
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver, duration=50)

    def moved(self, x: float, y: float) -> Any:
        """Hands whose pointer is over pixel (x, y)."""
        canvas = self.driver.find_element("css selector", ".dbk-canvas")
        left, top = self.place(x, y)
        width, height = self.js("const c = document.querySelector('.dbk-canvas'); return [c.clientWidth, c.clientHeight]")
        return self.hands().move_to_element_with_offset(canvas, round(left - width / 2), round(top - height / 2))

    def answered(self, act: Callable[[], Any], what: str) -> None:
        """Do something and wait until the kernel's answer to `what` is drawn."""
        self.js("delete document.querySelector('.dbk').dataset.done")
        act()
        wait(lambda: self.data("done") == what, f"the answer to {what}", self.complaint)
        time.sleep(0.3)  # two frames of drawing

    def click(self, x: float, y: float, positive: bool = True) -> None:
        hands = self.moved(x, y)
        self.answered((hands.click() if positive else hands.context_click()).perform, "click")

    def drag(self, points: list[tuple[float, float]]) -> None:
        hands = self.moved(*points[0]).click_and_hold()
        x, y = self.place(*points[0])
        for point in points[1:]:
            u, v = self.place(*point)
            hands = hands.move_by_offset(round(u - x), round(v - y))
            x, y = x + round(u - x), y + round(v - y)
        self.answered(hands.release().perform, "stroke")

    def focus(self) -> None:
        """The keyboard goes to the widget, as after a click beside its buttons; a page that was just opened sends keys elsewhere."""
        self.js("document.querySelector('.dbk').focus({preventScroll: true})")

    def type(self, keys: str) -> None:
        """Keys that change only what is seen; the kernel is not asked."""
        self.focus()
        self.hands().send_keys(keys).perform()
        time.sleep(0.5)

    def press(self, key: str, what: str) -> None:
        self.focus()
        self.answered(self.hands().send_keys(key).perform, what)

    def button(self, label: str, what: str) -> None:
        press = "[...document.querySelectorAll('.dbk-button')].find((b) => b.textContent === arguments[0]).click()"
        self.answered(lambda: self.js(press, label), what)

    def picture(self, path: Path) -> None:
        """The widget as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.driver.find_element("css selector", ".dbk").screenshot(str(path))

    def close(self) -> None:
        self.driver.quit()


def kill_kernel(pid: int) -> None:
    """Kill a kernel as the system would, and wait until JupyterLab has put another in its place."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if int(path.parent.name) != pid and path.read_bytes() == command:
                    return True
        return False

    wait(replaced, "another kernel")


def write_notebook(path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)


def take(folder: Path) -> None:
    """The scenes of chapter 64, as PNG files in `folder`: a click, the brush, a close view in a dark theme, a narrow page."""
    from selenium.webdriver.common.keys import Keys

    with tempfile.TemporaryDirectory() as place:
        masks = make_boards(Path(place) / "boards")
        write_notebook(Path(place) / "annotate.ipynb")
        with running_lab(Path(place)) as address:
            lab = Lab(address, "annotate.ipynb", masks[0].shape)
            try:
                lab.open()
                x, y = deepest(masks[0])
                lab.click(x, y)
                lab.picture(folder / "1-click.png")
                lab.click(x + 30, y, positive=False)
                lab.type("b")
                lab.drag([(x - 5, y - 3), (x, y - 5), (x + 4, y - 4)])
                lab.picture(folder / "2-brush.png")
                lab.type("q")
                lab.press(Keys.ENTER, "accept")
                lab.press(Keys.ARROW_RIGHT, "go")
                lab.press("2", "class")
                lab.theme("JupyterLab Dark")
                lab.zoom_to(*deepest(masks[1]))
                lab.click(*deepest(masks[1]))
                lab.picture(folder / "3-dark.png")
                lab.type("f")
                lab.theme("JupyterLab Light")
                lab.press(Keys.ARROW_LEFT, "go")
                lab.resize(390)
                lab.picture(folder / "4-narrow.png")
            finally:
                lab.close()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if lacking := missing():
        print(f"tools/annotator_pictures.py: no pictures, for want of {lacking}", file=sys.stderr)
        sys.exit(2)
    take(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
