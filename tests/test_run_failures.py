"""One run in one worker: how it fails and is tried again, what its time limits do, and how it is ended for good."""

import asyncio
import contextlib
import sys
import threading
from datetime import datetime, timedelta
from typing import Any

import pytest
from conftest import BOTH
from workers import AT_ONCE, eventually, finished, shown, status, steps, work

from tako_runtime import Backoff, Step, StepTimeout, SyncStep, log, workflow
from tako_runtime.control import Control
from tako_runtime.errors import StepFailed
from tako_runtime.store import Home
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Worker
from tako_runtime.workflow import signal_sync

pytestmark = pytest.mark.usefixtures("clean_registry")

STORES = BOTH
SOON = Backoff(base="1ms", max="2ms")


class CardRefused(Exception):
    def __init__(self, card: str, code: int) -> None:
        super().__init__(card, code)
        self.code = code


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
