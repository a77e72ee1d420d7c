"""Steps at the same time: gather and task groups, beside parks, failures and ends."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from workers import eventually, now, result, shown, status, steps, work

from tako_runtime import Backoff, Step, SyncStep, signal, workflow
from tako_runtime.control import Control
from tako_runtime.run import Claimed, StepRecord, WorkerRecord
from tako_runtime.state import WorkerLost, settle
from tako_runtime.store import Home
from tako_runtime.store.base import AddWorker, Apply, ClaimRuns, Operation, SaveStep, SendSignal, Topics
from tako_runtime.store.base import Steps as ReadSteps
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.worker import Worker
from tako_runtime.workflow import signal_op, signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")

AT_ONCE = Backoff(base=0, max=0)


def test_gathered_steps_run_at_the_same_time(opened: StoreThread, home: Home) -> None:
    both = threading.Barrier(2, timeout=30)

    @workflow("fan-out")
    async def handler(step: Step) -> list[str]:
        async def met() -> str:
            await asyncio.to_thread(both.wait)
            return "async"

        def met_in_thread() -> str:
            both.wait()
            return "thread"

        return await asyncio.gather(step.run("a", met), step.run("b", met_in_thread))

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert result(opened, run_id) == ["async", "thread"]


def test_a_task_group_of_chains_keeps_every_step(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []

    @workflow("group", backoff=AT_ONCE)
    async def handler(step: Step) -> list[str]:
        async def chain(name: str) -> str:
            for n in range(3):
                await step.run(f"{name}{n}", lambda n=n: bodies.append(f"{name}{n}"))
            return name

        async with asyncio.TaskGroup() as group:
            chains = [group.create_task(chain(name)) for name in "abc"]
        if step.attempt == 1:
            raise ConnectionError
        return [task.result() for task in chains]

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert result(opened, run_id) == ["a", "b", "c"]
    assert sorted(bodies) == sorted(f"{name}{n}" for name in "abc" for n in range(3))


def test_two_gathered_steps_that_fail_both_run_again(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []
    both = threading.Barrier(2, timeout=30)

    def body(name: str) -> str:
        bodies.append(name)
        if bodies.count(name) == 1:
            both.wait()
            raise ConnectionError(name)
        return name

    @workflow("both-fail", backoff=AT_ONCE)
    async def handler(step: Step) -> list[str]:
        done = await step.run("done", body_done)
        return [done, *await asyncio.gather(step.run("a", body, "a"), step.run("b", body, "b"))]

    def body_done() -> str:
        bodies.append("done")
        return "done"

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert result(opened, run_id) == ["done", "a", "b"]
    assert sorted(bodies) == ["a", "a", "b", "b", "done"]


def test_a_step_beside_one_that_fails_ends_and_keeps_its_result(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []
    failed = threading.Event()

    def slow() -> str:
        bodies.append("slow")
        failed.wait(30)
        return "slow"

    async def fails() -> None:
        bodies.append("fails")
        if bodies.count("fails") == 1:
            asyncio.get_running_loop().call_later(0.05, failed.set)
            raise ConnectionError

    @workflow("one-fails", backoff=AT_ONCE)
    async def handler(step: Step) -> list[Any]:
        return await asyncio.gather(step.run("slow", slow), step.run("fails", fails))

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert result(opened, run_id) == ["slow", None]
    assert sorted(bodies) == ["fails", "fails", "slow"]


def test_a_step_beside_one_that_parks_keeps_its_result(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []

    def work_hard() -> str:
        bodies.append("work")
        return "worked"

    @workflow("beside")
    async def handler(step: Step) -> list[Any]:
        return await asyncio.gather(step.sleep("1h"), step.run("work", work_hard), step.wait_for("x", timeout="2h"))

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = shown(opened, run_id)
    assert run["status"] == "pending"
    assert steps(run) == {"sleep": "sleeping", "work": "done", "x": "waiting"}
    signal_sync("x", 7)
    work(opened, home, later="61m")
    assert result(opened, run_id) == [None, "worked", 7]
    assert bodies == ["work"]


def test_a_chain_beside_one_that_waits_runs_to_its_end_before_the_run_parks(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []

    def in_thread(n: int) -> None:
        bodies.append(f"b{n}")

    async def in_loop(n: int) -> None:
        bodies.append(f"b{n}")

    @workflow("chains")
    async def handler(step: Step) -> list[Any]:
        async def waiting() -> Any:
            got = await step.wait_for("go")
            return await step.run("a", lambda: f"a{got}")

        async def going() -> str:
            for n in range(6):
                async with asyncio.TaskGroup() as group:  # a few passes of the loop between two steps
                    group.create_task(step.run("b", in_loop if n % 2 else in_thread, n))
                await step.sleep("1ms")
            return "b"

        return await asyncio.gather(waiting(), going())

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["reason"], bodies) == ("waiting", [f"b{n}" for n in range(6)])
    signal_sync("go", 1)
    work(opened, home)
    assert result(opened, run_id) == ["a1", "b"]
    assert len(bodies) == 6


@pytest.mark.parametrize("main_sleeps", [True, False])
def test_after_a_crash_a_chain_still_runs_beside_a_stored_sleep(
    opened: StoreThread, home: Home, main_sleeps: bool
) -> None:
    """The first worker died once the sleep was stored and before the chain's first step was."""

    @workflow("reborn")
    async def handler(step: Step) -> None:
        async def chain() -> None:
            for n in range(3):
                await step.run(f"c{n}", lambda: None)

        async with asyncio.TaskGroup() as group:
            group.create_task(chain())
            if main_sleeps:
                await step.sleep("1h")
            else:
                group.create_task(step.sleep("1h"))

    run_id = handler.enqueue_sync()
    claimed = claim(opened, "reborn")
    at = now()
    sleep = StepRecord("sleep", "sleep", 1, "sleeping", 1, at, due_at=at + 3_600_000_000)
    opened.do_sync(SaveStep(seq=claimed.run.seq, claim=claimed.run.claim, step=sleep))
    opened.do_sync(Apply(change=settle(claimed.run, WorkerLost(), at)))
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["status"], run["reason"]) == ("pending", "sleeping")
    assert steps(run) == {"sleep": "sleeping", "c0": "done", "c1": "done", "c2": "done"}


