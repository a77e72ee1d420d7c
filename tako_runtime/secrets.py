"""Secrets: how a process gets them before it imports user code, and how their values stay out of all that is kept.

The supervisor has them from a file of its own (`stored`), or from whoever started it. It writes one JSON envelope,
`{"secrets": {NAME: value}}`, into a pipe (`handing_over`); the worker reads it from descriptor 3 to its end and closes
it (`receive`). A program that is not tako's own (the app, a command of `tako run`) inherits it in another form
(`offered`), and reads it when it first looks for a secret.
No value is ever in an environment, on a command line, in the store or in the log: where one turns up in a text that a
process stores or logs, it is masked there (`guarded`).
"""

import asyncio
import fcntl
import json
import os
import re
import stat
import sys
import threading
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self
from urllib.parse import quote, quote_plus

import msgspec

from tako_runtime import log
from tako_runtime.errors import ConfigError, InvalidValue, NotCarried, Refused, SecretMissing

#: The environment variable that names the file descriptor of the envelope. It holds a number, never a secret. A fixed 3
#: would have to be put in place between fork and exec, where no Python may run beside threads; and in a process that
#: systemd has started, 3 is the first socket that it passes on.
VARIABLE = "TAKO_SECRETS_FD"

#: Shorter values are not masked: they would shred ordinary text. A line of a longer value needs more, being no secret
#: by itself; and a value that is longer than any key is masked as a whole only, or a worker would start late.
SHORTEST, SHORTEST_LINE, LONGEST_BY_LINE = 6, 16, 1 << 16


class Secrets:
    """The secrets of this process, by name: `secrets["STRIPE_KEY"]`. Read-only.

    No way of showing, copying or storing it as a whole gives a value away, so it has no `values()` or `items()`, and
    `dict(secrets)` and `f(**secrets)` are errors.
    """

    __slots__ = ("_names", "_value")

    def __init__(self, values: Mapping[str, str]) -> None:
        # A bound method shows nothing of its dict, whatever looks into this object: a debugger, an error reporter.
        self._names, self._value = tuple(values), dict(values).get

    def __getitem__(self, name: str) -> str:
        _take()
        if (value := self._value(name)) is None:
            raise SecretMissing(
                f"the secret {name} is not set",
                hint=f"This process was given: {', '.join(self._names) or 'no secrets at all'}. tako secrets set sets "
                "one; on a server they come from the file secrets.json beside the store.",
            )
        return value

    def get(self, name: str, default: str | None = None) -> str | None:
        _take()
        return self._value(name, default)

    def __contains__(self, name: object) -> bool:
        _take()
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        _take()
        return iter(self._names)

    def __len__(self) -> int:
        _take()
        return len(self._names)

    def __repr__(self) -> str:
        _take()
        return f"<secrets: {', '.join(self._names) or 'none'}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> NoReturn:  # every protocol of pickle comes by here
        raise NotCarried("secrets stay in the process that was given them", hint="Carry a secret's name instead.")


secrets = Secrets({})


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    secrets: dict[Annotated[str, msgspec.Meta(pattern=r"\A[A-Z][A-Z0-9_]*\Z")], str]


def receive() -> dict[str, str]:
    """Read the envelope and close it; `secrets` has what was in it. Call it once, before user code is imported.

    Gives the values for a `Mask`. Where nobody has handed over secrets to this very process there are none. Raises
    `InvalidValue`, which shows no part of the content, for anything but one whole envelope.
    """
    number, _, identity = os.environ.pop(VARIABLE, "").partition(":")  # what this process starts is not meant by it
    try:
        fd = int(number)
        file = os.fstat(fd)
    except (ValueError, OSError, OverflowError):
        return {}
    kind = stat.S_IFMT(file.st_mode)
    if identity != _identity(fd) if identity else kind not in (stat.S_IFIFO, stat.S_IFSOCK):
        return {}
    os.set_inheritable(fd, False)
    with open(fd, "rb") as opened:  # others may read the same file in memory, from its beginning
        data = os.pread(fd, file.st_size, 0) if kind == stat.S_IFREG else opened.read()
    values, empty = _decoded(data), not data
    del data  # an error's frames are shown by some
    if identity and empty:
        raise SecretMissing(
            "another process of this command has taken its secrets: here they are handed over once",
            hint="The first one that asks gets them. Start the others with a tako run of their own.",
        )
    if values is None:
        raise InvalidValue(
            'what was handed over as secrets is not one whole {"secrets": {NAME: text}} with names in UPPER_SNAKE',
            hint="It is not shown, for it may hold secrets. A supervisor that was killed just then leaves half of one.",
        )
    Secrets.__init__(secrets, values)  # the same object: others have imported it before
    return values


