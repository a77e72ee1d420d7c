"""Retention: what has ended long ago goes, in small batches, and the file gets smaller.

Ended runs go after the `retention` of their group, kept signals once they have expired. A run that lives stays,
whatever its age.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from tako_runtime.clock import Clock
from tako_runtime.config import Config
from tako_runtime.errors import StoreBusy
from tako_runtime.log import emit
from tako_runtime.run import Status
from tako_runtime.store.base import DataVersion, EndedGroups, ExpireSignals, GiveBackSpace, Prune
from tako_runtime.store.commit import StoreThread

#: How often it looks, in seconds.
EVERY = 600.0

#: How many runs one transaction looks at, or signals, and the pause after it, in which others have their turn.
BATCH = 200
PAUSE = 0.02


async def prune(
    store: StoreThread,
    before: Callable[[str], int],
    *,
    workflow: str | None = None,
    statuses: Sequence[Status] | None = None,
    pause: float = 0.0,
) -> AsyncIterator[int]:
    """Delete the runs of each group that ended before `before(group)`, the oldest first, and give the space back.
    Yields how many went with each batch; between two it lets go of the lock, and waits for `pause` seconds."""
    for group in await store.do(EndedGroups()):
        after: tuple[int, int] | None = (0, 0)
        while after is not None:
            pruned = await store.do(
                Prune(
                    group=group, before=before(group), limit=BATCH, workflow=workflow, statuses=statuses, after=after
                )
            )  # fmt: skip
            after = pruned.after
            yield pruned.count
            await asyncio.sleep(pause)
    while await store.do(GiveBackSpace()):
        await asyncio.sleep(pause)


class Retention:
    """Prunes the store of one app, as often as `run` looks."""

    def __init__(self, store: StoreThread, config: Config, server: str | None, clock: Clock) -> None:
        self._store, self._config, self._server, self._clock = store, config, server, clock

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                await self.prune()
            except StoreBusy as error:
                emit("store.busy", error=str(error))
            await asyncio.sleep(EVERY)

    async def prune(self) -> None:
        """Let go what is too old now. A group that only a workflow names keeps its runs as long as the base does."""
        await self._store.do(DataVersion())  # a shared store that is opened only now says by how much the clock is off
        now, runs, signals = self._clock.now(), 0, 0
        while gone := await self._store.do(ExpireSignals(now=now, limit=BATCH)):
            signals += gone
            await asyncio.sleep(PAUSE)

        def before(group: str) -> int:
            return now - self._config.group(group, self._server).retention

        async for count in prune(self._store, before, pause=PAUSE):
            runs += count
        if runs or signals:
            emit("store.pruned", runs=runs, signals=signals)
