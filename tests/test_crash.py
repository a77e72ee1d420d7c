"""Workers that are killed, stopped, drained, or cannot write: what a run never loses and a step never does twice."""

import asyncio
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import script, until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import (
    LaterClock,
    WorkerProcess,
    bodies,
    eventually,
    gone,
    now,
    shown,
    status,
    steps,
    supervised,
    work,
    worker_process,
    workers,
)

from tako_runtime import Backoff, Step, clock, workflow
from tako_runtime.control import Control
from tako_runtime.errors import StoreBusy
from tako_runtime.inflight import InFlight, places
from tako_runtime.reclaim import reclaim
from tako_runtime.run import WorkerRecord
from tako_runtime.state import WorkerLost, settle
from tako_runtime.store import Home, open_store, use
from tako_runtime.store import sqlite as sqlite_store
from tako_runtime.store.base import (
    AddWorker,
    Apply,
    ClaimRuns,
    GiveUpWorker,
    ListWorkers,
    Operation,
    RemoveWorker,
    RenewLease,
    RunsOf,
    SaveStep,
    Topics,
)
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.worker import Worker
from tako_runtime.workflow import registry


@pytest.fixture(autouse=True)
def _flows() -> Iterator[None]:
    """The scenarios' workflows are declared, and no others."""
    before = dict(registry)
    registry.clear()
    registry.update({name: flow for name, flow in before.items() if flow.handler.__module__ == orders.__name__})
    yield
    registry.clear()
    registry.update(before)


@pytest.fixture
def log(home: Home) -> Path:
    return home.data_dir / "bodies"


@pytest.fixture
def gate(home: Home) -> Path:
    path = home.data_dir / "gate"
    os.mkfifo(path)
    return path


def open_gate(gate: Path) -> None:
    """Let go on who is held there, once somebody is."""
    until(lambda: Path(f"{gate}.held").exists())
    with gate.open("wb"):  # returns once the other end is open
        pass


def give_back(opened: StoreThread, home: Home, at: int | None = None) -> int:
    """What a supervisor does when it sees that a worker has ended."""
    return asyncio.run(reclaim(opened, home.app_dir, at or now()))


def stop_past_its_lease(worker: WorkerProcess, opened: StoreThread, home: Home) -> None:
    """SIGSTOP, but not in the middle of a commit, and reclaim once its lease has lapsed."""
    until(lambda: _stopped_outside_a_commit(worker, opened))
    until(lambda: all(w.lease_until <= now() for w in opened.do_sync(ListWorkers())))
    give_back(opened, home)
    assert worker.pid not in workers(opened).values()


def _stopped_outside_a_commit(worker: WorkerProcess, opened: StoreThread) -> bool:
    worker.kill(signal.SIGSTOP)
    try:
        opened.do_sync(RemoveWorker(worker="nobody"), timeout=1)
    except StoreBusy:
        worker.kill(signal.SIGCONT)
        return False
    return True


# --- killed at one point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("ClaimRuns after", ["a", "b"]),
        ("before a", ["a", "b"]),
        ("after a", ["a", "a", "b"]),
        ("SaveStep before", ["a", "a", "b"]),
        ("SaveStep after", ["a", "b"]),
        ("after b", ["a", "b", "b"]),
        ("Apply before", ["a", "b"]),
    ],
)
def test_a_run_whose_worker_is_killed_succeeds_and_no_saved_step_runs_again(
    opened: StoreThread, home: Home, log: Path, point: str, expected: list[str]
) -> None:
    marker = str(home.data_dir / "died")
    in_body = not point[0].isupper()
    run_id = orders.two_steps.enqueue_sync(Case(str(log), marker=marker, die=point if in_body else ""))
    env = {} if in_body else {"DIE": point, "MARKER": marker}
    with worker_process(home, script=None if in_body else "dying_worker.py", env=env) as worker:
        assert worker.ended() == -signal.SIGKILL
    assert status(opened, run_id) == ("running", "claimed")
    assert give_back(opened, home) == 1
    assert status(opened, run_id) == ("pending", "retrying")
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["status"], run["result"]) == ("succeeded", ["a", "b"])
    assert [a["outcome"] for a in run["attempts"]] == ["lost", "succeeded"]
    assert bodies(log) == expected


def test_a_run_whose_worker_is_killed_after_its_end_was_written_stays_as_it_ended(
    opened: StoreThread, home: Home, log: Path
) -> None:
    run_id = orders.two_steps.enqueue_sync(Case(str(log)))
    env = {"DIE": "Apply after", "MARKER": str(home.data_dir / "died")}
    with worker_process(home, script="dying_worker.py", env=env) as worker:
        assert worker.ended() == -signal.SIGKILL
    ended = shown(opened, run_id)
    assert ended["status"] == "succeeded"
    assert give_back(opened, home) == 0
    work(opened, home)
    assert shown(opened, run_id) == ended
    assert bodies(log) == ["a", "b"]


