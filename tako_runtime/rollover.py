"""The roll-over: a release proves itself beside the one that runs, and takes its place only then.

    read the manifest -> boot a worker of each group -> start the app where nobody reaches it -> all well for a while
    -> ask the old supervisor to hand over (SIGUSR1) -> start the app for good -> tell the old one to leave (SIGTERM)

Whatever fails before the hand-over, the old one has not noticed. When it hands over, it lets its lock go at once,
claims and fires nothing more, and drains: its attempts end, or stop at their next step and go on under the new release.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tako_runtime import port
from tako_runtime.alone import Lock
from tako_runtime.app import App
from tako_runtime.errors import Refused, TakoError
from tako_runtime.log import emit
from tako_runtime.manifest import read
from tako_runtime.process import how
from tako_runtime.workflow import release

if TYPE_CHECKING:
    from tako_runtime.server import Server

#: What `serve` ends with when its release is not taken: it is of no use to start it again.
NOT_TAKEN = 78

#: How long all has to be well, once it is up, and how long it may take until then, in seconds.
STABLE = 5.0
PATIENCE = 60.0

#: How long the old supervisor may take to hand over, in seconds: it has nothing to wait for.
HAND_OVER = 10.0

#: How often an app that has to stay well is looked at, and how long a worker on trial may take to end, in seconds.
_LOOK, _END = 0.5, 5.0

#: So many of the last lines of what failed are told.
LINES = 30


class NotTaken(TakoError):
    """The release did not prove itself. `last_lines` are those of the process that failed."""

    code = "not_taken"

    def __init__(self, message: str, last_lines: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.last_lines = [line for line in last_lines if line.strip()][-LINES:]


class Report(msgspec.Struct, frozen=True):
    """How far a trial has come, for whoever carries out the switch: `error` is "" unless it has failed."""

    release: str
    stage: str
    error: str = ""
    last_lines: list[str] = []


class Trial:
    """The proof of this process's release. What it has come to is in `{app_dir}/trial.json`."""

    def __init__(self, app_dir: Path) -> None:
        self.file = app_dir / "trial.json"
        self.release = release()

    async def prove(self, server: "Server") -> None:
        """Raises `NotTaken`."""
        with self.told():
            self.stage("reads the manifest")
            found = await asyncio.to_thread(
                read, server.config.root, server.config.workflows.dir, server.environment, server.secrets
            )
            for mistake in found.mistakes:
                where = f"{mistake.file}:{mistake.line}: {mistake.message}"
                raise NotTaken(where.removeprefix(f"{server.config.root}/"), mistake.traceback.splitlines())
            await server.look_beside(found)  # what is wrong with that store is a reason not to take over
            await self._boot(server, sorted(found.groups))

    async def succeed(self, server: "Server", lock: Lock) -> "Predecessor | None":
        """Take the lock, from whoever has it; and the port, where the app binds that itself. Raises `NotTaken`."""
        with self.told():
            self.stage("takes over")
            old = await take_over(lock)
            if old is not None and server.app is not None and not server.app.takes_socket:
                old.leave()
                await _until_free(server.app)
            return old

    async def settle(self, server: "Server", old: "Predecessor | None") -> None:
        """Once all runs: the old one may leave as soon as the app answers here. Raises `NotTaken`."""
        with self.told():
            if server.app is not None:
                self.stage("waits for the app")
                await server.app.proved(0, PATIENCE)
            if old is not None:
                old.leave()
            self.stage("taken")

    def stage(self, what: str) -> None:
        emit("server.trial", release=self.release, what=what)
        self._report(Report(self.release, what))

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What fails within is reported."""
        try:
            yield
        except TakoError as error:
            failed = error if isinstance(error, NotTaken) else NotTaken(f"{error}. {error.hint}".rstrip(". "))
            emit("server.refused", release=self.release, error=str(failed), last_lines="\n".join(failed.last_lines))
            self._report(Report(self.release, "failed", str(failed), failed.last_lines))
            raise failed from error

    async def _boot(self, server: "Server", groups: list[str]) -> None:
        """Everything at once, as it will be; and once all of it is up, it has to stay so."""
        what = [f"a worker of {name}" for name in groups] + ["the app"] * (server.app is not None)
        self.stage(f"starts {', '.join(what) or 'nothing'}")
        up = asyncio.Barrier(len(what) + 1)
        parts = [_worker(server, name, up) for name in groups]
        if server.app is not None:
            parts.append(_app(server, up))
        tasks = [asyncio.ensure_future(part) for part in (*parts, self._watch(up))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def _watch(self, up: asyncio.Barrier) -> None:
        """Ends once all is up and has been well for a while."""
        await up.wait()
        self.stage(f"watches it for {STABLE:g} s")
        await asyncio.sleep(STABLE)

    def _report(self, report: Report) -> None:
        fresh = self.file.with_suffix(".new")
        with contextlib.suppress(OSError):  # a full disk; the exit code says it too
            fresh.write_bytes(msgspec.json.encode(report))
            fresh.replace(self.file)


def trial(app_dir: Path, named_in: Path | None) -> Trial | None:
    """The trial of this process's release, if it is the one that is to prove itself."""
    if named_in is None:
        return None
    with contextlib.suppress(OSError):
        if named_in.read_text("utf-8").strip() == release():
            return Trial(app_dir)
    return None


