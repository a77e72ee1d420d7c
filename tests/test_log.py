"""The log: which facts each event carries, and what user code says, with the run and step it came from."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import until
from serving import Serving, project, serving
from workers import eventually, now, shown, work

from tako_runtime import Backoff, Step, clock, log, workflow
from tako_runtime.control import Control
from tako_runtime.log import JsonLines
from tako_runtime.output import Output, captured
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread
from tako_runtime.worker import Worker
from tako_runtime.workflow import new_run

AT_ONCE = Backoff(base=0, max=0)

Event = dict[str, Any]


@pytest.fixture
def events() -> Iterator[list[Event]]:
    heard: list[Event] = []
    with log.sink(heard.append):
        yield heard


def of(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["event"] == name]


# --- the facts of a run ----------------------------------------------------------------------------------------------


def test_every_event_of_a_run_says_which_run_attempt_and_group_and_how_long(
    opened: StoreThread, home: Home, events: list[Event], clean_registry: object
) -> None:
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return 1

    @workflow("all", group="email", retries=1, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        await step.run("quick", lambda: 1)
        await step.run("flaky", flaky, retries=1, backoff=AT_ONCE)
        await step.sleep("1h")
        await step.wait_for("news")
        await step.wait_for("more", timeout="1h")
        step.bail("enough")

    run_id = handler.enqueue_sync()
    work(opened, home, group="email")
    work(opened, home, group="email", later="2h")
    at = now() + 2 * clock.HOUR
    opened.do_sync(base.SendSignal(name="news", payload="1", now=at, expires_at=at + clock.DAY))
    work(opened, home, group="email", later="2h")
    work(opened, home, group="email", later="4h")
    seen = [event["event"] for event in events if "run" in event]
    assert seen == [
        "run.started", "step.done", "step.retrying", "step.failed", "run.retrying",
        "run.resumed", "step.cached", "step.done", "run.sleeping",
        "run.woken", "step.cached", "step.cached", "run.waiting",
        "run.woken", "step.cached", "step.cached", "run.waiting",
        "run.woken", "step.cached", "step.cached", "wait.timed_out", "run.cancelled",
    ]  # fmt: skip
    attempt = 1
    for event in (event for event in events if "run" in event):
        facts = {"run": run_id, "workflow": "all", "group": "email", "attempt": attempt}
        assert event.items() >= facts.items()
        assert event["ms"] >= 0
        if event["event"].startswith(("step.", "wait.")):
            assert event["step"] in ("quick", "flaky", "wait more")
        attempt += event["event"] == "run.retrying"
    assert [event["by"] for event in of(events, "run.woken")] == [
        "the end of its sleep", "signal news", "the deadline of signal more"
    ]  # fmt: skip
    assert of(events, "run.cancelled")[0]["reason"] == "enough"
    assert of(events, "run.sleeping")[0]["until"]


@pytest.mark.parametrize("how", ["dead", "succeeded"])
def test_a_run_that_has_ended_says_how_long_it_took_since_it_first_started(
    how: str, opened: StoreThread, home: Home, events: list[Event], clean_registry: object
) -> None:
    @workflow("ends", retries=0)
    async def handler(step: Step) -> None:
        await step.sleep(timedelta(hours=1))
        assert how == "succeeded", "broken"

    handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="2h")
    [event] = of(events, f"run.{how}")
    assert event["ms"] >= 2 * 3_600_000
    assert event["group"] == "default"
    assert of(events, "run.woken")[0]["ms"] >= 3_600_000 - 1000, "how long it had been due"


def test_a_retry_is_no_awakening_though_the_last_thing_done_was_a_sleep(
    opened: StoreThread, home: Home, events: list[Event], clean_registry: object
) -> None:
    @workflow("fails-after-a-sleep", retries=1, backoff=AT_ONCE)
    async def handler(step: Step) -> None:
        await step.sleep("1h")
        raise ConnectionError

    handler.enqueue_sync()
    work(opened, home)
    work(opened, home, later="2h")
    assert [e["event"] for e in events if e["event"] in ("run.started", "run.woken", "run.resumed", "run.dead")] == [
        "run.started", "run.woken", "run.resumed", "run.dead",
    ]  # fmt: skip


def test_a_drained_and_a_cancelled_run_say_so(
    opened: StoreThread, home: Home, events: list[Event], clean_registry: object
) -> None:
    @workflow("waits-inside")
    async def handler(step: Step) -> None:
        await step.sleep("20s")

    async def begun(worker: Worker) -> None:
        await eventually(lambda: worker.runs_in_hand)
        await eventually(lambda: shown(opened, run_id)["steps"])

    run_id = handler.enqueue_sync()
    work(opened, home, begun)
    assert of(events, "run.queued")[0]["ms"] >= 0

    async def cancelled(worker: Worker) -> None:
        await eventually(lambda: len(of(events, "run.resumed")) == 1)
        Control(opened).cancel(run_id, "no longer wanted")
        await eventually(lambda: of(events, "run.cancelled"))

    work(opened, home, cancelled)
    [event] = of(events, "run.cancelled")
    assert (event["reason"], event["run"], event["group"]) == ("no longer wanted", run_id, "default")


# --- what user code says ---------------------------------------------------------------------------------------------

SAYS = """
    import asyncio, contextvars, logging, os, signal, subprocess, sys, threading, time
    from concurrent.futures import ThreadPoolExecutor
    from tako_runtime import workflow

    POOL = ThreadPoolExecutor(1)  # its one thread is started by whichever run comes first
    shop = logging.getLogger("shop")

    def say(where):
        print(f"printed in {where}")
        print(f"to stderr in {where}", file=sys.stderr)
        sys.stdout.buffer.write(f"bytes in {where}\\n".encode())
        shop.warning("logged in %s", where)

    @workflow("says")
    async def says(payload: str, step):
        say("handler")
        step.log.info("by the log in handler")
        await step.run("plain", lambda: (say("plain step"), step.log.info("by the log in plain step"))[0])
        await step.run("coroutine", async_say)
        await step.run("to-thread", lambda: asyncio.to_thread(say, "to_thread"))
        await step.run("pool", lambda: POOL.submit(say, "pool").result())
        await step.run("executor", in_executor)
        await step.run("thread", thread)

    async def async_say():
        say("coroutine step")

    async def in_executor():
        await asyncio.get_running_loop().run_in_executor(None, say, "executor")

    def thread():
        one = threading.Thread(target=say, args=["thread"])
        one.start()
        one.join()

    @workflow("says-plain")
    def says_plain(payload: str, step):
        say("plain handler")
        step.run("inner", lambda: say("step of a plain handler"))
        step.log.info("by the log in plain handler")

    @workflow("raises-in-thread")
    async def raises_in_thread(payload: str, step):
        def broken():
            raise ValueError("broken in a thread")
        def run():
            one = threading.Thread(target=broken, name="mine")
            one.start()
            one.join()
            try:
                broken()
            except ValueError:
                shop.exception("caught")
        await step.run("breaks", run)

    @workflow("half-lines")
    async def half_lines(payload: str, step):
        for n in range(3):
            print(f"{payload}{n} ", end="")
            await asyncio.sleep(0.01)
        if payload == "b":
            print("whole")

    @workflow("crashes")
    async def crashes(payload: str, step):
        if step.attempt == 1:
            print("before the crash")
            shop.error("logged before the crash")
            if payload == "exit":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGKILL)

    @workflow("prints-at-exit")
    async def prints_at_exit(payload: str, step):
        threading.Thread(target=lambda: print("no newline in a thread", end=""), daemon=True).start()
        def late():
            time.sleep(0.2)
            print("never ended", end="")
            time.sleep(60)
        threading.Thread(target=late, daemon=True).start()

    @workflow("inherits")
    async def inherits(payload: str, step):
        await step.run("program", lambda: subprocess.run(["echo", "said by a program"], stdout=sys.stdout).returncode)
