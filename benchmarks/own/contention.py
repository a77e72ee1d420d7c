"""contention: four processes enqueue one by one beside a busy worker: the turnstile, beside SQLite's own busy handler.

In a closed loop each process enqueues again at once. Paced, each has 100 requests a second to serve, and a request that
comes due while its process still waits counts from when it was due.
"""

import itertools
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

from benchmarks.measure import Row, Target, new_home, pairs, percentile, processes, row, wait_until
from benchmarks.own.engine import PAYLOAD, Opened, Queueing, work_until_stopped
from benchmarks.own.workflows.idle_work import three_steps
from tako_runtime.errors import TakoError
from tako_runtime.store import Home
from tako_runtime.store.base import CountRuns, ListWorkers

PROCESSES = 4
PACE = 100

#: More than a worker does while it is measured: it must not run dry.
BACKLOG_A_SECOND = 8_000


@dataclass(frozen=True, slots=True)
class Contended:
    """Latencies of all enqueues in milliseconds, how many failed, and what the worker ended meanwhile, per second."""

    latencies: list[float]
    errors: int
    worked: float


def contend(queueing: Queueing, pace: float | None, seconds: float) -> Contended:
    with new_home() as home:
        opened = Opened(home, queueing)
        opened.fill(round(BACKLOG_A_SECOND * (seconds + 2)))
        worker = processes.Process(target=work_until_stopped, args=(home, 10, queueing))
        worker.start()
        wait_until(lambda: opened.thread.do_sync(ListWorkers()), "a worker")
        barrier, answers = processes.Barrier(PROCESSES + 1), processes.SimpleQueue()
        callers = [
            processes.Process(target=_enqueue, args=(home, queueing, pace, seconds, barrier, answers))
            for _ in range(PROCESSES)
        ]
        for caller in callers:
            caller.start()
        barrier.wait()
        before, began = _live(opened), time.monotonic()
        found = [answers.get() for _ in callers]
        enqueued = sum(len(latencies) for latencies, _ in found)
        worked = (before + enqueued - _live(opened)) / (time.monotonic() - began)
        if not _live(opened):
            raise AssertionError("the worker ran dry: it was not busy all the time")
        worker.terminate()
        for process in (*callers, worker):
            process.join()
        opened.close()
        return Contended(
            list(itertools.chain.from_iterable(latencies for latencies, _ in found)),
            sum(errors for _, errors in found),
            worked,
        )


def _live(opened: Opened) -> int:
    return sum(opened.thread.do_sync(CountRuns()).values())


def _enqueue(
    home: Home, queueing: Queueing, pace: float | None, seconds: float, barrier: Barrier, answers: Any
) -> None:
    opened = Opened(home, queueing)
    latencies, errors = [], 0
    barrier.wait()
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        time.sleep(max(0, due - time.perf_counter()))
        try:
            three_steps.enqueue_sync(PAYLOAD)
        except TakoError:
            errors += 1
        done = time.perf_counter()
        latencies.append((done - due) * 1e3)
        due = done if pace is None else due + 1 / pace
    answers.put((latencies, errors))
    opened.close()


def measure(quick: bool) -> list[Row]:
    rows, errors = [], 0
    for what, pace in (("closed loop", None), (f"paced, {PACE}/s each", PACE)):
        turnstile, busy = [], []
        for _ in range(1 if quick else 4):
            turnstile.append(contend("turnstile", pace, 2 if quick else 4))
            busy.append(contend("busy", pace, 2 if quick else 4))
        errors += sum(one.errors for one in turnstile)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0)):
            values, beside = ([percentile(one.latencies, share) for one in some] for some in (turnstile, busy))
            rows.append(pairs(f"{what}: {name}", "ms", values, beside))
        values, beside = ([one.worked for one in some] for some in (turnstile, busy))
        rows.append(pairs(f"{what}: the worker meanwhile", "runs/s", values, beside))
    return [*rows, row("failed with the turnstile", "calls", [errors], Target("<", 1))]
