"""Who still has old secrets. Each process that is handed secrets inherits a mark: a file in `{app_dir}/secrets.held/`
that is named for which ones it got (`version`), and whose lock ends with the process, however that ends.

So nobody keeps a list: whoever runs with what, the app and workers of an older release that drain too, is known from
who holds a lock. A mark has a process id and what that is, and no value.
"""

import contextlib
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime import disk
from tako_runtime.errors import TakoError
from tako_runtime.secrets import envelope, file_of, stored
from tako_runtime.workflow import release

SUPERVISOR = "the supervisor"

_numbers = itertools.count()


def version(app_dir: Path) -> int:
    """Which secrets the app's file has: another number whenever they are put there. 0 where there is none."""
    try:
        return file_of(app_dir).stat().st_mtime_ns
    except OSError:
        return 0


class Holder(msgspec.Struct, frozen=True):
    """Who has secrets: "a worker of default", "the app" or "the supervisor"."""

    pid: int
    what: str
    release: str


class Mark:
    """A mark that is held. `fd` is for the process to inherit which it is `of`; what holds it by itself keeps it."""

    def __init__(self, fd: int, what: str) -> None:
        self.fd, self._what = fd, what

    @property
    def given(self) -> list[int]:
        """The descriptor to inherit; none where the disk would not take a mark."""
        return [self.fd] if self.fd >= 0 else []

    def of(self, pid: int) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.pwrite(self.fd, msgspec.json.encode(Holder(pid, self._what, release())), 0)

    def drop(self) -> None:
        """It is the other's alone, or nobody's."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def mark(app_dir: Path, version: int, what: str) -> Mark:
    """A new one, for whoever gets the secrets of that version."""
    folder = app_dir / "secrets.held"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in _marks(folder):
            if _holder(path) is None:
                path.unlink(missing_ok=True)
        name = f"{version}.{os.getpid()}.{next(_numbers)}"
        fresh = folder / f".{name}"
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        fresh.rename(folder / name)
    except OSError:  # a full disk: only a look at it is wrong then
        return Mark(-1, what)
    return Mark(fd, what)


def standing(app_dir: Path) -> dict[str, Any]:
    """For programs: whether the supervisor has yet to read them (`unread`), and the processes that have `old` ones."""
    now, folder = version(app_dir), app_dir / "secrets.held"
    found = [_holder(path) for path in _marks(folder) if path.name.split(".")[0] != str(now)]
    old = [each for each in found if each is not None and each.pid]
    return {
        "unread": any(each.what == SUPERVISOR for each in old),
        "old": [msgspec.to_builtins(each) for each in old if each.what != SUPERVISOR],
    }


def _marks(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _holder(path: Path) -> Holder | None:
    """Whose mark that is; None where nobody has it any more."""
    try:
        with path.open("rb") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            return msgspec.json.decode(file.read(), type=Holder)
    except OSError:
        return None
    except msgspec.MsgspecError:  # it is about to be started
        return Holder(0, "", "")


def put(app_dir: Path, values: dict[str, str]) -> list[str]:
    """Make these the app's secrets, all of them; the names of those that are others now. The file is whole at any
    time, and its user's alone. Raises `InvalidValue` for what cannot be secrets."""
    data = envelope(values)
    try:
        before = stored(app_dir)
    except TakoError:  # what cannot be read is put right
        before = {}
    changed = sorted(name for name in {*before, *values} if before.get(name) != values.get(name))
    brought = _brought(app_dir)
    if changed or brought or not (app_dir / "secrets.json").exists():
        _write(app_dir / "secrets.json", data)
    for path in brought:  # these are for whoever is on trial, too
        path.unlink(missing_ok=True)
    return changed


def bring(app_dir: Path, release: str, data: bytes, account: str = "") -> None:
    """The envelope that a release comes with: its own, while it has to prove itself (`settle`). The same as are there
    already are not brought: they keep their time, by which it is known who has others. The file is to be `account`'s,
    and else of whoever asks."""
    if _content(app_dir / "secrets.json") != data:
        _write(app_dir / f"secrets.{release}.json", data, account)


def settle(app_dir: Path, current: str | None) -> None:
    """What the current release has come with is the app's; what another one has, that was not taken or was cut off, is
    gone. Whatever cuts this off: a release reads its own as long as there are any (`secrets.file_of`)."""
    own = f"secrets.{current}.json"
    for path in _brought(app_dir):
        if path.name == own:
            path.replace(app_dir / "secrets.json")
        else:
            path.unlink(missing_ok=True)
    disk.sync(app_dir)


def _brought(app_dir: Path) -> list[Path]:
    return list(app_dir.glob("secrets.*.json"))


def _content(path: Path) -> bytes | None:
    """The folder may be another user's: no link is followed, and no pipe is waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else None


def _write(path: Path, data: bytes, account: str = "") -> None:
    """The folder may be another user's: the file has a name that nobody foresees, and no link is followed."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    fresh = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
            if account:
                shutil.chown(fd, account, account)
        fresh.replace(path)
    except BaseException:
        fresh.unlink()
        raise
    disk.sync(path.parent)
