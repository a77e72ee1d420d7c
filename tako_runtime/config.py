"""tako.toml -> frozen values.

The dataclasses below are the reference of the file: an attribute with a `Setting` is a key, and the `Setting` says how
it is read, what it is when nobody sets it, and what it is for. The parser, the hints for an unknown key, `explain()`
and the test of `example.toml` all read that one source.

A setting of a group comes from the first of these tables that states it: `[servers.S.workflows.G]`,
`[servers.S.workflows]`, `[workflows.G]`, `[workflows]`; else it is the built-in one.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, get_type_hints
from urllib.parse import parse_qsl

from tako_runtime import clock
from tako_runtime.errors import ConfigError, InvalidValue

KeyPath = tuple[str, ...]
Reader = Callable[[object], Any]  # the value as the file has it -> as the code wants it, or InvalidValue("must be ...")


def _reader(what: str, accept: Callable[[object], object], hint: str = "") -> Reader:
    """A reader of what `accept` gives a value for; None means no."""

    def read(value: object) -> object:
        if (accepted := accept(value)) is None:
            raise InvalidValue(f"must be {what}, not {_shown(value)}", hint=hint)
        return accepted

    return read


def _shown(value: object) -> str:
    """A value as a message shows it: short, on one line."""
    try:
        text = "a table" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a hexadecimal number may have more digits than Python agrees to spell out
        text = "a value too large to show"
    return text if len(text) <= 70 else text[:67] + "..."


def _text(pattern: str, what: str, hint: str = "") -> Reader:
    return _reader(what, lambda value: value if isinstance(value, str) and re.fullmatch(pattern, value) else None, hint)


def _whole(least: int, most: int) -> Reader:
    what = f"a whole number from {least} to {most}"
    return _reader(what, lambda value: value if type(value) is int and least <= value <= most else None)


def _list(item: Reader, what: str, *, least: int = 0, distinct: bool = True) -> Reader:
    def accept(value: object) -> tuple[object, ...] | None:
        try:
            items = tuple(item(one) for one in value) if isinstance(value, list) and len(value) >= least else None
        except InvalidValue:
            return None
        return None if items and distinct and len(set(items)) < len(items) else items

    return _reader(what, accept)


def _duration(least: str, most: str) -> Reader:
    def accept(value: object) -> int | None:
        try:
            micros = clock.duration(value, least=None) if isinstance(value, str | int | float) else -1
        except (InvalidValue, OverflowError):
            return None
        return micros if clock.duration(least) <= micros <= clock.duration(most) else None

    hint = "Write a number and a unit (500ms, 90s, 15m, 1h30m, 3d), or a number of seconds."
    return _reader(f"a duration from {least} to {most}", accept, hint)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}


def _size(value: object) -> int | None:
    count = value if type(value) is int else 0
    if isinstance(value, str) and (part := re.fullmatch(r"([0-9]{1,12}) ?([a-z]*)", value.strip().lower())):
        count = int(part[1]) * _UNITS.get(part[2], 0)
    return count if 2**10 <= count <= 2**28 else None


def _folder(value: object) -> str | None:
    folder = PurePosixPath(value) if isinstance(value, str) and "\0" not in value else PurePosixPath()
    return str(folder) if folder.parts and not folder.is_absolute() and ".." not in folder.parts else None


def _storage_url(value: object) -> str:
    """No message repeats the value: what is wrong with it may be a password."""
    url = value if isinstance(value, str) else ""
    if re.match(r"\w+://[^@]*:[^@]*@", url) or any("password" in key for key, _ in parse_qsl(url.partition("?")[2])):
        hint = 'Put the whole url into the secret DATABASE_URL and write url = "postgres" here.'
        raise InvalidValue("must not hold a password: this file gets committed", hint=hint)
    if url in ("sqlite", "postgres") or re.fullmatch(r"postgresql://[^\s\0]+", url):
        return url
    raise InvalidValue('must be "sqlite", "postgres", or a postgresql:// url without a password')


def _listen(value: object) -> str | None:
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if isinstance(value, str) and re.fullmatch(r"/[^\0\n]+", value):
        return value if len(value.encode()) <= 100 else None  # the system's limit for the path of a socket
    try:
        loopback = host == "localhost" or ipaddress.ip_address(re.sub(r"^\[(.*:.*)\]$", r"\1", host)).is_loopback
    except ValueError:
        return None
    return f"{host}:{port}" if loopback and re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535 else None


_name = _text(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "a name: a-z, 0-9 and '-', a letter first, no '-' last, 63 at most")
_loopback = _reader('a loopback address such as "127.0.0.1:9000", or the absolute path of a socket', _listen)
_servers = _list(_name, "a list of server names, each once, at least one", least=1)
_secrets = _list(_text("[A-Z][A-Z0-9_]*", "a name"), "a list of names in UPPER_SNAKE, each once")
_command = _list(_text(r"[^\0]+", "a word"), "a list of words, the program first", least=1, distinct=False)
_host = _text(r"[^\s\0-][^\s\0]*", "a host that ssh understands")  # a dash first would reach ssh as an option
_data_dir = _text(r"~?/[^\0\n]*", "a path from / or ~/")
_flag = _reader("true or false", lambda value: value if type(value) is bool else None)
_variable = _text("[A-Za-z_][A-Za-z0-9_]*", "a name that an environment variable can have")

REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `default` is as the file would have it; None leaves it unset, REQUIRED makes the file say it."""

    read: Reader
    default: object
    doc: str

    def builtin(self) -> Any:
        """The default as the code wants it."""
        return None if self.default is None else self.read(self.default)


