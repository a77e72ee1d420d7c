"""What a worker has in hand, where a SIGKILL cannot erase it.

Each worker keeps one small file, `{app_dir}/workers/<id>`: mapped into memory, a slot for each run, with the step it is
in. The kernel keeps what was written there when the process is gone, at no cost to the run. The worker holds a lock on
the file as long as it lives, so whoever can take that lock knows that the worker is gone: no process id has to be
believed.
"""

import fcntl
import mmap
import os
from pathlib import Path
from typing import NamedTuple

from tako_runtime.run import WorkerRecord

#: A run's `seq` and the number of the claim: the same run may be claimed anew while its last attempt still ends here.
Claim = tuple[int, int]

_SLOT = 256
_SLOTS = 1024


class InFlight:
    """The worker's own side."""

    def __init__(self, app_dir: Path, worker: str) -> None:
        folder = app_dir / "workers"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / worker
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._file, _SLOT * _SLOTS)
        self._map = mmap.mmap(self._file, _SLOT * _SLOTS)
        self._free = list(range(_SLOTS))
        self._slots: dict[Claim, int] = {}

    def note(self, claim: Claim, where: str, now: int) -> None:
        """`where`, from `now` on: "in step charge". With more runs in hand than slots, some go without: their loss is
        told less exactly."""
        slot = self._slots.get(claim)
        if slot is None and self._free:
            slot = self._slots[claim] = self._free.pop()
        if slot is not None:
            text = f"{claim[0]} {now} {where}".encode()[: _SLOT - 1]
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


def is_up(worker: WorkerRecord, app_dir: Path, now: int) -> bool:
    """Whether a worker lives, as far as this machine can tell."""
    return worker.lease_until > now and gone(app_dir, worker.id) is not True


class Place(NamedTuple):
    """Where in its workflow a run is, and since when."""

    where: str
    since: int


def places(app_dir: Path, worker: str) -> dict[int, Place]:
    """Where the runs are that a worker has in hand, or had when it died, by `Run.seq`; empty where nobody knows."""
    try:
        data = (app_dir / "workers" / worker).read_bytes()
    except OSError:
        return {}
    found = {}
    for at in range(0, len(data), _SLOT):
        seq, _, rest = data[at : at + _SLOT].split(b"\0")[0].decode(errors="replace").partition(" ")
        since, _, where = rest.partition(" ")
        if seq.isdigit() and since.isdigit():
            found[int(seq)] = Place(where, int(since))
    return found


def last_seen(app_dir: Path, worker: str) -> dict[int, str]:
    """The same without the times."""
    return {seq: place.where for seq, place in places(app_dir, worker).items()}


def forget(app_dir: Path, worker: str) -> None:
    """Remove what a worker left, once its runs have been given back."""
    (app_dir / "workers" / worker).unlink(missing_ok=True)
