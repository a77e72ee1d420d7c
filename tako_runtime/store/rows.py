"""Rows <-> values: what is the same in every dialect."""

from collections.abc import Callable, Sequence
from typing import Any

from tako_runtime.run import Run, ScheduleRecord, StepRecord
from tako_runtime.state import Change
from tako_runtime.store.base import OpenWait, SaveStep


def run(row: Sequence[Any]) -> Run:
    return Run(*row)


def step(row: Sequence[Any]) -> StepRecord:
    record: Callable[..., StepRecord] = StepRecord
    return record(*row[:-1], bool(row[-1]))


def schedule(row: Sequence[Any]) -> ScheduleRecord:
    record: Callable[..., ScheduleRecord] = ScheduleRecord
    return record(*row[:-1], bool(row[-1]))


def step_row(op: SaveStep | OpenWait) -> dict[str, Any]:
    step = op.step
    return {
        "seq": op.seq, "claim": op.claim, "kind": step.kind, "name": step.name, "position": step.position,
        "status": step.status, "attempt": step.attempt, "started_at": step.started_at,
        "finished_at": step.finished_at, "due_at": step.due_at, "error": step.error,
        "result": step.result.decode() if step.result is not None else None,
    }  # fmt: skip


def change_row(change: Change) -> dict[str, Any]:
    pending = change.status == "pending"
    return {
        "seq": change.seq, "claim": change.claim, "seen_status": change.seen_status, "status": change.status,
        "reason": change.reason, "due_at": change.due_at, "attempt_started_at": change.attempt_started_at,
        "finished_at": change.finished_at, "losses": change.losses, "max_attempts": change.max_attempts,
        "cancelling": change.cancelling, "result": change.result, "error": change.error,
        "worker": change.worker, "goes_on": pending,
        "ready": int(change.due_at is not None and change.due_at <= change.now) if pending else None,
    }  # fmt: skip


def attempt_row(change: Change) -> dict[str, Any]:
    used = change.used
    assert used is not None
    return {
        "seq": change.seq, "n": used.n, "worker": used.worker, "started_at": used.started_at,
        "finished_at": used.finished_at, "outcome": used.outcome, "error": used.error,
    }  # fmt: skip
