"""why(seen) -> the one true reason why a run stands where it stands, as a word for programs and a sentence for people.

`why` is pure: everything it goes by is in `Seen`, which `seen` gathers. Times in a sentence are ISO 8601 in UTC;
whoever shows it to a person may put the local ones in their place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from tako_runtime import clock, failure, inflight
from tako_runtime.config import Config
from tako_runtime.feed import supervising
from tako_runtime.health import believed
from tako_runtime.inflight import Place
from tako_runtime.manifest import Manifest
from tako_runtime.run import Reason, Run, Status, StepRecord, WorkerRecord
from tako_runtime.store.base import (
    InHand,
    ListHealth,
    ListWorkers,
    OpenWaits,
    Paused,
    RunsAhead,
    Steps,
    Unhealthy,
    Wait,
)
from tako_runtime.store.commit import StoreThread

#: Every cause there is, and what it means. These words are for programs: they stay.
CAUSES = {
    "succeeded": "its handler returned",
    "cancelled": "somebody, or the handler itself, ended it without an error",
    "dead": "its attempts are used up, or no retry could mend it",
    "running": "a worker has it in hand",
    "cancelling": "a worker has it in hand, and it stops at its next step",
    "lost": "its worker is gone, and it was not given back yet",
    "sleeping": "it sleeps",
    "waiting": "it waits for a signal",
    "retrying": "its last attempt failed, and it pauses before the next one",
    "delayed": "it was enqueued for later",
    "no_workflow": "it is due, and no file of this release declares its workflow in its group",
    "paused": "it is due, and nothing is claimed for now",
    "unhealthy": "it is due, and the workers of its group cannot work",
    "no_supervisor": "it is due, no worker of its group is up, and nobody here starts one",
    "starting": "it is due, and a worker of its group is being started",
    "busy": "it is due, and every worker of its group has its hands full",
    "next": "it is due, and a worker with a free hand takes it",
}


class Why(NamedTuple):
    """`signals` are those that it waits for, if that is the cause."""

    cause: str
    sentence: str
    signals: tuple[str, ...] = ()


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to know of a run at the instant `now`.

    `place` is what its worker last noted; `worker` the one that has it in hand, or None where that one is gone.
    `workers` are those of its group that are up, `in_hand` the runs that they have, `hands` the runs that they can
    have, where that is known. `ahead` stand before it in the queue. `declared` are the groups in which this release
    declares the workflow (None: nobody has looked), `mistakes` what could not be imported. `paused` is who has paused
    the app.
    """

    run: Run
    now: int
    steps: Sequence[StepRecord] = ()
    waits: Sequence[Wait] = ()
    place: Place | None = None
    worker: WorkerRecord | None = None
    workers: Sequence[WorkerRecord] = ()
    in_hand: int = 0
    hands: int | None = None
    ahead: int = 0
    unhealthy: Sequence[Unhealthy] = ()
    supervised: bool = False
    declared: Sequence[str] | None = None
    mistakes: Sequence[str] = ()
    paused: str | None = None


def why(seen: Seen) -> Why:
    """Why the run stands where it stands."""
    run = seen.run
    match run.status:
        case Status.SUCCEEDED:
            return Why("succeeded", f"It succeeded at {_at(run.finished_at)}.")
        case Status.CANCELLED:
            return Why("cancelled", f"It was {_cancelled(run.reason)}, at {_at(run.finished_at)}.")
        case Status.DEAD:
            return Why("dead", f"It is dead since {_at(run.finished_at)}: {_line(run.reason)}.")
        case Status.RUNNING:
            return _running(seen)
    if run.due_at is None or run.due_at > seen.now:
        return _parked(seen)
    return _due(seen)


# --- in a worker's hands ---------------------------------------------------------------------------------------------


def _running(seen: Seen) -> Why:
    run, worker = seen.run, seen.worker
    if worker is None:
        told = "the supervisor gives it back" if seen.supervised else "it goes on once a supervisor runs"
        return Why("lost", f"Its worker {run.worker} is gone, and {told}: {_where(seen)}.")
    held = f"{_where(seen)}, in worker {worker.id} (process {worker.pid} on {worker.host})"
    if run.cancelling is not None:
        return Why("cancelling", f"It stops at its next step ({_line(run.cancelling)}); now it is {held}.")
    return Why("running", f"It is {held}, attempt {run.attempt} of {run.max_attempts}.")


def _where(seen: Seen) -> str:
    """In which step the run is, and since when. A worker notes the steps that it begins; what is stored says which of
    them are over."""
    for step in reversed(seen.steps):
        if step.kind == "wait" and step.status == "waiting":
            return f"waiting in step {step.name} since {_at(step.started_at)}"
        if step.kind == "sleep" and step.due_at is not None and step.due_at > seen.now:
            return f"in {_named(step)} until {_at(step.due_at)}"
    place = seen.place
    if place is None or place.since is None:
        where = place.where if place is not None and place.where else "under way"
        return f"{where} since {_at(seen.run.attempt_started_at)}"
    over = max((s.finished_at for s in seen.steps if f"in step {s.name}" == place.where and s.finished_at), default=0)
    if over >= place.since:
        return f"after {place.where.removeprefix('in ')}, which ended at {_at(over)}"
    return f"{place.where} since {_at(place.since)}"


# --- parked ----------------------------------------------------------------------------------------------------------