# --- the parts of a release ------------------------------------------------------------------------------------------


async def _worker(server: "Server", group: str, up: asyncio.Barrier) -> None:
    """A worker of that group that claims nothing. Raises `NotTaken` if it does not get that far, or ends."""
    try:
        child = await server.main.supervisor.on_trial(server.group(group))
    except OSError as error:
        raise NotTaken(f"a worker of group {group} cannot be started: {error.strerror}") from None
    fit = asyncio.Event()
    lines: deque[str] = deque(maxlen=LINES)

    def heard(event: dict[str, Any]) -> None:
        lines.extend([str(event["message"]), *str(event.get("traceback", "")).splitlines()])
        if event["event"] == "worker.fit":
            fit.set()

    following = asyncio.ensure_future(child.follow(heard))
    try:
        async with asyncio.timeout(PATIENCE):
            await _first(following, fit.wait())
        await _first(following, up.wait())
        code = await asyncio.shield(following)
        raise NotTaken(f"a worker of group {group} ended ({how(code)})", lines)
    except TimeoutError:
        raise NotTaken(f"a worker of group {group} is not up after {PATIENCE:g} s", lines) from None
    finally:
        child.terminate()
        await asyncio.wait([following], timeout=_END)
        child.kill()
        await following


async def _app(server: "Server", up: asyncio.Barrier) -> None:
    """The app, on a port that nobody else knows. Raises `NotTaken` if it does not answer, or not any more, or ends."""
    config = server.config
    assert config.app is not None
    elsewhere = replace(config, app=replace(config.app, port=port.free()))
    lines: deque[str] = deque(maxlen=LINES)

    def heard(event: dict[str, Any]) -> None:
        lines.append(str(event["message"]))

    mark = server.main.supervisor.mark
    app = App(elsewhere, server.environment, heard, secrets=lambda: server.secrets, mark=mark, look=_LOOK)
    running = asyncio.ensure_future(app.run())
    unwell = asyncio.ensure_future(asyncio.sleep(0, ""))
    try:
        await app.proved(0, PATIENCE)
        unwell = asyncio.ensure_future(app.unwell())
        await _first(unwell, up.wait())
        raise NotTaken(await unwell, lines)
    except Refused as error:
        raise NotTaken(str(error), lines) from None
    finally:
        unwell.cancel()
        app.stop()
        await running


async def _until_free(app: App) -> None:
    """Once its port is; an app that does not leave is ended within its grace."""
    until = asyncio.get_running_loop().time() + PATIENCE
    while True:
        try:
            return app.bind()
        except Refused as error:
            if asyncio.get_running_loop().time() > until:
                raise NotTaken(str(error)) from None
        await asyncio.sleep(0.02)


async def _first(one: "asyncio.Future[Any]", other: Awaitable[Any]) -> None:
    """Until either has ended; the other one is not waited for any longer."""
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait([one, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


# --- the predecessor -------------------------------------------------------------------------------------------------


class Predecessor:
    """The supervisor that has handed over."""

    def __init__(self, pid: int, handle: int) -> None:
        self.pid, self._handle = pid, handle

    def leave(self) -> None:
        """It has nothing to stay for: its app may go. What it drains still has its grace."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGTERM)


async def take_over(lock: Lock) -> Predecessor | None:
    """Take the lock; whoever has it is asked for it. Raises `NotTaken`."""
    if lock.try_take():
        return None
    pid, what = lock.holder()
    if not pid or what != "supervisor":
        raise NotTaken(f"{what or 'something'} runs this app here (process {pid or 'unknown'}), and does not hand over")
    try:
        handle = os.pidfd_open(pid)
        signal.pidfd_send_signal(handle, signal.SIGUSR1)
    except ProcessLookupError:
        lock.take()  # it has just gone
        return None
    loop = asyncio.get_running_loop()
    until = loop.time() + HAND_OVER
    while not lock.try_take():
        if loop.time() > until:
            raise NotTaken(f"the supervisor (process {pid}) does not hand over within {HAND_OVER:g} s")
        await asyncio.sleep(0.02)
    emit("server.took_over", pid=pid)
    return Predecessor(pid, handle)
