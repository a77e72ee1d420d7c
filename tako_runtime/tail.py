"""Follow one run to its end, or all of them for as long as one likes: `tako runs tail`.

What has happened so far comes from the store (`story.py`), what happens from now on from the supervisor (`feed.py`). A
look at the store at every ring of the bell, and once a second, brings what the supervisor does not hear of: a run that
somebody cancels, the steps where its log has no debug lines, and everything where no supervisor runs.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tako_runtime import clock, log
from tako_runtime.bell import WAITING, Bell
from tako_runtime.control import Control
from tako_runtime.errors import NotFound
from tako_runtime.feed import Event, follow, supervising
from tako_runtime.run import new_id
from tako_runtime.story import ENDS, Key, key, story

#: Between two looks at the store: at most, and at least, however often the bell is rung. In seconds.
LOOK = 1.0
LOOK_AGAIN = 0.1

#: Among how many of the newest runs a look finds what is new, and how many it tells of at first.
NEWEST = 200
FIRST = 20


async def tail(control: Control, bell: Bell, app_dir: Path, run: str | None = None) -> AsyncIterator[Event]:
    """Events as they come, each with its `source`: of the run with this id until it has ended, or of all runs for ever.
    Says where they come from (`tail.live`, `tail.alone`), and when that changes."""
    follower = _Tail(control, app_dir, run)
    listener = bell.listen(f"{WAITING}t-{new_id(clock.SystemClock().now())}")
    listener.start(lambda _: follower.news.put_nowait(None))
    try:
        async for event in follower.events():
            yield event
    finally:
        listener.close()
        await follower.close()


class _Tail:
    def __init__(self, control: Control, app_dir: Path, run: str | None) -> None:
        self.news: asyncio.Queue[Event | None] = asyncio.Queue()  # None: somebody has rung
        self._control, self._app_dir, self._run = control, app_dir, run
        self._live: asyncio.Task[None] | None = None
        self._told: dict[str, set[Key]] = {}
        self._stood: dict[str, tuple[Any, ...]] = {}
        self._since = ""  # what is older was told, or is no news

    async def events(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        looked_at = look_at = loop.time()
        alone = False
        while True:
            if loop.time() >= look_at:
                if self._live is None:
                    connected = await self._connect()
                    if connected or not alone:
                        yield self._says_who() if connected else _says("tail.alone")
                    alone = not connected
                for event in await asyncio.to_thread(self._look):
                    yield event
                    if self._is_end(event):
                        return
                looked_at = loop.time()
                look_at = looked_at + LOOK
            try:
                async with asyncio.timeout_at(look_at):
                    heard = await self.news.get()
            except TimeoutError:
                continue
            if heard is None:
                look_at = min(look_at, looked_at + LOOK_AGAIN)
            elif self._is_end(heard):  # what came before it and was not heard comes first
                look_at = loop.time()
            elif self._is_news(heard):
                yield heard

    async def close(self) -> None:
        if self._live is not None:
            self._live.cancel()
            await asyncio.gather(self._live, return_exceptions=True)

    # --- live ---

    async def _connect(self) -> bool:
        follower = await follow(self._app_dir)
        if follower is None:
            return False

        async def read() -> None:
            try:
                while (event := await follower.next()) is not None:
                    if "run" in event and self._run in (None, event["run"]):
                        self.news.put_nowait(event)
            finally:
                follower.close()
                self._live = None

        self._since = self._since or clock.iso(clock.SystemClock().now())
        self._live = asyncio.get_running_loop().create_task(read())
        return True

    def _says_who(self) -> Event:
        who = supervising(self._app_dir)
        return _says("tail.live", what=who.what if who else "the supervisor", pid=who.pid if who else "unknown")

    def _is_end(self, event: Event) -> bool:
        return self._run is not None and event["event"] in ENDS

    def _is_news(self, event: Event) -> bool:
        """Of all runs, what is heard is not remembered: that would have no end."""
        self._since = max(self._since, str(event["at"]))
        return self._run is None or self._add(event)

    def _add(self, event: Event) -> bool:
        """False where it was told already."""
        told, this = self._told.setdefault(event["run"], set()), key(event)
        is_new = this is None or this not in told or event["event"] == "run.resumed"
        if this is not None:
            told.add(this)
        return is_new

    # --- from the store ---

    def _look(self) -> list[Event]:
        if self._run is not None:
            return [event for event in story(self._control.show(self._run)) if self._add(event)]
        return [] if self._live is not None else self._look_at_all()

    def _look_at_all(self) -> list[Event]:
        """The newest runs that stand elsewhere than at the last look. At the first one, all that is known of a few."""
        since, now = self._since, clock.iso(clock.SystemClock().now())
        listed = self._control.list_runs(limit=NEWEST)
        changed = [run["id"] for run in listed if self._stood.get(run["id"]) != _stands(run)]
        if not since:
            changed, self._since = changed[:FIRST], now
        self._stood = {run["id"]: _stands(run) for run in listed}
        self._told = {run: self._told.get(run, set()) for run in self._stood}
        fresh = [event for run in changed for event in self._story(run) if event["at"] >= since and self._add(event)]
        return sorted(fresh, key=lambda event: str(event["at"]))

    def _story(self, run: str) -> list[Event]:
        try:
            return story(self._control.show(run))
        except NotFound:  # pruned meanwhile
            return []


def _stands(run: Event) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("status", "reason", "attempt", "run_at", "finished_at"))


def _says(event: str, **facts: Any) -> Event:
    line = {"at": clock.SystemClock().now(), "level": log.INFO, "event": event, **facts}
    return {"source": "tako", **log.told(line)}
