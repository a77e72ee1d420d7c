"""Where an app's store is, and the one that this process has open.

An app, a script or a worker finds its store from `TAKO_APP_NAME` and `TAKO_DATA_DIR` (the supervisor sets both), else
from the nearest `tako.toml` upwards, whose project keeps a development store under `.tako/`. It is opened at first use,
once per process; a forked child opens its own. What `tako.toml` says of every value that is stored (`Limits`) is found
in the same places.
"""

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tako_runtime import clock, codec
from tako_runtime.bell import Bell
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.errors import ConfigError, InvalidValue, TakoUnavailable
from tako_runtime.store.base import Store
from tako_runtime.store.commit import StoreThread

if TYPE_CHECKING:
    from tako_runtime.config import Config
    from tako_runtime.store.file import Aside, Examined

#: The environment of `tako dev`: TAKO_ENV, and the variables of [vars.development].
DEVELOPMENT = "development"

APP_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


class Home(NamedTuple):
    """Which app, and where its data are."""

    app: str
    data_dir: Path

    @property
    def app_dir(self) -> Path:
        """`{data_dir}/apps/<app>`: the store, the bell, what workers leave."""
        return self.data_dir / "apps" / self.app

    def environment(self) -> dict[str, str]:
        """The variables from which a child finds the same home."""
        return {"TAKO_APP_NAME": self.app, "TAKO_DATA_DIR": str(self.data_dir)}


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
        return Home(app, Path(data_dir).absolute())
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
    check_storage(found)
    return project_home(found.name, path.parent)


def check_storage(config: "Config") -> None:
    """Raise `ConfigError` where tako.toml asks for a store that this tako does not have: its runs must not end up in
    another one, unseen."""
    if config.storage.url != "sqlite":
        raise ConfigError(
            f"{config.root / 'tako.toml'}: storage.url: this version of tako keeps runs in SQLite only",
            hint='Write url = "sqlite", or leave it out.',
        )


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


def project_home(app: str, root: Path) -> Home:
    """The development home of the project in the folder `root`."""
    return Home(app, root / ".tako")


def open_store(home: Home) -> StoreThread:
    """A store of one's own. Most callers want `current()`."""
    bell = Bell(home.app_dir)

    def connect() -> Store:
        from tako_runtime.store.sqlite import SqliteStore

        return SqliteStore(home.app_dir / "runs.db")

    return StoreThread(connect, bell)


def examine(home: Home) -> "Examined | None":
    """The health of the store, looked at without writing to it, also while others work; None where there is none yet.
    Raises `StoreError` where it cannot be opened."""
    from tako_runtime.store.file import examine

    return examine(home.app_dir / "runs.db")


def versions(home: Home) -> tuple[int, int]:
    """The version of the store, and the one that this tako writes: opening it would make it that. Raises `StoreError`
    where it cannot be read."""
    from tako_runtime.store.file import versions

    return versions(home.app_dir / "runs.db")


def set_aside(home: Home) -> "Aside | None":
    """Put the store aside, so that the next one begins empty; None where there is none. Raises `Refused` while another
    process has it open."""
    from tako_runtime.store.file import set_aside

    return set_aside(home.app_dir / "runs.db")


class _Current:
    """The store of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.store: StoreThread | None = None
        self.limits: Limits | None = None
        self.development = False


_current = _Current()


def current() -> StoreThread:
    """The store of this process's app, opened at first use."""
    store = _current.store
    if store is None:
        with _current.lock:
            store = _current.store
            if store is None:
                store = _current.store = open_store(locate())
                _current.development = in_development()
    return store


def limits() -> Limits:
    """The limits of this process's app, found at first use."""
    found = _current.limits
    if found is None:
        found = _current.limits = _find_limits()
    return found


def developing() -> bool:
    """Whether `current()` is a developer's. Asked at each enqueue, so it is known, not looked up."""
    return _current.development


def use(store: StoreThread | None) -> None:
    """Make `store` the one of this process: a worker's handlers enqueue through the worker's own thread."""
    _current.store, _current.limits, _current.development = store, None, False


def _forget() -> None:
    """A forked child opens its own; and the lock may have been held by a thread that is not there."""
    global _current
    _current = _Current()


os.register_at_fork(after_in_child=_forget)
