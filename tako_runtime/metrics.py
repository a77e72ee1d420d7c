"""Numbers for a monitoring agent: the Prometheus text format, over HTTP, on a loopback port or a unix socket.

Counters come from the events that pass through the server (`Counts.observe`); they begin at 0 with it. Gauges come from
the store, at the moment in which somebody asks, in one operation's time.
"""

import asyncio
import bisect
import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tako_runtime import clock
from tako_runtime.clock import Clock
from tako_runtime.errors import StoreError
from tako_runtime.log import emit
from tako_runtime.run import Reason, Status
from tako_runtime.store.base import CountRuns, ListHealth, Queues
from tako_runtime.store.commit import StoreThread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: How long one request may take, in seconds, from its first byte to the last one of the answer.
PATIENCE = 5.0

#: The largest request that is read, in bytes.
LONGEST = 1 << 13

STEP_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
LATE_SECONDS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 3600.0)

Labels = Mapping[str, str]
Event = Mapping[str, Any]


# --- the text format -------------------------------------------------------------------------------------------------


def family(name: str, kind: str, about: str, samples: Iterable[tuple[str, Labels, float]]) -> str:
    """One metric with all its samples, each a suffix of the name, labels and a value.

    >>> print(family("up", "gauge", "whether", [("", {"host": "a"}, 1)]), end="")
    # HELP up whether
    # TYPE up gauge
    up{host="a"} 1
    """
    about = about.replace("\\", r"\\").replace("\n", r"\n")
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{suffix}{{{inner}}} {_number(value)}" if inner else f"{name}{suffix} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(value)


# --- counters, from events -------------------------------------------------------------------------------------------


class Counter:
    """A number for each combination of labels, which only grows."""

    def __init__(self, name: str, about: str, labels: Sequence[str]) -> None:
        self._name, self._about, self._labels = name, about, labels
        self._values: dict[tuple[str, ...], float] = {}

    def add(self, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0) + 1

    def text(self) -> str:
        samples = [("", dict(zip(self._labels, values, strict=True)), n) for values, n in sorted(self._values.items())]
        return family(self._name, "counter", self._about, samples)


class Histogram:
    """How many durations there were up to each bound, and their sum, in seconds; by one label."""

    def __init__(self, name: str, about: str, label: str, bounds: Sequence[float]) -> None:
        self._name, self._about, self._label, self._bounds = name, about, label, (*bounds, math.inf)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def add(self, label: str, seconds: float) -> None:
        counts = self._counts.setdefault(label, [0] * len(self._bounds))
        counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sums[label] = self._sums.get(label, 0.0) + seconds

    def text(self) -> str:
        samples: list[tuple[str, Labels, float]] = []
        for label, counts in sorted(self._counts.items()):
            so_far = 0
            for bound, count in zip(self._bounds, counts, strict=True):
                so_far += count
                samples.append(("_bucket", {self._label: label, "le": _number(bound)}, so_far))
            samples += [("_sum", {self._label: label}, self._sums[label]), ("_count", {self._label: label}, so_far)]
        return family(self._name, "histogram", self._about, samples)


class Counts:
    """What has happened since the server started, as its own events and those of its workers tell it."""

    def __init__(self) -> None:
        self.ended = Counter("tako_runs_ended_total", "Runs that have ended, by outcome.", ("workflow", "outcome"))
        self.failed = Counter("tako_attempts_failed_total", "Attempts that failed and are retried.", ("workflow",))
        self.steps = Histogram("tako_step_seconds", "How long steps' bodies took.", "workflow", STEP_SECONDS)
        self.lost = Counter("tako_lease_losses_total", "Workers that fell silent past their lease.", ("group",))
        self.starts = Counter("tako_worker_starts_total", "Worker processes that were started.", ("group",))
        self.deaths = Counter("tako_worker_deaths_total", "Worker processes that ended in failure.", ("group",))
        self.late = Histogram(
            "tako_cron_lateness_seconds", "How late after their scheduled time runs were fired.", "workflow",
            LATE_SECONDS,
        )  # fmt: skip

    def observe(self, event: Event) -> None:
        """Count an event. Whatever it carries, it raises nothing: a step's own program may print what looks like one.

        >>> counts = Counts()
        >>> counts.observe({"event": "run.dead", "workflow": "charge"})
        >>> print(counts.ended.text().splitlines()[-1])
        tako_runs_ended_total{workflow="charge",outcome="dead"} 1
        """
        name, workflow, group = event["event"], _label(event, "workflow"), _label(event, "group")
        match name:
            case "step.done" | "step.failed":
                _measure(self.steps, workflow, event.get("ms"))
            case "run.succeeded" | "run.cancelled" | "run.dead":
                self.ended.add(workflow, name.removeprefix("run."))
            case "run.retrying":
                self.failed.add(workflow)
            case "run.reclaimed" if event.get("then") in (Status.DEAD, Status.CANCELLED):
                self.ended.add(workflow, str(event["then"]))
            case "worker.spawned":
                self.starts.add(group)
            case "worker.died":
                self.deaths.add(group)
            case "worker.lost_lease" | "worker.frozen":
                self.lost.add(group)
            case "cron.fired":
                _measure(self.late, workflow, event.get("late_ms"))

    def text(self) -> str:
        counters = (self.ended, self.failed, self.steps, self.lost, self.starts, self.deaths, self.late)
        return "".join(counter.text() for counter in counters)


