"""The worker processes of a supervisor: how they are started, how new code takes the place of old, how they end."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock, log
from tako_runtime.child import TOGETHER, Child, Event, Group
from tako_runtime.clock import Clock
from tako_runtime.log import emit
from tako_runtime.manifest import Manifest
from tako_runtime.rotation import Mark
from tako_runtime.secrets import VARIABLE, handing_over
from tako_runtime.spare import Spare


class Crew:
    """The processes, each with the task that follows it. `said(child, event)` gets each event and each line of theirs,
    `ended(child, code)` is awaited when one is gone. `words` are those of `worker` that hold for all; `mark(what)` is
    for who gets `secrets`."""

    def __init__(
        self,
        root: Path,
        words: list[str],
        environment: Mapping[str, str],
        secrets: Mapping[str, str],
        mark: Callable[[str], Mark],
        said: Callable[[Child, Event], None],
        ended: Callable[[Child, int], Awaitable[None]],
        clock: Clock,
        *,
        together: bool,
    ) -> None:
        self.children: dict[Child, asyncio.Task[None]] = {}
        self.environment, self.secrets = environment, secrets  # what those get that start from now on
        self._root, self._words, self._said, self._ended, self._clock = root, words, said, ended, clock
        self._mark = mark
        self._spare = Spare() if together else None
        self._broken: frozenset[str] = frozenset()
        self._modules: list[str] = []
        self._reload_at = 0
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, group: Group, groups: Iterable[Group], *, replaces: bool = False) -> Child:
        """A worker process of a group, which is told what each of `groups` should be. One that `replaces` others ends
        where a file cannot be imported that could be before. Raises `OSError`."""
        told = [word for each in groups for word in ("--group", f"{each.name}:{each.concurrency}")]
        words = ["worker", *self._words, *told, "--concurrency", str(group.concurrency)]
        if self._spare is not None:
            words += ["--together"]
        if not group.workers:
            words += ["--idle-timeout", f"{group.idle_timeout}us"]
        if replaces:
            words += ["--strict", *(word for file in sorted(self._broken) for word in ("--broken", file))]
        child = self._spare.take(words, self.environment) if self._spare is not None else None
        child = child or await self._launch(group, words)
        child.replaces = replaces
        self.children[child] = asyncio.get_running_loop().create_task(self._follow(child))
        emit("worker.spawned", pid=child.pid, group=group.name)
        if self._closed:
            child.kill()
        return child

    async def on_trial(self, group: Group) -> Child:
        """A worker that is none of the crew, and claims nothing. Raises `OSError`."""
        told = ["--group", f"{group.name}:{group.concurrency}", "--concurrency", str(group.concurrency)]
        return await self._launch(group, ["worker", *self._words, *told, "--trial"])

    async def _launch(self, group: Group, words: list[str]) -> Child:
        async with handing_over(self.secrets) as pipe:
            environment = {**self.environment, VARIABLE: str(pipe)}
            words = [sys.executable, "-m", "tako_runtime", *words]
            mark = self._mark(f"a worker of {group.name}")
            try:
                child = Child(group, words, self._root, environment, self._clock, [pipe, *mark.given])
                mark.of(child.pid)
            finally:
                mark.drop()
            return child

    async def _follow(self, child: Child) -> None:
        code = await child.follow(lambda event: self._said(child, event))
        del self.children[child]
        if child.debugging:
            event = {"at": self._clock.now(), "level": log.DEBUG, "event": "debugger.closed", "pid": child.pid}
            self._said(child, log.told(event))
        await self._ended(child, code)

    # --- new code ---

    def reload(self, group: Group, groups: Iterable[Group]) -> bool:
        """Have the project's files as they are now take over; whether there is anything that they take over from.

        The one of all groups goes on until its follower has imported them, and if they cannot be imported, after that.
        Others are told to stop, and followed where there is work."""
        self._reload_at = self._clock.now()
        if self._closed:
            return True
        if self._spare is None:
            for child in list(self.children):
                if not child.leaving:
                    self.end(child, within=min(child.group.grace, TOGETHER.grace))
            return bool(self.children)
        for child in self.children:
            if child.replaces:  # it may have read what has just been written anew
                child.dismissed = True
                child.kill()
        if not any(child.workers and not child.leaving for child in self.children):
            return False
        self._do(self._start_follower(group, list(groups)))
        return True

    async def _start_follower(self, group: Group, groups: list[Group]) -> None:
        try:
            await self.start(group, groups, replaces=True)
        except OSError as error:
            emit("code.kept", reason=f"its worker cannot be started: {error.strerror}")

    def declared(self, child: Child, event: Event) -> Manifest:
        """It has imported the project's files and takes over, in this instant; what they declare."""
        manifest = msgspec.convert(event["manifest"], Manifest)
        self._modules = event["modules"]
        self._broken = frozenset(one.file for one in manifest.mistakes)
        if child.replaces:
            child.replaces = False
            for older in list(self.children):
                if older is not child and not older.leaving:
                    self.end(older)
            emit("code.reloaded", ms=(self._clock.now() - self._reload_at) / 1_000)
        self.stand_by()
        return manifest

    def stand_by(self) -> None:
        """Have another process ready for the next time."""
        if self._spare is not None and not self._closed:
            self._do(self._prepare(self._spare))

    async def _prepare(self, spare: Spare) -> None:
        with contextlib.suppress(OSError):  # the next start will tell
            spare.put(await self._launch(TOGETHER, ["worker", "--spare", *self._words]), self._modules)
            if self._closed:
                spare.discard()

    # --- the end ---

    def end(self, child: Child, *, within: int | None = None, drained: bool = True) -> None:
        """Another takes its place already. SIGTERM, its group's grace, then SIGKILL for what is left of it,
        grandchildren included. What it has in hand then is given back, without using up an attempt if it is
        `drained`."""
        child.leaving = True
        self._do(self._end(child, self.children[child], within, drained))

    async def end_all(self) -> None:
        self._closed = True
        if self._spare is not None:
            self._spare.discard()
        while self.children:
            await asyncio.gather(*(self._end(child, followed) for child, followed in self.children.items()))

    def kill(self) -> None:
        """At once, with what they have started."""
        self._closed = True
        if self._spare is not None:
            self._spare.discard()
        for child in self.children:
            child.kill()

    async def _end(
        self, child: Child, followed: "asyncio.Task[None]", within: int | None = None, drained: bool = True
    ) -> None:
        child.drained = drained
        child.terminate()
        patience = (child.group.grace if within is None else within) / clock.SECOND
        while not (await asyncio.wait([followed], timeout=patience))[0]:
            if self._closed or not child.debugging:
                child.kill()

    def _do(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
