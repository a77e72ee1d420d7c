"""`tako run`: this process becomes the command. So its exit code, its terminal and every signal are the command's own,
by construction and not by passing them on; and no shell is between."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from tako_cli import output
from tako_runtime.errors import NotFound
from tako_runtime.secrets import VARIABLE, offered

#: What the interpreter ignores, and a program expects not to be.
_IGNORED = ("SIGPIPE", "SIGXFSZ")


def become(words: Sequence[str], environment: Mapping[str, str], secrets: Mapping[str, str]) -> NoReturn:
    """Never returns. Raises `NotFound` where there is no such program; then nothing has happened."""
    with offered(secrets) as (envelope, said):
        os.set_inheritable(envelope, True)
        for name in _IGNORED:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        output.flush()
        try:
            os.execvpe(words[0], list(words), {**environment, VARIABLE: said})  # noqa: S606 -- no shell is the point
        except FileNotFoundError:
            raise NotFound(
                f"no program {words[0]}", hint="It is looked for on PATH; a path of your own begins with ./ or /."
            ) from None
