"""One event, one line; every event name in one place.

An event is a fact with data: `emit("step.done", run=..., step=..., ms=...)`. `WORDS` has every name, its level and its
sentence. Sinks take the facts; `JsonLines` writes one JSON object a line, with the sentence as `message`.

Events of a run carry `run`, `workflow`, `attempt` and `group`, those of a step `step` too. `ms` is how long it took: a
step, its body; a run that has ended, since it first started; one that stops for now, this pass; one that starts or goes
on, how long it had been due.
"""

import asyncio
import contextvars
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
    "run.enqueued": (INFO, "enqueued"),
    "run.started": (INFO, "attempt {attempt} of {max_attempts} started"),
    "run.resumed": (INFO, "goes on in attempt {attempt} of {max_attempts}, steps done before: {done}"),
    "run.woken": (INFO, "woken by {by}, goes on in attempt {attempt} of {max_attempts}, steps done before: {done}"),
    "run.succeeded": (INFO, "succeeded in {took}"),
    "run.retrying": (WARNING, "attempt {attempt} of {max_attempts} failed, again in {pause}{scaled}: {error}"),
    "run.sleeping": (INFO, "sleeps until {until}{scaled}"),
    "run.waiting": (INFO, "waits for {signals}, until {until}{scaled}"),
    "run.queued": (INFO, "handed back at a step boundary, goes on under the next worker"),
    "run.cancelled": (INFO, "cancelled: {reason}"),
    "run.dead": (ERROR, "dead: {reason}"),
    "run.diverged": (WARNING, "did before what its code does not ask for now: {steps}. Was that renamed or removed?"),
    "run.lost": (WARNING, "claim lost: somebody else has this run, nothing more is written here"),
    "run.reclaimed": (WARNING, "{message}; {then}{scaled}"),
    "run.cut_off": (
        WARNING,
        "did not stop {where} when its worker had to; no attempt is used up, and what was cut off runs again under the "
        "next worker",
    ),
    "worker.broken": (ERROR, "worker {worker} cannot go on and gives itself up: {error}"),
    "step.done": (DEBUG, "step {step} done in {took}"),
    "step.cached": (DEBUG, "step {step} was done already"),
    "step.retrying": (WARNING, "step {step} failed, try {n} of {tries}, again in {pause}{scaled}: {error}"),
    "step.failed": (WARNING, "step {step} failed: {error}"),
    "step.left": (WARNING, "step {step} is not waited for any longer; its thread cannot be stopped and is left behind"),
    "wait.done": (DEBUG, "got signal {signal}"),
    "wait.timed_out": (INFO, "no signal {signal} by its deadline{scaled}"),
    "clock.off": (
        WARNING,
        "this machine's clock is {off} {direction} that of {database}, which it goes by from now on. Have it set by "
        "NTP: timedatectl set-ntp true",
    ),
    "clock.right": (INFO, "this machine's clock agrees with that of {database} again"),
    "relay.listening": (INFO, "hears of what other servers do through {database}"),
    "relay.polling": (
        WARNING,
        "{database} is behind a pooler, where nobody can listen: what other servers do is looked for once a second. "
        "The secret DATABASE_DIRECT_URL may name the database itself",
    ),
    "relay.lost": (WARNING, "the ear at {database} is lost, once a second has to do until it is back: {error}"),
    "store.busy": (WARNING, "a write waits and is tried again: {error}"),
    "store.on_network": (
        ERROR,
        "the store in {folder} is on a network disk ({kind}), where SQLite's locks do not hold: move it to a disk of "
        "this machine",
    ),
    "store.pruned": (INFO, "what is past its retention is gone: ended runs {runs}, kept signals {signals}"),
    "worker.started": (INFO, "worker {worker} of group {group} started, {concurrency} runs at once: {workflows}"),
    "worker.draining": (INFO, "worker {worker} drains, runs in hand: {runs}"),
    "worker.stopped": (INFO, "worker {worker} stopped: {reason}"),
    "worker.lost_lease": (ERROR, "worker {worker} lost its lease and gives up what it has in hand (runs: {runs})"),
    "worker.unstoppable": (
        ERROR,
        "worker {worker} has lost its lease and cannot stop what is at work in threads ({calls}): the process ends, "
        "before others start that",
    ),
    "worker.died": (WARNING, "the worker process {pid} is gone: {how}"),
    "worker.frozen": (ERROR, "worker {worker} (process {pid}) has not renewed its lease: it is ended and replaced"),
    "worker.fit": (INFO, "a worker of group {group} could begin: {workflows}"),
    "worker.declared": (DEBUG, "the worker process has imported the project's files"),
    "worker.claimed": (DEBUG, "worker {worker} has claimed its first run"),
    "worker.stalled": (
        ERROR,
        "worker {worker} (process {pid}) has claimed nothing for {seconds} s, though runs are due and it has free "
        "slots: it is replaced",
    ),
    "worker.late": (ERROR, "the worker process {pid} of group {group} is not up after {seconds} s: it is ended"),
    "worker.spawned": (DEBUG, "worker process {pid} for group {group}"),
    "debugger.opened": (INFO, "stands at {file}:{line}"),
    "debugger.ignored": (
        WARNING,
        "breakpoint() at {file}:{line} is passed over: there is no terminal",
    ),
    "debugger.closed": (DEBUG, "goes on"),
    "code.declared": (DEBUG, "workflows of the project: {workflows}, made of {files} files"),
    "code.reloaded": (INFO, "the new code is at work after {took}"),
    "code.kept": (WARNING, "the code as it was before goes on: {reason}"),
    "group.paused": (WARNING, "group {group} is tried again in {pause}; failures in a row: {failures}"),
    "group.unhealthy": (ERROR, "group {group} cannot work: {reason}"),
    "group.healthy": (INFO, "group {group} works again"),
    "group.undeclared": (
        WARNING,
        "group {group} has due runs that no worker can take, as no file declares {workflow!r} there: they are kept",
    ),
    "app.started": (INFO, "the app is started as process {pid}: {command}"),
    "app.healthy": (INFO, "the app answers at {url}, {took} after its start"),
    "app.late": (ERROR, "the app has not answered 200 at {url} for {seconds} s since its start: {error}"),
    "app.unhealthy": (ERROR, "the app does not answer 200 at {url} any more: {error}"),
    "app.ended": (ERROR, "the app's process {pid} is gone ({how}), it is started again in {pause}"),
    "app.failed": (ERROR, "the app cannot be started, tried again in {pause}: {error}"),
    "app.stopped": (INFO, "the app has stopped: {how}"),
    "signal.brought": (INFO, "signal {signal}, which the shared store kept, woke local runs here: {runs}"),
    "cron.fired": (INFO, "fired for {scheduled_at}{scaled}"),
    "cron.passed_over": (WARNING, "not fired ({note}) {error}"),
    "server.trial": (INFO, "release {release} proves itself beside the one that runs: {what}"),
    "server.refused": (ERROR, "release {release} is not taken: {error}"),
    "server.took_over": (INFO, "took over from process {pid}, which drains"),
    "server.handed_over": (INFO, "another release takes over: what is in hand ends, or goes on there"),
    "server.unread": (ERROR, "the workflows cannot be read: {error}"),
    "file.importing": (DEBUG, "imports {file}"),
    "file.broken": (ERROR, "{file}:{line}: {error}"),
    "metrics.listening": (INFO, "metrics are served on {listen}"),
    "metrics.failed": (ERROR, "metrics cannot be served on {listen}: {error}"),
    "secret.masked": (WARNING, "the value of secret {name} turned up in {place}; it is masked there"),
    "secret.short": (WARNING, "secrets too short to be masked (less than {least} characters): {names}"),
    "secret.changed": (INFO, "secrets have changed: those who have the old ones end at their next step"),
    "secret.unread": (ERROR, "the secrets cannot be read, those that were known go on: {error}"),
    "secret.refused": (ERROR, "the changed secrets are of no use, those that were known go on: {error}"),
    "secret.missing": (WARNING, "required secrets that are not set: {names}"),
    "feed.missing": (WARNING, "nobody can look on, tako runs tail included: {path}: {error}"),
    "tail.live": (INFO, "live from {what}, process {pid}"),
    "tail.alone": (INFO, "no supervisor runs here: what follows is what the store has, looked at once a second"),
    "output": (INFO, "{text}"),
}

