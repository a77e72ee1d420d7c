"""Worker groups and scale to zero: real processes, one enqueue at a time, and many at the worst of times."""

import os
import random

import pytest
from conftest import until
from scenarios.flows import orders
from scenarios.flows.orders import Case
from workers import bodies, gone, now, shown, status, supervised, tamper, workers

from tako_runtime import clock
from tako_runtime.control import Control
from tako_runtime.store import Home
from tako_runtime.store.base import Enqueue
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

SHORT = clock.SECOND // 5


def done(opened: StoreThread, run_id: str) -> bool:
    return bool(shown(opened, run_id)["finished_at"])


# --- groups ----------------------------------------------------------------------------------------------------------


def test_a_group_full_of_long_runs_does_not_hold_up_another(opened: StoreThread, home: Home) -> None:
    """`media` has one slot, which is taken, and work that waits; an `email` run starts meanwhile."""
    log, gate = home.data_dir / "bodies", home.data_dir / "gate"
    os.mkfifo(gate)
    with supervised(home, name="media", concurrency=1) as supervisor:
        long = [orders.in_media.enqueue_sync(Case(str(log), gate=str(gate))) for _ in range(20)]
        until(lambda: bodies(log) == ["media"])
        mail = orders.in_email.enqueue_sync()
        until(lambda: done(opened, mail))
        found = Control(opened).find(mail)
        assert found.started_at is not None
        assert found.started_at - found.created_at < clock.SECOND
        assert {status(opened, run_id)[0] for run_id in long} == {"running", "pending"}
        assert bodies(log) == ["media"]
        assert sorted(event["group"] for event in supervisor.events("worker.spawned")) == ["email", "media"]
        with gate.open("wb"):
            pass
        until(lambda: Control(opened).counts() == {})
    assert len(bodies(log)) == 20


def test_a_worker_runs_the_workflows_of_its_group_and_no_other(opened: StoreThread, home: Home) -> None:
    """A run that stands in the wrong group, as after a workflow has moved, is not taken by that group's worker."""
    moved = new_run("answers", "email", '"x"', now=now(), due=now(), retries=0, backoff_base=1, backoff_max=1)
    [stray] = opened.do_sync(Enqueue(runs=[moved], now=now()))
    with supervised(home, name="email") as supervisor:
        mail = orders.in_email.enqueue_sync()
        until(lambda: done(opened, mail))
        [started] = supervisor.events("worker.started")
        assert started["workflows"] == "in-email"
    assert status(opened, stray) == ("pending", "queued")


def test_each_group_has_its_own_processes_concurrency_and_idle_time(opened: StoreThread, home: Home) -> None:
    others = {"workers": 2, "concurrency": 3}
    with supervised(home, concurrency=7, idle_timeout=SHORT, others=others) as supervisor:
        mail, other = orders.in_email.enqueue_sync(), orders.answers.enqueue_sync("x")
        until(lambda: done(opened, mail) and done(opened, other))
        until(lambda: supervisor.events("worker.stopped"))
        until(lambda: len(supervisor.events("worker.started")) == 3)
        assert sorted((e["group"], e["concurrency"]) for e in supervisor.events("worker.started")) == [
            ("default", 7), ("email", 3), ("email", 3),
        ]  # fmt: skip
        assert [event["group"] for event in supervisor.events("worker.stopped")] == ["default"]


# --- scale to zero ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_idle_time_counts_from_the_last_activity(opened: StoreThread, home: Home) -> None:
    """Runs that come one after the other, over more than the idle time, are all done by the process of the first."""
    with supervised(home, idle_timeout=2 * clock.SECOND) as supervisor:
        for n in range(6):
            run_id = orders.answers.enqueue_sync(f"{n}", delay="0.6s")
            until(lambda run_id=run_id: done(opened, run_id))
        last = now()
        until(lambda: supervisor.events("worker.stopped"))
        assert len(supervisor.spawned) == 1
        assert now() - last >= clock.SECOND


def test_parked_runs_and_those_of_the_future_do_not_hold_up_a_workers_end(opened: StoreThread, home: Home) -> None:
    with supervised(home, idle_timeout=SHORT) as supervisor:
        sleeps = orders.sleeps.enqueue_sync("1h")
        waits = orders.waits.enqueue_sync(("approval", "7d"))
        for_ever = orders.waits.enqueue_sync(("approval", None))
        future = orders.answers.enqueue_sync("x", delay="1h")
        until(lambda: supervisor.events("worker.stopped"))
        until(lambda: all(gone(pid) for pid in supervisor.spawned))
        reasons = {status(opened, each) for each in (sleeps, waits, for_ever)}
        assert reasons == {("pending", "sleeping"), ("pending", "waiting")}
        assert status(opened, future)[0] == "pending"
        assert len(supervisor.spawned) == 1, "and start no other"


def test_a_sleep_that_comes_due_wakes_its_run_with_no_process_there(opened: StoreThread, home: Home) -> None:
    with supervised(home, idle_timeout=SHORT) as supervisor:
        run_id = orders.sleeps.enqueue_sync("1h")
        until(lambda: supervisor.events("worker.stopped"))
        until(lambda: gone(supervisor.spawned[0]))
        soon = now() + clock.SECOND
        tamper(home, f"UPDATE steps SET due_at = {soon}; UPDATE runs SET due_at = {soon}")  # noqa: S608
        until(lambda: done(opened, run_id))
        assert len(supervisor.spawned) == 2


@pytest.mark.slow
def test_a_sleep_of_half_a_minute_parks_and_wakes_by_itself(opened: StoreThread, home: Home) -> None:
    with supervised(home, idle_timeout=SHORT) as supervisor:
        run_id = orders.sleeps.enqueue_sync("31s")
        until(lambda: done(opened, run_id), 90)
        assert len(supervisor.spawned) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_an_enqueue_in_the_moment_of_a_workers_exit_runs_soon_all_the_same(
    opened: StoreThread, home: Home, seed: int
) -> None:
    """Thirty exits, each met a little earlier or later: on its way out, just gone, and before it knows."""
    chance = random.Random(seed)
    with supervised(home, idle_timeout=SHORT) as supervisor:
        first = orders.answers.enqueue_sync("first")
        until(lambda: done(opened, first))
        for n in range(30):
            idle = now()
            meet = idle + SHORT + chance.randint(-30_000, 30_000)
            until(lambda meet=meet: now() >= meet)
            run_id = orders.answers.enqueue_sync(f"{n}")
            until(lambda run_id=run_id: done(opened, run_id), 10)
            run = Control(opened).find(run_id)
            assert run.started_at is not None
            assert run.started_at - run.created_at < 2 * clock.SECOND
        assert len(supervisor.events("worker.stopped")) > 3
        assert supervisor.events("worker.died") == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["worker.stopped", "gone"])
def test_an_enqueue_while_the_worker_leaves_starts_the_next_one(opened: StoreThread, home: Home, moment: str) -> None:
    with supervised(home, idle_timeout=SHORT) as supervisor:
        for n in range(1, 6):
            before = orders.answers.enqueue_sync("before")
            until(lambda before=before: done(opened, before))
            until(lambda n=n: len(supervisor.events("worker.stopped")) >= n)
            if moment == "gone":
                until(lambda: gone(supervisor.spawned[-1]))
            run_id = orders.answers.enqueue_sync("x")
            until(lambda run_id=run_id: done(opened, run_id), 10)
            until(lambda: not workers(opened))
        assert supervisor.events("worker.died") == []
