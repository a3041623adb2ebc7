"""Faults under a sweep: kills, a full disk, a store that cannot be written, damage while it runs, two sweeps at once. Nothing is lost or doubled."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_sweeps import assert_nothing_lost, processes_of, runs_in, start, sweeps_store, undisturbed, write_grid, write_tiny

from defectbook.core import StoreError
from defectbook.practice.grids import read_grid
from defectbook.practice.store_tools import collect, find_rubbish, verify
from defectbook.practice.sweeps import failures, plan, run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="orphaned cells are ended, and disks made, by Linux only")]


def wait_until(what, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def finished(store: Path) -> list[Path]:
    """The runs that a store holds now."""
    return [path.parent for path in store.glob("tiny/*/params.json") if not path.parent.name.startswith(".")]


# Kills -------------------------------------------------------------------------------------------------------------------------------

def test_a_sweep_killed_at_twenty_random_moments(tmp_path, capsys) -> None:
    """One cell waits for a file, so that every kill meets a sweep that is at work; the others come and go beside it.

    The moments are drawn in units of what a cell takes on this machine today, so that a slow one gets as far between two kills as a fast one.
    """
    started = time.perf_counter()
    calm = undisturbed(tmp_path, 12, 0.8)
    unit = (time.perf_counter() - started) / 6  # two at a time
    rough, release = tmp_path / "rough", tmp_path / "release"
    write_tiny(rough)
    path = rough / "tiny.yaml"
    cells = [{"experiment": "tiny.ipynb", "fixed": {"pause": 0.8}, "seeds": list(range(1, 12))},
             {"experiment": "tiny.ipynb", "fixed": {"pause": 0.8, "seed": 0, "wait_for": str(release)}}]
    path.write_text(json.dumps({"store": "results", "memory": 0.2, "grids": cells[::-1]}))
    rng, met, stored = random.Random(0), 0, []
    for _ in range(20):
        process = start(path, rough / "sweep")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, 3.5) * unit)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        met += 1
        stored.append(len(finished(rough / "results")))
        assert verify(sweeps_store(rough)) == []  # at no moment a half run
    release.write_text("")
    last = start(path, rough / "sweep")
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()[-2000:]
    assert met == 20 and stored == sorted(stored) and stored[-1] > 0  # what was finished stayed
    with capsys.disabled():
        print(f"\n{met} kills met a running sweep, {unit:.1f} s a cell; runs in the store after each: {stored}")
    assert_nothing_lost(tmp_path, calm, 12)


def test_killed_cells_are_failed_and_run_again(tmp_path) -> None:
    """Not the sweep but the processes of its cells are killed."""
    calm = undisturbed(tmp_path, 3, 0.5)
    path = write_grid(tmp_path / "rough", 3, {"pause": 0.5})
    folder, rng, killed = tmp_path / "rough" / "sweep", random.Random(1), 0
    for _ in range(3):
        process = start(path, folder)  # what failed is not tried again by itself, so that each round kills others
        wait_until(lambda process=process: processes_of(folder / "cells") or process.poll() is not None)
        time.sleep(rng.uniform(0.0, 3.0))
        for victim in processes_of(folder / "cells"):
            try:
                os.kill(victim, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        process.communicate(timeout=120)
    table = run_sweep(read_grid(path), folder, processes=2, retry_failed=True)
    assert killed >= 1 and table.state.tolist() == ["done"] * 3, (killed, failures(table, folder))
    collect(find_rubbish(sweeps_store(tmp_path / "rough"), draft_age=0))
    assert runs_in(tmp_path / "rough" / "results") == calm


# Disks -------------------------------------------------------------------------------------------------------------------------------

class Disk:
    """A disk of its own, in memory."""

    def __init__(self, place: Path):
        self.place = place
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk of its own can be mounted here: {done.stderr.strip()}")

    def remount(self, *options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(["remount", *options]), self.place], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.place], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    small = Disk(tmp_path / "disk")
    yield small
    small.close()


def fill(place: Path) -> Path:
    """A file that takes all that is free."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            pass
    return ballast


def test_a_full_disk_under_the_store(tmp_path, disk) -> None:
    """Cells fail by name, what was stored stays whole, and once there is room the sweep goes on to the same bytes."""
    calm = undisturbed(tmp_path, 3, 0.0)
    path = write_grid(tmp_path / "rough", 1, store=str(disk.place / "results"))
    folder = tmp_path / "rough" / "sweep"
    assert run_sweep(read_grid(path), folder).state.tolist() == ["done"]
    before = runs_in(disk.place / "results")
    ballast = fill(disk.place)
    path = write_grid(tmp_path / "rough", 3, store=str(disk.place / "results"))
    table = run_sweep(read_grid(path), folder, processes=2)
    assert table.state.tolist() == ["done", "failed", "failed"]
    assert all("No space left" in why and "StoreError" in why and str(disk.place) in why for why in table.why[1:]), table.why.tolist()
    assert runs_in(disk.place / "results") == before  # no draft is left either
    ballast.unlink()
    table = run_sweep(read_grid(path), folder, processes=2, retry_failed=True)
    assert table.state.tolist() == ["done"] * 3 and runs_in(disk.place / "results") == calm


