"""What malformed input is made of, and the sandbox in which it is opened: used by test_fuzz.py."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defectbook.core import DefectbookError

OPENED: Counter = Counter()  # kind of input -> how many were opened
PATIENCE = 30  # seconds that one input may take


class Forbidden(BaseException):
    """Something that no input may cause; no BaseException is caught by `except Exception`."""


# What may not happen, whatever is opened ---------------------------------------------------------------------------------------------

_sins: list[str] | None = None  # None: nobody watches
_inside = ""
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "pickle.find_class")
_WRITES = {"os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1,
           "shutil.rmtree": 1, "shutil.move": 2}


def _watch(event: str, arguments: tuple) -> None:
    """Notes whatever starts a program, reaches for the net, unpickles a class, or writes outside of the sandbox."""
    if _sins is None:
        return
    if event in _STARTS:
        _sins.append(f"{event} {arguments[:2]!r}")
        raise Forbidden(_sins[-1])
    places: tuple = ()
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        places = arguments[:1]
    elif event in _WRITES:
        places = arguments[:_WRITES[event]]
    for place in places:
        if isinstance(place, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(place))
            if not path.startswith((_inside + os.sep, "/dev/")) and "__pycache__" not in path and os.path.isabs(os.fsdecode(place)):
                _sins.append(f"{event} {path}")


sys.addaudithook(_watch)


def _forbidden(name: str) -> Callable:
    def act(*_: Any, **__: Any) -> Any:
        raise Forbidden(f"{name} was called")

    return act


def listing(root: Path, without: Path | None = None) -> dict[str, str]:
    """Every file, folder and link below `root`, with a hash of what it holds."""
    found = {}
    for path in sorted(root.rglob("*")):
        if without is not None and (path == without or without in path.parents):
            continue
        name = path.relative_to(root).as_posix()
        found[name] = (f"link {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir()
                       else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "special")
    return found


class Sandbox:
    """A folder with a home, a working folder, a folder of temporary files and `inputs`; `problems` collects what went wrong, input by input."""

    def __init__(self, root: Path):
        self.root, self.inputs, self.target, self.problems = root, root / "inputs", root / "targets" / "target", []
        for name in ("home", "cwd", "tmp", "inputs", "targets"):
            (root / name).mkdir(parents=True)
        for path in (root / "home" / ".profile", root / "cwd" / "precious.txt", root / "evil", root / "targets" / "neighbour.txt"):
            path.write_text(f"{path.name} is here and stays as it is\n")

    def put(self, name: str, content: bytes) -> Path:
        path = self.inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def open(self, kind: str, case: str, act: Callable[[], Any], named: str | Path, refuse: bool = False, free: Path | None = None,
             whole: bool = False) -> Any:
        """Do `act` with one input. Only a DefectbookError may escape, in one line that says `named`; nothing else in the sandbox may change.

        refuse: an error must come. free: a file or folder that may change; whole: only if no error comes. Returns what `act` returned, or the
        error.
        """
        global _sins, _inside
        OPENED[kind] += 1
        before, _sins, _inside = listing(self.root, free), [], str(self.root)
        everything = listing(self.root) if whole else before
        answer, wrong = None, ""
        try:
            with patience():
                answer = act()
            if refuse:
                wrong = f"was taken: {answer!r}"[:300]
        except DefectbookError as error:
            answer, text = error, str(error)
            if "\n" in text or len(text) > 2000 or str(Path(str(named)).name) not in text:
                wrong = f"message of {len(text)} characters that should name {named}: {text[:300]}"
        except (Exception, Forbidden) as error:
            trace = error.__traceback__
            while trace.tb_next:
                trace = trace.tb_next
            wrong = f"{type(error).__name__}: {str(error)[:300]} ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
            answer = error
        sins, _sins = _sins, None
        now, then = (listing(self.root), everything) if whole and isinstance(answer, BaseException) else (listing(self.root, free), before)
        if now != then:
            sins.append(f"changed {sorted(set(now.items()) ^ set(then.items()))[:4]}")
        self.problems += [f"{kind}, {case}: {text}" for text in ([wrong] if wrong else []) + sins]
        return answer

    def judge(self) -> None:
        problems, self.problems = self.problems, []
        assert not problems, f"{len(problems)} inputs:\n" + "\n".join(problems[:400])


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Ends what takes too long."""
    def stop(*_: Any) -> None:
        raise Forbidden(f"took more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A `Sandbox` with home, working and temporary folder set into it; there pickle, unsafe torch.load and unsafe np.load fail loudly."""
    import torch

    box = Sandbox(tmp_path / "box")
    for name, folder in (("HOME", "home"), ("TMPDIR", "tmp"), ("XDG_CACHE_HOME", "home"), ("TORCH_HOME", "home")):
        monkeypatch.setenv(name, str(box.root / folder))
    monkeypatch.setattr(tempfile, "tempdir", str(box.root / "tmp"))
    monkeypatch.chdir(box.root / "cwd")
    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, _forbidden(f"pickle.{name}"))
    load, numpy_load = torch.load, np.load

    def careful_load(*words: Any, **options: Any) -> Any:
        if options.get("weights_only") is not True:
            raise Forbidden("torch.load without weights_only=True")
        return load(*words, **options)

    def careful_numpy(*words: Any, **options: Any) -> Any:
        if options.get("allow_pickle"):
            raise Forbidden("np.load with allow_pickle=True")
        return numpy_load(*words, **options)

    monkeypatch.setattr(torch, "load", careful_load)
    monkeypatch.setattr(np, "load", careful_numpy)
    yield box
    box.judge()


