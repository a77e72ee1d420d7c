"""Where an app's store is, and the one that this process has open.

An app, a script or a worker finds its store from `TAKO_APP_NAME` and `TAKO_DATA_DIR` (the supervisor sets both), else
from the nearest `tako.toml` upwards, whose project keeps a development store under `.tako/`. It is opened at first use,
once per process; a forked child opens its own. What `tako.toml` says of every value that is stored (`Limits`), and of
the kind of store (`[storage]`), is found in the same places.

Which kind it is, only this module and those beside it know: a file of this machine's, or a database that several share.
"""

import hashlib
import os
import re
import shlex
import socket
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from tako_runtime import clock, codec
from tako_runtime.bell import Bell
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.errors import ConfigError, InvalidValue, Refused, TakoUnavailable
from tako_runtime.store.base import Store
from tako_runtime.store.commit import StoreThread

if TYPE_CHECKING:
    from collections.abc import Collection

    from tako_runtime.store.database import Database
    from tako_runtime.store.file import Aside, Examined
    from tako_runtime.store.moving import Copied
    from tako_runtime.store.relay import Relay

#: The environment of `tako dev`: TAKO_ENV, and the variables of [vars.development].
DEVELOPMENT = "development"

#: What a process belongs to that nobody has told otherwise.
PRODUCTION = "production"

APP_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


#: What `[storage] url` may say beside a postgresql:// url.
EMBEDDED, POSTGRES = "sqlite", "postgres"

#: The secret that holds the whole url of a database.
DATABASE_URL = "DATABASE_URL"

#: Where DATABASE_URL leads to a pooler that shares sessions: the secret that leads to the database itself.
DATABASE_DIRECT_URL = "DATABASE_DIRECT_URL"

#: A schema's name may have so many bytes.
_LONGEST_SCHEMA = 63


class Home(NamedTuple):
    """Which app, and where its data are: on this machine in `data_dir`, with the store in it (`url` is "sqlite"), or
    with the store in a database that several machines share, in a schema of this environment's. `url` has no password.
    """

    app: str
    data_dir: Path
    url: str = EMBEDDED
    env: str = DEVELOPMENT

    @property
    def app_dir(self) -> Path:
        """`{data_dir}/apps/<app>`: the store, the bell, what workers leave."""
        return self.data_dir / "apps" / self.app

    @property
    def server(self) -> str:
        """What tells this machine's part of the app from the others': two may have one host name."""
        return f"{socket.gethostname()}:{self.app_dir}"

    @property
    def schema(self) -> str:
        """`tako_<app>_<env>`; a long one ends in its hash."""
        name = f"tako_{self.app}_{self.env}"
        if len(name.encode()) <= _LONGEST_SCHEMA and name.isprintable() and '"' not in name:
            return name
        return f"tako_{self.app[:40]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def environment(self) -> dict[str, str]:
        """The variables from which a child finds the same home."""
        where = {"TAKO_APP_NAME": self.app, "TAKO_DATA_DIR": str(self.data_dir)}
        return {**where, "TAKO_STORAGE": self.url, "TAKO_STORAGE_ENV": self.env}

    @property
    def file(self) -> Path:
        """This machine's own store: the only one there is, or the one beside a shared one, with the runs of local
        workflows."""
        return self.app_dir / "runs.db"

    @property
    def is_shared(self) -> bool:
        """Whether several machines may have the store."""
        return self.url != EMBEDDED

    def embedded(self) -> "Home":
        """This machine's own part: what a workflow with `local=True` keeps its runs in."""
        return self._replace(url=EMBEDDED)


class Limits(NamedTuple):
    """What `[workflows]` says of whatever is stored: the largest value in bytes, how long a signal is kept."""

    max_value: int = codec.MAX_VALUE
    signal_retention: int = 7 * clock.DAY

    def environment(self) -> dict[str, str]:
        """The variables from which a child finds the same limits."""
        return {"TAKO_MAX_VALUE": str(self.max_value), "TAKO_SIGNAL_RETENTION": f"{self.signal_retention}us"}


