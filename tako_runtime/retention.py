"""Retention: what has ended long ago goes, in small batches, and the file gets smaller.

Ended runs go after the `retention` of their group, kept signals once they have expired. A run that lives stays,
whatever its age.
"""

import asyncio

from tako_runtime.clock import Clock
from tako_runtime.config import Config
from tako_runtime.errors import StoreBusy
from tako_runtime.log import emit
from tako_runtime.store.base import EndedGroups, ExpireSignals, GiveBackSpace, Prune
from tako_runtime.store.commit import StoreThread

#: How often it looks, in seconds.
EVERY = 600.0

#: How many runs, or signals, go in one transaction at most, and the pause after it, in which others have their turn.
BATCH = 200
PAUSE = 0.02


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
        now, runs, signals = self._clock.now(), 0, 0
        for group in await self._store.do(EndedGroups()):
            before = now - self._config.group(group, self._server).retention
            while gone := await self._store.do(Prune(group=group, before=before, limit=BATCH)):
                runs += gone
                await asyncio.sleep(PAUSE)
        while gone := await self._store.do(ExpireSignals(now=now, limit=BATCH)):
            signals += gone
            await asyncio.sleep(PAUSE)
        if runs or signals:
            emit("store.pruned", runs=runs, signals=signals)
        while await self._store.do(GiveBackSpace()):
            await asyncio.sleep(PAUSE)
