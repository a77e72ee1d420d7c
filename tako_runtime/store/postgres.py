"""The shared store: Postgres through psycopg, one schema for each app and environment.

A batch is one transaction, and travels as one pipeline (`pipeline.py`): the store waits for the server only where an
answer decides what is done next, and for the commit. That each end and each save finds its row is not waited for, but
taken for granted: a batch in which one does not (a step is there already, a claim is lost) fails as a whole, and is
done again with each of its writes looked at.

Several processes write at the same time. What must not interleave takes a lock on its name first
(`operations.contended`); claims pass over the rows that others have in hand (`FOR UPDATE SKIP LOCKED`); and a write
that names a claim holds its run's row (`FOR SHARE`) until the commit, so that nobody gives the run away in between.

A commit whose answer was lost. Each batch that writes also writes its number into its process's row of `writers`, in
the same transaction. If the connection goes while the commit is on its way, a new one looks there: either the batch is
in, and its answers, which were all known before the commit was sent, are given; or it is not, and then its number is
used up by that look, so that it cannot come in later, and it is done again. So a batch is carried out once, whatever
happens to the connection. What is not found out within `PATIENCE` is told as it is.
"""

import os
import re
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import psycopg
from psycopg import errors

from tako_runtime import clock
from tako_runtime.errors import StoreError, StoreUnreachable
from tako_runtime.store import base
from tako_runtime.store.base import Operation, Topics
from tako_runtime.store.database import AGAIN, SETTINGS, Database, lost, translated
from tako_runtime.store.operations import SqlStore, contended, sort
from tako_runtime.store.pipeline import Pipeline, Query, Sent, array
from tako_runtime.store.queries import load, run_words
from tako_runtime.store.schema import migrate, number
from tako_runtime.store.statements import Bound

#: How long a batch is tried again while the database cannot be reached, in microseconds, and how long the first pause
#: is, in seconds.
PATIENCE, FIRST_PAUSE, LONGEST_PAUSE = 10 * clock.SECOND, 0.02, 0.5

#: How often a process that writes compares its machine's clock with the database's.
COMPARE_EVERY = clock.SECOND

#: How often a batch is tried again that stood in the way of another one.
_TRIES = 5

#: The names of what is contended fall into so many locks: a server has room for some thousands.
_LOCKS = 1_024

#: What the database passes on in one piece has an end.
_LONGEST_MESSAGE = 4_096

#: How long a process is remembered that writes nothing more.
_FORGOTTEN = "1 day"

# Values are read as bytes, as the contract has them.
_AS_BYTES = {"payload", "result"}


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f"convert_to({n}, 'UTF8')" if n in _AS_BYTES else '"group"' if n == "group" else n for n in names)


_WORDS = {
    **run_words(_columns),
    "step": "kind, name, position, status, attempt, started_at, finished_at, due_at, convert_to(result, 'UTF8'), "
    "error, rerun",
    "payload": "convert_to(payload, 'UTF8')",
    "result": "result",
    "rows": "{rows}",
    "in_runs": "= ANY (:runs)",
    "in_workflows": "= ANY (:workflows)",
    "in_statuses": "= ANY (:statuses)",
    "those": "= ANY (ARRAY(",
    "end": "))",
    "any_index": "'' || ",  # the planner knows no index of that
    "lock": "FOR UPDATE SKIP LOCKED",
    "hold": "FOR SHARE",
}

#: Fails, in the words of a conversion, where a query has written fewer rows than it was given: who reads the server's
#: log finds them there.
_ALL_OF = "all of "
_ALL_OF_THEM = (
    "WITH written AS ({query} RETURNING 1) SELECT CASE count(*) WHEN :rows THEN 1 ELSE "
    "CAST('tako: somebody was first; now one by one, as only ' || count(*) || ' rows were as expected' AS int) END "
    "FROM written"
)

#: The types of what `{rows}` stands for. A `value` is bytes here and text there.
_ROWS = {
    "insert_runs": "text text text text int8 int8 int8 int8 int8 int8 text text int8 int8",
    "save_steps": "int8 int8 text text int8 text int8 int8 int8 int8 value text bool",
    "apply": "text text int8 int8 text int8 int8 int8 int8 text text text int8 int8 text",
    "insert_attempts": "int8 int8 text int8 int8 text text",
    "answered": "int8 text",
}

_TABLES = re.compile(
    r"\b(FROM|UPDATE|INTO|JOIN) "
    r"(runs|steps|attempts|waits|signals|workers|schedules|leases|unhealthy|writers|awaited)\b"
)


@cache
def queries_of(schema: str) -> dict[str, Query]:
    """The queries, which name the tables of this schema: no session's search path is relied upon, for behind a pooler
    sessions are shared."""
    return {name: _translated(schema, name, text) for name, text in _texts().items()}


