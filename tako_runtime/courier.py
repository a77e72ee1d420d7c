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
from tako_runtime.store.base import (
    DataVersion,
    DropKept,
    DropLease,
    KeptSignal,
    KeptSignals,
    OpenWaits,
    SendSignal,
    TakeLease,
)
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
        if not await self._local.do(OpenWaits(limit=1)):
            return 0
        versions = await self._local.do(DataVersion()), await self._shared.do(DataVersion())
        if versions == self._seen:
            return 0
        self._seen = versions
        waits = await self._local.do(OpenWaits(limit=AWAITED))  # after the versions: what is newer is seen next time
        names = list(dict.fromkeys(wait.signal for wait in waits))
        if not any(await asyncio.gather(*[self._oldest(name) for name in names])):
            return 0
        now = self._clock.now()
        lease = TakeLease(name="courier", holder=self._server, until=now + LEASE, now=now)
        if not await self._shared.do(lease):  # it is another's turn, and then ours
            self._seen = None
            return 0
        try:
            return sum(await asyncio.gather(*[self._bring(name) for name in names]))
        finally:
            await self._shared.do(DropLease(name="courier", holder=self._server))

    def _oldest(self, name: str) -> "asyncio.Future[list[KeptSignal]]":
        return self._shared.do(KeptSignals(now=self._clock.now(), name=name, limit=1))

    async def _bring(self, name: str) -> int:
        """The oldest kept signal of that name to all who wait for it here."""
        took = 0
        for one in await self._oldest(name):
            payload = one.payload.decode(errors="replace")
            signal = SendSignal(name=name, payload=payload, now=self._local.clock.now(), expires_at=None)
            took = await self._local.do(signal)
            if took:
                await self._shared.do(DropKept(name=name, sent_at=one.sent_at))
                emit("signal.brought", signal=name, runs=took)
        return took
