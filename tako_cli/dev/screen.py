"""The terminal that `tako dev` was started at: its keys as they are pressed, and what stands below the log.

Whatever happens, the terminal is left as it was found: at the end, on Ctrl-Z, while it is lent to somebody else.
"""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tako_cli import output
from tako_cli.dev.keys import PATIENCE, Keys
from tako_cli.dev.questions import Question

if TYPE_CHECKING:
    from rich.text import Text

#: While a question is open its own cursor is shown, and what is pasted comes in one piece.
_ASKING, _ASKED = "\x1b[?25l\x1b[?2004h", "\x1b[?2004l\x1b[?25h"


def is_there() -> bool:
    """Whether there is a person who sees what is written and can press keys."""
    return sys.stdin.isatty() and output.stdout_is_terminal() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """To be within, in an event loop."""

    def __init__(self) -> None:
        self._terminal = sys.stdin.fileno()
        self._found: list[Any] | None = None  # how the terminal was; None: it is so now
        self._lent = 1  # until `with`
        self._keys = Keys()
        self._pressed: asyncio.Queue[str] = asyncio.Queue()
        self._status: Sequence[Text] = ()
        self._question: Question | None = None

    def __enter__(self) -> "Screen":
        self._loop = asyncio.get_running_loop()
        for number, do in ((signal.SIGWINCH, self._resized), (signal.SIGTSTP, self._stop), (signal.SIGCONT, self.take)):
            self._loop.add_signal_handler(number, do)
        self._lent -= 1
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._lent += 1
        self._give_back()
        for number in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
            self._loop.remove_signal_handler(number)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For somebody else, a debugger: within, there is no foot, no key is read, and the terminal is as it was
        found. What is logged meanwhile is written all the same."""
        self._lent += 1
        self._give_back()
        try:
            yield
        finally:
            self._lent -= 1
            self.take()

    def show(self, status: "Sequence[Text]") -> None:
        """What stands below the log. Called now and then: a terminal that another job had may be ours again."""
        self._status = status
        self.take()
        self._draw()

    async def key(self) -> str:
        """The next key that is pressed."""
        return await self._pressed.get()

    async def ask(self, question: Question) -> Any:
        """The answer; None where there is none. Lines of the log come above the question."""
        self._question = question
        self._steer(_ASKING)
        try:
            over = False
            while not over:
                self._draw()
                over = question.press(await self.key())
        finally:
            self._question = None
            self._steer(_ASKED)
            self._draw()
        return question.answer

    def leave_it(self) -> None:
        """The question, if there is one, gets no answer."""
        if self._question is not None:
            self._pressed.put_nowait("<esc>")

    def take(self) -> None:
        """Take the terminal, where it is ours to take: not while another job is in the foreground."""
        if self._lent or self._found is not None or not self._in_foreground():
            return
        with suppress(termios.error):  # it is gone, and SIGHUP is on its way
            self._found = termios.tcgetattr(self._terminal)
            tty.setcbreak(self._terminal, termios.TCSANOW)
            self._loop.add_reader(self._terminal, self._read)
            if self._question is not None:
                self._steer(_ASKING)
            self._draw()

    def _give_back(self) -> None:
        if self._found is None:
            return
        self._loop.remove_reader(self._terminal)
        with suppress(OSError):
            output.foot(())
            if self._question is not None:
                self._steer(_ASKED)
        found, self._found = self._found, None
        with suppress(termios.error):
            if self._in_foreground():
                termios.tcsetattr(self._terminal, termios.TCSANOW, found)

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._terminal) == os.getpgrp()
        except OSError:
            return False

    def _resized(self) -> None:
        self._draw()
        with suppress(OSError):
            output.redraw()

    def _stop(self) -> None:
        """Ctrl-Z: stop as any program would, with the terminal as it was; then go on."""
        self._give_back()
        self._loop.remove_signal_handler(signal.SIGTSTP)
        signal.raise_signal(signal.SIGTSTP)
        self._loop.add_signal_handler(signal.SIGTSTP, self._stop)
        self.take()

    def _steer(self, codes: str) -> None:
        if self._found is not None:
            with suppress(OSError):
                output.steer(codes)

    def _draw(self) -> None:
        if self._found is not None:
            asked = self._question.rows(output.width()) if self._question is not None else []
            with suppress(OSError):  # a terminal that is gone; the log says so
                output.foot([*asked, *self._status])

    def _read(self) -> None:
        try:
            data = os.read(self._terminal, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the terminal is gone: SIGHUP tells the rest
            self._loop.remove_reader(self._terminal)
            return
        self._press(self._keys.feed(data))
        if self._keys.unfinished:
            self._loop.call_later(PATIENCE, self._give_up_waiting)

    def _give_up_waiting(self) -> None:
        if self._keys.unfinished:
            self._press(self._keys.flush())

    def _press(self, keys: list[str]) -> None:
        for key in keys:
            self._pressed.put_nowait(key)
