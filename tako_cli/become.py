"""`tako run`: this process becomes the command. So its exit code, its terminal and every signal are the command's own,
by construction and not by passing them on; and no shell is between."""

import contextlib
import fcntl
import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tako_cli import output
from tako_runtime.errors import NotFound, Refused
from tako_runtime.secrets import VARIABLE, envelope, shared

#: What the interpreter ignores, and a program expects not to be.
_IGNORED = ("SIGPIPE", "SIGXFSZ")


def become(words: Sequence[str], environment: Mapping[str, str], secrets: Mapping[str, str]) -> NoReturn:
    """Never returns. Raises `NotFound` where there is no such program; then nothing has happened."""
    pipe = _filled(envelope(secrets))
    os.set_inheritable(pipe, True)
    for name in _IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    output.flush()
    try:
        os.execvpe(words[0], list(words), {**environment, VARIABLE: shared(pipe)})  # noqa: S606 -- no shell is the point
    except FileNotFoundError:
        os.close(pipe)
        raise NotFound(
            f"no program {words[0]}", hint="It is looked for on PATH; a path of your own begins with ./ or /."
        ) from None


def _filled(data: bytes) -> int:
    """The read end of a pipe that has all of it already, for nobody is left to write once this process is another."""
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # more than this user may have: the write below tells
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, len(data))
    os.set_blocking(writing, False)
    written = os.write(writing, data)
    os.close(writing)
    if written < len(data):
        os.close(reading)
        raise Refused(
            f"the secrets have {len(data):,} bytes, and a pipe takes {written:,}", hint="Keep big files elsewhere."
        )
    return reading
