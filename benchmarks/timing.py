"""What all benchmarks share: a clock, rounds that alternate, and one JSON object a line. No benchmark itself."""

import gc
import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any


def seconds(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Wall seconds of one call, and its value."""
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def alternate(functions: Sequence[Callable[[], Any]], rounds: int) -> tuple[list[float], list[Any]]:
    """The best time of each function over rounds that run all of them in turn, and their last values."""
    values, best = [None] * len(functions), [float("inf")] * len(functions)
    for _ in range(rounds):
        for place, function in enumerate(functions):
            gc.collect()
            taken, values[place] = seconds(function)
            best[place] = min(best[place], taken)
    return best, values


def report(case: str, ours: float | None, reference: float | None, floor: float | None, agree: Any, **more: Any) -> None:
    """Print one line: seconds (None where there are none), ratio = reference / ours, and what was found to agree."""
    times = {name: None if value is None else round(value, 7)
             for name, value in (("ours_seconds", ours), ("reference_seconds", reference), ("floor_seconds", floor))}
    ratio = round(reference / ours, 3) if ours and reference else None
    print(json.dumps({"case": case, **times, "ratio": ratio, "agree": agree, **more}), flush=True)


def peak_of(function: Callable[[], object]) -> int:
    """The largest number of bytes that `function` holds at once, beside what was there before."""
    gc.collect()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
