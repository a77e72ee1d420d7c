"""A worker process of the supervisor's: how it is started, what it says, how it stands, and its end.

It is a direct child with no shell between, and leads a process group of its own, which goes as a whole: what its steps
have started ends with it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tako_runtime import clock
from tako_runtime.clock import Clock
from tako_runtime.log import WORDS
from tako_runtime.secrets import masked_json

if TYPE_CHECKING:
    from tako_runtime.supervisor import Group

#: A worker ends with this where files could not be imported and no workflow of its group is left.
NOTHING_TO_RUN = 3

#: So many of the last lines of a traceback, or of what a worker said, are kept as details.
LINES = 20

#: How much of a pipe is read at once, and how often once its worker has ended: that is all that a pipe can hold. What
#: goes on writing into it then is a program that a step has left behind, and may never end.
_READ, _MOST_READS = 1 << 16, 16

#: How the interpreter begins to tell of its own crash, or where it hangs: then the first lines are those that matter.
_CRASH = ("Fatal Python error", "Current thread", "Stack (most recent call first)")

#: What concerns the supervisor's own service manager, and nobody below it.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")

Event = dict[str, Any]


class Child:
    """One worker process, which inherits the descriptor `secrets`. Raises `OSError` where it cannot be started.

    Its end is waited for in a thread, not read off its pipe: what a step has started may hold that open for long.
    """

    def __init__(
        self, group: "Group", words: list[str], cwd: Path, environment: Mapping[str, str], clock: Clock, secrets: int
    ) -> None:
        self.group = group
        self.worker = ""  # its id, once it has said that it is up
        self.claimed = False
        self.trial = False  # its group could not work when it was started
        self.leaving = False  # another takes its place already
        self.verdict = ""  # why the supervisor has ended it
        self.looks = 0  # in a row, at which it was not up yet, or stood still
        self.idle = 0  # looks at which it was up and nothing was due
        self.in_hand: frozenset[tuple[int, int]] = frozenset()
        self.last_lines: deque[str] = deque(maxlen=100)
        self._broken: Event | None = None
        self._clock, self._cwd = clock, cwd
        self._process = subprocess.Popen(
            words,
            cwd=cwd,
            env={name: value for name, value in environment.items() if name not in _NOT_INHERITED},
            pass_fds=[secrets],
            stdin=subprocess.PIPE,  # its end tells the worker that we are gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._rest = b""

    async def follow(self, show: Callable[[Event], None]) -> int:
        """Pass on each event, and each line that is none; its exit code, negative for a signal."""
        loop = asyncio.get_running_loop()
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        pipe = self._process.stdout.fileno()
        os.set_blocking(pipe, False)
        loop.add_reader(pipe, self._read, pipe, show)
        try:
            ended: asyncio.Future[int] = loop.create_future()
            threading.Thread(target=self._wait, args=(loop, ended), name="tako-child", daemon=True).start()
            code = await asyncio.shield(ended)
            for _ in range(_MOST_READS):
                if not self._read(pipe, show):
                    break
        finally:
            loop.remove_reader(pipe)
            self._process.stdout.close()
            self._process.stdin.close()
        if self._rest:
            show(self._heard(self._rest))
        return code

    def why(self, code: int) -> tuple[str, str]:
        """Why it could not work, in one sentence, and the last lines of what it said of it."""
        if code == NOTHING_TO_RUN and self._broken is not None:
            return self._broken["message"].removeprefix(f"{self._cwd}/"), _last(
                str(self._broken.get("traceback", "")).split("\n")
            )
        said = [line for line in self.last_lines if line.strip()]
        crash = next((at for at, line in enumerate(said) if line.startswith(_CRASH)), None)
        last, details = (said[-1:], said) if crash is None else (said[crash : crash + 1], said[: crash + LINES])
        why = self.verdict or ": ".join([f"its worker ended before it claimed anything ({how(code)})", *last])
        return why, _last(details)

    def terminate(self) -> None:
        self._signal(os.kill, signal.SIGTERM)

    def tell_where(self) -> None:
        """Have it write the line that its main thread is at, even if that hangs."""
        self.last_lines.clear()
        self._signal(os.kill, signal.SIGQUIT)

    def kill(self) -> None:
        """At once, with all that its steps have started."""
        self._signal(os.killpg, signal.SIGKILL)

    def _signal(self, send: Callable[[int, int], None], number: signal.Signals) -> None:
        if self._process.returncode is None:  # until it is buried, no other process can have its number
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says so of a zombie
                send(self.pid, number)

    def _wait(self, loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[int]") -> None:
        """What it leaves of its group goes before it is buried."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            self.kill()
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody wants to know
            loop.call_soon_threadsafe(ended.set_result, code)

    def _read(self, pipe: int, show: Callable[[Event], None]) -> bool:
        try:
            data = os.read(pipe, _READ)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(pipe)
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            show(self._heard(line))
        return True

    def _heard(self, line: bytes) -> Event:
        # A worker has masked what it says; a program that a step has started, or an interpreter that crashes, has not.
        line = masked_json(line, "what a worker says")
        event = _event(line)
        if event is None:  # not of ours: what a step's own program prints, or the interpreter as it dies
            text = line.decode(errors="replace")
            self.last_lines.append(text)
            return {"at": clock.iso(self._clock.now()), "level": "info", "event": "output", "message": text}
        match event["event"]:
            case "worker.started":
                self.worker, self.looks = str(event.get("worker")), 0
            case "worker.claimed":
                self.claimed = True
            case "file.broken":
                self._broken, self.looks = event, 0  # it goes on with the next file
        return event


def how(code: int) -> str:
    """How a process has ended."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last(lines: list[str]) -> str:
    return "\n".join([line for line in lines if line.strip()][-LINES:])


def _event(line: bytes) -> Event | None:
    """The event that a worker has written, or None: a program that a step has started may print JSON too."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    ours = isinstance(event, dict) and all(isinstance(event.get(n), str) for n in ("at", "level", "event", "message"))
    return event if ours and event["event"] in WORDS else None
