"""idle: a supervisor and a worker with nothing to do."""

import time

from benchmarks.engine import Opened
from benchmarks.measure import Row, Target, cpu_seconds, new_home, resident_mb, row, wait_until
from benchmarks.supervised import children, supervisor
from tako_runtime.child import Group
from tako_runtime.store.base import ListWorkers


def measure(quick: bool) -> list[Row]:
    with new_home() as home:
        opened = Opened(home)
        with supervisor(home, Group(workers=1)) as boss:
            wait_until(lambda: opened.thread.do_sync(ListWorkers()), "a worker")
            time.sleep(2)  # what starting has left to do
            [worker] = children(boss)
            shares: dict[int, list[float]] = {boss: [], worker: []}
            for _ in range(2 if quick else 6):
                before, began = {pid: cpu_seconds(pid) for pid in shares}, time.monotonic()
                time.sleep(3 if quick else 10)
                took = time.monotonic() - began
                for pid, found in shares.items():
                    found.append((cpu_seconds(pid) - before[pid]) / took * 100)
            rows = [
                row("supervisor, CPU", "% of a core", shares[boss], Target("<", 0.5)),
                row("worker, CPU", "% of a core", shares[worker], Target("<", 0.5)),
                row("supervisor, resident", "MB", [resident_mb(boss)]),
                row("worker, resident", "MB", [resident_mb(worker)]),
            ]
        opened.close()
    return rows
