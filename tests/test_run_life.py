"""One run in one worker: what its handler may do, and what becomes of the run."""

import asyncio
import contextlib
import logging
import math
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from conftest import BOTH, of_the_file
from workers import eventually, now, shown, status, steps, tamper, work

from tako_runtime import Backoff, Step, StepTimeout, SyncStep, clock, log, signal, workflow
from tako_runtime.control import Control
from tako_runtime.errors import InvalidValue, StepFailed
from tako_runtime.run import Claimed
from tako_runtime.store import Home
from tako_runtime.store.base import KeptSignals, SendSignal
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Settings, Worker
from tako_runtime.workflow import registry, signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")

STORES = BOTH
AT_ONCE = Backoff(base=0, max=0)
SOON = Backoff(base="1ms", max="2ms")


@dataclass
class Receipt:
    total: Decimal
    at: datetime
    items: frozenset[str]


class CardRefused(Exception):
    def __init__(self, card: str, code: int) -> None:
        super().__init__(card, code)
        self.code = code


def finished(opened: StoreThread, run_id: str, expected: str = "succeeded") -> dict[str, Any]:
    run = shown(opened, run_id)
    assert run["status"] == expected, run
    return run


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


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_step_is_tried_again_with_a_pause_within_its_attempt(opened: StoreThread, home: Home) -> None:
    tries: list[int] = []
    announced: list[dict[str, Any]] = []

    def flaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return "there"

    @workflow("flaky")
    async def handler(step: Step) -> str:
        return await step.run("call", flaky, retries=2, backoff=Backoff(base="1ms", max="2ms"))

    run_id = handler.enqueue_sync()
    with log.sink(announced.append):
        work(opened, home)
    run = finished(opened, run_id)
    assert (run["result"], run["attempt"], len(tries)) == ("there", 1, 3)
    retried = [event for event in announced if event["event"] == "step.retrying"]
    assert [event["n"] for event in retried] == [1, 2]
    assert all("ConnectionError: not yet" in event["error"] for event in retried)


def test_a_failing_attempt_is_followed_by_others_until_the_budget_is_used(opened: StoreThread, home: Home) -> None:
    @workflow("fails", retries=2, backoff=Backoff(base="1h", max="10h"))
    async def handler(step: Step) -> None:
        raise ConnectionError(f"attempt {step.attempt}")

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "pending")
    assert run["reason"] == "retrying"
    pause = datetime.fromisoformat(run["run_at"]) - datetime.fromisoformat(run["attempts"][0]["finished_at"])
    assert timedelta(minutes=48) <= pause <= timedelta(minutes=72), "an hour, 20 % jitter"
    work(opened, home, later="2h")
    assert status(opened, run_id) == ("pending", "retrying")
    work(opened, home, later="6h")
    run = finished(opened, run_id, "dead")
    assert [a["error"]["message"] for a in run["attempts"]] == ["attempt 1", "attempt 2", "attempt 3"]
    assert "attempt 3 of 3" in run["reason"]


def test_a_step_without_retry_ends_the_run_dead_at_once(opened: StoreThread, home: Home) -> None:
    bodies: list[int] = []

    def charge() -> None:
        bodies.append(1)
        raise CardRefused("visa", 51)

    @workflow("no-retry", retries=5, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        await step.run("charge", charge, retries=3, retry=False)

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, "dead")
    assert (run["attempt"], len(bodies)) == (1, 1)
    assert run["error"]["type"] == "CardRefused"


