"""One event, one line; every event name in one place.

An event is a fact with data: `emit("step.done", run=..., step=..., ms=...)`. `WORDS` has every name, its level and its
sentence. Sinks take the facts; `JsonLines` writes one JSON object a line, with the sentence as `message`.
"""

import asyncio
import contextvars
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from tako_runtime import clock

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
LEVELS = {DEBUG: "debug", INFO: "info", WARNING: "warning", ERROR: "error"}
NUMBERS = {name: number for number, name in LEVELS.items()}

#: event: (level, sentence). The sentence's fields are facts of the event.
WORDS: dict[str, tuple[int, str]] = {
    "run.started": (INFO, "attempt {attempt} of {max_attempts} started"),
    "run.resumed": (INFO, "goes on in attempt {attempt} of {max_attempts}, steps done before: {done}"),
    "run.succeeded": (INFO, "succeeded in {took}"),
    "run.retrying": (WARNING, "attempt {attempt} of {max_attempts} failed, again in {pause}: {error}"),
    "run.sleeping": (INFO, "sleeps until {until}"),
    "run.waiting": (INFO, "waits for {signals}, until {until}"),
    "run.queued": (INFO, "handed back at a step boundary, goes on under the next worker"),
    "run.cancelled": (INFO, "cancelled: {reason}"),
    "run.dead": (ERROR, "dead: {reason}"),
    "run.lost": (WARNING, "claim lost: somebody else has this run, nothing more is written here"),
    "run.reclaimed": (WARNING, "{message}; {then}"),
    "worker.broken": (ERROR, "worker {worker} cannot go on and gives itself up: {error}"),
    "step.done": (DEBUG, "step {step} done in {took}"),
    "step.cached": (DEBUG, "step {step} was done already"),
    "step.retrying": (WARNING, "step {step} failed, try {n} of {tries}, again in {pause}: {error}"),
    "step.failed": (WARNING, "step {step} failed: {error}"),
    "step.left": (WARNING, "step {step} ran past its timeout; its thread cannot be stopped and is left behind"),
    "wait.done": (DEBUG, "got signal {signal}"),
    "wait.timed_out": (INFO, "no signal {signal} by its deadline"),
    "store.busy": (WARNING, "a write waits and is tried again: {error}"),
    "worker.started": (INFO, "worker {worker} of group {group} started, {concurrency} runs at once: {workflows}"),
    "worker.draining": (INFO, "worker {worker} drains, runs in hand: {runs}"),
    "worker.stopped": (INFO, "worker {worker} stopped: {reason}"),
    "worker.lost_lease": (ERROR, "worker {worker} lost its lease and gives up what it has in hand (runs: {runs})"),
    "worker.died": (WARNING, "the worker process {pid} is gone: {how}"),
    "worker.frozen": (ERROR, "worker {worker} (process {pid}) has not renewed its lease: it is ended and replaced"),
    "worker.claimed": (DEBUG, "worker {worker} has claimed its first run"),
    "worker.stalled": (
        ERROR,
        "worker {worker} (process {pid}) has claimed nothing for {seconds} s, though runs are due and it has free "
        "slots: it is replaced",
    ),
    "worker.late": (ERROR, "the worker process {pid} of group {group} is not up after {seconds} s: it is ended"),
    "worker.spawned": (DEBUG, "worker process {pid} for group {group}"),
    "group.paused": (WARNING, "group {group} is tried again in {pause}; failures in a row: {failures}"),
    "group.unhealthy": (ERROR, "group {group} cannot work: {reason}"),
    "group.healthy": (INFO, "group {group} works again"),
    "group.undeclared": (
        WARNING,
        "group {group} has due runs that no worker can take, as no file declares {workflow!r} there: they are kept",
    ),
    "cron.fired": (INFO, "fired for {scheduled_at}"),
    "cron.passed_over": (WARNING, "not fired ({note}) {error}"),
    "server.unread": (ERROR, "the workflows cannot be read: {error}"),
    "file.broken": (ERROR, "{file}:{line}: {error}"),
    "output": (INFO, "{text}"),
}

