"""Kernels that start warm: one process imports the heavy libraries once, and each kernel is a fork of it.

Most of a chapter's time went into importing torch and its company (four to seven processor seconds, for each of 150 chapters).
`warm_kernels(folder)` starts the warm process and writes a kernel specification into `folder`, whose command is this file; that
asks the warm process for a fork, and lives as long as the fork does, so that a client can watch and kill it as any kernel.
Needs `os.fork`; elsewhere the plain kernel does.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

NAME = "warm"
# What chapters import; the library itself stays out, since a run's record names the modules of it that were loaded.
LIBRARIES = ("torch", "timm", "cv2", "faiss", "matplotlib.pyplot", "pandas", "scipy.stats", "scipy.ndimage", "scipy.optimize", "skimage.measure",
             "imagehash", "safetensors.torch", "segment_anything", "nbformat", "ipykernel.kernelapp")


def serve(place: str) -> None:
    """Import, then fork a kernel for each request; ends with the process that started it."""
    import importlib

    parent = os.getppid()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # matplotlib reads it once; a kernel would set it too late
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # an extra that this installation lacks; a chapter that needs it will say so
            importlib.import_module(library)
    if threading.active_count() > 1:
        sys.exit(f"tools/bookparts/warm_kernels.py: {threading.active_count()} threads run after the imports, so forks would not be safe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that end leave nothing behind
    print("warm", flush=True)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            asked, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                become_kernel(asked)
            asked.close()


def become_kernel(asked: socket.socket) -> None:
    """In the fork: be the kernel that was asked for, as long as the asker lives; the open socket tells the asker the same of the kernel."""
    request = json.loads(asked.makefile().readline())
    asked.sendall(f"{os.getpid()}\n".encode())
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["ipykernel_launcher", *request["arguments"]]
    sys.path.remove(str(Path(__file__).resolve().parent))
    threading.Thread(target=lambda: (asked.recv(1), os._exit(0)), daemon=True).start()
    from ipykernel import kernelapp

    try:
        kernelapp.launch_new_instance()
    finally:
        os._exit(0)


def ask(place: str, arguments: list[str]) -> None:
    """Ask for a fork and stay until it ends; interrupts go to it."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(place)
    client.sendall((json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}) + "\n").encode())
    answers = client.makefile()
    kernel = int(answers.readline())
    signal.signal(signal.SIGINT, lambda *_: os.kill(kernel, signal.SIGINT))
    answers.read()


@contextlib.contextmanager
def warm_kernels() -> Iterator[str]:
    """A name of a kernel for the time of the block: warm ones where the system can fork, else "python3"."""
    if not sys.platform.startswith("linux"):
        yield "python3"
        return
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/warm.sock"
        spec = Path(folder, "kernels", NAME)
        spec.mkdir(parents=True)
        command = [sys.executable, "-S", "-E", str(Path(__file__).resolve()), "ask", place, "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": NAME, "language": "python"}))
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        server = subprocess.Popen([sys.executable, Path(__file__).resolve(), "serve", place], stdout=subprocess.PIPE, text=True)
        try:
            if server.stdout.readline().strip() != "warm":
                sys.exit("tools/bookparts/warm_kernels.py: the warm process ended before it could serve; the lines above say why")
            yield NAME
        finally:
            server.terminate()
            server.wait()
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[2], sys.argv[3:])