def test_an_uncaught_failing_step_runs_again_and_the_done_ones_do_not(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []

    def charge() -> None:
        bodies.append("charge")

    def ship() -> None:
        bodies.append("ship")
        if bodies.count("ship") < 3:
            raise ConnectionError

    @workflow("order", backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        await step.run("charge", charge)
        await step.run("ship", ship)

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert finished(opened, run_id)["attempt"] == 3
    assert bodies == ["charge", "ship", "ship", "ship"]


def test_a_caught_failure_is_the_same_exception_on_every_replay(opened: StoreThread, home: Home) -> None:
    bodies: list[str] = []
    caught: list[CardRefused] = []

    def ship() -> None:
        bodies.append("ship")
        raise CardRefused("visa", 51)

    @workflow("saga", retries=3, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        try:
            await step.run("ship", ship)
        except CardRefused as refused:
            caught.append(refused)
        await step.run("refund", lambda: bodies.append("refund"))
        if step.attempt < 4:
            raise ValueError("later, and for another reason")

    run_id = handler.enqueue_sync()
    work(opened, home)
    finished(opened, run_id)
    assert bodies == ["ship", "refund"]
    assert [(type(e), e.args, e.code) for e in caught] == [(CardRefused, ("visa", 51), 51)] * 4


def test_what_no_replay_could_have_of_an_exception_its_first_pass_has_not_either(
    opened: StoreThread, home: Home
) -> None:
    class OfAFunction(Exception):
        """Nobody can find this class again."""

    caught: list[tuple[type, str, dict[str, Any], str]] = []

    def ship() -> None:
        try:
            raise OSError("no road")
        except OSError as error:
            failed = OfAFunction("lost")
            failed.lorry = object()  # type: ignore[attr-defined]
            raise failed from error

    @workflow("ships")
    async def handler(step: Step) -> None:
        try:
            await step.run("ship", ship)
        except Exception as error:
            caught.append((type(error), str(error), vars(error), str(error.__cause__)))
        await step.sleep("1h")

    handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="2h")
    first, replayed = caught
    assert first[:3] == replayed[:3]
    assert first[0] is StepFailed
    assert first[3] == "no road", "for people, a traceback has what it came from"


@pytest.mark.parametrize("message", ["bad name \udcff", "nul \0 byte", "line\nbreak"])
@pytest.mark.parametrize("where", ["handler", "step", "bail", "fail"])
def test_whatever_text_an_error_has_the_run_ends(opened: StoreThread, home: Home, where: str, message: str) -> None:
    def body() -> None:
        raise ValueError(message)

    @workflow("odd-text", retries=0)
    async def handler(step: Step) -> None:
        if where == "step":
            await step.run("x", body)
        elif where == "bail":
            step.bail(message)
        elif where == "fail":
            step.fail(message)
        body()

    run_id = handler.enqueue_sync()
    work(opened, home)
    finished(opened, run_id, "cancelled" if where == "bail" else "dead")


def leave() -> None:
    sys.exit("from user code")


def exhausted() -> object:
    return next(iter([]))


@pytest.mark.parametrize("end", [leave, exhausted], ids=["sys.exit", "StopIteration"])
@pytest.mark.parametrize("where", ["step", "async step", "handler", "plain handler", "plain step", "task"])
def test_what_would_end_a_process_or_a_loop_fails_the_run_and_not_the_worker(
    opened: StoreThread, home: Home, where: str, end: Any
) -> None:
    async def end_async() -> None:
        end()

    @workflow("ends", retries=0)
    async def ends(step: Step) -> None:
        match where:
            case "step":
                await step.run("x", end)
            case "async step":
                await step.run("x", end_async)
            case "task":
                await asyncio.gather(end_async(), end_async())
            case _:
                end()

    @workflow("ends-plain", retries=0)
    def ends_plain(step: SyncStep) -> None:
        if where == "plain step":
            step.run("x", end)
        end()

    @workflow("neighbour")
    async def neighbour(step: Step) -> str:
        await step.sleep("100ms")
        return "done"

    ending = (ends_plain if where.startswith("plain") else ends).enqueue_sync()
    beside, after = neighbour.enqueue_sync(), neighbour.enqueue_sync(delay="150ms")
    work(opened, home, later="1s")
    finished(opened, ending, "dead")
    assert finished(opened, beside)["attempt"] == 1
    finished(opened, after)


def test_a_timeout_of_an_async_step_raises_in_the_handler(opened: StoreThread, home: Home) -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    @workflow("step-timeout")
    async def handler(step: Step) -> str:
        try:
            await step.run("hangs", hangs, timeout="20ms")
        except StepTimeout as late:
            return str(late)
        return "in time"

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert run["result"] == "step 'hangs' ran past its timeout of 20ms"
    assert steps(run) == {"hangs": "failed"}


def test_a_timeout_of_a_step_in_a_thread_leaves_the_thread_behind(opened: StoreThread, home: Home) -> None:
    over = threading.Event()
    announced: list[str] = []

    @workflow("thread-timeout")
    async def handler(step: Step) -> str:
        try:
            await step.run("hangs", over.wait, 30, timeout="20ms")
        except TimeoutError:
            return "late"
        return "in time"

    run_id = handler.enqueue_sync()
    with log.sink(lambda event: announced.append(event["event"])):
        work(opened, home)
    over.set()
    assert finished(opened, run_id)["result"] == "late"
    assert "step.left" in announced


@pytest.mark.parametrize("blocking", [False, True])
def test_an_attempt_past_the_timeout_of_its_workflow_fails(opened: StoreThread, home: Home, blocking: bool) -> None:
    over = threading.Event()

    @workflow("run-timeout", timeout="50ms", retries=1, backoff=AT_ONCE)
    async def handler(step: Step) -> str:
        await step.run("quick", lambda: 1)
        if step.attempt == 1:
            await asyncio.Event().wait()
        return "done"

    @workflow("run-timeout-plain", timeout="50ms", retries=1, backoff=AT_ONCE)
    def plain(step: SyncStep) -> str:
        if step.attempt == 1:
            over.wait(30)
        return "done"

    run_id = (plain if blocking else handler).enqueue_sync()
    work(opened, home)
    over.set()
    run = finished(opened, run_id)
    assert [a["outcome"] for a in run["attempts"]] == ["failed", "succeeded"]
    assert run["attempts"][0]["error"]["type"] == "RunTimeout"


def test_an_asyncio_timeout_around_a_step_works_as_anywhere(opened: StoreThread, home: Home) -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    @workflow("own-timeout")
    async def handler(step: Step) -> str:
        try:
            async with asyncio.timeout(0.02):
                await step.run("hangs", hangs)
        except TimeoutError:
            return await step.run("instead", lambda: "plan B")
        return "in time"

    run_id = handler.enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id)
    assert run["result"] == "plan B"
    assert steps(run) == {"instead": "done"}


# --- bail, fail, cancel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("verdict", "expected"), [("bail", "cancelled"), ("fail", "dead")])
def test_bail_and_fail_end_the_run_whatever_the_handler_swallows(
    opened: StoreThread, home: Home, verdict: str, expected: str, blocking: bool
) -> None:
    after: list[str] = []

    def decide(step: Any) -> None:
        try:
            getattr(step, verdict)("out of stock")
        except Exception:
            after.append("swallowed")

    @workflow("verdict", retries=5, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        decide(step)
        after.append("went on")

    @workflow("verdict-plain", retries=5, backoff=AT_ONCE)
    def plain(step: SyncStep) -> None:
        decide(step)
        after.append("went on")

    run_id = (plain if blocking else handler).enqueue_sync()
    work(opened, home)
    run = finished(opened, run_id, expected)
    assert "out of stock" in run["reason"]
    assert (run["attempt"], after) == (1, [])


def test_fail_with_an_exception_keeps_its_class_and_traceback(opened: StoreThread, home: Home) -> None:
    @workflow("fails-finally")
    async def handler(step: Step) -> None:
        try:
            raise CardRefused("visa", 51)
        except CardRefused as refused:
            step.fail(refused)

    run_id = handler.enqueue_sync()
    work(opened, home)
    error = finished(opened, run_id, "dead")["error"]
    assert error["type"] == "CardRefused"
    assert __file__ in error["traceback"]


def test_a_verdict_that_a_bare_except_swallows_still_counts(opened: StoreThread, home: Home) -> None:
    @workflow("bare")
    async def handler(step: Step) -> str:
        with contextlib.suppress(BaseException):
            step.bail("enough")
        return "nonsense"

    run_id = handler.enqueue_sync()
    work(opened, home)
    assert status(opened, run_id) == ("cancelled", "enough")


def test_a_pending_and_a_parked_run_are_cancelled_at_once(opened: StoreThread, home: Home) -> None:
    @workflow("parks")
    async def handler(step: Step) -> None:
        await step.wait_for("never")

    parked, pending = handler.enqueue_sync(), handler.enqueue_sync(delay="1h")
    work(opened, home)
    for run_id in (parked, pending):
        Control(opened).cancel(run_id, "not wanted")
        assert status(opened, run_id) == ("cancelled", "not wanted")
    assert signal_sync("never") == 0
    work(opened, home, later="2h")
    assert status(opened, parked) == status(opened, pending) == ("cancelled", "not wanted")


@pytest.mark.parametrize("swallow", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_running_run_is_cancelled_at_its_next_step(
    opened: StoreThread, home: Home, fails: bool, swallow: bool
) -> None:
    """Also where the step that it is in fails and would be tried again."""
    began, go_on = threading.Event(), threading.Event()
    bodies: list[str] = []

    def a() -> None:
        bodies.append("a")
        began.set()
        go_on.wait(30)
        if fails:
            raise ConnectionError

    @workflow("cancelled")
    async def handler(step: Step) -> None:
        try:
            await step.run("a", a, retries=3, backoff=SOON)
            await step.run("b", lambda: bodies.append("b"))
        except Exception:
            if not swallow:
                raise

    run_id = handler.enqueue_sync()

    async def cancel(worker: Worker) -> None:
        await asyncio.to_thread(began.wait, 30)
        await asyncio.to_thread(Control(opened).cancel, run_id, "not wanted")
        await asyncio.sleep(0.1)  # so that the worker has looked: the event of that is not told to anyone
        go_on.set()
        await eventually(lambda: status(opened, run_id)[0] != "running")

    work(opened, home, cancel)
    assert status(opened, run_id) == ("cancelled", "not wanted")
    assert bodies == ["a"]


def test_a_run_that_sleeps_in_its_slot_is_cancelled_at_once(opened: StoreThread, home: Home) -> None:
    @workflow("naps")
    async def handler(step: Step) -> None:
        await step.sleep(25)

    run_id = handler.enqueue_sync()

    async def cancel(worker: Worker) -> None:
        await eventually(lambda: steps(shown(opened, run_id)))
        await asyncio.to_thread(Control(opened).cancel, run_id, "not wanted")
        await eventually(lambda: status(opened, run_id)[0] == "cancelled")

    work(opened, home, cancel)


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
