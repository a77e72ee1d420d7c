"""drain: runs of three steps by one worker, and one run of 1,000 steps; beside them, in turns with them, the floor: the
same rows by plain apsw, in transactions of the same sizes.

Each in a process of its own, with no line of a log. `make bench` has the same as other engines do it, log and all.
"""

import asyncio
import time
from pathlib import Path

from benchmarks.measure import Row, Target, in_fresh_process, new_home, pairs
from benchmarks.own import engine
from benchmarks.own.workflows.idle_work import many_steps
from benchmarks.peers.floor import ByApsw
from benchmarks.place import Place
from benchmarks.work import SEQUENCE, Payload, payload
from tako_runtime.store import Home

#: concurrency: (runs, quick runs), and what share of the floor's rate is wanted.
SIZES = {1: (600, 200), 10: (8_000, 2_000), 100: (20_000, 6_000)}
WANTED = {10: Target(">=", 0.5), 100: Target(">=", 0.4)}

STEPS = 1_000


class Floor(ByApsw):
    """Its handlers do nothing, and say nothing of it."""

    @staticmethod
    def tell(what: int, run: int, step: int = 0) -> None: ...

    @staticmethod
    def body(given: Payload, step: int) -> int:
        return 1


def measure(quick: bool) -> list[Row]:
    rows = []
    for concurrency, (many, few) in SIZES.items():
        rates, floors = [], []
        for _ in range(3 if quick else 7):
            with new_home() as home:
                rates.append(in_fresh_process(engine.drain, home, few if quick else many, concurrency).rate)
            with new_home() as home:
                floors.append(in_fresh_process(_by_apsw, home.data_dir, few if quick else many, concurrency, 3))
        rows.append(pairs(f"drain, concurrency {concurrency}", "runs/s", rates, floors, WANTED.get(concurrency)))
    times, commits = [], []
    for _ in range(3 if quick else 7):
        with new_home() as home:
            times.append(in_fresh_process(_many_steps, home))
        with new_home() as home:
            commits.append(1e6 / (STEPS * in_fresh_process(_by_apsw, home.data_dir, 1, 1, STEPS)))
    rows.append(pairs("one of 1,000 steps, beside a commit", "us", times, commits, Target("<", 2.5)))
    return rows


def _by_apsw(folder: Path, runs: int, concurrency: int, steps: int) -> float:
    """Runs a second."""
    floor = Floor(Place(folder, "", {}))
    for at in range(0, runs, engine.FILL):
        floor.fill(SEQUENCE, [payload(n, steps) for n in range(at, min(at + engine.FILL, runs))])
    began = time.perf_counter()
    floor.drain(concurrency)
    took = time.perf_counter() - began
    floor.close()
    return runs / took


def _many_steps(home: Home) -> float:
    """Microseconds a step."""
    opened = engine.Opened(home)
    many_steps.enqueue_sync(STEPS)
    began = time.perf_counter()
    asyncio.run(opened.worker(1, idle_timeout=0).run())
    took = time.perf_counter() - began
    opened.close()
    return took / STEPS * 1e6
