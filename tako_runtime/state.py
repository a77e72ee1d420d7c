"""What a run's life consists of, and the one function that moves it on. Pure: no store, no clock, no chance.

    attempt -> Outcome -> settle(run, outcome, now) -> Change -> Store.apply

An `Outcome` says what an attempt did. A `Change` says all that has to be written for it, and who must still own the row
for it to land. The table of `settle`:

    outcome        becomes                                          uses up the attempt
    Returned       succeeded                                        yes
    Raised         pending/retrying after the backoff, or dead      yes
    Bailed         cancelled                                        yes
    Failed         dead                                             yes
    Cancelled      cancelled                                        yes
    Sleeps         pending/sleeping                                 no
    Waits          pending/waiting                                  no
    Interrupted    pending/queued, due now                          no
    WorkerLost     pending/retrying, at once the first time, or dead  yes

Whatever would go on, and was asked to cancel, is cancelled instead.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tako_runtime import clock
from tako_runtime.clock import REAL_TIME, Duration, Pace
from tako_runtime.errors import InvalidValue, Refused
from tako_runtime.failure import Failure
from tako_runtime.run import AttemptRecord, Reason, Run, Status, StepKey, StepRecord


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before the next try: `base`, doubled each time, never more than `max`, jitter included.

    Both are durations (a timedelta, seconds, or text such as "10s").

    >>> Backoff(base="1s", max="4s").delay(1, "any") <= 1_200_000
    True
    """

    base: Duration = "1s"
    max: Duration = "1h"

    def __post_init__(self) -> None:
        if self.base_micros > self.max_micros:
            raise InvalidValue(f"backoff: base {self.base!r} is longer than max {self.max!r}")

    @property
    def base_micros(self) -> int:
        """`base` in microseconds."""
        return clock.duration(self.base, "backoff base")

    @property
    def max_micros(self) -> int:
        """`max` in microseconds."""
        return clock.duration(self.max, "backoff max")

    def delay(self, n: int, seed: str) -> int:
        """Microseconds before try `n + 1`, after `n` tries failed. `seed` (the run's id) draws the jitter of ±20 %, so
        that runs that failed together do not come back together, and the same run waits the same time when asked twice.
        """
        return _delay(self.base_micros, self.max_micros, n, seed)


def _delay(base: int, longest: int, n: int, seed: str) -> int:
    jitter = 0.8 + 0.4 * zlib.crc32(f"{seed}/{n}".encode()) / 0xFFFF_FFFF
    return min(longest, round(min(base << min(n - 1, 62), longest) * jitter))


# --- what an attempt did ---------------------------------------------------------------------------------------------


class Returned(msgspec.Struct, frozen=True):
    result: str


class Raised(msgspec.Struct, frozen=True):
    """`final` says that no retry can mend it; `rerun` names the failed steps that the next attempt runs again."""

    failure: Failure
    final: bool = False
    rerun: tuple[StepKey, ...] = ()


class Bailed(msgspec.Struct, frozen=True):
    reason: str


class Failed(msgspec.Struct, frozen=True):
    failure: Failure


class Cancelled(msgspec.Struct, frozen=True):
    reason: str


class Sleeps(msgspec.Struct, frozen=True):
    until: int


class Waits(msgspec.Struct, frozen=True):
    """`names` are the wait steps it parks on; `until` is the first instant at which one times out, or None."""

    names: tuple[str, ...]
    until: int | None


class Interrupted(msgspec.Struct, frozen=True):
    """A drain, a deploy or a reload stopped it at a step boundary."""


class WorkerLost(msgspec.Struct, frozen=True):
    """`where` is what the worker was in: "in step charge", "before its first step"."""

    where: str = ""


Outcome = Returned | Raised | Bailed | Failed | Cancelled | Sleeps | Waits | Interrupted | WorkerLost