def test_a_caught_failure_stays_one_after_a_crash(opened: StoreThread, home: Home, log: Path) -> None:
    """Ship fails, the refund is done, the worker dies: ship is not tried again once the money is back."""
    run_id = orders.saga.enqueue_sync(Case(str(log), marker=str(home.data_dir / "died")))
    with worker_process(home) as worker:
        assert worker.ended() == -signal.SIGKILL
    give_back(opened, home)
    work(opened, home)
    assert shown(opened, run_id)["result"] == "refunded: ('no money', 42)"
    assert bodies(log) == ["charge", "ship", "refund"]


def test_a_worker_that_is_gone_is_known_by_its_lock_long_before_its_lease_lapses(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1h") as worker:
        until(lambda: bodies(log) == ["a"])
        assert give_back(opened, home) == 0, "it is alive"
        worker.kill(signal.SIGKILL)
        worker.ended()
    assert give_back(opened, home) == 1
    run = shown(opened, run_id)
    assert run["attempts"][0]["error"]["message"] == "worker died during attempt 1 in step a"
    assert list((home.app_dir / "workers").iterdir()) == []
    work(opened, home)
    assert shown(opened, run_id)["status"] == "succeeded"


def test_a_run_that_kills_its_workers_ends_dead_at_its_budget(opened: StoreThread, home: Home, log: Path) -> None:
    run_id = orders.kills_its_worker.enqueue_sync(Case(str(log)))
    for n in (1, 2, 3):
        with worker_process(home) as worker:
            assert worker.ended() == -signal.SIGKILL
        give_back(opened, home)
        assert len(bodies(log)) == n
    run = shown(opened, run_id)
    assert (run["status"], run["reason"]) == ("dead", "worker died during attempt 3 in step boom")
    assert [a["outcome"] for a in run["attempts"]] == ["lost"] * 3


# --- stopped past its lease ------------------------------------------------------------------------------------------


def test_a_stale_attempt_writes_nothing_and_starts_no_further_step(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1s") as worker:
        until(lambda: bodies(log) == ["a"])
        [old] = workers(opened)
        stop_past_its_lease(worker, opened, home)
        work(opened, home)  # another worker takes the run over
        ended = shown(opened, run_id)
        assert ended["status"] == "succeeded"
        worker.kill(signal.SIGCONT)
        open_gate(gate)  # its body comes to its end
        until(lambda: worker.pid in workers(opened).values(), 30)
        assert old not in workers(opened), "it starts over as a new one"
        following = orders.answers.enqueue_sync("still at work")
        until(lambda: status(opened, following)[0] == "succeeded")
    assert shown(opened, run_id) == ended
    assert bodies(log) == ["a", "a", "b"]


def test_an_attempt_whose_own_process_has_claimed_the_run_anew_writes_nothing(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    """Both bodies are under way in one process; that of the first claim ends first."""
    second = Path(f"{gate}.second")
    os.mkfifo(second)
    run_id = orders.gated_twice.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1s") as worker:
        until(lambda: bodies(log) == ["a"])
        stop_past_its_lease(worker, opened, home)
        worker.kill(signal.SIGCONT)
        until(lambda: bodies(log) == ["a", "a"], 30)
        open_gate(gate)
        following = orders.answers.enqueue_sync("done meanwhile")
        until(lambda: status(opened, following)[0] == "succeeded")
        assert steps(shown(opened, run_id)) == {}
        open_gate(second)
        until(lambda: status(opened, run_id)[0] == "succeeded")
        run = shown(opened, run_id)
        assert run["result"] == "of the second claim"
        assert run["attempts"][-1]["worker"] in workers(opened)


@pytest.mark.parametrize("writes", ["a step", "a failed step", "a sleep", "a wait", "its end", "its failure"])
def test_an_attempt_whose_run_was_claimed_by_another_meanwhile_writes_nothing(
    opened: StoreThread, home: Home, writes: str
) -> None:
    """Its lease holds, and it does not know: only the number of its claim tells."""
    further: list[str] = []

    def taken_over() -> None:
        [run] = opened.do_sync(RunsOf(worker=next(iter(workers(opened)))))
        opened.do_sync(Apply(change=settle(run, WorkerLost(), now())))
        opened.do_sync(AddWorker(worker=WorkerRecord("w-other", "default", "there", 1, "dev", now(), now())))
        [_] = opened.do_sync(ClaimRuns(worker="w-other", group="default", workflows=["stale"], limit=1, now=now()))

    def fails() -> None:
        taken_over()
        raise ConnectionError

    @workflow("stale")
    async def stale(step: Step) -> None:
        if writes.endswith("step"):
            await step.run("a", fails if "failed" in writes else taken_over)
        else:
            await asyncio.to_thread(taken_over)
        if writes == "a sleep":
            await step.sleep("1h")
        elif writes == "a wait":
            await step.wait_for("x")
        elif writes == "its failure":
            raise ConnectionError
        elif writes != "its end":
            await step.run("b", further.append, "b")

    run_id = stale.enqueue_sync()
    work(opened, home, concurrency=1)  # no slot is free to claim it once more
    [run] = opened.do_sync(RunsOf(worker="w-other"))
    assert (run.id, run.claim, run.attempt) == (run_id, 2, 2)
    assert steps(shown(opened, run_id)) == {}
    assert shown(opened, run_id)["waiting_for"] == []
    assert further == []


@pytest.mark.parametrize("fails", [False, True], ids=["next step", "next try"])
def test_an_attempt_that_was_given_up_meanwhile_runs_no_further_body(
    opened: StoreThread, home: Home, fails: bool
) -> None:
    """Its clock has leapt past its lease, as after a sleep of the machine; the thread that renews it comes later."""
    ticking, ran = LaterClock(), []

    def overslept() -> None:
        ran.append("a")
        if len(ran) == 1:
            [worker] = opened.do_sync(ListWorkers())
            assert opened.do_sync(GiveUpWorker(worker=worker.id, seen=worker.lease_until))
            ticking.set_forward("1h")
            if fails:
                raise ConnectionError

    @workflow("oversleeps")
    async def oversleeps(step: Step) -> None:
        await step.run("a", overslept, retries=1, backoff=Backoff(base=0, max=0))
        await step.run("b", ran.append, "b")

    run_id = oversleeps.enqueue_sync()
    assert work(opened, home, later=ticking) == "lost lease"
    assert ran == ["a"]
    assert give_back(opened, home) == 1
    work(opened, home, later=ticking)
    assert shown(opened, run_id)["status"] == "succeeded"
    assert ran == (["a", "a", "b"] if fails else ["a", "b"])


def test_a_worker_that_was_given_up_while_idle_holds_no_run_under_its_old_name(
    opened: StoreThread, home: Home, log: Path
) -> None:
    with worker_process(home, "--lease", "1s") as worker:
        worker.up()
        stop_past_its_lease(worker, opened, home)
        run_id = orders.two_steps.enqueue_sync(Case(str(log)))
        worker.kill(signal.SIGCONT)
        until(lambda: status(opened, run_id)[0] == "succeeded", 30)
        assert shown(opened, run_id)["attempts"][-1]["worker"] in workers(opened)
    assert bodies(log) == ["a", "b"]


def test_a_stale_attempt_does_not_try_its_failed_step_again(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated_failure.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1s") as worker:
        open_gate(gate)
        until(lambda: worker.events("step.retrying"))
        stop_past_its_lease(worker, opened, home)
        work(opened, home)
        assert shown(opened, run_id)["status"] == "succeeded"
        worker.kill(signal.SIGCONT)
        until(lambda: worker.pid in workers(opened).values(), 30)
        following = orders.answers.enqueue_sync("done")
        until(lambda: status(opened, following)[0] == "succeeded")
    assert bodies(log) == ["a", "a"]


@pytest.mark.parametrize("moment", [GiveUpWorker, RunsOf, Apply, RemoveWorker])
def test_a_worker_that_wakes_while_it_is_given_up_keeps_its_runs_or_learns_that_it_is_lost(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch, moment: type[Operation[Any]]
) -> None:
    """It renews its lease between the look that found it lapsed and one of the writes that take its runs away."""
    execute = SqliteStore.execute
    renewed: list[bool] = []

    def wake_up_then_execute(self: SqliteStore, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        if not renewed and any(isinstance(op, moment) for op in batch):
            [held], _ = execute(self, [RenewLease(worker=worker_id, until=now() + clock.MINUTE)])
            renewed.append(held)
        return execute(self, batch)

    run_id = orders.answers.enqueue_sync("x")
    env = {"DIE": "ClaimRuns after", "MARKER": str(home.data_dir / "died")}
    with worker_process(home, "--lease", "1s", script="dying_worker.py", env=env) as worker:
        worker.ended()
    [worker_id] = workers(opened)
    (home.app_dir / "workers" / worker_id).unlink()  # as on another machine: only the lease tells
    monkeypatch.setattr(SqliteStore, "execute", wake_up_then_execute)
    given_back = give_back(opened, home, now() + 2 * clock.SECOND)
    monkeypatch.undo()
    still_its_own = status(opened, run_id) == ("running", "claimed")
    assert renewed == [still_its_own]
    assert given_back == (not still_its_own)
    assert still_its_own == (moment is GiveUpWorker)


def test_neither_a_blocked_event_loop_nor_a_blocked_handler_costs_the_lease(
    opened: StoreThread, home: Home, log: Path, gate: Path
) -> None:
    run_id = orders.gated_loop.enqueue_sync(Case(str(log), gate=str(gate)))
    with worker_process(home, "--lease", "1s"):
        until(lambda: bodies(log) == ["loop"])
        began = now()
        until(lambda: opened.do_sync(ListWorkers())[0].lease_until > began + 2 * clock.SECOND)
        assert give_back(opened, home) == 0
        open_gate(gate)
        until(lambda: status(opened, run_id)[0] == "succeeded")
    run = shown(opened, run_id)
    assert [a["outcome"] for a in run["attempts"]] == ["succeeded"]
    assert bodies(log) == ["loop", "b"]


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


# --- any number of random kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kills", "runs"), [(12, 60), pytest.param(200, 500, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_whatever_is_killed_every_run_ends_once_and_nothing_is_stuck(
    opened: StoreThread, home: Home, log: Path, kills: int, runs: int
) -> None:
    """Under a supervisor, whose workers are killed at random moments while runs keep coming in."""
    dice = random.Random(kills)
    ids: list[str] = []
    with supervised(home, idle_timeout=clock.MINUTE) as supervisor:
        killed = 0
        for n in range(kills):
            ids += orders.many_lives.enqueue_many_sync([str(log)] * ((n + 1) * runs // kills - len(ids)))
            [pid] = until(lambda last=killed: {pid for pid in workers(opened).values() if not gone(pid)} - {last})
            threading.Event().wait(dice.uniform(0, 0.15))  # any moment of its life may be its last
            os.kill(pid, signal.SIGKILL)
            killed = pid
        until(lambda: Control(opened).counts() == {}, 120)
        until(lambda: len(supervisor.events("worker.died")) == kills)
    bodies_by_step: dict[str, list[str]] = {}
    for line in bodies(log):
        bodies_by_step.setdefault(line.rpartition("/")[0], []).append(line)
    for run_id in ids:
        run = shown(opened, run_id)
        assert run["status"] == "succeeded", run
        outcomes = [a["outcome"] for a in run["attempts"]]
        assert outcomes == ["lost"] * (len(outcomes) - 1) + ["succeeded"]
        assert run["result"] == [bodies_by_step[f"{run_id}/{name}"][-1] for name in ("one", "two", "three")]
        extra = sum(len(bodies_by_step[f"{run_id}/{name}"]) - 1 for name in ("one", "two", "three"))
        assert extra <= len(outcomes) - 1, "a lost attempt costs at most one body"
    assert len(bodies_by_step) == 3 * runs
    db = apsw.Connection(str(home.app_dir / "runs.db"))
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("SELECT count(*) FROM runs WHERE status = 'running' OR ready IS NOT NULL").fetchall() == [(0,)]
    db.close()


def test_where_a_worker_was_is_read_from_its_file_and_one_of_another_release_says_nothing(home: Home) -> None:
    """A wrong place would be worse than none: an operator goes by it."""
    held = InFlight(home.app_dir, "w-1", room=3)
    slots = [held.take(seq) for seq in (7, 8, 9)]
    slots[0].note("charge", 1_000)
    slots[1].note("ü" * 500, 2_000)
    where = places(home.app_dir, "w-1")
    assert where(7) == ("in step charge", 1_000)
    assert where(8) == (f"in step {'ü' * 120}", 2_000)
    assert where(9) == ("before its first step", None)
    slots[0].give_up()
    assert places(home.app_dir, "w-1")(7) == ("before its first step", None)
    (home.app_dir / "workers" / "w-0").write_bytes(b"7 1000 in step charge".ljust(256, b"\0"))
    assert places(home.app_dir, "w-0")(7) == ("", None)
    held.close()


def test_a_workers_file_of_places_has_its_room_on_the_disk_from_the_start(home: Home) -> None:
    """Writing into a hole of a mapped file ends the process where the disk is full (SIGBUS)."""
    held = InFlight(home.app_dir, "w-1", room=100)
    try:
        taken = (home.app_dir / "workers" / "w-1").stat()
        assert taken.st_blocks * 512 >= taken.st_size > 0
    finally:
        held.close()
