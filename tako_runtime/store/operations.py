"""Each operation as the queries that it takes: what is the same in every dialect.

Here are those that write; `looks.py` has the ones that only look. A dialect brings the connection, the transaction
around a batch, and the few primitives of `statements.py`. Where it lets several processes write at the same time, it
takes a lock on each name that is `contended` before the batch: what an operation reads then stays true until it is
committed, but for the rows that the queries themselves lock.
"""

from collections.abc import Callable, Sequence
from itertools import starmap
from operator import itemgetter
from typing import Any, ClassVar, cast

from msgspec.structs import asdict

from tako_runtime.errors import StoreError
from tako_runtime.run import Claimed, Run, StepRecord
from tako_runtime.state import Change
from tako_runtime.store import base, rows
from tako_runtime.store.base import Operation, Topics
from tako_runtime.store.looks import Looks

#: About how many bytes of old runs go in one transaction: what others wait for meanwhile.
_PRUNED_BYTES = 1 << 22

#: How many expired signals go when another one is kept.
_EXPIRED = 1_000

#: The operations of a batch by their kind, each with its place in the batch.
Sorts = dict[type[Operation[Any]], list[tuple[int, Any]]]
_place = itemgetter(0)


def sort(batch: Sequence[Operation[Any]]) -> Sorts:
    """A batch by the kind of its operations."""
    sorts: Sorts = {}
    if len(kinds := set(map(type, batch))) == 1:  # most batches are all saves
        sorts[kinds.pop()] = list(enumerate(batch))
    else:
        for place, op in enumerate(batch):
            sorts.setdefault(type(op), []).append((place, op))
    return sorts


def contended(sorts: Sorts) -> list[str]:
    """The names of what a batch must have for itself: an event that is sent, or waited for, or parked on (a signal that
    raced with a parking run would be lost); a worker that claims, or is given up; a unique key. In one order, so that
    two batches never wait for each other."""
    names = {name for kind, names in _CONTENDED.items() for _, op in sorts.get(kind, ()) for name in names(op)}
    return sorted(names)


def _event(wait: str) -> str:
    """What a wait step waits for: its name, without the number of its use."""
    return f"event {wait.partition('#')[0]}"


_CONTENDED: dict[type[Operation[Any]], Callable[[Any], list[str]]] = {
    base.SendSignal: lambda op: [_event(op.name)],
    base.DropKept: lambda op: [_event(op.name)],
    base.OpenWait: lambda op: [_event(op.signal)],
    base.ExpireWait: lambda op: [_event(op.name)],
    base.Apply: lambda op: [_event(name) for name in op.change.open_waits],
    base.ClaimRuns: lambda op: [f"worker {op.worker}"],
    base.GiveUpWorker: lambda op: [f"worker {op.worker}"],
    base.Enqueue: lambda op: [f"key {run.workflow} {run.unique_key}" for run in op.runs if run.unique_key is not None],
    base.SetSchedules: lambda op: ["schedules"],
}