def locate() -> Home:
    """The home of this process's app. Raises `TakoUnavailable` where nothing names one."""
    app, data_dir = os.environ.get("TAKO_APP_NAME"), os.environ.get("TAKO_DATA_DIR")
    if app and data_dir:
        if not APP_NAME.fullmatch(app):
            raise ConfigError(f"TAKO_APP_NAME={app!r} is not an app's name", hint="Lower-case letters, digits and '-'.")
        return Home(app, Path(data_dir).absolute(), *_storage(app))
    if app or data_dir:
        there, missing = ("TAKO_APP_NAME", "TAKO_DATA_DIR") if app else ("TAKO_DATA_DIR", "TAKO_APP_NAME")
        raise TakoUnavailable(f"{there} is set and {missing} is not", hint="Set both, or neither.")
    from tako_runtime import config  # costs nothing where the environment says it all

    path = config.find()
    if path is None:
        raise TakoUnavailable(
            f"no tako.toml in {Path.cwd()} or above it, and TAKO_APP_NAME and TAKO_DATA_DIR are not set"
        )
    found = config.load(path)
    return project_home(found.name, path.parent, found.storage.url)


def _storage(app: str) -> tuple[str, str]:
    """What kind of store the environment names, else the app's own tako.toml; and whose schema it is."""
    url, env = os.environ.get("TAKO_STORAGE"), os.environ.get("TAKO_STORAGE_ENV") or os.environ.get("TAKO_ENV")
    if url is None:
        from tako_runtime import config

        path = config.find()
        found = config.load(path) if path else None
        url = found.storage.url if found is not None and found.name == app else EMBEDDED
    return url, env or PRODUCTION


def _find_limits() -> Limits:
    """Those that the supervisor has put into the environment, else those of the app's own tako.toml, else the built-in
    ones: a script on a server may know no more than where the store is."""
    size, kept = os.environ.get("TAKO_MAX_VALUE"), os.environ.get("TAKO_SIGNAL_RETENTION")
    if size is not None and kept is not None:
        try:
            return Limits(int(size), clock.duration(kept, "TAKO_SIGNAL_RETENTION", least=1))
        except (ValueError, InvalidValue):
            raise ConfigError(
                f"TAKO_MAX_VALUE={size!r} or TAKO_SIGNAL_RETENTION={kept!r} cannot be read",
                hint="tako sets both; unset them to go by tako.toml.",
            ) from None
    from tako_runtime import config

    path = config.find()
    found = config.load(path) if path else None
    if found is None or found.name != locate().app:
        return Limits()
    return Limits(found.workflows.max_value, found.workflows.signal_retention)


def in_development() -> bool:
    """Whether this is a process of a developer's: TAKO_ENV says so (`tako dev` sets it), or it finds its store through
    the project that it is in."""
    env = os.environ.get("TAKO_ENV")
    return env == DEVELOPMENT if env else not os.environ.get("TAKO_APP_NAME")


def pace() -> Pace:
    """How fast durable time passes for what this process starts: as the `tako dev` has said that started it, else the
    one that works for its app now. In production, as the machine's clock does."""
    if not in_development():
        return REAL_TIME
    told = os.environ.get("TAKO_TIME_SCALE")
    if told is not None:
        try:
            return Pace(float(told))
        except ValueError:
            raise ConfigError(
                f"TAKO_TIME_SCALE={told!r} cannot be read", hint="tako dev sets it; unset it, and use --time-scale."
            ) from None
    from tako_runtime.feed import supervising

    try:
        who = supervising(locate().app_dir)
    except TakoUnavailable:  # whoever opens the store says so
        return REAL_TIME
    return who.pace if who is not None else REAL_TIME


def project_home(app: str, root: Path, url: str = EMBEDDED) -> Home:
    """The development home of the project in the folder `root`, with that `[storage] url`."""
    return Home(app, root / ".tako", url)


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
        found = _current.limits = _find_limits()
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