# Damage ------------------------------------------------------------------------------------------------------------------------------

def damaged(content: bytes, seed: int = 0, cuts: int = 5, flips: int = 5) -> Iterator[tuple[str, bytes]]:
    """(what was done, the result): nothing left, cut off, single bits and runs of bytes changed, something before or behind it."""
    rng = random.Random(f"{seed} {len(content)}")
    yield "empty", b""
    yield "one byte", content[:1]
    for share in sorted({round(rng.random(), 3) for _ in range(cuts - 1)}) + [1.0]:
        yield f"cut at {share}", content[:min(len(content) - 1, int(share * len(content)))]
    for number in range(flips):
        changed = bytearray(content)
        for _ in range(1 if number % 2 else 16):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        yield f"bits flipped {number}", bytes(changed)
    start = rng.randrange(len(content))
    yield "zeros inside", content[:start] + bytes(16) + content[start + 16:]
    yield "ones inside", content[:start] + b"\xff" * 16 + content[start + 16:]
    yield "something before it", b"\0garbage" + content
    yield "random", rng.randbytes(200)


NO_TEXT = {"not UTF-8": b"\xff\xfe\x80\x81", "UTF-16": "{}".encode("utf-16"), "zero bytes": bytes(50), "binary": bytes(range(256)), "empty": b"",
           "blank": b" \n\t\n", "byte order mark": b"\xef\xbb\xbf{}", "long line": b"x" * 200_000}
NO_JSON = {**NO_TEXT, "list": b"[]", "number": b"7", "text": b'"x"', "null": b"null", "open": b"{", "deep list": b"[" * 200_000,
           "deep object": b'{"a":' * 100_000, "closed deep list": b"[" * 50_000 + b"]" * 50_000, "huge number": b"9" * 10_000, "NaN": b"NaN"}
WRONG: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**30, float("inf"), float("-inf"), float("nan"), "", "nonsense", "../../evil", "/etc/passwd",
                          "a\0b", "two\nlines", "\ud800", [], [[]], [None], {}, {"a": {}}, [1] * 1000)


def changed_values(value: Any, seed: int = 0, count: int = 20) -> Iterator[tuple[str, Any]]:
    """(what was done, JSON value): one entry of a nested value replaced by something wrong, or gone; `count` of the many ways."""
    rng = random.Random(seed)
    paths = list(_paths(value))
    for _ in range(count):
        path, other = rng.choice(paths), copy.deepcopy(value)
        inner = other
        for step in path[:-1]:
            inner = inner[step]
        if rng.random() < 0.2:
            del inner[path[-1]]
            yield f"{'.'.join(map(str, path))} gone", other
        else:
            inner[path[-1]] = rng.choice(WRONG)
            yield f"{'.'.join(map(str, path))}={str(inner[path[-1]])[:20]!r}", other


def _paths(value: Any, so_far: tuple = ()) -> Iterator[tuple]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*so_far, key)
        yield from _paths(inner, (*so_far, key))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


class Trap:
    """Pickled, it is a program: whoever loads it makes the file `place`."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)
