"""`defectbook annotate`: a notebook that opens the annotator, JupyterLab on it, and one line when something is wrong. No browser."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, noise
from PIL import Image

from defectbook.core import ParameterError, StoreError
from defectbook.practice import cli

sys.path.insert(0, str(ROOT / "tools"))
import annotator_pictures as pictures  # noqa: E402


@pytest.fixture
def plates(tmp_path: Path) -> Path:
    folder = tmp_path / "my 'plates'"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(noise(number, (48, 64))).save(folder / f"{number}.png")
    return folder


class FakeLab:
    """JupyterLab as `annotate` sees it: it is interrupted once, then ends with `status`."""

    status = 0

    def __init__(self, command: list[str]):
        FakeLab.command, self.returncode, self.waits = command, None, 0

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt
        self.returncode = self.status


def test_the_notebook_opens_the_annotator(plates: Path, tmp_path: Path) -> None:
    path = cli.write_annotator_notebook(str(plates), ["hole", "crack"], str(tmp_path / "out"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path == tmp_path / "out" / "annotate.ipynb" and "2 images" in notebook.cells[0].source
    names: dict = {}
    exec(notebook.cells[1].source.rsplit("\n", 1)[0], names)
    session = names["annotator"].session
    try:
        assert [sample.name for sample in session.samples] == ["0.png", "1.png"] and session.classes == ("hole", "crack")
        assert session.out == tmp_path / "out"
    finally:
        session.close()


def test_jupyterlab_is_started_on_the_notebook(plates: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli.subprocess, "Popen", FakeLab)
    line = ["annotate", str(plates), "--classes", "hole, crack", "--out", str(tmp_path / "out"), "--no-browser", "--lab=--port=9123"]
    assert cli.main(line) == 0, "Ctrl-C is JupyterLab's to answer"
    assert FakeLab.command[:3] == [sys.executable, "-m", "jupyterlab"] and {"--no-browser", "--port=9123"} <= set(FakeLab.command)
    assert f"--ServerApp.root_dir={tmp_path / 'out'}" in FakeLab.command and "annotate.ipynb" in capsys.readouterr().out
    monkeypatch.setattr(FakeLab, "status", 3)
    assert cli.main(line) == 2 and "ended with status 3" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [(["--classes", "good"], "taken by the folder layout"), (["--classes", "a,,b"], "class ''"),
                                                (["--out", "/proc/nowhere"], "/proc/nowhere")])
def test_bad_input_is_one_line(plates: Path, tmp_path: Path, options, words, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli.subprocess, "Popen", lambda *_: pytest.fail("JupyterLab was started"))
    assert cli.main(["annotate", str(plates), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert cli.main(["annotate", str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["jupyterlab", "anywidget"])
def test_a_missing_program_is_one_line(module: str, plates: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    assert cli.main(["annotate", str(plates), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"annotate needs {module}" in said and "pip install" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_errors_have_types(plates: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError):
        cli.write_annotator_notebook(str(plates), [], str(tmp_path / "out"))
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        cli.write_annotator_notebook(str(plates), ["a"], str(tmp_path / "file"))


@pytest.mark.slow
def test_a_real_jupyterlab_says_where_it_is(plates: Path, tmp_path: Path) -> None:
    pytest.importorskip("jupyterlab")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "import sys; from defectbook.practice.cli import main; sys.exit(main())", "annotate", str(plates), "--out",
               str(tmp_path / "out"), "--no-browser", "--lab=--allow-root", "--lab=--ServerApp.ip=127.0.0.1",
               f"--lab=--ServerApp.port={port}"]
    lab = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        url = next(found.group() for line in lab.stdout if (found := re.search(r"http://127\S+/lab/tree/annotate.ipynb\?token=\w+", line)))
        pictures.wait(lambda: lab.poll() is not None or pictures.answers(url), "JupyterLab")  # it says where it is before it listens
        assert lab.poll() is None
    finally:
        os.killpg(lab.pid, signal.SIGTERM)  # a group of its own: this command and its JupyterLab
        lab.wait(60)
