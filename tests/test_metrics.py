"""The metrics endpoint: what is counted, how it is spelled, and how it is asked for over a real socket."""

import asyncio
import contextlib
import math
import re
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Caller, until
from hypothesis import given
from hypothesis import strategies as st
from serving import project, serving
from workers import now, tamper

from tako_runtime import clock, log
from tako_runtime.control import Control
from tako_runtime.metrics import CONTENT_TYPE, Counts, Metrics, family, gauges
from tako_runtime.state import Waits
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import new_run

# --- a strict reader of the text format ------------------------------------------------------------------------------

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\n"])*)"(?:,|$)')
_SAMPLE = re.compile(rf"({_NAME})(?:\{{(.*)\}})? (\+Inf|-Inf|NaN|-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)")
_ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


class Read(NamedTuple):
    kinds: dict[str, str]
    about: dict[str, str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def has(self, name: str, **labels: str) -> bool:
        return (name, frozenset(labels.items())) in self.samples


def read(text: str) -> Read:
    """The samples of an exposition; fails for whatever the format does not allow."""
    assert text.endswith("\n")
    found = Read({}, {}, {})
    family = ""
    for line in text.split("\n")[:-1]:
        if head := re.fullmatch(rf"# (HELP|TYPE) ({_NAME}) (.*)", line):
            what, name, rest = head.groups()
            place = found.about if what == "HELP" else found.kinds
            assert name not in place, "each metric is told of once, its samples together"
            assert (what == "HELP") != (name in found.about), "HELP first, then TYPE"
            assert what == "HELP" or rest in ("counter", "gauge", "histogram")
            place[name], family = rest, name
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, line
        name, inner, number = sample.groups()
        suffixes = ("_bucket", "_sum", "_count") if found.kinds[family] == "histogram" else ("",)
        assert name in [family + suffix for suffix in suffixes], f"{name} stands among those of {family}"
        labels, at = {}, 0
        while inner and at < len(inner):
            label = _LABEL.match(inner, at)
            assert label, inner
            labels[label[1]] = re.sub(r"\\[\\n\"]", lambda code: _ESCAPES[code[0]], label[2])
            at = label.end()
        key = (name, frozenset(labels.items()))
        assert key not in found.samples, "no sample twice"
        found.samples[key] = float(number)
    assert found.kinds.keys() == found.about.keys()
    for name in (name for name, kind in found.kinds.items() if kind == "histogram"):
        _check_histogram(found, name)
    return found


def _check_histogram(found: Read, name: str) -> None:
    buckets: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
    for (sample, labels), count in found.samples.items():
        if sample == f"{name}_bucket":
            bound = dict(labels)["le"]
            buckets.setdefault(labels - {("le", bound)}, []).append((float(bound), count))
    for labels, counts in buckets.items():
        assert counts == sorted(counts), "bounds and counts only grow"
        assert counts[-1] == (math.inf, found.samples[f"{name}_count", labels])
        assert (f"{name}_sum", labels) in found.samples


# --- the format ------------------------------------------------------------------------------------------------------


@given(label=st.text(st.characters(exclude_categories=["Cs"])), value=st.floats(allow_nan=False))
def test_any_label_and_any_value_can_be_read_back(label: str, value: float) -> None:
    about = label.replace("\n", " ").replace("\r", " ")
    found = read(family("some_name", "gauge", "about it", [("", {"a": label, "b": about}, value)]))
    assert found.value("some_name", a=label, b=about) == value


def test_help_is_one_line_whatever_is_in_it() -> None:
    assert read(family("some_name", "gauge", "a\nb\\c", [])).about == {"some_name": r"a\nb\\c"}


# --- what is counted -------------------------------------------------------------------------------------------------

EVENTS: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({"event": "run.succeeded", "workflow": "w"}, "tako_runs_ended_total", {"workflow": "w", "outcome": "succeeded"}),
    ({"event": "run.cancelled", "workflow": "w"}, "tako_runs_ended_total", {"workflow": "w", "outcome": "cancelled"}),
    ({"event": "run.dead", "workflow": "w"}, "tako_runs_ended_total", {"workflow": "w", "outcome": "dead"}),
    (
        {"event": "run.reclaimed", "workflow": "w", "then": "dead"},
        "tako_runs_ended_total", {"workflow": "w", "outcome": "dead"},
    ),
    ({"event": "run.retrying", "workflow": "w"}, "tako_attempts_failed_total", {"workflow": "w"}),
    ({"event": "step.done", "workflow": "w", "ms": 30}, "tako_step_seconds_count", {"workflow": "w"}),
    ({"event": "step.failed", "workflow": "w", "ms": 0.5}, "tako_step_seconds_count", {"workflow": "w"}),
    ({"event": "worker.spawned", "group": "g", "pid": 1}, "tako_worker_starts_total", {"group": "g"}),
    ({"event": "worker.died", "group": "g", "how": "exit code 1"}, "tako_worker_deaths_total", {"group": "g"}),
    ({"event": "worker.lost_lease", "group": "g"}, "tako_lease_losses_total", {"group": "g"}),
    ({"event": "worker.frozen", "group": "g"}, "tako_lease_losses_total", {"group": "g"}),
    ({"event": "cron.fired", "workflow": "w", "late_ms": 900}, "tako_cron_lateness_seconds_count", {"workflow": "w"}),
]  # fmt: skip


