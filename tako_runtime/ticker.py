"""Cron's service: it asks `cron.due` what is to be done, and writes that, while it leads.

Of several hosts on one store one leads, by a lease that is taken when something is due: while nothing is, nothing is
written. It is the host's, on which one supervises: who is started again after a crash leads on at once. And even two
leaders fire once, since a firing moves the schedule on only from where it was seen, in one transaction with its run.
"""

import asyncio
import contextlib
import socket

from tako_runtime import clock, cron
from tako_runtime.clock import Clock
from tako_runtime.errors import InvalidValue, StoreBusy, TakoError
from tako_runtime.log import emit
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.run import NewRun, ScheduleRecord
from tako_runtime.store.base import DropLease, FireSchedule, ListSchedules, SetSchedules, TakeLease
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

#: How long a leader that has fallen silent holds cron up.
LEASE = 5 * clock.SECOND

#: How often the clock is looked at between firings: it may have been set, or somebody may have to take over.
LOOK = LEASE // 3


class Cron:
    """Fires the schedules of the workflows that were declared to it."""

    def __init__(self, store: StoreThread, clock: Clock, host: str | None = None) -> None:
        self._store, self._clock = store, clock
        self._flows: dict[str, Declared] = {}
        self._holder = host or socket.gethostname()
        self._wake = asyncio.Event()
        self._stopping = False

    async def declare(self, manifest: Manifest) -> None:
        """Make the schedules those of a manifest. One that is not named any more is gone; but while a file is broken,
        or an expression cannot be read, what was known before goes on."""
        scheduled = {flow.name: flow for flow in manifest.workflows if flow.schedule is not None}
        records = {name: record(flow) for name, flow in scheduled.items() if _is_readable(flow)}
        unread = scheduled.keys() - records.keys()
        if manifest.mistakes or unread:
            told = {flow.name for flow in manifest.workflows} - unread
            before = await self._store.do(ListSchedules())
            records |= {one.workflow: one for one in before if one.workflow not in told}
            scheduled = {**{name: flow for name, flow in self._flows.items() if name not in told}, **scheduled}
        await self._store.do(SetSchedules(schedules=list(records.values())))
        self._flows = scheduled
        self._wake.set()

    def stop(self) -> None:
        """Fire nothing more. Call it in the event loop."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Until `stop()`."""
        try:
            while not self._stopping:
                self._wake.clear()
                next_at = None
                try:
                    next_at = await self.tick()
                except StoreBusy as error:
                    emit("store.busy", error=str(error))
                ahead = LOOK if next_at is None else max(0, min(LOOK, next_at - self._clock.now()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ahead / clock.SECOND if self._flows else None):
                        await self._wake.wait()
        finally:
            with contextlib.suppress(TakoError):
                await self._store.do(DropLease(name="cron", holder=self._holder))

    async def tick(self) -> int | None:
        """Fire what is due now, if this one leads; when the next one is. None where that is for another to know."""
        ours = await self._ours()
        firings = [
            firing for firing in cron.due(ours, self._clock.now())
            if not (firing.note == "invalid" and firing.was is None)  # that was told of already
        ]  # fmt: skip
        if firings:
            if not await self._leads():
                return None
            for firing in firings:
                if not self._stopping:
                    await self._fire(firing)
            ours = await self._ours()
        return min((one.next_at for one in ours if one.next_at is not None), default=None)

    async def _ours(self) -> list[ScheduleRecord]:
        """The schedules that this one can fire. Another release's are for that to fire."""
        return [one for one in await self._store.do(ListSchedules()) if one.workflow in self._flows]

    async def _leads(self) -> bool:
        now = self._clock.now()
        return await self._store.do(TakeLease(name="cron", holder=self._holder, until=now + LEASE, now=now))

    async def _fire(self, firing: cron.Firing) -> None:
        now = self._clock.now()
        run = _run(self._flows[firing.workflow], firing.at, now) if firing.at is not None else None
        landed = await self._store.do(
            FireSchedule(
                workflow=firing.workflow, seen_next_at=firing.was, next_at=firing.next_at, fired_at=firing.at, run=run,
                now=now,
            )
        )  # fmt: skip
        if landed and run is not None and firing.at is not None:
            emit(
                "cron.fired", workflow=firing.workflow, run=run.id, group=run.group, scheduled_at=clock.iso(firing.at),
                late_ms=(now - firing.at) / 1_000,
            )  # fmt: skip
        elif landed and firing.note != "new":
            emit("cron.passed_over", workflow=firing.workflow, note=firing.note, error=firing.error)


def record(flow: Declared) -> ScheduleRecord:
    """What a workflow declares of its schedule; it has no next time yet."""
    assert flow.schedule is not None
    return ScheduleRecord(
        flow.name, flow.group, flow.schedule, flow.timezone or "UTC", flow.catchup, flow.overlap, next_at=None
    )


def _is_readable(flow: Declared) -> bool:
    try:
        cron.Schedule.parse(flow.schedule or "", flow.timezone)
    except InvalidValue:
        return False
    return True


def _run(flow: Declared, at: int, now: int) -> NewRun:
    return new_run(
        flow.name, flow.group, "null", now=now, due=now, retries=flow.retries, backoff_base=flow.backoff_base,
        backoff_max=flow.backoff_max, scheduled_at=at,
    )  # fmt: skip
