"""The embedded store: SQLite in WAL mode through apsw. Every commit that somebody is told of is synced
(`synchronous=FULL`); one that holds nothing but claims, leases and what became due is not (`base.Operation`).

Writers of several processes queue at a turnstile of two advisory locks around `BEGIN IMMEDIATE`. SQLite's own busy
handler sleeps and retries: one writer in a hurry can starve the others for a second and more, which the turnstile
bounds to each one's turn. `benchmarks/contention.py` shows both.
"""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from itertools import chain, starmap
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import apsw
import msgspec

from tako_runtime.errors import Refused, StoreBusy, StoreError, StoreTooNew
from tako_runtime.run import RUN_COLUMNS, AttemptRecord, Claimed, Run, ScheduleRecord, Status, StepRecord, WorkerRecord
from tako_runtime.state import Change
from tako_runtime.store import base, rows
from tako_runtime.store.base import Operation, Store, Topics
from tako_runtime.store.queries import load, migrations
from tako_runtime.store.turnstile import Turnstile

#: How long a writer waits for its turn, in seconds, before it says that the store is busy.
PATIENCE = 30.0

#: How long SQLite waits for a lock that is not ours to queue for (a backup tool, a shell), in milliseconds.
BUSY_TIMEOUT = 10_000

#: About how many bytes of old runs go in one transaction, and how many free pages: what others wait for meanwhile.
_PRUNED_BYTES = 1 << 22
_PRUNED_PAGES = 1_000

#: How many expired signals go when another one is kept.
_EXPIRED = 1_000

#: Trouble that passes: the same write may work later.
_TRANSIENT = (apsw.BusyError, apsw.LockedError, apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ProtocolError)

# Text columns are read as bytes: a value that is not UTF-8 any more must reach the run that it belongs to, not stop the
# claim that reads it.
_AS_BYTES = {"payload", "result"}
_STEP_COLUMNS = (
    "kind, name, position, status, attempt, started_at, finished_at, due_at, CAST(result AS BLOB), error, rerun"
)


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f"CAST({n} AS BLOB)" if n in _AS_BYTES else '"group"' if n == "group" else n for n in names)


_WORDS = {
    "run": _columns(RUN_COLUMNS),
    "claimed": _columns([name if name != "result" else "NULL" for name in RUN_COLUMNS]),
    "step": _STEP_COLUMNS,
    "payload": "CAST(payload AS BLOB)",
    "result": "CAST(result AS TEXT)",
    "rows": "{rows}",
    "runs": "SELECT value FROM json_each(:runs)",
    "workflows": "SELECT value FROM json_each(:workflows)",
    "statuses": "SELECT value FROM json_each(:statuses)",
    "lock": "",
}


Q = load(_WORDS)

#: The most rows that one statement writes. Each count is a statement of its own, so only powers of two are used.
_MOST_ROWS = 64


@cache
def in_bulk(name: str, width: int, count: int) -> str:
    """The query that writes `count` rows of `width` columns."""
    row = f"({', '.join('?' * width)})"
    return Q[name].replace("{rows}", f"VALUES {', '.join([row] * count)}")


def _listed(statuses: Sequence[Status] | None) -> str | None:
    return None if statuses is None else msgspec.json.encode(statuses).decode()


#: The operations of a batch by their kind, each with its place in the batch.
_Sorts = dict[type[Operation[Any]], list[tuple[int, Any]]]
_place = itemgetter(0)