@pytest.mark.parametrize(("event", "name", "labels"), EVENTS, ids=lambda value: str(value)[:40])
def test_each_event_counts_once_where_it_belongs(event: dict[str, Any], name: str, labels: dict[str, str]) -> None:
    assert event["event"] in log.WORDS
    counts = Counts()
    assert not read(counts.text()).samples
    for n in (1, 2):
        counts.observe(event)
        found = read(counts.text())
        assert found.value(name, **labels) == n
        assert {
            sample.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for sample, _ in found.samples
        } == {name.removesuffix("_count")}, "and nowhere else"


def test_a_step_is_in_the_bucket_of_its_time() -> None:
    counts = Counts()
    for ms in (5, 30, 700, 10_000_000):
        counts.observe({"event": "step.done", "workflow": "w", "ms": ms})
    found = read(counts.text())
    at = [found.value("tako_step_seconds_bucket", workflow="w", le=le) for le in ("0.005", "0.025", "0.1", "1", "+Inf")]
    assert at == [1, 1, 2, 3, 4]
    assert found.value("tako_step_seconds_sum", workflow="w") == pytest.approx(10_000.735)


@pytest.mark.parametrize(
    "event",
    [
        {"event": "step.done"},
        {"event": "step.done", "workflow": {"a": 1}, "ms": [1]},
        {"event": "step.done", "workflow": "w", "ms": "soon"},
        {"event": "step.done", "workflow": "w", "ms": math.nan},
        {"event": "step.done", "workflow": "w", "ms": -1},
        {"event": "cron.fired", "workflow": "w"},
        {"event": "run.reclaimed", "workflow": "w", "then": "again at 12"},
        {"event": "run.reclaimed", "workflow": "w", "then": {"a": []}},
        {"event": "output", "message": "run.dead"},
    ],
    ids=str,
)
def test_an_event_without_what_is_counted_counts_nothing(event: dict[str, Any]) -> None:
    counts = Counts()
    counts.observe(event)
    assert not read(counts.text()).samples


