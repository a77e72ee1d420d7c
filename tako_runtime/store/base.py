"""The contract that every store keeps: the operations, as values, and what each one promises.

An operation is handed over with `await store.do(op)` or `store.do_sync(op)` (`commit.py`). All that is queued is given
to `Store.execute`, which runs it in one transaction: when a caller gets its answer, what it wrote has been synced.
Every operation is atomic, and may be given twice without harm where its docstring says so.

Time is an argument (`now`, microseconds): no store reads a clock. A write by a worker names `(seq, claim)`; it lands
only while that claim holds, and says whether it did.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import msgspec

from tako_runtime.run import (
    AttemptRecord,
    Claimed,
    NewRun,
    Run,
    ScheduleRecord,
    Status,
    StepRecord,
    WorkerRecord,
)
from tako_runtime.state import Change

R = TypeVar("R")

#: What a listener of the bell may want to know of a batch: "due:<group>", "later", "signal", "cancel", "ended".
Topics = set[str]

#: The lease that pauses an app (`TakeLease`): while somebody holds it, nothing is claimed and nothing counts as due. It
#: ends when it is dropped, or with whoever renews it.
PAUSE = "pause"


class Operation(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """One thing to do; `R` is its answer.

    `writes` is False where it changes nothing and so needs no lock. `acknowledged` is False where nobody is told that
    it has happened, so that its commit need not be synced: a claim that a power cut undoes leaves a run that is claimed
    again, and whatever that run writes first, synced, carries the claim to the disk with it.
    """

    writes: ClassVar[bool] = True
    acknowledged: ClassVar[bool] = True


# --- a run's life, in order ------------------------------------------------------------------------------------------


class Enqueue(Operation[list[str]], frozen=True):
    """Insert runs, all or none. Answers their ids, in order; where a live run of the workflow holds the unique key, its
    id, and nothing is inserted for that one."""

    runs: Sequence[NewRun]
    now: int


class ClaimRuns(Operation[list[Claimed]], frozen=True):
    """Claim up to `limit` due runs of `group` whose workflow is one of `workflows`: highest priority first, then the
    oldest due, then in order of insertion. Each claim has a new number. Starts an attempt where none is open. A worker
    that is not on the list (`AddWorker`), or was given up, gets none; while the app is paused (`PAUSE`) nobody does."""

    acknowledged = False
    worker: str
    group: str
    workflows: Sequence[str]
    limit: int
    now: int


class SaveStep(Operation[StepRecord | None], frozen=True):
    """Write a step, unless the run has it already: the first write wins, and a failed step marked `rerun` counts as
    not written. Answers the record that is stored, or None where the claim is lost."""

    seq: int
    claim: int
    step: StepRecord


class OpenWait(Operation[StepRecord | None], frozen=True):
    """Begin to wait: take the oldest kept signal of that name, or else be found by the next one. Answers the stored
    record (`done` with the payload, or `waiting`), the one of the first call whenever it is called again; None where
    the claim is lost."""

    seq: int
    claim: int
    step: StepRecord
    signal: str
    now: int


class ExpireWait(Operation[StepRecord | None], frozen=True):
    """Let a wait time out. Answers the stored record: `timed_out`, or `done` where a signal was first; None where the
    claim is lost."""

    seq: int
    claim: int
    name: str
    now: int


class Apply(Operation[bool], frozen=True):
    """Write a change of a run, whole. False, and nothing written, where it may not land (`Change`)."""

    change: Change


class SendSignal(Operation[int], frozen=True):
    """Give `payload` to one open wait on `name` of every run that has one and is not past its deadline; parked ones
    become due. Where there is none, keep it until `expires_at`, if that is said. Answers how many runs took it."""

    name: str
    payload: str
    now: int
    expires_at: int | None


class DropKept(Operation[bool], frozen=True):
    """Keep the signal of that name no longer that was sent at that instant; False where it was taken meanwhile."""

    name: str
    sent_at: int


# --- workers ---------------------------------------------------------------------------------------------------------


class AddWorker(Operation[None], frozen=True):
    acknowledged = False
    worker: WorkerRecord


class RenewLease(Operation[bool], frozen=True):
    """False where the worker is not there any more, or has been given up for dead: it must not write."""

    acknowledged = False
    worker: str
    until: int


class GiveUpWorker(Operation[bool], frozen=True):
    """Give a worker up for dead, if its lease is still the one that was seen: from then on it can neither renew it nor
    claim, and its runs may be given back. False where it has renewed its lease meanwhile."""

    worker: str
    seen: int


class RemoveWorker(Operation[bool], frozen=True):
    """Take the worker off the list; False, and nothing done, where it has runs in hand that must be given back first.
    May be given twice."""

    worker: str


class ListWorkers(Operation[list[WorkerRecord]], frozen=True):
    writes = False


class RunsOf(Operation[list[Run]], frozen=True):
    """The runs that a worker has in hand."""

    writes = False
    worker: str


class ReportHealth(Operation[None], frozen=True):
    """Say that the workers of a group on a host cannot work, and why; without a `reason`, that they can. The first
    report's time stays while the group stays unhealthy."""

    group: str
    host: str
    now: int
    reason: str | None
    details: str = ""


