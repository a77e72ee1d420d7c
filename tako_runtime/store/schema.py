"""The schema of a shared store: made and brought up to date by whoever comes first, while others do the same."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tako_runtime.store import version
from tako_runtime.store.database import Database, translated
from tako_runtime.store.file import Examined
from tako_runtime.store.version import Version


def number(name: str) -> int:
    """A number for a name, of 32 bits with a sign: what advisory locks are known by."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), signed=True)


def migrate(db: "psycopg.Connection[Any]", schema: str, database: Database, *, breaking: bool = False) -> None:
    """Bring the schema to the newest version that this tako knows. Raises `StoreTooNew` and `StoreError` as `version`
    says."""
    where = f"the schema {schema} in {database.where}"
    if version.fits(_version(db, schema), "postgres", where):
        return
    with _one_at_a_time(db, schema):
        db.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        db.execute(f'SET LOCAL search_path TO "{schema}"')
        db.execute("CREATE TABLE IF NOT EXISTS store (version BIGINT NOT NULL, serves BIGINT NOT NULL)")
        there = _version(db, schema)  # now, for who has just taken the lock may know of no table that others have made
        if version.fits(there, "postgres", where):
            return
        scripts, made = version.migrate(there, "postgres", where, breaking=breaking)
        for script in scripts:
            db.execute(script)
        db.execute("DELETE FROM store")
        db.execute("INSERT INTO store (version, serves) VALUES (%s, %s)", made)


def _version(db: "psycopg.Connection[Any]", schema: str) -> Version:
    there = db.execute("SELECT to_regclass(%s)", (f'"{schema}".store',)).fetchone()
    if there is None or there[0] is None:
        return Version()
    return Version(*(db.execute(f'SELECT version, serves FROM "{schema}".store').fetchone() or ()))  # noqa: S608


def serves(database: Database, schema: str) -> int | None:
    """The version that a tako has to know to work with it; None where there is none yet. Nothing is written."""
    try:
        with database.connect() as db:
            there = _version(db, schema)
    except psycopg.Error as error:
        raise translated(error, database) from error
    return there.serves if there.number else None


def examine(database: Database, schema: str) -> Examined | None:
    """As `file.examine`; what a database is sound by, it sees to itself."""
    try:
        with database.connect() as db:
            there = _version(db, schema)
            if not there.number:
                return None
            asked = (
                f"SELECT count(*), max(created_at), pg_total_relation_size('\"{schema}\".runs') "  # noqa: S608
                f'+ pg_total_relation_size(\'"{schema}".steps\') FROM "{schema}".runs'
            )
            runs, latest, size = db.execute(asked).fetchone() or (0, None, 0)
    except psycopg.Error as error:
        raise translated(error, database) from error
    place = Path(f"{schema} in {database.where}")
    newest = version.newest("postgres")
    return Examined(place, size, 0o600, there.number, newest, there.serves, runs=runs, latest=latest)


@contextmanager
def _one_at_a_time(db: "psycopg.Connection[Any]", schema: str) -> Iterator[None]:
    """A big table may take a migration long."""
    with db.transaction():
        db.execute("SELECT set_config('lock_timeout', '60s', true), set_config('statement_timeout', '0', true)")
        db.execute("SELECT pg_advisory_xact_lock(%s::int4, -1)", (number(schema),))
        yield
