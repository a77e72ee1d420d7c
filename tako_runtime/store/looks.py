"""The operations that only look, as the queries that they take."""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, cast

from tako_runtime.run import AttemptRecord, Run, ScheduleRecord, Status, StepRecord, WorkerRecord
from tako_runtime.store import base, rows
from tako_runtime.store.base import Topics
from tako_runtime.store.statements import Statements

_run_of = itemgetter(0)


class Looks(Statements):
    """What is there."""

    def _steps_of(self, runs: Sequence[int]) -> dict[int, tuple[StepRecord, ...]]:
        found = self._all("steps_of", {"runs": self._listed(runs)}) if runs else []
        return {run: tuple(rows.step(row[1:]) for row in own) for run, own in groupby(found, key=_run_of)}

    def _step(self, seq: int, kind: str, name: str) -> StepRecord | None:
        row = self._one("step", {"seq": seq, "kind": kind, "name": name})
        return rows.step(row) if row else None

    def _runs_of(self, op: base.RunsOf, topics: Topics) -> list[Run]:
        found = [rows.run(row) for row in self._all("runs_of", {"worker": op.worker})]
        return sorted(found, key=attrgetter("seq"))

    def _list_workers(self, op: base.ListWorkers, topics: Topics) -> list[WorkerRecord]:
        return [WorkerRecord(*row) for row in self._all("list_workers")]

    def _list_health(self, op: base.ListHealth, topics: Topics) -> list[base.Unhealthy]:
        return [base.Unhealthy(*row) for row in self._all("list_health")]

    def _paused(self, op: base.Paused, topics: Topics) -> str | None:
        held = self._one("held_lease", {"name": base.PAUSE, "now": op.now})
        return held[0] if held else None

    def _list_schedules(self, op: base.ListSchedules, topics: Topics) -> list[ScheduleRecord]:
        return [rows.schedule(row) for row in self._all("list_schedules")]

    def _seen_version(self, op: base.DataVersion, topics: Topics) -> int:
        return self._data_version()

    def _undeclared(self, op: base.Undeclared, topics: Topics) -> dict[str, str]:
        found = {}
        for group in self._groups("next_ready_group"):
            workflows = self._listed(op.declared.get(group, ()))
            if not self._value("declared_is_ready", {"group": group, "workflows": workflows}):
                found[group] = self._value("first_ready", {"group": group})
        return found

    def _ended_groups(self, op: base.EndedGroups, topics: Topics) -> list[str]:
        return self._groups("next_ended_group")

    def _groups(self, query: str) -> list[str]:
        groups, after = [], ""
        while (group := self._value(query, {"after": after})) is not None:
            groups.append(group)
            after = group
        return groups

    def _get_run(self, op: base.GetRun, topics: Topics) -> Run | None:
        row = self._one("run_by_seq", {"seq": op.seq})
        return rows.run(row) if row else None

    def _find_runs(self, op: base.FindRuns, topics: Topics) -> list[Run]:
        where = {"prefix": op.prefix, "beyond": op.prefix + "\U0010ffff", "limit": op.limit}
        found = self._all("find_runs", where)
        if not found:
            found = self._all("find_runs_by_end", {"ending": op.prefix, "limit": op.limit})
        return [rows.run(row) for row in found]

    def _next_due_run(self, op: base.NextDue, topics: Topics) -> Run | None:
        row = self._one("next_due_run", {"reason": op.reason})
        return rows.run(row) if row else None

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
            found += [rows.run(row) for row in self._all(name, bound)]
        found.sort(key=lambda run: run.id, reverse=True)
        return found[: op.limit]

    def _live_runs(self, op: base.LiveRuns, topics: Topics) -> list[base.Live]:
        status, after = (op.after.status, op.after.id) if op.after else ("pending", "")
        page = self._all("live_runs", {"status": status, "after": after, "limit": op.limit})
        finished = self._all("finished_of", {"runs": self._listed([row[0] for row in page])}) if page else []
        names = {run: [name for _, name in own] for run, own in groupby(finished, key=_run_of)}
        return [base.Live(run_id, flow, status, names.get(seq, ())) for seq, run_id, flow, status in page]

    def _steps(self, op: base.Steps, topics: Topics) -> list[StepRecord]:
        return list(self._steps_of([op.seq]).get(op.seq, ()))

    def _attempts(self, op: base.Attempts, topics: Topics) -> list[AttemptRecord]:
        return [AttemptRecord(*row) for row in self._all("attempts_of", {"seq": op.seq})]

    def _open_waits(self, op: base.OpenWaits, topics: Topics) -> list[base.Wait]:
        if op.seq is not None:
            return [base.Wait(*row) for row in self._all("waits_of", {"seq": op.seq})]
        return [base.Wait(*row) for row in self._all("all_waits", {"limit": op.limit})]

    def _kept_signals(self, op: base.KeptSignals, topics: Topics) -> list[base.KeptSignal]:
        kept = self._all("kept_signals", {"now": op.now, "name": op.name, "limit": op.limit})
        return [base.KeptSignal(*row) for row in kept]

    def _count_ended(self, op: base.CountEnded, topics: Topics) -> int:
        bound = {"since": op.since, "before": op.before, "workflow": op.workflow, "statuses": self._listed(op.statuses)}
        if op.statuses == (Status.DEAD,) and op.workflow is None:
            return int(self._value("count_dead", bound))
        groups = self._groups("next_ended_group")
        return sum(int(self._value("count_ended", {**bound, "group": group})) for group in groups)

    def _count_kept(self, op: base.CountKept, topics: Topics) -> int:
        return int(self._value("count_kept", {"now": op.now}))

    def _queues(self, op: base.Queues, topics: Topics) -> list[base.Queue]:
        found: dict[str, base.Queue] = {}
        for group, depth, oldest in self._all("queues", {"now": op.now}):
            one = found.get(group, base.Queue(group, 0, oldest))
            found[group] = base.Queue(group, one.depth + depth, min(one.oldest_due_at, oldest))
        return [found[group] for group in sorted(found)]

    def _runs_ahead(self, op: base.RunsAhead, topics: Topics) -> int:
        run = op.run
        bound = {"now": op.now, "group": run.group, "priority": run.priority, "due_at": run.due_at, "seq": run.seq}
        return int(self._value("ready_ahead", bound)) + int(self._value("later_ahead", bound))

    def _in_hand(self, op: base.InHand, topics: Topics) -> dict[str, int]:
        return dict(cast("list[tuple[str, int]]", self._all("in_hand")))

    def _count_runs(self, op: base.CountRuns, topics: Topics) -> dict[tuple[str, str], int]:
        return {(status, reason): n for status, reason, n in self._all("count_live")}

    looks: ClassVar[dict[type, Callable[[Any, Any, Topics], Any]]] = {
        base.ListWorkers: _list_workers,
        base.RunsOf: _runs_of,
        base.ListHealth: _list_health,
        base.Paused: _paused,
        base.ListSchedules: _list_schedules,
        base.EndedGroups: _ended_groups,
        base.Undeclared: _undeclared,
        base.DataVersion: _seen_version,
        base.GetRun: _get_run,
        base.FindRuns: _find_runs,
        base.NextDue: _next_due_run,
        base.ListRuns: _list_runs,
        base.LiveRuns: _live_runs,
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
