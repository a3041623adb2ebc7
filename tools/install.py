"""Install the project into .venv: python3 tools/install.py EXTRA

Uses uv when it is on the PATH or can be had from PyPI, else pip. Needs nothing but Python's standard library.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def say(words: str) -> None:
    print(f"== {words}", flush=True)


def call(*words: object) -> bool:
    return subprocess.run([str(word) for word in words], cwd=ROOT).returncode == 0


def installer() -> list[object]:
    """The command that installs into .venv: uv where it can be had, else pip."""
    uv = shutil.which("uv")
    if not uv and call(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"):
        uv = PYTHON.with_name("uv")
    # Byte code is compiled once here, as pip does by itself: where Python may not write it, each import of torch compiles anew.
    return [uv, "pip", "install", "--compile-bytecode", "--python", PYTHON] if uv else [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs before anything has checked)
        sys.exit(f"tools/install.py: Python {sys.version.split()[0]} is too old; 3.10 or newer is needed (make PYTHON=python3.11 demo)")
    extra, started = sys.argv[1], time.perf_counter()
    if not PYTHON.exists():
        say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        if not call(sys.executable, "-m", "venv", VENV):
            sys.exit("tools/install.py: python3 -m venv failed; on Debian, apt-get install python3-venv")
    install = installer()
    say(f"installing defectbook[{extra}] with {Path(str(install[0])).name}; torch is large, so this can take some minutes")
    if not call(*install, "-c", "constraints.txt", "-e", f".[{extra}]"):
        sys.exit("tools/install.py: installation failed; the lines above say why")
    if not call(PYTHON, "-c", "import cv2"):
        # opencv-python draws windows and needs libGL, which servers lack; the headless build has the same functions.
        say("opencv-python does not load here (no libGL?); taking opencv-python-headless instead")
        call(PYTHON, "-m", "pip", "uninstall", "--yes", "--quiet", "opencv-python")
        if not call(*install, "-c", "constraints.txt", "opencv-python-headless") or not call(PYTHON, "-c", "import cv2"):
            sys.exit("tools/install.py: OpenCV does not load; on Debian, apt-get install libgl1 libglib2.0-0")
    say(f"installed in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
