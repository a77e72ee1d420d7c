"""tako.toml -> frozen values.

The dataclasses below are the reference of the file: every key is an attribute, and its `Setting` says how it is read,
what it is when nobody sets it, and what it is for. The parser, the hints for an unknown key, `Config.explain()` and the
test of `example.toml` all read that one source.

A setting of a group is looked up in this order, field by field, and the first table that states it wins:
`[servers.S.workflows.G]`, `[servers.S.workflows]`, `[workflows.G]`, `[workflows]`, built-in.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, get_type_hints
from urllib.parse import parse_qsl

from tako_runtime import clock
from tako_runtime.errors import ConfigError, InvalidValue

FILE_NAME = "tako.toml"

KeyPath = tuple[str, ...]
Reader = Callable[[object], object]  # the value as the file has it -> as the code wants it, or InvalidValue("must be …")


# ------------------------------------------------------------------------------------------------ how a value is read


def _shown(value: object) -> str:
    """A value as a message names it: short, on one line."""
    match value:
        case str():
            return json.dumps(value if len(value) <= 70 else value[:67] + "...", ensure_ascii=False)
        case bool():
            return str(value).lower()
        case dict():
            return "a table"
        case list():
            return "a list" if value else "an empty list"
        case int() if abs(value) >= 2**63:  # spelling out a very long one is an error of its own
            return "a number past 64 bits"
        case _:
            return str(value)


def _must_be(what: str, value: object, hint: str = "") -> InvalidValue:
    return InvalidValue(f"must be {what}, not {_shown(value)}", hint=hint)


def _text(pattern: str, what: str, hint: str = "") -> Reader:
    def read(value: object) -> str:
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        raise _must_be(what, value, hint)

    return read


def _list_of(item: Reader, what: str, *, least: int = 0, distinct: bool = True) -> Reader:
    def read(value: object) -> tuple[object, ...]:
        if not isinstance(value, list) or len(value) < least:
            raise _must_be(what, value)
        items: list[object] = []
        for number, one in enumerate(value, 1):
            try:
                items.append(item(one))
            except InvalidValue as error:
                raise InvalidValue(f"must be {what}, but item {number} {error}", hint=error.hint) from None
            if distinct and items[-1] in items[:-1]:
                raise InvalidValue(f"must be {what}, but {_shown(one)} is in it twice")
        return tuple(items)

    return read


def _whole(least: int, most: int) -> Reader:
    def read(value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        raise _must_be(f"a whole number from {least} to {most}", value)

    return read


def _duration(least: int, most: int) -> Reader:
    what = f"a duration from {clock.spell(least)} to {clock.spell(most)}"

    def read(value: object) -> int:
        hint = "Write seconds, or a number and a unit: 500ms, 90s, 15m, 1h30m, 3d."
        if not isinstance(value, str | int | float):
            raise _must_be(what, value, hint)
        try:
            micros = clock.duration(value, least=None)
        except (InvalidValue, OverflowError):
            raise _must_be(what, value, hint) from None
        if not least <= micros <= most:
            raise _must_be(what, value, hint)
        return micros

    return read


_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}


def _size(least: int, most: int) -> Reader:
    def read(value: object) -> int:
        count = value if isinstance(value, int) and not isinstance(value, bool) else -1
        if isinstance(value, str) and (part := re.fullmatch(r"([0-9]{1,12})\s*([A-Za-z]*)", value.strip())):
            count = int(part[1]) * _SIZES.get(part[2].lower(), -1)
        if not least <= count <= most:
            hint = "Write bytes, or a whole number and a unit: 512KiB, 1MiB, 2MB."
            raise _must_be(f"a size from {least} bytes to {most >> 20}MiB", value, hint)
        return count

    return read


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _must_be("true or false", value)


def _folder_inside(value: object) -> str:
    if isinstance(value, str) and "\0" not in value:
        folder = PurePosixPath(value)
        if folder.parts and not folder.is_absolute() and ".." not in folder.parts:
            return str(folder)
    raise _must_be("a folder inside the project, relative to tako.toml and without '..'", value)


def _storage_url(value: object) -> str:
    # What is wrong here may well be a password in the wrong place: no message repeats the value.
    if not isinstance(value, str):
        raise _must_be('"sqlite", "postgres" or a postgresql:// url', value)
    if re.match(r"\w+://[^@]*:[^@]*@", value) or any("password" in key for key, _ in parse_qsl(value.partition("?")[2])):
        hint = "Put the whole url into the secret DATABASE_URL and write url = \"postgres\"; this file gets committed."
        raise InvalidValue("must not hold a password", hint=hint)
    if value in ("sqlite", "postgres") or re.fullmatch(r"postgresql://[^\s\0]+", value):
        return value
    raise InvalidValue('must be "sqlite", "postgres" or a postgresql:// url without a password')


def _listen(value: object) -> str:
    if isinstance(value, str):
        if value.startswith("/") and "\0" not in value and len(value.encode()) <= 100:  # the system's limit for sockets
            return value
        host, _, port = value.rpartition(":")
        if re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535 and _is_loopback(host):
            return value
    hint = "Metrics have no password of their own: let a local agent or a proxy read them."
    raise _must_be("a loopback address such as 127.0.0.1:9000, or a socket's absolute path", value, hint)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(re.sub(r"^\[(.*:.*)\]$", r"\1", host)).is_loopback
    except ValueError:
        return False


_NAME = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_read_name = _text(_NAME, "a name of a-z, 0-9 and '-', from a letter to a letter or digit, 63 characters at most")
_read_variable = _text(r"[A-Za-z_][A-Za-z0-9_]*", "a name that an environment variable can have")
_read_secret = _text(r"[A-Z][A-Z0-9_]*", "a name in UPPER_SNAKE")
_read_value = _text(r"[^\0]*", "text", "Put it in quotes: variables are text.")


# --------------------------------------------------------------------------------------------------- what the file says

REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the file. `default` is written as the file would have it; None: unset, REQUIRED: the file must say it."""

    read: Reader
    default: object
    doc: str

    def builtin(self) -> object:
        """The default as the code wants it."""
        return None if self.default is None else self.read(self.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """`[app]`: your own process, next to the workers."""

    command: Annotated[
        tuple[str, ...],
        Setting(
            _list_of(_text(r"[^\0]+", "a word"), "a list of words, the program first", least=1, distinct=False),
            REQUIRED,
            "the program and its arguments; {fd} or {port} is where it listens",
        ),
    ]
    port: Annotated[int, Setting(_whole(1, 65535), 8000, "where it is reached")]
    health: Annotated[
        str | None,
        Setting(_text(r"/[^\s\0]*", "a path from '/'"), None, "the path that answers 200 once it is ready; unset: none"),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """What every group has. Durations are microseconds."""

    workers: Annotated[int, Setting(_whole(0, 1000), 0, "processes that are always there; 0: one when work is due")]
    concurrency: Annotated[int, Setting(_whole(1, 10_000), 10, "runs that one worker has in hand at a time")]
    idle_timeout: Annotated[
        int, Setting(_duration(0, 365 * clock.DAY), "5m", "how long a worker with nothing to do stays, if workers = 0")
    ]
    grace: Annotated[int, Setting(_duration(0, clock.HOUR), "30s", "how long attempts may go on when a worker stops")]
    retention: Annotated[int, Setting(_duration(clock.SECOND, 3650 * clock.DAY), "30d", "how long ended runs are kept")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Lane):
    """`[workflows.NAME]`: the effective values of one group of workers."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflows(Lane):
    """`[workflows]`: what every group starts from, and what is one for all of them. `max_value` is bytes."""

    dir: Annotated[str, Setting(_folder_inside, "workflows", "the folder with the workflows, inside the project")]
    signal_retention: Annotated[
        int, Setting(_duration(clock.SECOND, 3650 * clock.DAY), "7d", "how long a signal waits for somebody to take it")
    ]
    max_value: Annotated[int, Setting(_size(1024, 2**28), "1MiB", "the largest payload, result or signal")]
    lease: Annotated[
        int, Setting(_duration(clock.SECOND, clock.HOUR), "15s", "how long a silent worker keeps its runs")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`[storage]`: where runs are kept."""

    url: Annotated[
        str, Setting(_storage_url, "sqlite", "sqlite, postgres (with the secret DATABASE_URL), or postgresql://user@host/db")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """`[envs.NAME]`: where one environment runs."""

    name: str
    servers: Annotated[
        tuple[str, ...], Setting(_list_of(_read_name, "a list of server names", least=1), REQUIRED, "names from [servers]")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`[servers.NAME]`: one machine."""

    name: str
    # A leading dash would reach ssh as an option.
    host: Annotated[
        str, Setting(_text(r"[^\s\0-][^\s\0]*", "a host as ssh understands it"), REQUIRED, "what you would give to ssh")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """`[secrets]`: which secrets there must be; their values are never in this file."""

    required: Annotated[
        tuple[str, ...], Setting(_list_of(_read_secret, "a list of names"), [], "secrets that a deploy insists on")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """`[deploy]`: how a release reaches a server."""

    vendor: Annotated[bool, Setting(_flag, False, "ship the wheels too, for servers that cannot reach an index")]
    data_dir: Annotated[
        str | None,
        Setting(_text(r"~?/[^\0\n]*", "a path from '/' or '~/'"), None, "where a server keeps data; unset: its usual place"),
    ]
    keep_releases: Annotated[int, Setting(_whole(1, 100), 5, "how many releases stay on a server")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`[metrics]`: numbers for a monitoring agent."""

    listen: Annotated[str | None, Setting(_listen, None, "a loopback address or a socket's absolute path; unset: off")]


@dataclass(frozen=True, slots=True)
class Stated:
    """One key of a file: as written (a dict for a table), as read, and its line."""

    written: object
    value: object
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole tako.toml. `path` and `root`, its folder, are absolute; `workflows` is what [workflows] and the built-in
    values say: ask `group()` for what holds for a group."""

    path: Path
    root: Path
    name: Annotated[str, Setting(_read_name, REQUIRED, "the app's name, on every server")]
    app: App | None
    workflows: Workflows
    storage: Storage
    vars: Mapping[str, str]
    envs: Mapping[str, Env]
    servers: Mapping[str, Server]
    secrets: Secrets
    deploy: Deploy
    metrics: Metrics
    stated: Mapping[KeyPath, Stated] = field(repr=False)

    def group(self, name: str, server: str | None = None) -> Group:
        """The effective values of a group, on a server if one is named. A group that the file does not have inherits
        all of them. `ConfigError` for a server that the file does not have."""
        layers = self._layers(name, server)
        return Group(name=name, **{key: self._effective(key, one, layers)[0] for key, one in settings(Lane).items()})

    def group_names(self, server: str | None = None) -> tuple[str, ...]:
        """The groups that the file names, for all servers and for this one; "default" is always there, and first."""
        tables = self._layers("default", server)[1::2]  # [servers.S.workflows] and [workflows]
        return tuple(dict.fromkeys(["default", *(name for table in reversed(tables) for name in self._tables_in(table))]))

    def variables(self, env: str) -> dict[str, str]:
        """The variables of an environment: [vars], over them [vars.ENV]."""
        return {**self.vars, **_variables(self.stated, ("vars", env))}

    def explain(self, env: str | None = None, server: str | None = None) -> list[tuple[str, object, str]]:
        """Each effective value: its dotted key, the value as the file would have it, and where it comes from
        ("built-in", or "tako.toml:12 [workflows.email]"). With `env` its variables, with `server` that server's groups."""
        rows: list[tuple[str, object, str]] = []

        def add(path: KeyPath, known: Mapping[str, Setting], layers: list[KeyPath] | None = None) -> None:
            for key, setting in known.items():
                _, written, where = self._effective(key, setting, layers or [path])
                rows.append((_dotted((*path, key)), written, where))

        shared = {key: one for key, one in settings(Workflows).items() if key not in settings(Lane)}
        add((), settings(Config))
        if self.app is not None:
            add(("app",), settings(App))
        add(("workflows",), shared)
        for group in self.group_names(server):
            add(("workflows", group), settings(Lane), self._layers(group, server))
        add(("storage",), settings(Storage))
        scopes = [("vars",)] if env is None else [("vars", env), ("vars",)]
        for name in self.vars if env is None else self.variables(env):
            add(("vars",), {name: Setting(_read_value, None, "")}, scopes)
        for name in self.envs if env is None else self.envs.keys() & {env}:
            add(("envs", name), settings(Env))
        for name in self.servers if server is None else [server]:
            add(("servers", name), settings(Server))
        for section, kind in (("secrets", Secrets), ("deploy", Deploy), ("metrics", Metrics)):
            add((section,), settings(kind))
        return rows

    def _layers(self, group: str, server: str | None) -> list[KeyPath]:
        """The tables that may state a setting of a group, the strongest first."""
        shared: list[KeyPath] = [("workflows", group), ("workflows",)]
        if server is None:
            return shared
        if server not in self.servers:
            raise ConfigError(f"{self.path}: there is no server {server!r}", hint=_nearest(server, self.servers, "servers"))
        return [("servers", server, *layer) for layer in shared] + shared

    def _effective(self, key: str, setting: Setting, layers: list[KeyPath]) -> tuple[Any, object, str]:
        """A setting's value, as written, and where it comes from."""
        for table in layers:
            if (stated := self.stated.get((*table, key))) is not None:
                where = f"{self.path.name}:{stated.line}" + (f" [{_dotted(table)}]" if table else "")
                return stated.value, stated.written, where
        return setting.builtin(), setting.default, "built-in"

    def _tables_in(self, path: KeyPath) -> Iterator[str]:
        return _tables_in(self.stated, path)


@cache
def settings(kind: type) -> Mapping[str, Setting]:
    """The keys of a table of the file, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {key: one for key, hint in hints.items() for one in getattr(hint, "__metadata__", ()) if type(one) is Setting}


@dataclass(frozen=True, slots=True)
class Table:
    """What may stand in a table: settings, tables, and under names of the user's own tables (`each`) or `variables`."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    tables: Mapping[str, "Table"] = field(default_factory=dict)
    each: "Table | None" = None
    variables: bool = False


_GROUP = Table(settings(Lane))
FILE = Table(
    settings(Config),
    {
        "app": Table(settings(App)),
        "workflows": Table(settings(Workflows), each=_GROUP),
        "storage": Table(settings(Storage)),
        "vars": Table(each=Table(variables=True), variables=True),
        "envs": Table(each=Table(settings(Env))),
        "servers": Table(each=Table(settings(Server), {"workflows": Table(settings(Lane), each=_GROUP)})),
        "secrets": Table(settings(Secrets)),
        "deploy": Table(settings(Deploy)),
        "metrics": Table(settings(Metrics)),
    },
)


def known(table: Table = FILE, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Setting]]:
    """Every setting that a file can have, with NAME where a name of the user's own stands."""
    yield from (((*path, key), setting) for key, setting in table.settings.items())
    for key, one in (*table.tables.items(), *([("NAME", table.each)] if table.each else [])):
        yield from known(one, (*path, key))


# ------------------------------------------------------------------------------------------------------------ reading


def find(start: Path | None = None) -> Path | None:
    """The nearest tako.toml in `start` (the current folder unless said) or a folder above it; None where there is none."""
    here = (start or Path.cwd()).absolute()
    return next((file for folder in (here, *here.parents) if (file := folder / FILE_NAME).is_file()), None)


def load(path: Path) -> Config:
    """The file's values. Raises `ConfigError`, whose message has a line for each mistake of the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="`tako init` makes a new project.") from error
    try:
        return parse(data.decode(), path)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text: {error.reason}") from error


def parse(text: str, path: Path) -> Config:
    """The values of a file with this text. Raises `ConfigError` as `load` does."""
    try:
        written = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r" \(at (?:line (\d+)|end)", str(error))
        line = 1 if at is None else int(at[1] or text.count("\n") + 1)
        raise ConfigError(f"{path}:{line}: is not valid TOML: {error}") from error
    reading = _Reading(_lines(text))
    reading.table((), written, FILE)
    reading.names_in_envs()
    if reading.mistakes:
        mistakes = sorted(reading.mistakes, key=lambda mistake: mistake[0])
        hints = dict.fromkeys(hint for _, _, hint in mistakes if hint)
        raise ConfigError("\n".join(f"{path}:{line}: {what}" for line, what, _ in mistakes), hint="\n".join(hints))
    stated, path = reading.stated, path.absolute()

    def table(kind: type, at: KeyPath, **given: object) -> Any:
        values = {key: one.value if (one := stated.get((*at, key))) else s.builtin() for key, s in settings(kind).items()}
        return kind(**values, **given)

    return table(  # type: ignore[no-any-return]
        Config,
        (),
        path=path,
        root=path.parent,
        stated=stated,
        vars=_variables(stated, ("vars",)),
        app=table(App, ("app",)) if ("app",) in stated else None,
        envs={name: table(Env, ("envs", name), name=name) for name in _tables_in(stated, ("envs",))},
        servers={name: table(Server, ("servers", name), name=name) for name in _tables_in(stated, ("servers",))},
        workflows=table(Workflows, ("workflows",)),
        storage=table(Storage, ("storage",)),
        secrets=table(Secrets, ("secrets",)),
        deploy=table(Deploy, ("deploy",)),
        metrics=table(Metrics, ("metrics",)),
    )


class _Reading:
    """One pass over a file: what it states, and every mistake on the way."""

    def __init__(self, lines: Mapping[KeyPath, int]) -> None:
        self.lines = lines
        self.stated: dict[KeyPath, Stated] = {}
        self.mistakes: list[tuple[int, str, str]] = []  # line, message, hint

    def table(self, path: KeyPath, written: object, table: Table) -> None:
        if not isinstance(written, dict):
            return self.wrong(path, f"must be a table, not {_shown(written)}", f"Write [{_dotted(path)}].")
        self.stated[path] = Stated(written, None, self.line(path))
        for key, value in written.items():
            at = (*path, key)
            if key in table.settings:
                self.setting(at, value, table.settings[key])
                if table.each and isinstance(value, dict):
                    self.hint("A group cannot have the name of a setting.")
            elif key in table.tables:
                self.table(at, value, table.tables[key])
            elif table.variables and not isinstance(value, dict):
                self.name(at, _read_variable)
                self.setting(at, value, _VARIABLE)
            elif table.each and not (table.settings and not isinstance(value, dict)):
                self.name(at, _read_name)
                self.table(at, value, table.each)
            else:
                self.wrong(at, "unknown key", _elsewhere(at) or _nearest(key, ...))
