"""Where an app's store is, and what is said of it.

An app, a script or a worker finds its store from `TAKO_APP_NAME` and `TAKO_DATA_DIR` (the supervisor sets both), else
from the nearest `tako.toml` upwards, whose project keeps a development store under `.tako/`. The kind of store
(`[storage]`), what holds for every value in it (`Limits`), and how fast durable time passes, are found in the same
places.
"""

import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tako_runtime import clock, codec
from tako_runtime.clock import REAL_TIME, Pace
from tako_runtime.errors import ConfigError, InvalidValue, TakoUnavailable

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
        """What tells this machine's part of the app from the others': two may have one host name, and folders of one
        name."""
        return f"{socket.gethostname()}:{self.app_dir}:{_boot()}"

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


@cache
def _boot() -> str:
    """What Linux calls this start of this machine: no other one has the same, a clone of it neither."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


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


def find_limits() -> Limits:
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
