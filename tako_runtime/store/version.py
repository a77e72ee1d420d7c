"""Which versions of tako can work with a store: one rule for both kinds.

Old and new releases are at work on one store side by side: until the old one has drained, while several servers roll
over, after a release that has opened the store was refused, after a rollback. So a migration adds, and leaves all that
the tako before it works with; then the older ones go on with what it has made. Where one could not, its script says
which version a tako has to know from then on (`-- serves: N`). Such a one is refused in a store that is in use, until
somebody has stopped the app everywhere and asks for it.
"""

import re
from typing import NamedTuple

from tako_runtime.errors import StoreError, StoreTooNew
from tako_runtime.store.queries import migrations

_SERVES = re.compile(r"^-- serves: (\d+)$", re.MULTILINE)


class Version(NamedTuple):
    """Of a store: the number of its last migration, and the version that a tako has to know to work with it."""

    number: int = 0
    serves: int = 1


def newest(dialect: str) -> int:
    """The version that this tako writes."""
    return migrations(dialect)[-1][0]


def fits(there: Version, dialect: str, where: str) -> bool:
    """Whether a store is as new as this tako, or newer and fit for it; else it has to be migrated. Raises `StoreTooNew`
    where it is not for this tako."""
    ours = newest(dialect)
    if there.serves > ours:
        raise StoreTooNew(
            f"{where} has store version {there.number}, for a tako that knows version {there.serves}; this tako knows "
            f"versions up to {ours}"
        )
    return there.number >= ours


def migrate(there: Version, dialect: str, where: str, *, breaking: bool) -> tuple[list[str], Version]:
    """The scripts that bring a store to this tako's version, and what it has then. Raises `StoreError` for one that
    older ones could not live with, unless it may be `breaking`."""
    scripts, serves = [], there.serves
    for number, script in migrations(dialect):
        if number <= there.number:
            continue
        if mark := _SERVES.search(script):
            serves = int(mark[1])
            if there.number and serves > there.number and not breaking:
                raise StoreError(
                    f"{where} has version {there.number}; a tako that knows no more than that could not work with "
                    f"version {number}",
                    hint="Stop the app on every server, and then: tako store migrate --breaking",
                )
        scripts.append(script)
    return scripts, Version(newest(dialect), serves)
