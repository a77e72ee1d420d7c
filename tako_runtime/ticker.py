"""Cron's service: it asks `cron.due` what is to be done, and writes that, while it leads.

Of several hosts on one store one leads, by a lease that is taken when something is due: while nothing is, nothing is
written. It is the host's, on which one supervises: who is started again after a crash leads on at once. And even two
leaders fire once, since a firing moves the schedule on only from where it was seen, in one transaction with its run.

Under `tako dev --time-scale` schedules go by a calendar that begins with the machine's and runs ahead of it. Where a
schedule stands in that one is kept in memory only; what is stored is its place in the machine's, so that whoever looks
after it, even after a crash, finds nothing that lies in a far future, and no schedule is silent.
"""

import asyncio
import contextlib
import socket
from typing import Any, NamedTuple

from msgspec.structs import replace

from tako_runtime import clock, cron
from tako_runtime.clock import REAL_TIME, Clock, Pace
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


class _Ahead(NamedTuple):
    """Where a schedule stands in the calendar that runs ahead."""

    next_at: int | None
    last_at: int | None


class Cron:
    """Fires the schedules of the workflows that were declared to it."""

    def __init__(self, store: StoreThread, clock: Clock, host: str | None = None, pace: Pace = REAL_TIME) -> None:
        self._store, self._clock, self._pace = store, clock, pace
        self._began = clock.now()
        self._stored: dict[str, ScheduleRecord] = {}  # as they were seen last
        self._ahead: dict[str, _Ahead] = {}
        self._flows: dict[str, Declared] = {}
        self._undeclared: Manifest | None = None  # the store has not taken it yet
        self._declaring = asyncio.Lock()
        self._holder = host or socket.gethostname()
        self._wake = asyncio.Event()
        self._stopping = False

    async def declare(self, manifest: Manifest) -> None:
        """Make the schedules those of a manifest. One that is not named any more is gone; but while a file is broken,
        or an expression cannot be read, what was known before goes on. Where the store cannot take them now, they are
        what they were, until it can."""
        self._undeclared = manifest
        try:
            await self._declare()
        except StoreBusy as error:
            emit("store.busy", error=str(error))
        self._wake.set()

    async def _declare(self) -> None:
        async with self._declaring:
            manifest, self._undeclared = self._undeclared, None
            if manifest is not None:
                try:
                    await self._set(manifest)
                except StoreBusy:
                    self._undeclared = self._undeclared or manifest
                    raise

    async def _set(self, manifest: Manifest) -> None:
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
                    await self._declare()
                    next_at = await self.tick()
                except StoreBusy as error:
                    emit("store.busy", error=str(error))
                ahead = LOOK if next_at is None else max(0, min(LOOK, self._pace.real(next_at - self._date())))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ahead / clock.SECOND if self._flows or self._undeclared else None):
                        await self._wake.wait()
        finally:
            with contextlib.suppress(TakoError):
                await self._store.do(DropLease(name="cron", holder=self._holder))

    async def tick(self) -> int | None:
        """Fire what is due now, if this one leads; when the next one is, in its calendar. None where that is for
        another to know."""
        ours = await self._ours()
        firings = [
            firing for firing in cron.due(ours, self._date(), self._pace.durable(cron.LATE))
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
        """The schedules that this one can fire, as they stand in its calendar. Another release's are for that to
        fire."""
        ours = [one for one in await self._store.do(ListSchedules()) if one.workflow in self._flows]
        self._stored = {one.workflow: one for one in ours}
        # One that begins anew, because it is new or was edited, does so in this calendar too.
        ahead = {one.workflow: self._ahead.get(one.workflow) for one in ours if one.next_at is not None}
        return [replace(one, **at._asdict()) if (at := ahead.get(one.workflow)) else one for one in ours]

    def _date(self) -> int:
        """What time it is in the calendar by which schedules fire."""
        return self._began + self._pace.durable(self._clock.now() - self._began)

    async def _leads(self) -> bool:
        now = self._clock.now()
        return await self._store.do(TakeLease(name="cron", holder=self._holder, until=now + LEASE, now=now))

    async def _fire(self, firing: cron.Firing) -> None:
        now = self._clock.now()
        run = _run(self._flows[firing.workflow], firing.at, now) if firing.at is not None else None
        kept = firing if self._pace.scale == 1 else self._in_machines_calendar(firing, now)
        landed = await self._store.do(
            FireSchedule(
                workflow=kept.workflow, seen_next_at=kept.was, next_at=kept.next_at, fired_at=kept.at, run=run, now=now
            )
        )
        if landed and kept is not firing:
            self._moved_on(firing, kept)
        if landed and run is not None and firing.at is not None:
            emit(
                "cron.fired", workflow=firing.workflow, run=run.id, group=run.group, scheduled_at=clock.iso(firing.at),
                late_ms=self._pace.real(self._date() - firing.at) / 1_000, **self._told(now),
            )  # fmt: skip
        elif landed and firing.note != "new":
            emit("cron.passed_over", workflow=firing.workflow, note=firing.note, error=firing.error)

    # --- a calendar that runs ahead ---

    def _in_machines_calendar(self, firing: cron.Firing, now: int) -> cron.Firing:
        """What is stored of a firing: from where the schedule was seen to the next time that the machine's clock will
        come to."""
        seen = self._stored[firing.workflow]
        readable = firing.next_at is not None
        next_at = cron.Schedule.parse(seen.expression, seen.timezone).next(now) if readable else None
        return replace(firing, was=seen.next_at, next_at=next_at, at=None if firing.at is None else now)

    def _moved_on(self, firing: cron.Firing, kept: cron.Firing) -> None:
        name = firing.workflow
        before = self._ahead.get(name) or self._stored[name]
        self._ahead[name] = _Ahead(firing.next_at, before.last_at if firing.at is None else firing.at)
        self._stored[name] = replace(self._stored[name], next_at=kept.next_at)

    def _told(self, now: int) -> dict[str, Any]:
        """The facts of a firing that is not for a time of the machine's clock."""
        if self._pace.scale == 1:
            return {}
        return {"time_scale": self._pace.scale, "stands_for": f"{clock.spell(self._date() - now)} ahead"}


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
