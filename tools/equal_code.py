"""Declare that the changes since a commit leave the figures of stored runs as they are.

    python tools/equal_code.py --since COMMIT --reason "errors name the file" --checked "all_methods on wood, three rows: equal"
    python tools/equal_code.py --since COMMIT --docstrings

The second form checks by itself: the modules' syntax trees, docstrings left out, must be what they were.

Every run of the store that was fresh at COMMIT gets a pair (hash of its modules' code then, hash now) in data/results/equal_code.json.
Runs that were stale at COMMIT stay stale.
"""

import argparse
import ast
import json
import subprocess
from functools import cache
from pathlib import Path

from defectbook.core import sha256_json, write_whole
from defectbook.practice.runs import EQUAL_CODE, RunStore, follow, library_hash

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_at(commit: str, module: str) -> tuple[str, ...] | None:
    """The code lines of a module at a commit, comment lines left out as `library_hash` does; None where there was no such module."""
    shown = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:defectbook/{module.replace('.', '/')}.py"], capture_output=True, text=True)
    return tuple(line for line in shown.stdout.splitlines() if not line.lstrip().startswith("#")) if shown.returncode == 0 else None


def library_at(commit: str, modules: tuple[str, ...]) -> str:
    """`library_hash` of `modules` as they were at `commit`."""
    code = {module: code_at(commit, module) for module in modules}
    return sha256_json({module: None if lines is None else list(lines) for module, lines in code.items()})[:16]


def without_docstrings(source: str) -> str:
    """The syntax tree of a module as text, its docstrings and comments left out."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def changed_otherwise(commit: str) -> list[str]:
    """The library's modules in which more than docstrings and comments changed since `commit`; a module that went is one."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    # _modidx lists names for nbdev's documentation; nothing imports it. A module that is new stands behind no older run.
    names = [name for name in git("diff", "--name-only", "--diff-filter=d", commit, "--", "defectbook").splitlines() if name.endswith(".py")]
    before = set(git("ls-tree", "-r", "--name-only", commit, "defectbook").splitlines())
    gone = git("diff", "--name-only", "--diff-filter=D", commit, "--", "defectbook/*.py").splitlines()
    return gone + [name for name in names if name in before and Path(name).stem != "_modidx"
                   and without_docstrings(git("show", f"{commit}:{name}")) != without_docstrings((ROOT / name).read_text())]


def declare(store: RunStore, commit: str, reason: str, checked: str) -> dict[str, str]:
    """Write the declaration; returns its pairs, old hash -> new hash. Nothing is written when no run is concerned."""
    pairs = {}
    for run in store.runs():
        made = run.provenance
        if "modules" not in made:
            continue
        modules, known = tuple(made["modules"]), follow(made["library"], store.path)
        if known == library_at(commit, modules) and known != library_hash(modules):
            pairs[known] = library_hash(modules)
    path = store.path / EQUAL_CODE
    before = json.loads(path.read_text())["declarations"] if path.is_file() else []
    full = subprocess.run(["git", "-C", str(ROOT), "rev-parse", commit], capture_output=True, text=True, check=True).stdout.strip()
    if pairs:
        entry = {"since": full, "reason": reason, "checked": checked, "pairs": pairs}
        write_whole(path, json.dumps({"declarations": [*before, entry]}, indent=1) + "\n")
    return pairs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--since", required=True, metavar="COMMIT", help="the last one before the changes")
    parser.add_argument("--reason", help="why no figure can differ")
    parser.add_argument("--checked", help="what was run again, and that it was equal")
    parser.add_argument("--docstrings", action="store_true", help="only docstrings and comments changed; checked here")
    parser.add_argument("--store", default="", metavar="FOLDER")
    args = parser.parse_args()
    if args.docstrings and (args.reason or args.checked):
        parser.error("--docstrings says reason and check itself")
    if args.docstrings:
        if others := changed_otherwise(args.since):
            parser.error(f"more than docstrings changed in {', '.join(others)}")
        args.reason, args.checked = "Docstrings and comments only", "the modules' syntax trees without docstrings are equal"
    if not (args.reason and args.checked):
        parser.error("give --reason and --checked, or --docstrings")
    store = RunStore(args.store)
    stale = sum(run.stale for run in store.runs())
    pairs = declare(store, args.since, args.reason, args.checked)
    print(f"{len(pairs)} states of the code declared equal; {stale} runs were stale, {sum(run.stale for run in store.runs())} are now")
