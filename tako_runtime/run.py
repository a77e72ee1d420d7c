"""The words: what a run is made of, as it is stored. Instants and durations are microseconds (`clock.py`)."""

import os
import threading
from enum import StrEnum

import msgspec


class Status(StrEnum):
    """Where a run stands. The last three are ends."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    DEAD = "dead"

    @property
    def ended(self) -> bool:
        return self not in (Status.PENDING, Status.RUNNING)


class Reason(StrEnum):
    """Why a pending run is pending."""

    QUEUED = "queued"
    RETRYING = "retrying"
    SLEEPING = "sleeping"
    WAITING = "waiting"


class StepKey(msgspec.Struct, frozen=True):
    """What names a step within its run. The kind is part of it, so a run, a sleep and a wait never collide."""

    kind: str  # "run", "sleep" or "wait"
    name: str  # "send", or "send#2" for its second use

    def __str__(self) -> str:
        return f"step {self.name!r}"

    @property
    def label(self) -> str:
        return self.name if self.kind == "run" else f"{self.kind} {self.name}"


class StepRecord(msgspec.Struct, frozen=True):
    """One step as it is stored.

    `status` is `done`, `failed`, `sleeping`, `waiting` or `timed_out`. `position` is the order of the calls in the
    handler. `due_at` is when a sleep ends or a wait times out. A failed step with `rerun` is run again by the next
    attempt; without it the handler has gone on past the failure, and every replay fails the same way.
    """

    kind: str
    name: str
    position: int
    status: str
    attempt: int
    started_at: int
    finished_at: int | None = None
    due_at: int | None = None
    result: bytes | None = None
    error: str | None = None
    rerun: bool = False

    @property
    def key(self) -> StepKey:
        return StepKey(self.kind, self.name)


class AttemptRecord(msgspec.Struct, frozen=True):
    """One attempt that was used up: its `outcome` is what ended it, `error` the stored failure, if any."""

    n: int
    worker: str | None
    started_at: int
    finished_at: int
    outcome: str
    error: str | None = None


class NewRun(msgspec.Struct, frozen=True):
    """A run as `enqueue` hands it to the store."""

    id: str
    workflow: str
    group: str
    payload: str
    created_at: int
    due_at: int
    retries: int
    backoff_base: int
    backoff_max: int
    priority: int = 0
    unique_key: str | None = None
    release: str = ""
    scheduled_at: int | None = None


class Run(msgspec.Struct, frozen=True):
    """One row of the table of runs, in the order of its columns (`RUN_COLUMNS`).

    `attempt` is the number of the last attempt that began; `attempt_started_at` is set while that one is not used up: a
    parked run goes on within it. `claim` counts the claims, and a write must name the current one. `losses` counts the
    workers that died with this run in hand. `scheduled_at` is the time that a schedule fired it for. `cancelling` is
    the reason of a cancellation that waits for the next step boundary.
    """

    seq: int
    id: str
    workflow: str
    group: str
    status: str
    reason: str
    priority: int
    due_at: int | None
    attempt: int
    max_attempts: int
    retries: int
    backoff_base: int
    backoff_max: int
    claim: int
    worker: str | None
    losses: int
    cancelling: str | None
    created_at: int
    started_at: int | None
    attempt_started_at: int | None
    finished_at: int | None
    scheduled_at: int | None
    unique_key: str | None
    release: str
    payload: bytes
    result: bytes | None = None
    error: str | None = None


RUN_COLUMNS = Run.__struct_fields__


class Found(Run, frozen=True):
    """A run and where an operator finds it: in the store of the environment or, `local`, in a machine's own beside."""

    local: bool = False


class Claimed(msgspec.Struct, frozen=True):
    """A run that this worker may write now, and the steps it has done so far."""

    run: Run
    steps: tuple[StepRecord, ...]


class WorkerRecord(msgspec.Struct, frozen=True):
    """A worker process as the store knows it: alive as long as `lease_until` lies ahead."""

    id: str
    group: str
    host: str
    pid: int
    release: str
    started_at: int
    lease_until: int


class ScheduleRecord(msgspec.Struct, frozen=True):
    """One schedule: what the manifest says of it, and where it stands. `next_at` is the next firing; `last_at` the
    scheduled time that fired last, by the run `last_run`; `alive` says that this run has not ended."""

    workflow: str
    group: str
    expression: str
    timezone: str
    catchup: str
    overlap: str
    next_at: int | None
    last_at: int | None = None
    last_run: str | None = None
    alive: bool = False


class _Ids:
    """UUIDv7 (RFC 9562, section 6.2, method 2): a 48-bit millisecond, then a number that only grows within it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self, now: int) -> str:
        fresh = (now // 1_000 << 74) | (int.from_bytes(os.urandom(10)) >> 7)  # 73 random bits, room to count above
        with self._lock:
            if fresh <= self._last and self._last - fresh < _CLOCK_SLACK:
                fresh = self._last + 1 + (fresh & 0xFFFF_FFFF)
            self._last = fresh
        millis, tail = fresh >> 74, fresh & ((1 << 74) - 1)
        number = millis << 80 | 0x7 << 76 | (tail >> 62) << 64 | 0b10 << 62 | (tail & ((1 << 62) - 1))
        text = f"{number:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


#: So many of the last characters of an id name a run among tens of thousands; the first ones are its millisecond, which
#: it shares with all that were enqueued together.
SHORT_ID = 8

#: Ids keep growing while the clock steps back by less than ten seconds; further back, time is believed.
_CLOCK_SLACK = 10_000 << 74

new_id = _Ids().next


def first_id_at(now: int) -> str:
    """The smallest id that a run made at `now` or later can have: how a list since then is cut from the index."""
    text = f"{now // 1_000:012x}"
    return f"{text[:8]}-{text[8:]}-7000-8000-000000000000"