class ListHealth(Operation[list["Unhealthy"]], frozen=True):
    """The groups whose workers cannot work, by group and host; one that is not here is healthy."""

    writes = False


class Unhealthy(msgspec.Struct, frozen=True):
    """`reason` is one sentence, `details` the last lines that its worker said."""

    group: str
    host: str
    since: int
    reason: str
    details: str


# --- the rest of the night: leader, schedules, old runs ------------------------------------------------------------


class TakeLease(Operation[bool], frozen=True):
    """Take a named lease, or keep one's own, until `until`; False while somebody else holds it at `now`. A clock that
    was far ahead holds nobody up: a lease that ends later than two of this length from now has lapsed."""

    acknowledged = False
    name: str
    holder: str
    until: int
    now: int


class DropLease(Operation[None], frozen=True):
    """Let go of a lease, if it is one's own. Who claims looks anew, as it may have been the pause."""

    name: str
    holder: str


class Paused(Operation[str | None], frozen=True):
    """Who has paused the app, as the lease's holder says it; None where nobody has."""

    writes = False
    now: int


class SetSchedules(Operation[None], frozen=True):
    """Make the schedules those of a manifest, whole: new and edited ones begin with their own `next_at`, unchanged ones
    keep the stored one, and those that are not named any more are gone."""

    schedules: Sequence[ScheduleRecord]


class ListSchedules(Operation[list[ScheduleRecord]], frozen=True):
    """All schedules, by workflow. `alive` says whether the run of the last firing has not ended."""

    writes = False


class FireSchedule(Operation[bool], frozen=True):
    """Advance a schedule and insert its run (none where `run` is None), both or neither. False, and nothing done, where
    `next_at` is not what was seen: another leader was first, or the schedule was edited."""

    workflow: str
    seen_next_at: int | None
    next_at: int | None
    fired_at: int | None
    run: NewRun | None
    now: int


class EndedGroups(Operation[list[str]], frozen=True):
    """The groups that have ended runs."""

    writes = False


class Prune(Operation["Pruned"], frozen=True):
    """Look at the next `limit` ended runs of a group after `after`, in the order of their ends, and delete those among
    them that ended before `before` and are of the workflow and the statuses asked for (None: any), with their steps and
    attempts. Fewer where they hold much: whatever is asked for, nobody waits long. Call it again with the answer's
    `after` until that is None."""

    group: str
    before: int
    limit: int
    workflow: str | None = None
    statuses: Sequence[Status] | None = None
    after: tuple[int, int] = (0, 0)


class Pruned(msgspec.Struct, frozen=True):
    """How many runs were deleted, and where to go on; None once nothing is left to look at."""

    count: int
    after: tuple[int, int] | None


class ExpireSignals(Operation[int], frozen=True):
    """Delete up to `limit` kept signals that have expired; how many."""

    now: int
    limit: int


class GiveBackSpace(Operation[bool], frozen=True):
    """Give some of the space that deleted runs have left back to the file system; whether there is more."""

    acknowledged = False


# --- what is there ---------------------------------------------------------------------------------------------------


class Demand(Operation["Due"], frozen=True):
    """What may be claimed at `now`, by group, and when to ask again: when the next run becomes due, or a pause ends.
    Also makes claimable what has become due."""

    acknowledged = False
    now: int


class Due(msgspec.Struct, frozen=True):
    groups: frozenset[str]
    next_at: int | None


class Undeclared(Operation[dict[str, str]], frozen=True):
    """The groups that have due runs, none of them of a workflow that `declared` has for the group; and the workflow of
    the first of those runs. Runs that `Demand` has not made claimable yet are not looked at."""

    writes = False
    declared: Mapping[str, Sequence[str]]


class DataVersion(Operation[int], frozen=True):
    """A number that changes whenever another process has written: the cheap look that backs up the bell."""

    writes = False


class GetRun(Operation[Run | None], frozen=True):
    writes = False
    seq: int


