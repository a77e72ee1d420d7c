"""Workers for tests: one in this process until nothing is due, or one as a process of its own."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec
from conftest import until

from tako_runtime import Backoff, clock
from tako_runtime.control import Control
from tako_runtime.errors import StoreBusy
from tako_runtime.reclaim import reclaim
from tako_runtime.store import Home
from tako_runtime.store.base import Demand, ListWorkers, RemoveWorker
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry

HERE = Path(__file__).parent
FLOWS = "scenarios/flows"
#: Tried again without a pause.
AT_ONCE = Backoff(base=0, max=0)


class LaterClock:
    """The machine's clock, set forward: what is due in an hour is due now."""

    def __init__(self, by: clock.Duration = 0) -> None:
        self._by = 0
        self.set_forward(by)

    def set_forward(self, by: clock.Duration) -> None:
        self._by += clock.duration(by)

    def now(self) -> int:
        return clock.SystemClock().now() + self._by


def now() -> int:
    return clock.SystemClock().now()


def work(
    opened: StoreThread,
    home: Home,
    meanwhile: Callable[[Worker], Awaitable[object]] | None = None,
    *,
    later: clock.Duration | LaterClock = 0,
    **settings: Any,
) -> str:
    """Run a worker in this process: until nothing is due (`later`: on a clock that is so far ahead), or until
    `meanwhile(worker)` has ended and it has drained. Why it stopped."""
    ticking = later if isinstance(later, LaterClock) else LaterClock(later)

    async def live(given: Settings) -> str:
        worker = Worker(opened, home.app_dir, registry, given, ticking)
        async with asyncio.timeout(60):
            if meanwhile is None:
                return await worker.run()
            running = asyncio.create_task(worker.run())
            await meanwhile(worker)
            worker.stop()
            return await running

    if meanwhile is not None:
        return asyncio.run(live(Settings(**settings)))
    while True:
        reason = asyncio.run(live(Settings(**{"idle_timeout": 1, **settings})))
        if reason == "lost lease":
            return reason
        if settings.get("group", "default") not in opened.do_sync(Demand(now=ticking.now())).groups:
            return reason


async def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    """`until`, in an event loop."""
    await asyncio.to_thread(until, condition, seconds)


def shown(opened: StoreThread, run_id: str) -> dict[str, Any]:
    """The run as `tako runs show --json` has it."""
    return Control(opened).show(run_id)


def result(opened: StoreThread, run_id: str) -> Any:
    run = shown(opened, run_id)
    assert run["status"] == "succeeded", run
    return run["result"]


def status(opened: StoreThread, run_id: str) -> tuple[str, str]:
    run = shown(opened, run_id)
    return run["status"], run["reason"]


def steps(run: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in run["steps"]}


def finished(opened: StoreThread, run_id: str, expected: str = "succeeded") -> dict[str, Any]:
    """The run, whose status is `expected`."""
    run = shown(opened, run_id)
    assert run["status"] == expected, run
    return run


def tamper(home: Home, statement: str) -> None:
    """Write to the file behind tako's back."""
    db = apsw.Connection(str(home.app_dir / "runs.db"))
    db.set_busy_timeout(10_000)
    db.execute(statement)
    db.close()


