"""What an operator may ask of schedules: which there are, how they stand, when they fire. Values in, values out.

Every time is there twice: in UTC, and as the schedule's own zone shows it.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import structs

from tako_runtime import clock, cron
from tako_runtime.errors import InvalidValue, NotFound
from tako_runtime.manifest import Declared
from tako_runtime.run import Run, ScheduleRecord
from tako_runtime.store.base import FindRuns
from tako_runtime.store.commit import StoreThread
from tako_runtime.ticker import record

Json = dict[str, Any]


def merged(declared: Iterable[Declared], stored: Iterable[ScheduleRecord]) -> list[ScheduleRecord]:
    """The schedules of a manifest as the next supervisor will have them: those that are stored and unchanged keep their
    place."""
    before = {one.workflow: one for one in stored}
    found = []
    for new in (record(flow) for flow in declared if flow.schedule is not None):
        old = before.get(new.workflow, new)
        same = (old.expression, old.timezone) == (new.expression, new.timezone)
        next_at = old.next_at if same else None
        found.append(structs.replace(new, next_at=next_at, last_at=old.last_at, last_run=old.last_run, alive=old.alive))
    return found


def choose(records: Iterable[ScheduleRecord], name: str) -> ScheduleRecord:
    """The schedule of the workflow of that name; `NotFound` with the nearest names."""
    by_name = {one.workflow: one for one in records}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
        known = ", ".join(sorted(by_name)) or "none"
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There is: {known}."
        raise NotFound(f"no schedule {name!r}", hint=hint)
    return by_name[name]


def last_runs(store: StoreThread, records: Iterable[ScheduleRecord]) -> dict[str, Run]:
    """The runs of the last firings, by id; one that was pruned is not there."""
    ids = [one.last_run for one in records if one.last_run is not None]
    found = [store.do_sync(FindRuns(prefix=run_id, limit=1)) for run_id in ids]
    return {run.id: run for runs in found for run in runs}


def standing(one: ScheduleRecord, runs: Mapping[str, Run], now: int) -> Json:
    """A schedule and how it stands. `overdue` is the time that should have fired and has not. `error` says why the
    schedule cannot be read, if so; then there are no times."""
    error, ahead, overdue, last = None, None, None, None
    try:
        [ahead] = upcoming(one, now, 1)
        overdue = _time(one, one.next_at) if one.next_at is not None and one.next_at <= now - cron.LATE else None
        last = _time(one, one.last_at) if one.last_at is not None else None
    except InvalidValue as unreadable:
        error = str(unreadable)
    run = runs.get(one.last_run or "")
    return {
        "workflow": one.workflow,
        "expression": one.expression,
        "timezone": one.timezone,
        "group": one.group,
        "catchup": one.catchup,
        "overlap": one.overlap,
        "next": ahead,
        "overdue": overdue,
        "last": last,
        "last_run": None if one.last_run is None else {
            "id": one.last_run, "status": run.status if run else None, "reason": run.reason if run else None,
        },
        "error": error,
    }  # fmt: skip


def upcoming(one: ScheduleRecord, now: int, count: int) -> list[Json]:
    """The next times, and what is worth saying of one on the day of a clock change: first the one that is stored, if it
    lies ahead and `cron.due` will go by it. `InvalidValue` where the schedule cannot be read."""
    schedule = cron.Schedule.parse(one.expression, one.timezone)
    stands = one.next_at is not None and one.next_at > now and (one.last_at or 0) - now <= cron.CORRECTION
    times = [one.next_at if one.next_at is not None and stands else schedule.next(now)]
    while len(times) < count:
        times.append(schedule.next(times[-1]))
    return [{**_time(one, at), "note": cron.odd(schedule, at)} for at in times[:count]]


def _time(one: ScheduleRecord, at: int) -> Json:
    zone = cron.Schedule.parse(one.expression, one.timezone).local.zone
    return {"at": clock.iso(at), "local": clock.moment(at).astimezone(zone).isoformat()}
