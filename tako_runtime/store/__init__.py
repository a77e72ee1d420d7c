"""An app's store: opened, looked after, and the one that this process has open.

Where it is, `home.py` says. It is opened at first use, once per process; a forked child opens its own. Which kind it
is, only this module and those beside it know: a file of this machine's, or a database that several share.
"""

import os
import shlex
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tako_runtime.bell import Bell
from tako_runtime.errors import ConfigError, Refused
from tako_runtime.store.base import Store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.home import (
    APP_NAME,
    DATABASE_DIRECT_URL,
    DATABASE_URL,
    DEVELOPMENT,
    EMBEDDED,
    POSTGRES,
    PRODUCTION,
    Home,
    Limits,
    find_limits,
    in_development,
    locate,
    pace,
    project_home,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from tako_runtime.store.database import Database
    from tako_runtime.store.file import Aside, Examined
    from tako_runtime.store.moving import Copied
    from tako_runtime.store.relay import Relay

__all__ = [
    "APP_NAME",
    "DATABASE_DIRECT_URL",
    "DATABASE_URL",
    "DEVELOPMENT",
    "EMBEDDED",
    "POSTGRES",
    "PRODUCTION",
    "Home",
    "Limits",
    "Local",
    "backup",
    "beside",
    "copy",
    "current",
    "developing",
    "examine",
    "in_development",
    "limits",
    "local_of",
    "locate",
    "migrate",
    "open_store",
    "pace",
    "project_home",
    "restore",
    "serves",
    "set_aside",
    "use",
    "where",
]


def open_store(home: Home, *, patient: bool = False) -> StoreThread:
    """A store of one's own; with `patient`, one that cannot be had now is for later. Most callers want `current()`."""
    bell = Bell(home.app_dir)
    if not home.is_shared:
        return StoreThread(lambda: _open_file(home), bell, patient=patient)
    return StoreThread(lambda: _open_schema(home), bell, lambda bell: _relay(home, bell), patient=patient)


class Local:
    """This machine's own store beside a shared one, for the runs of local workflows. The first of them makes it."""

    def __init__(self, home: Home) -> None:
        self._home, self._lock = home.embedded(), threading.Lock()
        self._opened: StoreThread | None = None

    def there(self) -> StoreThread | None:
        """The store; None where no run has ever been local here."""
        return self.made() if self._opened is not None or self._home.file.exists() else None

    def made(self) -> StoreThread:
        """The store, made if need be."""
        with self._lock:
            if self._opened is None:
                self._opened = open_store(self._home)
            return self._opened

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()
                self._opened = None


def local_of(home: Home) -> Local | None:
    """The store of local workflows, where it is another than that of all others."""
    return Local(home) if home.is_shared else None


def _open_file(home: Home, *, breaking: bool = False) -> Store:
    from tako_runtime.store.sqlite import SqliteStore

    return SqliteStore(home.file, breaking=breaking)


def _open_schema(home: Home, *, breaking: bool = False) -> Store:
    database = _database(home)
    from tako_runtime.store.postgres import PostgresStore

    return PostgresStore(database, home.schema, home.server, breaking=breaking)


def _relay(home: Home, bell: Bell) -> "Relay":
    from tako_runtime.store.database import Database
    from tako_runtime.store.relay import Relay

    def heard() -> Database:
        direct = _secret(home, DATABASE_DIRECT_URL)
        return Database(direct, f"the secret {DATABASE_DIRECT_URL}") if direct else _database(home)

    return Relay(heard, home.schema, home.server, bell)


def _database(home: Home) -> "Database":
    """Raises `ConfigError` where nobody says which one, or nothing here can speak to it."""
    try:
        from tako_runtime.store.database import Database
    except ImportError as error:
        raise ConfigError(
            f"storage.url asks for Postgres, and psycopg is not there ({error})", hint="pip install 'tako[postgres]'"
        ) from error
    if home.url != POSTGRES:
        return Database(home.url, "storage.url")
    url = _secret(home, DATABASE_URL)
    if url is None:
        raise ConfigError(
            f'storage.url is "{POSTGRES}", and the secret {DATABASE_URL} is not set',
            hint=f"Put it into {home.app_dir / 'secrets.json'}, mode 0600.",
        )
    return Database(url, f"the secret {DATABASE_URL}")


def _secret(home: Home, name: str) -> str | None:
    """One that this process was given, else one that is kept beside its data."""
    from tako_runtime.secrets import secrets, stored

    return secrets.get(name) or stored(home.app_dir).get(name)


def copy(home: Home, *, local: "Collection[str]" = (), dry_run: bool = False) -> "Copied":
    """Carry what is in this machine's own store, but for the workflows `local`, into the database of `home`, or, where
    `home` names none yet, of the secret (`moving.move`)."""
    shared = home if home.is_shared else home._replace(url=POSTGRES)
    database = _database(shared)
    from tako_runtime.store.moving import move

    return move(home.file, database, shared.schema, local=local, dry_run=dry_run)


def migrate(home: Home, *, breaking: bool = False) -> None:
    """Bring the store, and this machine's own beside it, to this tako's version; `breaking`: also to what older ones
    cannot work with."""
    if home.is_shared:
        _open_schema(home, breaking=breaking).close()
    if not home.is_shared or home.file.exists():
        _open_file(home, breaking=breaking).close()


def where(home: Home) -> str:
    """The store, for people."""
    if not home.is_shared:
        return str(home.file)
    return f"{home.schema} in {_database(home).where}"


def serves(home: Home) -> int | None:
    """The version that a tako has to know to work with a shared store, which is not written to; None where there is no
    store yet. Raises `StoreError` where its database lets nobody look."""
    database = _database(home)
    from tako_runtime.store.schema import serves

    return serves(database, home.schema)


def examine(home: Home) -> "Examined | None":
    """The health of the store, looked at without writing to it, also while others work; None where there is none yet.
    Raises `StoreError` where it cannot be opened."""
    if home.is_shared:
        from tako_runtime.store.schema import examine as examine_schema

        return examine_schema(_database(home), home.schema)
    from tako_runtime.store.file import examine

    return examine(home.file)


def set_aside(home: Home) -> "Aside | None":
    """Put the store aside, so that the next one begins empty; None where there is none. Raises `Refused` while another
    process has it open, and for one that others share."""
    if home.is_shared:
        raise Refused(
            f"{where(home)} is not put aside: others may be at work there",
            hint=f'Drop the schema "{home.schema}" yourself, if nobody needs it.',
        )
    from tako_runtime.store.file import set_aside

    return set_aside(home.file)


def backup(home: Home, to: Path) -> None:
    """Copy the store into a file that is not there yet, while others work. Raises `Refused` for one in a database."""
    _embedded(home, "pg_dump --format=custom --file={file} --schema={schema} --dbname={database}")
    from tako_runtime.store.copying import copy

    copy(home.file, to)


def restore(home: Home, data: "IO[bytes]") -> "tuple[Examined, Aside | None]":
    """Make a copy the store, and put the one that is there aside. Raises `Refused` while another process has it open,
    and for one in a database."""
    _embedded(home, "pg_restore --clean --if-exists --dbname={database} {file}")
    from tako_runtime import disk
    from tako_runtime.store.copying import put_back

    disk.make_private(home.app_dir)
    return put_back(home.file, data)


def _embedded(home: Home, command: str) -> None:
    """Raises `Refused` for one in a database, with the database's own command for it: that asks for the password."""
    if home.is_shared:
        told = {"file": f"{home.app}-{home.env}.dump", "schema": f'"{home.schema}"', "database": _database(home).plain}
        words = command.format(**{name: shlex.quote(value) for name, value in told.items()})
        own = f"\n{home.file} has the runs of local workflows here: say --local." if home.file.exists() else ""
        raise Refused(f"{where(home)} is no file of tako's own", hint=f"The database's own tools do it: {words}{own}")


class _Current:
    """The stores of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.home: Home | None = None
        self.store: StoreThread | None = None
        self.local: Local | None = None
        self.limits: Limits | None = None
        self.development = False


_current = _Current()


def current(*, local: bool = False) -> StoreThread:
    """The store of this process's app, opened at first use; with `local`, that of the runs of local workflows. A shared
    one need not be reached for that."""
    if local and (own := _local()) is not None:
        return own.made()
    store = _current.store
    if store is None:
        with _current.lock:
            store = _current.store
            if store is None:
                store = _current.store = open_store(_located())
    return store


def beside() -> StoreThread | None:
    """This machine's own store beside a shared one, if it is there (`Local`)."""
    own = _local()
    return None if own is None else own.there()


def _local() -> Local | None:
    if _current.store is None and _current.home is None:
        with _current.lock:
            _located()
    return _current.local


def _located() -> Home:
    """Where the stores of this process are. Found once; to be called with the lock."""
    home = _current.home
    if home is None:
        home = _current.home = locate()
        _current.local, _current.development = local_of(home), in_development()
    return home


def limits() -> Limits:
    """The limits of this process's app, found at first use."""
    found = _current.limits
    if found is None:
        found = _current.limits = find_limits()
    return found


def developing() -> bool:
    """Whether `current()` is a developer's. Asked at each enqueue, so it is known, not looked up."""
    return _current.development


def use(store: StoreThread | None, local: Local | None = None) -> None:
    """Make these the stores of this process: a worker's handlers enqueue through the worker's own thread."""
    _current.store, _current.local, _current.home = store, local, None
    _current.limits, _current.development = None, False


def _forget() -> None:
    """A forked child opens its own; and the lock may have been held by a thread that is not there."""
    global _current
    _current = _Current()


os.register_at_fork(after_in_child=_forget)
