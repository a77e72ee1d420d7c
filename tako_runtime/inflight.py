"""What a worker has in hand, where a SIGKILL cannot erase it.

Each worker keeps one small file, `{app_dir}/workers/<id>`: mapped into memory, a slot for each run, with the step it is
in. The kernel keeps what was written there when the process is gone, at no cost to the run. The worker holds a lock on
the file as long as it lives, so whoever can take that lock knows that the worker is gone: no process id has to be
believed.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

#: A run's `seq` and the number of the claim: the same run may be claimed anew while its last attempt still ends here.
Claim = tuple[int, int]

_SLOT = 256


class InFlight:
    """The worker's own side, with room for so many runs at once."""

    def __init__(self, app_dir: Path, worker: str, room: int) -> None:
        folder = app_dir / "workers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / worker
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._file, _SLOT * room)
        self._map = mmap.mmap(self._file, _SLOT * room)
        self._free = list(range(room))
        self._slots: dict[Claim, int] = {}

    def note(self, claim: Claim, where: str) -> None:
        """The run has come to `where`: "in step charge". Beyond the room that there is, some go without."""
        slot = self._slots.get(claim)
        if slot is None and self._free:
            slot = self._slots[claim] = self._free.pop()
        if slot is not None:
            text = f"{claim[0]} {where}".encode()[: _SLOT - 1]
            at = slot * _SLOT
            self._map[at : at + len(text) + 1] = text + b"\0"

    def give_up(self, claim: Claim) -> None:
        slot = self._slots.pop(claim, None)
        if slot is not None:
            self._map[slot * _SLOT] = 0
            self._free.append(slot)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)


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


def last_seen(app_dir: Path, worker: str) -> Callable[[int], str]:
    """Where a run of a worker that is gone stood, by `Run.seq`: a run without a note was not in a step yet. "" where
    nobody knows."""
    try:
        data = (app_dir / "workers" / worker).read_bytes()
    except OSError:
        return lambda seq: ""
    found = {}
    for at in range(0, len(data), _SLOT):
        seq, _, where = data[at : at + _SLOT].split(b"\0")[0].decode(errors="replace").partition(" ")
        found[seq] = where
    return lambda seq: found.get(str(seq), "before its first step")


def forget(app_dir: Path, worker: str) -> None:
    """Remove what a worker left, once its runs have been given back."""
    (app_dir / "workers" / worker).unlink(missing_ok=True)