# --- what has to be written ------------------------------------------------------------------------------------------


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """All that one move writes. It lands only if the row still has `seen_status` and `claim`, and, where it lets the
    run go on, only if no cancellation was asked for meanwhile."""

    seq: int
    claim: int
    seen_status: str
    now: int
    status: Status
    reason: str
    group: str
    worker: str | None
    due_at: int | None
    attempt_started_at: int | None
    finished_at: int | None
    losses: int
    max_attempts: int
    cancelling: str | None
    result: str | None
    error: str | None
    used: AttemptRecord | None = None
    rerun: tuple[StepKey, ...] = ()
    open_waits: tuple[str, ...] = ()  # parks on these; where one is open no more, a signal came in between: due now
    drop_from: int | None = None  # an operator's retry: forget the steps from this position on
    fresh_steps: bool = False  # an operator's retry: every failed step runs again
    ends_sleeps: int | None = None  # an operator's wake: the sleeps that would have ended by then are over
    waited: bool = True  # False where it is known that nothing waits for a signal to this run, nor did

    @property
    def goes_on(self) -> bool:
        return self.status is Status.PENDING


def settle(run: Run, outcome: Outcome, now: int, pace: Pace = REAL_TIME, *, waited: bool = True) -> Change:
    """What `outcome` makes of `run` at the instant `now`; the pause before a retry passes at `pace`. `waited` is False
    where no step of it has ever waited for a signal."""
    match outcome:
        case Returned():  # the commonest by far, and a positional pattern takes ten times as long
            return _ended(
                run, now, Status.SUCCEEDED, "returned", outcome="succeeded", result=outcome.result, waited=waited
            )
        case Bailed(reason):
            return _ended(run, now, Status.CANCELLED, reason, outcome="cancelled")
        case Cancelled(reason):
            return _ended(run, now, Status.CANCELLED, reason, outcome="cancelled")
        case Failed(failure):
            return _ended(run, now, Status.DEAD, failure.line, outcome="failed", error=failure.text())
    if run.cancelling is not None:
        return settle(run, Cancelled(run.cancelling), now)
    match outcome:
        case Sleeps(until):
            return _parked(run, now, Reason.SLEEPING, until)
        case Waits(names, deadline):
            return _parked(run, now, Reason.WAITING, deadline, open_waits=names)
        case Interrupted():
            return _parked(run, now, Reason.QUEUED, now)
        case Raised(failure, final, rerun):
            error = failure.text()
            if final or run.attempt >= run.max_attempts:
                tries = "no retry can mend it" if final else f"attempt {run.attempt} of {run.max_attempts}"
                reason = f"{failure.line} ({tries})"
                return _ended(run, now, Status.DEAD, reason, outcome="failed", error=error, rerun=rerun)
            tries_so_far = run.attempt - (run.max_attempts - run.retries - 1)
            pause = _delay(run.backoff_base, run.backoff_max, max(tries_so_far, 1), run.id)
            return _again(run, now, now + pace.real(pause), outcome="failed", error=error, rerun=rerun)
        case WorkerLost(where):
            message = f"worker died during attempt {run.attempt}{' ' + where if where else ''}"
            error = Failure(type="WorkerDied", message=message).text()
            losses = run.losses + 1
            if run.attempt >= run.max_attempts:
                return _ended(run, now, Status.DEAD, message, outcome="lost", error=error, losses=losses)
            # A crash costs the user nothing but the restart; a run that kills its workers must not starve the others.
            pause = 0 if losses == 1 else _delay(run.backoff_base, run.backoff_max, losses - 1, run.id)
            return _again(run, now, now + pace.real(pause), outcome="lost", error=error, losses=losses)
    raise AssertionError(f"unknown outcome {outcome!r}")


def cancel(run: Run, reason: str, now: int) -> Change:
    """A pending run ends now; a running one is asked to stop at its next step. Raises `Refused` for an ended one."""
    if run.status == Status.PENDING:
        return _ended(run, now, Status.CANCELLED, reason, outcome="cancelled")
    if run.status == Status.RUNNING:
        return _change(run, now, status=Status.RUNNING, reason=run.reason, cancelling=reason)
    raise Refused(f"run {run.id} has already ended: {run.status}")