def _identity(fd: int) -> str:
    file = os.fstat(fd)
    return f"{file.st_dev}-{file.st_ino}"


_taking = threading.Lock()


def _take() -> None:
    """A program that is not tako's own has nobody who calls `receive` before user code: the first use of a secret does,
    and keeps them out of what the program enqueues."""
    with _taking:
        if ":" in os.environ.get(VARIABLE, ""):
            guard(receive())


def reserve() -> None:
    """Keep the descriptor `NUMBER` for what `handing_over` hands over. Call it first of all: where something else has
    it by then, another one is used."""
    global _reserved
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    if nothing != NUMBER:
        kept = fcntl.fcntl(nothing, fcntl.F_DUPFD_CLOEXEC, NUMBER)
        os.close(nothing)
        nothing = kept
    if nothing == NUMBER:
        _reserved = True
    else:
        os.close(nothing)


#: Where a worker reads its secrets from, unless its supervisor had been started with something else there.
NUMBER = 3
_reserved = False


@asynccontextmanager
async def handing_over(values: Mapping[str, str]) -> AsyncIterator[int]:
    """The read end of a pipe with the envelope, for one child that is started within, without an await before:

        async with handing_over(values) as fd:
            subprocess.Popen(words, pass_fds=[fd], env={**env, VARIABLE: str(fd)})

    It never waits for the child: what does not fit into the pipe is written by the event loop as the child reads, and
    dropped when the child ends without having read. Raises `InvalidValue` for what is not NAME: text.
    """
    data = envelope(values)
    reading, writing = os.pipe()
    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(writing, "wb", 0))
        transport.write(data)
        transport.close()  # once all is written, or nobody is left to read it
        if not _reserved:
            yield reading
            return
        nothing = os.dup(NUMBER)
        os.dup2(reading, NUMBER, inheritable=False)
        try:
            yield NUMBER
        finally:
            os.dup2(nothing, NUMBER, inheritable=False)
            os.close(nothing)
    finally:
        os.close(reading)


