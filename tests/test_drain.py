"""Workers that are drained, and workers that cannot write for a moment."""

import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import script, until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import (
    bodies,
    eventually,
    open_gate,
    shown,
    status,
    steps,
    stop_past_its_lease,
    work,
    worker_process,
    workers,
)

from tako_runtime import Step, workflow
from tako_runtime.errors import StoreBusy
from tako_runtime.store import Home, open_store, use
from tako_runtime.store import sqlite as sqlite_store
from tako_runtime.store.base import (
    Apply,
    Operation,
    SaveStep,
    Topics,
)
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.worker import Worker

# --- drained ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [1, 2])
def test_a_drained_worker_finishes_its_step_and_hands_the_run_back(
    opened: StoreThread, home: Home, log: Path, gate: Path, signals: int
) -> None:
    run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
    parked = orders.waits.enqueue_sync(["never", None])
    with worker_process(home) as worker:
        until(lambda: bodies(log) == ["a"] and status(opened, parked)[0] == "pending")
        for n in range(signals):
            worker.kill(signal.SIGTERM)
            until(lambda: worker.events("worker.draining"))
            if n == 0:
                late = orders.answers.enqueue_sync("not claimed any more")
        open_gate(gate)
        assert worker.ended() == 0
    assert workers(opened) == {}
    run = shown(opened, run_id)
    assert (run["status"], run["reason"], run["attempt"]) == ("pending", "queued", 1)
    assert steps(run) == {"a": "done"}
    assert status(opened, late) == ("pending", "queued")
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["status"], run["attempt"], len(run["attempts"])) == ("succeeded", 1, 1)
    assert bodies(log) == ["a", "b"]


def test_a_drain_does_not_wait_for_the_next_try_of_a_failing_step(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated_failure.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home) as worker:
        until(lambda: bodies(log) == ["a"])
        worker.kill(signal.SIGTERM)
        until(lambda: worker.events("worker.draining"))
        open_gate(gate)
        assert worker.ended() == 0
    assert status(opened, run_id) == ("pending", "queued")
    work(opened, home)
    assert shown(opened, run_id)["status"] == "succeeded"
    assert bodies(log) == ["a", "a"]


def test_a_handler_that_blocks_its_thread_is_drained_at_its_next_step(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated_plain.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home) as worker:
        until(lambda: bodies(log) == ["plain"])
        worker.kill(signal.SIGTERM)
        until(lambda: worker.events("worker.draining"))
        open_gate(gate)
        assert worker.ended() == 0
    assert status(opened, run_id) == ("pending", "queued")
    assert bodies(log) == ["plain"]


def test_a_sigterm_while_a_lost_lease_is_unwound_ends_the_process(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    orders.stubborn_cleanup.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1s") as worker:
        until(lambda: bodies(log) == ["began"])
        stop_past_its_lease(worker, opened, home)
        worker.kill(signal.SIGCONT)
        until(lambda: "cleanup" in bodies(log))
        worker.kill(signal.SIGTERM)
        open_gate(gate)
        assert worker.ended() == 0


def test_a_worker_whose_supervisor_is_gone_drains_and_ends(opened: StoreThread, home: Home) -> None:
    with worker_process(home) as worker:
        worker.up()
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.ended() == 0
    assert workers(opened) == {}


pytestmark = pytest.mark.usefixtures("only_orders")


# --- a store that cannot write for a moment --------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [SaveStep, Apply])
def test_a_write_that_fails_for_a_moment_is_tried_again_and_nothing_is_done_twice(
    opened: StoreThread,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    operation: type[Operation[Any]],
) -> None:
    ran: list[str] = []
    refused: list[str] = []
    execute = SqliteStore.execute

    def busy_at_first(self: SqliteStore, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        if len(refused) < 4 and any(isinstance(op, operation) for op in batch):
            refused.append("busy")
            raise StoreBusy("disk full")
        return execute(self, batch)

    @workflow("unlucky", retries=0)
    async def unlucky(step: Step) -> str:
        await step.run("a", ran.append, "a")
        ran.append("handler")
        return "done"

    run_id = unlucky.enqueue_sync()
    monkeypatch.setattr(SqliteStore, "execute", busy_at_first)
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["status"], run["result"], len(refused)) == ("succeeded", "done", 4)
    assert ran == ["a", "handler"]


def test_a_claim_that_fails_for_a_moment_is_tried_again_without_haste(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody rings again and nobody else writes: the worker itself must remember that there is something to claim."""
    refused: list[str] = []
    execute = SqliteStore.execute
    over = threading.Event()

    def busy_at_first(self: SqliteStore, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        if not over.is_set() and any(type(op).__name__ == "ClaimRuns" for op in batch):
            refused.append("busy")
            raise StoreBusy("disk full")
        return execute(self, batch)

    run_id = orders.answers.enqueue_sync("x")
    monkeypatch.setattr(SqliteStore, "execute", busy_at_first)

    async def wait(worker: Worker) -> None:
        await eventually(lambda: len(refused) > 3)
        at = len(refused)
        threading.Timer(1.0, over.set).start()
        await eventually(over.is_set)
        assert len(refused) - at < 20, "it spins"
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, wait)


@pytest.mark.parametrize("patience", [20, 10_000], ids=["StoreBusy reaches the worker", "SQLite waits"])
def test_a_write_lock_that_another_program_holds_for_a_second_costs_only_the_second(
    home: Home, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY_TIMEOUT", patience)
    opened = open_store(home)
    use(opened)
    ran: list[str] = []
    holder: list[subprocess.Popen[str]] = []

    def body() -> None:
        ran.append("a")
        process = script(HOLD_THE_LOCK, home.app_dir / "runs.db")
        holder.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"

    @workflow("locked-out", retries=0)
    async def locked_out(step: Step) -> None:
        await step.run("a", body)

    try:
        run_id = locked_out.enqueue_sync()
        work(opened, home)
        assert holder[0].wait(30) == 0
        assert shown(opened, run_id)["status"] == "succeeded"
        assert ran == ["a"]
    finally:
        for process in holder:
            process.communicate()
        use(None)
        opened.close()


HOLD_THE_LOCK = """
    import sqlite3, sys, time
    db = sqlite3.connect(sys.argv[1], isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    print("locked", flush=True)
    time.sleep(1)
    db.execute("COMMIT")
"""