def _parked(seen: Seen) -> Why:
    run = seen.run
    match run.reason:
        case Reason.SLEEPING:
            return Why("sleeping", f"It sleeps until {_at(run.due_at)}.")
        case Reason.WAITING:
            waits = [f"{wait.signal} {_until(wait)}" for wait in seen.waits]
            names = tuple(dict.fromkeys(wait.signal for wait in seen.waits))
            if len(waits) == 1:
                return Why("waiting", f"It waits for signal {waits[0]}.", names)
            return Why("waiting", f"It waits for the first of {len(waits)} signals: {'; '.join(waits)}.", names)
        case Reason.RETRYING:
            return Why("retrying", f"It is retried at {_at(run.due_at)}, because {_failed(run)}.")
    return Why("delayed", f"It was enqueued for later: it is due at {_at(run.due_at)}.")


def _until(wait: Wait) -> str:
    return "without a deadline" if wait.deadline is None else f"until {_at(wait.deadline)}"


def _failed(run: Run) -> str:
    error = "" if run.error is None else failure.read(run.error).line
    return f"attempt {run.attempt} of {run.max_attempts} failed: {error or 'its error is not there any more'}"


# --- due, and in nobody's hands --------------------------------------------------------------------------------------


def _due(seen: Seen) -> Why:
    run = seen.run
    since = f"It is due since {_at(run.due_at)}"
    if seen.declared is not None and run.group not in seen.declared:
        return Why("no_workflow", f"{since}, but {_undeclared(seen)}.")
    behind = _behind(seen.ahead, run.group)
    if seen.paused is not None:
        return Why("paused", f"{since}, {behind}; nothing is claimed, as {seen.paused} has paused the app.")
    sick = {one.host for one in seen.unhealthy}
    if sick and all(worker.host in sick for worker in seen.workers):
        reasons = "; ".join(f"{_line(one.reason)} (since {_at(one.since)})" for one in seen.unhealthy)
        return Why("unhealthy", f"{since}, {behind}, whose workers are unhealthy: {reasons}.")
    if not seen.workers:
        if not seen.supervised:
            return Why("no_supervisor", f"{since}, {behind}; no worker is up and none comes: no supervisor runs here.")
        return Why("starting", f"{since}, {behind}; no worker is up yet, and the supervisor starts one.")
    free = seen.hands - seen.in_hand if seen.hands is not None else int(not seen.ahead)
    return Why("next" if free > seen.ahead else "busy", f"{since}, {behind}, {_hands(seen)}.")


def _hands(seen: Seen) -> str:
    count = len(seen.workers)
    has, they = ("worker has", "it") if count == 1 else ("workers have", "they")
    of = "" if seen.hands is None else f", of the {seen.hands} that {they} can have"
    return f"whose {count} {has} {_runs(seen.in_hand)} in hand{of}"


def _behind(ahead: int, group: str) -> str:
    return f"queued behind {_runs(ahead)} in group {group}" if ahead else f"first in the queue of group {group}"


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _undeclared(seen: Seen) -> str:
    run = seen.run
    elsewhere = ", ".join(seen.declared or ())
    told = f"no workflow {run.workflow} in group {run.group} is declared in this release"
    if elsewhere:
        told += f" (it is in group {elsewhere})"
    if seen.mistakes:
        told += f"; what could not be imported: {'; '.join(seen.mistakes)}"
    return told


def _named(step: StepRecord) -> str:
    return "sleep" if step.name == "sleep" else f"sleep {step.name}"


def _cancelled(reason: str) -> str:
    """Most reasons say by whom; those of people may say anything."""
    reason = _line(reason)
    return reason if reason.startswith("cancelled") else f"cancelled ({reason})"


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _at(micros: int | None) -> str:
    return "an unknown time" if micros is None else clock.iso(micros)


# --- what there is to see --------------------------------------------------------------------------------------------


def seen(
    store: StoreThread,
    app_dir: Path,
    run: Run,
    now: int,
    config: Config | None = None,
    declared: Callable[[], Manifest] | None = None,
) -> Seen:
    """What matters of a run where it stands; no more is asked for."""
    found = Seen(run=run, now=now, supervised=supervising(app_dir) is not None)
    replace = msgspec.structs.replace
    if run.status == Status.RUNNING:
        holder = [worker for worker in _up(store, app_dir, now) if worker.id == run.worker]
        place = inflight.places(app_dir, run.worker or "")(run.seq)
        steps = store.do_sync(Steps(seq=run.seq))
        return replace(found, worker=holder[0] if holder else None, place=place, steps=steps)
    if run.status != Status.PENDING:
        return found
    if run.due_at is None or run.due_at > now:
        return replace(found, waits=store.do_sync(OpenWaits(seq=run.seq)))
    workers = [worker for worker in _up(store, app_dir, now) if worker.group == run.group]
    in_hand = store.do_sync(InHand())
    manifest = declared() if declared else None
    return replace(
        found,
        workers=workers,
        in_hand=sum(in_hand.get(worker.id, 0) for worker in workers),
        hands=config.group(run.group).concurrency * len(workers) if config else None,
        ahead=store.do_sync(RunsAhead(run=run, now=now)),
        unhealthy=[one for one in believed(store.do_sync(ListHealth()), app_dir) if one.group == run.group],
        declared=[flow.group for flow in manifest.workflows if flow.name == run.workflow] if manifest else None,
        mistakes=[f"{one.file}:{one.line}: {one.message}" for one in manifest.mistakes] if manifest else (),
        paused=store.do_sync(Paused(now=now)),
    )


def _up(store: StoreThread, app_dir: Path, now: int) -> list[WorkerRecord]:
    return [worker for worker in store.do_sync(ListWorkers()) if inflight.is_up(worker, app_dir, now)]
