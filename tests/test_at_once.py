"""Who carries a batch out on the embedded store: the loop of a worker where all in it wait for it, else the thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import Carried, lock_held, whose
from workers import eventually, result, work

from tako_runtime import Step, SyncStep, workflow
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Worker

pytestmark = pytest.mark.usefixtures("clean_registry")


def test_what_all_runs_of_a_worker_wait_for_its_loop_carries_out(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("together")
    async def handler(n: int, step: Step) -> int:
        async def body() -> int:
            return n

        return await step.run("first", body) + await step.run("second", body)

    ids = handler.enqueue_many_sync([1, 2, 3])
    work(opened, home)
    assert [result(opened, each) for each in ids] == [2, 4, 6]
    assert set(whose(carried, base.SaveStep)) == set(whose(carried, base.Apply)) == {"loop"}
    assert [kinds.count(base.SaveStep) for _, kinds in carried if base.SaveStep in kinds] == [3, 3]


def test_a_loop_does_not_wait_for_the_disk_while_another_run_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    both, saved = asyncio.Barrier(2), asyncio.Event()

    @workflow("busy")
    async def busy(step: Step) -> None:
        await both.wait()
        await step.run("long", saved.wait)

    @workflow("saves")
    async def saves(step: Step) -> None:
        async def body() -> None: ...

        await both.wait()
        await step.run("first", body)
        await step.run("second", body)
        saved.set()

    busy.enqueue_sync()
    saves.enqueue_sync()
    work(opened, home, concurrency=2)
    assert whose(carried, base.SaveStep)[:2] == ["thread", "thread"]


def test_a_loop_does_not_wait_for_the_disk_while_another_branch_of_the_same_run_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("branches")
    async def handler(step: Step) -> None:
        async def body() -> None: ...

        saved = asyncio.Event()

        async def saves() -> None:
            await asyncio.gather(step.run("first", body), step.run("beside", body))
            await step.run("second", body)
            saved.set()

        await asyncio.gather(saves(), saved.wait())
        await step.run("alone", body)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep) == ["thread", "thread", "thread", "loop"]


def test_steps_that_run_in_threads_and_plain_handlers_are_waited_for_by_the_loop_too(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("async-handler")
    async def handler(step: Step) -> None:
        await step.run("in a thread", int)
        await step.run("in another", int)

    @workflow("plain-handler")
    def plain(step: SyncStep) -> None:
        step.run("in a thread", int)
        step.run("in another", int)

    for each in (handler, plain):
        each.enqueue_sync()
        work(opened, home)
    # The first ones may come while the worker asks for what is due next, of which no run knows.
    assert whose(carried, base.SaveStep)[1::2] == whose(carried, base.Apply) == ["loop", "loop"]


def test_the_loop_of_an_app_never_waits_for_the_disk(opened: StoreThread, carried: Carried) -> None:
    @workflow("asked-for")
    async def handler(step: Step) -> None: ...

    asyncio.run(handler.enqueue())
    assert whose(carried, base.Enqueue) == ["thread"]


def test_after_a_slow_batch_the_thread_takes_over_until_one_is_fast_again(
    opened: StoreThread, home: Home, carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "tako_runtime.store.commit.AT_ONCE"

    @workflow("slow-then-fast")
    async def handler(step: Step) -> None:
        async def takes(longest: int) -> None:
            monkeypatch.setattr(limit, longest)

        for longest in (-1, -1, 1 << 60, 1 << 60):
            await step.run("body", takes, longest)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep) == ["loop", "thread", "thread", "loop"]


@contextmanager
def transaction_of_a_tool(path: Path) -> Iterator[None]:
    db = apsw.Connection(str(path))
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.close()


@pytest.mark.parametrize("held", [lock_held, transaction_of_a_tool], ids=["by a writer", "by a tool"])
def test_the_loop_of_a_worker_goes_on_while_somebody_else_holds_the_store(
    opened: StoreThread, home: Home, path: Path, carried: Carried, held: Callable[[Path], AbstractContextManager[None]]
) -> None:
    holding = asyncio.Event()

    @workflow("held-up")
    async def handler(step: Step) -> str:
        async def body() -> str:
            lock.__enter__()
            holding.set()
            return "saved"

        return await step.run("body", body)

    lock = held(path)
    run_id = handler.enqueue_sync()

    async def meanwhile(worker: Worker) -> None:
        await holding.wait()
        await eventually(opened._using.locked)  # the thread waits for its turn: a loop that did would not come here
        lock.__exit__(None, None, None)
        await eventually(lambda: not worker.runs_in_hand)

    work(opened, home, meanwhile)
    assert result(opened, run_id) == "saved"
    assert whose(carried, base.SaveStep)[-1] == "thread"


def test_a_batch_does_not_overtake_what_its_loop_has_sent_before(opened: StoreThread) -> None:
    def keep(n: int) -> "asyncio.Future[int]":
        return opened.do(base.SendSignal(name="order", payload=str(n), now=0, expires_at=1 << 60))

    async def send() -> None:
        opened.outbox().serve([])
        for n in range(0, 100, 2):
            with opened._using:  # the thread takes the first one from its queue, and has to wait
                first = keep(n)
                await eventually(lambda: opened._sent and not opened._queue.qsize())
            await asyncio.gather(first, keep(n + 1))

    asyncio.run(send())
    kept = opened.do_sync(base.KeptSignals(now=0, limit=1_000))
    assert [int(each.payload) for each in kept] == list(range(100))


def test_reading_in_the_loop_takes_no_turn(opened: StoreThread, path: Path, carried: Carried) -> None:
    async def look() -> list[Any]:
        opened.outbox().serve([])
        return await opened.do(base.ListRuns())

    with lock_held(path):
        assert asyncio.run(look()) == []
    assert whose(carried, base.ListRuns) == ["loop"]


def test_a_handler_that_has_left_a_step_to_its_thread_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    begun, left = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        left.wait(20)

    @workflow("leaves-a-step")
    async def handler(step: Step) -> None:
        await step.run("first", int)
        leaving = asyncio.timeout(None)
        with suppress(TimeoutError):
            async with leaving:
                waiting = asyncio.create_task(asyncio.to_thread(begun.wait))
                waiting.add_done_callback(lambda _: leaving.reschedule(0))
                await step.run("slow", slow)
        left.set()
        await eventually(lambda: len(whose(carried, base.SaveStep)) == 2)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep)[1:] == ["thread"]


def test_a_plain_handler_with_threads_of_its_own_is_one_run(opened: StoreThread, home: Home, carried: Carried) -> None:
    both, done = threading.Barrier(2), asyncio.Event()

    @workflow("busy-beside")
    async def busy(step: Step) -> None:
        await asyncio.to_thread(both.wait, 20)
        await done.wait()

    @workflow("threads")
    def plain(step: SyncStep) -> None:
        both.wait(20)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: step.run(f"step {n}", int), range(40)))
        loop.call_soon_threadsafe(done.set)

    async def meanwhile(worker: Worker) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        busy.enqueue_sync()
        plain.enqueue_sync()
        await eventually(lambda: done.is_set() and not worker.runs_in_hand)

    loop: asyncio.AbstractEventLoop
    work(opened, home, meanwhile, concurrency=2)
    assert set(whose(carried, base.SaveStep)) == {"thread"}


def test_a_shared_store_is_never_asked_in_the_loop(opened: StoreThread, carried: Carried) -> None:
    async def look() -> None:
        opened.outbox().serve([])
        await opened.do(base.DataVersion())

    opened.shared = True
    asyncio.run(look())
    assert whose(carried, base.DataVersion) == ["thread"]