class SqliteStore(Store):
    """The store in the file `path`, made if it is not there (0600, in folders of 0700).

    `queueing` is how writers of several processes take turns: `"turnstile"`, or `"busy"` for SQLite's own handler,
    which only the benchmark asks for.
    """

    def __init__(self, path: Path, queueing: Literal["turnstile", "busy"] = "turnstile") -> None:
        self.path = path
        self._turnstile: Turnstile | None = None
        self._synced = True
        self._shrunk = False
        try:
            _make_private(path)
            if queueing == "turnstile":
                self._turnstile = Turnstile(path, PATIENCE)
            self._db = apsw.Connection(str(path))
            self._db.set_busy_timeout(BUSY_TIMEOUT)
            if not self._db.pragma("page_count"):  # only a new file can be told to give its free pages back
                self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL").fetchall()
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -65536")
            self._db.execute("PRAGMA wal_autocheckpoint = 4000")
            self._migrate()
        except (apsw.Error, OSError) as error:
            raise translated(error, path) from error

    def close(self) -> None:
        self._db.close()
        if self._turnstile:
            self._turnstile.close()

    def _migrate(self) -> None:
        known = migrations()
        newest = known[-1][0]
        if self._version() == newest:
            return
        with self.turn():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                version = self._version()
                if version > newest:
                    raise StoreTooNew(
                        f"{self.path} has store version {version}; this tako knows versions up to {newest}"
                    )
                for number, script in known:
                    if number > version:
                        self._db.execute(script)
                        self._db.execute(f"PRAGMA user_version = {number}")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _version(self) -> int:
        return int(self._db.pragma("user_version"))

    # --- transactions ---

    def execute(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        topics: Topics = set()
        sorts: _Sorts = {}
        if len(kinds := set(map(type, batch))) == 1:  # most batches are all saves
            sorts[kinds.pop()] = list(enumerate(batch))
        else:
            for place, op in enumerate(batch):
                sorts.setdefault(type(op), []).append((place, op))
        try:
            if not any(sort.writes for sort in sorts):
                return self._run(batch, sorts, topics), topics
            self._sync(any(sort.writes and sort.acknowledged for sort in sorts))
            self._db.execute("BEGIN IMMEDIATE")
            try:
                answers = self._run(batch, sorts, topics)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            if self._shrunk:  # the file gets shorter when what was committed is carried into it
                self._shrunk = False
                with suppress(apsw.BusyError):  # somebody else does it
                    self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            return answers, topics
        except (apsw.Error, OSError) as error:
            raise translated(error, self.path) from error

    def _sync(self, wanted: bool) -> None:
        """Whether the next commit waits for the disk: all do, but those of which nobody is told (`base.Operation`)."""
        if wanted != self._synced:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")
            self._synced = wanted

    def turn(self) -> AbstractContextManager[None]:
        return self._turnstile or nullcontext()

    def _run(self, batch: Sequence[Operation[Any]], sorts: "_Sorts", topics: Topics) -> list[Any]:
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

    def _write(self, name: str, found: Sequence[tuple[Any, ...]]) -> None:
        """Write rows, many with one statement: the interpreter's lock is given up once for all of them, and while they
        are written the event loop runs."""
        at = 0
        while at < len(found):
            count = min(_MOST_ROWS, 1 << (len(found) - at).bit_length() - 1)
            bound = tuple(chain.from_iterable(found[at : at + count]))
            self._db.execute(in_bulk(name, len(found[0]), count), bound)
            at += count

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
            new.append(
                {
                    "id": run.id, "workflow": run.workflow, "group": run.group, "priority": run.priority,
                    "due_at": run.due_at, "retries": run.retries, "backoff_base": run.backoff_base,
                    "backoff_max": run.backoff_max, "created_at": run.created_at,
                    "scheduled_at": run.scheduled_at, "unique_key": run.unique_key,
                    "release": run.release, "payload": run.payload, "ready": int(ready),
                }
            )  # fmt: skip
            ids.append(run.id)
            topics.add(f"due:{run.group}" if ready else "later")
        self._db.executemany(Q["insert_run"], new)
        return ids

    def _claim(self, op: base.ClaimRuns, topics: Topics) -> list[Claimed]:
        self._db.execute(Q["promote"], {"now": op.now})
        found = self._db.execute(
            Q["claim"],
            {
                "worker": op.worker, "group": op.group, "now": op.now, "limit": op.limit,
                "workflows": msgspec.json.encode(op.workflows).decode(),
            },
        ).fetchall()  # fmt: skip
        runs = list(starmap(Run, found))
        runs.sort(key=lambda run: (-run.priority, run.due_at, run.seq))
        return [Claimed(run, self._steps_of(run.seq) if run.claim > 1 else ()) for run in runs]

    def _steps_of(self, seq: int) -> tuple[StepRecord, ...]:
        return tuple(rows.step(row) for row in self._db.execute(Q["steps_of"], {"seq": seq}))

    def _save_steps(self, ops: Sequence[tuple[int, base.SaveStep]], answers: list[Any]) -> None:
        before = self._db.total_changes()
        self._write("save_steps", [rows.step_row(op) for _, op in ops])
        if self._db.total_changes() - before == len(ops):
            for i, op in ops:
                answers[i] = op.step
            return
        for i, op in ops:  # some were there already, or their claim is lost: ask which
            answers[i] = self._stored(op.seq, op.claim, op.step.kind, op.step.name)

    def _stored(self, seq: int, claim: int, kind: str, name: str) -> StepRecord | None:
        if not self._value("holds_claim", {"seq": seq, "claim": claim}):
            return None
        return self._step(seq, kind, name)

    def _step(self, seq: int, kind: str, name: str) -> StepRecord | None:
        row = self._db.execute(Q["step"], {"seq": seq, "kind": kind, "name": name}).fetchone()
        return rows.step(row) if row else None

    def _apply_all(self, ops: Sequence[tuple[int, base.Apply]], answers: list[Any], topics: Topics) -> None:
        if len(ops) > 1:
            self._db.execute("SAVEPOINT bulk")
        before = self._db.total_changes()
        self._write("apply", [rows.change_row(op.change) for _, op in ops])
        landed = self._db.total_changes() - before == len(ops)
        if len(ops) > 1:
            if not landed:  # at least one came too late: take them one by one, to learn which
                self._db.execute("ROLLBACK TO bulk")
                for pair in ops:
                    self._apply_all([pair], answers, topics)
            self._db.execute("RELEASE bulk")
            if not landed:
                return
        for place, _ in ops:
            answers[place] = landed
        if landed:
            self._follow_up([op.change for _, op in ops], topics)

    def _follow_up(self, changes: Sequence[Change], topics: Topics) -> None:
        """What changes write beside their rows, and whom they concern."""
        used = [rows.attempt_row(change.seq, change.used) for change in changes if change.used is not None]
        if used:
            self._write("insert_attempts", used)
        ended = [change.seq for change in changes if change.finished_at is not None]
        if ended:
            topics.add("ended")
            self._db.execute(Q["drop_waits"], {"runs": msgspec.json.encode(ended).decode()})
        for change in changes:
            if change.rerun:
                step = {"seq": change.seq}
                self._db.executemany(
                    Q["mark_rerun"], [{**step, "kind": kind, "name": name} for kind, name in change.rerun]
                )
            if change.finished_at is None:
                self._go_on(change, topics)

    def _go_on(self, change: Change, topics: Topics) -> None:
        """The rest of a change that does not end its run."""
        seq = change.seq
        if change.drop_from is not None:
            for query in ("drop_steps", "drop_waits_from"):
                self._db.execute(Q[query], {"seq": seq, "drop_from": change.drop_from})
        if change.fresh_steps:
            self._db.execute(Q["mark_all_rerun"], {"seq": seq})
        if not change.goes_on:
            topics.add("cancel")
            return
        due = change.due_at is not None and change.due_at <= change.now
        if any(self._value("wait_is_open", {"seq": seq, "name": name}) is None for name in change.open_waits):
            self._db.execute(Q["make_due"], {"seq": seq, "now": change.now})
            due = True
        topics.add(f"due:{change.group}" if due else "later")

    # --- waits and signals ---

    def _open_wait(self, op: base.OpenWait, topics: Topics) -> StepRecord | None:
        self._write("save_steps", [rows.step_row(op)])
        stored = self._stored(op.seq, op.claim, op.step.kind, op.step.name)
        if stored is None or stored.status != "waiting":
            return stored
        kept = self._db.execute(Q["take_kept"], {"signal": op.signal, "now": op.now}).fetchone()
        if kept is not None:
            payload = cast(bytes, kept[0]).decode(errors="replace")
            self._end_wait(op.seq, op.step.name, "done", payload, op.now)
            return self._step(op.seq, "wait", op.step.name)
        self._db.execute(
            Q["insert_wait"],
            {
                "signal": op.signal, "seq": op.seq, "name": op.step.name, "position": stored.position,
                "started_at": stored.started_at, "due_at": stored.due_at,
            },
        )  # fmt: skip
        return stored

    def _expire_wait(self, op: base.ExpireWait, topics: Topics) -> StepRecord | None:
        if not self._value("holds_claim", {"seq": op.seq, "claim": op.claim}):
            return None
        self._end_wait(op.seq, op.name, "timed_out", "null", op.now)
        return self._step(op.seq, "wait", op.name)

    def _end_wait(self, seq: int, name: str, status: str, payload: str, now: int) -> None:
        self._db.execute(Q["end_wait"], {"seq": seq, "name": name, "status": status, "payload": payload, "now": now})
        self._db.execute(Q["drop_wait"], {"seq": seq, "name": name})

    def _send_signal(self, op: base.SendSignal, topics: Topics) -> int:
        waiting = self._db.execute(Q["waiting_runs"], {"name": op.name, "now": op.now}).fetchall()
        for seq, name in cast("list[tuple[int, str]]", waiting):
            self._end_wait(seq, name, "done", op.payload, op.now)
            woken = self._value("wake", {"seq": seq, "now": op.now})
            topics.add(f"due:{woken}" if woken else "signal")
        if not waiting:
            self._db.execute(Q["expire_signals"], {"now": op.now, "limit": _EXPIRED})
            self._db.execute(
                Q["keep_signal"],
                {"name": op.name, "payload": op.payload, "now": op.now, "expires_at": op.expires_at},
            )
        return len(waiting)

    # --- workers ---

    def _add_worker(self, op: base.AddWorker, topics: Topics) -> None:
        w = op.worker
        self._db.execute(
            Q["insert_worker"],
            {
                "id": w.id, "group": w.group, "host": w.host, "pid": w.pid, "release": w.release,
                "started_at": w.started_at, "lease_until": w.lease_until,
            },
        )  # fmt: skip

    def _renew_lease(self, op: base.RenewLease, topics: Topics) -> bool:
        self._db.execute(Q["renew_lease"], {"worker": op.worker, "until": op.until})
        return self._db.changes() == 1

    def _give_up_worker(self, op: base.GiveUpWorker, topics: Topics) -> bool:
        self._db.execute(Q["give_up_worker"], {"worker": op.worker, "seen": op.seen})
        return self._db.changes() == 1

    def _remove_worker(self, op: base.RemoveWorker, topics: Topics) -> bool:
        self._db.execute(Q["delete_worker"], {"worker": op.worker})
        return self._value("worker_is_there", {"worker": op.worker}) is None

    def _list_workers(self, op: base.ListWorkers, topics: Topics) -> list[WorkerRecord]:
        return [WorkerRecord(*row) for row in self._db.execute(Q["list_workers"])]

    def _runs_of(self, op: base.RunsOf, topics: Topics) -> list[Run]:
        return [rows.run(row) for row in self._db.execute(Q["runs_of"], {"worker": op.worker})]

    def _report_health(self, op: base.ReportHealth, topics: Topics) -> None:
        bound = {"group": op.group, "host": op.host}
        if op.reason is None:
            self._db.execute(Q["report_healthy"], bound)
        else:
            told = {"now": op.now, "reason": op.reason, "details": op.details}
            self._db.execute(Q["report_unhealthy"], {**bound, **told})

    def _list_health(self, op: base.ListHealth, topics: Topics) -> list[base.Unhealthy]:
        return [base.Unhealthy(*row) for row in self._db.execute(Q["list_health"])]

    # --- leader, schedules, old runs ---

    def _take_lease(self, op: base.TakeLease, topics: Topics) -> bool:
        bound = {"name": op.name, "holder": op.holder, "until": op.until, "now": op.now}
        return self._value("take_lease", bound) is not None

    def _drop_lease(self, op: base.DropLease, topics: Topics) -> None:
        self._db.execute(Q["drop_lease"], {"name": op.name, "holder": op.holder})

    def _set_schedules(self, op: base.SetSchedules, topics: Topics) -> None:
        named = {schedule.workflow for schedule in op.schedules}
        for workflow, *_ in self._db.execute(Q["list_schedules"]).fetchall():
            if workflow not in named:
                self._db.execute(Q["delete_schedule"], {"workflow": workflow})
        for s in op.schedules:
            self._db.execute(
                Q["set_schedule"],
                {
                    "workflow": s.workflow, "group": s.group, "expression": s.expression, "timezone": s.timezone,
                    "catchup": s.catchup, "overlap": s.overlap, "next_at": s.next_at,
                },
            )  # fmt: skip

    def _list_schedules(self, op: base.ListSchedules, topics: Topics) -> list[ScheduleRecord]:
        return [rows.schedule(row) for row in self._db.execute(Q["list_schedules"])]

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

    def _ended_groups(self, op: base.EndedGroups, topics: Topics) -> list[str]:
        return self._groups("next_ended_group")

    def _prune(self, op: base.Prune, topics: Topics) -> base.Pruned:
        bound = {
            "group": op.group, "before": op.before, "limit": op.limit, "workflow": op.workflow,
            "statuses": _listed(op.statuses), "after_at": op.after[0], "after_seq": op.after[1],
        }  # fmt: skip
        found = self._db.execute(Q["ended_runs"], bound)
        going: list[dict[str, int]] = []
        looked_at, place, room = 0, op.after, _PRUNED_BYTES
        for finished_at, seq, fits, size in cast("Iterable[tuple[int, int, int, int]]", found):
            if fits:
                room -= size
                if going and room < 0:
                    break
                going.append({"seq": seq})
            looked_at, place = looked_at + 1, (finished_at, seq)
        found.close()
        for query in ("delete_run", "delete_steps", "delete_attempts"):
            self._db.executemany(Q[query], going)
        return base.Pruned(len(going), place if looked_at == op.limit or room < 0 else None)

    def _expire_signals(self, op: base.ExpireSignals, topics: Topics) -> int:
        self._db.execute(Q["expire_signals"], {"now": op.now, "limit": op.limit})
        return self._db.changes()

    def _give_back_space(self, op: base.GiveBackSpace, topics: Topics) -> bool:
        free = int(self._db.pragma("freelist_count"))
        self._db.execute(f"PRAGMA incremental_vacuum({_PRUNED_PAGES})").fetchall()
        left = int(self._db.pragma("freelist_count"))
        self._shrunk = self._shrunk or left < free
        return 0 < left < free

    # --- what is there ---

    def _demand(self, op: base.Demand, topics: Topics) -> base.Due:
        self._db.execute(Q["promote"], {"now": op.now})
        return base.Due(frozenset(self._groups("next_ready_group")), self._value("next_due", {}))

    def _undeclared(self, op: base.Undeclared, topics: Topics) -> dict[str, str]:
        found = {}
        for group in self._groups("next_ready_group"):
            workflows = msgspec.json.encode(op.declared.get(group, ())).decode()
            if not self._value("declared_is_ready", {"group": group, "workflows": workflows}):
                found[group] = self._value("first_ready", {"group": group})
        return found

    def _groups(self, query: str) -> list[str]:
        groups, after = [], ""
        while (group := self._value(query, {"after": after})) is not None:
            groups.append(group)
            after = group
        return groups

    def _data_version(self, op: base.DataVersion, topics: Topics) -> int:
        return int(self._db.pragma("data_version"))

    def _get_run(self, op: base.GetRun, topics: Topics) -> Run | None:
        row = self._db.execute(Q["run_by_seq"], {"seq": op.seq}).fetchone()
        return rows.run(row) if row else None

    def _find_runs(self, op: base.FindRuns, topics: Topics) -> list[Run]:
        where = {"prefix": op.prefix, "beyond": op.prefix + "\U0010ffff", "limit": op.limit}
        return [rows.run(row) for row in self._db.execute(Q["find_runs"], where)]

    def _list_runs(self, op: base.ListRuns, topics: Topics) -> list[Run]:
        where = {"since_id": op.since_id or "", "limit": op.limit, "workflow": op.workflow}
        found: list[Run] = []
        for status in dict.fromkeys(op.statuses) or (None,):
            name = (
                "list_unlucky_runs_by_workflow" if op.workflow and status in ("dead", "cancelled")
                else "list_runs_by_workflow_and_status" if op.workflow and status
                else "list_runs_by_workflow" if op.workflow
                else "list_succeeded" if status == "succeeded"
                else "list_runs_by_status" if status
                else "list_runs"
            )  # fmt: skip
            bound = {**where, "status": status}
            found += [rows.run(row) for row in self._db.execute(Q[name], bound)]
        found.sort(key=lambda run: run.id, reverse=True)
        return found[: op.limit]

    def _steps(self, op: base.Steps, topics: Topics) -> list[StepRecord]:
        return list(self._steps_of(op.seq))

    def _attempts(self, op: base.Attempts, topics: Topics) -> list[AttemptRecord]:
        return [AttemptRecord(*row) for row in self._db.execute(Q["attempts_of"], {"seq": op.seq})]

    def _open_waits(self, op: base.OpenWaits, topics: Topics) -> list[base.Wait]:
        if op.seq is not None:
            return [base.Wait(*row) for row in self._db.execute(Q["waits_of"], {"seq": op.seq})]
        return [base.Wait(*row) for row in self._db.execute(Q["all_waits"], {"limit": op.limit})]

    def _kept_signals(self, op: base.KeptSignals, topics: Topics) -> list[base.KeptSignal]:
        kept = self._db.execute(Q["kept_signals"], {"now": op.now, "limit": op.limit})
        return [base.KeptSignal(*row) for row in kept]

    def _count_ended(self, op: base.CountEnded, topics: Topics) -> int:
        bound = {"since": op.since, "before": op.before, "workflow": op.workflow, "statuses": _listed(op.statuses)}
        if op.statuses == (Status.DEAD,) and op.workflow is None:
            return int(self._value("count_dead", bound))
        groups = self._groups("next_ended_group")
        return sum(int(self._value("count_ended", {**bound, "group": group})) for group in groups)

    def _count_kept(self, op: base.CountKept, topics: Topics) -> int:
        return int(self._value("count_kept", {"now": op.now}))

    def _queues(self, op: base.Queues, topics: Topics) -> list[base.Queue]:
        found: dict[str, base.Queue] = {}
        for group, depth, oldest in self._db.execute(Q["queues"], {"now": op.now}):
            one = found.get(group, base.Queue(group, 0, oldest))
            found[group] = base.Queue(group, one.depth + depth, min(one.oldest_due_at, oldest))
        return [found[group] for group in sorted(found)]

    def _runs_ahead(self, op: base.RunsAhead, topics: Topics) -> int:
        run = op.run
        bound = {"now": op.now, "group": run.group, "priority": run.priority, "due_at": run.due_at, "seq": run.seq}
        return int(self._value("ready_ahead", bound)) + int(self._value("later_ahead", bound))

    def _in_hand(self, op: base.InHand, topics: Topics) -> dict[str, int]:
        return dict(cast("list[tuple[str, int]]", self._db.execute(Q["in_hand"]).fetchall()))

    def _count_runs(self, op: base.CountRuns, topics: Topics) -> dict[tuple[str, str], int]:
        return {(status, reason): n for status, reason, n in self._db.execute(Q["count_live"])}

    def _value(self, query: str, bound: dict[str, Any]) -> Any:
        row = self._db.execute(Q[query], bound).fetchone()
        return row[0] if row else None

    _handlers: ClassVar[dict[type, Callable[[Any, Any, Topics], Any]]] = {
        base.Enqueue: _enqueue,
        base.ClaimRuns: _claim,
        base.OpenWait: _open_wait,
        base.ExpireWait: _expire_wait,
        base.SendSignal: _send_signal,
        base.AddWorker: _add_worker,
        base.RenewLease: _renew_lease,
        base.GiveUpWorker: _give_up_worker,
        base.RemoveWorker: _remove_worker,
        base.ListWorkers: _list_workers,
        base.RunsOf: _runs_of,
        base.ReportHealth: _report_health,
        base.ListHealth: _list_health,
        base.TakeLease: _take_lease,
        base.DropLease: _drop_lease,
        base.SetSchedules: _set_schedules,
        base.ListSchedules: _list_schedules,
        base.FireSchedule: _fire_schedule,
        base.EndedGroups: _ended_groups,
        base.Prune: _prune,
        base.ExpireSignals: _expire_signals,
        base.GiveBackSpace: _give_back_space,
        base.Demand: _demand,
        base.Undeclared: _undeclared,
        base.DataVersion: _data_version,
        base.GetRun: _get_run,
        base.FindRuns: _find_runs,
        base.ListRuns: _list_runs,
        base.Steps: _steps,
        base.Attempts: _attempts,
        base.OpenWaits: _open_waits,
        base.KeptSignals: _kept_signals,
        base.CountRuns: _count_runs,
        base.CountEnded: _count_ended,
        base.CountKept: _count_kept,
        base.Queues: _queues,
        base.RunsAhead: _runs_ahead,
        base.InHand: _in_hand,
    }


# --- the file and its lock -------------------------------------------------------------------------------------------


def _make_private(path: Path) -> None:
    """The file 0600 and its folders 0700, before SQLite opens it: its WAL takes the same mode."""
    for folder in (*reversed(path.parent.parents), path.parent):  # `parents=True` would leave those to the umask
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def translated(error: apsw.Error | OSError, path: Path) -> StoreError | Refused:
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, _TRANSIENT) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return StoreBusy(f"the store {path} cannot take it right now ({what})")
    if isinstance(error, apsw.ConstraintError) and "unique_key" in str(error):
        return Refused(
            "another live run of this workflow holds the same unique key",
            hint="Let that one end, or cancel it, before this one runs again.",
        )
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return StoreError(f"the store {path} is damaged ({what})", hint="Restore it from a backup.")
    if isinstance(error, OSError):
        return StoreError(f"the store {path} cannot be opened ({what})", hint="Look at the folder's owner and mode.")
    return StoreError(f"the store {path} failed ({what})")