def test_gauges_say_how_the_store_stands_and_every_known_group_is_there(caller: Caller, opened: StoreThread) -> None:
    for age in (1, 30):
        caller.enqueue(group="email", due_at=caller.now - age * clock.SECOND)
    caller.enqueue(group="email", due_at=caller.now + clock.HOUR)
    caller.started()
    parked = caller.started()
    caller.wait(parked, "approval")
    caller.settle(parked, Waits(("approval",), None))
    caller.do(base.ReportHealth(group="media", host="web-1", now=caller.now, reason="no interpreter"))
    caller.do(base.ReportHealth(group="media", host="web-2", now=caller.now, reason="no interpreter"))
    found = read(asyncio.run(gauges([opened], ["default", "media", "quiet"], caller.now)))
    assert found.value("tako_queue_depth", group="email") == 2, "what is due later does not wait"
    assert found.value("tako_queue_oldest_due_seconds", group="email") == 30
    assert found.value("tako_queue_depth", group="quiet") == found.value("tako_queue_depth", group="default") == 0
    assert found.value("tako_queue_oldest_due_seconds", group="quiet") == 0
    assert found.value("tako_runs", status="running", reason="claimed") == 1
    assert found.value("tako_runs", status="pending", reason="waiting") == 1
    assert found.value("tako_runs", status="pending", reason="queued") == 3
    assert found.value("tako_runs", status="pending", reason="retrying") == 0
    assert found.value("tako_group_unhealthy", group="media") == 2
    assert found.value("tako_group_unhealthy", group="default") == 0
    caller.do(base.ReportHealth(group="media", host="web-1", now=caller.now, reason=None))
    found = read(asyncio.run(gauges([opened], ["media"], caller.now)))
    assert found.value("tako_group_unhealthy", group="media") == 1


def test_what_has_come_due_since_somebody_looked_is_in_the_queue(caller: Caller, opened: StoreThread) -> None:
    caller.enqueue(due_at=caller.now + clock.SECOND)
    caller.clock.advance(3 * clock.SECOND)
    found = read(asyncio.run(gauges([opened], [], caller.now)))
    assert found.value("tako_queue_depth", group="default") == 1
    assert found.value("tako_queue_oldest_due_seconds", group="default") == 2


# --- the endpoint ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def connected(listen: str) -> socket.socket:
    if listen.startswith("/"):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(listen)
        return client
    return socket.create_connection(("127.0.0.1", int(listen.rpartition(":")[2])), 30)


def ask(listen: str, request: bytes) -> tuple[str, dict[str, str], str]:
    """The status line, the headers and the body of the answer; empty ones where the connection was closed without."""
    with connected(listen) as client:
        client.sendall(request)
        data = b""
        while part := client.recv(65536):
            data += part
    head, _, body = data.decode().partition("\r\n\r\n")
    status, *headers = head.split("\r\n")
    return status, dict(header.split(": ", 1) for header in headers), body


def scrape(listen: str) -> Read:
    status, headers, body = ask(listen, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
    assert status == "HTTP/1.1 200 OK"
    assert headers["Content-Type"] == CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    assert int(headers["Content-Length"]) == len(body.encode())
    return read(body)


FLOWS = """
    import os
    import signal
    from tako_runtime import Backoff, workflow

    SOON = Backoff(base="1ms", max="1ms")

    @workflow("greet")
    async def greet(step):
        await step.run("one", lambda: 1)
        await step.run("two", lambda: 2)

    @workflow("fail", retries=1, backoff=SOON)
    async def fail(step):
        await step.run("break", lambda: 1 / 0)

    @workflow("bails", group="email")
    async def bails(step):
        step.bail("enough")

    @workflow("dies", retries=0)
    async def dies(step):
        os.kill(os.getpid(), signal.SIGKILL)

    @workflow("ticks", schedule="* * * * * *")
    async def ticks(step): ...
"""


def start(opened: StoreThread, workflow: str, group: str = "default", retries: int = 0) -> None:
    run = new_run(workflow, group, "null", now=now(), due=now(), retries=retries, backoff_base=1_000, backoff_max=1_000)
    opened.do_sync(base.Enqueue(runs=[run], now=now()))


def test_a_parked_run_that_a_command_cancels_is_counted_and_logged_as_any_other(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = """
        from tako_runtime import workflow

        @workflow("nap")
        async def nap(step):
            await step.sleep("1h")
    """
    listen = str(home.data_dir / "metrics.sock")
    root = project(tmp_path / "project", flows, f'[metrics]\nlisten = "{listen}"')
    start(opened, "nap")
    with serving(home, root) as server:
        run = server.wait_for("run.sleeping")["run"]
        Control(opened, app_dir=home.app_dir).cancel(run, "enough")
        assert server.wait_for("run.cancelled")["message"] == "cancelled: enough"
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="nap", outcome="cancelled"))
        assert scrape(listen).value("tako_runs_ended_total", workflow="nap", outcome="cancelled") == 1


