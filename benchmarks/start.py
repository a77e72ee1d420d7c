"""start: no worker is up, a supervisor is: from an enqueue to the first line of its handler."""

import time

from benchmarks.engine import Opened
from benchmarks.latency import Pipe
from benchmarks.measure import Row, new_home, row, wait_until
from benchmarks.supervised import children, supervisor
from benchmarks.workflows.idle_work import tell_time
from tako_runtime import clock
from tako_runtime.supervisor import Group


def measure(quick: bool) -> list[Row]:
    found = []
    with new_home() as home:
        opened, pipe = Opened(home), Pipe(home)
        with supervisor(home, Group(idle_timeout=clock.SECOND // 10)) as boss:
            for _ in range(4 if quick else 12):
                called = time.monotonic_ns()
                tell_time.enqueue_sync(pipe.path)
                found.append((pipe.read() - called) / 1e6)
                wait_until(lambda: not children(boss), "the worker's leaving")
                time.sleep(0.5)  # until the supervisor has gone to sleep again
        opened.close()
        pipe.close()
    return [row("enqueue to handler", "ms", found[1:])]  # the first one waits for the supervisor, too