VARIABLE = Setting(_text(r"[^\0]*", "text", "Variables are text: put it in quotes."), None, "an environment variable")


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """`[app]`: your own process, next to the workers."""

    command: Annotated[
        tuple[str, ...], Setting(_command, REQUIRED, "program and arguments; {fd} or {port} to listen on")
    ]
    port: Annotated[int, Setting(_whole(1, 65535), 8000, "where it listens")]
    health: Annotated[str | None, Setting(_text(r"/\S*", "a path from /"), None, "answers 200 when ready; unset: none")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """What a group may set. Durations are microseconds."""

    workers: Annotated[int, Setting(_whole(0, 1000), 0, "processes; 0 starts one when work is due")]
    concurrency: Annotated[int, Setting(_whole(1, 10_000), 10, "runs that one worker has in hand")]
    idle_timeout: Annotated[int, Setting(_duration("0s", "365d"), "5m", "workers = 0: how long an idle one stays")]
    grace: Annotated[int, Setting(_duration("0s", "1h"), "30s", "what a stopping worker gives its attempts")]
    retention: Annotated[int, Setting(_duration("1s", "3650d"), "30d", "how long an ended run is kept")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Lane):
    """The effective values of one group of workers."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workflows(Lane):
    """`[workflows]`: what groups start from, and what all of them share. `max_value` is in bytes."""

    dir: Annotated[
        str, Setting(_reader("a folder inside the project", _folder), "workflows", "the folder of workflows")
    ]
    signal_retention: Annotated[
        int, Setting(_duration("1s", "3650d"), "7d", "how long a signal that nobody took is kept")
    ]
    max_value: Annotated[int, Setting(_reader("a size from 1KiB to 256MiB", _size), "1MiB", "the largest stored value")]
    lease: Annotated[int, Setting(_duration("1s", "1h"), "15s", "how long a silent worker keeps its runs")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """`[storage]`: where runs are kept."""

    url: Annotated[str, Setting(_storage_url, "sqlite", "sqlite, postgres (secret DATABASE_URL), or postgresql://...")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """`[envs.NAME]`: where one environment runs."""

    name: str
    servers: Annotated[tuple[str, ...], Setting(_servers, REQUIRED, "names of [servers]")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`[servers.NAME]`: one machine."""

    name: str
    host: Annotated[str, Setting(_host, REQUIRED, "anything that ssh understands")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """`[secrets]`: which ones there must be; never their values."""

    required: Annotated[tuple[str, ...], Setting(_secrets, [], "without these, no deploy")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """`[deploy]`: how a release gets to a server."""

    vendor: Annotated[bool, Setting(_flag, False, "ship wheels too, for a server without an index")]
    data_dir: Annotated[str | None, Setting(_data_dir, None, "unset: the server's usual place")]
    keep_releases: Annotated[int, Setting(_whole(1, 100), 5, "releases that stay on a server")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """`[metrics]`: numbers for a monitoring agent."""

    listen: Annotated[str | None, Setting(_loopback, None, "a loopback address or a socket's path; unset: off")]


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
    name: Annotated[str, Setting(_name, REQUIRED, "the app's name")]
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

    def explain(self, env: str | None = None, server: str | None = None) -> list[tuple[str, object, str]]:
        """Each effective value: its dotted key, the value as the file would have it, and where it comes from: "built-in"
        or "tako.toml:12 [workflows.email]". `env` and `server` narrow it down to what holds there."""
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
        add(("storage",), settings(Storage))
        variables = self.vars if env is None else self.variables(env)
        add(("vars",), dict.fromkeys(variables, VARIABLE), [("vars", env or ""), ("vars",)])
        for name in self.envs if env is None else self.envs.keys() & {env}:
            add(("envs", name), settings(Env))
        for name in self.servers if server is None else (server,):
            add(("servers", name), settings(Server))
        for section, kind in (("secrets", Secrets), ("deploy", Deploy), ("metrics", Metrics)):
            add((section,), settings(kind))
        return rows

    def _layers(self, group: str, server: str | None) -> list[KeyPath]:
        """The tables that may state a setting of a group, the strongest first."""
        shared: list[KeyPath] = [("workflows", group), ("workflows",)]
        if server is not None and server not in self.servers:
            raise ConfigError(f"{self.path}: there is no server {server!r}", hint=_nearest(server, self.servers))
        return [("servers", server, *layer) for layer in shared if server is not None] + shared

    def _effective(self, key: str, setting: Setting, layers: Iterable[KeyPath]) -> tuple[Any, object, str]:
        """A setting's value, as written, and where it comes from."""
        for table in layers:
            if (one := self.stated.get((*table, key))) is not None:
                return one.value, one.written, f"{self.path.name}:{one.line}" + f" [{_dotted(table)}]" * bool(table)
        return setting.builtin(), setting.default, "built-in"


class Variables:
    """`[vars]`: keys of the user's own."""


@cache
def settings(kind: type) -> Mapping[str, Setting]:
    """The keys of a table, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        key: one for key, hint in hints.items() for one in getattr(hint, "__metadata__", ()) if type(one) is Setting
    }


NAME = "NAME"  # in a key path: a name of the user's own

#: Every table that a file can have, and what it holds.
TABLES: Mapping[KeyPath, type] = {
    (): Config,
    ("app",): App,
    ("workflows",): Workflows,
    ("workflows", NAME): Lane,
    ("storage",): Storage,
    ("vars",): Variables,
    ("vars", NAME): Variables,
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
        data = path.read_bytes()
        return parse(data.decode(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8: {error.reason}", hint="Save the file as UTF-8.") from error


def parse(text: str, path: Path) -> Config:
    """The values of a tako.toml with this text. Raises `ConfigError` as `load` does."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r"\(at (?:line (\d+)|end)", str(error))
        line = int(at[1] or text.count("\n") + 1) if at else 1
        raise ConfigError(f"{path}:{line}: not TOML: {error}", hint="Text goes in quotes.") from error
    reading = _Reading(_lines(text))
    reading.table((), (), document)
    reading.servers_of_envs()
    if reading.mistakes:
        mistakes = sorted(reading.mistakes, key=lambda mistake: mistake[0])
        hints = dict.fromkeys(hint for _, _, hint in mistakes if hint)
        raise ConfigError("\n".join(f"{path}:{line}: {what}" for line, what, _ in mistakes), hint="\n".join(hints))
    stated, file = reading.stated, path.absolute()

    def build(kind: type, *at: str, **given: object) -> Any:
        read = {key: one.value if (one := stated.get((*at, key))) else s.builtin() for key, s in settings(kind).items()}
        return kind(**read, **given)

    return build(  # type: ignore[no-any-return]
        Config,
        path=file,
        root=file.parent,
        app=build(App, "app") if ("app",) in stated else None,
        workflows=build(Workflows, "workflows"),
        storage=build(Storage, "storage"),
        vars=_variables(stated, ("vars",)),
        envs={name: build(Env, "envs", name, name=name) for name in _tables_in(stated, ("envs",))},
        servers={name: build(Server, "servers", name, name=name) for name in _tables_in(stated, ("servers",))},
        secrets=build(Secrets, "secrets"),
        deploy=build(Deploy, "deploy"),
        metrics=build(Metrics, "metrics"),
        stated=stated,
    )


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

    def table(self, at: KeyPath, place: KeyPath, written: object) -> None:
        """Reads a table; `place` is its key in TABLES."""
        if not isinstance(written, dict):
            return self.wrong(at, f"must be a table, not {_shown(written)}", f"Write [{_dotted(at)}] and its keys.")
        self.stated[at] = Stated(written, None, self.line(at))
        keys, each = settings(TABLES[place]), (*place, NAME)
        for key, value in written.items():
            own, here = (*place, key), (*at, key)
            if key in keys:
                self.setting(here, keys[key], value)
            elif own in TABLES and own != each:
                self.table(here, own, value)
            elif TABLES[place] is Variables and not isinstance(value, dict):
                self.key(here, _variable)
                self.setting(here, VARIABLE, value)
            elif each in TABLES and (isinstance(value, dict) or not keys):
                self.key(here, _name)
                self.table(here, each, value)
            else:
                self.wrong(here, "unknown key", _better_key(key, place))
        for key in keys:
            if keys[key].default is REQUIRED and key not in written:
                self.wrong((*at, key), "is missing", f"{_dotted((*at, key))}: {keys[key].doc}.")

    def setting(self, at: KeyPath, setting: Setting, written: object) -> None:
        try:
            self.stated[at] = Stated(written, setting.read(written), self.line(at))
        except InvalidValue as error:
            group = at[0] == "workflows" and isinstance(written, dict)
            self.wrong(at, error, "A group cannot have the name of a setting." if group else error.hint)

    def key(self, at: KeyPath, read: Reader) -> None:
        try:
            read(at[-1])
        except InvalidValue as error:
            self.wrong(at, f"the key {error}")

    def servers_of_envs(self) -> None:
        servers = _tables_in(self.stated, ("servers",))
        for at, one in self.stated.items():
            if at[0:1] == ("envs",) and len(at) == 3:
                for name in one.value:
                    if name not in servers:
                        self.wrong(at, f"there is no server {_shown(name)}", _nearest(name, servers))


def _better_key(key: str, place: KeyPath) -> str:
    """What an unknown key may have been meant to be: a key of another table, or the nearest one of this."""
    tables = [f"[{_dotted(table)}]" if table else "the top" for table, kind in TABLES.items() if key in settings(kind)]
    inner = [table[-1] for table in TABLES if table and table[:-1] == place and table[-1] != NAME]
    return f"{key} belongs in {' or '.join(tables)}." if tables else _nearest(key, [*settings(TABLES[place]), *inner])


def _nearest(word: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(word, names, 1, 0.5)
    return f"Did you mean {near[0]}?" if near else f"There is: {', '.join(names) or 'none'}."


def _tables_in(stated: Mapping[KeyPath, Stated], at: KeyPath) -> list[str]:
    return [path[-1] for path, one in stated.items() if path[:-1] == at != path and isinstance(one.written, dict)]


def _variables(stated: Mapping[KeyPath, Stated], at: KeyPath) -> dict[str, str]:
    return {path[-1]: one.value for path, one in stated.items() if path[:-1] == at and one.value is not None}


def _dotted(path: KeyPath) -> str:
    """A key path as the file writes it."""
    return ".".join(key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key) for key in path)


_TOKEN = re.compile(
    r"""\#[^\n]* | (?P<quoted> \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\])*" | '[^']*' )
      | (?P<bare> [\w+-]+ ) | (?P<mark> [][{}=,\n] )""",
    re.VERBOSE | re.DOTALL,
)


def _lines(text: str) -> dict[KeyPath, int]:
    """The line of each table and key. tomllib keeps none; it has read the text before, so this takes it to be valid."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    at: KeyPath = ()  # the key whose value comes next
    key: list[str] = []
    open_: list[tuple[str, KeyPath]] = []  # the brackets around a value, and whose they are
    line, in_key = 1, True

    def note(path: KeyPath) -> None:
        for end in range(1, len(path) + 1):
            lines.setdefault(path[:end], line)

    for token in _TOKEN.finditer(text):
        word = token[0]
        if token["quoted"] or token["bare"]:
            if in_key:
                key.append(tomllib.loads(f"k={word}")["k"] if token["quoted"] else word)
        elif word == "=":
            at = (open_[-1][1] if open_ else table) + tuple(key)
            in_key = False
            note(at)
        elif word == "]" and in_key:  # the end of a [table]
            table, key = tuple(key) or table, []
            note(table)
        elif word in ("{", "[") and not in_key:
            open_.append((word, at))
            in_key, key = word == "{", []
        elif word in ("]", "}"):
            open_.pop()
            in_key = False
        elif word == "," or (word == "\n" and not open_):
            in_key, key = not open_ or open_[-1][0] == "{", []
        line += word.count("\n")
    return lines
