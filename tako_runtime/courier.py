"""Takes signals that the shared store keeps to local runs that wait for them.

A signal goes at once to whoever waits for it in the shared store, and on the server where it is sent. Where nobody
does, the shared store keeps it, for the next wait on any server: a run that is in that store takes it by itself, a
local run is brought it by its own server's courier. It is given first, and only then kept no longer: so none is lost,
whatever happens in between.
"""

import asyncio

from tako_runtime import clock
from tako_runtime.clock import Clock
from tako_runtime.errors import StoreBusy
from tako_runtime.log import emit
from tako_runtime.run import new_id
from tako_runtime.signals import AWAITED
from tako_runtime.store.base import DataVersion, DropKept, DropLease, KeptSignals, OpenWaits, SendSignal, TakeLease
from tako_runtime.store.commit import StoreThread

#: Between two looks, in seconds: at most, and after a ring of the bell.
LOOK, SOON = 1.0, 0.05

#: Of several servers' couriers one gives at a time. One that falls silent holds the others up for so long.
LEASE = 5 * clock.SECOND


class Courier:
    """From the store `shared` to this machine's own, `local`. `server` is the name by which others know it."""

    def __init__(self, local: StoreThread, shared: StoreThread, server: str, clock: Clock) -> None:
        self._local, self._shared, self._server, self._clock = local, shared, server, clock
        self._seen: tuple[int, int] | None = None
        self._rung = asyncio.Event()

    async def run(self) -> None:
        """For ever."""
        listener = self._local.bell.listen("d-" + new_id(self._clock.now()))
        listener.start(lambda _: self._rung.set())
        try:
            while True:
                try:
                    await self.look()
                except StoreBusy as error:
                    self._seen = None
                    emit("store.busy", error=str(error))
                try:
                    async with asyncio.timeout(LOOK):
                        await self._rung.wait()
                        await asyncio.sleep(SOON)
                except TimeoutError:
                    pass
                self._rung.clear()
        finally:
            listener.close()

    async def look(self) -> int:
        """Give what is kept to those who wait for it here; how many runs took something."""
        waits = await self._local.do(OpenWaits(limit=AWAITED))
        if not waits:
            return 0
        versions = await self._local.do(DataVersion()), await self._shared.do(DataVersion())
        if versions == self._seen:
            return 0
        self._seen = versions
        return sum([await self._bring(name) for name in dict.fromkeys(wait.signal for wait in waits)])

    async def _bring(self, name: str) -> int:
        """The oldest kept signal of that name to all who wait for it here."""
        now = self._clock.now()
        if not await self._shared.do(KeptSignals(now=now, name=name, limit=1)):
            return 0
        lease = TakeLease(name="courier", holder=self._server, until=now + LEASE, now=now)
        if not await self._shared.do(lease):
            self._seen = None  # it is another's turn
            return 0
        try:
            took = 0
            for one in await self._shared.do(KeptSignals(now=now, name=name, limit=1)):
                payload = one.payload.decode(errors="replace")
                took = await self._local.do(SendSignal(name=name, payload=payload, now=now, expires_at=None))
                if took:
                    await self._shared.do(DropKept(name=name, sent_at=one.sent_at))
            return took
        finally:
            await self._shared.do(DropLease(name="courier", holder=self._server))
