"""What runs, what waits, what cannot: one look at an app, for `tako status`. Values in, values out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock, inflight
from tako_runtime.config import Lane
from tako_runtime.feed import Supervising
from tako_runtime.health import believed
from tako_runtime.run import Reason, ScheduleRecord, Status, WorkerRecord
from tako_runtime.store import base
from tako_runtime.store.commit import StoreThread

Json = dict[str, Any]

#: How far back "lately" reaches.
LATELY = clock.DAY


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """All that a store says of an app at the instant `now`. Of the workers on its list, `up` are those that live. What
    is `local` of the workers and of the scheduled workflows is this machine's own, beside a shared store."""

    now: int
    counts: dict[tuple[str, str], int]
    dead_lately: int
    queues: list[base.Queue]
    workers: list[WorkerRecord]
    up: frozenset[str]
    in_hand: dict[str, int]
    unhealthy: list[base.Unhealthy]
    schedules: list[ScheduleRecord]
    kept: int
    paused: str | None
    local: frozenset[str] = frozenset()


def look(store: StoreThread, app_dir: Path, now: int, *, local: bool = False) -> Look:
    workers, schedules = store.do_sync(base.ListWorkers()), store.do_sync(base.ListSchedules())
    return Look(
        now=now,
        counts=store.do_sync(base.CountRuns()),
        dead_lately=store.do_sync(base.CountEnded(statuses=(Status.DEAD,), since=now - LATELY, before=now + 1)),
        queues=store.do_sync(base.Queues(now=now)),
        workers=workers,
        up=frozenset(worker.id for worker in workers if inflight.is_up(worker, app_dir, now)),
        in_hand=store.do_sync(base.InHand()),
        unhealthy=believed(store.do_sync(base.ListHealth()), app_dir),
        schedules=schedules,
        kept=store.do_sync(base.CountKept(now=now)),
        paused=store.do_sync(base.Paused(now=now)),
        local=frozenset([*(w.id for w in workers), *(s.workflow for s in schedules)] if local else ()),
    )


def together(looks: Sequence[Look]) -> Look:
    """What several stores say of one app, the environment's first."""
    first = looks[0]
    if len(looks) == 1:
        return first
    queues: dict[str, base.Queue] = {}
    for queue in [queue for one in looks for queue in one.queues]:
        other = queues.get(queue.group, base.Queue(queue.group, 0, queue.oldest_due_at))
        oldest = min(queue.oldest_due_at, other.oldest_due_at)
        queues[queue.group] = base.Queue(queue.group, queue.depth + other.depth, oldest)
    counts: Counter[tuple[str, str]] = Counter()
    for one in looks:
        counts.update(one.counts)
    sick = {(said.group, said.host, said.reason): said for one in reversed(looks) for said in one.unhealthy}
    return Look(
        now=first.now,
        counts=dict(counts),
        dead_lately=sum(one.dead_lately for one in looks),
        queues=[queues[group] for group in sorted(queues)],
        workers=[worker for one in looks for worker in one.workers],
        up=frozenset().union(*(one.up for one in looks)),
        in_hand={worker: count for one in looks for worker, count in one.in_hand.items()},
        unhealthy=[sick[key] for key in sorted(sick)],
        schedules=[schedule for one in looks for schedule in one.schedules],
        kept=sum(one.kept for one in looks),
        paused=first.paused,
        local=frozenset().union(*(one.local for one in looks)),
    )


def status(
    seen: Look,
    wanted: Mapping[str, Lane],
    supervisor: Supervising | None,
    process: Json | None = None,
    secrets: Json | None = None,
) -> Json:
    """For programs. `process` is how the app's own stands, by its supervisor, `secrets` who has old ones. `wanted` are
    the groups of the configuration, where that is known: others are those of which the store knows."""
    return {
        "process": None if supervisor is None else process,
        "secrets": None if supervisor is None else secrets,
        "supervisor": None if supervisor is None else msgspec.to_builtins(supervisor),
        "paused": seen.paused,
        "groups": [_group(name, seen, wanted.get(name)) for name in _groups(seen, wanted)],
        "workers": [_worker(worker, seen) for worker in seen.workers],
        "schedules": [_schedule(record, seen) for record in seen.schedules],
        "runs": _runs(seen),
        "dead_since": clock.iso(seen.now - LATELY),
        "signals_kept": seen.kept,
    }


def _groups(seen: Look, wanted: Mapping[str, Lane]) -> list[str]:
    of_store = {one.group for kind in (seen.queues, seen.workers, seen.unhealthy, seen.schedules) for one in kind}
    return list(dict.fromkeys([*wanted, *sorted(of_store)]))


def _group(name: str, seen: Look, lane: Lane | None) -> Json:
    queue = next((queue for queue in seen.queues if queue.group == name), None)
    up = [worker.id for worker in seen.workers if worker.group == name and worker.id in seen.up]
    return {
        "group": name,
        "workers": {"wanted": lane.workers if lane else None, "up": len(up)},
        "concurrency": lane.concurrency if lane else None,
        "running": sum(seen.in_hand.get(worker, 0) for worker in up),
        "due": queue.depth if queue else 0,
        "oldest_due_at": clock.iso(queue.oldest_due_at) if queue else None,
        "oldest_due_age": max(0, seen.now - queue.oldest_due_at) / clock.SECOND if queue else None,
        "unhealthy": [
            {"host": one.host, "since": clock.iso(one.since), "reason": one.reason, "details": one.details}
            for one in seen.unhealthy
            if one.group == name
        ],
    }


def _worker(worker: WorkerRecord, seen: Look) -> Json:
    return {
        "id": worker.id,
        "group": worker.group,
        "host": worker.host,
        "pid": worker.pid,
        "release": worker.release,
        "started_at": clock.iso(worker.started_at),
        "lease_until": clock.iso(worker.lease_until) if worker.lease_until else None,
        "up": worker.id in seen.up,
        "running": seen.in_hand.get(worker.id, 0),
        "local": worker.id in seen.local,
    }


def _schedule(record: ScheduleRecord, seen: Look) -> Json:
    return {
        "workflow": record.workflow,
        "group": record.group,
        "schedule": record.expression,
        "timezone": record.timezone,
        "next_at": None if record.next_at is None else clock.iso(record.next_at),
        "last_at": None if record.last_at is None else clock.iso(record.last_at),
        "last_run": record.last_run,
        "local": record.workflow in seen.local,
    }


def _runs(seen: Look) -> dict[str, int]:
    """How many there are, by the word that people have for where they stand."""
    counted: Counter[str] = Counter()
    for (state, reason), count in seen.counts.items():
        counted["running" if state == Status.RUNNING else reason] += count
    return {
        **{reason.value: counted[reason] for reason in Reason},
        "running": counted["running"],
        "dead": seen.dead_lately,
    }