#: What a supervisor must hear of its workers, whatever the level of the log is.
HEARD = frozenset(
    {"file.importing", "worker.started", "worker.declared", "worker.claimed", "worker.fit", "file.broken"}
)

#: Facts of the run and step that the code is in: they go with every event, and with what a handler prints.
_context: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("tako_log", default=None)
#: The step whose body this code runs in, if any: it goes with every event too, and tells a step inside a step.
in_step: contextvars.ContextVar[str | None] = contextvars.ContextVar("tako_step", default=None)
#: Told, with a run's facts, when a pass over it is over.
at_end: list[Callable[[dict[str, Any]], None]] = []
_sinks: list[Callable[[dict[str, Any]], None]] = []
#: The least level that any sink takes.
_least = ERROR + 1
_time = clock.SystemClock()
#: Takes the values of secrets out of a text: (text, place) -> text. None where this process has none.
_mask: Callable[[str, str], str] | None = None
#: Facts that are ours: no value can be in them, and none must change them.
_OURS = frozenset(("at", "level", "event"))


def emit(event: str, **facts: Any) -> None:
    """Announce a fact to every sink. Costs next to nothing where none wants it."""
    if facts.get("level", WORDS[event][0]) < _least and event not in HEARD:
        return
    line = {"at": _time.now(), "level": WORDS[event][0], "event": event, **(_context.get() or {})}
    if (step := in_step.get()) is not None:
        line["step"] = step
    line.update(facts)
    if _mask is not None:
        line = _masked(line, _mask)
    for sink in _sinks:
        sink(line)


