"""The embedded store: SQLite in WAL mode through apsw. Every commit that somebody is told of is synced
(`synchronous=FULL`); one that holds nothing but claims, leases and what became due is not (`base.Operation`).

Writers of several processes queue at a turnstile of two advisory locks around `BEGIN IMMEDIATE`. SQLite's own busy
handler sleeps and retries: one writer in a hurry can starve the others for a second and more, which the turnstile
bounds to each one's turn. `benchmarks/own/contention.py` shows both.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import apsw
import msgspec

from tako_runtime import disk
from tako_runtime.errors import Refused, StoreBusy, StoreError
from tako_runtime.store import shape, version
from tako_runtime.store.base import Operation, Topics
from tako_runtime.store.operations import SqlStore, sort
from tako_runtime.store.queries import load, run_words
from tako_runtime.store.statements import Bound
from tako_runtime.store.turnstile import Turnstile
from tako_runtime.store.version import Version

#: How long a writer waits for its turn, in seconds, before it says that the store is busy.
PATIENCE = 30.0

#: How long SQLite waits for a lock that is not ours to queue for (a backup tool, a shell), in milliseconds.
BUSY_TIMEOUT = 10_000

#: How many free pages go in one transaction: what others wait for meanwhile.
_PRUNED_PAGES = 1_000

#: Without SQLite's own mutex: a connection is used by one thread at a time (`commit.StoreThread`).
_OPEN = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | apsw.SQLITE_OPEN_NOMUTEX

#: Trouble that passes: the same write may work later.
_TRANSIENT = (apsw.BusyError, apsw.LockedError, apsw.FullError, apsw.IOError, apsw.CantOpenError, apsw.ProtocolError)

# Text columns are read as bytes: a value that is not UTF-8 any more must reach the run that it belongs to, not stop the
# claim that reads it.
_AS_BYTES = {"payload", "result"}
_STEP_COLUMNS = (
    "kind, name, position, status, attempt, started_at, finished_at, due_at, CAST(result AS BLOB), error, rerun"
)


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f"CAST({n} AS BLOB)" if n in _AS_BYTES else '"group"' if n == "group" else n for n in names)


_WORDS = {
    **run_words(_columns),
    "step": _STEP_COLUMNS,
    "payload": "CAST(payload AS BLOB)",
    "result": "CAST(result AS TEXT)",
    "rows": "{rows}",
    "in_runs": "IN (SELECT value FROM json_each(:runs))",
    "in_workflows": "IN (SELECT value FROM json_each(:workflows))",
    "in_statuses": "IN (SELECT value FROM json_each(:statuses))",
    "those": "IN (",
    "end": ")",
    "any_index": "+",
    "lock": "",
    "hold": "",
}


Q = load(_WORDS)

#: The most rows that one statement writes. Each count of rows is a statement of its own: any up to `_FEW_ROWS`, and
#: multiples of that.
_FEW_ROWS, _MOST_ROWS = 16, 64

#: How many prepared statements are kept: all of those, and each query.
_STATEMENTS = 256


@cache
def in_bulk(name: str, width: int, count: int) -> str:
    """The query that writes `count` rows of `width` columns."""
    row = f"({', '.join('?' * width)})"
    return Q[name].replace("{rows}", f"VALUES {', '.join([row] * count)}")


def _chunks(query: str, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The statements that carry these rows. The interpreter's lock is given up once for a statement, and while it
    writes the event loop runs."""
    at = 0
    while at < len(rows):
        left = len(rows) - at
        count = left if left <= _FEW_ROWS else min(_MOST_ROWS, left - left % _FEW_ROWS)
        yield in_bulk(query, len(rows[0]), count), tuple(chain.from_iterable(rows[at : at + count]))
        at += count


