"""One `tako dev` for a project at a time. The lock ends with its process, however that ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tako_runtime.errors import Refused


@contextmanager
def alone(app_dir: Path) -> Iterator[None]:
    """Be the only one within. Raises `Refused`, naming the other one's process id."""
    app_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(app_dir / "dev.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(file, 20).decode() or "unknown"
            raise Refused(
                f"another tako dev runs this project: process {pid}",
                hint="Stop that one first: Ctrl-C in its terminal.",
            ) from None
        os.ftruncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)