def mask_with(mask: Callable[[str, str], str] | None) -> None:
    """Every text of every event passes `mask(text, place)` from now on: this is where lines leave for the log."""
    global _mask
    _mask = mask


def _masked(line: dict[str, Any], mask: Callable[[str, str], str]) -> dict[str, Any]:
    place = f"a log line of step {line['step']!r}" if "step" in line else "a log line"
    return {n: mask(fact, place) if isinstance(fact, str) and n not in _OURS else fact for n, fact in line.items()}


def place(what: str) -> str:
    """`what`, with the workflow that this code is in: how a warning names a place, the same for all its runs."""
    workflow = (_context.get() or {}).get("workflow")
    return what if workflow is None or repr(workflow) in what else f"{what} in {workflow!r}"


def words(line: dict[str, Any]) -> str:
    """The sentence of an event, with its facts put in."""
    return WORDS[line["event"]][1].format_map(_Lenient(line))


def told(line: dict[str, Any]) -> dict[str, Any]:
    """An event as other processes and programs get it: the time and the level as text, and its sentence."""
    return {**line, "at": clock.iso(line["at"]), "level": LEVELS[line["level"]], "message": words(line)}


class about:  # noqa: N801 -- read as a word: `with about(run=...)`
    """Every event within carries these facts."""

    __slots__ = ("_facts", "_token")

    def __init__(self, **facts: Any) -> None:
        self._facts = facts

    def __enter__(self) -> None:
        outer = _context.get()
        self._token = _context.set({**outer, **self._facts} if outer else self._facts)

    def __exit__(self, *_: object) -> None:
        for tell in at_end:
            tell(_context.get() or {})
        _context.reset(self._token)


class Place:
    """Where code is: the facts of its run, if it is in one, and its step. `with place:` is to be there, for a thread
    that does not know."""

    __slots__ = ("_tokens", "facts", "step")

    def __init__(self, facts: dict[str, Any] | None, step: str | None) -> None:
        self.facts, self.step = facts, step

    def __enter__(self) -> None:
        self._tokens = _context.set(self.facts), in_step.set(self.step)

    def __exit__(self, *_: object) -> None:
        _context.reset(self._tokens[0])
        in_step.reset(self._tokens[1])


def here() -> Place:
    """Where the calling code is."""
    return Place(_context.get(), in_step.get())


@contextmanager
def sink(take: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Events go to `take` as well, within: all of them, or those of its level `least` and above."""
    global _least
    _sinks.append(take)
    try:
        _least = min(getattr(one, "least", DEBUG) for one in _sinks)
        yield
    finally:
        _sinks.remove(take)
        _least = min((getattr(one, "least", DEBUG) for one in _sinks), default=ERROR + 1)


class JsonLines:
    """A sink: one JSON object a line on a file descriptor. What one pass of the event loop emits is one write; but what
    user code says, and every warning, is written at once, so that a crash in the next line of code does not lose it."""

    def __init__(self, fd: int, least: int = INFO) -> None:
        self._fd, self.least = fd, least
        self._lines: list[bytes] = []
        self._lock = threading.Lock()

    def __call__(self, line: dict[str, Any]) -> None:
        if line["level"] < self.least and line["event"] not in HEARD:
            return
        soon = line["level"] < WARNING and line["event"] != "output"
        self._append(msgspec.json.encode(told(line), enc_hook=str) + b"\n", soon=soon)

    def _append(self, data: bytes, *, soon: bool = True) -> None:
        with self._lock:
            self._lines.append(data)
            first = len(self._lines) == 1
        try:
            loop = asyncio.get_running_loop() if soon else None
        except RuntimeError:
            loop = None
        if loop is None:
            self.flush()
        elif first:
            loop.call_soon(self.flush)

    def pass_on(self, source: str, line: dict[str, Any]) -> None:
        """Write an event of another process as it is, with where it comes from."""
        if NUMBERS.get(line["level"], INFO) >= self.least:
            self._append(msgspec.json.encode({**line, "source": source}) + b"\n")

    def flush(self) -> None:
        with self._lock:
            data, self._lines = b"".join(self._lines), []
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BrokenPipeError:  # nobody reads any more; the work is worth more than its log
                    return


class _Lenient(dict[str, Any]):
    """The facts. Two are made only where somebody reads them: `took` is spelled from `ms`, and `scaled` says what a
    time stands for that `tako dev --time-scale` has brought nearer (`Pace.told`)."""

    def __missing__(self, key: str) -> str:
        if key == "scaled":
            return f" ({self['stands_for']} at time-scale {self['time_scale']:g})" if "time_scale" in self else ""
        return clock.spell(round(self["ms"] * 1_000)) if key == "took" and "ms" in self else "?"
