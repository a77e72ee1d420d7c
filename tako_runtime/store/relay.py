"""What other machines write to a shared store, heard on this one.

A writer tells the database the topics of its batch (NOTIFY, in the batch's own transaction) and rings its own machine's
bell. One process on each machine (its supervisor) listens to the database and rings the bell there: so a worker needs
one connection, and within a machine nothing waits for the network. What is lost while the connection is, the look once
a second makes good, as it does for any ring.

Behind a pooler that hands out a session for one transaction nobody can listen. The secret DATABASE_DIRECT_URL names the
database itself for this one connection; without it, other machines' work is noticed at the look. Either is said at
start.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psycopg

from tako_runtime.bell import Bell
from tako_runtime.errors import TakoError
from tako_runtime.log import emit
from tako_runtime.store.database import Database

#: Pauses between two tries to connect, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0

#: How often it looks whether it is told to end, in seconds.
_LOOK = 1.0

#: What may have been missed while nobody listened.
_EVERYTHING = {"later", "signal", "cancel", "ended"}


class Relay(AbstractContextManager[None]):
    """Listens, in a thread, within. `find` says where the database is, at each connection."""

    def __init__(self, find: Callable[[], Database], schema: str, sender: str, bell: Bell) -> None:
        self._find, self._database = find, find()
        self._schema, self._sender, self._bell = schema, sender, bell
        self._ended = threading.Event()
        self._anew = False
        self._thread = threading.Thread(target=self._listen, name="tako-relay", daemon=True)
        self._listening: psycopg.Connection[Any] | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def begin_anew(self) -> None:
        """Within a second."""
        self._anew = True

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * _LOOK)

    def _listen(self) -> None:
        pause = _FIRST_PAUSE
        while not self._ended.is_set():
            try:
                if self._anew:
                    self._database = self._find()
                    self._anew = False
                with self._database.connect() as db:
                    if not self._database.pooled:
                        db.execute(f'LISTEN "{self._schema}"')
                        emit("relay.listening", database=self._database.where)
                        pause = _FIRST_PAUSE
                        self._bell.ring(_EVERYTHING)
                        self._pass_on(db)
                        continue
                emit("relay.polling", database=self._database.where)
                while not (self._anew or self._ended.wait(_LOOK)):
                    pass
            except (psycopg.Error, TakoError) as error:
                if self._ended.wait(pause):
                    return
                emit("relay.lost", database=self._database.where, error=self._database.words(error))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _pass_on(self, db: "psycopg.Connection[Any]") -> None:
        while not (self._ended.is_set() or self._anew):
            for note in db.notifies(timeout=_LOOK):
                sender, _, topics = note.payload.rpartition("\t")
                if sender != self._sender:
                    self._bell.ring(set(topics.split()))
