"""Whether a SQLite file has the tables of the version that is written in it, before anything is written to it.

A file of another program at the store's place, or one whose version somebody has altered, would else fail with an error
of SQL's, now or in the middle of the night; or be migrated a second time.
"""

from contextlib import closing
from functools import cache
from pathlib import Path

import apsw

from tako_runtime.errors import StoreError
from tako_runtime.store.queries import migrations


def check(db: apsw.Connection, path: Path) -> None:
    """Raises `StoreError`. A version that is newer than this tako is not looked into, and what somebody has added, such
    as an index, is theirs."""
    with db:  # one look: somebody may be making it, or migrating it
        version, there = int(db.pragma("user_version")), _names(db)
    newest = migrations("sqlite")[-1][0]
    if version > newest:
        return
    if version == 0 and there and not there & _made(newest):
        raise StoreError(
            f"{path} is a SQLite file of another program: it has none of tako's tables",
            hint="Nothing was changed. Move it away, or give this app another data folder.",
        )
    missing, early = _made(version) - there, (_made(newest) - _made(version)) & there
    if version < 0 or missing or early:
        wrong = f"lacks {_listed(missing)}" if missing else f"has {_listed(early)} already"
        raise StoreError(
            f"the store {path} says that it has version {version}, and {wrong}: it was altered by hand, or it is "
            "another program's",
            hint="Nothing was changed. Restore it from a backup; or begin anew, with this one put aside: "
            "tako dev --fresh",
        )


@cache
def _made(version: int) -> frozenset[str]:
    """The names of what the migrations up to a version have made and left."""
    with closing(apsw.Connection(":memory:")) as db:
        for number, script in migrations("sqlite"):
            if number <= version:
                db.execute(script)
        return _names(db)


def _names(db: apsw.Connection) -> frozenset[str]:
    found = db.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'")
    return frozenset(str(name) for (name,) in found)


def _listed(names: frozenset[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
