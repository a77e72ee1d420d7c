"""Runs a program that knows nothing of tako, so that it too ends with its supervisor, however that ends.

    python -I -S guard.py COMMAND...

A worker watches for the supervisor's end with a thread of its own; a program of the user's has none. So the supervisor
starts this file, as the leader of a process group, with a pipe as standard input whose other end only it holds. The
file leaves a watcher behind and then becomes the program (`exec`), with nothing on standard input: the program is the
supervisor's direct child under its own name, and there is no instant in which it runs unwatched. When the pipe closes,
the watcher has the program end, and after a while kills the group.

The watcher is in that group itself: so no other process can get its number while the watcher may still kill it, and
whoever kills the group, as the supervisor does at the program's end, takes the watcher along. It is not the program's
child, for a program may wait for all of its children. Chosen over `PR_SET_PDEATHSIG`, which only Linux has, which must
be set between fork and exec, and which spares what the program has started. A program that leaves its group escapes.

It is run as a file, and imports next to nothing: a start costs some 20 ms.
"""

import os
import signal
import sys
import time
from contextlib import suppress

#: What has lost its supervisor has this many seconds to end by itself; then it goes with all that it has started.
ORPHAN_GRACE = 4.0

#: The exit code of a program that could not be started, as shells have it.
NOT_STARTED = 127


def become(words: list[str]) -> None:
    """Leave a watcher behind, and be the program from now on."""
    program = os.getpid()
    if os.getpgrp() != program:
        sys.exit("guard.py must lead a process group, for it may kill that")
    if os.fork() == 0:
        if os.fork() == 0:
            _watch(program)
        os._exit(0)
    os.wait()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what is ignored stays so
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)  # noqa: S606 -- no shell is what is wanted
    except OSError as error:
        where = "" if "/" in words[0] else " (it was looked for in PATH)"
        sys.stderr.write(f"{words[0]} cannot be started: {error.strerror}{where}\n")
        sys.stderr.flush()
        os._exit(NOT_STARTED)


def _watch(program: int) -> None:
    """Until the supervisor is gone. Nothing but a SIGKILL ends it: a program may signal its whole group."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.closerange(1, os.sysconf("SC_OPEN_MAX"))  # what the program was given is none of its business
    while os.read(0, 4096):
        pass
    with suppress(ProcessLookupError):
        os.kill(program, signal.SIGTERM)
    time.sleep(ORPHAN_GRACE)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    become(sys.argv[1:])
