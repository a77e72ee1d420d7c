"""A long history in seconds: the ended runs that an engine has written itself, copied so many times over.

Each table's other columns are copied as they are. The copies of a run are told apart by their keys alone.
"""

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import in_fresh_process

#: table: {column: expression}, in which `copy` counts from 1 and `many` is a number above all keys.
Copied = Mapping[str, Mapping[str, str]]

MANY = 10_000_000


def in_sqlite(path: Path, copied: Copied, times: int) -> None:
    """In a process of its own: two copies of SQLite in one process take each other's locks on a file away."""
    in_fresh_process(_copy, path, copied, times)


def _copy(path: Path, copied: Copied, times: int) -> None:
    db = sqlite3.connect(path, isolation_level=None, timeout=60)
    db.execute("PRAGMA cache_size = -262144")
    db.execute("BEGIN IMMEDIATE")
    for table, new in copied.items():
        columns = [row[1] for row in db.execute(f'PRAGMA table_info("{table}")')]
        db.execute(f'CREATE TEMP TABLE original AS SELECT * FROM "{table}"')
        db.execute(  # copy by copy, so that keys come in their order
            f"WITH RECURSIVE copies(copy) AS (SELECT 1 UNION ALL SELECT copy + 1 FROM copies WHERE copy < {times - 1}) "
            + _insert(f'main"."{table}', columns, new)
            + " FROM copies CROSS JOIN original"
        )
        db.execute("DROP TABLE original")
    db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def in_postgres(url: str, schema: str, copied: Copied, times: int) -> None:
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT set_config('search_path', %s, false)", (schema,))
        db.execute("SET session_replication_role = replica")  # no foreign key is looked up, no trigger fires
        for table, new in copied.items():
            found = db.execute(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s"
                " AND is_generated = 'NEVER' ORDER BY ordinal_position",
                (schema, table),
            )
            columns = [row[0] for row in found]
            db.execute(
                _insert(table, columns, new, "OVERRIDING SYSTEM VALUE ")
                + f' FROM "{table}" AS original, generate_series(1::bigint, {times - 1}) AS copy'
            )
        db.execute("VACUUM (ANALYZE)")


def _insert(table: str, columns: list[str], new: Mapping[str, str], how: str = "") -> str:
    if unknown := set(new) - set(columns):
        raise LookupError(f"{table} has no column {sorted(unknown)}: the engine's schema is another one")
    values = [new.get(column, f'original."{column}"').replace("many", str(MANY)) for column in columns]
    names = ", ".join(f'"{column}"' for column in columns)
    return f'INSERT INTO "{table}" ({names}) {how}SELECT {", ".join(values)}'