"""


def start(opened: StoreThread, workflow: str, payload: str = "x", retries: int = 0) -> str:
    run = new_run(
        workflow, "default", json.dumps(payload), now=now(), due=now(), retries=retries, backoff_base=1_000,
        backoff_max=1_000,
    )  # fmt: skip
    [run_id] = opened.do_sync(base.Enqueue(runs=[run], now=now()))
    return run_id


@pytest.fixture
def server(opened: StoreThread, home: Home, tmp_path: Path) -> Iterator[Serving]:
    with serving(home, project(tmp_path / "project", SAYS, '[workflows]\nidle_timeout = "1s"')) as server:
        yield server


def ended(opened: StoreThread, run_id: str) -> str:
    until(lambda: shown(opened, run_id)["finished_at"], 30)
    return str(shown(opened, run_id)["status"])


WHERE = {
    "handler": ("says", None),
    "plain step": ("says", "plain"),
    "coroutine step": ("says", "coroutine"),
    "to_thread": ("says", "to-thread"),
    "pool": ("says", "pool"),
    "executor": ("says", "executor"),
    "thread": ("says", "thread"),
    "plain handler": ("says-plain", None),
    "step of a plain handler": ("says-plain", "inner"),
}


def test_whatever_is_said_carries_the_run_and_step_it_came_from_whatever_thread_says_it(
    opened: StoreThread, server: Serving
) -> None:
    """Twice, so that the pool's thread was started by another run than the one that uses it then."""
    for _ in range(2):
        ids = {name: start(opened, name) for name in ("says", "says-plain")}
        for run in ids.values():
            server.wait_for("run.succeeded", lambda event, run=run: event["run"] == run)  # type: ignore[misc]
        for where, (flow, step) in WHERE.items():
            of_run = server.saw("output", lambda event, run=ids[flow]: event.get("run") == run)  # type: ignore[misc]
            said = [event for event in of_run if event["message"].endswith(f" in {where}")]
            said = [event for event in said if not event["message"].startswith("by the log")]
            assert {event["stream"] for event in said} == {"stdout", "stderr", "logging"}, where
            assert len(said) == 4
            for event in said:
                assert (event["workflow"], event["attempt"], event["group"]) == (flow, 1, "default")
                assert event.get("step") == step, event
    everything = server.saw("output")
    assert len([event for event in everything if " in " in event["message"]]) == 2 * (4 * len(WHERE) + 3)
    logged = server.saw("output", lambda event: event["message"].startswith("by the log in"))
    assert {event["logger"] for event in logged} == {"workflow.says", "workflow.says-plain"}
    assert {(e["workflow"], e.get("step")) for e in logged} == {("says", None), ("says", "plain"), ("says-plain", None)}