#: What a supervisor must hear of its workers, whatever the level of the log is.
HEARD = frozenset({"worker.started", "worker.claimed", "file.broken"})

#: Facts of the run and step that the code is in: they go with every event, and with what a handler prints.
_context: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("tako_log", default=None)
#: The step whose body this code runs in, if any: it goes with every event too, and tells a step inside a step.
in_step: contextvars.ContextVar[str | None] = contextvars.ContextVar("tako_step", default=None)
_sinks: list[Callable[[dict[str, Any]], None]] = []
_time = clock.SystemClock()


def emit(event: str, **facts: Any) -> None:
    """Announce a fact to every sink. Costs next to nothing where there is none."""
    if not _sinks:
        return
    line = {"at": _time.now(), "level": WORDS[event][0], "event": event, **(_context.get() or {})}
    if (step := in_step.get()) is not None:
        line["step"] = step
    line.update(facts)
    for sink in _sinks:
        sink(line)


def words(line: dict[str, Any]) -> str:
    """The sentence of an event, with its facts put in."""
    return WORDS[line["event"]][1].format_map(_Lenient(line))


class about:  # noqa: N801 -- read as a word: `with about(run=...)`
    """Every event within carries these facts."""

    __slots__ = ("_facts", "_token")

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def __enter__(self) -> None:
        outer = _context.get()
        self._token = _context.set({**outer, **self._facts} if outer else self._facts)

    def __exit__(self, *_: object) -> None:
        _context.reset(self._token)


@contextmanager
def sink(take: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Events go to `take` as well, within."""
    _sinks.append(take)
    try:
        yield
    finally:
        _sinks.remove(take)


class JsonLines:
    """A sink: one JSON object a line on a file descriptor. What one pass of the event loop emits is one write."""

    def __init__(self, fd: int, least: int = INFO) -> None:
        self._fd, self._least = fd, least
        self._lines: list[bytes] = []
        self._lock = threading.Lock()

    def __call__(self, line: dict[str, Any]) -> None:
        if line["level"] < self._least and line["event"] not in HEARD:
            return
        shown = {**line, "at": clock.iso(line["at"]), "level": LEVELS[line["level"]], "message": words(line)}
        self._append(msgspec.json.encode(shown, enc_hook=str) + b"\n")

    def _append(self, data: bytes) -> None:
        with self._lock:
            self._lines.append(data)
            first = len(self._lines) == 1
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
        else:
            if first:
                loop.call_soon(self.flush)

    def pass_on(self, source: str, line: dict[str, Any]) -> None:
        """Write an event of another process as it is, with where it comes from."""
        if NUMBERS[line["level"]] < self._least:
            return
        self._append(msgspec.json.encode({**line, "source": source}) + b"\n")

    def flush(self) -> None:
        with self._lock:
            data, self._lines = b"".join(self._lines), []
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BrokenPipeError:  # nobody reads any more; the work is worth more than its log
                    return


class Output(io.TextIOBase):
    """Stands in for `sys.stdout` in a worker: what a handler prints is an event with its run and step, line by line."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._rest = threading.local()

    def write(self, text: str) -> int:
        held = getattr(self._rest, "text", "") + text
        *lines, self._rest.text = held.split("\n")
        for line in lines:
            emit("output", stream=self._stream, text=line)
        return len(text)

    def flush(self) -> None:
        held = getattr(self._rest, "text", "")
        if held:
            self._rest.text = ""
            emit("output", stream=self._stream, text=held)

    def writable(self) -> bool:
        return True


class LoggingHandler(logging.Handler):
    """Puts Python's `logging` into the same log, with the run and step it came from."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            emit("output", stream="logging", logger=record.name, text=self.format(record), level=_level(record.levelno))
        except Exception:  # noqa: BLE001 -- logging's own rule: a broken record must not break the program
            self.handleError(record)


def _level(number: int) -> int:
    return max((level for level in LEVELS if level <= number), default=DEBUG)


class _Lenient(dict[str, Any]):
    """The facts; `took` is spelled from `ms` only where somebody reads it."""

    def __missing__(self, key: str) -> str:
        return clock.spell(round(self["ms"] * 1_000)) if key == "took" and "ms" in self else "?"