class SqliteStore(SqlStore):
    """The store in the file `path`, made if it is not there (0600, in folders of 0700).

    `queueing` is how writers of several processes take turns: `"turnstile"`, or `"busy"` for SQLite's own handler,
    which only the benchmark asks for.
    """

    def __init__(
        self, path: Path, queueing: Literal["turnstile", "busy"] = "turnstile", *, breaking: bool = False
    ) -> None:
        self.path = path
        self._turnstile: Turnstile | None = None
        self._synced = True
        self._shrunk = False
        try:
            _make_private(path)
            if queueing == "turnstile":
                self._turnstile = Turnstile(path, PATIENCE)
            self._db = apsw.Connection(str(path), _OPEN, statementcachesize=_STATEMENTS)
            self._db.set_busy_timeout(BUSY_TIMEOUT)
            with nullcontext() if path.stat().st_size else self.turn():  # who reads meanwhile would be in its way
                shape.check(self._db, path)
                if not self._db.pragma("page_count"):  # only a new file can be told to give its free pages back
                    self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                self._db.execute("PRAGMA journal_mode = WAL").fetchall()
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -65536")
            self._db.execute("PRAGMA wal_autocheckpoint = 4000")
            self._migrate(breaking)
        except (apsw.Error, OSError) as error:
            raise translated(error, path) from error

    def close(self) -> None:
        self._db.close()
        if self._turnstile:
            self._turnstile.close()

    def _migrate(self, breaking: bool) -> None:
        """Raises `StoreTooNew` and `StoreError` as `version` says."""
        if version.fits(version_of(self._db), "sqlite", str(self.path)):
            return
        with self.turn():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                scripts, made = version.migrate(version_of(self._db), "sqlite", str(self.path), breaking=breaking)
                for script in scripts:
                    self._db.execute(script)
                self._db.execute(f"PRAGMA user_version = {made.number}")
                self._db.execute("CREATE TABLE IF NOT EXISTS store (serves INTEGER NOT NULL); DELETE FROM store")
                self._db.execute("INSERT INTO store (serves) VALUES (?)", (made.serves,))
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    # --- transactions ---

    def execute(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        self.in_doubt = False
        topics: Topics = set()
        sorts = sort(batch)
        try:
            writes = any(kind.writes for kind in sorts)
            if writes:
                self._sync(any(kind.writes and kind.acknowledged for kind in sorts))
            try:  # what only looks sees one state of things, too
                self._db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                answers = self._run(batch, sorts, topics)
                self.in_doubt = True
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                    self.in_doubt = False
                raise
            if self._shrunk:  # the file gets shorter when what was committed is carried into it
                self._shrunk = False
                with suppress(apsw.Error):  # somebody else does it, or a later one
                    self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            return answers, topics
        except (apsw.Error, OSError) as error:
            raise translated(error, self.path) from error

    def _sync(self, wanted: bool) -> None:
        """Whether the next commit waits for the disk: all do, but those of which nobody is told (`base.Operation`)."""
        if wanted != self._synced:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")
            self._synced = wanted

    def turn(self) -> AbstractContextManager[None]:
        return self._turnstile or nullcontext()

    @contextmanager
    def turn_at_once(self, writes: bool) -> Iterator[bool]:
        turnstile = self._turnstile
        try:
            if writes and not (turnstile and turnstile.take()):
                yield False
                return
        except OSError:  # who may wait for it is told
            yield False
            return
        try:
            self._db.set_busy_timeout(0)  # a lock that is not ours to queue for is not waited for either
            try:
                yield True
            finally:
                self._db.set_busy_timeout(BUSY_TIMEOUT)
        finally:
            if writes and turnstile:
                turnstile.__exit__()

    # --- what `SqlStore` asks for ---

    def _all(self, query: str, bound: Bound | None = None) -> list[Any]:
        return self._db.execute(Q[query], bound).fetchall()

    def _one(self, query: str, bound: Bound) -> Any:
        return self._db.execute(Q[query], bound).fetchone()

    def _change(self, query: str, bound: Bound) -> None:
        self._db.execute(Q[query], bound)

    def _changed(self, query: str, bound: Bound) -> int:
        self._db.execute(Q[query], bound)
        return self._db.changes()

    def _write(self, query: str, written: Sequence[tuple[Any, ...]]) -> None:
        for text, bound in _chunks(query, written):
            self._db.execute(text, bound)

    def _all_written(self, query: str, written: Sequence[tuple[Any, ...]]) -> bool:
        before = self._db.total_changes()
        self._write(query, written)
        return self._db.total_changes() - before == len(written)

    def _found(self, query: str, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [row for text, bound in _chunks(query, asked) for row in self._db.execute(text, bound)]

    def _command(self, text: str) -> None:
        self._db.execute(text)

    def _listed(self, values: Sequence[Any] | None) -> str | None:
        return None if values is None else msgspec.json.encode(values).decode()

    def _data_version(self) -> int:
        return int(self._db.pragma("data_version"))

    def _give_back_space(self) -> bool:
        free = int(self._db.pragma("freelist_count"))
        self._db.execute(f"PRAGMA incremental_vacuum({_PRUNED_PAGES})").fetchall()
        left = int(self._db.pragma("freelist_count"))
        self._shrunk = self._shrunk or left < free
        return 0 < left < free


def version_of(db: apsw.Connection) -> Version:
    """Of a file; one that has none is empty. One that says no more than its number is for those that know that."""
    number = int(db.pragma("user_version"))
    if not number:
        return Version()
    has = db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'store'").fetchone()
    serves = db.execute("SELECT serves FROM store").fetchone() if has else None
    return Version(number, int(serves[0]) if serves else number)


# --- the file and its lock -------------------------------------------------------------------------------------------


def _make_private(path: Path) -> None:
    """The file 0600 and its folders 0700, before SQLite opens it: its WAL takes the same mode."""
    disk.make_private(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def translated(error: apsw.Error | OSError, path: Path) -> StoreError | Refused:
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, _TRANSIENT) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return StoreBusy(f"the store {path} cannot take it right now ({what})")
    if isinstance(error, apsw.ConstraintError) and "unique_key" in str(error):
        return Refused(
            "another live run of this workflow holds the same unique key",
            hint="Let that one end, or cancel it, before this one runs again.",
        )
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        return StoreError(f"the store {path} is damaged ({what})", hint="Restore it from a backup.")
    if isinstance(error, OSError):
        return disk.unusable(error, path)
    return StoreError(f"the store {path} failed ({what})")