def test_a_traceback_is_one_event_whether_it_was_caught_or_not(opened: StoreThread, server: Serving) -> None:
    run = start(opened, "raises-in-thread")
    assert ended(opened, run) == "succeeded"
    caught, uncaught = server.printed("caught\nTraceback"), server.printed("uncaught in thread mine")
    for event in (caught, uncaught):
        assert event["level"] == "error"
        assert (event["run"], event["step"]) == (run, "breaks")
        assert event["message"].endswith("ValueError: broken in a thread")
        assert 'raise ValueError("broken in a thread")' in event["message"]


def test_two_runs_that_print_parts_of_lines_get_lines_of_their_own_and_none_is_lost(
    opened: StoreThread, server: Serving
) -> None:
    ids = {name: start(opened, "half-lines", name) for name in ("a", "b")}
    assert {ended(opened, run) for run in ids.values()} == {"succeeded"}
    for name, text in (("a", "a0 a1 a2 "), ("b", "b0 b1 b2 whole")):
        assert server.printed(text)["run"] == ids[name]
        assert server.printed(text)["message"] == text
    left = server.wait_for("worker.stopped")
    assert server.events.index(server.printed("a0 a1 a2 ")) < server.events.index(left), "a pass's end ends its lines"


def test_a_line_without_its_end_is_not_lost_when_the_worker_leaves(opened: StoreThread, server: Serving) -> None:
    run = start(opened, "prints-at-exit")
    assert ended(opened, run) == "succeeded"
    server.wait_for("worker.stopped")
    for text in ("no newline in a thread", "never ended"):
        assert server.printed(text)["run"] == run


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_crash_loses_no_line_that_was_said_before_it(how: str, opened: StoreThread, server: Serving) -> None:
    run = start(opened, "crashes", how, retries=1)
    assert ended(opened, run) == "succeeded"
    assert server.printed("before the crash")["run"] == run
    assert server.printed("logged before the crash")["run"] == run
    reclaimed = server.wait_for("run.reclaimed")
    assert reclaimed.items() >= {"run": run, "workflow": "crashes", "attempt": 1, "group": "default"}.items()
    assert reclaimed["ms"] >= 0
    assert server.saw("run.started", lambda event: event["run"] == run), "and what was announced before it is there"


