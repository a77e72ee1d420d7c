"""One run in one worker: it sleeps, waits for signals, parks, and leaves its slot to others."""

import asyncio
import math
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import BOTH
from workers import AT_ONCE, eventually, finished, now, shown, status, steps, work

from tako_runtime import Step, SyncStep, clock, signal, workflow
from tako_runtime.errors import InvalidValue
from tako_runtime.run import Claimed
from tako_runtime.store import Home
from tako_runtime.store.base import Demand, KeptSignals, OpenWait, OpenWaits, SendSignal
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry, signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")

STORES = BOTH


# --- sleeping and waiting --------------------------------------------------------------------------------------------


def test_a_short_sleep_stays_in_its_attempt_and_a_long_one_parks(opened: StoreThread, home: Home) -> None:
    @workflow("sleeps")
    async def handler(step: Step) -> str:
        await step.sleep("10ms", name="short")
        await step.sleep("3d", name="long")
        return "rested"

    run_id = handler.enqueue_sync()
    before = now()
    work(opened, home)
    run = finished(opened, run_id, "pending")
    assert run["reason"] == "sleeping"
    wakes_at = clock.instant(datetime.fromisoformat(run["run_at"]))
    assert before + 3 * clock.DAY <= wakes_at <= now() + 3 * clock.DAY
    work(opened, home, later="2d")
    assert status(opened, run_id) == ("pending", "sleeping")
    work(opened, home, later="73h")
    run = finished(opened, run_id)
    assert (run["result"], run["attempt"]) == ("rested", 1)


def test_sleep_until_a_moment_that_has_passed_goes_on_at_once(opened: StoreThread, home: Home) -> None:
    @workflow("past")
    async def handler(step: Step) -> str:
        await step.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        return "late"

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert finished(opened, run_id)["result"] == "late"


@pytest.mark.parametrize("length", [math.nan, math.inf, -1, "soon", None])
def test_a_duration_that_cannot_be_meant_is_refused_and_nothing_is_stored(
    opened: StoreThread, home: Home, length: Any
) -> None:
    raised: list[BaseException] = []

    @workflow("durations")
    async def handler(step: Step) -> None:
        for call in (step.sleep(length), step.wait_for("x", timeout=length if length is not None else math.nan)):
            try:
                await call
            except InvalidValue as error:
                raised.append(error)

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert steps(finished(opened, run_id)) == {}
    assert len(raised) == 2


def test_a_signal_brings_its_payload_to_the_run_that_waits(opened: StoreThread, home: Home) -> None:
    @workflow("waits")
    async def handler(payload: str, step: Step) -> Any:
        return await step.wait_for(f"approval:{payload}")

    mine, other = handler.enqueue_sync("42"), handler.enqueue_sync("43")
    work(opened, home)
    assert status(opened, mine) == ("pending", "waiting")
    assert [w["signal"] for w in shown(opened, mine)["waiting_for"]] == ["approval:42"]
    assert signal_sync("approval:42", {"approved": True}) == 1
    work(opened, home)
    run = finished(opened, mine)
    assert (run["result"], run["attempt"]) == ({"approved": True}, 1)
    assert status(opened, other) == ("pending", "waiting")


def test_a_wait_gives_none_at_its_deadline(opened: StoreThread, home: Home) -> None:
    @workflow("deadline")
    async def handler(step: Step) -> list[Any]:
        return [await step.wait_for("approval", timeout=timedelta(days=7)), await step.run("then", lambda: "bail out")]

    run_id = handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="6d")
    assert status(opened, run_id) == ("pending", "waiting")
    work(opened, home, later="7d1s")
    run = finished(opened, run_id)
    assert run["result"] == [None, "bail out"]
    assert steps(run) == {"approval": "timed_out", "then": "done"}


