"""4. decide(seen, wanted, now) -> what to start, and the loop that carries it out.

The supervisor starts worker processes when work is due, lets them leave when idle, keeps as many as a group wants, and
gives a dead worker's runs back at once. It never imports user code. Between events it sleeps: the bell, a child's end,
the next due time and a look once a second wake it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock
from tako_runtime.clock import Clock, SystemClock
from tako_runtime.errors import StoreBusy
from tako_runtime.log import emit
from tako_runtime.reclaim import reclaim
from tako_runtime.run import new_id
from tako_runtime.store import Home
from tako_runtime.store.base import DataVersion, Demand
from tako_runtime.store.commit import StoreThread

#: The net under the bell, in seconds.
LOOK = 1.0

#: How often lapsed leases are looked for.
RECLAIM_EVERY = 5 * clock.SECOND

#: The pause after a worker that ended before it began to work; doubled each time, up to the longest.
FIRST_PAUSE = clock.SECOND
LONGEST_PAUSE = clock.MINUTE


@dataclass(frozen=True, slots=True)
class Group:
    """What a group of workers should be. Durations are microseconds."""

    name: str = "default"
    workers: int = 0
    concurrency: int = 10
    idle_timeout: int = 5 * clock.MINUTE
    grace: int = 30 * clock.SECOND


@dataclass(frozen=True, slots=True)
class Seen:
    """What the supervisor sees: groups with due runs, live workers and pauses by group."""

    due: frozenset[str] = frozenset()
    live: Mapping[str, int] = field(default_factory=dict)
    paused_until: Mapping[str, int] = field(default_factory=dict)


def decide(seen: Seen, wanted: Mapping[str, Group], now: int) -> list[str]:
    """The groups to start a worker for, each as often as workers are missing. Pure.

    A group with `workers = N` has N; one with `workers = 0` gets one when a run is due, and none at rest.

    >>> decide(Seen(due=frozenset({"default"})), {"default": Group()}, 0)
    ['default']
    >>> decide(Seen(live={"email": 1}), {"email": Group("email", workers=3)}, 0)
    ['email', 'email']
    """
    starts: list[str] = []
    for name in sorted(set(wanted) | seen.due):
        group = wanted.get(name) or Group(name)
        need = group.workers or int(name in seen.due)
        missing = need - seen.live.get(name, 0)
        if missing > 0 and seen.paused_until.get(name, 0) <= now:
            starts += [name] * missing
    return starts


@dataclass(slots=True)
class _Child:
    """A worker process of ours."""

    group: Group
    process: asyncio.subprocess.Process
    task: "asyncio.Task[None]"
    began: bool = False
    last_lines: list[str] = field(default_factory=list)


class Supervisor:
    """The workers of one app on this machine, until stopped. `show(source, line)` gets each event of its workers and
    each line that they print; `groups(name)` says what a group should be."""

    def __init__(
        self,
        store: StoreThread,
        home: Home,
        root: Path,
        folder: str,
        wanted: Mapping[str, Group],
        show: Callable[[str, dict[str, Any]], None],
        *,
        default: Group | None = None,
        lease: int = 15 * clock.SECOND,
        log_level: str = "info",
        clock: Clock | None = None,
    ) -> None:
        self._store, self._home, self._root, self._folder = store, home, root, folder
        self._wanted, self._default = dict(wanted), default or Group()
        self._show, self._lease, self._log_level = show, lease, log_level
        self._clock: Clock = clock or SystemClock()
        self._children: list[_Child] = []
        self._failures: dict[str, int] = {}
        self._paused_until: dict[str, int] = {}
        self._wake = asyncio.Event()
        self._dirty = True
        self._stopping = False

    async def run(self) -> None:
        """Supervise until `stop()`; then drain the workers, and leave none behind."""
        listener = self._store.bell.listen("s-" + new_id(self._clock.now()))
        listener.start(self._heard)
        try:
            await self._supervise()
        finally:
            listener.close()
            await self._end_children()

    def stop(self) -> None:
        """Drain and leave. Call it in the event loop."""
        self._stopping = True
        self._wake.set()

    @property
    def pids(self) -> list[int]:
        return [child.process.pid for child in self._children]

    # --- the loop ---

    async def _supervise(self) -> None:
        data_version, next_at, reclaim_at = -1, None, 0
        seen_due: frozenset[str] = frozenset()
        while not self._stopping:
            now = self._clock.now()
            try:
                version = await self._store.do(DataVersion())
                if now >= reclaim_at:
                    reclaim_at = now + RECLAIM_EVERY
                    await reclaim(self._store, self._home.app_dir, now)
                    self._dirty = True
                if self._dirty or version != data_version or (next_at is not None and next_at <= now):
                    self._dirty, data_version = False, version
                    demand = await self._store.do(Demand(now=now))
                    seen_due, next_at = demand.groups, demand.next_at
            except StoreBusy as error:
                emit("store.busy", error=str(error))
            live: dict[str, int] = {}
            for child in self._children:
                live[child.group.name] = live.get(child.group.name, 0) + 1
            seen = Seen(seen_due, live, self._paused_until)
            for name in decide(seen, self._groups(seen_due), now):
                await self._start(self._group(name))
            times = [at for at in (next_at, *self._paused_until.values()) if at is not None and at > now]
            pause = min([LOOK, *((at - now) / clock.SECOND for at in times)])
            await self._sleep(pause)

    async def _sleep(self, seconds: float) -> None:
        handle = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        handle.cancel()
        self._wake.clear()

    def _heard(self, topics: set[str]) -> None:
        if any(topic.startswith("due:") or topic == "later" for topic in topics):
            self._dirty = True
            self._wake.set()

    def _groups(self, due: frozenset[str]) -> dict[str, Group]:
        return {name: self._group(name) for name in set(self._wanted) | due}

    def _group(self, name: str) -> Group:
        found = self._wanted.get(name)
        if found is None:  # named by a workflow and by no configuration: it is like the base
            base = self._default
            found = Group(name, 0, base.concurrency, base.idle_timeout, base.grace)
        return found

    # --- workers ---

    async def _start(self, group: Group) -> None:
        words = [
            sys.executable, "-m", "tako_runtime", "worker", "--group", group.name, "--dir", self._folder,
            "--concurrency", str(group.concurrency), "--lease", f"{self._lease}us", "--log-level", self._log_level,
        ]  # fmt: skip
        if not group.workers:
            words += ["--idle-timeout", f"{group.idle_timeout}us"]
        process = await asyncio.create_subprocess_exec(
            *words,
            cwd=self._root,
            env={**os.environ, **self._home.environment(), "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.PIPE,  # its end tells the worker that we are gone
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=1 << 22,
        )
        child = _Child(group, process, None)  # type: ignore[arg-type]
        child.task = asyncio.get_running_loop().create_task(self._follow(child))
        self._children.append(child)
        emit("worker.spawned", pid=process.pid, group=group.name)

    async def _follow(self, child: _Child) -> None:
        """Pass on what a worker says, until it ends; then give back what it had in hand."""
        assert child.process.stdout is not None
        while line := await child.process.stdout.readline():
            self._say(child, line.decode(errors="replace").rstrip("\n"))
        code = await child.process.wait()
        self._children.remove(child)
        group = child.group.name
        if code != 0:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            emit("worker.died", worker=group, pid=child.process.pid, how=how, group=group)
        if child.began:
            self._failures.pop(group, None)
        elif code != 0:
            failures = self._failures[group] = self._failures.get(group, 0) + 1
            pause = min(FIRST_PAUSE << (failures - 1), LONGEST_PAUSE)
            self._paused_until[group] = self._clock.now() + pause
            emit(
                "group.paused", group=group, failures=failures, pause=clock.spell(pause),
                last_lines="\n".join(child.last_lines[-30:]),
            )  # fmt: skip
        await self._give_back()
        self._dirty = True
        self._wake.set()

    async def _give_back(self) -> None:
        try:
            await reclaim(self._store, self._home.app_dir, self._clock.now())
        except StoreBusy as error:  # the next round does it
            emit("store.busy", error=str(error))

    def _say(self, child: _Child, line: str) -> None:
        try:
            event = msgspec.json.decode(line)
        except msgspec.DecodeError:
            event = None
        if isinstance(event, dict) and "event" in event:
            child.began = child.began or event["event"] == "worker.started"
        else:
            child.last_lines = [*child.last_lines[-29:], line]
            event = {"at": clock.iso(self._clock.now()), "level": "info", "event": "output", "message": line}
        self._show(child.group.name, event)

    async def _end_children(self) -> None:
        """SIGTERM, the group's grace, then SIGKILL for the whole process group."""
        tasks = [asyncio.get_running_loop().create_task(self._end(child)) for child in list(self._children)]
        if tasks:
            await asyncio.wait(tasks)

    async def _end(self, child: _Child) -> None:
        _signal(child.process, signal.SIGTERM)
        try:
            async with asyncio.timeout(child.group.grace / clock.SECOND):
                await asyncio.shield(child.task)
        except TimeoutError:
            _signal(child.process, signal.SIGKILL, whole_group=True)
            await child.task
        _signal(child.process, signal.SIGKILL, whole_group=True)  # what its steps have started and left


def _signal(process: asyncio.subprocess.Process, number: signal.Signals, *, whole_group: bool = False) -> None:
    try:
        if whole_group:
            os.killpg(process.pid, number)
        elif process.returncode is None:
            process.send_signal(number)
    except ProcessLookupError:
        pass
