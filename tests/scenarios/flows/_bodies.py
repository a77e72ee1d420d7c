"""What the bodies of the scenarios' steps leave behind, so that a test can count them whatever was killed."""

import os
import signal
from pathlib import Path


def ran(log: str, body: str) -> None:
    """One line for one body that ran."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{body}\n".encode())
    os.close(file)


def first(marker: str) -> bool:
    """True for the first caller of all processes."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def held(gate: str) -> bool:
    """Wait until the test opens the gate, a named pipe. Only the first caller is held; whether this one was."""
    if not first(f"{gate}.held"):
        return False
    with Path(gate).open("rb") as pipe:
        pipe.read()
    return True


def die() -> None:
    """As if the machine had pulled the plug on this process."""
    os.kill(os.getpid(), signal.SIGKILL)
