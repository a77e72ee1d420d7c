"""How each value of tako.toml is read: from what the file has to what the code wants, or `InvalidValue`."""

import ipaddress
import json
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

from tako_runtime import clock
from tako_runtime.errors import InvalidValue

Reader = Callable[[object], Any]  # the value as the file has it -> as the code wants it, or InvalidValue("must be ...")


def _reader(what: str, accept: Callable[[object], object], hint: str = "") -> Reader:
    """A reader of what `accept` gives a value for; None means no."""

    def read(value: object) -> object:
        if (accepted := accept(value)) is None:
            raise InvalidValue(f"must be {what}, not {shown(value)}", hint=hint)
        return accepted

    return read


def shown(value: object) -> str:
    """A value as a message shows it: short, on one line."""
    try:
        text = "a table" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # a hexadecimal number may have more digits than Python agrees to spell out
        text = "a value too large to show"
    return text if len(text) <= 70 else text[:67] + "..."


def text(pattern: str, what: str, hint: str = "") -> Reader:
    def accept(value: object) -> str | None:
        return value if isinstance(value, str) and re.fullmatch(pattern, value) and "\0" not in value else None

    return _reader(what, accept, hint)


def whole(least: int, most: int) -> Reader:
    what = f"a whole number from {least} to {most}"
    return _reader(what, lambda value: value if type(value) is int and least <= value <= most else None)


def _list(item: Reader, what: str, *, least: int = 0, twice: bool = False) -> Reader:
    def accept(value: object) -> tuple[object, ...] | None:
        try:
            items = tuple(map(item, value)) if isinstance(value, list) and len(value) >= least else None
        except InvalidValue:
            return None
        return items if items is None or twice or len(set(items)) == len(items) else None

    return _reader(what, accept)


def duration(least: str, most: str) -> Reader:
    def accept(value: object) -> int | None:
        try:
            micros = clock.duration(value, least=None) if isinstance(value, str | int | float) else -1
        except (InvalidValue, OverflowError):
            return None
        return micros if clock.duration(least) <= micros <= clock.duration(most) else None

    hint = "Write a number and a unit (500ms, 90s, 15m, 1h30m, 3d), or a number of seconds."
    return _reader(f"a duration from {least} to {most}", accept, hint)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _size(value: object, least: int = 2**10, most: int = 2**28) -> int | None:
    count = value if type(value) is int else 0
    if isinstance(value, str) and (part := re.fullmatch(r"([0-9]{1,12}) ?([a-z]*)", value.strip().lower())):
        count = int(part[1]) * _UNITS.get(part[2], 0)
    return count if least <= count <= most else None


def _folder(value: object) -> str | None:
    folder = PurePosixPath(value if isinstance(value, str) and "\0" not in value else "")
    return str(folder) if folder.parts and not folder.is_absolute() and ".." not in folder.parts else None


def storage_url(value: object) -> str:
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


flag = _reader("true or false", lambda value: value if isinstance(value, bool) else None)
name = text(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "a name: a-z, 0-9 and '-', a letter first, no '-' last, 63 at most")
variable = text("[A-Za-z_][A-Za-z0-9_]*", "a name that an environment variable can have")
inside = _reader("a folder inside the project, relative to it, without '..'", _folder)
value_size = _reader('a size from 1KiB to 256MiB, such as "512KiB", "1MiB" or a number of bytes', _size)
release_size = _reader('a size from 1KiB to 64GiB, such as "200MiB"', lambda value: _size(value, most=2**36))
command = _list(text("(?s:.+)", "a word"), "a list of words, the program first", least=1, twice=True)
servers = _list(name, "a list of server names, each once, at least one", least=1)
secrets = _list(text("[A-Z][A-Z0-9_]*", "a name"), "a list of names in UPPER_SNAKE, each once")
health = text(r"/\S*", "a path that starts with /")
host = text(r"[^\s-]\S*", "a host that ssh understands")  # a dash first would reach ssh as an option
data_dir = text("~?/.+", "a path that starts with / or ~/")
loopback = _reader('a loopback address such as "127.0.0.1:9000", or the absolute path of a socket', _listen)
