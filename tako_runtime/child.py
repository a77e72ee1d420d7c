"""A worker process of the supervisor's: what it says, how it stands, and why it could not work."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import clock
from tako_runtime.clock import Clock
from tako_runtime.log import WORDS
from tako_runtime.masking import masked_json
from tako_runtime.process import LINES, Process, how, last

#: A worker ends with this where files could not be imported and no workflow of its group is left.
NOTHING_TO_RUN = 3

#: The terminal that a worker's debugger may use, as a path.
TERMINAL = "TAKO_TERMINAL"

#: How the interpreter begins to tell of its own crash, or where it hangs: then the first lines are those that matter.
_CRASH = ("Fatal Python error", "Current thread", "Stack (most recent call first)")

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """What a group of workers should be. Durations are microseconds."""

    name: str = "default"
    workers: int = 0
    concurrency: int = 10
    idle_timeout: int = 5 * clock.MINUTE
    grace: int = 30 * clock.SECOND


#: The one process that takes the runs of all groups, where that is asked for.
TOGETHER = Group("worker", workers=1, grace=5 * clock.SECOND)


@dataclass
class Up:
    """A worker that is up, and the runs (`seq`, claim) that it had in hand at the last look."""

    worker: str
    slots: int
    in_hand: frozenset[tuple[int, int]] = frozenset()


class Child(Process):
    """One worker process, which inherits the descriptors `given`. Raises `OSError` where it cannot be started."""

    def __init__(
        self, group: Group, words: list[str], cwd: Path, environment: Mapping[str, str], clock: Clock, given: list[int]
    ) -> None:
        super().__init__(words, cwd, environment, given)
        self.group = group
        self.workers: dict[str, Up] = {}  # by group, once it has said that it is up
        self.claimed = False
        self.replaces = False  # an older one, as soon as it has imported all files
        self.dismissed = False  # while it did so, the files have changed again
        self.drained = False  # it was told to stop: what it has in hand then is no attempt used up
        self.debugging = False  # somebody is at its `breakpoint()`, and takes their time
        self.trial = False  # its group could not work when it was started
        self.leaving = False  # another takes its place already
        self.verdict = ""  # why the supervisor has ended it
        self.looks = 0  # in a row, at which it was not up yet, or stood still
        self.idle = 0  # looks at which it was up and nothing was due
        self._broken: Event | None = None
        self._importing = ""  # the file that it was about to import, until it is up
        self._clock, self._cwd = clock, cwd

    async def follow(self, show: Callable[[Event], None]) -> int:
        """Pass on each event, and each line that is none; its exit code, negative for a signal."""

        def hear(line: bytes) -> None:
            event = self._heard(line)
            if event["event"] == "file.importing":  # of use only where it is the last word
                self._importing = str(event.get("file"))
            else:
                show(event)

        return await self.follow_lines(hear)

    def why(self, code: int) -> tuple[str, str]:
        """Why it could not work, in one sentence, and the last lines of what it said of it."""
        if code == NOTHING_TO_RUN and self._broken is not None:
            return self._broken["message"].removeprefix(f"{self._cwd}/"), last(
                str(self._broken.get("traceback", "")).split("\n")
            )
        said = [line for line in self.last_lines if line.strip()]
        crash = next((at for at, line in enumerate(said) if line.startswith(_CRASH)), None)
        line, details = (said[-1:], said) if crash is None else (said[crash : crash + 1], said[: crash + LINES])
        where = f", while it imported {self._importing.removeprefix(f'{self._cwd}/')}" if self._importing else ""
        ended = f"its worker ended before it claimed anything ({how(code)}){where}"
        why = self.verdict or ": ".join([ended, *line])
        return why, last(details)

    def _heard(self, line: bytes) -> Event:
        # A worker has masked what it says; a program that a step has started, or an interpreter that crashes, has not.
        line = masked_json(line, "what a worker says")
        event = _event(line)
        if event is None:  # not of ours: what a step's own program prints, or the interpreter as it dies
            text = line.decode(errors="replace")
            self.last_lines.append(text)
            return printed(text, self._clock)
        match event["event"]:
            case "worker.started":
                self._importing = ""
                self.workers[str(event.get("group"))] = Up(str(event.get("worker")), int(event.get("concurrency") or 0))
                self.looks = 0
            case "debugger.opened" | "debugger.closed":
                self.debugging = event["event"] == "debugger.opened"
            case "worker.claimed":
                self.claimed = True
            case "file.broken":
                self._broken, self.looks = event, 0  # it goes on with the next file
        return event


def printed(text: str, ticking: Clock) -> Event:
    """A line that a program has printed, as an event."""
    return {"at": clock.iso(ticking.now()), "level": "info", "event": "output", "message": text}


def _event(line: bytes) -> Event | None:
    """The event that a worker has written, or None: a program that a step has started may print JSON too."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    ours = isinstance(event, dict) and all(isinstance(event.get(n), str) for n in ("at", "level", "event", "message"))
    return event if ours and event["event"] in WORDS else None