class SqlStore(Looks):
    """The operations; `_run` carries out a batch within the transaction that a dialect has begun."""

    def _run(self, batch: Sequence[Operation[Any]], sorts: Sorts, topics: Topics) -> list[Any]:
        """The answers, in the order of `batch`. Saves and ends come in numbers: they are written in bulk, and
        first."""
        answers: list[Any] = [None] * len(batch)
        if saves := sorts.pop(base.SaveStep, None):
            self._save_steps(saves, answers)
        if ends := sorts.pop(base.Apply, None):
            self._apply_all(ends, answers, topics)
        if sorts:
            for place, op in sorted((pair for pairs in sorts.values() for pair in pairs), key=_place):
                handler = self._handlers.get(type(op))
                if handler is None:
                    raise StoreError(f"this store cannot do {type(op).__name__}")
                answers[place] = handler(self, op, topics)
        return answers

    # --- a run's life ---

    def _enqueue(self, op: base.Enqueue, topics: Topics) -> list[str]:
        ids, new = [], []
        keyed: dict[tuple[str, str], str] = {}
        for run in op.runs:
            if run.unique_key is not None:
                place = (run.workflow, run.unique_key)
                holder = keyed.get(place) or self._value(
                    "holder_of_key", {"workflow": run.workflow, "unique_key": run.unique_key}
                )
                if holder is not None:
                    ids.append(holder)
                    continue
                keyed[place] = run.id
            ready = run.due_at <= op.now
            new.append(rows.new_row(run, ready))
            ids.append(run.id)
            topics.add(f"due:{run.group}" if ready else "later")
        if new:
            self._write("insert_runs", new)
        return ids

    def _claim(self, op: base.ClaimRuns, topics: Topics) -> list[Claimed]:
        self._change("promote", {"now": op.now})
        bound = {
            "worker": op.worker, "group": op.group, "now": op.now, "limit": op.limit, "pause": base.PAUSE,
            "workflows": self._listed(op.workflows),
        }  # fmt: skip
        runs = list(starmap(Run, self._all("claimable", bound)))
        if runs:
            self._change("claim", {"worker": op.worker, "now": op.now, "runs": self._listed([run.seq for run in runs])})
        steps = self._steps_of([run.seq for run in runs if run.claim > 1])
        return [Claimed(run, steps.get(run.seq, ())) for run in runs]

    def _save_steps(self, ops: Sequence[tuple[int, base.SaveStep]], answers: list[Any]) -> None:
        if self._all_written("save_steps", [rows.step_row(op) for _, op in ops]):
            for i, op in ops:
                answers[i] = op.step
            return
        for i, op in ops:  # some were there already, or their claim is lost: ask which
            answers[i] = self._stored(op.seq, op.claim, op.step.kind, op.step.name)

    def _stored(self, seq: int, claim: int, kind: str, name: str) -> StepRecord | None:
        if not self._value("holds_claim", {"seq": seq, "claim": claim}):
            return None
        return self._step(seq, kind, name)

    def _apply_all(self, ops: Sequence[tuple[int, base.Apply]], answers: list[Any], topics: Topics) -> None:
        if self._all_or_none("apply", [rows.change_row(op.change) for _, op in ops]):
            for place, _ in ops:
                answers[place] = True
            self._follow_up([op.change for _, op in ops], topics)
        elif len(ops) == 1:
            answers[ops[0][0]] = False
        else:  # at least one came too late: take them one by one, to learn which
            for pair in ops:
                self._apply_all([pair], answers, topics)

    def _follow_up(self, changes: Sequence[Change], topics: Topics) -> None:
        """What changes write beside their rows, and whom they concern."""
        used = [rows.attempt_row(change.seq, change.used) for change in changes if change.used is not None]
        if used:
            self._write("insert_attempts", used)
        ended = [change for change in changes if change.finished_at is not None]
        if ended:
            topics.add("ended")
        if waited := [change.seq for change in ended if change.waited]:
            self._change("drop_waits", {"runs": self._listed(waited)})
        parked = [(change.seq, name) for change in changes for name in change.open_waits]
        answered = {seq for (seq,) in self._found("answered", parked)} if parked else set()
        for change in changes:
            for key in change.rerun:
                self._change("mark_rerun", {"seq": change.seq, "kind": key.kind, "name": key.name})
            if change.finished_at is None:
                self._go_on(change, change.seq in answered, topics)

    def _go_on(self, change: Change, answered: bool, topics: Topics) -> None:
        """The rest of a change that does not end its run; whether a signal came in before it could park."""
        seq = change.seq
        if change.drop_from is not None:
            for query in ("drop_steps", "drop_waits_from"):
                self._change(query, {"seq": seq, "drop_from": change.drop_from})
        if change.fresh_steps:
            self._change("mark_all_rerun", {"seq": seq})
        if change.ends_sleeps is not None:
            self._change("end_sleeps", {"seq": seq, "now": change.now, "until": change.ends_sleeps})
        if not change.goes_on:
            topics.add("cancel")
            return
        due = change.due_at is not None and change.due_at <= change.now
        if answered:
            self._change("make_due", {"runs": self._listed([seq]), "now": change.now})
        topics.add(f"due:{change.group}" if due or answered else "later")

    # --- waits and signals ---

    def _open_wait(self, op: base.OpenWait, topics: Topics) -> StepRecord | None:
        self._write("save_steps", [rows.step_row(op)])
        stored = self._stored(op.seq, op.claim, op.step.kind, op.step.name)
        if stored is None or stored.status != "waiting":
            return stored
        kept = self._one("take_kept", {"signal": op.signal, "now": op.now})
        if kept is not None:
            payload = cast(bytes, kept[0]).decode(errors="replace")
            self._end_wait(op.seq, op.step.name, "done", payload, op.now)
            return self._step(op.seq, "wait", op.step.name)
        wait = {
            "signal": op.signal, "seq": op.seq, "name": op.step.name, "position": stored.position,
            "started_at": stored.started_at, "due_at": stored.due_at,
        }  # fmt: skip
        self._change("insert_wait", wait)
        return stored

    def _expire_wait(self, op: base.ExpireWait, topics: Topics) -> StepRecord | None:
        if not self._value("holds_claim", {"seq": op.seq, "claim": op.claim}):
            return None
        self._end_wait(op.seq, op.name, "timed_out", "null", op.now)
        return self._step(op.seq, "wait", op.name)

    def _end_wait(self, seq: int, name: str, status: str, payload: str, now: int) -> None:
        self._change("end_wait", {"seq": seq, "name": name, "status": status, "payload": payload, "now": now})
        self._change("drop_wait", {"seq": seq, "name": name})

    def _send_signal(self, op: base.SendSignal, topics: Topics) -> int:
        waiting = self._all("waiting_runs", {"name": op.name, "now": op.now})
        for seq, name in cast("list[tuple[int, str]]", waiting):
            self._end_wait(seq, name, "done", op.payload, op.now)
            woken = self._value("wake", {"seq": seq, "now": op.now})
            topics.add(f"due:{woken}" if woken else "signal")
        if not waiting and op.expires_at is not None:
            self._change("expire_signals", {"now": op.now, "limit": _EXPIRED})
            self._change(
                "keep_signal",
                {"name": op.name, "payload": op.payload, "now": op.now, "expires_at": op.expires_at},
            )
        return len(waiting)

    def _drop_kept(self, op: base.DropKept, topics: Topics) -> bool:
        return self._changed("drop_kept", {"name": op.name, "sent_at": op.sent_at}) > 0

    # --- workers ---

    def _add_worker(self, op: base.AddWorker, topics: Topics) -> None:
        self._change("insert_worker", asdict(op.worker))

    def _renew_lease(self, op: base.RenewLease, topics: Topics) -> bool:
        return self._changed("renew_lease", {"worker": op.worker, "until": op.until}) == 1

    def _give_up_worker(self, op: base.GiveUpWorker, topics: Topics) -> bool:
        return self._changed("give_up_worker", {"worker": op.worker, "seen": op.seen}) == 1

    def _remove_worker(self, op: base.RemoveWorker, topics: Topics) -> bool:
        self._change("delete_worker", {"worker": op.worker})
        return self._value("worker_is_there", {"worker": op.worker}) is None

    def _report_health(self, op: base.ReportHealth, topics: Topics) -> None:
        bound = {"group": op.group, "host": op.host}
        if op.reason is None:
            self._change("report_healthy", bound)
        else:
            told = {"now": op.now, "reason": op.reason, "details": op.details}
            self._change("report_unhealthy", {**bound, **told})

    # --- leader, schedules, old runs ---

    def _take_lease(self, op: base.TakeLease, topics: Topics) -> bool:
        bound = {"name": op.name, "holder": op.holder, "until": op.until, "now": op.now}
        return self._value("take_lease", bound) is not None

    def _drop_lease(self, op: base.DropLease, topics: Topics) -> None:
        if self._changed("drop_lease", {"name": op.name, "holder": op.holder}):
            topics.add("later")

    def _set_schedules(self, op: base.SetSchedules, topics: Topics) -> None:
        named = {schedule.workflow for schedule in op.schedules}
        for workflow, *_ in self._all("list_schedules"):
            if workflow not in named:
                self._change("delete_schedule", {"workflow": workflow})
        for schedule in op.schedules:
            self._change("set_schedule", asdict(schedule))

    def _fire_schedule(self, op: base.FireSchedule, topics: Topics) -> bool:
        bound = {
            "workflow": op.workflow, "seen_next_at": op.seen_next_at, "next_at": op.next_at, "fired_at": op.fired_at,
            "run_id": op.run.id if op.run else None,
        }  # fmt: skip
        if self._value("advance_schedule", bound) is None:
            return False
        if op.run is not None:
            self._enqueue(base.Enqueue(runs=[op.run], now=op.now), topics)
        return True

    def _prune(self, op: base.Prune, topics: Topics) -> base.Pruned:
        bound = {
            "group": op.group, "before": op.before, "limit": op.limit, "workflow": op.workflow,
            "statuses": self._listed(op.statuses), "after_at": op.after[0], "after_seq": op.after[1],
        }  # fmt: skip
        found = self._all("ended_runs", bound)
        going: list[int] = []
        looked_at, place, room = 0, op.after, _PRUNED_BYTES
        for finished_at, seq, fits, size in found:
            if fits:
                room -= size
                if going and room < 0:
                    break
                going.append(seq)
            looked_at, place = looked_at + 1, (finished_at, seq)
        for query in ("delete_runs", "delete_steps", "delete_attempts") if going else ():
            self._change(query, {"runs": self._listed(going)})
        return base.Pruned(len(going), place if looked_at == op.limit or room < 0 else None)

    def _expire_signals(self, op: base.ExpireSignals, topics: Topics) -> int:
        return self._changed("expire_signals", {"now": op.now, "limit": op.limit})

    def _space(self, op: base.GiveBackSpace, topics: Topics) -> bool:
        return self._give_back_space()

    # --- what is due, and who waits ---

    def _demand(self, op: base.Demand, topics: Topics) -> base.Due:
        self._change("promote", {"now": op.now})
        if pause := self._one("held_lease", {"name": base.PAUSE, "now": op.now}):
            return base.Due(frozenset(), pause[1])
        next_at = self._value("next_due", {})  # asked first: a run that comes due in between is in one of the two
        return base.Due(frozenset(self._groups("next_ready_group")), next_at)

    def _await_end(self, op: base.AwaitEnd, topics: Topics) -> None:
        if self.shared:
            self._change("await_end", {"seq": op.seq})

    def _all_or_none(self, query: str, written: Sequence[tuple[Any, ...]]) -> bool:
        """Carry out a query with `{rows}` for all of these, if each of them finds its row; whether it has."""
        if len(written) == 1:
            return self._all_written(query, written)
        self._command("SAVEPOINT bulk")
        if not (landed := self._all_written(query, written)):
            self._command("ROLLBACK TO bulk")
        self._command("RELEASE bulk")
        return landed

    _handlers: ClassVar[dict[type, Callable[[Any, Any, Topics], Any]]] = {
        **Looks.looks,
        base.Enqueue: _enqueue,
        base.ClaimRuns: _claim,
        base.OpenWait: _open_wait,
        base.ExpireWait: _expire_wait,
        base.SendSignal: _send_signal,
        base.DropKept: _drop_kept,
        base.AddWorker: _add_worker,
        base.RenewLease: _renew_lease,
        base.GiveUpWorker: _give_up_worker,
        base.RemoveWorker: _remove_worker,
        base.ReportHealth: _report_health,
        base.TakeLease: _take_lease,
        base.DropLease: _drop_lease,
        base.SetSchedules: _set_schedules,
        base.FireSchedule: _fire_schedule,
        base.Prune: _prune,
        base.ExpireSignals: _expire_signals,
        base.GiveBackSpace: _space,
        base.Demand: _demand,
        base.AwaitEnd: _await_end,
    }
