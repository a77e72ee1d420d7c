"""One run in one worker: what its handler and its steps may do, and the values that they hand on."""

import asyncio
import logging
import math
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from conftest import BOTH, of_the_file
from workers import AT_ONCE, eventually, finished, shown, status, steps, tamper, work

from tako_runtime import Step, SyncStep, signal, workflow
from tako_runtime.store import Home
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Worker
from tako_runtime.workflow import signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")

STORES = BOTH


@dataclass
class Receipt:
    total: Decimal
    at: datetime
    items: frozenset[str]


# --- handlers and steps ----------------------------------------------------------------------------------------------


def test_an_async_handler_runs_its_steps_in_order(opened: StoreThread, home: Home) -> None:
    async def double(n: int) -> int:
        return 2 * n

    @workflow("async")
    async def handler(payload: int, step: Step) -> list[int]:
        first = await step.run("first", double, payload)
        second = await step.run("second", lambda: first + 1)
        third = await step.run("third", lambda: double(second))
        return [first, second, third]

    run_id = handler.enqueue_sync(5)
    assert work(opened, home) == "idle"
    run = finished(opened, run_id)
    assert run["result"] == [10, 11, 22]
    assert list(steps(run)) == ["first", "second", "third"]
    assert [(a["n"], a["outcome"]) for a in run["attempts"]] == [(1, "succeeded")]


def test_a_plain_handler_has_the_same_steps_which_block_it(opened: StoreThread, home: Home) -> None:
    async def double(n: int) -> int:
        return 2 * n

    @workflow("plain")
    def handler(payload: int, step: SyncStep) -> list[Any]:
        first = step.run("first", double, payload)
        step.sleep("1ms")
        step.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        return [first, step.run("second", lambda: first + 1), step.wait_for("go"), step.attempt, step.workflow]

    run_id = handler.enqueue_sync(5)
    signal_sync("go", "now")
    work(opened, home)
    assert finished(opened, run_id)["result"] == [10, 11, "now", 1, "plain"]


def test_a_blocking_plain_handler_does_not_stop_the_others(opened: StoreThread, home: Home) -> None:
    other_has_run = threading.Event()

    @workflow("blocks")
    def blocks(step: SyncStep) -> bool:
        return other_has_run.wait(30)

    @workflow("other")
    async def other(step: Step) -> None:
        await step.run("set", other_has_run.set)

    blocked, _ = blocks.enqueue_sync(), other.enqueue_sync()
    work(opened, home, concurrency=2)
    assert finished(opened, blocked)["result"] is True


