"""A supervisor as a process of its own, which starts real workers."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import processes
from benchmarks.own.pipe import FOLDER, ROOT
from tako_runtime.child import Group
from tako_runtime.store import Home, Limits, open_store
from tako_runtime.supervisor import Supervisor


@contextmanager
def supervisor(home: Home, group: Group, root: Path = ROOT, folder: str = FOLDER) -> Iterator[int]:
    """Its process id, with the workflows of a folder. At the end it drains its workers and leaves."""
    process = processes.Process(target=_supervise, args=(home, group, root, folder))
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


def _supervise(home: Home, group: Group, root: Path, folder: str) -> None:
    os.environ.update(home.environment() | Limits().environment())  # as a server does
    asyncio.run(_run(home, group, root, folder))


async def _run(home: Home, group: Group, root: Path, folder: str) -> None:
    store = open_store(home)
    supervisor = Supervisor(store, home, root, folder, {group.name: group}, lambda source, line: None)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, supervisor.stop)
    await supervisor.run()
    store.close()
