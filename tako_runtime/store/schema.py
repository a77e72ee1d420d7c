"""The schema of a shared store: made and brought up to date by whoever comes first, while others do the same.

Old and new releases run side by side during a roll-over. So a migration says which versions of tako can work with what
it makes (`-- serves: N`), where those before it cannot. Such a one is refused while there is an older schema, unless it
is asked for; and a schema that a newer tako has made is fine as long as it serves this one.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tako_runtime.errors import StoreError, StoreTooNew
from tako_runtime.store.database import Database, translated
from tako_runtime.store.file import Examined
from tako_runtime.store.queries import migrations

_SERVES = re.compile(r"^-- serves: (\d+)$", re.MULTILINE)


def number(name: str) -> int:
    """A number for a name, of 32 bits with a sign: what advisory locks are known by."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), signed=True)


def migrate(db: "psycopg.Connection[Any]", schema: str, database: Database, *, breaking: bool = False) -> None:
    """Bring the schema to the newest version that this tako knows. Raises `StoreTooNew` for one that does not serve it,
    and `StoreError` for a migration that older ones could not live with, unless it may be `breaking`."""
    known = migrations("postgres")
    newest = known[-1][0]
    if _fits(db, schema, database, newest):
        return
    with _one_at_a_time(db, schema):
        if _fits(db, schema, database, newest):
            return
        db.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
        db.execute(f'SET LOCAL search_path TO "{schema}"')
        db.execute("CREATE TABLE IF NOT EXISTS store (version BIGINT NOT NULL, serves BIGINT NOT NULL)")
        version, serves = db.execute("SELECT version, serves FROM store").fetchone() or (0, 1)
        for n, script in known:
            if n <= version:
                continue
            if mark := _SERVES.search(script):
                serves = int(mark[1])
                if version and serves > version and not breaking:
                    raise StoreError(
                        f"the schema {schema} in {database.where} has version {version}; a tako that knows no more "
                        f"than that could not work with version {n}",
                        hint="Stop the app on every server, and then: tako store migrate --breaking",
                    )
            db.execute(script)
        db.execute("DELETE FROM store")
        db.execute("INSERT INTO store (version, serves) VALUES (%s, %s)", (newest, serves))


def _fits(db: "psycopg.Connection[Any]", schema: str, database: Database, newest: int) -> bool:
    """Whether the schema is there and as new as this tako, or newer and fit for it."""
    there = db.execute("SELECT to_regclass(%s)", (f'"{schema}".store',)).fetchone()
    if there is None or there[0] is None:
        return False
    version, serves = db.execute(f'SELECT version, serves FROM "{schema}".store').fetchone() or (0, 1)  # noqa: S608
    if serves > newest:
        raise StoreTooNew(
            f"the schema {schema} in {database.where} has store version {version}, for a tako that knows version "
            f"{serves}; this one knows versions up to {newest}"
        )
    return bool(version >= newest)


def examine(database: Database, schema: str) -> Examined | None:
    """As `file.examine`; what a database is sound by, it sees to itself."""
    try:
        with database.connect() as db:
            there = db.execute("SELECT to_regclass(%s)", (f'"{schema}".store',)).fetchone()
            if there is None or there[0] is None:
                return None
            asked = (
                f'SELECT (SELECT version FROM "{schema}".store), count(*), max(created_at), '  # noqa: S608
                f"pg_total_relation_size('\"{schema}\".runs') + pg_total_relation_size('\"{schema}\".steps') "
                f'FROM "{schema}".runs'
            )
            version, runs, latest, size = db.execute(asked).fetchone() or (0, 0, None, 0)
    except psycopg.Error as error:
        raise translated(error, database) from error
    place = Path(f"{schema} in {database.where}")
    return Examined(place, size, 0o600, version, migrations("postgres")[-1][0], runs=runs, latest=latest)


@contextmanager
def _one_at_a_time(db: "psycopg.Connection[Any]", schema: str) -> Iterator[None]:
    """A big table may take a migration long."""
    with db.transaction():
        db.execute("SELECT set_config('lock_timeout', '60s', true), set_config('statement_timeout', '0', true)")
        db.execute("SELECT pg_advisory_xact_lock(%s::int4, -1)", (number(schema),))
        yield
