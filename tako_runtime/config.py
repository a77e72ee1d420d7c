"""tako.toml -> frozen values.

The dataclasses below are the reference of the file: an attribute with a `Setting` is a key, and the `Setting` says how
it is read, what it is when nobody sets it, and what it is for. The parser, the hints for an unknown key, `explain()`
and the test of `example.toml` all read that one source.

A setting of a group comes from the first of these tables that states it: `[servers.S.workflows.G]`,
`[servers.S.workflows]`, `[workflows.G]`, `[workflows]`; else it is the built-in one.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from tako_runtime import values
from tako_runtime.errors import ConfigError, InvalidValue

KeyPath = tuple[str, ...]
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `default` is as the file would have it; None leaves it unset, REQUIRED makes the file say it."""

    read: values.Reader
    default: object
    doc: str

    def builtin(self) -> Any:
        """The default as the code wants it."""
        return None if self.default is None else self.read(self.default)


VARIABLE = Setting(
    values.text("(?s:.*)", "text", "Put it in quotes: variables are text."), None, "an environment variable"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """`[app]`: your own process, next to the workers."""

    command: Annotated[tuple[str, ...], Setting(values.command, REQUIRED, "the program; {fd} or {port} to listen on")]
    port: Annotated[int, Setting(values.whole(1, 65535), 8000, "where it listens")]
    health: Annotated[str | None, Setting(values.health, None, "answers 200 when ready; unset: none")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """What a group may set. Durations are microseconds."""

    workers: Annotated[int, Setting(values.whole(0, 1000), 0, "processes; 0 starts one when work is due")]
    concurrency: Annotated[int, Setting(values.whole(1, 10_000), 10, "runs that one worker has in hand")]
    idle_timeout: Annotated[
        int, Setting(values.duration("0s", "365d"), "5m", "workers = 0: how long an idle one stays")
    ]
    grace: Annotated[int, Setting(values.duration("0s", "1h"), "30s", "what a stopping worker gives its attempts")]
    retention: Annotated[int, Setting(values.duration("1s", "3650d"), "30d", "how long an ended run is kept")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Lane):
    """The effective values of one group of workers."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflows(Lane):
    """`[workflows]`: what groups start from, and what all of them share. `max_value` is in bytes."""

    dir: Annotated[str, Setting(values.inside, "workflows", "the folder of workflows, inside the project")]
    signal_retention: Annotated[
        int, Setting(values.duration("1s", "3650d"), "7d", "how long a signal waits to be taken")
    ]
    max_value: Annotated[int, Setting(values.value_size, "1MiB", "the largest payload, result or signal")]
    lease: Annotated[int, Setting(values.duration("1s", "1h"), "15s", "how long a silent worker keeps its runs")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`[storage]`: where runs are kept."""

    url: Annotated[
        str,
        Setting(
            values.storage_url, "sqlite", "sqlite; postgres (secret DATABASE_URL); postgresql://... without a password"
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """`[envs.NAME]`: where one environment runs."""

    name: str
    servers: Annotated[tuple[str, ...], Setting(values.servers, REQUIRED, "names of [servers]")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`[servers.NAME]`: one machine."""

    name: str
    host: Annotated[str, Setting(values.host, REQUIRED, "anything that ssh understands")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """`[secrets]`: which ones there must be; never their values."""

    required: Annotated[tuple[str, ...], Setting(values.secrets, [], "without these, no deploy")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """`[deploy]`: how a release gets to a server."""

    vendor: Annotated[bool, Setting(values.flag, False, "ship wheels too, for a server without an index")]
    data_dir: Annotated[
        str | None, Setting(values.data_dir, None, "where a server keeps its data; unset: its usual place")
    ]
    keep_releases: Annotated[int, Setting(values.whole(1, 100), 5, "releases that stay on a server")]
    max_size: Annotated[int, Setting(values.release_size, "200MiB", "the project's files, at most")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`[metrics]`: numbers for a monitoring agent."""

    listen: Annotated[str | None, Setting(values.loopback, None, "a loopback address or a socket's path; unset: off")]


@dataclass(frozen=True, slots=True)
class Stated:
    """A key of the file: as written (a dict for a table), as read, its line."""

    written: object
    value: Any
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole tako.toml. `path` and `root`, its folder, are absolute. `workflows` is what groups start from: ask
    `group()` for what holds for one."""

    path: Path
    root: Path
    name: Annotated[str, Setting(values.name, REQUIRED, "the app's name")]
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
        """The effective values of a group, on a server if one is named; one that is not in the file inherits them all.
        `ConfigError` for a server that is not in the file."""
        layers = self._layers(name, server)
        return Group(name=name, **{key: self._effective(key, one, layers)[0] for key, one in settings(Lane).items()})

    def group_names(self, server: str | None = None) -> tuple[str, ...]:
        """The groups in the file, for all servers and for this one; always "default", and that first."""
        tables = {layer[:-1] for layer in self._layers("default", server) if layer[-1] == "default"}
        named = [path[-1] for path, one in self.stated.items() if path[:-1] in tables and isinstance(one.written, dict)]
        return tuple(dict.fromkeys(["default", *named]))

    def variables(self, env: str) -> dict[str, str]:
        """The variables of an environment: those of [vars], and over them those of [vars.ENV]."""
        return {**self.vars, **_variables(self.stated, ("vars", env))}

    def environments(self) -> tuple[str, ...]:
        """The environments that the file has, be it only with variables; and "development", which needs nothing."""
        return tuple(dict.fromkeys([*self.envs, *_tables_in(self.stated, ("vars",)), "development"]))

    def check_environment(self, env: str, *others: str) -> None:
        """Raise `ConfigError`, with the nearest, for an environment that is neither in the file nor one of `others`."""
        known = tuple(dict.fromkeys([*self.environments(), *others]))
        if env not in known:
            near = difflib.get_close_matches(env, known, 1, 0.5)
            hint = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(known)}."
            raise ConfigError(f"{self.path}: there is no environment {values.shown(env)}", hint=hint)

    def explain(self, env: str | None = None, server: str | None = None) -> list[tuple[str, object, str]]:
        """Each effective value: its dotted key, the value as the file would have it, and where it comes from:
        "built-in", or "tako.toml:12 [workflows.email]". `env` says whose variables, `server` whose groups.
        `ConfigError` for one that is not in the file, and for a server that is not one of the environment's."""
        if env is not None:
            self.check_environment(env)
        theirs = self.envs[env].servers if env is not None and env in self.envs else tuple(self.servers)
        if server in self.servers and server not in theirs:
            hint = f"It has {', '.join(theirs)}."
            raise ConfigError(f"{self.path}: {server} is not a server of the environment {env}", hint=hint)
        rows: list[tuple[str, object, str]] = []

        def add(at: KeyPath, known: Mapping[str, Setting], layers: Iterable[KeyPath] = ()) -> None:
            for key, setting in known.items():
                _, written, where = self._effective(key, setting, layers or (at,))
                rows.append((_dotted((*at, key)), written, where))

        add((), settings(Config))
        if self.app:
            add(("app",), settings(App))
        add(("workflows",), {key: one for key, one in settings(Workflows).items() if key not in settings(Lane)})
        for name in self.group_names(server):
            add(("workflows", name), settings(Lane), self._layers(name, server))
        variables = self.vars if env is None else self.variables(env)
        add(("vars",), dict.fromkeys(variables, VARIABLE), [("vars", env or ""), ("vars",)])
        for at, one in self.stated.items():
            if at[:1] in (("envs",), ("servers",)) and len(at) == 2 and isinstance(one.written, dict):
                add(at, settings(TABLES[at[0], NAME]))
        for section in ("storage", "secrets", "deploy", "metrics"):
            add((section,), settings(TABLES[section,]))
        return rows

    def _layers(self, group: str, server: str | None) -> list[KeyPath]:
        """The tables that may state a setting of a group, the strongest first."""
        shared: list[KeyPath] = [("workflows", group), ("workflows",)]
        if server is not None and server not in self.servers:
            hint = _meant(("servers", server), self.servers)
            raise ConfigError(f"{self.path}: there is no server {values.shown(server)}", hint=hint)
        return [("servers", server, *layer) for layer in shared if server is not None] + shared

    def _effective(self, key: str, setting: Setting, layers: Iterable[KeyPath]) -> tuple[Any, object, str]:
        """A setting's value, as written, and where it comes from."""
        for table in layers:
            if (one := self.stated.get((*table, key))) is not None:
                header = f" [{_dotted(table)}]" if table else ""
                return one.value, one.written, f"{self.path.name}:{one.line}{header}"
        return setting.builtin(), setting.default, "built-in"


@cache
def settings(kind: type) -> Mapping[str, Setting]:
    """The keys of a table, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {key: s for key, hint in hints.items() for s in getattr(hint, "__metadata__", ()) if isinstance(s, Setting)}


NAME = "NAME"  # in a key path: a name of the user's own

#: Every table that a file can have, and what its keys are; a `dict` has variables, an `object` only tables.
TABLES: Mapping[KeyPath, type] = {
    (): Config,
    ("app",): App,
    ("workflows",): Workflows,
    ("workflows", NAME): Lane,
    ("storage",): Storage,
    ("vars",): dict,
    ("vars", NAME): dict,
    ("envs",): object,
    ("envs", NAME): Env,
    ("servers",): object,
    ("servers", NAME): Server,
    ("servers", NAME, "workflows"): Lane,
    ("servers", NAME, "workflows", NAME): Lane,
    ("secrets",): Secrets,
    ("deploy",): Deploy,
    ("metrics",): Metrics,
}


def find(start: Path | None = None) -> Path | None:
    """The nearest tako.toml, in `start` (the current folder unless said) or upwards; None if there is none."""
    here = (start or Path.cwd()).absolute()
    return next((file for folder in (here, *here.parents) if (file := folder / "tako.toml").is_file()), None)


def load(path: Path) -> Config:
    """The values of a tako.toml. Raises `ConfigError`, whose message has one line for each mistake in the file."""
    try:
        return parse(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def parse(data: bytes, path: Path) -> Config:
    """The values of a tako.toml with these bytes. Raises `ConfigError` as `load` does."""
    try:
        text = data.decode()
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"\(at line (\d+)", str(error))
        read = error.start if isinstance(error, UnicodeDecodeError) else len(data)
        line = at[1] if at else data.count(b"\n", 0, read) + 1
        raise ConfigError(f"{path}:{line}: not valid TOML: {error}") from error
    reading = _Reading(_lines(text))
    reading.table((), (), document)
    reading.servers_of_envs()
    if reading.mistakes:
        mistakes = sorted(reading.mistakes, key=lambda mistake: mistake[0])
        hints = dict.fromkeys(hint for _, _, hint in mistakes if hint)
        raise ConfigError("\n".join(f"{path}:{line}: {what}" for line, what, _ in mistakes), hint="\n".join(hints))
    return _built(reading.stated, path.absolute())


def _built(stated: Mapping[KeyPath, Stated], path: Path) -> Config:
    def build(kind: type, *at: str, **given: object) -> Any:
        read = {key: one.value if (one := stated.get((*at, key))) else s.builtin() for key, s in settings(kind).items()}
        return kind(**read, **given)

    sections = {name: build(TABLES[name,], name) for name in ("workflows", "storage", "secrets", "deploy", "metrics")}
    sections["app"] = build(App, "app") if ("app",) in stated else None
    for name in ("envs", "servers"):
        sections[name] = {one: build(TABLES[name, NAME], name, one, name=one) for one in _tables_in(stated, (name,))}
    variables = _variables(stated, ("vars",))
    config: Config = build(Config, path=path, root=path.parent, stated=stated, vars=variables, **sections)
    return config


class _Reading:
    """One pass over a file: what it states, and every mistake on the way."""

    def __init__(self, lines: Mapping[KeyPath, int]) -> None:
        self.lines = lines
        self.stated: dict[KeyPath, Stated] = {}
        self.mistakes: list[tuple[int, str, str]] = []  # line, message, hint

    def line(self, at: KeyPath) -> int:
        """Where a key stands, or else the nearest table around it."""
        return next((self.lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in self.lines), 1)

    def wrong(self, at: KeyPath, what: object, hint: str = "") -> None:
        self.mistakes.append((self.line(at), f"{_dotted(at)}: {what}", hint))

    def read(self, at: KeyPath, read: values.Reader, written: object, what: str = "") -> Any:
        try:
            return read(written)
        except InvalidValue as error:
            group = at[-2:-1] == ("workflows",) and isinstance(written, dict)
            self.wrong(at, f"{what}{error}", "A group cannot have the name of a setting." if group else error.hint)

    def table(self, at: KeyPath, place: KeyPath, written: object) -> None:
        """Reads a table; `place` is its key in TABLES."""
        if not isinstance(written, dict):
            self.wrong(
                at, f"must be a table, not {values.shown(written)}", f"Write [{_dotted(at)}], and its keys below it."
            )
            return
        self.stated[at] = Stated(written, None, self.line(at))
        keys, each = settings(TABLES[place]), (*place, NAME)
        for key, value in written.items():
            here, own = (*at, key), (*place, key)
            if key in keys:
                self.stated[here] = Stated(value, self.read(here, keys[key].read, value), self.line(here))
            elif own in TABLES and own != each:
                self.table(here, own, value)
            elif TABLES[place] is dict and not (isinstance(value, dict) and each in TABLES):
                self.read(here, values.variable, key, "the key ")
                self.stated[here] = Stated(value, self.read(here, VARIABLE.read, value), self.line(here))
            elif each in TABLES and (not keys or (isinstance(value, dict) and key not in settings(Workflows))):
                self.read(here, values.name, key, "the key ")
                self.table(here, each, value)
            else:
                elsewhere = [_dotted((*table, key)) for table, kind in TABLES.items() if key in settings(kind)]
                inner = [table[-1] for table in TABLES if table[:-1] == place != table and table != each]
                self.wrong(here, "unknown key", _meant(here, [*keys, *inner], elsewhere))
        for key in keys:
            if keys[key].default is REQUIRED and key not in written:
                self.wrong((*at, key), "is missing", f"{_dotted((*at, key))}: {keys[key].doc}.")

    def servers_of_envs(self) -> None:
        servers = _tables_in(self.stated, ("servers",))
        for env in _tables_in(self.stated, ("envs",)):
            one = self.stated.get(("envs", env, "servers"))
            for name in one.value or () if one else ():
                if name not in servers:
                    hint = _meant(("servers", name), servers)
                    self.wrong(("envs", env, "servers"), f"there is no server {values.shown(name)}", hint)


def _meant(at: KeyPath, names: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """A hint: what the last key of `at` may have been meant to be."""
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    near = difflib.get_close_matches(at[-1], known := list(names), 1, 0.5)
    table = _dotted(at[:-1]) or "the file"
    return (
        f"Did you mean {_dotted((*at[:-1], near[0]))}?" if near else f"In {table} go: {', '.join(known) or 'none yet'}."
    )


def _tables_in(stated: Mapping[KeyPath, Stated], at: KeyPath) -> list[str]:
    return [path[-1] for path, one in stated.items() if path[:-1] == at != path and isinstance(one.written, dict)]


def _variables(stated: Mapping[KeyPath, Stated], at: KeyPath) -> dict[str, str]:
    return {path[-1]: one.value for path, one in stated.items() if path[:-1] == at and one.value is not None}


def _dotted(path: KeyPath) -> str:
    """A key path as the file writes it."""
    return ".".join(key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key) for key in path)


def _lines(text: str) -> dict[KeyPath, int]:
    """The line of each table and key of a valid file. tomllib keeps none, so this has it read each statement alone."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    statement: list[str] = []
    for number, row in enumerate(text.split("\n"), 1):
        statement.append(row)
        try:
            paths = list(_key_paths(tomllib.loads("\n".join([*statement, ""]))))
        except (ValueError, RecursionError):  # its value goes on in the next row
            continue
        if row.lstrip().startswith("[") and len(statement) == 1:
            table = paths.pop()  # a header: all that it reads as is the way to its table
            paths = [table[:end] for end in range(1, len(table) + 1)]
        else:
            paths = [table + path for path in paths]
        for path in paths:
            lines.setdefault(path, number - len(statement) + 1)
        statement = []
    return lines


def _key_paths(written: object, above: KeyPath = ()) -> Iterator[KeyPath]:
    """The paths of all keys, outer ones first, as deep as any setting is."""
    for key, value in written.items() if isinstance(written, dict) and len(above) < 6 else ():
        yield (*above, key)
        yield from _key_paths(value, (*above, key))
