"""The log of `tako dev`: what the workers, the app and the supervisor announce, as lines for a person or as JSON.

23:14:01.123 worker  9c3fa911 fulfill-order  step charge done in 212ms
"""

import re
import textwrap
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tako_cli import output, wording
from tako_cli.timeline import short_id
from tako_runtime import clock, log

if TYPE_CHECKING:
    from rich.text import Text

Event = dict[str, Any]

#: Of use to a program that follows the log; a person has it from the lines around it.
_FOR_PROGRAMS = {"worker.spawned", "worker.claimed", "code.declared", "dev.ready"}
#: Of use to a person who looks for something, and asks for it with `verbose`.
_DETAILS = {"step.cached"}

_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}
_EVENT_STYLES = {"run.succeeded": "green", "cron.fired": "", "output": "default not dim"}

#: What a group is called in the log, where that is not its name.
_WORKER = {"default": "worker"}
#: The colours of the sources that every project has, and those among which a group's name chooses, always the same.
_COLOURS = {"tako": "bold", "worker": "green", "app": "cyan", "cron": "magenta"}
_GROUP_COLOURS = ("blue", "bright_cyan", "bright_magenta", "bright_blue", "bright_green", "bright_yellow")

_ID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b")

#: A name is cut where it would take more than this from the message.
_LONGEST_NAME, _LONGEST_SOURCE = 30, 12
#: What is within so many of the last messages has just been shown.
_JUST_NOW = 10
#: A terminal with less columns gets shorter times and names.
_NARROW = 80
_SHORTER_NAME = 14
#: A message whose column has less room than this goes on below the source.
_ROOM = 50
#: With less than this it begins there too.
_LEAST = 16


