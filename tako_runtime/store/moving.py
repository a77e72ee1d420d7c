"""Carry an app from the embedded store into a shared one: what it has, where it stands, and what it waits for.

All or nothing, in one transaction, into a schema without runs. Before the commit what has arrived is read back: as many
rows, with the same checksum, for each table. Runs and schedules of local workflows stay where they are. All else leaves
the file, for what is in a machine's own store is worked on beside the shared one: nothing may be in both. A copy of the
file as it was is kept beside it.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import msgspec
import psycopg

from tako_runtime.errors import NotFound, Refused, StoreError
from tako_runtime.store.copying import copy
from tako_runtime.store.database import Database, translated
from tako_runtime.store.queries import migrations
from tako_runtime.store.schema import migrate
from tako_runtime.store.sqlite import translated as of_the_file

#: Each table, what its rows are in the order of, and which of them go. Workers, leases and the like are of the
#: processes that were.
_OF_RUNS = "run NOT IN (SELECT seq FROM runs WHERE workflow IN (SELECT value FROM json_each(:local)))"
_OF_WORKFLOWS = "workflow NOT IN (SELECT value FROM json_each(:local))"
TABLES = {
    "runs": ("seq", _OF_WORKFLOWS),
    "steps": ("run, kind, name", _OF_RUNS),
    "attempts": ("run, n", _OF_RUNS),
    "waits": ("signal, run, step", _OF_RUNS),
    "signals": ("seq", "true"),
    "schedules": ("workflow", _OF_WORKFLOWS),
}

#: Tables whose rows get the next number, in a column of that name.
_NUMBERED = ("runs", "signals")


class Moved(msgspec.Struct, frozen=True):
    """One table: how many rows, and the checksum of them all."""

    table: str
    rows: int
    checksum: str


class Copied(msgspec.Struct, frozen=True):
    """What went, how many runs of local workflows stay, and where the file is kept as it was; None at a dry run."""

    tables: list[Moved]
    stayed: dict[str, int]
    before: Path | None


def move(path: Path, database: Database, schema: str, *, local: Collection[str] = (), dry_run: bool = False) -> Copied:
    """Move what is in the file `path` and not of the workflows `local`. With `dry_run` all is done and checked, and
    then taken back.

    Raises `NotFound` where there is no file, `Refused` while runs are in hand in it, or where the schema has runs."""
    if not path.exists():
        raise NotFound(f"there is no store {path}")
    try:
        with (
            closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as file,
            closing(database.connect()) as db,
        ):
            file.set_busy_timeout(10_000)
            file.execute("PRAGMA foreign_keys = OFF")
            file.execute("BEGIN IMMEDIATE")  # one picture of it, and nobody adds to it meanwhile
            _check_source(file, path)
            before = None if dry_run else _kept_as_it_was(path)
            names = {"local": msgspec.json.encode(list(local)).decode()}
            migrate(db, schema, database)
            with db.transaction(force_rollback=dry_run):
                db.execute(f'LOCK TABLE "{schema}".runs IN EXCLUSIVE MODE')
                if _one(db.execute(f'SELECT count(*) FROM "{schema}".runs')):  # noqa: S608
                    raise Refused(
                        f"the schema {schema} in {database.where} has runs already",
                        hint="Nothing was copied: a store is only filled while it is empty.",
                    )
                tables = [_carry(file, db, schema, table, names) for table in TABLES]
                for table in reversed(TABLES):
                    file.execute(f"DELETE FROM {table} WHERE {TABLES[table][1]}", names)  # noqa: S608
                stayed = dict(file.execute("SELECT workflow, count(*) FROM runs GROUP BY workflow"))
            if dry_run:
                file.execute("ROLLBACK")
            else:
                _let_go(file, path)
            return Copied(tables, stayed, before)
    except apsw.Error as error:
        raise of_the_file(error, path) from error
    except psycopg.Error as error:
        raise translated(error, database) from error


def _kept_as_it_was(path: Path) -> Path:
    before = path.with_name(f"{path.stem}-before{path.suffix}")
    before.unlink(missing_ok=True)
    copy(path, before)
    return before


def _let_go(file: apsw.Connection, path: Path) -> None:
    """What the database has is no longer in the file."""
    try:
        file.execute("COMMIT")
    except apsw.Error as error:
        raise StoreError(
            f"everything is in the database now, and still in {path} too ({error})",
            hint="Move that file away before you start the app, or its runs would be run twice.",
        ) from error


def _check_source(file: apsw.Connection, path: Path) -> None:
    newest = migrations("sqlite")[-1][0]
    if (version := int(file.pragma("user_version"))) != newest:
        raise StoreError(
            f"{path} has store version {version}; this tako copies version {newest}",
            hint="Start the app once with this version of tako, which brings it up to date.",
        )
    if in_hand := _one(file.execute("SELECT count(*) FROM runs WHERE status = 'running'")):
        raise Refused(
            f"{in_hand} run{'s' * (in_hand != 1)} of {path} are in hand",
            hint="Nothing was copied. Stop the app, which hands them back; its parked runs go on in the new store.",
        )


def _carry(
    file: apsw.Connection, db: "psycopg.Connection[Any]", schema: str, table: str, local: dict[str, str]
) -> Moved:
    names = [row[1] for row in file.execute(f"PRAGMA table_info({table})")]
    columns, (order, goes) = ", ".join(f'"{name}"' for name in names), TABLES[table]
    here = _Sum(table)
    with db.cursor() as cursor:
        with cursor.copy(f'COPY "{schema}".{table} ({columns}) FROM STDIN') as into:
            for row in here.over(
                file.execute(f"SELECT {columns} FROM {table} WHERE {goes} ORDER BY {order}", local)  # noqa: S608
            ):
                into.write_row(row)
        there = _Sum(table)
        cursor.execute(f'SELECT {columns} FROM "{schema}".{table} ORDER BY {order}')  # noqa: S608
        for _ in there.over(cursor):
            pass
        if here.moved != there.moved:
            raise StoreError(f"{table} has not arrived as it was: {here.moved} became {there.moved}")
        if table in _NUMBERED:
            place = f'"{schema}".{table}'
            cursor.execute(
                f"SELECT setval(pg_get_serial_sequence(%s, 'seq'), COALESCE(max(seq), 0) + 1, false) FROM {place}",  # noqa: S608
                (place,),
            )
    return here.moved


class _Sum:
    """Counts rows, and sums up what is in them, in their order."""

    def __init__(self, table: str) -> None:
        self._table, self._rows, self._hash = table, 0, hashlib.sha256()

    def over(self, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        for row in rows:
            self._rows += 1
            self._hash.update(msgspec.json.encode(list(row)) + b"\n")
            yield row

    @property
    def moved(self) -> Moved:
        return Moved(self._table, self._rows, self._hash.hexdigest()[:16])


def _one(asked: Iterable[Sequence[Any]]) -> Any:
    return next(iter(asked))[0]
