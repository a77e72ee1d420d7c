"""latency: from an enqueue here to the first line of its handler in a worker that is up and idle.

Beside it: one process commits a row and sends a message, another commits its claim. What that takes is the machine's.
"""

import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import Opened
from benchmarks.floor import Floor, start_when_rung
from benchmarks.measure import Row, Target, cpu_seconds, new_home, pairs, percentile, processes, row
from benchmarks.workflows.idle_work import tell_time
from tako_runtime.store import Home

#: Where `python -m tako_runtime` finds the workflows, and this package.
ROOT, FOLDER = Path(__file__).parent.parent, "benchmarks/workflows"


class Pipe:
    """A named pipe through which a handler says when it began."""

    def __init__(self, home: Home) -> None:
        self.path = str(home.data_dir / "times")
        os.mkfifo(self.path)
        self._end = os.open(self.path, os.O_RDWR)

    def read(self, seconds: float = 30) -> int:
        if not select.select([self._end], [], [], seconds)[0]:
            raise TimeoutError(f"no handler has begun within {seconds:g} s")
        return int.from_bytes(os.read(self._end, 8), "big")

    def close(self) -> None:
        os.close(self._end)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds, and the worker's share of a core while nothing was to do, in percent."""

    from_call: list[float]
    from_commit: list[float]
    idle_cpu: float


@contextmanager
def idle_worker(home: Home) -> Iterator[int]:
    """The process id of a worker as a supervisor starts it."""
    words = [sys.executable, "-m", "tako_runtime", "worker", "--dir", FOLDER, "--concurrency", "10"]
    env = {**os.environ, **home.environment()}
    with subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def latencies(home: Home, count: int, at_rest: float) -> Latencies:
    """`count` enqueues, each some milliseconds after the one before it had begun."""
    opened, pipe = Opened(home), Pipe(home)
    from_call, from_commit = [], []
    with idle_worker(home) as pid:
        for _ in range(20):  # the first ones find nothing warm
            tell_time.enqueue_sync(pipe.path)
            pipe.read()
        cpu, at = cpu_seconds(pid), time.monotonic()
        time.sleep(at_rest)
        idle = (cpu_seconds(pid) - cpu) / (time.monotonic() - at) * 100
        for _ in range(count):
            rest()
            called = time.monotonic_ns()
            tell_time.enqueue_sync(pipe.path)
            committed, began = opened.counting.committed_at, pipe.read()
            from_call.append((began - called) / 1e6)
            from_commit.append((began - committed) / 1e6)
    opened.close()
    pipe.close()
    return Latencies(from_call, from_commit, idle)


def floor_latencies(home: Home, count: int) -> list[float]:
    """The same from a commit of plain apsw to the next one in a second process."""
    here, there = processes.Pipe()
    floor = Floor(home)
    child = processes.Process(target=start_when_rung, args=(home, there))
    child.start()
    here.recv()
    found = []
    for _ in range(count):
        rest()
        called = time.monotonic_ns()
        floor.fill(1)
        here.send(True)
        found.append((here.recv() - called) / 1e6)
    here.send(False)
    child.join()
    floor.close()
    return found


def rest() -> None:
    """So long that the worker has gone to sleep."""
    time.sleep(random.uniform(0.005, 0.02))


def measure(quick: bool) -> list[Row]:
    rounds, floors = [], []
    count = 100 if quick else 200
    for _ in range(2 if quick else 5):
        with new_home() as home:
            rounds.append(latencies(home, count, at_rest=2))
        with new_home() as home:
            floors.append(floor_latencies(home, count))
    commits = [one.from_commit for one in rounds]
    return [
        *(
            pairs(
                f"p{share:.0%} from the call".replace("%", ""),
                "ms",
                [percentile(one.from_call, share) for one in rounds],
                [percentile(one, share) for one in floors],
                Target("<", limit, of="value"),
            )
            for share, limit in ((0.50, 2.0), (0.99, 6.0))
        ),
        *(
            row(f"p{share:.0%} from the commit".replace("%", ""), "ms", [percentile(one, share) for one in commits])
            for share in (0.50, 0.99)
        ),
        row("CPU of the worker between", "% of a core", [one.idle_cpu for one in rounds], Target("<", 0.5)),
    ]
