"""Which groups cannot work on this machine and why, as its supervisor sees it; and when it tries again.

A failure is a worker that ended, or hung, before it claimed anything. The pauses between tries grow. What is found is
in the log and in the store, where status, metrics and an enqueue under `tako dev` read it. Only progress clears it.
"""

import socket
from pathlib import Path

from tako_runtime import clock
from tako_runtime.clock import Clock
from tako_runtime.errors import StoreBusy
from tako_runtime.feed import supervising
from tako_runtime.log import emit
from tako_runtime.store.base import ListHealth, ReportHealth, Unhealthy
from tako_runtime.store.commit import StoreThread

#: The pause after a failure; doubled with each one, up to the longest.
FIRST_PAUSE = clock.SECOND
LONGEST_PAUSE = clock.MINUTE


def believed(said: list[Unhealthy], app_dir: Path) -> list[Unhealthy]:
    """What a supervisor stands behind. One of this machine that was killed has taken nothing back of what it said."""
    here = socket.gethostname()
    silent = any(one.host == here for one in said) and supervising(app_dir) is None
    return [one for one in said if not (silent and one.host == here)]


class Health:
    """What is known is told to the store by `report()`, so that a store that is busy delays nothing else."""

    def __init__(self, store: StoreThread, clock: Clock) -> None:
        self.paused_until: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self._store, self._clock = store, clock
        self._host = socket.gethostname()
        self._failures: dict[str, int] = {}
        self._unsaid: dict[str, ReportHealth] = {}
        self._forgotten = False  # what was said before us

    def paused(self, group: str) -> None:
        """Another worker has failed: the next one has to wait. Those that fail at once with it count as one."""
        now = self._clock.now()
        if self.paused_until.get(group, 0) > now:
            return
        failures = self._failures[group] = self._failures.get(group, 0) + 1
        pause = min(FIRST_PAUSE << min(failures - 1, 10), LONGEST_PAUSE)
        self.paused_until[group] = now + pause
        emit("group.paused", group=group, failures=failures, pause=clock.spell(pause))

    def unhealthy(self, group: str, reason: str, details: str) -> None:
        """The group cannot work. `reason` is one sentence."""
        reason = reason if len(reason) <= 500 else f"{reason[:499]}…"
        if self.reasons.get(group) != reason:
            self.reasons[group] = reason
            emit("group.unhealthy", group=group, reason=reason, last_lines=details)
        now = self._clock.now()
        self._unsaid[group] = ReportHealth(group=group, host=self._host, now=now, reason=reason, details=details)

    def healthy(self, group: str) -> None:
        """Nothing speaks against it any more."""
        if self.reasons.pop(group, None) is not None:
            emit("group.healthy", group=group)
            self._unsaid[group] = self._well(group)

    def proved(self, group: str) -> None:
        """A worker of it has claimed: that is progress."""
        self.calm(group)
        self.healthy(group)

    def calm(self, group: str) -> None:
        """The next failure is a first one again."""
        self._failures.pop(group, None)

    def try_now(self) -> None:
        """The files are others now: no pause holds them up, and they are not to blame for what failed before."""
        self.paused_until.clear()
        self._failures.clear()

    async def report(self) -> None:
        """Raises `StoreBusy`; what was not told then is told the next time."""
        if not self._forgotten:
            await self._forget()
        for group, told in list(self._unsaid.items()):
            await self._store.do(told)
            if self._unsaid.get(group) is told:
                del self._unsaid[group]

    async def forget(self) -> None:
        """At the start and the end: what nobody watches is not known to be unhealthy."""
        self._unsaid.clear()
        try:
            await self._forget()
        except StoreBusy as error:
            emit("store.busy", error=str(error))

    async def _forget(self) -> None:
        for row in await self._store.do(ListHealth()):
            if row.host == self._host:
                await self._store.do(self._well(row.group))
        self._forgotten = True

    def _well(self, group: str) -> ReportHealth:
        return ReportHealth(group=group, host=self._host, now=self._clock.now(), reason=None)
