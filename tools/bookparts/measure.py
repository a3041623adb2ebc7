"""Measure how long each chapter takes, and keep the seconds in nbs/parts/seconds.json, from which the parts' pages add them up.

    python tools/bookparts/measure.py [PATTERN]     # chapters whose path holds PATTERN; without one, those that have no figure yet

A chapter runs in a kernel of its own with one thread; the smaller of wall and processor time counts, since other work on the
machine stretches the one only. Experiments are left out: what theirs take is written in their stored runs.
"""

import json
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import book  # noqa: E402

SECONDS = book.ROOT / "nbs" / "parts" / "seconds.json"


def measure(chapter: str) -> float:
    """Seconds of one chapter, from starting its kernel to its end."""
    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started, used = time.perf_counter(), processor()
    book.run_cells(book.stage(chapter), book.ROOT / chapter)
    return min(time.perf_counter() - started, processor() - used)


def main(pattern: str | None = None) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "DEFECTBOOK_PROGRESS": "0"}
    os.environ.setdefault("DEFECTBOOK_STORE", str(book.ROOT / "data" / "results"))
    kept = json.loads(SECONDS.read_text())["chapters"] if SECONDS.is_file() else {}
    landing, parts = book.read_chapters()
    chapters = [chapter for chapter in (landing, *(name for names in parts for name in names))
                if chapter.endswith(".ipynb") and Path(chapter).parent.name != "experiments"]
    for chapter in chapters:
        if re.search(pattern, chapter) if pattern else chapter not in kept:
            kept[chapter] = max(1, round(measure(chapter)))
            print(f"{kept[chapter]:4d} s  {chapter}", flush=True)
            figures = {name: kept[name] for name in chapters if name in kept}
            SECONDS.write_text(json.dumps({"machine": f"{platform.machine()}, one thread", "chapters": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