class WorkerProcess:
    """A worker in a process of its own; its log in a file, or where `stdout` says."""

    def __init__(
        self,
        home: Home,
        *words: str,
        script: str | None = None,
        env: dict[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self.log = home.data_dir / f"worker-{os.urandom(4).hex()}.log"
        start = [str(HERE / "scenarios" / script)] if script else ["-m", "tako_runtime"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *start, "worker", "--dir", FLOWS, "--log-level", "debug", *words],
                cwd=HERE,
                env={**os.environ, **home.environment(), **(env or {})},
                stdin=subprocess.PIPE,
                stdout=log if stdout is None else stdout,
                stderr=log,
            )
        self.pid = self.process.pid

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its events of that name so far."""
        lines = self.log.read_bytes().split(b"\n")[:-1]
        found = [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if event.get("event") == name]

    def up(self) -> "WorkerProcess":
        """Once it listens for work."""
        until(lambda: self.events("worker.started") or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def ended(self, seconds: float = 30) -> int:
        """Its exit code, negative for a signal."""
        return self.process.wait(seconds)


@contextmanager
def worker_process(
    home: Home,
    *words: str,
    script: str | None = None,
    env: dict[str, str] | None = None,
    stdout: int | None = None,
) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(home, *words, script=script, env=env, stdout=stdout)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        assert worker.process.stdin is not None
        worker.process.stdin.close()


def workers(opened: StoreThread) -> dict[str, int]:
    """The workers on the list: process id by worker id."""
    return {worker.id: worker.pid for worker in opened.do_sync(ListWorkers())}


def bodies(log: Path) -> list[str]:
    """The bodies that have run, in order: one line each, written by `scenarios.flows._bodies.ran`."""
    return log.read_text().split() if log.exists() else []


class SupervisorProcess:
    """A supervisor in a process of its own; what it and its workers say is in a file."""

    def __init__(self, home: Home, root: Path, script: str, *words: str) -> None:
        self.log = home.data_dir / f"supervisor-{os.urandom(4).hex()}.log"
        words = (str(HERE / "scenarios" / script), *words)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=root, env={**os.environ, **home.environment()}, stdout=log, stderr=log
            )

    def events(self, name: str = "") -> list[dict[str, Any]]:
        lines = self.log.read_bytes().split(b"\n")[:-1]
        found = [msgspec.json.decode(line) for line in lines if line.startswith(b"{")]
        return [event for event in found if not name or event.get("event") == name]

    @property
    def spawned(self) -> list[int]:
        """The process ids of all workers that it has started so far."""
        return [event["pid"] for event in self.events("worker.spawned")]

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(seconds)


@contextmanager
def supervised(home: Home, *, folder: str = FLOWS, root: Path = HERE, **options: Any) -> Iterator[SupervisorProcess]:
    """A supervisor of one group: `options` are those of `Group`, and `lease`. Stopped at the end, in order."""
    words = ("supervise.py", folder, msgspec.json.encode(options).decode())
    with _stopped_at_the_end(SupervisorProcess(home, root, *words)) as supervisor:
        until(lambda: supervisor.events("supervisor.started") or supervisor.process.poll() is not None)
        yield supervisor


@contextmanager
def serving(home: Home, root: Path, host: str = "here") -> Iterator[SupervisorProcess]:
    """All that `serve` is, for the project in `root`, with the store of `home`. Stopped at the end, in order."""
    with _stopped_at_the_end(SupervisorProcess(home, root, "serve.py", host)) as server:
        yield server


@contextmanager
def _stopped_at_the_end(supervisor: SupervisorProcess) -> Iterator[SupervisorProcess]:
    try:
        yield supervisor
        if supervisor.process.poll() is None:
            assert supervisor.stop() == 0, supervisor.log.read_text()
    finally:
        if supervisor.process.poll() is None:
            supervisor.process.kill()
        supervisor.process.wait()
        for pid in supervisor.spawned:  # whatever has failed, nothing outlives its test
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def freeze(home: Home, pid: int) -> None:
    """SIGSTOP, neither with the store's lock in its hand nor in the queue for it: that would stop all others too."""
    with ExitStack() as files:
        queue = [files.enter_context(Path(f"{home.app_dir}/runs.db-{name}").open("rb")) for name in ("gate", "lock")]
        while True:
            os.kill(pid, signal.SIGSTOP)
            until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            try:
                for file in queue:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                for file in queue:
                    fcntl.flock(file, fcntl.LOCK_UN)
                os.kill(pid, signal.SIGCONT)


def open_gate(gate: Path) -> None:
    """Let go on who is held there, once somebody is."""
    until(lambda: Path(f"{gate}.held").exists())
    with gate.open("wb"):  # returns once the other end is open
        pass


def give_back(opened: StoreThread, home: Home, at: int | None = None) -> int:
    """What a supervisor does when it sees that a worker has ended."""
    return asyncio.run(reclaim(opened, home.app_dir, at or now()))


def stop_past_its_lease(worker: WorkerProcess, opened: StoreThread, home: Home) -> None:
    """SIGSTOP, but not in the middle of a commit, and reclaim once its lease has lapsed."""
    until(lambda: _stopped_outside_a_commit(worker, opened))
    until(lambda: all(w.lease_until <= now() for w in opened.do_sync(ListWorkers())))
    give_back(opened, home)
    assert worker.pid not in workers(opened).values()


def _stopped_outside_a_commit(worker: WorkerProcess, opened: StoreThread) -> bool:
    worker.kill(signal.SIGSTOP)
    try:
        opened.do_sync(RemoveWorker(worker="nobody"), timeout=1)
    except StoreBusy:
        worker.kill(signal.SIGCONT)
        return False
    return True