class Lines:
    """Shows events on stdout. `lost()` is called once nobody reads them any more; with `verbose` tracebacks are whole,
    and nothing is passed over that is said elsewhere."""

    def __init__(
        self,
        root: Path,
        groups: Iterable[str],
        workflows: Iterable[str],
        *,
        as_json: bool,
        lost: Callable[[], None],
        verbose: bool = False,
    ) -> None:
        self._root, self._as_json, self._lost, self._verbose = root, as_json, lost, verbose
        self._sources = {"tako", *(_WORKER.get(group, group) for group in groups)}
        self._workflow_width = min(max(map(len, workflows), default=0), _LONGEST_NAME)
        self._broken: set[tuple[Any, ...]] = set()
        self._tracebacks: set[str] = set()  # the last lines of those that were shown
        self._recent: deque[str] = deque(maxlen=_JUST_NOW)  # what was shown last
        self._up: set[str] = set()  # groups whose workers have said that they are up
        self._followed: set[str] = set()  # those among them whose next worker has new code
        self._silent = False
        self._held: list[tuple[str, Event]] | None = None

    def say(self, event: str, message: str, level: str = "info", **facts: Any) -> None:
        """Something of `tako dev` itself."""
        self.show("tako", {"at": clock.iso(wording.now()), "level": level, "event": event, "message": message, **facts})

    def of_supervisor(self, event: Event) -> None:
        """A sink of `log`: what is announced in this process."""
        self.show("cron" if event["event"].startswith("cron.") else "tako", log.told(event))

    def hold(self) -> None:
        """Show nothing until `go_on()`: somebody else uses the terminal."""
        self._held = [] if self._held is None else self._held

    def go_on(self) -> None:
        held, self._held = self._held or [], None
        for source, event in held:
            self.show(source, event)

    def show(self, source: str, event: Event) -> None:
        """One event, of a worker's group, of the app, of the schedules or of `tako` itself."""
        if self._held is not None:
            self._held.append((source, event))
            return
        if self._silent or self._said_before(event):
            return
        try:
            if self._as_json:
                output.json_line({**event, "source": source})
            elif event["event"] not in _FOR_PROGRAMS and (not self._goes_without_saying(event) or self._verbose):
                output.show(*self._lines(_WORKER.get(source, source), event))
                self._recent.append(str(event.get("message", "")))
        except OSError:  # a closed pipe, a terminal that is gone
            self._silent = True
            self._lost()

    def banner(self, lines: Iterable["Text"]) -> None:
        """What a person sees beside the events; a program has the facts from them."""
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

    def _goes_without_saying(self, event: Event) -> bool:
        """New code has a worker of its own, and one that has drained has done what it was told to."""
        group = str(event.get("group"))
        match event["event"]:
            case "code.reloaded":
                self._followed = set(self._up)
            case "worker.started" if group in self._followed:
                self._followed.discard(group)
                return True
            case "worker.started":
                self._up.add(group)
            case "worker.stopped":
                return event.get("reason") == "drained"
        return event["event"] in _DETAILS

    # --- for people ---

    def _lines(self, source: str, event: Event) -> "list[Text]":
        self._sources.add(source)
        now, narrow = wording.now(), output.width() < _NARROW
        time = _time_of_day(event["at"])[: 8 if narrow else None]
        head = output.styled("").append(f"{time} ", "dim")
        indent = len(head)
        width = min(max(map(len, self._sources)), _LONGEST_SOURCE)
        head.append(_fitted(source, width), self._style_of(source)).append(" ")
        if "run" in event and "workflow" in event:
            width = min(self._workflow_width, _SHORTER_NAME if narrow else _LONGEST_NAME)
            name = output.clean(event["workflow"])
            head.append(short_id(event["run"]), "dim").append(" ").append(_fitted(name, width) if width else name)
            head.append("  ")
        column = len(head)
        if event["event"] == "output" and event.get("step"):
            head.append(f"{output.clean(event['step'])} {'│' if output.can_show('│') else '|'} ", "dim cyan")
        message = wording.with_local_times(str(event.get("message", "")), now, distances=False)
        if event["event"] != "output":
            message = message.replace(f"{self._root}/", "")
        reason = str(event.get("reason") or "")
        if event["event"] == "code.kept" and any(shown.endswith(reason) for shown in self._recent):
            message = message.removesuffix(f": {reason}")
        message = _ID.sub(lambda found: short_id(found[0]), message).removeprefix(f"{source} ")
        style = _EVENT_STYLES.get(event["event"], "") if event["level"] in ("debug", "info") else ""
        style = style or _STYLES.get(event["level"], "")
        first, *rest = self._wrapped(output.clean(message), len(head), column, indent) or [""]
        lines = [head.append(first, style), *(output.styled(line, style) for line in rest)]
        below = (output.styled(f"{' ' * indent}{line}", _style_of_detail(line)) for line in self._details(event))
        return [*lines, *below]

    def _wrapped(self, message: str, begin: int, column: int, indent: int) -> list[str]:
        """The message's lines, the first without its indent: it begins there, and goes on in its column if that has
        room, else below its source."""
        width = output.width()
        below = column if width - column >= _ROOM else indent
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
        traceback = str(event.get("traceback") or (event.get("error") if event["event"] == "run.dead" else "") or "")
        lines = wording.frames(traceback, self._root, whole=self._verbose)
        if event["event"] == "file.broken":
            self._tracebacks.update(lines[-1:])
        if lines and lines[-1] in str(event.get("message")):
            del lines[-1]  # what was raised has been said
        last = str(event.get("last_lines") or "").splitlines()
        return [
            output.clean(line) for line in lines + ([] if set(last[-1:]) & {*self._tracebacks, *self._recent} else last)
        ]

    def _style_of(self, source: str) -> str:
        return _COLOURS.get(source) or _GROUP_COLOURS[zlib.crc32(source.encode()) % len(_GROUP_COLOURS)]


def _style_of_detail(line: str) -> str:
    """Frames stand back, behind what was raised."""
    return "dim" if line.startswith(" ") else "red"


def _fitted(name: str, width: int) -> str:
    return name.ljust(width) if len(name) <= width else name[: width - 1] + output.ellipsis()


def _time_of_day(iso: str) -> str:
    local = clock.moment(wording.micros(iso) or 0).astimezone()
    return f"{local:%H:%M:%S}.{local.microsecond // 1_000:03}"
