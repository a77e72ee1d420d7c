"""`tako` at a terminal as a person sits there: what is typed, and what the screen shows, as a terminal makes of it."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pyte
import pytest
from cli import PATIENCE, environment

ROWS = 40


class Screen(pyte.HistoryScreen):
    """A terminal that, as most do, keeps the lines that have left it at the top."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, history=10_000, ratio=1.0)

    def select_graphic_rendition(self, *codes: int, **rest: bool) -> None:
        """This emulator knows no dim text; nothing of ours blinks."""
        dimmed = codes if 38 in codes or 48 in codes else tuple(5 if code == 2 else code for code in codes)
        super().select_graphic_rendition(*dimmed, **rest)

    @property
    def above(self) -> list[str]:
        return ["".join(line[x].data for x in range(self.columns)).rstrip() for line in self.history.top]


class Terminal:
    """A program at a terminal of that size, and the screen."""

    def __init__(self, words: list[str], cwd: Path, columns: int, rows: int = ROWS, **env: str) -> None:
        self.screen = Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.program = pexpect.spawn(
            words[0], words[1:], cwd=str(cwd), dimensions=(rows, columns), timeout=PATIENCE,
            env=environment(**{"TERM": "xterm-256color", "LANG": "C.UTF-8", **env}),
        )  # fmt: skip
        self.program.delaybeforesend = None

    @property
    def rows(self) -> list[str]:
        """What the screen shows, without the empty rows at its end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip("\n").split("\n")

    @property
    def lines(self) -> list[str]:
        """All that has been written, with what has left the screen."""
        return [*self.screen.above, *self.rows]

    @property
    def foot(self) -> str:
        """The last row that is not empty."""
        return self.rows[-1]

    def press(self, keys: str) -> None:
        self.program.send(keys)

    def resize(self, columns: int, rows: int = ROWS) -> None:
        self.screen.resize(rows, columns)
        self.program.setwinsize(rows, columns)

    def wait_for(self, pattern: str, *, gone: bool = False) -> str:
        """What the pattern finds in all the lines, once it is there (or, with `gone`, once it is there no more)."""
        return self._until(lambda: "\n".join(self.lines), pattern, gone)

    def wait_for_foot(self, pattern: str) -> str:
        """The same in the last row."""
        return self._until(lambda: self.foot, pattern, False)

    def _until(self, looked: "object", pattern: str, gone: bool) -> str:
        assert callable(looked)
        deadline = time.monotonic() + PATIENCE
        while True:
            found = re.search(pattern, looked(), re.MULTILINE)
            if bool(found) != gone:
                return found[0] if found else ""
            if time.monotonic() > deadline or not self._read():
                pytest.fail(f"{pattern!r} is {'still' if gone else 'not'} there:\n" + "\n".join(self.lines))

    def _read(self) -> bool:
        """Take in what comes next; False once the program has ended."""
        try:
            data = self.program.read_nonblocking(65536, timeout=1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        deadline = time.monotonic() + PATIENCE
        while self._read():
            if time.monotonic() > deadline:
                pytest.fail("it has not ended:\n" + "\n".join(self.lines))
        self.program.close()
        return self.program.exitstatus if self.program.exitstatus is not None else -self.program.signalstatus


@contextmanager
def at_terminal(*words: str, cwd: Path, columns: int = 100, rows: int = ROWS, **env: str) -> Iterator[Terminal]:
    """A tako command."""
    terminal = Terminal([sys.executable, "-m", "tako_cli", *words], cwd, columns, rows, **env)
    try:
        yield terminal
    finally:
        terminal.program.close(force=True)
