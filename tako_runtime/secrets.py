"""Secrets: how a process gets them before it imports user code.

The supervisor has them from a file of its own (`stored`), or from whoever started it. It writes one JSON envelope,
`{"secrets": {NAME: value}}`, into a pipe (`handing_over`); the worker reads it from descriptor 3 to its end and closes
it (`receive`). A program that is not tako's own (the app, a command of `tako run`) inherits it in another form
(`offered`), and reads it when it first looks for a secret.
No value is ever in an environment or on a command line; `masking.py` keeps them out of the store and the log.
"""

import asyncio
import fcntl
import os
import stat
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, Self

import msgspec

from tako_runtime.errors import ConfigError, InvalidValue, NotCarried, Refused, SecretMissing
from tako_runtime.masking import guard

#: The environment variable that names the file descriptor of the envelope. It holds a number, never a secret. A fixed 3
#: would have to be put in place between fork and exec, where no Python may run beside threads; and in a process that
#: systemd has started, 3 is the first socket that it passes on.
VARIABLE = "TAKO_SECRETS_FD"


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
        data = msgspec.json.encode({"secrets": dict(values)})
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


def file_of(app_dir: Path) -> Path:
    """Where an app's secrets are on this machine: `{app_dir}/secrets.json`; for the processes of a release that came
    with others, and is not the current one yet, `secrets.<release>.json` beside it (`rotation.bring`)."""
    own = app_dir / f"secrets.{os.environ.get('TAKO_RELEASE', '')}.json"
    return own if own.exists() else app_dir / "secrets.json"


def stored(app_dir: Path) -> dict[str, str]:
    """The secrets of an app on this machine: the envelope in its file (`file_of`); none where there is none.

    Raises `ConfigError`, which shows no part of the content, for a file that others may read, that somebody else could
    have put there, or that is no envelope.
    """
    path = file_of(app_dir)
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


_PRIVATE = "It must be a regular file of this user's own, with mode 0600 or stricter."
