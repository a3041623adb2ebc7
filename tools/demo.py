"""The demo: fit PatchCore on real solar cells, store the runs, build the book on them, say where the page is.

The committed store is copied without the demo's own experiment, so that the figures are made here and now; then they are
compared with the committed ones.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORE, COMMITTED = ROOT / "_runs" / "demo-store", ROOT / "data" / "results"
EXPERIMENT = "patchcore_elpv"


def call(*words: object) -> None:
    if code := subprocess.run([str(word) for word in words], cwd=ROOT).returncode:
        sys.exit(code)


def figures(store: Path) -> dict[tuple[str, int, str], float]:
    """(category, seed, metric) -> value of the demo's experiment in a store."""
    from defectbook.practice.runs import RunStore

    return {(row.category, row.seed, row.metric): row.value for run in RunStore(store).runs(EXPERIMENT) for row in run.metrics.itertuples()}


def main() -> None:
    started = time.perf_counter()
    shutil.rmtree(STORE, ignore_errors=True)
    shutil.copytree(COMMITTED, STORE, ignore=shutil.ignore_patterns(EXPERIMENT))
    os.environ["DEFECTBOOK_STORE"] = str(STORE)
    for cell_type in ("mono", "poly"):
        print(f"== PatchCore on {cell_type} cells", flush=True)
        call(Path(sys.executable).with_name("defectbook"), "run", EXPERIMENT, "-p", f"cell_type={cell_type}")
    print("== building the book", flush=True)
    call(sys.executable, "tools/book.py")
    known = figures(COMMITTED)
    for (category, seed, metric), value in figures(STORE).items():
        before = known.get((category, seed, metric))
        print(f"{EXPERIMENT} {category} seed {seed}: {metric} {value:.4f}" + (f" (committed run: {before:.4f})" if before is not None else ""))
    print(f"done in {time.perf_counter() - started:.0f} s; open file://{ROOT / '_book' / '_build' / 'html' / 'index.html'}")


if __name__ == "__main__":
    main()
