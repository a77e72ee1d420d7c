"""The engine under measurement: a store that counts its commits, and a worker that drains it."""

import asyncio
import gc
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.own.workflows.idle_work import three_steps
from tako_runtime import store
from tako_runtime.bell import Bell
from tako_runtime.store import Home
from tako_runtime.store.base import CountRuns, Operation, Topics
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

Queueing = Literal["turnstile", "busy"]

PAYLOAD = {"order": "2024-000123", "customer": "Ada Lovelace", "ship_to": "12 St James's Square"}

#: As the store counts them: due, and claimed by nobody yet.
PENDING = ("pending", "queued")

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
        def connect() -> CountingStore:
            self.counting = CountingStore(home.app_dir / "runs.db", queueing)
            return self.counting

        self._home = home
        self.thread = StoreThread(connect, Bell(home.app_dir))
        store.use(self.thread)

    def fill(self, runs: int) -> None:
        for at in range(0, runs, FILL):
            three_steps.enqueue_many_sync([PAYLOAD] * min(FILL, runs - at))

    def worker(self, concurrency: int, idle_timeout: int | None = None) -> Worker:
        settings = Settings(concurrency=concurrency, idle_timeout=idle_timeout)
        return Worker(self.thread, self._home.app_dir, registry, settings)

    def close(self) -> None:
        store.use(None)
        self.thread.close()


def drain(home: Home, runs: int, concurrency: int) -> Drained:
    """`runs` runs of three steps, stored and then done by one worker in this process: also for a profiler."""
    opened = Opened(home)
    opened.fill(runs)
    before = opened.thread.do_sync(CountRuns())[PENDING]
    gc.collect()  # as `python -m tako_runtime worker` sets its process
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    commits, cpu, began = opened.counting.commits, time.process_time(), time.perf_counter()
    asyncio.run(opened.worker(concurrency, idle_timeout=0).run())
    drained = Drained(runs, time.perf_counter() - began, opened.counting.commits - commits, time.process_time() - cpu)
    left = opened.thread.do_sync(CountRuns()).get(PENDING, 0)
    opened.close()
    if (before, left) != (runs, 0):
        raise AssertionError(f"of {before} runs {left} are left; {runs} were to be done")
    return drained


def work_until_stopped(home: Home, concurrency: int, queueing: Queueing) -> None:
    """A worker as a process of its own; SIGTERM ends it."""

    async def work() -> None:
        worker = opened.worker(concurrency)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()

    opened = Opened(home, queueing)
    asyncio.run(work())
    opened.close()