def test_a_program_that_is_given_our_output_writes_into_the_log(opened: StoreThread, server: Serving) -> None:
    assert ended(opened, start(opened, "inherits")) == "succeeded"
    assert server.printed("said by a program")["message"] == "said by a program"


def test_what_ends_a_worker_before_it_begins_is_told_whole(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    """Its own last words are no events any more; the supervisor has them."""
    root = project(tmp_path / "project", SAYS)
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(
        "import sys\nif 'worker' in sys.orig_argv:\n    import tako_runtime.store as store\n"
        "    def broken(**_):\n        raise RuntimeError('the disk is on fire')\n    store.current = broken\n"
    )
    start(opened, "says")
    with serving(home, root, env={"PYTHONPATH": str(tmp_path / "early")}) as server:
        told = server.wait_for("group.unhealthy")
        assert "RuntimeError: the disk is on fire" in told["last_lines"]
        assert "Traceback" in told["last_lines"]


# --- capturing, in this process --------------------------------------------------------------------------------------


def test_what_was_before_is_there_again_afterwards(events: list[Event]) -> None:
    import logging
    import sys
    from concurrent.futures import ThreadPoolExecutor

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = sys.stdout, sys.stderr, threading.excepthook, threading.Thread.start, ThreadPoolExecutor.submit
    try:
        with captured():
            assert isinstance(sys.stdout, Output)
            print("half", end="")  # noqa: T201
        assert before == (
            sys.stdout, sys.stderr, threading.excepthook, threading.Thread.start, ThreadPoolExecutor.submit
        )  # fmt: skip
        assert [event["text"] for event in of(events, "output")] == ["half"]
        assert log.at_end == []
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def test_a_flushed_part_of_a_line_is_a_line(events: list[Event]) -> None:
    out = Output("stdout", 1)
    out.write("working")
    assert not events
    out.flush()
    out.flush()
    out.write("...\n")
    assert [event["text"] for event in events] == ["working", "..."]


def test_a_server_leaves_out_what_is_below_its_level() -> None:
    reading, writing = os.pipe()
    lines = JsonLines(writing, log.WARNING)
    for level in ("debug", "info", "warning", "error"):
        lines.pass_on("default", {"at": "now", "level": level, "event": "output", "message": level})
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert [json.loads(line)["message"] for line in pipe] == ["warning", "error"]


def test_what_user_code_says_is_written_at_once_with_all_that_was_announced_before() -> None:
    import asyncio

    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    async def scenario() -> None:
        with log.sink(JsonLines(writing)):
            log.emit("wait.timed_out", signal="x")
            with pytest.raises(BlockingIOError):
                os.read(reading, 1 << 16)
            log.emit("output", text="last words")
            lines = os.read(reading, 1 << 16).splitlines()
            assert [json.loads(line)["message"] for line in lines] == ["no signal x by its deadline", "last words"]

    asyncio.run(scenario())
    os.close(reading)
    os.close(writing)


def test_the_lost_and_the_stopped_are_announced_with_their_group(opened: StoreThread, server: Serving) -> None:
    assert ended(opened, start(opened, "says-plain")) == "succeeded"
    [started] = server.saw("worker.started")
    os.kill(server.wait_for("worker.spawned")["pid"], signal.SIGTERM)
    assert server.wait_for("worker.stopped")["group"] == started["group"] == "default"