def _texts() -> dict[str, str]:
    """In this dialect; and those whose rows are all to be written, under their names with `_ALL_OF`."""
    texts = load(_WORDS)
    return texts | {_ALL_OF + name: _ALL_OF_THEM.format(query=texts[name]) for name in ("save_steps", "apply")}


def _translated(schema: str, name: str, text: str) -> Query:
    kinds = _ROWS.get(name.removeprefix(_ALL_OF), "").split()
    names: dict[str, int] = {}

    def numbered(found: re.Match[str]) -> str:
        return f"${names.setdefault(found[1], len(kinds) + len(names) + 1)}"

    text = re.sub(r"(?<!:):(\w+)", numbered, text)
    arrays = ", ".join(f"${n}::{'text' if kind == 'value' else kind}[]" for n, kind in enumerate(kinds, 1))
    text = _TABLES.sub(rf'\1 "{schema}".\2', text).replace("{rows}", f"SELECT * FROM unnest({arrays})")  # noqa: S608
    return Query(text.encode(), tuple(names))


class PostgresStore(SqlStore):
    """The store in the schema `schema` of a database, made if it is not there. `sender` names this machine in what
    other ones are told (`relay.py`), so that it does not tell itself."""

    shared = True

    def __init__(self, database: Database, schema: str, sender: str = "", *, breaking: bool = False) -> None:
        self._database, self._schema, self._sender = database, schema, sender
        self._queries, self._locks = queries_of(schema), number(schema)
        self._writer, self._batch = os.urandom(8).hex(), 0
        self._db: psycopg.Connection[Any] | None = None
        self._pipeline: Pipeline
        self._compare_at = 0
        self._hopeful = True  # whether the writes of a batch are taken to find their rows
        self._committing: tuple[list[Any], Topics] | None = None
        try:
            migrate(self._connect(), schema, database, breaking=breaking)
        except psycopg.Error as error:
            self.close()
            raise translated(error, database) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _connect(self) -> "psycopg.Connection[Any]":
        if self._db is None:
            self._db = self._database.connect()
            self._pipeline = Pipeline(self._db, prepares=not self._database.pooled)
        return self._db

    # --- transactions ---

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def turn_at_once(self, writes: bool) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def execute(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        patience, tries, self._hopeful = _Patience(), _TRIES, True
        while True:
            self._committing = None
            try:
                self._connect()
                return self._transact(batch)
            except psycopg.Error as error:
                if self._gone(error):
                    if (committed := self._landed(patience)) is not None:
                        return committed
                    if patience.wait():
                        continue
                elif isinstance(error, AGAIN) and tries:
                    tries -= 1
                    continue
                elif isinstance(error, errors.InvalidTextRepresentation) and self._hopeful:
                    self._hopeful = False
                    continue
                raise translated(error, self._database) from error
            except BaseException:
                self._take_back()
                raise

    def _transact(self, batch: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        topics: Topics = set()
        sorts = sort(batch)
        if not any(kind.writes for kind in sorts):
            with self._pipeline:
                return self._run(batch, sorts, topics), topics
        commit: Sent | None = None
        try:
            with self._pipeline:
                self._begin(contended(sorts))
                ended = [op.change.seq for _, op in sorts.get(base.Apply, ()) if op.change.finished_at is not None]
                answers = self._run(batch, sorts, topics)
                self._batch += 2
                asked = clock.machine()
                mark = self._send("mark_batch", {"writer": self._writer, "batch": self._batch})
                self._committing = answers, topics
                commit = self._pipeline.command(b"COMMIT")
                self._ring(topics, ended)
        except psycopg.Error as error:
            if commit is None or commit.status != "COMMIT":
                raise
            self._gone(error)  # a ring that has failed costs others a second
        if commit.status != "COMMIT":
            raise StoreError(f"the database {self._database.where} has not committed: {commit.status}")
        self._compare_clocks(mark, asked)
        return answers, topics

    def _compare_clocks(self, mark: Sent, asked: int) -> None:
        """Whoever writes looks at the clocks, if only now and then: a machine's may be set wrong at any time."""
        if (now := clock.monotonic()) >= self._compare_at:
            self._compare_at = now + COMPARE_EVERY
            [(shown,)] = self._pipeline.rows(mark)
            self._database.compare(shown, asked)

    def _begin(self, names: Sequence[str]) -> None:
        """A transaction that has these names for itself."""
        self._command("BEGIN")
        if self._database.pooled:
            self._change("set_for_now", {"names": list(SETTINGS), "values": list(SETTINGS.values())})
        if names:
            numbers = sorted({number(name) % _LOCKS for name in names})
            self._change("lock_names", {"space": self._locks, "numbers": numbers})

    def _ring(self, topics: Topics, ended: list[int]) -> None:
        """Tell other machines, whose relays hear it. It goes with the commit, and is carried out after that."""
        if abroad := topics - {"ended"}:
            message = f"{self._sender}\t{' '.join(sorted(abroad))}"[:_LONGEST_MESSAGE]
            self._change("ring", {"channel": self._schema, "message": message})
        if ended:
            told = {"channel": self._schema, "message": f"{self._sender}\tended"}
            self._change("ring_for_ends", {"runs": ended, **told})

    def _gone(self, error: psycopg.Error) -> bool:
        """After an error, with nothing of the batch left open: whether there is no connection any more."""
        gone = lost(error, self._db)
        if gone:
            self.close()
        else:
            self._take_back()
        return gone

    def _take_back(self) -> None:
        if self._db is not None:
            try:
                self._db.execute("ROLLBACK")
            except psycopg.Error:
                self.close()

    def _landed(self, patience: "_Patience") -> tuple[list[Any], Topics] | None:
        """What the batch has answered, if it was committed though the answer to that was lost. Its transaction may not
        be over on the server, nor have got far: from now on it cannot be committed any more, or it has been."""
        committing = self._committing
        while committing is not None:
            try:
                self._connect()
                who = {"writer": self._writer}
                with self._pipeline:
                    self._change("give_up_batch", {"batch": self._batch, "given_up": self._batch + 1, **who})
                    landed = self._value("last_batch", who) == self._batch
                return committing if landed else None
            except psycopg.Error as error:
                self._gone(error)
                if not patience.wait():
                    raise StoreUnreachable(
                        f"the database {self._database.where} was lost during a commit "
                        f"({self._database.words(error)}): whether it was stored is not known",
                        hint="Look before you do it again: tako runs ls. With a unique_key it is safe to.",
                    ) from error
        return None

    # --- what `SqlStore` asks for ---

    def _send(self, query: str, bound: Bound | None = None) -> Sent:
        asked = self._queries[query]
        return self._pipeline.send(asked, [bound[name] for name in asked.names] if bound else ())

    def _send_rows(self, query: str, rows: Sequence[tuple[Any, ...]]) -> Sent:
        return self._pipeline.send(self._queries[query], _columns_of(query, rows))

    def _all(self, query: str, bound: Bound | None = None) -> list[Any]:
        return self._pipeline.rows(self._send(query, bound))

    def _one(self, query: str, bound: Bound) -> Any:
        rows = self._all(query, bound)
        return rows[0] if rows else None

    def _change(self, query: str, bound: Bound) -> None:
        self._send(query, bound)

    def _changed(self, query: str, bound: Bound) -> int:
        return self._pipeline.count(self._send(query, bound))

    def _write(self, query: str, written: Sequence[tuple[Any, ...]]) -> None:
        self._send_rows(query, written)

    def _all_written(self, query: str, written: Sequence[tuple[Any, ...]]) -> bool:
        if self._hopeful:
            self._pipeline.send(self._queries[_ALL_OF + query], [*_columns_of(query, written), len(written)])
            return True
        return self._pipeline.count(self._send_rows(query, written)) == len(written)

    def _all_or_none(self, query: str, written: Sequence[tuple[Any, ...]]) -> bool:
        return self._all_written(query, written) if self._hopeful else super()._all_or_none(query, written)

    def _found(self, query: str, asked: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._pipeline.rows(self._send_rows(query, asked))

    def _command(self, text: str) -> None:
        self._pipeline.command(text.encode())

    def _listed(self, values: Sequence[Any] | None) -> Any:
        return None if values is None else list(values)

    def _data_version(self) -> int:
        return int(self._value("batches_of_others", {"writer": self._writer}))

    def _give_back_space(self) -> bool:
        """The database's own vacuum does; what goes here are the processes that were."""
        self._change("forget_writers", {"age": _FORGOTTEN})
        self._change("forget_awaited", {})
        return False


class _Patience:
    """Pauses that grow, until it has lasted for long."""

    def __init__(self) -> None:
        self._until, self._pause = clock.monotonic() + PATIENCE, FIRST_PAUSE

    def wait(self) -> bool:
        """A pause; False once there is none left."""
        if clock.monotonic() + self._pause * clock.SECOND > self._until:
            return False
        threading.Event().wait(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True


def _columns_of(query: str, rows: Sequence[tuple[Any, ...]]) -> list[bytes]:
    """One parameter for each column, however many rows there are."""
    return [
        array([None if value is None else value.decode() for value in column] if kind == "value" else column)
        for column, kind in zip(zip(*rows, strict=True), _ROWS[query].split(), strict=True)
    ]
