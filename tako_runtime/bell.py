"""Wake-ups between processes: one datagram to each socket in the app's bell folder.

Who has made something due rings after the commit, with the topics of the batch (`store.base.Topics`); who listens looks
at the store. A ring is a hint: one that is lost (a full buffer, a folder that cannot be reached) costs at most a
second, since every listener also looks once a second.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

#: A socket's path may have 104 bytes on macOS and 108 on Linux, with the name in it.
_LONGEST_FOLDER = 64


#: A buffer may hold no more than ten rings (Linux). After so many at once others may have been lost, of whatever topic.
_CROWD, _ANYTHING = 10, {"later", "signal", "cancel", "ended"}

#: The commonest topic by far, alone. It concerns only who waits for a run's end, and their names begin so.
ENDED, WAITING = {"ended"}, "c-"


class Bell:
    """The bell of one app. Rings from any thread; each listener has its own socket."""

    def __init__(self, app_dir: Path) -> None:
        self._folder = socket_folder(app_dir / "bell")
        self._socket: socket.socket | None = None

    def ring(self, topics: set[str]) -> None:
        """Tell every listener of `topics`. Never raises, never blocks."""
        try:
            listeners = list(self._folder.iterdir())
        except OSError:
            return
        if topics == ENDED:
            listeners = [path for path in listeners if path.name.startswith(WAITING)]
        if not listeners:
            return
        if (sock := self._socket) is None:
            try:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            except OSError:  # no file descriptor left: the listeners' own look has to do
                return
            sock.setblocking(False)
            self._socket = sock
        message = " ".join(sorted(topics)).encode()[:4096]
        for path in listeners:
            try:
                sock.sendto(message, str(path))
            except ConnectionRefusedError:  # its listener is gone
                with contextlib.suppress(OSError):
                    path.unlink()
            except OSError:  # its buffer is full: it has been rung already
                pass

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def listen(self, name: str) -> "Listener":
        """A socket of one's own under `name`, which must be unique (a worker's id). Where none can be had, the listener
        hears nothing, and its look once a second has to do."""
        path = self._folder / name
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        listener.setblocking(False)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)
        except OSError:
            listener.close()
            return Listener(None, path)
        return Listener(listener, path)


class Listener:
    """One who hears the bell, within an event loop."""

    def __init__(self, sock: socket.socket | None, path: Path) -> None:
        self._socket, self._path = sock, path
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, heard: Callable[[set[str]], None]) -> None:
        """Call `heard(topics)` in this event loop at every ring."""
        if self._socket is not None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._read, self._socket, heard)

    def _read(self, sock: socket.socket, heard: Callable[[set[str]], None]) -> None:
        topics: set[str] = set()
        rings = 0
        with contextlib.suppress(OSError):
            while True:
                topics.update(sock.recv(4096).decode(errors="replace").split())
                rings += 1
        heard(topics | _ANYTHING if rings >= _CROWD else topics)

    def close(self) -> None:
        if self._socket is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)


def socket_folder(wanted: Path) -> Path:
    """A folder for sockets: the wanted one; where its path is too long for them, a short one of this user, named by its
    hash."""
    folder = wanted.absolute()
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder
    runtime = Path(f"/run/user/{os.getuid()}")
    if not os.access(runtime, os.W_OK):
        runtime = Path(f"/tmp/tako-{os.getuid()}")  # noqa: S108 -- made 0700 and checked
        with contextlib.suppress(FileExistsError):
            runtime.mkdir(mode=0o700)
        if runtime.lstat().st_uid != os.getuid() or runtime.lstat().st_mode & 0o077:
            return folder  # somebody else's: whoever needs a socket has to do without
    return runtime / f"tako-{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}"
