"""Who still has old secrets: what the supervisor notes whenever it reads them and whenever such a worker ends.

The note is `{app_dir}/secrets.held`: process ids, and which file the supervisor has read. It holds no value.
"""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime.errors import TakoError
from tako_runtime.secrets import envelope, stored


class Held(msgspec.Struct, frozen=True):
    """`version` is that of the file that was read (`version`), `old` the processes that have what it had before."""

    version: int
    old: list[int] = []


def version(app_dir: Path) -> int:
    """Which secrets the app's file has: another number whenever they are put there. 0 where there is none."""
    try:
        return (app_dir / "secrets.json").stat().st_mtime_ns
    except OSError:
        return 0


class Note:
    """What the supervisors of one app on this machine note, each for its own workers."""

    def __init__(self, app_dir: Path) -> None:
        self._app_dir = app_dir
        self._old: dict[object, Collection[int]] = {}

    def write(self, supervisor: object, version: int, old: Collection[int]) -> None:
        self._old[supervisor] = old
        pids = sorted(pid for pids in self._old.values() for pid in pids)
        with contextlib.suppress(OSError):  # a full disk: only a look at it is wrong then
            _write(self._app_dir / "secrets.held", msgspec.json.encode(Held(version, pids)))


def standing(app_dir: Path) -> dict[str, Any]:
    """For programs: whether the supervisor has yet to read them (`unread`), and the processes that have `old` ones."""
    try:
        held = msgspec.json.decode((app_dir / "secrets.held").read_bytes(), type=Held)
    except (OSError, msgspec.MsgspecError):
        return {"unread": False, "old": []}
    return {"unread": held.version != version(app_dir), "old": held.old}


def put(app_dir: Path, values: dict[str, str]) -> list[str]:
    """Make these the app's secrets, all of them; the names of those that are others now. The file is whole at any
    time, and its user's alone. Raises `InvalidValue` for what cannot be secrets."""
    data = envelope(values)
    try:
        before = stored(app_dir)
    except TakoError:  # what cannot be read is put right
        before = {}
    changed = sorted(name for name in {*before, *values} if before.get(name) != values.get(name))
    if changed or not (app_dir / "secrets.json").exists():
        _write(app_dir / "secrets.json", data)
    return changed


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