def test_what_a_step_gives_is_the_same_on_its_first_pass_and_on_replay(opened: StoreThread, home: Home) -> None:
    seen: list[list[object]] = []
    bodies: list[str] = []

    async def charge() -> Receipt:
        bodies.append("charge")
        return Receipt(Decimal("9.90"), datetime(2026, 1, 2, tzinfo=UTC), frozenset({"a", "b"}))

    def plain():  # type: ignore[no-untyped-def]
        bodies.append("plain")
        return (1, {"two": 2})

    @workflow("typed", backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        seen.append([await step.run("charge", charge), await step.run("plain", plain)])
        if len(seen) == 1:
            raise ValueError("once more")

    run_id = handler.enqueue_sync()
    work(opened, home)
    finished(opened, run_id)
    assert bodies == ["charge", "plain"]
    assert seen[0] == seen[1]
    assert seen[0][0] == Receipt(Decimal("9.90"), datetime(2026, 1, 2, tzinfo=UTC), frozenset({"a", "b"}))
    assert seen[0][1] == [1, {"two": 2}], "without an annotation it is plain JSON, the first time too"


def test_a_name_used_again_gets_a_number_and_kinds_do_not_collide(opened: StoreThread, home: Home) -> None:
    @workflow("names")
    async def handler(step: Step) -> list[Any]:
        sent = [await step.run("send", lambda n=n: n) for n in range(3)]
        await step.sleep(0, name="send")
        return [*sent, await step.wait_for("send")]

    signal_sync("send", "signal")
    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert run["result"] == [0, 1, 2, "signal"]
    assert [(s["kind"], s["name"]) for s in run["steps"]] == [
        ("run", "send"), ("run", "send#2"), ("run", "send#3"), ("sleep", "send"), ("wait", "send"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a#2", "", 7, "two\nlines", "\x1b[31m", "\ud800"])
def test_a_name_that_cannot_be_one_ends_the_run_dead(opened: StoreThread, home: Home, name: Any) -> None:
    @workflow("misnamed")
    async def handler(step: Step) -> None:
        await step.run(name, lambda: 1)

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert run["error"]["type"] == "StepMisuse"
    assert repr(name) in run["error"]["message"]
    assert run["attempt"] == 1


@pytest.mark.parametrize("given", [{"retries": -1}, {"retries": "2"}, {"retries": None}, {"backoff": 3}], ids=str)
def test_a_step_that_cannot_be_tried_as_it_says_is_refused_before_its_body_runs(
    opened: StoreThread, home: Home, given: dict[str, Any]
) -> None:
    ran: list[str] = []

    @workflow("misgiven", retries=0)
    async def handler(step: Step) -> None:
        await step.run("body", ran.append, "once", **given)

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert run["error"]["type"] == "InvalidValue"
    assert f"{next(iter(given))} of step 'body'" in run["error"]["message"]
    assert ran == []


@pytest.mark.parametrize("blocking", [False, True])
def test_a_step_inside_a_step_is_an_error(opened: StoreThread, home: Home, blocking: bool) -> None:
    @workflow("nested")
    async def nested(step: Step) -> None:
        await step.run("outer", lambda: step.run("inner", lambda: 1))

    @workflow("nested-plain")
    def nested_plain(step: SyncStep) -> None:
        step.run("outer", lambda: step.run("inner", lambda: 1))

    run_id = (nested_plain if blocking else nested).enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert run["error"]["type"] == "StepMisuse"
    assert "inner" in run["error"]["message"]
    assert "outer" in run["error"]["message"]


def test_the_key_of_a_name_is_the_same_over_attempts_and_its_own_in_each_run(opened: StoreThread, home: Home) -> None:
    keys: list[str] = []

    @workflow("keys", backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        keys.append(step.key("charge"))
        assert step.key("refund") != step.key("charge")
        if step.attempt == 1:
            raise ValueError

    for _ in range(2):
        handler.enqueue_sync()
        work(opened, home)
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert keys[0] != keys[2]


def test_what_a_handler_logs_names_its_run(opened: StoreThread, home: Home, caplog: pytest.LogCaptureFixture) -> None:
    @workflow("logs")
    async def handler(step: Step) -> None:
        step.log.info("hello from %s", step.workflow)

    caplog.set_level(logging.INFO)
    run_id = handler.enqueue_sync()
    work(opened, home)
    [record] = [r for r in caplog.records if r.getMessage() == "hello from logs"]
    assert record.run == run_id  # type: ignore[attr-defined]


# --- values ----------------------------------------------------------------------------------------------------------


def test_a_value_that_cannot_be_carried_ends_the_run_dead_and_names_the_step(opened: StoreThread, home: Home) -> None:
    @workflow("uncarried")
    async def handler(step: Step) -> None:
        await step.run("open-file", threading.Lock)

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert run["error"]["type"] == "NotCarried"
    assert "open-file" in run["error"]["message"]
    assert "lock" in run["error"]["message"]
    assert run["attempt"] == 1, "no retry can mend it"


def test_a_value_over_the_limit_ends_the_run_dead_and_names_step_and_size(opened: StoreThread, home: Home) -> None:
    @workflow("large")
    async def handler(step: Step) -> None:
        await step.run("report", lambda: "x" * 5_000)

    run_id = handler.enqueue_sync()
    work(opened, home, max_value=1_000)
    run = finished(opened, run_id, "dead")
    assert run["error"]["type"] == "TooLarge"
    assert "report" in run["error"]["message"]
    assert "5,002" in run["error"]["message"]


def test_a_result_that_cannot_be_carried_ends_the_run_dead(opened: StoreThread, home: Home) -> None:
    @workflow("uncarried-result")
    async def handler(step: Step) -> object:
        return math.nan

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert "uncarried-result" in run["error"]["message"]
    assert "NaN" in run["error"]["message"]


@of_the_file
@pytest.mark.parametrize(
    "stored", ["'{\"to\": '", "'no JSON'", "CAST(x'7b22746f223a22ff227d' AS TEXT)", "printf('%.*c', 100000, '[')"]
)
def test_a_payload_that_cannot_be_read_ends_its_run_dead_and_the_worker_goes_on(
    opened: StoreThread, home: Home, stored: str
) -> None:
    @workflow("any-payload", backoff=AT_ONCE)
    async def handler(payload: Any, step: Step) -> str:
        return "done"

    broken, sound = handler.enqueue_sync({"to": "a"}), handler.enqueue_sync({"to": "b"})
    tamper(home, f"UPDATE runs SET payload = {stored} WHERE seq = 1")  # noqa: S608
    work(opened, home)
    run = finished(opened, broken, "dead")
    assert "payload" in run["reason"]
    assert run["attempt"] == 1
    assert finished(opened, sound)["attempt"] == 1


@of_the_file
def test_a_payload_of_the_wrong_shape_ends_its_run_dead_and_names_the_field(opened: StoreThread, home: Home) -> None:
    @workflow("shaped")
    async def handler(payload: Receipt, step: Step) -> None: ...

    run_id = handler.enqueue_sync(Receipt(Decimal(1), datetime(2026, 1, 1, tzinfo=UTC), frozenset()))
    tamper(home, """UPDATE runs SET payload = '{"total": "1", "at": "not a time", "items": []}'""")
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert "$.at" in run["error"]["message"]
    assert run["attempt"] == 1


@of_the_file
@pytest.mark.parametrize("stored", ["'{\"to\": '", "CAST(x'22ff22' AS TEXT)"])
def test_a_stored_result_that_cannot_be_read_ends_its_run_dead_and_the_worker_goes_on(
    opened: StoreThread, home: Home, stored: str
) -> None:
    @workflow("reads", backoff=AT_ONCE)
    async def handler(step: Step) -> Any:
        value = await step.run("fetch", lambda: "a")
        await step.wait_for("go")
        return value

    broken, sound = handler.enqueue_sync(), handler.enqueue_sync()
    work(opened, home)
    tamper(home, f"UPDATE steps SET result = {stored} WHERE name = 'fetch' AND run = 1")  # noqa: S608
    signal_sync("go")
    work(opened, home)
    run = finished(opened, broken, "dead")
    assert "fetch" in run["reason"]
    assert run["attempt"] == 1
    assert finished(opened, sound)["result"] == "a"


# --- from inside a workflow ------------------------------------------------------------------------------------------


def test_a_workflow_starts_another_and_waits_for_its_signal(opened: StoreThread, home: Home) -> None:
    @workflow("child")
    async def child(payload: str, step: Step) -> None:
        await step.run("tell", lambda: signal(f"done:{payload}", f"hello {payload}"))

    @workflow("parent")
    async def parent(step: Step) -> Any:
        await step.run("start", lambda: child.enqueue(step.run_id))
        return await step.wait_for(f"done:{step.run_id}", timeout="1h")

    run_id = parent.enqueue_sync()
    work(opened, home)
    assert finished(opened, run_id)["result"] == f"hello {run_id}"


# --- a handler and its own task --------------------------------------------------------------------------------------


def test_a_handler_that_cancels_its_own_task_too_late_has_ended_all_the_same(opened: StoreThread, home: Home) -> None:
    @workflow("self-cancelling")
    async def handler(step: Step) -> int:
        await step.run("a", lambda: None)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return 1

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("succeeded", "returned")


def test_a_timer_that_cancels_a_handler_that_has_ended_changes_nothing(opened: StoreThread, home: Home) -> None:
    gate, begun = threading.Event(), threading.Event()
    tasks: list[asyncio.Task[Any]] = []

    def held() -> None:
        begun.set()
        gate.wait(30)

    @workflow("cancelled-late")
    async def handler(step: Step) -> int:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        tasks.append(asyncio.create_task(step.run("slow", held)))
        await asyncio.to_thread(begun.wait, 30)
        return 1

    run_id = handler.enqueue_sync()

    async def meanwhile(worker: Worker) -> None:
        await asyncio.to_thread(begun.wait, 30)
        for _ in range(100):
            await asyncio.sleep(0)
        tasks[0].cancel()  # its handler has returned; what it left in flight is waited for
        await asyncio.sleep(0)
        gate.set()
        await eventually(lambda: shown(opened, run_id)["finished_at"])

    work(opened, home, meanwhile)
    run = shown(opened, run_id)
    assert (run["status"], steps(run)) == ("succeeded", {"slow": "done"})
