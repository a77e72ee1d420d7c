"""Following runs: what has happened, then what happens, and where that comes from."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from conftest import Caller
from workers import LaterClock, work

from tako_runtime import Step, log, state, workflow
from tako_runtime.clock import HOUR, SECOND
from tako_runtime.control import Control
from tako_runtime.failure import Failure
from tako_runtime.feed import Feed
from tako_runtime.run import Run
from tako_runtime.state import Raised, Returned, Sleeps, Waits, WorkerLost
from tako_runtime.store import Home
from tako_runtime.store.commit import StoreThread
from tako_runtime.story import ENDS, key, story
from tako_runtime.tail import tail

BROKE = Failure("ValueError", "no such card", "Traceback ...")

Event = dict[str, Any]


# --- the story -------------------------------------------------------------------------------------------------------


def told(caller: Caller, opened: StoreThread, run: Run) -> list[Event]:
    return story(Control(opened, caller.clock).show(run.id))


def names(events: list[Event]) -> list[str]:
    return [event["event"] for event in events]


def test_a_story_tells_what_happened_in_its_order_in_the_words_of_the_log(caller: Caller, opened: StoreThread) -> None:
    caller.enqueue()
    caller.clock.advance(SECOND)
    [claimed] = caller.claim()
    run = claimed.run
    caller.save(run, "prepare", started_at=caller.now, finished_at=caller.clock.advance(SECOND))
    caller.save(run, "break", 2, "failed", finished_at=caller.clock.advance(SECOND), error=BROKE.text(), result=None)
    caller.settle(run, Raised(BROKE))
    caller.clock.advance(HOUR)
    [claimed] = caller.claim()
    caller.settle(claimed.run, WorkerLost("in step break"))
    [claimed] = caller.claim()
    caller.clock.advance(SECOND)
    caller.settle(claimed.run, Returned("1"))
    events = told(caller, opened, run)
    assert names(events) == [
        "run.enqueued", "run.started", "step.done", "step.failed", "run.retrying", "run.started", "run.reclaimed",
        "run.started", "run.succeeded",
    ]  # fmt: skip
    assert events[1]["message"] == "attempt 1 of 3 started"
    assert events[2]["message"] == "step prepare done in 1s"
    assert events[4]["message"] == "attempt 1 of 3 failed, again in 1h: ValueError: no such card"
    assert events[6]["message"] == "worker died during attempt 2 in step break; goes on in attempt 3"
    assert events[-1]["message"].startswith("succeeded in 1h")
    assert events == sorted(events, key=lambda event: str(event["at"]))
    assert {(event["run"], event["workflow"], event["source"]) for event in events} == {(run.id, "order", "default")}
    assert all(event["level"] in log.LEVELS.values() for event in events)


def test_a_parked_run_says_what_it_is_parked_on_and_an_ended_one_why(caller: Caller, opened: StoreThread) -> None:
    asleep = caller.started()
    caller.save(asleep, "nap", status="sleeping", kind="sleep", finished_at=None, due_at=caller.now + HOUR, result=None)
    caller.settle(asleep, Sleeps(caller.now + HOUR))
    assert names(told(caller, opened, asleep))[-1] == "run.sleeping"
    waiting = caller.started()
    caller.wait(waiting, "approval:42")
    caller.settle(waiting, Waits(("approval:42",), None))
    assert told(caller, opened, waiting)[-1]["message"] == "waits for approval:42, until a signal"
    caller.signal("approval:42")
    assert names(told(caller, opened, waiting))[-1] == "wait.done"
    caller.apply(state.cancel(caller.get(waiting), "by Ada", caller.now))
    assert told(caller, opened, waiting)[-1]["message"] == "cancelled: by Ada"
    caller.clock.advance(HOUR)
    assert told(caller, opened, asleep)[-1]["message"] == "step sleep nap done in 1h"


def test_what_is_heard_live_and_what_the_store_tells_of_it_have_one_key(
    opened: StoreThread, home: Home, clean_registry: object
) -> None:
    """Else `tako runs tail` would say things twice."""

    def fails_once(attempt: int) -> None:
        if attempt == 1:
            raise ValueError("no such card")

    @workflow("all", retries=1, backoff=state.Backoff("10ms", "10ms"))
    async def everything(step: Step) -> None:
        await step.run("prepare", lambda: 1)
        await step.run("prepare", lambda: 2)
        await step.sleep("1h")
        await step.wait_for("gone", timeout="1h")
        await step.wait_for("go")
        await step.run("fragile", fails_once, step.attempt)

    run = everything.enqueue_sync()
    Control(opened).signal("go")
    live: list[Event] = []
    with log.sink(live.append):
        ahead = LaterClock()
        for _ in range(5):
            work(opened, home, later=ahead)
            ahead.set_forward("1h")
    heard = {key(log.told(event)) for event in live if "run" in event}
    ended = Control(opened).show(run)
    assert ended["status"] == "succeeded"
    silent = {("run.enqueued",), ("step.done", "sleep sleep", 1)}
    assert {key(event) for event in story(ended)} - silent <= heard
    parked = {key(event) for event in story({**ended, "status": "pending", "reason": "sleeping"})}
    assert ("run.started", 2) in parked


# --- following -------------------------------------------------------------------------------------------------------


def in_a_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(limited())


class Follower:
    """One `tail`, and all that it has told so far."""

    def __init__(self, events: AsyncIterator[Event]) -> None:
        self._events = events
        self.told: list[Event] = []

    async def until(self, *wanted: str) -> Event:
        """The next event of one of these names."""
        async for event in self._events:
            self.told.append(event)
            if event["event"] in wanted:
                return event
        pytest.fail(f"none of {wanted} in {names(self.told)}")

    async def rest(self) -> list[str]:
        """The names of all that come until the end."""
        return [event["event"] async for event in self._events]


@asynccontextmanager
async def following(opened: StoreThread, home: Home, run: str | None = None) -> AsyncIterator[Follower]:
    async with aclosing(tail(Control(opened, app_dir=home.app_dir), opened.bell, home.app_dir, run)) as events:  # type: ignore[type-var]
        yield Follower(events)


def test_an_ended_run_is_told_from_beginning_to_end_and_that_is_all(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    run = caller.started()
    caller.settle(run, Returned("1"))

    async def body() -> None:
        async with following(opened, home, run.id) as follower:
            assert await follower.rest() == ["tail.alone", "run.enqueued", "run.started", "run.succeeded"]

    in_a_loop(body)


def test_without_a_supervisor_the_store_tells_what_goes_on_and_it_says_so(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    run = caller.started()

    async def body() -> None:
        async with following(opened, home, run.id) as follower:
            assert "no supervisor runs here" in (await follower.until("tail.alone"))["message"]
            await follower.until("run.started")
            await asyncio.to_thread(caller.save, run, "charge")
            assert (await follower.until("step.done"))["step"] == "charge"
            await asyncio.to_thread(caller.settle, run, Returned("1"))
            assert await follower.rest() == ["run.succeeded"]
            assert names(follower.told) == ["tail.alone", "run.enqueued", "run.started", "step.done"]

    in_a_loop(body)


def live(event: str, run: Run, **facts: Any) -> Event:
    """An event as a worker writes it."""
    about = {"run": run.id, "workflow": run.workflow, "attempt": run.attempt}
    return {"at": "2999-01-01T00:00:00.000000Z", "level": "info", "event": event, "message": event, **about, **facts}


def test_with_a_supervisor_events_come_as_they_happen_each_of_them_once(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    run, other = caller.started(), caller.started()

    async def body() -> None:
        async with Feed(home.app_dir) as feed, following(opened, home, run.id) as follower:
            await follower.until("tail.live")
            await follower.until("run.started")
            feed.publish("default", live("run.started", run))  # the store has told that
            feed.publish("default", live("step.done", other, step="charge"))
            feed.publish("default", live("output", run, text="hello"))
            feed.publish("default", live("step.done", run, step="charge"))
            assert (await follower.until("output"))["source"] == "default"
            await follower.until("step.done")
            await asyncio.to_thread(caller.save, run, "charge")
            await asyncio.to_thread(caller.save, run, "ship", position=2)  # its worker's log has no debug lines
            await asyncio.to_thread(caller.settle, run, Returned("1"))
            feed.publish("default", live("run.succeeded", run))
            assert await follower.rest() == ["step.done", "run.succeeded"]
            assert names(follower.told) == [
                "tail.live", "run.enqueued", "run.started", "output", "step.done",
            ]  # fmt: skip

    in_a_loop(body)


def test_a_run_that_is_cancelled_behind_the_supervisors_back_ends_the_tail(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    caller.enqueue()
    [run] = [Control(opened).find(one["id"]) for one in Control(opened).list_runs()]

    async def body() -> None:
        async with Feed(home.app_dir), following(opened, home, run.id) as follower:
            await follower.until("run.enqueued")
            await asyncio.to_thread(Control(opened).cancel, run.id, "by Ada")
            ended = await follower.until(*ENDS)
            assert ended["message"] == "cancelled: by Ada"
            assert await follower.rest() == []

    in_a_loop(body)


def test_of_all_runs_every_event_of_a_run_comes_and_nothing_of_the_past(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    one, two = caller.started(), caller.started()

    async def body() -> None:
        async with Feed(home.app_dir) as feed, following(opened, home) as follower:
            await follower.until("tail.live")
            feed.publish("tako", {"at": "2999", "level": "info", "event": "worker.died", "message": ""})
            feed.publish("default", live("step.done", one, step="a"))
            feed.publish("media", live("run.succeeded", two))
            assert (await follower.until("step.done"))["run"] == one.id
            assert (await follower.until("run.succeeded"))["source"] == "media"
            assert names(follower.told) == ["tail.live", "step.done", "run.succeeded"]

    in_a_loop(body)


def test_where_the_supervisor_goes_the_store_goes_on_and_where_it_comes_it_is_live_again(
    opened: StoreThread, home: Home, clean_registry: object
) -> None:
    @workflow("order")
    async def order(step: Step) -> None: ...

    old = order.enqueue_sync()

    async def body() -> None:
        async with following(opened, home) as follower:
            async with Feed(home.app_dir):
                await follower.until("tail.live")
            await follower.until("tail.alone")
            run = await order.enqueue()
            assert (await follower.until("run.enqueued"))["run"] == run
            async with Feed(home.app_dir) as feed:
                await follower.until("tail.live")
                feed.publish("default", live("output", Control(opened).find(run)))
                await follower.until("output")
            assert old not in {event.get("run") for event in follower.told}

    in_a_loop(body)


def test_of_all_runs_without_a_supervisor_the_newest_are_told_and_then_what_changes(
    opened: StoreThread, home: Home, clean_registry: object
) -> None:
    @workflow("order")
    async def order(step: Step) -> None: ...

    runs = order.enqueue_many_sync([None] * 25)

    async def body() -> None:
        async with following(opened, home) as follower:
            for _ in range(20):
                await follower.until("run.enqueued")
            assert {event["run"] for event in follower.told[1:]} == set(runs[5:])
            await asyncio.to_thread(Control(opened).cancel, runs[0])  # a change of one that was not told
            assert (await follower.until("run.cancelled", "run.enqueued"))["run"] == runs[0]
            assert follower.told[-1]["event"] == "run.cancelled"

    in_a_loop(body)
