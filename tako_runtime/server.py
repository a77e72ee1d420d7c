"""One app on one machine, day and night: supervisor, its own process, cron and old runs; signals and readiness.

`python -m tako_runtime serve` is this and nothing else, and `tako dev` is this at a terminal. It never imports user
code: what the workflows declare it learns from the manifest, which a short-lived process reads.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tako_runtime import clock, disk, log
from tako_runtime.alone import Lock
from tako_runtime.app import App, Noted
from tako_runtime.child import Group
from tako_runtime.clock import REAL_TIME, Clock, Pace, SystemClock
from tako_runtime.config import Config
from tako_runtime.courier import Courier
from tako_runtime.errors import StoreError, TakoError
from tako_runtime.feed import Feed
from tako_runtime.log import emit
from tako_runtime.manifest import Manifest, read
from tako_runtime.masking import SHORTEST, guarded, too_short
from tako_runtime.metrics import Metrics
from tako_runtime.retention import Retention
from tako_runtime.rollover import Predecessor, Trial
from tako_runtime.secrets import stored
from tako_runtime.side import Side, scheduled_on
from tako_runtime.store import DATABASE_DIRECT_URL, DATABASE_URL, Home, Limits, local_of
from tako_runtime.store.commit import StoreThread
from tako_runtime.supervisor import Supervisor
from tako_runtime.ticker import Cron

#: How long an app stays once all else has been handed over and nobody has told it to go, in seconds.
PARTING = 60.0


class Server:
    """Everything that one app needs on one machine: a `main` side for the store of its environment and, where that is
    shared and workflows are local, one `beside` it for the machine's own store.

    `show(source, event)` gets what its workers say: of every level where there are metrics, which are counted from it,
    so it is for `show` to leave out what is below `log_level`."""

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
        secrets: Mapping[str, str] | None = None,
        passed_on: socket.socket | None = None,
        together: bool = False,
        clock: Clock | None = None,
        pace: Pace = REAL_TIME,
    ) -> None:
        self.home, self.config = home, config
        self._store, self._server, self._pace = store, server, pace
        self.environment = self._with_limits(environment or os.environ)
        self._given_clock = clock
        self._clock: Clock = clock or SystemClock()
        self.manifest = Manifest(())
        self._together = together
        self._reloading: asyncio.Future[None] | None = None
        self.metrics = Metrics(config.metrics.listen, self.stores, self._group_names, self._clock)
        self.feed = Feed(home.app_dir, lambda event: heard("tako", event))

        def heard(source: str, event: dict[str, Any]) -> None:
            self.metrics.observe(event)
            self.feed.publish(source, event)
            show(source, event)

        self._heard = heard
        self._log_level = "debug" if config.metrics.listen else log_level
        self.local = local_of(home)
        self._beside_is_there, self._ending = asyncio.Event(), False
        self.main = self._side(store, secrets)
        self.beside: Side | None = None
        self.app: App | None = None
        if config.app is not None:
            self.app = App(
                config, self.environment, lambda event: heard("app", event),
                secrets=lambda: self.secrets, mark=self.main.supervisor.mark, passed_on=passed_on, clock=self._clock,
            )  # fmt: skip
        self._successor: Lock | None = None  # the lock that another release waits for
        self._leaving = asyncio.Event()

    def _side(self, store: StoreThread, secrets: Mapping[str, str] | None, *, local: bool = False) -> Side:
        config, home = self.config, self.home
        together = self._together and not local  # the one process of all groups says what the files declare
        supervisor = Supervisor(
            store, home, config.root, config.workflows.dir, {} if local else self._groups(), self._heard,
            other=partial(self.group, local=local), together=together, local=local,
            declare=self._declared if together else None, reread=None if self._together else self.declare,
            lease=config.workflows.lease, log_level=self._log_level, environment=self.environment, secrets=secrets,
            pace=self._pace,
        )  # fmt: skip
        ticking = self._given_clock or store.clock
        cron = Cron(store, ticking, home.server, pace=self._pace)
        retention = Retention(store, config, self._server, ticking)
        courier = Courier(store, self._store, home.server, self._clock) if local else None
        return Side(store, supervisor, cron, retention, courier)

    @property
    def _sides(self) -> list[Side]:
        return [self.main] if self.beside is None else [self.main, self.beside]

    def stores(self) -> list[StoreThread]:
        """Those that it serves, the environment's first."""
        return [side.store for side in self._sides]

    async def declare(self) -> Manifest:
        """Read what the workflows declare, and make the schedules those. Raises `ConfigError` where they cannot be read
        at all; a file that cannot be imported is a mistake in the manifest, and the schedules stay as they were."""
        found = await self._read()
        await self.take(found)
        return found

    async def _read(self) -> Manifest:
        folder = self.config.workflows.dir
        found = await asyncio.to_thread(read, self.config.root, folder, self.environment, self.secrets)
        for mistake in found.mistakes:
            emit(
                "file.broken", file=mistake.file, line=mistake.line, error=mistake.message, traceback=mistake.traceback
            )
        return found

    async def take(self, manifest: Manifest) -> None:
        """Go by what this manifest declares from now on."""
        self.manifest = manifest
        self.main.supervisor.configure(self._groups(), self.environment)
        await self.main.take(manifest, scheduled_on(manifest, local=False) if self.local else manifest)
        if self.app is not None:
            self.app.try_now()
        await self.look_beside(manifest)
        if self.beside is not None:
            await self.beside.take(manifest, scheduled_on(manifest, local=True))
        emit("code.declared", workflows=len(manifest.workflows), files=len(manifest.files))

    async def _declared(self, manifest: Manifest) -> None:
        """A worker of all groups has imported the files as they are now."""
        await self.take(manifest)
        if self.beside is not None:
            self.beside.supervisor.reload()

    async def look_beside(self, manifest: Manifest) -> None:
        """Serve this machine's own store too, if a workflow is local, or a run ever was."""
        if self.local is None or self.beside is not None or self._ending:
            return
        wanted = any(flow.local for flow in manifest.workflows)
        opened = await asyncio.to_thread(self.local.made if wanted else self.local.there)
        if opened is not None and self.beside is None and not self._ending:
            self.beside = self._side(opened, self.secrets, local=True)
            self._beside_is_there.set()

    def group(self, name: str, *, local: bool = False) -> Group:
        """What holds for the workers of a group here, on that side. Those that are to be there at all times are on the
        side to which new runs of the group come; what is left on the other is worked off by one when it is due."""
        found = self.config.group(name, self._server)
        sides = {flow.local for flow in self.manifest.workflows if flow.group == name} or {False}
        workers = found.workers if self.local is None or local in sides else 0
        return Group(name, workers, found.concurrency, found.idle_timeout, found.grace)

    def _groups(self) -> dict[str, Group]:
        return {name: self.group(name) for name in self.config.group_names(self._server)}

    @property
    def secrets(self) -> Mapping[str, str]:
        """What processes get that start from now on."""
        return self.main.supervisor.secrets

    def renew(self, values: Mapping[str, str]) -> None:
        """Go on with these secrets (`Supervisor.renew`)."""
        for side in self._sides:
            side.supervisor.renew(values)

    def cleared(self, pid: int) -> None:
        """The terminal is there for the debugger in that worker process."""
        for side in self._sides:
            side.supervisor.cleared(pid)

    def reload(self) -> None:
        """The project's files have changed: what runs of it goes on with them as they are now. A file that cannot be
        imported and could be before leaves it as it is."""
        if self._together:
            self.main.supervisor.reload()
        else:
            self._reloading = asyncio.ensure_future(self._reload())
        if self.app is not None:
            self.app.restart(self.environment)

    async def _reload(self) -> None:
        known = {mistake.file for mistake in self.manifest.mistakes}
        try:
            found = await self._read()
        except TakoError as error:
            emit("server.unread", error=str(error))
            return
        if news := [mistake for mistake in found.mistakes if mistake.file not in known]:
            emit("code.kept", reason=f"{news[0].file}:{news[0].line}: {news[0].message}")
            return
        await self.take(found)
        for side in self._sides:
            side.supervisor.reload()

    def configure(self, config: Config, environment: Mapping[str, str]) -> None:
        """Go by this tako.toml from now on, but for where the app, the metrics and the store are."""
        self.config = config
        self.environment = self._with_limits(environment)
        self.main.supervisor.configure(self._groups(), self.environment)
        if self.beside is not None:
            self.beside.supervisor.configure({}, self.environment)
        self.reload()

    def _with_limits(self, environment: Mapping[str, str]) -> dict[str, str]:
        flows = self.config.workflows
        limits = Limits(flows.max_value, flows.signal_retention)
        return {**environment, **self.home.environment(), **limits.environment(), **self._pace.environment()}

    def _group_names(self) -> set[str]:
        return {*self.config.group_names(self._server), *(flow.group for flow in self.manifest.workflows)}

    async def move_store(self, secrets: Mapping[str, str]) -> None:
        """Go on with the store that these secrets name, if they name another one than those before. Raises `StoreError`
        where it cannot be opened: then all goes on as before."""
        before, names = self.secrets, (DATABASE_URL, DATABASE_DIRECT_URL)
        if self._store.shared and any(secrets.get(name) != before.get(name) for name in names):
            await asyncio.to_thread(self._store.reopen)

    def look_at_secrets(self) -> None:
        """Warn of what is missing, and of what cannot be masked."""
        given = self.secrets
        if missing := [name for name in self.config.secrets.required if name not in given]:
            emit("secret.missing", names=", ".join(missing))
        if short := too_short(given):
            emit("secret.short", names=", ".join(short), least=SHORTEST)

    async def run(self, *, firing: bool = True) -> None:
        """Until `stop()`; then end the app, drain the workers, and leave nothing behind. Without `firing` no schedule
        fires and no old run goes: nothing is begun, and what is there is worked off.

        If one of the parts cannot go on, all end, and what it failed of is raised: an app whose cron has silently died
        would be worse than one that is down."""
        loop = asyncio.get_running_loop()
        sides = [loop.create_task(part) for part in (self.main.run(firing=firing), self._run_beside(firing))]
        ending = sides + ([loop.create_task(self.app.run())] if self.app is not None else [])
        leaving: asyncio.Task[Any] = loop.create_task(self._leaving.wait())
        try:
            with contextlib.ExitStack() as sinks:
                for sink in (self.metrics.observe, self.feed.announce, Noted(self.home.app_dir)):
                    sinks.enter_context(log.sink(sink))
                if (kind := disk.filesystem(self.home.app_dir)) in disk.NETWORK:
                    emit("store.on_network", folder=str(self.home.app_dir), kind=kind)
                sinks.enter_context(self._store.relay())
                async with self.feed, self.metrics:
                    await asyncio.wait([*ending, leaving], return_when=asyncio.FIRST_COMPLETED)
                    if self._successor is None:
                        self.stop()
                        await asyncio.wait(ending)
            if self._successor is not None:  # the feed, the metrics and the notes are its own now
                self._successor.let_go()
                await asyncio.wait(sides)
                loop.call_later(PARTING, self.stop)
                await asyncio.wait(ending)
        finally:
            self.stop()
            leaving.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
        for part in ending:
            part.result()

    async def _run_beside(self, firing: bool) -> None:
        """Once it is there, until `stop()`."""
        await self.look_beside(self.manifest)
        await self._beside_is_there.wait()
        if self.beside is not None:
            await self.beside.run(firing=firing)

    def stop(self) -> None:
        """Fire nothing more, claim nothing more, drain. Call it in the event loop."""
        self._stop()
        if self.app is not None:
            self.app.stop()

    def hand_over(self, lock: Lock) -> None:
        """Another release takes over: fire and claim nothing more, let the lock go, drain. The app stays until
        `stop()`, or for a while once all is drained. Call it in the event loop."""
        self._successor = lock
        self._stop(succeeded=True)
        self._leaving.set()

    def _stop(self, *, succeeded: bool = False) -> None:
        self._ending = True
        self._beside_is_there.set()
        for side in self._sides:
            side.stop(succeeded=succeeded)

    def close(self) -> None:
        """Close what it has opened beside the store that it was given."""
        if self.local is not None:
            self.local.close()

    def kill(self) -> None:
        """End every process at once, with what it has started."""
        for side in self._sides:
            side.supervisor.kill()
        if self.app is not None:
            self.app.kill()


