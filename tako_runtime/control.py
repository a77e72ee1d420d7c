"""What an operator may ask: list, show, why, start, retry, signal, cancel, prune; and how the app stands. Values in,
values out.

The command line, and later the same commands over SSH, only turn these values into tables or JSON. Every time in them
is ISO 8601 in UTC.
"""

import asyncio
import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock, codec, failure, state
from tako_runtime.clock import Clock, SystemClock
from tako_runtime.config import Config
from tako_runtime.errors import InvalidValue, NotFound, Refused
from tako_runtime.feed import supervising, tell
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.retention import prune
from tako_runtime.run import SHORT_ID, AttemptRecord, Found, Reason, Run, Status, StepRecord, first_id_at, new_id
from tako_runtime.signals import AWAITED, signals
from tako_runtime.status import look, status, together
from tako_runtime.store import Local, base, limits, pace
from tako_runtime.store.commit import StoreThread
from tako_runtime.why import seen, why
from tako_runtime.workflow import check_signal_name, new_run, refuse_unhealthy, signal_op, unkept

Json = dict[str, Any]

#: The net under the bell, for who waits for a run's end: in seconds.
LOOK = 1.0


class Control:
    """The operations on the store of an app, and on this machine's own beside it, `local`. Blocking, as a command is.
    What only this machine knows (which processes live, who supervises) is beside the store, in `app_dir`; without it,
    only the store is asked."""

    def __init__(
        self,
        store: StoreThread,
        clock: Clock | None = None,
        app_dir: Path | None = None,
        local: Local | None = None,
    ) -> None:
        self._store, self._local = store, local
        self._given_clock = clock
        self._clock: Clock = clock or SystemClock()
        self._app_dir = app_dir or Path(os.devnull)

    @property
    def splits(self) -> bool:
        """Whether runs of local workflows have another store than all others."""
        return self._local is not None

    def _stores(self) -> list[tuple[StoreThread, bool]]:
        """The stores that there are, and whether it is this machine's own beside another."""
        beside = self._local.there() if self._local is not None else None
        return [(self._store, False)] if beside is None else [(self._store, False), (beside, True)]

    def _store_for(self, *, local: bool) -> StoreThread:
        return self._local.made() if local and self._local is not None else self._store

    def _store_of(self, run: Found) -> StoreThread:
        return self._store_for(local=run.local)

    def _now(self, run: Found) -> int:
        """The time where that run is."""
        return self._at(self._store_of(run))

    def _at(self, store: StoreThread) -> int:
        return (self._given_clock or store.clock).now()

    # --- looking ---

    def find(self, prefix: str) -> Found:
        """The run whose id is, begins or else ends with `prefix`, if that is long enough to be meant as an end;
        `NotFound`, or `Refused` where several do."""
        wanted = prefix.strip().lower()
        if not wanted or not all(c in "0123456789abcdef-" for c in wanted):
            raise NotFound(f"{prefix!r} is not a run's id", hint="List the runs with: tako runs ls")
        op = base.FindRuns(prefix=wanted)
        found = [_found(run, local) for store, local in self._stores() for run in store.do_sync(op)]
        if len(wanted) < SHORT_ID:
            found = [run for run in found if run.id.startswith(wanted)]
        exact = [run for run in found if run.id == wanted]
        if not found:
            raise NotFound(f"no run {prefix}", hint="List the runs with: tako runs ls")
        if len(found) > 1 and not exact:
            ids = ", ".join(run.id for run in found)
            part = "beginning" if found[0].id.startswith(wanted) else "end"
            raise Refused(f"{prefix} is the {part} of several ids: {ids}", hint="Give more of it.")
        return (exact or found)[0]

    def list_runs(
        self,
        *,
        statuses: Sequence[str] = (),
        workflow: str | None = None,
        since: int | None = None,
        limit: int = 50,
    ) -> list[Json]:
        """Runs, newest first. `since` is an instant in microseconds."""
        unknown = [status for status in statuses if status not in list(Status)]
        if unknown:
            raise InvalidValue(
                f"no such status: {', '.join(unknown)}", hint=f"One of {', '.join(status.value for status in Status)}."
            )
        op = base.ListRuns(
            statuses=[Status(status) for status in statuses],
            workflow=workflow,
            since_id=None if since is None else first_id_at(since),
            limit=limit,
        )
        found = [_found(run, local) for store, local in self._stores() for run in store.do_sync(op)]
        newest = sorted(found, key=lambda run: run.id, reverse=True) if self._local is not None else found
        return [run_json(run) for run in newest[:limit]]

    def live(self) -> Iterator[tuple[base.Live, bool]]:
        """All runs that have not ended, and whether each is in this machine's own store beside a shared one."""
        for store, own in self._stores():
            after = None
            while page := store.do_sync(base.LiveRuns(after=after)):
                yield from ((run, own) for run in page)
                after = page[-1]

    def show(self, prefix: str) -> Json:
        """One run with its `steps`, its `attempts` (the one under way included) and what it is `waiting_for`."""
        run = self.find(prefix)
        now, store = self._now(run), self._store_of(run)
        steps = store.do_sync(base.Steps(seq=run.seq))
        attempts = store.do_sync(base.Attempts(seq=run.seq))
        waits = store.do_sync(base.OpenWaits(seq=run.seq))
        return {
            **run_json(run),
            "steps": [_step_json(step, run, now) for step in steps],
            "attempts": [_attempt_json(attempt) for attempt in attempts] + _open_attempt(run),
            "waiting_for": [
                {"signal": w.signal, "step": w.step, "since": clock.iso(w.since), "until": _time(w.deadline)}
                for w in waits
            ],
        }

    def why(
        self,
        prefix: str,
        config: Config | None = None,
        declared: Callable[[], Manifest] | None = None,
    ) -> Json:
        """Why a run stands where it stands: a `cause` (`why.CAUSES`) and a `sentence`. The configuration says how many
        runs a worker can have; what the release declares is asked only where it matters."""
        run = self.find(prefix)
        now = self._now(run)
        found = why(seen(self._store_of(run), self._app_dir, run, now, config, declared))
        return {"run": run.id, "workflow": run.workflow, "status": run.status, **found._asdict()}

    def status(self, config: Config | None = None, server: str | None = None) -> Json:
        """How the app stands: its own `process`, `groups`, `workers`, `schedules`, `runs`. The configuration says which
        groups there are to be, on that server."""
        from tako_runtime.app import standing  # no other operation needs these
        from tako_runtime.rotation import standing as held

        wanted = {name: config.group(name, server) for name in config.group_names(server)} if config else {}
        seen = together([look(one, self._app_dir, self._at(one), local=local) for one, local in self._stores()])
        return status(seen, wanted, supervising(self._app_dir), standing(self._app_dir), held(self._app_dir))

    def signals(self, limit: int = 50) -> Json:
        """Signals that runs are `waiting` for, by name, and signals that are `kept`, oldest first; at most `limit` of
        each. A kept one has the name of a wait that it was likely meant for as `near`."""
        stores, now = self._stores(), self._clock.now()
        open_, kept_ = base.OpenWaits(limit=max(limit, AWAITED)), base.KeptSignals(now=now, limit=limit)
        waits = [(wait, local) for store, local in stores for wait in store.do_sync(open_)]
        kept = [one for store, _ in stores for one in store.do_sync(kept_)]
        return signals(sorted(waits, key=lambda wait: wait[0].signal), sorted(kept, key=lambda k: k.sent_at), limit)

    def counts(self) -> dict[tuple[str, str], int]:
        """Live runs by status and reason."""
        total: Counter[tuple[str, str]] = Counter()
        for store, _ in self._stores():
            live = store.do_sync(base.CountRuns())
            total.update(live)
        return dict(total)

    # --- acting ---

    def start(
        self,
        flow: Declared,
        payload: str,
        *,
        delay: int = 0,
        unique_key: str | None = None,
        priority: int = 0,
        scheduled_at: int | None = None,
    ) -> Found:
        """Start a run of a declared workflow with a payload given as JSON text; the run (the live one with the unique
        key, if there is one). Whether the payload fits is for the handler to say: a misfit ends dead at once."""
        try:
            value = msgspec.json.decode(payload)
        except msgspec.DecodeError as error:
            raise InvalidValue(
                f"the payload is not JSON: {error}", hint="""Text needs its quotes: --payload '"text"'."""
            ) from None
        payload = codec.encode(value, f"the payload of {flow.name!r}", limit=limits().max_value)
        store = self._store_for(local=flow.local)
        now = self._at(store)
        new = new_run(
            flow.name, flow.group, payload, now=now, due=now + pace().real(delay), retries=flow.retries,
            backoff_base=flow.backoff_base, backoff_max=flow.backoff_max, priority=priority, unique_key=unique_key,
            scheduled_at=scheduled_at,
        )  # fmt: skip
        [run_id] = store.do_sync(base.Enqueue(runs=[new], now=now))
        return self.find(run_id)

    def refuse_unhealthy(self, group: str) -> None:
        """Raises `GroupUnhealthy` where the workers of the group cannot work: for who develops."""
        for store, _ in self._stores():
            refuse_unhealthy(group, store.do_sync(base.ListHealth()), lambda: self._app_dir)

    def retry(self, prefix: str, from_step: str | None = None) -> Json:
        """Let an ended run go on after its finished steps; `from_step` forgets that step and what came after it."""
        run = self.find(prefix)
        drop_from = None
        if from_step is not None:
            steps = self._store_of(run).do_sync(base.Steps(seq=run.seq))
            drop_from = state.steps_from(steps, from_step)
            if drop_from is None:
                names = ", ".join(step.name for step in steps) or "it has none"
                raise NotFound(f"run {run.id} has no step {from_step!r}", hint=f"Its steps: {names}.")
        return self._change(run, lambda now_run: state.retry(now_run, self._now(run), drop_from))

    def cancel(self, prefix: str, reason: str = "cancelled by an operator") -> Json:
        """Cancel a pending or parked run now, a running one at its next step boundary."""
        found, changes = self.find(prefix), list[state.Change]()

        def decide(run: Run) -> state.Change:
            changes.append(state.cancel(run, failure.clean(reason), self._now(found)))
            return changes[-1]

        shown = self._change(found, decide)
        if (last := changes[-1]).status is Status.CANCELLED:  # no worker has done it, so none tells of it
            tell(
                self._app_dir, "run.cancelled", run=found.id, workflow=found.workflow, group=found.group,
                attempt=found.attempt, reason=last.reason, ms=(last.now - (found.started_at or last.now)) / 1_000,
            )  # fmt: skip
        return shown

    def wake(self, prefix: str | None = None) -> Json:
        """Let a sleeping run go on now, as if its sleep were over; without an id the one that wakes first. `NotFound`
        where none sleeps."""
        run = self.find(prefix) if prefix is not None else self._next_to_wake()
        return self._change(run, lambda now_run: state.wake(now_run, self._now(run)))

    def _next_to_wake(self) -> Found:
        op = base.NextDue(reason=Reason.SLEEPING)
        found = [_found(run, local) for store, local in self._stores() if (run := store.do_sync(op)) is not None]
        if not found:
            raise NotFound("no run sleeps", hint="A sleep of less than 30 s does not park its run.")
        return min(found, key=lambda run: run.due_at or 0)

    def signal(self, name: str, payload: str = "null") -> int:
        """Send a signal with a payload given as JSON text; how many runs took it (0: it is kept)."""
        check_signal_name(name)
        try:
            value = msgspec.json.decode(payload)
        except msgspec.DecodeError as error:
            raise InvalidValue(f"the payload is not JSON: {error}") from None
        op, woken = signal_op(name, value), 0
        for beside, _ in self._stores()[1:]:
            woken += beside.do_sync(unkept(op, local=True))
        return woken + self._store.do_sync(unkept(op) if woken else op)

    def prunable(
        self, before: int, *, workflow: str | None = None, statuses: Sequence[str] = (), local: bool = False
    ) -> int:
        """How many runs ended before an instant; with `local`, in this machine's own store beside a shared one alone.
        Raises `InvalidValue` for a status that is no end."""
        op = base.CountEnded(before=before, workflow=workflow, statuses=_ends(statuses))
        return sum(store.do_sync(op) for store, own in self._stores() if own or not local)

    def prune(
        self,
        before: int,
        *,
        workflow: str | None = None,
        statuses: Sequence[str] = (),
        local: bool = False,
        told: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Delete the runs that `prunable` counts; how many. `told` hears how many went with each batch."""

        async def batches() -> int:
            total = 0
            for store in [store for store, own in self._stores() if own or not local]:
                async for count in prune(store, lambda _: before, workflow=workflow, statuses=_ends(statuses)):
                    total += count
                    told(count)
            return total

        return asyncio.run(batches())

    def _change(self, run: Found, decide: "Any") -> Json:
        """Decide on the run as it stands, and again where it moved on meanwhile."""
        for _ in range(100):
            if self._store_of(run).do_sync(base.Apply(change=decide(run))):
                break
            run = self._again(run)
        return run_json(self._again(run))

    def _again(self, run: Found) -> Found:
        found = self._store_of(run).do_sync(base.GetRun(seq=run.seq))
        if found is None:
            raise NotFound(f"run {run.id} is not there any more")
        return _found(found, run.local)

    def wait(self, run: Found) -> Json:
        """Wait until the run has ended; the bell, and a look once a second, tell."""
        return asyncio.run(self._wait(run))

    async def _wait(self, run: Found) -> Json:
        rung = asyncio.Event()
        listener = self._store.bell.listen("c-" + new_id(self._clock.now()))
        try:
            listener.start(lambda topics: rung.set() if "ended" in topics else None)
            store = self._store_of(run)
            if store.shared:
                await store.do(base.AwaitEnd(seq=run.seq))
            while not Status((found := await self._get(run)).status).ended:
                try:
                    async with asyncio.timeout(LOOK):
                        await rung.wait()
                except TimeoutError:
                    pass
                rung.clear()
        finally:
            listener.close()
        return run_json(found)

    async def _get(self, run: Found) -> Found:
        found = await self._store_of(run).do(base.GetRun(seq=run.seq))
        if found is None:
            raise NotFound(f"run {run.id} is not there any more")
        return _found(found, run.local)


def _found(run: Run, local: bool) -> Found:
    return Found(**{**msgspec.structs.asdict(run), "local": local})


def _ends(statuses: Sequence[str]) -> tuple[Status, ...] | None:
    """The statuses of ended runs that were asked for; None where none was."""
    ends = [status.value for status in Status if status.ended]
    if unknown := [status for status in statuses if status not in ends]:
        raise InvalidValue(f"only ended runs are pruned, and {unknown[0]} is no end", hint=f"One of {', '.join(ends)}.")
    return tuple(Status(status) for status in dict.fromkeys(statuses)) or None


def choose(workflows: Iterable[Declared], name: str) -> Declared:
    """The declared workflow of that name; `NotFound` with the nearest names."""
    by_name = {flow.name: flow for flow in workflows}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
        known = ", ".join(sorted(by_name)) or "none"
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There is: {known}."
        raise NotFound(f"no workflow {name!r}", hint=hint)
    return by_name[name]


# --- values for programs ---------------------------------------------------------------------------------------------


def run_json(run: Found) -> Json:
    """A run as every command and every program sees it."""
    return {
        "id": run.id,
        "workflow": run.workflow,
        "group": run.group,
        "status": run.status,
        "reason": run.reason,
        "attempt": run.attempt,
        "max_attempts": run.max_attempts,
        "priority": run.priority,
        "created_at": clock.iso(run.created_at),
        "run_at": _time(run.due_at),
        "started_at": _time(run.started_at),
        "finished_at": _time(run.finished_at),
        "scheduled_at": _time(run.scheduled_at),
        "payload": _value(run.payload),
        "result": _value(run.result),
        "error": _error(run.error),
        "unique_key": run.unique_key,
        "release": run.release,
        "cancelling": run.cancelling,
        "local": run.local,
    }


def _step_json(step: StepRecord, run: Run, now: int) -> Json:
    slept = step.kind == "sleep" and step.due_at is not None and step.due_at <= (run.finished_at or now)
    return {
        "name": step.name,
        "kind": step.kind,
        "status": "done" if slept else step.status,
        "attempt": step.attempt,
        "started_at": clock.iso(step.started_at),
        "finished_at": _time(step.due_at if slept else step.finished_at),
        "until": _time(step.due_at),
        "result": _value(step.result),
        "error": _error(step.error),
    }


def _attempt_json(attempt: AttemptRecord) -> Json:
    return {
        "n": attempt.n,
        "worker": attempt.worker,
        "started_at": clock.iso(attempt.started_at),
        "finished_at": clock.iso(attempt.finished_at),
        "outcome": attempt.outcome,
        "error": _error(attempt.error),
    }


def _open_attempt(run: Run) -> list[Json]:
    if run.attempt_started_at is None:
        return []
    outcome = "running" if run.status == Status.RUNNING else run.reason
    started = clock.iso(run.attempt_started_at)
    return [
        {"n": run.attempt, "worker": run.worker, "started_at": started, "finished_at": None, "outcome": outcome,
         "error": None}
    ]  # fmt: skip


def _time(micros: int | None) -> str | None:
    return None if micros is None else clock.iso(micros)


def _value(text: bytes | None) -> Any:
    return None if text is None else codec.shown(text)


def _error(text: str | None) -> Json | None:
    if text is None:
        return None
    found = failure.read(text)
    return {"type": found.type, "message": found.message, "traceback": found.traceback}