def test_a_full_disk_under_the_records(tmp_path, disk) -> None:
    """Where the sweep itself cannot write it stops by name; runs are not lost, and the next sweep finds them."""
    calm = undisturbed(tmp_path, 2, 0.0)
    path, folder = write_grid(tmp_path / "rough", 2), disk.place / "sweep"
    ballast = fill(disk.place)
    with pytest.raises(StoreError, match="No space left") as caught:
        run_sweep(read_grid(path), folder, processes=2)
    assert "\n" not in str(caught.value) and str(disk.place) in str(caught.value)
    ballast.unlink()
    disk.remount("size=8m")
    assert run_sweep(read_grid(path), folder, processes=2).state.tolist() == ["done", "done"]
    assert runs_in(tmp_path / "rough" / "results") == calm


def test_a_disk_that_fills_up_while_cells_run(tmp_path, disk) -> None:
    calm = undisturbed(tmp_path, 4, 0.6)
    disk.remount("size=8m")
    path, folder = write_grid(tmp_path / "rough", 4, {"pause": 0.6}, store=str(disk.place / "results")), disk.place / "sweep"
    process = start(path, folder)
    wait_until(lambda: finished(disk.place / "results"))
    ballast = fill(disk.place)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    if b"Traceback" in errors:
        assert b"StoreError" in errors.splitlines()[-1] and b"No space left" in errors.splitlines()[-1], errors[-600:]
    ballast.unlink()
    assert processes_of(folder) == []
    table = run_sweep(read_grid(path), folder, processes=2, retry_failed=True)
    assert table.state.tolist() == ["done"] * 4, failures(table, folder)
    collect(find_rubbish(sweeps_store(disk.place), draft_age=0))
    assert runs_in(disk.place / "results") == calm and verify(sweeps_store(disk.place)) == []


def test_a_store_that_cannot_be_written(tmp_path, disk) -> None:
    calm = undisturbed(tmp_path, 2, 0.0)
    path = write_grid(tmp_path / "rough", 1, store=str(disk.place / "results"))
    folder = tmp_path / "rough" / "sweep"
    assert run_sweep(read_grid(path), folder).state.tolist() == ["done"]
    before = runs_in(disk.place / "results")
    path = write_grid(tmp_path / "rough", 2, store=str(disk.place / "results"))
    disk.remount("ro")
    table = run_sweep(read_grid(path), folder)
    assert table.state.tolist() == ["done", "failed"] and "Read-only" in table.why[1] and "StoreError" in table.why[1], table.why.tolist()
    assert runs_in(disk.place / "results") == before
    with pytest.raises(StoreError, match="Read-only"):
        run_sweep(read_grid(path), disk.place / "sweep")
    disk.remount("rw")
    assert run_sweep(read_grid(path), folder, retry_failed=True).state.tolist() == ["done"] * 2 and runs_in(disk.place / "results") == calm


# Others at work ----------------------------------------------------------------------------------------------------------------------

def test_damage_while_a_sweep_runs(tmp_path) -> None:
    """A run is cut off while other cells still run: it is named, the others are not touched, and computed again when asked for."""
    calm = undisturbed(tmp_path, 3, 0.5)
    path = write_grid(tmp_path / "rough", 3, {"pause": 0.5})
    folder, store, victims = tmp_path / "rough" / "sweep", tmp_path / "rough" / "results", []

    def damage() -> None:
        wait_until(lambda: list(folder.glob("cells/*/record.json")))  # the hash of what it stored is known
        (victim,) = finished(store)[:1]
        (victim / "metrics.csv").write_bytes((victim / "metrics.csv").read_bytes()[:-7])
        victims.append(victim)

    thread = threading.Thread(target=damage)
    thread.start()
    table = run_sweep(read_grid(path), folder, processes=1)
    thread.join()
    assert sorted(table.state) == ["altered", "done", "done"] and victims[0].name in table.why[table.state == "altered"].item()
    problems = verify(sweeps_store(tmp_path / "rough"))
    assert problems and all(str(victims[0]) in line for line in problems)
    assert run_sweep(read_grid(path), folder).ran.sum() == 0  # not silently made anew
    assert run_sweep(read_grid(path), folder, refresh=True).state.tolist() == ["done"] * 3 and runs_in(store) == calm


def test_two_sweeps_of_one_grid_at_once(tmp_path) -> None:
    """In one folder the second is refused by name; with folders of their own both end, and the store is that of one."""
    calm = undisturbed(tmp_path, 3, 0.6)
    path = write_grid(tmp_path / "rough", 3, {"pause": 0.6})
    first = start(path, tmp_path / "rough" / "sweep")
    wait_until(lambda: processes_of(tmp_path / "rough" / "sweep" / "cells"))
    second = start(path, tmp_path / "rough" / "sweep")
    _, errors = second.communicate(timeout=60)
    assert second.returncode != 0 and f"is open in another sweep (process {first.pid} on".encode() in errors
    third = start(path, tmp_path / "rough" / "other")
    for process in (first, third):
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert runs_in(tmp_path / "rough" / "results") == calm
    assert [plan(read_grid(path), tmp_path / "rough" / name).state.tolist() for name in ("sweep", "other")] == [["done"] * 3] * 2
    assert verify(sweeps_store(tmp_path / "rough")) == [] == find_rubbish(sweeps_store(tmp_path / "rough"), draft_age=0)
