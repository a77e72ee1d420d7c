"""What user code says: print, sys.stderr, `logging` and uncaught errors are events of the one log, each with the run
and step that it came from, whatever thread it came from.
"""

import io
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tako_runtime import log
from tako_runtime.log import emit


@contextmanager
def captured() -> Iterator[None]:
    """Within, all that this process says is an event; afterwards, what is said goes where it went before."""
    before, hook = (sys.stdout, sys.stderr), threading.excepthook
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit
    outputs = Output("stdout", 1), Output("stderr", 2)
    sys.stdout, sys.stderr = outputs
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LoggingHandler()], force=True)
    threading.excepthook = _uncaught
    # A thread does not know who started it (before Python 3.14, which has a switch for that): so it is told.
    threading.Thread.start = _telling(start)  # type: ignore[method-assign, assignment]
    ThreadPoolExecutor.submit = _handing_on(submit)  # type: ignore[method-assign]
    log.at_end.extend(output.end for output in outputs)
    try:
        yield
    finally:
        for output in outputs:
            log.at_end.remove(output.end)
            output.end()
        threading.Thread.start, ThreadPoolExecutor.submit = start, submit  # type: ignore[method-assign]
        (sys.stdout, sys.stderr), threading.excepthook = before, hook


class Output(io.TextIOBase):
    """Stands in for `sys.stdout`: what a handler prints is an event with its run and step, line by line. A line is put
    together of what one thread writes within one run and step, so that two runs never share one."""

    encoding = "utf-8"

    def __init__(self, stream: str, number: int) -> None:
        self._stream, self._number = stream, number
        self._held: dict[tuple[int, int, str | None], tuple[str, log.Place]] = {}
        self.buffer = _Bytes(self)

    def write(self, text: str) -> int:
        place = log.here()
        key = (threading.get_ident(), id(place.facts), place.step)
        held, _ = self._held.pop(key, ("", place))
        *lines, rest = (held + text).split("\n")
        for line in lines:
            emit("output", stream=self._stream, text=line)
        if rest:
            self._held[key] = rest, place
        return len(text)

    def flush(self) -> None:
        """What this thread has said of a line in this run and step is a line."""
        place = log.here()
        held, _ = self._held.pop((threading.get_ident(), id(place.facts), place.step), ("", place))
        if held:
            emit("output", stream=self._stream, text=held)

    def end(self, facts: dict[str, Any] | None = None) -> None:
        """Lines that nobody has ended are lines: those of a run whose pass is over, or all of them."""
        for key, (_, place) in list(self._held.items()) if self._held else ():
            if facts is None or place.facts is facts:
                held, _ = self._held.pop(key, ("", place))  # its thread may be going on
                if held:
                    with place:
                        emit("output", stream=self._stream, text=held)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        """For a program that is to write where this process does; what it writes comes without a run."""
        return self._number


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._output.write(bytes(data).decode(errors="replace"))
        return len(data)


class LoggingHandler(logging.Handler):
    """Puts Python's `logging` into the same log, with the run and step it came from; a traceback stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            facts = {name: getattr(record, name) for name in ("run", "workflow", "step") if getattr(record, name, None)}
            if log.here().facts is not None:  # `step.log` says it too, for threads that nobody has told
                facts.clear()
            text, level = self.format(record), _level(record.levelno)
            emit("output", stream="logging", logger=record.name, text=text, **(facts | {"level": level}))
        except Exception:  # noqa: BLE001 -- logging's own rule: a broken record must not break the program
            self.handleError(record)


def _level(number: int) -> int:
    return max((level for level in log.LEVELS if level <= number), default=log.DEBUG)


def _uncaught(args: Any) -> None:
    """What ends a thread, in one event."""
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "unknown"
        report = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        text = f"uncaught in thread {name}:\n{''.join(report)}".rstrip()
        emit("output", stream="stderr", level=log.ERROR, text=text)


def _telling(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    def start_told(thread: threading.Thread) -> None:
        place, run = log.here(), thread.run

        def told() -> None:
            del thread.run  # its class's own again
            place.__enter__()  # for good: what has ended a thread is said after its end
            run()

        if place.facts is not None:
            thread.run = told  # type: ignore[method-assign]
        start(thread)

    return start_told


def _handing_on(submit: Callable[..., Any]) -> Callable[..., Any]:
    def submit_told(pool: ThreadPoolExecutor, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        place = log.here()  # where there is none, too: the pool's thread may have been started by a run

        def told(*args: Any, **kwargs: Any) -> Any:
            with place:
                return fn(*args, **kwargs)

        return submit(pool, told, *args, **kwargs)

    return submit_told
