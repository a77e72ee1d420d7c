"""4. decide(seen, wanted, now) -> what to start, and the loop that carries it out.

The supervisor starts worker processes when work is due, lets them leave when idle, keeps as many as a group wants, and
gives a dead worker's runs back at once. It never imports user code. Between events it sleeps: the bell, a child's end,
the next due time and a look once a second wake it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock
from tako_runtime.clock import Clock, SystemClock
from tako_runtime.errors import StoreBusy
from tako_runtime.log import WORDS, emit
from tako_runtime.reclaim import reclaim
from tako_runtime.run import new_id
from tako_runtime.secrets import VARIABLE, handing_over, masked_json
from tako_runtime.store import Home
from tako_runtime.store.base import DataVersion, Demand, ListWorkers
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


class _Child:
    """A worker process of ours: what it says, line by line, and its end.

    Its end is waited for in a thread, not read off its pipe: what a step has started may hold that open for long.
    """

    def __init__(self, group: Group, words: list[str], cwd: Path, environment: Mapping[str, str], secrets: int) -> None:
        self.group = group
        self.began = False
        self.last_lines: deque[str] = deque(maxlen=30)
        self._process = subprocess.Popen(
            words,
            cwd=cwd,
            env={**environment, VARIABLE: str(secrets)},
            pass_fds=[secrets],
            stdin=subprocess.PIPE,  # its end tells the worker that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._rest = b""

    async def follow(self, say: Callable[[str], None]) -> int:
        """Pass on each line that it says; its exit code, negative for a signal."""
        loop = asyncio.get_running_loop()
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        pipe = self._process.stdout.fileno()
        os.set_blocking(pipe, False)
        loop.add_reader(pipe, self._read, pipe, say)
        try:
            ended: asyncio.Future[int] = loop.create_future()
            threading.Thread(target=self._wait, args=(loop, ended), name="tako-child", daemon=True).start()
            code = await asyncio.shield(ended)
            while self._read(pipe, say):
                pass
        finally:
            loop.remove_reader(pipe)
            self._process.stdout.close()
            self._process.stdin.close()
        if self._rest:
            say(self._rest.decode(errors="replace"))
        return code

    def _wait(self, loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[int]") -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody wants to know
            loop.call_soon_threadsafe(ended.set_result, code)

    def _read(self, pipe: int, say: Callable[[str], None]) -> bool:
        try:
            data = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(pipe)
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            say(line.decode(errors="replace"))
        return True

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """At once, with all that its steps have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


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
        environment: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.secrets = secrets or {}  # what workers get that start from now on
        self._store, self._home, self._root, self._folder = store, home, root, folder
        self._wanted, self._default = dict(wanted), default or Group()
        self._show, self._lease, self._log_level = show, lease, log_level
        self._clock: Clock = clock or SystemClock()
        self._environment = {**(environment or os.environ), **home.environment(), "PYTHONUNBUFFERED": "1"}
        self._children: dict[_Child, asyncio.Task[None]] = {}
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
        return [child.pid for child in self._children]

    def kill(self) -> None:
        """End every worker at once, with what it has started. Their runs go on at the next start."""
        for child in self._children:
            child.kill()

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
                    await self._end_frozen(now)
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
        async with handing_over(self.secrets) as pipe:
            child = _Child(group, words, self._root, self._environment, pipe)
        self._children[child] = asyncio.get_running_loop().create_task(self._follow(child))
        emit("worker.spawned", pid=child.pid, group=group.name)

    async def _follow(self, child: _Child) -> None:
        """Pass on what a worker says, until it ends; then give back what it had in hand."""
        code = await child.follow(lambda line: self._say(child, line))
        del self._children[child]
        group = child.group.name
        if code != 0:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            emit("worker.died", pid=child.pid, how=how, group=group)
        if child.began:
            self._failures.pop(group, None)
        elif code != 0:
            failures = self._failures[group] = self._failures.get(group, 0) + 1
            pause = min(FIRST_PAUSE << min(failures - 1, 10), LONGEST_PAUSE)
            self._paused_until[group] = self._clock.now() + pause
            lines = "\n".join(child.last_lines)
            emit("group.paused", group=group, failures=failures, pause=clock.spell(pause), last_lines=lines)
        await self._give_back()
        self._dirty = True
        self._wake.set()

    async def _end_frozen(self, now: int) -> None:
        """A worker of ours whose lease has lapsed does not run any more (it was stopped, or hangs with the interpreter
        held): end it, with whatever lock it holds. Its runs go on in another."""
        lapsed = {w.pid: w.id for w in await self._store.do(ListWorkers()) if w.lease_until <= now}
        for child in self._children:
            if child.pid in lapsed:
                emit("worker.frozen", worker=lapsed[child.pid], pid=child.pid, group=child.group.name)
                child.kill()

    async def _give_back(self) -> None:
        try:
            await reclaim(self._store, self._home.app_dir, self._clock.now())
        except StoreBusy as error:  # the next round does it
            emit("store.busy", error=str(error))

    def _say(self, child: _Child, line: str) -> None:
        # A worker has masked what it says; a program that a step has started, or an interpreter that crashes, has not.
        line = masked_json(line.encode(), "what a worker says").decode()
        event = _event(line)
        if event is None:  # not of ours: what a step's own program prints
            child.last_lines.append(line)
            event = {"at": clock.iso(self._clock.now()), "level": "info", "event": "output", "message": line}
        child.began = child.began or event["event"] == "worker.started"
        self._show(child.group.name, event)

    async def _end_children(self) -> None:
        """SIGTERM, the group's grace, then SIGKILL for what is left, grandchildren included."""
        if self._children:
            await asyncio.gather(*(self._end(child, followed) for child, followed in self._children.items()))

    async def _end(self, child: _Child, followed: "asyncio.Task[None]") -> None:
        child.terminate()
        await asyncio.wait([followed], timeout=child.group.grace / clock.SECOND)
        child.kill()
        await followed


def _event(line: str) -> dict[str, Any] | None:
    """The event that a worker has written, or None: a program that a step has started may print JSON too."""
    try:
        event = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    ours = isinstance(event, dict) and all(isinstance(event.get(n), str) for n in ("at", "level", "event", "message"))
    return event if ours and event["event"] in WORDS else None
