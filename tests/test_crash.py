"""Workers that are killed, stopped, drained, or cannot write: what a run never loses and a step never does twice."""

import asyncio
import os
import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import (
    LaterClock,
    bodies,
    give_back,
    gone,
    now,
    open_gate,
    shown,
    status,
    steps,
    stop_past_its_lease,
    supervised,
    work,
    worker_process,
    workers,
)

from tako_runtime import Backoff, Step, clock, workflow
from tako_runtime.control import Control
from tako_runtime.run import WorkerRecord
from tako_runtime.state import WorkerLost, settle
from tako_runtime.store import Home
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
    Topics,
)
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore

pytestmark = pytest.mark.usefixtures("only_orders")


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