@contextmanager
def offered(values: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """The envelope for a program that is not tako's own, and for what that forks: a descriptor to inherit, and what
    `VARIABLE` says of it. The first use of `secrets` in such a process reads it.

    By then the number may have come to mean some other file, so the file's identity is named too. On Linux it is a
    file in memory and in no folder, which each process that inherits it can read; elsewhere a pipe, which only the
    first can.
    """
    data = envelope(values)
    if sys.platform == "linux":
        fd = os.memfd_create("tako-secrets")
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    else:
        fd, writing = os.pipe()
        os.set_blocking(writing, False)
        written = os.write(writing, data)
        os.close(writing)
        if written < len(data):
            os.close(fd)
            raise Refused(
                f"the secrets have {len(data):,} bytes, and a pipe takes {written:,}", hint="Keep big files elsewhere."
            )
    try:
        yield fd, f"{fd}:{_identity(fd)}"
    finally:
        os.close(fd)


def envelope(values: Mapping[str, str]) -> bytes:
    """What is handed over. Raises `InvalidValue` for what is not NAME: text."""
    try:
        data = msgspec.json.encode({"secrets": dict(sorted(values.items()))})
    except (TypeError, ValueError):  # kept out of the next error: a UnicodeEncodeError holds the text
        data = b""
    if _decoded(data) is None:
        raise InvalidValue("secrets are text, and their names are in UPPER_SNAKE, like STRIPE_KEY")
    return data


def _decoded(data: bytes) -> dict[str, str] | None:
    """None for what is no envelope: an error from here would have the content in its words or its frames."""
    try:
        return msgspec.json.decode(data, type=_Envelope).secrets
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


# --- where the supervisor has them from ------------------------------------------------------------------------------


def stored(app_dir: Path) -> dict[str, str]:
    """The secrets of an app on this machine: the envelope in `{app_dir}/secrets.json`; none where there is no file.

    Raises `ConfigError`, which shows no part of the content, for a file that others may read, that somebody else could
    have put there, or that is no envelope.
    """
    path = app_dir / "secrets.json"
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hold us up
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        why = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigError(f"{path} cannot be read: {why}", hint=_PRIVATE) from None
    try:
        seen = os.fstat(file)
        if not stat.S_ISREG(seen.st_mode):
            raise ConfigError(f"{path} is not a regular file", hint=_PRIVATE)
        if seen.st_uid != os.geteuid():
            raise ConfigError(f"{path} belongs to another user (uid {seen.st_uid})", hint=_PRIVATE)
        if stat.S_IMODE(seen.st_mode) & ~0o600:
            raise ConfigError(f"{path} has mode {stat.S_IMODE(seen.st_mode):04o}", hint=_PRIVATE)
        with os.fdopen(file, "rb", closefd=False) as opened:
            values = _decoded(opened.read())
    finally:
        os.close(file)
    if values is None:
        raise ConfigError(
            f'{path} is not one whole {{"secrets": {{NAME: text}}}} with names in UPPER_SNAKE',
            hint="It is not shown, for it may hold secrets.",
        )
    return values


NOT_IN_NAMES = "Names are stored as they are, since things are found by them: make it of something else."

_PRIVATE = "It must be a regular file of this user's own, with mode 0600 or stricter."


# --- what keeps them out of the store and the log --------------------------------------------------------------------


@contextmanager
def guarded(values: Mapping[str, str]) -> Iterator[None]:
    """No text that this process stores or logs has one of these values, within. Each place that one turns up in is
    warned of once."""
    mask = guard(values)
    try:
        yield
    finally:
        if mask is not None:
            _masks.remove(mask)
            log.mask_with(masked if _masks else None)


def guard(values: Mapping[str, str]) -> "Mask | None":
    """The same from now on, for a process that keeps them to its end."""
    if not values:
        return None
    mask = Mask(values, lambda place, name: log.emit("secret.masked", place=place, name=name))
    _masks.append(mask)
    log.mask_with(masked)
    return mask


#: Those of this process; several where its secrets were changed, for what was known by the old ones is still about.
_masks: list["Mask"] = []


def masked(text: str, place: str) -> str:
    """A text that is about to be stored or logged, without any value. `place` names it in the warning."""
    for mask in _masks:
        text = mask.text(text, log.place(place))
    return text


def masked_json(data: bytes, place: str) -> bytes:
    """The same for JSON, which is JSON still."""
    for mask in _masks:
        data = mask.json(data.decode(errors="replace"), log.place(place)).encode()
    return data


def named_in(text: str) -> str | None:
    """The secret whose value is in a text that cannot be masked, since it is how something is found again."""
    for mask in _masks:
        for _, _, name in mask.found(text):
            return name
    return None


class Mask:
    """Puts `[secret NAME]` in the place of every secret's value: as it is, or as URL encoding, base64 (also within a
    longer one), JSON, `repr` or `ascii` spell it; the lines of a private key one by one, too. Not found is a value cut
    in two, in hexadecimal, in base64 with line breaks, compressed or encrypted.

    `warn(place, name)` is called once for each place and name, so a place is "the result of step charge", without a
    run's id. Values that are `too_short` are not masked.

    >>> Mask({"STRIPE_KEY": "sk_live_1"}).text("Bearer sk_live_1", "an example")
    'Bearer [secret STRIPE_KEY]'
    """

    def __init__(self, values: Mapping[str, str], warn: Callable[[str, str], None] = lambda place, name: None) -> None:
        self._warn, self._warned = warn, set[tuple[str, str]]()
        left_out = {name for name, value in values.items() if len(value.strip()) < SHORTEST}
        forms: dict[str, str] = {}
        for name, value in values.items():
            if name not in left_out:
                lines = map(str.strip, value.splitlines() if len(value) <= LONGEST_BY_LINE else ())
                for piece in (value.strip(), *(line for line in lines if len(line) >= SHORTEST_LINE)):
                    forms.update(dict.fromkeys(_spellings(piece), name))
        self._by_head: dict[str, list[tuple[str, str]]] = {}
        for form in sorted(forms, key=len, reverse=True):
            self._by_head.setdefault(form[:SHORTEST], []).append((form, forms[form]))
        # Only the beginnings are in the expression: it stays small and fast however long the values are.
        self._find = re.compile(_any_of(sorted(self._by_head))).search

    def text(self, text: str, place: str) -> str:
        """The text without any value. What overlaps becomes one `[secret ...]`, so no end of a value stays behind."""
        parts, done = [], 0
        for start, end, name in self.found(text):
            if start >= done:
                parts += [text[done:start], f"[secret {name}]"]
            if (place, name) not in self._warned:
                self._warned.add((place, name))
                self._warn(place, name)
            done = max(done, end)
        return "".join(parts) + text[done:] if parts else text

    def found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where in a text which secret's value is: begin, end, name; they may overlap."""
        at = 0
        while head := self._find(text, at):
            start, at = head.start(), head.start() + 1
            for form, name in self._by_head[head[0]]:  # the longest first
                if text.startswith(form, start):
                    yield start, start + len(form), name
                    break

    def json(self, text: str, place: str) -> str:
        """JSON text without any value, which is JSON still: a number or a key that gives a value away is masked whole
        or in part, and no escape is cut. A text without a value is given back as it is."""
        if not self._find(text):
            return text
        try:
            value = msgspec.json.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self.text(text, place)
        masked = self._within(value, place)
        return text if masked == value else msgspec.json.encode(masked).decode()

    def _within(self, value: Any, place: str) -> Any:
        if isinstance(value, dict):
            return {self.text(key, place): self._within(inner, place) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._within(inner, place) for inner in value]
        if isinstance(value, str):
            return self.text(value, place)
        shown = msgspec.json.encode(value).decode()
        return value if (masked := self.text(shown, place)) == shown else masked


def too_short(values: Mapping[str, str]) -> list[str]:
    """The secrets that are not masked: they would shred ordinary text."""
    return [name for name, value in values.items() if 0 < len(value.strip()) < SHORTEST]


def _spellings(value: str) -> set[str]:
    """Every form of a value that is looked for."""
    raw = value.encode()
    forms = {value, quote(value), quote(value, safe=""), quote_plus(value)}
    forms |= {re.sub("%..", lambda code: code[0].lower(), form) for form in forms}
    for shown in (repr('"' + value), ascii('"' + value), repr(b'"' + raw)[1:]):
        # The double quote has every single one escaped; they are not, where the text around the value has none.
        forms |= {shown[2:-1], shown[2:-1].replace("\\'", "'")}
    for _ in range(2):  # JSON text has JSON text within
        forms |= {json.dumps(form, ensure_ascii=only)[1:-1] for form in forms for only in (True, False)}
    for encode in (b64encode, urlsafe_b64encode):
        forms.add(encode(raw).decode())
        for shift, mixed in enumerate((0, 2, 3)):  # the first characters carry the bytes before, the last those after
            forms.add(encode(bytes(shift) + raw).decode()[mixed : (shift + len(raw)) * 8 // 6])
    return forms


def _any_of(words: list[str]) -> str:
    """An expression for sorted words of one length, as a tree: each character is looked at once, not once a word."""
    if len(words) == 1:
        return re.escape(words[0])
    branches = [
        re.escape(head) + _any_of([word[1:] for word in group]) for head, group in groupby(words, itemgetter(0))
    ]
    return f"(?:{'|'.join(branches) or '(?!)'})"
