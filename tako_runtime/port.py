"""The TCP port that an app listens on: bound here, passed on by the service manager, or taken by somebody else."""

import contextlib
import errno
import os
import socket

from tako_runtime import holders
from tako_runtime.errors import ConfigError, Refused

HOST = "127.0.0.1"

#: The first descriptor that a service manager passes on (sd_listen_fds(3)).
FIRST_PASSED = 3

#: Connections that wait while the app is started again, as many as the system allows.
_BACKLOG = 4096

#: So many ports after a taken one are tried for a free one.
_NEXT = 200


def bound(port: int) -> socket.socket:
    """A socket that listens on the loopback. Raises `Refused`, which names who has the port, and the next free one."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended are no obstacle
        listening.bind((HOST, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise Refused(f"cannot listen on port {port}: {error.strerror}", hint="Choose a port over 1023.") from None
        holder = next(iter(holders.of_port(port)), None)
        by = f"process {holder.pid}: {holder.command}" if holder else "a process that is not shown to this user"
        free = _free_after(port)
        hints = [f"Port {free} is free."] if free else []
        hints += [f"Or stop process {holder.pid}." if free else f"Stop process {holder.pid}."] if holder else []
        raise Refused(f"port {port} is taken by {by}", hint=" ".join(hints)) from None
    return listening


def free() -> int:
    """A port that nobody has right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def passed_on() -> socket.socket | None:
    """The socket that the service manager listens on for this very process; None where there is none. Raises
    `ConfigError` where there are several, or it takes no connections: whoever connects would wait for ever."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", "0"))
    if count == 0:
        return None
    if count > 1:
        raise ConfigError(f"the service manager passes on {count} sockets", hint="Leave one ListenStream= to the app.")
    try:
        listening = socket.socket(fileno=FIRST_PASSED)
        listens = listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listens = 0
    if not listens:
        raise ConfigError(
            "what the service manager passes on takes no connections", hint="Use ListenStream= and Accept=no."
        )
    # Its number is the one that secrets are handed over on. A socket's own dup() would make it blocking, for everybody
    # who has it: the app of the release before this one would wait for a connection, and answer nobody else.
    moved = os.dup(listening.detach())
    os.close(FIRST_PASSED)
    return socket.socket(fileno=moved)


def _free_after(port: int) -> int | None:
    for candidate in range(port + 1, min(port + _NEXT, 65536)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, candidate))
            probe.listen()
            return candidate
    return None
