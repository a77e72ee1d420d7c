"""The engine under measurement: a store that counts its commits, and a worker that drains it."""

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.workflows.idle_work import many_steps, three_steps
from tako_runtime import log, store
from tako_runtime.bell import Bell
from tako_runtime.store import Home
from tako_runtime.store.base import Operation, Topics
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

Queueing = Literal["turnstile", "busy"]

PAYLOAD = {"order": "2024-000123", "customer": "Ada Lovelace", "ship_to": "12 St James's Square"}

#: Rows in a transaction while a store is filled.
FILL = 1_000


@dataclass(frozen=True, slots=True)
class Drained:
    runs: int
    seconds: float
    commits: int
    cpu: float

    @property
    def rate(self) -> float:
        return self.runs / self.seconds


class CountingStore(SqliteStore):
    """Counts commits, and remembers when the last one was done."""

    def __init__(self, path: Path, queueing: Queueing = "turnstile") -> None:
        super().__init__(path, queueing)
        self.commits = 0
        self.committed_at = 0

    def execute(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        answer = super().execute(batch)
        if any(op.writes for op in batch):
            self.commits += 1
            self.committed_at = time.monotonic_ns()
        return answer


class Opened:
    """The store of `home`, opened as the one of this process."""

    def __init__(self, home: Home, queueing: Queueing = "turnstile") -> None:
        self.home = home
        self.thread = StoreThread(lambda: self._open(queueing), Bell(home.app_dir))
        store.use(self.thread)

    def _open(self, queueing: Queueing) -> CountingStore:
        self.counting = CountingStore(self.home.app_dir / "runs.db", queueing)
        return self.counting

    def fill(self, runs: int) -> None:
        for at in range(0, runs, FILL):
            three_steps.enqueue_many_sync([PAYLOAD] * min(FILL, runs - at))

    def work(self, concurrency: int) -> Drained:
        """One worker, until nothing is left to do."""
        settings = Settings(concurrency=concurrency, idle_timeout=0)
        commits, cpu, began = self.counting.commits, time.process_time(), time.perf_counter()
        asyncio.run(Worker(self.thread, self.home.app_dir, registry, settings).run())
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Drained(0, seconds, self.counting.commits - commits, cpu)

    def close(self) -> None:
        store.use(None)
        self.thread.close()


def drain(home: Home, runs: int, concurrency: int, logged: bool = False) -> Drained:
    """Three steps a run. `logged`: with the log lines that a supervisor's worker writes."""
    opened = Opened(home)
    opened.fill(runs)
    with Path("/dev/null").open("wb") as nowhere, log.sink(log.JsonLines(nowhere.fileno())) if logged else nullcontext():
        drained = opened.work(concurrency)
    left = three_steps_left(opened)
    opened.close()
    assert left == 0, f"{left} runs are left"
    return Drained(runs, drained.seconds, drained.commits, drained.cpu)


def one_long_run(home: Home, steps: int) -> Drained:
    opened = Opened(home)
    many_steps.enqueue_sync(steps)
    drained = opened.work(10)
    opened.close()
    return Drained(1, drained.seconds, drained.commits, drained.cpu)
