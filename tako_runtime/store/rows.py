"""Rows <-> values: what is the same in every dialect."""

from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import astuple

from tako_runtime.run import AttemptRecord, NewRun, Run, ScheduleRecord, StepRecord
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


# What a busy worker writes by the thousand: the columns of a `{rows}`, in its order.


def new_row(run: NewRun, ready: bool) -> tuple[Any, ...]:
    """For `insert_runs`."""
    return (*astuple(run), int(ready))


def step_row(op: SaveStep | OpenWait) -> tuple[Any, ...]:
    """For `save_steps`."""
    return (op.seq, op.claim) + astuple(op.step)  # noqa: RUF005 -- takes half the time


def change_row(change: Change) -> tuple[Any, ...]:
    """For `apply`."""
    ready = None
    if change.finished_at is None and change.goes_on:
        ready = int(change.due_at is not None and change.due_at <= change.now)
    return (
        change.status, change.reason, ready, change.due_at, change.worker, change.attempt_started_at,
        change.finished_at, change.losses, change.max_attempts, change.cancelling, change.result, change.error,
        change.seq, change.claim, change.seen_status,
    )  # fmt: skip


def attempt_row(seq: int, used: AttemptRecord) -> tuple[Any, ...]:
    """For `insert_attempts`."""
    return (seq, *astuple(used))