def claim(opened: StoreThread, name: str) -> Claimed:
    """As a worker of this machine that is gone a moment later."""
    opened.do_sync(AddWorker(worker=WorkerRecord("w-gone", "default", "here", 0, "dev", now(), now())))
    [claimed] = opened.do_sync(ClaimRuns(worker="w-gone", group="default", workflows=[name], limit=1, now=now()))
    return claimed


def test_a_signal_during_another_chains_long_step_is_taken_in_the_same_attempt(opened: StoreThread, home: Home) -> None:
    taken = threading.Event()
    attempts: list[int] = []

    @workflow("meanwhile")
    async def handler(step: Step) -> list[Any]:
        attempts.append(1)

        async def waiting() -> Any:
            got = await step.wait_for("go")
            await step.run("taken", taken.set)
            return got

        async def long() -> bool:
            return await step.run("long", taken.wait, 30)

        return await asyncio.gather(waiting(), long())

    run_id = handler.enqueue_sync()

    async def send(worker: Worker) -> None:
        await eventually(lambda: shown(opened, run_id)["waiting_for"])
        assert await signal("go", 5) == 1
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, send)
    assert result(opened, run_id) == [5, True]
    assert len(attempts) == 1


def test_a_signal_that_comes_while_the_worker_looks_for_another_is_not_overlooked(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is committed right after the look that the first one caused has read the steps; both in this
    process, whose own writes no later look would notice."""
    monkeypatch.setattr("tako_runtime.store.commit.AT_ONCE", -1)  # the loop does not carry the look out itself
    taken = threading.Event()
    execute = SqliteStore.execute
    second: list[SendSignal] = []

    def execute_then_signal(self: SqliteStore, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        done = execute(self, batch)
        if (
            second
            and any(isinstance(op, ReadSteps) for op in batch)
            and threading.current_thread().name == "tako-store"
        ):
            _, topics = execute(self, [second.pop()])
            opened.bell.ring(topics)
        return done

    @workflow("two-signals")
    async def handler(step: Step) -> list[Any]:
        async def waiting() -> Any:
            got = await step.wait_for("b")
            taken.set()
            return got

        return await asyncio.gather(step.wait_for("a"), waiting(), step.run("long", taken.wait, 30))

    run_id = handler.enqueue_sync()

    async def send(worker: Worker) -> None:
        await eventually(lambda: len(shown(opened, run_id)["waiting_for"]) == 2)
        second.append(signal_op("b", 2))
        monkeypatch.setattr(SqliteStore, "execute", execute_then_signal)
        await signal("a", 1)
        await asyncio.to_thread(taken.wait, 5)
        monkeypatch.setattr(SqliteStore, "execute", execute)
        assert taken.is_set()
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, send)
    assert result(opened, run_id) == [1, 2, True]


def test_a_bail_beside_running_steps_ends_the_run_and_keeps_their_results(opened: StoreThread, home: Home) -> None:
    bailed = threading.Event()
    later: list[str] = []

    @workflow("bails")
    async def handler(step: Step) -> None:
        async def bail() -> None:
            asyncio.get_running_loop().call_later(0.05, bailed.set)
            step.bail("enough")

        async def chain() -> None:
            await step.run("running", bailed.wait, 30)
            await step.run("later", lambda: later.append("ran"))

        await asyncio.gather(chain(), step.wait_for("x"), bail())

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = shown(opened, run_id)
    assert (run["status"], run["reason"]) == ("cancelled", "enough")
    assert steps(run)["running"] == "done"
    assert later == []
    assert run["waiting_for"] == []


@pytest.mark.parametrize("wrapped", ["gather", "gather, exceptions returned", "task group"])
def test_a_drain_waits_for_what_is_in_flight_in_any_branch(opened: StoreThread, home: Home, wrapped: str) -> None:
    began, go_on = threading.Event(), threading.Event()
    bodies: list[str] = []

    def slow() -> str:
        bodies.append("slow")
        began.set()
        go_on.wait(30)
        return "slow"

    @workflow("branches")
    async def handler(step: Step) -> None:
        async def chain() -> None:
            for n in range(1000):
                await step.run(f"quick{n}", lambda: None)
                await step.sleep("1ms")

        if wrapped == "task group":
            async with asyncio.TaskGroup() as group:
                group.create_task(chain())
                group.create_task(step.run("slow", slow))
        else:
            await asyncio.gather(chain(), step.run("slow", slow), return_exceptions="returned" in wrapped)

    run_id = handler.enqueue_sync()

    async def drain(worker: Worker) -> None:
        await asyncio.to_thread(began.wait, 30)
        worker.stop()
        asyncio.get_running_loop().call_later(0.2, go_on.set)

    assert work(opened, home, drain) == "drained"
    run = shown(opened, run_id)
    assert (run["status"], run["reason"], run["attempt"]) == ("pending", "queued", 1)
    assert steps(run)["slow"] == "done"
    assert bodies == ["slow"]


def test_a_plain_handler_may_run_steps_in_threads_of_its_own(opened: StoreThread, home: Home) -> None:
    from concurrent.futures import ThreadPoolExecutor

    bodies: list[int] = []

    def body(n: int) -> int:
        bodies.append(n)
        return n

    @workflow("own-threads")
    def handler(step: SyncStep) -> list[Any]:
        with ThreadPoolExecutor(5) as pool:
            waited = pool.submit(step.wait_for, "go", timeout="1h")
            numbers = list(pool.map(lambda n: step.run(f"n{n}", body, n), range(5)))
        return [*numbers, waited.result()]

    run_id = handler.enqueue_sync()
    for _ in range(7):  # it parks whenever all that is in progress waits; each pass does at least one more
        work(opened, home, later="1s")
        signal_sync("nothing")
    signal_sync("go", "went")
    work(opened, home)
    assert result(opened, run_id) == [0, 1, 2, 3, 4, "went"]
    assert sorted(bodies) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ends_by", ["an error of its own", "the cancellation"])
def test_a_body_in_a_thread_whose_caller_is_cancelled_is_seen_through_and_not_run_again(
    opened: StoreThread, home: Home, ends_by: str
) -> None:
    bodies: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def charge() -> str:
        bodies.append("charge")
        begun.set()
        assert go_on.wait(30)
        return "charged"

    async def cancel_once_begun(step: Step) -> None:
        """Leave `charge` in the lurch while its thread runs."""
        running = asyncio.create_task(step.run("charge", charge))
        await asyncio.to_thread(begun.wait)
        running.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        if ends_by == "the cancellation":
            await running
        raise ConnectionError

    @workflow("cut", backoff=AT_ONCE)
    async def handler(step: Step) -> str:
        if step.attempt == 1:
            await cancel_once_begun(step)
        return await step.run("charge", charge)

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert result(opened, run_id) == "charged"
    assert bodies == ["charge"]
    assert [step["attempt"] for step in shown(opened, run_id)["steps"]] == [1]


# --- more branches than threads --------------------------------------------------------------------------------------


def enqueue_many_bodies(gate: threading.Event, bodies: list[int]) -> str:
    """A run of 200 sync branches, more than there are threads, each of which says that it has begun and is held."""

    def body(n: int) -> int:
        bodies.append(n)
        gate.wait(30)
        return n

    @workflow("many")
    async def many(step: Step) -> int:
        return sum(await asyncio.gather(*[step.run(f"branch-{n}", body, n) for n in range(200)]))

    return many.enqueue_sync()


@pytest.mark.parametrize("end", ["cancel", "drain", "lost claim"])
def test_a_body_that_waits_for_a_thread_does_not_begin_once_its_attempt_must_stop(
    end: str, opened: StoreThread, home: Home
) -> None:
    gate, bodies = threading.Event(), []

    run_id = enqueue_many_bodies(gate, bodies)

    async def stop(worker: Worker) -> None:
        threads = worker.bodies._max_workers
        await eventually(lambda: len(bodies) == threads)
        [attempt] = worker._attempts
        match end:
            case "cancel":
                await asyncio.to_thread(Control(opened).cancel, run_id)
                await eventually(lambda: attempt._stop is not None)
            case "drain":
                worker.stop()
                await eventually(lambda: attempt._stop is not None)
            case "lost claim":
                worker._lose_lease()
        gate.set()
        await eventually(lambda: not worker._attempts)
        await asyncio.to_thread(worker.bodies.shutdown)
        bodies.append(threads)

    work(opened, home, stop)
    *begun, threads = bodies
    assert len(begun) == threads
    found = {"cancel": "cancelled", "drain": "pending", "lost claim": "running"}
    assert status(opened, run_id)[0] == found[end]
    assert len(steps(shown(opened, run_id))) <= threads


def test_a_lease_in_doubt_delays_the_bodies_that_wait_and_loses_none(opened: StoreThread, home: Home) -> None:
    """As after a machine that slept: the store says that the lease holds, and they begin."""
    gate, bodies, asked = threading.Event(), [], []

    run_id = enqueue_many_bodies(gate, bodies)

    async def suspend(worker: Worker) -> None:
        await eventually(lambda: len(bodies) == worker.bodies._max_workers)
        confirm = worker.confirm_lease

        async def asks() -> bool:
            asked.append(True)
            return await confirm()

        worker.confirm_lease = asks  # type: ignore[method-assign]
        worker.lease_until = 0
        gate.set()
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, suspend)
    assert result(opened, run_id) == sum(range(200))
    assert sorted(bodies) == list(range(200))
    assert asked
