"""Two at once: signals against parks and deadlines, enqueues against an idle worker, and all against the store."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import BOTH, FakeClock, finished, script, until
from scenarios.flows import orders
from workers import now, shown, status, worker_process, workers

from tako_runtime import clock
from tako_runtime.control import Control
from tako_runtime.run import Claimed, StepRecord, WorkerRecord
from tako_runtime.state import Waits, settle
from tako_runtime.store import Home, open_store
from tako_runtime.store.base import (
    AddWorker,
    Apply,
    ClaimRuns,
    ExpireWait,
    KeptSignals,
    OpenWait,
    OpenWaits,
    Operation,
    SendSignal,
    Steps,
)
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import registry, signal_sync

STORES = BOTH


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
def second(opened: StoreThread, home: Home) -> Iterator[StoreThread]:
    """The same store, opened once more: its writes race with those of `opened`."""
    thread = open_store(home)
    yield thread
    thread.close()


def together(pool: ThreadPoolExecutor, *calls: tuple[StoreThread, Operation[Any]]) -> list[Any]:
    """Each operation through its own store, let go at the same moment; the answers."""
    barrier = threading.Barrier(len(calls))

    def call(store: StoreThread, op: Operation[Any]) -> Any:
        barrier.wait()
        return store.do_sync(op)

    return [future.result() for future in [pool.submit(call, *each) for each in calls]]


def claimed_runs(opened: StoreThread, count: int, at: int) -> list[Claimed]:
    orders.waits.enqueue_many_sync([("x", None)] * count)
    opened.do_sync(AddWorker(worker=WorkerRecord("w-1", "default", "here", 1, "dev", at, at + clock.DAY)))
    claim = ClaimRuns(worker="w-1", group="default", workflows=["waits"], limit=count, now=at)
    return opened.do_sync(claim)


def test_of_a_signal_and_a_deadline_in_the_same_instant_exactly_one_wins(
    opened: StoreThread, second: StoreThread
) -> None:
    rounds, dice, wins = 1_000, random.Random(7), {"done": 0, "timed_out": 0}
    ticking = FakeClock(now())
    due = ticking.now() + clock.MINUTE
    runs = claimed_runs(opened, rounds, ticking.now())

    async def open_all() -> None:
        await asyncio.gather(*(opened.do(open_wait(claimed, due)) for claimed in runs))

    def open_wait(claimed: Claimed, due: int) -> OpenWait:
        name = f"s{claimed.run.seq}"
        step = StepRecord("wait", name, 1, "waiting", 1, ticking.now(), due_at=due)
        return OpenWait(seq=claimed.run.seq, claim=claimed.run.claim, step=step, signal=name, now=ticking.now())

    asyncio.run(open_all())
    with ThreadPoolExecutor(2) as pool:
        for claimed in runs:
            name, seq = f"s{claimed.run.seq}", claimed.run.seq
            send = SendSignal(name=name, payload='"now"', now=due - dice.randint(0, 1), expires_at=due + clock.DAY)
            expire = ExpireWait(seq=seq, claim=claimed.run.claim, name=name, now=due)
            woken, record = together(pool, (second, send), (opened, expire))
            assert record.status in wins
            wins[record.status] += 1
            assert woken == (record.status == "done"), "the signal was given to this run, or to nobody"
            assert record.result == (b'"now"' if woken else b"null")
            assert opened.do_sync(Steps(seq=seq)) == [record]
    kept = opened.do_sync(KeptSignals(now=due, limit=rounds + 1))
    assert len(kept) == wins["timed_out"], "what came too late is kept, once"
    assert opened.do_sync(OpenWaits(limit=1)) == []
    assert min(wins.values()) > rounds / 100, f"no race: {wins}"


def test_a_run_that_parks_while_its_signal_comes_is_due_at_once(opened: StoreThread, second: StoreThread) -> None:
    at = now()
    with ThreadPoolExecutor(2) as pool:
        for claimed in claimed_runs(opened, 300, at):
            name, run = f"s{claimed.run.seq}", claimed.run
            step = StepRecord("wait", name, 1, "waiting", 1, at)
            opened.do_sync(OpenWait(seq=run.seq, claim=run.claim, step=step, signal=name, now=at))
            park = Apply(change=settle(run, Waits((name,), None), at))
            send = SendSignal(name=name, payload="1", now=at, expires_at=at + clock.DAY)
            landed, woken = together(pool, (opened, park), (second, send))
            assert (landed, woken) == (True, 1)
            assert status(opened, run.id) == ("pending", "queued")
    assert opened.do_sync(KeptSignals(now=at)) == []


@pytest.mark.parametrize("rounds", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_signal_that_meets_a_parking_run_of_another_process_is_never_lost(
    opened: StoreThread, home: Home, rounds: int
) -> None:
    """Each signal is sent the moment the worker says that its run, or one of a few before it, has begun: before the
    wait, in the park, after it."""
    dice, woken = random.Random(7), []
    ids = orders.waits.enqueue_many_sync([(f"go{n}", None) for n in range(rounds)])
    send_at: dict[str, list[int]] = {run_id: [] for run_id in ids}
    for n in range(rounds):
        send_at[ids[max(0, n - dice.choice([0, 1, 2, 4, 20]))]].append(n)
    ours, theirs = os.pipe()
    with open(ours, "rb") as log, worker_process(home, "--concurrency", "4", stdout=theirs):  # noqa: PTH123
        os.close(theirs)
        for line in log:
            event = msgspec.json.decode(line)
            if event["event"] == "run.started":
                woken += [signal_sync(f"go{n}", n) for n in send_at.pop(event["run"])]
                if not send_at:
                    break
        reading = threading.Thread(target=log.read, daemon=True)  # so that the worker does not wait for a reader
        reading.start()
        until(lambda: Control(opened).counts() == {}, 120)
    for n, run_id in enumerate(ids):
        run = shown(opened, run_id)
        assert (run["status"], run["result"], len(run["attempts"])) == ("succeeded", n, 1)
    assert set(woken) == {0, 1}, "some came before the wait, some after"
    assert opened.do_sync(KeptSignals(now=now())) == []


@pytest.mark.parametrize("rounds", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_a_signal_about_the_deadline_of_a_real_worker_is_taken_or_kept_never_both(
    opened: StoreThread, home: Home, rounds: int
) -> None:
    dice, woken = random.Random(7), []
    with worker_process(home, "--concurrency", "20") as worker:
        worker.up()
        ids = orders.waits.enqueue_many_sync([(f"s{n}", f"{300 + 10 * n}ms") for n in range(rounds)])
        for n, run_id in enumerate(ids):
            [wait] = until(lambda run_id=run_id: shown(opened, run_id)["steps"])
            left = (clock.instant(datetime.fromisoformat(wait["until"])) - now()) / clock.SECOND
            threading.Event().wait(max(0, left + dice.uniform(-0.004, 0.002)))  # aim at the instant
            woken.append(signal_sync(f"s{n}", n))
        until(lambda: Control(opened).counts() == {}, 60)
    kept = {signal.name for signal in opened.do_sync(KeptSignals(now=now(), limit=rounds + 1))}
    for n, run_id in enumerate(ids):
        run = shown(opened, run_id)
        assert run["status"] == "succeeded"
        assert run["result"] == (n if woken[n] else None)
        assert (f"s{n}" in kept) == (not woken[n])


# --- wake-ups --------------------------------------------------------------------------------------------------------


def test_an_idle_worker_hears_of_each_enqueue_at_once(opened: StoreThread, home: Home) -> None:
    """Twenty in a row: with the look once a second alone, they would take twenty seconds."""
    control = Control(opened)
    with worker_process(home) as worker:
        worker.up()
        began = time.monotonic()
        for n in range(20):
            run_id = orders.answers.enqueue_sync(f"{n}")
            assert control.wait(control.find(run_id))["status"] == "succeeded"
        assert time.monotonic() - began < 8


def test_a_worker_notices_an_enqueue_whose_bell_nobody_could_ring(opened: StoreThread, home: Home) -> None:
    with worker_process(home) as worker:
        worker.up()
        for socket in (home.app_dir / "bell").iterdir():
            socket.unlink()
        run_id = orders.answers.enqueue_sync("x")
        until(lambda: status(opened, run_id)[0] == "succeeded")


def test_a_worker_wakes_for_a_due_run_by_itself(opened: StoreThread, home: Home) -> None:
    with worker_process(home) as worker:
        worker.up()
        run_id = orders.answers.enqueue_sync("x", delay="300ms")
        until(lambda: status(opened, run_id)[0] == "succeeded")
    run = shown(opened, run_id)
    assert run["started_at"] >= run["run_at"]


def test_a_worker_leaves_when_it_has_been_idle_for_long(opened: StoreThread, home: Home) -> None:
    run_id = orders.answers.enqueue_sync("x")
    parked = orders.waits.enqueue_sync(("never", None))
    with worker_process(home, "--idle-timeout", "300ms") as worker:
        assert worker.ended() == 0
        assert worker.events("worker.stopped")[0]["reason"] == "idle"
    assert shown(opened, run_id)["status"] == "succeeded"
    assert status(opened, parked) == ("pending", "waiting")
    assert workers(opened) == {}
    assert list((home.app_dir / "bell").iterdir()) == []
    assert list((home.app_dir / "workers").iterdir()) == []


def test_a_worker_of_one_group_starts_nothing_of_another(opened: StoreThread, home: Home) -> None:
    mailed, other = orders.in_email.enqueue_sync(), orders.answers.enqueue_sync("x")
    with worker_process(home, "--group", "email", "--idle-timeout", "200ms") as worker:
        assert worker.ended() == 0
    assert shown(opened, mailed)["status"] == "succeeded"
    assert status(opened, other) == ("pending", "queued")


def test_two_workers_share_the_runs_and_none_is_done_twice(opened: StoreThread, home: Home) -> None:
    ids = orders.answers.enqueue_many_sync([f"{n}" for n in range(400)])
    with (
        worker_process(home, "--idle-timeout", "100ms") as one,
        worker_process(home, "--idle-timeout", "100ms") as other,
    ):
        assert (one.ended(), other.ended()) == (0, 0)
        begun = [event["run"] for worker in (one, other) for event in worker.events("run.started")]
    assert sorted(begun) == sorted(ids)
    assert {shown(opened, run_id)["status"] for run_id in ids} == {"succeeded"}


# --- many at once ----------------------------------------------------------------------------------------------------


def test_no_locked_database_reaches_anyone(opened: StoreThread, home: Home) -> None:
    """Eight processes enqueue, signal and list while a worker saves."""
    with worker_process(home) as worker:
        worker.up()
        crowd = [script(CROWD, 2, n, home=home, cwd=Path(__file__).parent) for n in range(8)]
        counts = [int(finished(process, 60)) for process in crowd]
        assert min(counts) > 0
        until(lambda: Control(opened).counts() == {}, 120)
        assert worker.events("store.busy") == []
    done = Control(opened).list_runs(statuses=["succeeded"], limit=sum(counts) + 1)
    kept = opened.do_sync(KeptSignals(now=now(), limit=sum(counts) + 1))
    assert (len(done), len(kept)) == (sum(counts), sum(counts))


CROWD = """
    import sys, time
    from scenarios.flows.orders import answers
    from tako_runtime import signal_sync, store
    from tako_runtime.control import Control
    seconds, n = int(sys.argv[1]), int(sys.argv[2])
    control, rounds, end = Control(store.current()), 0, time.monotonic() + int(sys.argv[1])
    while time.monotonic() < end:
        run_id = answers.enqueue_sync("x")
        signal_sync(f"s{n}", rounds)
        assert control.find(run_id).id == run_id
        control.list_runs(limit=5)
        rounds += 1
    print(rounds)
"""