class AwaitEnd(Operation[None], frozen=True):
    """Have the bells of all machines ring "ended" when this run ends; where the store is not shared, each end rings
    anyway. Ask after it how the run stands, as it may have ended before."""

    acknowledged = False
    seq: int


class FindRuns(Operation[list[Run]], frozen=True):
    """The runs whose id begins with `prefix`, or, where none does, ends with it: at most `limit`. Those of one
    millisecond differ in their ends only."""

    writes = False
    prefix: str
    limit: int = 5


class NextDue(Operation[Run | None], frozen=True):
    """The pending run that becomes due first of those that are not due yet; with a `reason`, of those that are pending
    for it."""

    writes = False
    reason: str | None = None


class ListRuns(Operation[list[Run]], frozen=True):
    """Newest first. `since_id` cuts by creation (`run.first_id_at`)."""

    writes = False
    statuses: Sequence[Status] = ()
    workflow: str | None = None
    since_id: str | None = None
    limit: int = 50


class Live(NamedTuple):
    """A run that has not ended, and the names of what it has finished, steps and waits, in the order of their calls."""

    id: str
    workflow: str
    status: str
    finished: Sequence[str]


class LiveRuns(Operation[list[Live]], frozen=True):
    """All of them page by page, pending ones first, the oldest first: those after `after`. One that changes its status
    between two pages may come twice, or not at all."""

    writes = False
    after: Live | None = None
    limit: int = 10_000


class Steps(Operation[list[StepRecord]], frozen=True):
    """A run's steps in the order of their calls."""

    writes = False
    seq: int


class Attempts(Operation[list[AttemptRecord]], frozen=True):
    writes = False
    seq: int


class OpenWaits(Operation[list["Wait"]], frozen=True):
    """Open waits of one run, or of all: by signal name."""

    writes = False
    seq: int | None = None
    limit: int = 1000


class Wait(msgspec.Struct, frozen=True):
    signal: str
    run_id: str
    step: str
    since: int
    deadline: int | None
    workflow: str


class KeptSignals(Operation[list["KeptSignal"]], frozen=True):
    """Signals, of this `name` or of any, that nobody has waited for yet and that have not expired, oldest first."""

    writes = False
    now: int
    name: str | None = None
    limit: int = 1000


class KeptSignal(msgspec.Struct, frozen=True):
    name: str
    payload: bytes
    sent_at: int
    expires_at: int


class CountRuns(Operation[dict[tuple[str, str], int]], frozen=True):
    """How many live runs there are, by status and reason."""

    writes = False


class CountEnded(Operation[int], frozen=True):
    """How many runs ended from `since` on and before `before`, of a workflow and of these statuses (None: any)."""

    writes = False
    before: int
    since: int = 0
    workflow: str | None = None
    statuses: Sequence[Status] | None = None


class CountKept(Operation[int], frozen=True):
    """How many signals are kept that have not expired."""

    writes = False
    now: int


class Queues(Operation[list["Queue"]], frozen=True):
    """The runs that are due at `now` and that nobody has claimed yet, by group; a group without any is not here."""

    writes = False
    now: int


class Queue(msgspec.Struct, frozen=True):
    group: str
    depth: int
    oldest_due_at: int


class RunsAhead(Operation[int], frozen=True):
    """How many of the runs that are due at `now` stand before this one in its group's queue, in the order in which
    they are claimed."""

    writes = False
    run: Run
    now: int


class InHand(Operation[dict[str, int]], frozen=True):
    """How many runs each worker has in hand; one without any is not here."""

    writes = False


class Store(ABC):
    """What a dialect brings. It is used by one thread at a time.

    `shared` says whether processes of other machines use it too. Then a worker is known by its lease alone: one that
    cannot renew it has to stop by its end.
    """

    shared: ClassVar[bool] = False

    #: Whether the last batch may have been committed, where `execute` has raised what is no `TakoError`.
    in_doubt = False

    @abstractmethod
    def turn(self) -> AbstractContextManager[None]:
        """To be within while a batch that writes is executed: where writers of several processes take turns."""

    @abstractmethod
    def turn_at_once(self, writes: bool) -> AbstractContextManager[bool]:
        """The same for who cannot wait: whether it is his turn, where he has to have it. Within, a batch waits for
        nothing but the disk; where it would have to, it is `StoreBusy`. It is never anybody's for a shared store."""

    @abstractmethod
    def execute(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        """Run `batch` in one transaction and sync it. Raises, with nothing written, if any operation does: the caller
        then gives them one by one. Transient trouble (locked for long, disk full) is `StoreBusy`; where a store is lost
        while it commits, it finds out whether it has, and commits once."""

    @abstractmethod
    def close(self) -> None: ...
