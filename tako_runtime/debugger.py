"""`breakpoint()` in a handler or a step: under `tako dev` the debugger gets its terminal, for as long as it stands.
Where there is none, as on a server, a forgotten one is told of and passed over.

The supervisor hears of it (`debugger.opened`), clears the terminal, and says so; until then the debugger waits.
"""

import os
import pdb
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from tako_runtime.child import TERMINAL
from tako_runtime.log import emit


def stand(frame: FrameType, cleared: Callable[[], object]) -> None:
    """Be in the debugger at this frame. `cleared()` returns once the terminal is there to be used."""
    terminal = os.environ.get(TERMINAL)
    if terminal is None:
        emit("debugger.ignored", file=_file(frame), line=frame.f_lineno)
    else:
        _Debugger(terminal, cleared).set_trace(frame)


class _Debugger(pdb.Pdb):
    def __init__(self, terminal: str, cleared: Callable[[], object]) -> None:
        fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        super().__init__(stdin=os.fdopen(fd), stdout=os.fdopen(os.dup(fd), "w"), nosigint=True)
        self._cleared = cleared
        self._stands = False
        self._said: list[str] = []

    def interaction(self, frame: FrameType | None, traceback: TracebackType | None) -> None:
        where = frame or sys._getframe()  # noqa: SLF001 -- after an error there is only its traceback
        emit("debugger.opened", file=_file(where), line=where.f_lineno, pid=os.getpid())
        self._cleared()
        self._stands = True
        try:
            for said in self._said:
                self.message(said)
            super().interaction(frame, traceback)
        finally:
            self._stands = False
            self._said.clear()
            self.stdout.flush()
            emit("debugger.closed", pid=os.getpid())

    def message(self, msg: str) -> None:
        """What it says before it stands ("--Return--") is said once the terminal is cleared."""
        if self._stands:
            super().message(msg)
        else:
            self._said.append(msg)


def _file(frame: FrameType) -> str:
    """As it is called in the project, which is the working folder."""
    return frame.f_code.co_filename.removeprefix(f"{Path.cwd()}/")