def retry(run: Run, now: int, drop_from: int | None = None) -> Change:
    """A dead or cancelled run goes on after its finished steps, with a fresh budget of attempts; one that waits for its
    retry is taken up now. With `drop_from`, the steps from that position on are forgotten, and a succeeded run may be
    run again from there. Raises `Refused` otherwise."""
    hint = ""
    if run.status == Status.SUCCEEDED and drop_from is None:
        hint = "To run part of it again, name the step to begin with: --from STEP."
    elif run.status == Status.RUNNING:
        hint = "Wait for it to end, or cancel it first."
    elif run.status == Status.PENDING and run.reason in (Reason.WAITING, Reason.SLEEPING):
        hint = "Nothing failed: it is parked. A signal or its due time will wake it."
    elif run.status == Status.PENDING and run.reason == Reason.QUEUED:
        hint = "It is queued already."
    if hint:
        where = f"{run.status} ({run.reason})" if run.status == Status.PENDING else run.status
        raise Refused(f"run {run.id} is {where}: it cannot be retried", hint=hint)
    budget = run.max_attempts if run.status == Status.PENDING else run.attempt + 1 + run.retries
    return _change(
        run,
        now,
        status=Status.PENDING,
        reason=Reason.QUEUED,
        due_at=now,
        attempt_started_at=None,
        finished_at=None,
        losses=0,
        max_attempts=budget,
        cancelling=None,
        result=None,
        drop_from=drop_from,
        fresh_steps=True,
    )


def wake(run: Run, now: int) -> Change:
    """A sleeping run goes on now, as if the sleep that ends first were over; others beside it go on. Raises `Refused`
    for a run that does not sleep."""
    if run.status != Status.PENDING or run.reason != Reason.SLEEPING or run.due_at is None:
        where = f"{run.status} ({run.reason})" if run.status == Status.PENDING else run.status
        hint = "A signal wakes it, or its deadline." if run.reason == Reason.WAITING else ""
        raise Refused(f"run {run.id} is {where}: it does not sleep", hint=hint)
    return _parked(run, now, Reason.QUEUED, now, ends_sleeps=run.due_at)


def steps_from(steps: Sequence[StepRecord], name: str) -> int | None:
    """The position from which `--from name` forgets: the first step of that name, of whatever kind, or None."""
    return min((s.position for s in steps if s.name == name), default=None)


def _ended(
    run: Run,
    now: int,
    status: Status,
    reason: str,
    *,
    outcome: str,
    result: str | None = None,
    error: str | None = None,
    losses: int | None = None,
    rerun: tuple[StepKey, ...] = (),
    waited: bool = True,
) -> Change:
    return Change(
        seq=run.seq,
        claim=run.claim,
        seen_status=run.status,
        now=now,
        status=status,
        reason=reason,
        group=run.group,
        worker=None,
        due_at=run.due_at,
        attempt_started_at=None,
        finished_at=now,
        losses=run.losses if losses is None else losses,
        max_attempts=run.max_attempts,
        cancelling=None,
        result=result,
        error=run.error if result is None and error is None else error,  # cancelled: why its last attempt failed
        used=_used(run, now, outcome, error),
        rerun=rerun,
        waited=waited,
    )


def _again(run: Run, now: int, due: int, *, outcome: str, error: str, **rest: Any) -> Change:
    return _change(
        run,
        now,
        status=Status.PENDING,
        reason=Reason.RETRYING,
        due_at=due,
        attempt_started_at=None,
        error=error,
        used=_used(run, now, outcome, error),
        **rest,
    )


def _parked(run: Run, now: int, reason: Reason, due: int | None, **rest: Any) -> Change:
    return _change(run, now, status=Status.PENDING, reason=reason, due_at=due, **rest)


def _used(run: Run, now: int, outcome: str, error: str | None) -> AttemptRecord | None:
    if run.attempt_started_at is None:  # no attempt is under way: cancelled before it began, or between two
        return None
    return AttemptRecord(run.attempt, run.worker, run.attempt_started_at, now, outcome, error)


def _change(run: Run, now: int, **fields: Any) -> Change:
    """The run as it stands, with `fields` changed."""
    kept: dict[str, Any] = {
        "due_at": run.due_at,
        "attempt_started_at": run.attempt_started_at,
        "finished_at": run.finished_at,
        "losses": run.losses,
        "max_attempts": run.max_attempts,
        "cancelling": run.cancelling,
        "result": None,
        "error": run.error,
    }
    return Change(
        seq=run.seq,
        claim=run.claim,
        seen_status=run.status,
        now=now,
        group=run.group,
        worker=run.worker if fields["status"] is Status.RUNNING else None,
        **{**kept, **fields},
    )
