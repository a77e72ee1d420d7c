"""A fair lock between the processes that write one store, with an end to the waiting."""

import fcntl
import os
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from tako_runtime.errors import StoreLocked


class Turnstile(AbstractContextManager[None]):
    """Who wants the lock stands at the gate first, and goes through it only once the lock is his: so who has just let
    go queues behind who was waiting already. Both locks end with their process.

    Waiting for a file lock cannot be given a limit. So it is done in a thread of its own, and a limit is set on waiting
    for that: the process that holds the lock may be stopped in a debugger. Raises `StoreLocked` after `patience`
    seconds. A lock that nobody holds is taken without any of this.
    """

    def __init__(self, path: Path, patience: float) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._path, self._patience = path, patience
        self._gate = os.open(f"{path}-gate", flags, 0o600)
        self._lock = os.open(f"{path}-lock", flags, 0o600)
        self._waiter: threading.Thread | None = None
        self._granted = threading.Event()
        self._handover = threading.Lock()
        self._wanted = False

    def __enter__(self) -> None:
        if not self.take():
            self._wait()
            self._sign()

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._waiter is None:  # else its thread still waits with them, and they go with the process
            os.close(self._gate)
            os.close(self._lock)

    def take(self) -> bool:
        """The lock, if nobody has it or waits for it; whether it was taken. `__exit__` gives it back."""
        if self._waiter is not None:
            return False
        try:
            fcntl.flock(self._gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            fcntl.flock(self._gate, fcntl.LOCK_UN)
        self._sign()
        return True

    def _sign(self) -> None:
        """For who waits in vain: which process it is."""
        with suppress(OSError):
            os.pwrite(self._lock, b"%-10d" % os.getpid(), 0)

    def _wait(self) -> None:
        with self._handover:
            self._wanted = True
            if self._waiter is None:  # else it still waits from a time that was given up: its turn will be ours
                self._granted.clear()
                self._waiter = threading.Thread(target=self._pass_through, name="tako-turnstile", daemon=True)
                self._waiter.start()
        if not self._granted.wait(self._patience):
            with self._handover:
                if not self._granted.is_set():
                    self._wanted = False
                    holder = os.pread(self._lock, 10, 0).decode(errors="replace").strip() or "unknown"
                    locked = StoreLocked(
                        f"the store {self._path} has been locked for {self._patience:g} s by process {holder}",
                        hint="Is that process stopped, or its disk stuck? The lock ends with it.",
                    )
                    locked.holder = int(holder) if holder.isdigit() else None
                    raise locked
        self._waiter = None

    def _pass_through(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        with self._handover:
            if self._wanted:
                self._granted.set()
            else:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
                self._waiter = None
