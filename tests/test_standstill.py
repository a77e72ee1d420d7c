"""A run parks when every branch of its handler sleeps or waits, and not while one of them can still move."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from workers import eventually, shown, status, steps, work

from tako_runtime import Step, SyncStep, signal, workflow
from tako_runtime.branches import QUIET_PASSES
from tako_runtime.store import Home
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Worker
from tako_runtime.workflow import signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")


class Answer:
    """What a branch awaits between two of its steps, until the test gives it."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        self._given = threading.Event()

    async def over_a_socket(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._there)
        await reader.readexactly(1)
        writer.close()

    async def from_a_thread(self) -> None:
        await asyncio.to_thread(self._given.wait, 30)

    async def within_a_time_limit(self) -> None:
        await asyncio.wait_for(self.over_a_socket(), 30)

    async def with_wait_from_a_thread(self) -> None:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(None, self._given.wait, 30)])

    async def in_a_task_of_its_own(self) -> None:
        await asyncio.create_task(self.over_a_socket())

    async def beside_one_that_waits_for_it(self) -> None:
        lock = asyncio.Lock()
        async with lock, asyncio.TaskGroup() as group:
            group.create_task(lock.acquire())
            await self.over_a_socket()
            lock.release()

    def give(self) -> None:
        self._given.set()
        self._here.send(b"1")

    def close(self) -> None:
        self._here.close()
        self._there.close()


@pytest.mark.parametrize(
    "awaited",
    [
        Answer.over_a_socket,
        Answer.from_a_thread,
        Answer.within_a_time_limit,
        Answer.with_wait_from_a_thread,
        Answer.in_a_task_of_its_own,
        Answer.beside_one_that_waits_for_it,
    ],
    ids=lambda fn: fn.__name__,
)
def test_a_branch_that_awaits_something_of_its_own_goes_on_beside_one_that_waits(
    opened: StoreThread, home: Home, request: pytest.FixtureRequest, awaited: Callable[[Answer], Awaitable[None]]
) -> None:
    answer = Answer()
    request.addfinalizer(answer.close)
    passes: list[int] = []

    @workflow("own-await")
    async def handler(step: Step) -> list[Any]:
        passes.append(1)

        async def asking() -> str:
            await step.run("before", lambda: None)
            if len(passes) == 1:
                await awaited(answer)
            return await step.run("after", lambda: "asked")

        return await asyncio.gather(step.wait_for("go"), asking())

    run_id = handler.enqueue_sync()

    async def meanwhile(worker: Worker) -> None:
        await eventually(lambda: steps(shown(opened, run_id)) == {"go": "waiting", "before": "done"})
        for _ in range(10 * QUIET_PASSES):
            await asyncio.sleep(0)
        assert status(opened, run_id)[0] == "running"
        answer.give()
        await eventually(lambda: status(opened, run_id) == ("pending", "waiting"))

    work(opened, home, meanwhile)
    assert steps(shown(opened, run_id)) == {"go": "waiting", "before": "done", "after": "done"}
    assert len(passes) == 1
    signal_sync("go", 7)
    work(opened, home)
    assert shown(opened, run_id)["result"] == [7, "asked"]


async def in_a_task_group(step: Step) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(step.wait_for("a"))
        group.create_task(step.wait_for("b"))


async def in_nested_gathers(step: Step) -> None:
    await asyncio.gather(asyncio.gather(step.wait_for("a"), step.sleep("1h")), step.wait_for("b"))


async def with_wait(step: Step) -> None:
    await asyncio.wait([asyncio.create_task(step.wait_for(name)) for name in "ab"])


async def as_completed(step: Step) -> None:
    for done in asyncio.as_completed([step.wait_for("a"), step.wait_for("b")]):
        await done


async def behind_a_lock(step: Step) -> None:
    lock = asyncio.Lock()

    async def one_after_the_other(name: str) -> None:
        async with lock:
            await step.wait_for(name)

    await asyncio.gather(one_after_the_other("a"), one_after_the_other("b"))


async def at_a_queue(step: Step) -> None:
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def put() -> None:
        await queue.put(await step.wait_for("a"))

    await asyncio.gather(put(), queue.get())


async def for_a_task_that_is_awaited_late(step: Step) -> None:
    waiting = asyncio.create_task(step.wait_for("a"))
    await asyncio.to_thread(lambda: None)
    await waiting


async def beside_a_task_that_has_ended(step: Step) -> None:
    ended = asyncio.create_task(asyncio.sleep(0))
    await step.wait_for("a")
    await ended


@pytest.mark.parametrize(
    "waits",
    [
        in_a_task_group,
        in_nested_gathers,
        with_wait,
        for_a_task_that_is_awaited_late,
        beside_a_task_that_has_ended,
    ],
    ids=lambda fn: fn.__name__,
)
def test_a_run_parks_whatever_its_branches_wait_for_each_other_with(
    opened: StoreThread, home: Home, waits: Callable[[Step], Awaitable[None]]
) -> None:
    @workflow("together")
    async def handler(step: Step) -> None:
        await waits(step)

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("pending", "waiting")


@pytest.mark.parametrize("meets", [as_completed, behind_a_lock, at_a_queue], ids=lambda fn: fn.__name__)
def test_a_run_keeps_its_slot_where_something_outside_of_it_might_wake_a_branch(
    opened: StoreThread, home: Home, meets: Callable[[Step], Awaitable[None]]
) -> None:
    """A semaphore that all runs share, an event that a timer sets: asyncio does not say who will."""
    passes: list[int] = []

    @workflow("might-be-woken")
    async def handler(step: Step) -> None:
        passes.append(1)
        await meets(step)

    run_id = handler.enqueue_sync()

    async def meanwhile(worker: Worker) -> None:
        await eventually(lambda: "a" in steps(shown(opened, run_id)))
        for _ in range(10 * QUIET_PASSES):
            await asyncio.sleep(0)
        assert status(opened, run_id)[0] == "running"
        for name in "ab":
            await signal(name)
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, meanwhile)
    assert len(passes) == 1


def test_a_task_of_a_step_body_that_lives_on_does_not_keep_its_run_from_parking(
    opened: StoreThread, home: Home
) -> None:
    pool: list[asyncio.Task[None]] = []

    async def connect() -> None:
        pool.append(asyncio.create_task(asyncio.sleep(3600)))  # as a connection pool keeps one

    @workflow("pooled")
    async def handler(step: Step) -> None:
        await step.run("connect", connect)
        await step.wait_for("go")

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("pending", "waiting")


def test_a_plain_handler_parks_from_its_thread(opened: StoreThread, home: Home) -> None:
    @workflow("plain")
    def handler(step: SyncStep) -> Any:
        return step.wait_for("go")

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("pending", "waiting")
