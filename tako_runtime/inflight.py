"""What a worker has in hand, where a SIGKILL cannot erase it.

Each worker keeps one small file, `{app_dir}/workers/<id>`: mapped into memory, a slot for each run, with the step it is
in. The kernel keeps what was written there when the process is gone, at no cost to the run. The worker holds a lock on
the file as long as it lives, so whoever can take that lock knows that the worker is gone: no process id has to be
believed.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tako_runtime.run import WorkerRecord

#: How a file begins. One of another form is none that this release can read.
_HEAD = b"tako 2\0\0"

#: A slot: which run, since when in its step, and that step's name, or as much of it as there is room for.
_SLOT = struct.Struct("<qq240s")
_EMPTY = bytes(8)


class InFlight:
    """The worker's own side, with room for so many runs at once."""

    def __init__(self, app_dir: Path, worker: str, room: int) -> None:
        folder = app_dir / "workers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / worker
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        empty = _HEAD + bytes(_SLOT.size * room)
        os.write(self._file, empty)  # not a hole: on a full disk, writing into one would be our end
        self._map = mmap.mmap(self._file, len(empty))
        self._free = [len(_HEAD) + _SLOT.size * n for n in range(room)]

    def take(self, seq: int) -> "Slot":
        """A slot for a claimed run. Beyond the room that there is, a run goes without."""
        return Slot(self._map, self._free, seq)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)


class Slot:
    """Where one claimed run is noted: the same run may be claimed anew while its last attempt still ends here."""

    __slots__ = ("_at", "_free", "_map", "_seq")

    def __init__(self, map_: mmap.mmap, free: list[int], seq: int) -> None:
        self._map, self._free, self._seq = map_, free, seq
        self._at = free.pop() if free else -1

    def note(self, step: str, now: int) -> None:
        """The run has come to that step."""
        if self._at >= 0:
            _SLOT.pack_into(self._map, self._at, self._seq, now, step.encode())

    def give_up(self) -> None:
        """The run is in hand no more."""
        if self._at >= 0:
            self._map[self._at : self._at + len(_EMPTY)] = _EMPTY
            self._free.append(self._at)
            self._at = -1


def gone(app_dir: Path, worker: str) -> bool | None:
    """Whether a worker's process is gone; None where this machine cannot tell (it is another machine's worker)."""
    try:
        file = os.open(app_dir / "workers" / worker, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def is_up(worker: WorkerRecord, app_dir: Path, now: int) -> bool:
    """Whether a worker lives, as far as this machine can tell."""
    return worker.lease_until > now and gone(app_dir, worker.id) is not True


class Place(NamedTuple):
    """Where in its workflow a run is, and since when; `since` is None before its first step, and where nobody knows."""

    where: str
    since: int | None


def places(app_dir: Path, worker: str) -> Callable[[int], Place]:
    """Where the runs are that a worker has in hand, or had when it died, by `Run.seq`: one without a note was not in a
    step yet. Nowhere ("") where nobody knows."""
    try:
        data = (app_dir / "workers" / worker).read_bytes()
    except OSError:
        data = b""
    if not data.startswith(_HEAD):
        return lambda seq: Place("", None)
    found = {}
    for at in range(len(_HEAD), len(data) - _SLOT.size + 1, _SLOT.size):
        seq, since, step = _SLOT.unpack_from(data, at)
        name = step.rstrip(b"\0").decode(errors="ignore")  # cut within a character, if at all
        found[seq] = Place(f"in step {name}", since)
    return lambda seq: found.get(seq, Place("before its first step", None))


def forget(app_dir: Path, worker: str) -> None:
    """Remove what a worker left, once its runs have been given back."""
    (app_dir / "workers" / worker).unlink(missing_ok=True)