def _label(event: Event, name: str) -> str:
    value = event.get(name)
    return value if isinstance(value, str) else ""


def _measure(histogram: Histogram, label: str, ms: object) -> None:
    if isinstance(ms, int | float) and 0 <= ms < math.inf:
        histogram.add(label, ms / 1_000)


# --- gauges, from the store ------------------------------------------------------------------------------------------

#: The states that a live run may be in: each is shown, with 0 where there is none.
_LIVE = [(str(Status.PENDING), str(reason)) for reason in Reason] + [(str(Status.RUNNING), "claimed")]


Samples = list[tuple[str, Labels, float]]

#: What is told of each store: the metric's name, and what it says.
_GAUGES = {
    "tako_queue_depth": "Runs that are due and that nobody has claimed yet.",
    "tako_queue_oldest_due_seconds": "For how long the oldest of them has been due.",
    "tako_runs": "Runs that have not ended, by state.",
    "tako_group_unhealthy": "Hosts on which a group's workers cannot work.",
}


async def gauges(stores: Sequence[StoreThread], groups: Iterable[str], now: int) -> str:
    """How things stand at `now`, in the environment's store and in that beside it, whose samples say `local="true"`."""
    names = sorted(groups)
    marks: list[Labels] = [{"local": "true"} if n else {} for n in range(len(stores))]
    found = await asyncio.gather(*[_gauges(store, names, now, mark) for store, mark in zip(stores, marks, strict=True)])
    return "".join(
        family(name, "gauge", about, [sample for each in found for sample in each[name]])
        for name, about in _GAUGES.items()
    )


async def _gauges(store: StoreThread, groups: Iterable[str], now: int, mark: Labels) -> dict[str, Samples]:
    """Of one store. The three reads travel together: one turn of the store, one transaction."""
    queues, unhealthy, live = await asyncio.gather(
        store.do(Queues(now=now)), store.do(ListHealth()), store.do(CountRuns())
    )
    depth: dict[str, float] = dict.fromkeys(groups, 0)
    age, sick = dict(depth), dict(depth)
    for queue in queues:
        depth[queue.group] = queue.depth
        age[queue.group] = max(0, now - queue.oldest_due_at) / clock.SECOND
    for report in unhealthy:
        sick[report.group] = sick.get(report.group, 0) + 1
    states = {**dict.fromkeys(_LIVE, 0), **live}

    def by_group(values: Mapping[str, float]) -> Samples:
        return [("", {"group": group, **mark}, value) for group, value in values.items()]

    runs: Samples = [("", {"status": status, "reason": reason, **mark}, n) for (status, reason), n in states.items()]
    samples: list[Samples] = [by_group(depth), by_group(age), runs, by_group(sick)]
    return dict(zip(_GAUGES, samples, strict=True))


# --- the endpoint ----------------------------------------------------------------------------------------------------


class Metrics:
    """The endpoint of one server: listens within `async with`. `listen` is "host:port", the path of a socket, or None
    for no endpoint at all; `stores()` are those that are looked at, the environment's first; `groups()` are shown
    though nothing waits in them."""

    def __init__(
        self,
        listen: str | None,
        stores: Callable[[], Sequence[StoreThread]],
        groups: Callable[[], Iterable[str]],
        clock: Clock,
    ) -> None:
        self._listen, self._stores, self._groups, self._clock = listen, stores, groups, clock
        self._counts = Counts()
        self._server: asyncio.Server | None = None

    def observe(self, event: Event) -> None:
        """An event of the server's own, or of a worker."""
        if self._listen is not None:
            self._counts.observe(event)

    async def __aenter__(self) -> Self:
        """Work is worth more than its numbers: where nothing can listen, that is told, and all else goes on."""
        if self._listen is not None:
            try:
                self._server = await _bound(self._listen, self._answer)
            except OSError as error:
                emit("metrics.failed", listen=self._listen, error=error.strerror or str(error))
            else:
                emit("metrics.listening", listen=self._listen)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None and self._listen is not None:
            self._server.close()
            if self._listen.startswith("/"):
                with contextlib.suppress(OSError):
                    Path(self._listen).unlink()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer; what is no request, or takes too long, is closed."""
        try:
            async with asyncio.timeout(PATIENCE):
                head = await reader.readuntil(b"\r\n\r\n")
                request = re.match(rb"([A-Z]+) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r\n", head)
                if request is not None:
                    writer.write(await self._response(request[1], request[2]))
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _response(self, method: bytes, path: bytes) -> bytes:
        if (method, path) != (b"GET", b"/metrics"):
            return _http("404 Not Found", "text/plain", "There is GET /metrics.\n")
        try:
            async with asyncio.timeout(PATIENCE / 2):
                stands = await gauges(self._stores(), self._groups(), self._clock.now())
        except (StoreError, TimeoutError) as error:
            return _http("503 Service Unavailable", "text/plain", f"the store does not answer: {error}\n")
        return _http("200 OK", CONTENT_TYPE, stands + self._counts.text())


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


async def _bound(listen: str, answer: Handler) -> asyncio.Server:
    if not listen.startswith("/"):
        host, _, port = listen.rpartition(":")
        return await asyncio.start_server(answer, host.strip("[]"), int(port), limit=LONGEST)
    server = await asyncio.start_unix_server(answer, listen, limit=LONGEST)
    Path(listen).chmod(0o660)  # an agent of this user's, or of its group
    return server


def _http(status: str, kind: str, body: str) -> bytes:
    data = body.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return head.encode() + data