# --- one at a time, and the service manager --------------------------------------------------------------------------


@contextmanager
def alone(app_dir: Path, what: str) -> Iterator[Lock]:
    """Be the only one of an app that supervises, within. Raises `Refused`, naming the other one's process id."""
    with Lock(app_dir, what) as lock:
        lock.take()
        yield lock


async def serve(server: Server, lock: Lock, trial: Trial | None = None) -> None:
    """Run as a service: SIGTERM drains, SIGHUP reads the secrets and the workflows anew, SIGUSR1 hands over to another
    release; tells systemd how it stands (sd_notify(3)). With other secrets, workers and the app are replaced. With a
    `trial` it has to prove itself, and gets the lock only then."""
    with contextlib.ExitStack() as guards:
        guards.callback(server.close)
        guards.enter_context(guarded(server.secrets))
        old = None
        if trial is not None:
            await trial.prove(server)
            old = await trial.succeed(server, lock)
        await _serve(server, lock, guards, trial, old)


async def _serve(
    server: Server, lock: Lock, guards: contextlib.ExitStack, trial: Trial | None, old: Predecessor | None
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        notify("STOPPING=1")
        server.stop()

    def hand_over() -> None:
        emit("server.handed_over")
        notify("STOPPING=1\nSTATUS=drains, for another release has taken over")
        server.hand_over(lock)

    async def declare() -> None:
        try:
            fresh = stored(server.home.app_dir)
            if fresh != server.secrets:
                await server.move_store(fresh)
                guards.enter_context(guarded(fresh))  # beside the old ones: workers that have those are still there
                emit("secret.changed")
                if server.app is not None:
                    server.app.restart(server.environment)
            server.renew(fresh)
        except StoreError as error:
            emit("secret.refused", error=str(error))
        except TakoError as error:
            emit("secret.unread", error=str(error))
        server.look_at_secrets()
        try:
            await server.declare()
        except TakoError as error:
            emit("server.unread", error=str(error))

    async def declare_anew() -> None:
        await declare()
        notify("READY=1")

    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        notify(f"RELOADING=1\nMONOTONIC_USEC={clock.monotonic()}")
        task = loop.create_task(declare_anew())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    loop.add_signal_handler(signal.SIGUSR1, hand_over)
    await declare()
    running = loop.create_task(server.run())
    watching = loop.create_task(_watchdog(server.main.supervisor))
    try:
        if trial is not None:
            await trial.settle(server, old)
        notify("READY=1")
        await running
    finally:
        watching.cancel()
        server.stop()
        await running


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
