"""The network between a store and its database: it can be cut at the worst instant."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Cut = Literal["before the commit", "after the commit"]


class Wire:
    """Passes on what one side says to the other, on a loopback port of its own, until it is told to cut: then at the
    next commit, before the database hears of it, or after it has carried it out and before anybody else hears of it."""

    def __init__(self, target: Path) -> None:
        self.cuts: list[Cut] = []  # the next ones, in order
        self.up = True
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.refuse()
        self._listening.close()
        self.cut()

    def refuse(self) -> None:
        """Nobody gets through any more who is not yet."""
        self.up = False
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """All connections that there are, now."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self) -> None:
        while self.up:
            try:
                client, _ = self._listening.accept()
                database = socket.socket(socket.AF_UNIX)
                database.connect(str(self._target))
            except OSError:
                continue
            self._ends += [client, database]
            threading.Thread(target=self._pass_on, args=(client, database), daemon=True).start()

    def _pass_on(self, client: socket.socket, database: socket.socket) -> None:
        silent = threading.Event()
        threading.Thread(target=self._answer, args=(client, database, silent), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                if self.cuts and b"COMMIT\0" in data:
                    how = self.cuts.pop(0)
                    silent.set()
                    if how == "after the commit":
                        database.sendall(data)
                        threading.Event().wait(0.3)  # the database does it meanwhile; nothing tells when
                    break
                database.sendall(data)
        for end in (client, database):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _answer(self, client: socket.socket, database: socket.socket, silent: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := database.recv(1 << 16):
                if not silent.is_set():
                    client.sendall(data)


@contextlib.contextmanager
def wire(target: Path) -> Iterator[Wire]:
    one = Wire(target)
    try:
        yield one
    finally:
        one.close()
