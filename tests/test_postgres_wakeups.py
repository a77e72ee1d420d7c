"""What is due on the shared store is not left to the look once a second, though another process has it in hand for a
moment: claims pass over that, and nobody rings again."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import Caller, until
from scenarios.flows import orders
from workers import FLOWS, HERE, eventually, status, work

from tako_runtime.clock import SECOND, SystemClock
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.postgres import PostgresStore, queries_of
from tako_runtime.supervisor import Supervisor
from tako_runtime.worker import Worker

# They run processes of their own.
pytestmark = pytest.mark.slow

STORES = ("postgres",)

Held = Callable[[type[base.Operation[Any]], str], threading.Event]


@pytest.fixture
def held(home: Home, monkeypatch: pytest.MonkeyPatch) -> Held:
    """`held(kind, statement)`: the first operation of that kind meets what another transaction has in hand by that
    statement about runs, and gives up right after. The event says that it has met it."""

    def hold(kind: type[base.Operation[Any]], statement: str) -> threading.Event:
        execute, met = PostgresStore.execute, threading.Event()

        def in_other_hands(store: PostgresStore, batch: Any) -> Any:
            if met.is_set() or not any(isinstance(op, kind) for op in batch):
                return execute(store, batch)
            met.set()
            with psycopg.connect(home.url) as db:
                db.execute(statement.format(runs=f'"{home.schema}".runs'))
                answered = execute(store, batch)
                db.rollback()
                return answered

        monkeypatch.setattr(PostgresStore, "execute", in_other_hands)
        return met

    return hold


#: As another process promotes what has become due.
PROMOTE = "UPDATE {runs} SET ready = 1 WHERE ready = 0"


def test_who_begins_to_wait_for_a_runs_end_does_not_keep_it_from_being_claimed(opened: StoreThread, home: Home) -> None:
    """A claim passes over what somebody else has locked, and nobody would ring for it once more."""
    caller = Caller(opened)
    caller.enqueue()
    [run] = opened.do_sync(base.ListRuns())
    with psycopg.connect(home.url, autocommit=True) as db, db.transaction():
        psycopg.RawCursor(db).execute(queries_of(home.schema)["await_end"].text.decode(), [run.seq])
        assert [claimed.run.id for claimed in caller.claim()] == [run.id]


def test_a_run_that_somebody_else_had_in_hand_for_a_moment_is_claimed_without_a_look(
    opened: StoreThread, home: Home, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tako_runtime.worker.LOOK", 600.0)
    run_id = orders.answers.enqueue_sync("x")
    met = held(base.ClaimRuns, "SELECT 1 FROM {runs} FOR UPDATE")

    async def wait(worker: Worker) -> None:
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, wait)
    assert met.is_set()


def test_a_supervisor_does_not_leave_a_due_run_to_its_look_that_another_process_had_in_hand(
    opened: StoreThread, home: Home, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tako_runtime.supervisor.LOOK", 600.0)
    caller, now = Caller(opened), SystemClock().now()
    run = caller.new(workflow="answers", payload='"x"', due_at=now)
    caller.do(base.Enqueue(runs=[run], now=now - 1))
    met = held(base.Demand, PROMOTE)

    async def supervise() -> None:
        supervisor = Supervisor(opened, home, HERE, FLOWS, {}, lambda *_: None)
        running = asyncio.create_task(supervisor.run())
        await asyncio.to_thread(until, lambda: status(opened, run.id)[0] == "succeeded")
        supervisor.stop()
        await running

    asyncio.run(supervise())
    assert met.is_set()


def test_a_run_that_another_process_promotes_meanwhile_is_never_taken_for_one_that_is_not_due(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query of a `Demand` sees what is committed by then."""
    caller = Caller(opened)
    due = caller.clock.advance(SECOND)
    caller.do(base.Enqueue(runs=[caller.new(due_at=due)], now=due - 1))
    asked: list[str] = []
    one = PostgresStore._one

    with psycopg.connect(home.url) as db:
        db.execute(PROMOTE.format(runs=f'"{home.schema}".runs'))

        def committed_between(store: PostgresStore, query: str, bound: Any) -> Any:
            found = one(store, query, bound)
            if query in ("next_due", "next_ready_group"):
                asked.append(query)
                if len(asked) == 1:
                    db.commit()
            return found

        monkeypatch.setattr(PostgresStore, "_one", committed_between)
        demand = caller.do(base.Demand(now=caller.now))
    assert len(set(asked)) == 2
    assert demand.groups == {"default"} or (demand.next_at or caller.now + 1) <= caller.now


def test_one_server_wakes_a_group_for_each_release_as_another_ones_worker_may_not_know_what_is_due(
    opened: StoreThread, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask() -> None:
        first, second = (
            Supervisor(opened, home._replace(data_dir=folder), HERE, FLOWS, {}, lambda *_: None)
            for folder in (tmp_path / "a", tmp_path / "b")
        )
        monkeypatch.setenv("TAKO_RELEASE", "old")
        assert await first._may_wake("group")
        assert not await second._may_wake("group")
        monkeypatch.setenv("TAKO_RELEASE", "new")
        assert await second._may_wake("group")

    asyncio.run(ask())
