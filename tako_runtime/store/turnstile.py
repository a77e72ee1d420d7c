"""A fair lock between the processes that write one store."""

import fcntl
import os
from contextlib import AbstractContextManager
from pathlib import Path


class Turnstile(AbstractContextManager[None]):
    """A fair lock between processes. Who wants the write lock stands at the gate first, and goes through it only once
    the lock is his: so who has just let go queues behind who was waiting already. Both locks end with their process."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._gate = os.open(f"{path}-gate", flags, 0o600)
        self._lock = os.open(f"{path}-lock", flags, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._gate)
        os.close(self._lock)
