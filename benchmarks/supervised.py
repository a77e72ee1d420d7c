"""A supervisor as a process of its own, which starts real workers."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.latency import FOLDER, ROOT
from benchmarks.measure import processes
from tako_runtime.store import Home, Limits, open_store
from tako_runtime.supervisor import Group, Supervisor


@contextmanager
def supervisor(home: Home, group: Group) -> Iterator[int]:
    """Its process id. At the end it drains its workers and leaves."""
    process = processes.Process(target=_supervise, args=(home, group))
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.terminate()
        process.join()


def children(pid: int) -> list[int]:
    """The workers of a supervisor."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _supervise(home: Home, group: Group) -> None:
    os.environ.update(home.environment() | Limits().environment())  # as a server does
    asyncio.run(_run(home, group))


async def _run(home: Home, group: Group) -> None:
    store = open_store(home)
    supervisor = Supervisor(store, home, ROOT, FOLDER, {group.name: group}, lambda source, line: None)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, supervisor.stop)
    await supervisor.run()
    store.close()
