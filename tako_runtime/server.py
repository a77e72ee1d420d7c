"""One app on one machine, day and night: supervisor, cron and old runs; signals and readiness.

`python -m tako_runtime serve` is this and nothing else, and `tako dev` is this at a terminal. It never imports user
code: what the workflows declare it learns from the manifest, which a short-lived process reads.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tako_runtime import clock, cron
from tako_runtime.clock import Clock, SystemClock
from tako_runtime.config import Config
from tako_runtime.errors import Refused, StoreBusy, TakoError
from tako_runtime.log import emit
from tako_runtime.manifest import Declared, Manifest, read
from tako_runtime.run import NewRun, ScheduleRecord, new_id
from tako_runtime.store import Home
from tako_runtime.store.base import DropLease, FireSchedule, ListSchedules, Prune, SetSchedules, TakeLease
from tako_runtime.store.commit import StoreThread
from tako_runtime.supervisor import Group, Supervisor
from tako_runtime.workflow import new_run

#: How long a leader that has fallen silent holds cron up.
LEADER_LEASE = 5 * clock.SECOND

#: How often old runs are looked for, in seconds, and how many go in one transaction.
PRUNE_EVERY = 600.0
PRUNE_BATCH = 200


class Server:
    """Everything that one app needs on one machine. `show(source, event)` gets what its workers say."""

    def __init__(
        self,
        store: StoreThread,
        home: Home,
        config: Config,
        show: Callable[[str, dict[str, Any]], None],
        *,
        server: str | None = None,
        log_level: str = "info",
        environment: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._store, self._config, self._server = store, config, server
        self._environment = {**(environment or os.environ), **home.environment()}
        groups = {name: _group(config, name, server) for name in config.group_names(server)}
        self.supervisor = Supervisor(
            store, home, config.root, config.workflows.dir, groups, show,
            other=lambda name: _group(config, name, server), reread=self.declare, lease=config.workflows.lease,
            log_level=log_level, environment=self._environment,
        )  # fmt: skip
        self.cron = Cron(store, clock or SystemClock())
        self._clock: Clock = clock or SystemClock()
        self.manifest = Manifest(())

    async def declare(self) -> Manifest:
        """Read what the workflows declare, and make the schedules those. Raises `ConfigError` where they cannot be read
        at all; a file that cannot be imported is a mistake in the manifest, and the schedules stay as they were."""
        folder = self._config.workflows.dir
        found = await asyncio.to_thread(read, self._config.root, folder, self._environment)
        for mistake in found.mistakes:
            emit(
                "file.broken", file=mistake.file, line=mistake.line, error=mistake.message, traceback=mistake.traceback
            )
        await self.take(found)
        return found

    async def take(self, manifest: Manifest) -> None:
        """Go by what this manifest declares from now on."""
        self.manifest = manifest
        self.supervisor.declare(manifest)
        await self.cron.declare(manifest)

    async def run(self) -> None:
        """Until `stop()`; then drain the workers, and leave none behind."""
        ticking = asyncio.get_running_loop().create_task(self.cron.run())
        pruning = asyncio.get_running_loop().create_task(self._prune())
        try:
            await self.supervisor.run()
        finally:
            for task in (ticking, pruning):
                task.cancel()
            await asyncio.gather(ticking, pruning, return_exceptions=True)

    def stop(self) -> None:
        """Fire nothing more, claim nothing more, drain. Call it in the event loop."""
        self.cron.stop()
        self.supervisor.stop()

    async def _prune(self) -> None:
        """Old ended runs go in small batches, so that no writer waits long for the lock."""
        while True:
            try:
                for name in self._config.group_names(self._server):
                    kept = self._config.group(name, self._server).retention
                    before = self._clock.now() - kept
                    while await self._store.do(Prune(group=name, before=before, limit=PRUNE_BATCH)):
                        await asyncio.sleep(0.05)
            except StoreBusy as error:
                emit("store.busy", error=str(error))
            await asyncio.sleep(PRUNE_EVERY)


class Cron:
    """Fires what is due, while it leads. Of several on one store one leads, by a lease; and even two fire once, since a
    firing moves the schedule on only from where it was seen."""

    def __init__(self, store: StoreThread, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._flows: dict[str, Declared] = {}
        self._holder = "l-" + new_id(clock.now())
        self._wake = asyncio.Event()
        self._stopping = False

    async def declare(self, manifest: Manifest) -> None:
        """Take the schedules of a manifest over. While a file of it is broken, what was known of it goes on."""
        declared = {flow.name: flow for flow in manifest.workflows}
        self._flows = {**self._flows, **declared} if manifest.mistakes else declared
        if not manifest.mistakes:
            scheduled = [flow for flow in manifest.workflows if flow.schedule is not None]
            await self._store.do(SetSchedules(schedules=[_schedule(flow) for flow in scheduled]))
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                pause = LEADER_LEASE // 3
                try:
                    now = self._clock.now()
                    lease = TakeLease(name="cron", holder=self._holder, until=now + LEADER_LEASE, now=now)
                    if await self._store.do(lease):
                        next_at = await self.tick()
                        pause = min(pause, max(0, (next_at or clock.LATEST) - self._clock.now()))
                except StoreBusy as error:
                    emit("store.busy", error=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause / clock.SECOND):
                        await self._wake.wait()
        finally:
            with contextlib.suppress(TakoError):
                await self._store.do(DropLease(name="cron", holder=self._holder))

    async def tick(self) -> int | None:
        """Fire what is due now; when the next one is."""
        records = {record.workflow: record for record in await self._store.do(ListSchedules())}
        for firing in cron.due(records.values(), self._clock.now()):
            if self._stopping:
                break
            flow = self._flows.get(firing.workflow)
            if flow is None or (firing.note == "invalid" and firing.was is None):
                continue  # another release's, which fires it; or one that was told of already
            now = self._clock.now()
            run = _run(flow, firing.at, now) if firing.at is not None else None
            fired = await self._store.do(
                FireSchedule(
                    workflow=firing.workflow, seen_next_at=firing.was, next_at=firing.next_at, fired_at=firing.at,
                    run=run, now=now,
                )
            )  # fmt: skip
            if fired:
                _announce(firing, run)
        left = await self._store.do(ListSchedules())
        ours = [record.next_at for record in left if record.next_at is not None and record.workflow in self._flows]
        return min(ours, default=None)


def _run(flow: Declared, at: int, now: int) -> NewRun:
    return new_run(
        flow.name, flow.group, "null", now=now, due=now, retries=flow.retries, backoff_base=flow.backoff_base,
        backoff_max=flow.backoff_max, scheduled_at=at,
    )  # fmt: skip


def _announce(firing: cron.Firing, run: NewRun | None) -> None:
    if run is not None and firing.at is not None:
        emit("cron.fired", workflow=firing.workflow, run=run.id, scheduled_at=clock.iso(firing.at))
    elif firing.note != "new":
        emit("cron.passed_over", workflow=firing.workflow, note=firing.note, error=firing.error)


def _schedule(flow: Declared) -> ScheduleRecord:
    assert flow.schedule is not None
    return ScheduleRecord(
        flow.name, flow.group, flow.schedule, flow.timezone or "UTC", flow.catchup, flow.overlap, next_at=None
    )


def _group(config: Config, name: str, server: str | None) -> Group:
    found = config.group(name, server)
    return Group(name, found.workers, found.concurrency, found.idle_timeout, found.grace)


# --- one at a time, and the service manager --------------------------------------------------------------------------


@contextmanager
def alone(app_dir: Path, what: str) -> Iterator[None]:
    """Be the only one of an app that supervises, within. Raises `Refused`, naming the other one's process id. The lock
    ends with its process, however that ends."""
    app_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(app_dir / "supervisor.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, other = os.read(file, 100).decode().partition(" ")
            raise Refused(
                f"another {other or 'supervisor'} runs this app: process {pid or 'unknown'}",
                hint="Stop that one first.",
            ) from None
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {what}".encode())
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


async def serve(server: Server) -> None:
    """Run as a service: SIGTERM drains, SIGHUP reads the workflows anew; tells systemd how it stands (sd_notify(3))."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        notify("STOPPING=1")
        server.stop()

    async def declare() -> None:
        try:
            await server.declare()
        except TakoError as error:
            emit("server.unread", error=str(error))
        notify("READY=1")

    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={clock.monotonic()}")
        task = loop.create_task(declare())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await declare()
    watching = loop.create_task(_watchdog(server.supervisor))
    try:
        await server.run()
    finally:
        watching.cancel()


async def _watchdog(supervisor: Supervisor) -> None:
    """Tell the service manager that work gets on, at half the time it asks for: only while the supervisor's loop goes
    round, which a store that does not answer stops too."""
    micros = int(os.environ.get("WATCHDOG_USEC", "0"))
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    seen = -1
    while micros:
        if supervisor.turns != seen or supervisor.stopping:
            seen = supervisor.turns
            notify("WATCHDOG=1")
        await asyncio.sleep(micros / 2 / clock.SECOND)


def notify(state: str) -> None:
    """sd_notify(3), where a service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