@pytest.mark.parametrize("kind", ["port", "socket"])
def test_a_server_serves_what_has_happened_on_it(kind: str, opened: StoreThread, home: Home, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}" if kind == "port" else str(home.data_dir / "metrics.sock")
    root = project(tmp_path / "project", FLOWS, f'[metrics]\nlisten = "{listen}"')
    start(opened, "greet")
    start(opened, "fail", retries=1)
    start(opened, "bails", "email")
    with serving(home, root, "--log-level", "info") as server:
        server.wait_for("metrics.listening")
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="fail", outcome="dead"))
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="greet", outcome="succeeded"))
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="bails", outcome="cancelled"))
        start(opened, "dies")
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="dies", outcome="dead"))
        until(lambda: scrape(listen).has("tako_runs_ended_total", workflow="ticks", outcome="succeeded"))
        until(lambda: scrape(listen).value("tako_worker_starts_total", group="default") == 2)
        found = scrape(listen)
        assert found.value("tako_step_seconds_count", workflow="greet") == 2
        assert found.value("tako_step_seconds_count", workflow="fail") == 2
        assert found.value("tako_attempts_failed_total", workflow="fail") == 1
        assert found.value("tako_worker_starts_total", group="email") == 1
        assert found.value("tako_worker_deaths_total", group="default") == 1
        assert found.value("tako_group_unhealthy", group="email") == 0
        assert not server.saw("step.done"), "what is counted is not logged for that: the level is info"
        assert server.saw("run.succeeded")
    if kind == "socket":
        assert not Path(listen).exists()


def test_only_get_metrics_is_answered_with_numbers(opened: StoreThread, home: Home) -> None:
    listen = str(home.data_dir / "metrics.sock")

    def look() -> None:
        for request in (b"GET / HTTP/1.1", b"GET /metrics/x HTTP/1.1", b"POST /metrics HTTP/1.1", b"HEAD / HTTP/1.0"):
            assert ask(listen, request + b"\r\n\r\n")[0] == "HTTP/1.1 404 Not Found"
        for request in (b"hello\r\n\r\n", b"GET /metrics\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"x" * 100_000):
            with contextlib.suppress(ConnectionError):  # closed before all of it was sent
                assert ask(listen, request) == ("", {}, "")
        with connected(listen):  # one who asks nothing holds nobody up
            assert ask(listen, b"GET /metrics?x=1 HTTP/1.0\r\n\r\n")[0] == "HTTP/1.1 200 OK"

    async def scenario() -> None:
        async with Metrics(listen, lambda: [opened], list, clock.SystemClock()):
            await asyncio.to_thread(look)

    asyncio.run(scenario())


def test_a_store_that_does_not_answer_is_said_so_and_holds_nobody_up(opened: StoreThread, home: Home) -> None:
    listen = str(home.data_dir / "metrics.sock")
    tamper(home, "DROP TABLE unhealthy")

    async def scenario() -> None:
        async with Metrics(listen, lambda: [opened], list, clock.SystemClock()):
            status, _, body = await asyncio.to_thread(ask, listen, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert status == "HTTP/1.1 503 Service Unavailable"
        assert "no such table" in body

    asyncio.run(scenario())


def test_an_address_that_is_taken_is_told_and_all_else_goes_on(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        root = project(tmp_path / "project", FLOWS, f'[metrics]\nlisten = "{listen}"')
        start(opened, "greet")
        with serving(home, root) as server:
            failed = server.wait_for("metrics.failed")
            assert listen in failed["message"]
            assert failed["level"] == "error"
            server.wait_for("run.succeeded")


def test_without_the_setting_nothing_listens(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    root = project(tmp_path / "project", FLOWS)
    start(opened, "greet")
    with serving(home, root) as server:
        server.wait_for("run.succeeded")
        assert not server.saw("metrics.listening")
