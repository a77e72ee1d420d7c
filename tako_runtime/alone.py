"""One supervisor an app: a lock that ends with its process, however that ends, and is let go for a successor."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from tako_runtime import disk
from tako_runtime.errors import Refused


class Lock:
    """The right to supervise an app; `with lock:` ends it. `what` is who we are: "supervisor" or "tako dev"."""

    def __init__(self, app_dir: Path, what: str) -> None:
        self._what = what
        self._held = False
        path = app_dir / "supervisor.pid"
        try:
            disk.make_private(app_dir)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk.unusable(error, path) from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self.let_go()

    def try_take(self) -> bool:
        """Take it, if nobody has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()} {self._what}".encode(), 0)
        self._held = True
        return True

    def take(self) -> None:
        """Take it. Raises `Refused`, naming the other one's process id."""
        if not self.try_take():
            pid, other = self.holder()
            raise Refused(
                f"another {other or 'supervisor'} runs this app: process {pid or 'unknown'}",
                hint="Stop that one first.",
            )

    def holder(self) -> tuple[int, str]:
        """The process id of whoever has it, and what that is; 0 where it is not known."""
        pid, _, other = os.pread(self._file, 100, 0).decode(errors="replace").partition(" ")
        return int(pid) if pid.isdigit() else 0, other

    def let_go(self) -> None:
        """Once and for all."""
        if self._file >= 0:
            if self._held:
                os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file, self._held = -1, False