def test_a_signal_after_the_deadline_is_kept_though_nobody_has_looked_at_the_clock_yet(
    opened: StoreThread, home: Home
) -> None:
    @workflow("late-signal")
    async def handler(step: Step) -> Any:
        return await step.wait_for("approval", timeout="1h")

    run_id = handler.enqueue_sync()
    work(opened, home)
    late = now() + 2 * clock.HOUR
    assert opened.do_sync(SendSignal(name="approval", payload='"late"', now=late, expires_at=late + clock.DAY)) == 0
    work(opened, home, later="2h")
    assert finished(opened, run_id)["result"] is None
    assert [kept.name for kept in opened.do_sync(KeptSignals(now=late))] == ["approval"]


def test_signals_sent_before_are_kept_and_taken_in_their_order(opened: StoreThread, home: Home) -> None:
    @workflow("two-waits")
    async def handler(step: Step) -> list[Any]:
        return [await step.wait_for("x"), await step.wait_for("x", timeout=0), await step.wait_for("x", timeout=0)]

    assert [signal_sync("x", "first"), signal_sync("x", "second")] == [0, 0]
    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert run["result"] == ["first", "second", None]
    assert list(steps(run)) == ["x", "x#2", "x#3"]
    assert opened.do_sync(KeptSignals(now=now())) == []


def test_one_signal_wakes_every_run_that_waits_and_is_not_kept(opened: StoreThread, home: Home) -> None:
    @workflow("all-wait")
    async def handler(step: Step) -> Any:
        return await step.wait_for("open")

    runs = [handler.enqueue_sync() for _ in range(3)]
    work(opened, home)
    assert signal_sync("open", "sesame") == 3
    work(opened, home)
    assert [finished(opened, run_id)["result"] for run_id in runs] == ["sesame"] * 3
    assert opened.do_sync(KeptSignals(now=now())) == []


@pytest.mark.parametrize("kind", ["sleep", "wait"])
@pytest.mark.parametrize("blocking", [False, True])
def test_except_exception_does_not_swallow_a_park(opened: StoreThread, home: Home, kind: str, blocking: bool) -> None:
    swallowed: list[BaseException] = []

    @workflow("guarded")
    async def handler(step: Step) -> str:
        try:
            await (step.sleep("1h") if kind == "sleep" else step.wait_for("x", timeout="1h"))
        except Exception as error:
            swallowed.append(error)
        return "rested"

    @workflow("guarded-plain")
    def plain(step: SyncStep) -> str:
        try:
            _ = step.sleep("1h") if kind == "sleep" else step.wait_for("x", timeout="1h")
        except Exception as error:
            swallowed.append(error)
        return "rested"

    run_id = (plain if blocking else handler).enqueue_sync()
    work(opened, home)
    assert status(opened, run_id)[0] == "pending"
    work(opened, home, later="61m")
    assert finished(opened, run_id)["result"] == "rested"
    assert swallowed == []


