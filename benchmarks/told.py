"""What handlers say while they run, in a file that every process appends to.

The same 16 bytes for every engine, written by the handlers themselves: so nobody's own idea of "started" or "done" is
measured. The file is in memory where the machine has a place for that, and an append costs about a microsecond.
"""

import os
import struct
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

#: Where the handlers' processes find the file.
VARIABLE = "BENCHMARK_TOLD"

KINDS = BEGAN, STEP, WOKE, ENDED = range(4)

_RECORD = struct.Struct("<QIHH")


@dataclass(frozen=True, slots=True)
class Said:
    """One record. `at` is in nanoseconds of the monotonic clock, which is one for all processes of the machine."""

    at: int
    run: int
    step: int


def tell(what: int, run: int, step: int = 0) -> None:
    """Say it, from within a handler."""
    os.write(_end(), _RECORD.pack(time.monotonic_ns(), run, what, step))


@cache
def _end() -> int:
    return os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND)


class Told:
    """The reading end."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108 where it is, it is memory
        handle, path = tempfile.mkstemp(prefix="tako-told-", dir=memory if memory.is_dir() else None)
        self.path = Path(path)
        self._file = open(handle, "rb", buffering=0)  # noqa: SIM115, PTH123 closed in close()
        self._said: dict[int, list[Said]] = {}
        self.forget()

    def _read(self) -> None:
        for at, run, what, step in _RECORD.iter_unpack(self._file.read()):
            self._said[what].append(Said(at, run, step))

    def of(self, what: int, run: int | None = None) -> list[Said]:
        """All of that kind that was said until now, of one run or of all, in the order of saying."""
        self._read()
        return [one for one in self._said[what] if run in (None, one.run)]

    def wait(self, what: int, count: int, seconds: float, pause: float = 0.005) -> list[Said]:
        """The first `count` of that kind. Polled: a file says nothing by itself, and the times are in the records.

        Raises:
            TimeoutError: it says how many there were.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._read()
            if len(self._said[what]) >= count:
                return self._said[what][:count]
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self._said[what])} of {count} within {seconds:g} s")
            time.sleep(pause)

    def forget(self) -> None:
        """What was said until now is of no interest any more."""
        self._file.seek(0, os.SEEK_END)
        self._said = {what: [] for what in KINDS}

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)
