"""The log of `tako dev`: what the workers and the supervisor announce, as lines for a person or as JSON.

23:14:01.123 default 0199a3b2-1c4d fulfill-order  step charge done in 212ms
"""

import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tako_cli import output, wording
from tako_cli.timeline import SHORTEST_ID
from tako_runtime import clock, log

if TYPE_CHECKING:
    from rich.text import Text

Event = dict[str, Any]

#: Of use to a program that follows the log; a person has it from the lines around it.
_FOR_PROGRAMS = {"worker.spawned", "worker.claimed", "code.loaded", "dev.ready"}

_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
_SOURCES = ("cyan", "magenta", "blue", "green")
_ID = re.compile(r"\b([0-9a-f]{8}-[0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b")

#: Where the lines after the first of an event begin: below its source.
_INDENT = 13
#: What is within so many of the last messages has just been shown.
_JUST_NOW = 10
#: A message with less room than this goes on below the source, and not below itself.
_NARROW = 50
#: With less than this it begins there too.
_LEAST = 20


class Lines:
    """Shows events on stdout. `lost()` is called once nobody reads them any more."""

    def __init__(
        self, root: Path, groups: Iterable[str], workflows: Iterable[str], *, as_json: bool, lost: Callable[[], None]
    ) -> None:
        self._root, self._as_json, self._lost = root, as_json, lost
        self._groups = ["tako", *groups]
        self._source_width = max(map(len, self._groups))
        self._workflow_width = min(max(map(len, workflows), default=0), 30)
        self._broken: set[tuple[Any, ...]] = set()
        self._tracebacks: set[str] = set()  # the last lines of those that were shown
        self._recent: deque[str] = deque(maxlen=_JUST_NOW)  # what was shown last
        self._silent = False
        self._held: list[tuple[str, Event]] | None = None

    def say(self, event: str, message: str, level: str = "info", **facts: Any) -> None:
        """Something of `tako dev` itself."""
        self.show("tako", {"at": clock.iso(wording.now()), "level": level, "event": event, "message": message, **facts})

    def of_supervisor(self, event: Event) -> None:
        """A sink of `log`: what is announced in this process."""
        self.show("tako", log.told(event))

    def hold(self) -> None:
        """Show nothing until `go_on()`: somebody else uses the terminal."""
        self._held = [] if self._held is None else self._held

    def go_on(self) -> None:
        held, self._held = self._held or [], None
        for source, event in held:
            self.show(source, event)

    def show(self, source: str, event: Event) -> None:
        """One event, of a worker's group or of `tako` itself."""
        if self._held is not None:
            self._held.append((source, event))
            return
        if self._silent or self._said_before(event):
            return
        try:
            if self._as_json:
                output.json_line({**event, "source": source})
            elif event["event"] not in _FOR_PROGRAMS:
                output.show(*self._lines(source, event))
                self._recent.append(str(event.get("message", "")))
        except OSError:  # a closed pipe, a terminal that is gone
            self._silent = True
            self._lost()

    def banner(self, lines: Iterable["Text"]) -> None:
        """What a person sees first; a program has it all in the event `dev.ready`."""
        if not self._as_json:
            output.show(*lines)

    def mended(self) -> None:
        """New code is at work: what is wrong from now on is news."""
        self._broken.clear()

    def _said_before(self, event: Event) -> bool:
        """Each worker finds the same broken file when it starts."""
        if event["event"] != "file.broken":
            return False
        what = event.get("file"), event.get("line"), event.get("error")
        if what in self._broken:
            return True
        self._broken.add(what)
        return False

    # --- for people ---

    def _lines(self, source: str, event: Event) -> "list[Text]":
        now = wording.now()
        head = output.styled(_time_of_day(event["at"]), "dim").append(" ")
        head.append(source.ljust(self._source_width), self._style_of(source)).append(" ")
        if "run" in event and "workflow" in event:
            head.append(event["run"][:SHORTEST_ID], "dim").append(" ")
            head.append(output.clean(event["workflow"]).ljust(self._workflow_width)).append("  ")
        message = wording.with_local_times(_ID.sub(r"\1", str(event.get("message", ""))), now, distances=False)
        style = "green" if event["event"] == "run.succeeded" else _STYLES.get(event["level"], "")
        first, *rest = self._wrapped(output.clean(message), len(head)) or [""]
        lines = [head.append(first, style), *(output.styled(line, style) for line in rest)]
        return lines + [output.styled(f"{' ' * _INDENT}{line}", "dim") for line in self._details(event)]

    def _wrapped(self, message: str, begin: int) -> list[str]:
        """The message's lines, the first without its indent."""
        width = output.width()
        below = begin if width - begin >= _NARROW else _INDENT
        lines = [] if width - begin >= _LEAST else [" " * begin]
        for part in message.split("\n"):
            lines += textwrap.wrap(
                part, max(width, below + _LEAST), initial_indent=" " * (begin if not lines else below),
                subsequent_indent=" " * below, break_long_words=False, break_on_hyphens=False, expand_tabs=False,
                replace_whitespace=False,
            ) or [""]  # fmt: skip
        return [lines[0][begin:], *lines[1:]]

    def _details(self, event: Event) -> list[str]:
        """The frames of the user's own code below an error, and what a process said last before it died, unless it has
        just been shown, be it as the traceback of a broken file."""
        traceback = event.get("traceback") or (event.get("error") if event["event"] == "run.dead" else "")
        lines = wording.frames(str(traceback or ""), self._root)
        if event["event"] == "file.broken":
            self._tracebacks.update(lines[-1:])
        last = str(event.get("last_lines") or "").splitlines()
        return [
            output.clean(line) for line in lines + ([] if set(last[-1:]) & {*self._tracebacks, *self._recent} else last)
        ]

    def _style_of(self, source: str) -> str:
        if source == "tako":
            return "bold"
        if source not in self._groups:
            self._groups.append(source)
        return _SOURCES[(self._groups.index(source) - 1) % len(_SOURCES)]


def _time_of_day(iso: str) -> str:
    local = clock.moment(wording.micros(iso) or 0).astimezone()
    return f"{local:%H:%M:%S}.{local.microsecond // 1_000:03}"