def test_a_park_that_a_bare_except_swallows_still_parks(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []

    @workflow("bare-park")
    async def handler(step: Step) -> str:
        try:
            await step.sleep("1h")
        except:  # noqa: E722
            await step.run("cleanup", lambda: bodies.append("cleanup"))
        return "nonsense, the first time"

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("pending", "sleeping")
    assert bodies == [], "no step begins once the run is parking"
    work(opened, home, later="61m")
    assert steps(finished(opened, run_id)) == {"sleep": "done"}


def test_the_ends_of_sleeps_and_waits_do_not_move_over_restarts(opened: StoreThread, home: Home) -> None:
    """Each attempt begins anew while its first wait and sleep are under way."""

    @workflow("deadlines", retries=4, backoff=AT_ONCE)
    async def handler(step: Step) -> list[Any]:
        async def fails() -> None:
            await step.run("first", lambda: 1)
            if step.attempt < 5:
                raise ConnectionError

        waited, _, _ = await asyncio.gather(step.wait_for("x", timeout="1h"), step.sleep("2h"), fails())
        return [waited, step.attempt]

    run_id = handler.enqueue_sync()
    seen = set()
    for _ in range(5):
        work(opened, home, later="1m")
        seen.add(tuple((s["kind"], s["until"]) for s in shown(opened, run_id)["steps"] if s["kind"] != "run"))
    work(opened, home, later="10m")
    [[wait, sleep]] = seen
    assert {wait[0], sleep[0]} == {"wait", "sleep"}
    run = shown(opened, run_id)
    assert (run["reason"], run["attempt"]) == ("waiting", 5)
    assert run["run_at"] == dict([wait, sleep])["wait"]
    work(opened, home, later="1h2m")
    assert status(opened, run_id) == ("pending", "sleeping")
    work(opened, home, later="2h2m")
    assert finished(opened, run_id)["result"] == [None, 5]


def test_an_inline_sleep_that_is_handed_back_ends_when_it_would_have(opened: StoreThread, home: Home) -> None:
    @workflow("naps")
    async def handler(step: Step) -> int:
        await step.sleep(25)
        return step.attempt

    run_id = handler.enqueue_sync()
    seen = set()

    async def until_asleep(worker: Worker) -> None:
        await eventually(lambda: steps(shown(opened, run_id)) and shown(opened, run_id)["status"] == "running")

    for _ in range(3):
        assert work(opened, home, until_asleep) == "drained"
        assert status(opened, run_id) == ("pending", "queued")
        seen.add(shown(opened, run_id)["steps"][0]["until"])
    assert len(seen) == 1
    work(opened, home, later=26)
    run = finished(opened, run_id)
    assert (run["result"], len(run["attempts"])) == (1, 1), "a drain uses up no attempt"


# --- slots and claims ------------------------------------------------------------------------------------------------


def test_a_parked_run_leaves_its_slot_to_the_next(opened: StoreThread, home: Home) -> None:
    @workflow("parks")
    async def parks(step: Step) -> None:
        await step.wait_for("go")

    @workflow("next")
    async def following(step: Step) -> None:
        await signal("go")

    parked, _ = parks.enqueue_sync(priority=1), following.enqueue_sync()
    work(opened, home, concurrency=1)
    assert finished(opened, parked)["attempt"] == 1


def test_runs_are_claimed_by_priority_then_by_due_time_then_in_order(opened: StoreThread, home: Home) -> None:
    order: list[str] = []

    @workflow("ordered")
    async def handler(payload: str, step: Step) -> None:
        order.append(payload)

    handler.enqueue_sync("due later", delay="2s")
    handler.enqueue_sync("first")
    handler.enqueue_sync("second")
    handler.enqueue_sync("low", priority=-1)
    handler.enqueue_sync("high", priority=7)
    work(opened, home, concurrency=1, later="3s")
    assert order == ["high", "first", "second", "due later", "low"]


def test_a_worker_starts_nothing_of_another_group(opened: StoreThread, home: Home) -> None:
    @workflow("mail", group="email")
    async def mail(step: Step) -> None: ...

    @workflow("plain")
    async def plain(step: Step) -> None: ...

    mailed, done = mail.enqueue_sync(), plain.enqueue_sync()
    work(opened, home)
    finished(opened, done)
    assert status(opened, mailed) == ("pending", "queued")
    work(opened, home, group="email")
    finished(opened, mailed)


def test_a_run_of_an_unknown_workflow_stays_for_a_worker_that_knows_it(
    opened: StoreThread, home: Home, clean_registry: dict[str, Any]
) -> None:
    @workflow("gone")
    async def gone(step: Step) -> None: ...

    run_id = gone.enqueue_sync()
    del clean_registry["gone"]

    async def wait(worker: Worker) -> None:
        await eventually(lambda: worker.runs_in_hand == 0)

    work(opened, home, wait)
    assert status(opened, run_id) == ("pending", "queued")


def test_runs_that_come_back_at_once_are_not_taken_for_their_last_attempts(opened: StoreThread, home: Home) -> None:
    """A run that fails is due again at once: its next attempt is claimed in the very commit that ends the last one."""
    go_on = threading.Event()
    held: list[str] = []
    most: list[int] = []
    alive = 0

    def hold() -> None:
        held.append("held")
        go_on.wait(30)

    @workflow("comes-back", retries=100, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        nonlocal alive
        alive += 1
        most.append(alive)
        try:
            await asyncio.sleep(0)
            if step.attempt == 40:
                await step.run("hold", hold)
        finally:
            alive -= 1
        raise ConnectionError

    runs = [handler.enqueue_sync() for _ in range(4)]

    async def drain_in_the_middle(worker: Worker) -> None:
        await eventually(lambda: len(held) == 3)
        assert worker.runs_in_hand == 3
        worker.stop()
        asyncio.get_running_loop().call_later(0.1, go_on.set)

    assert work(opened, home, drain_in_the_middle, concurrency=3) == "drained"
    assert {status(opened, run_id)[0] for run_id in runs} == {"pending"}, "a drain leaves none behind"
    work(opened, home, concurrency=3)
    assert [len(finished(opened, run_id, "dead")["attempts"]) for run_id in runs] == [101] * 4
    assert max(most) == 3
    assert len(held) == 4


def test_a_lease_lost_before_an_attempt_got_going_leaves_nothing_behind(opened: StoreThread, home: Home) -> None:
    bodies: list[int] = []

    @workflow("unstarted")
    async def handler(step: Step) -> None:
        bodies.append(1)

    handler.enqueue_sync()
    worker: list[Worker] = []

    async def live() -> str:
        worker.append(Worker(opened, home.app_dir, registry, Settings()))
        begin = worker[0]._begin

        def begin_and_lose(claimed: Claimed) -> None:
            begin(claimed)
            worker[0]._lose_lease()

        worker[0]._begin = begin_and_lose  # type: ignore[method-assign]
        async with asyncio.timeout(30):
            return await worker[0].run()

    assert asyncio.run(live()) == "lost lease"
    assert worker[0].runs_in_hand == 0
    assert bodies == []


def test_a_signal_in_the_batch_of_the_wait_that_it_is_for_reaches_a_handler_that_cannot_park(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rings before the worker is told that there is something to wait for."""
    monkeypatch.setattr("tako_runtime.worker.LOOK", 600.0)
    monkeypatch.setattr("tako_runtime.store.commit.AT_ONCE", -1)  # the loop does not carry it out itself
    kind, looked, at_rest, heard = type(opened._store), threading.Event(), asyncio.Event(), asyncio.Event()
    look, execute = Worker._look_for_signals, kind.execute
    asked: list[type[object]] = []

    async def looking(worker: Worker) -> None:
        looked.set()
        await look(worker)

    def with_its_signal(store: Any, batch: Any) -> Any:
        answered = execute(store, batch)
        asked.extend(type(op) for op in batch)
        if OpenWait in asked:
            monkeypatch.setattr(kind, "execute", execute)
            _, topics = execute(store, [SendSignal(name="go", payload='"gone"', now=now(), expires_at=None)])
            looked.clear()
            opened.bell.ring(topics)
            assert looked.wait(20)
        return answered

    @workflow("stays")
    async def handler(step: Step) -> str:
        async def wait() -> str:
            told: str = await step.wait_for("go")
            heard.set()
            return told

        await at_rest.wait()
        told, _ = await asyncio.gather(wait(), step.run("busy", heard.wait))
        return told

    run_id = handler.enqueue_sync()
    monkeypatch.setattr(Worker, "_look_for_signals", looking)
    monkeypatch.setattr(kind, "execute", with_its_signal)

    async def meanwhile(worker: Worker) -> None:
        await eventually(lambda: Demand in asked)  # it has claimed, and waits for nothing from the store any more
        at_rest.set()
        await eventually(lambda: status(opened, run_id)[0] == "succeeded")

    work(opened, home, meanwhile)
    assert finished(opened, run_id)["result"] == "gone"


def test_a_wait_that_its_handler_has_left_open_is_closed_with_the_run(opened: StoreThread, home: Home) -> None:
    @workflow("leaves")
    async def handler(step: Step) -> str:
        waiting = asyncio.ensure_future(step.wait_for("never"))
        await step.run("a", asyncio.sleep, 0)
        assert not waiting.done()
        return "without it"

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert (run["result"], steps(run)["never"]) == ("without it", "waiting")
    assert opened.do_sync(OpenWaits()) == []
    assert signal_sync("never", 1) == 0
