"""A process of the supervisor's: how it is started, how what it says is read line by line, and its end.

It is a direct child with no shell between, and leads a process group of its own, which goes as a whole: what it has
started ends with it. Its standard input is a pipe that only we hold, whose end tells it that we are gone.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tako_runtime.feed import LONGEST_LINE

#: So many of the last lines of a traceback, or of what a process said, are kept as details.
LINES = 20

#: How much of a pipe is read at once, and how often once its process has ended: that is all that a pipe can hold. What
#: goes on writing into it then is a program that was left behind, and may never end.
_READ, _MOST_READS = 1 << 16, 16

#: What a service manager has told the supervisor, and nobody below it.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class Process:
    """One child process, which inherits the descriptors `given`. Raises `OSError` where it cannot be started.

    Its end is waited for in a thread, not read off its pipe: what it has started may hold that open for long.
    """

    def __init__(self, words: list[str], cwd: Path, environment: Mapping[str, str], given: Iterable[int]) -> None:
        self.last_lines: deque[str] = deque(maxlen=100)
        self._process = subprocess.Popen(
            words,
            cwd=cwd,
            env=inherited(environment),
            pass_fds=tuple(given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._rest = b""

    async def follow_lines(self, hear: Callable[[bytes], None]) -> int:
        """Pass on each line; its exit code, negative for a signal."""
        loop = asyncio.get_running_loop()
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        pipe = self._process.stdout.fileno()
        os.set_blocking(pipe, False)
        loop.add_reader(pipe, self._read, pipe, hear)
        try:
            ended: asyncio.Future[int] = loop.create_future()
            threading.Thread(target=self._wait, args=(loop, ended), name="tako-child", daemon=True).start()
            code = await asyncio.shield(ended)
            for _ in range(_MOST_READS):
                if not self._read(pipe, hear):
                    break
        finally:
            loop.remove_reader(pipe)
            self._process.stdout.close()
            self._process.stdin.close()
        if self._rest:
            hear(self._rest)
        return code

    def tell(self, line: bytes) -> None:
        """A line on its standard input, short enough for a pipe that is empty."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, and whoever follows it hears that
            os.write(self._process.stdin.fileno(), line + b"\n")

    def alive(self) -> bool:
        """Ask only while nobody follows it."""
        return self._process.poll() is None

    def discard(self) -> None:
        """End it, while nobody follows it."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def terminate(self) -> None:
        self._signal(os.kill, signal.SIGTERM)

    def tell_where(self) -> None:
        """Have it write the line that its main thread is at, even if that hangs."""
        self.last_lines.clear()
        self._signal(os.kill, signal.SIGQUIT)

    def kill(self) -> None:
        """At once, with all that it has started."""
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

    def _read(self, pipe: int, hear: Callable[[bytes], None]) -> bool:
        try:
            data = os.read(pipe, _READ)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(pipe)
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LONGEST_LINE:  # nobody would read it; and it must not fill our memory
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            hear(line)
        return True


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a child has of it."""
    return {name: value for name, value in environment.items() if name not in _NOT_INHERITED}


def how(code: int) -> str:
    """How a process has ended."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last(lines: Iterable[str]) -> str:
    """The last ones that say something, as details of an event."""
    return "\n".join([line for line in lines if line.strip()][-LINES:])
