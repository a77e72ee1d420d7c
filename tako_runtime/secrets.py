"""Secrets: how a process gets them before it imports user code, and how their values stay out of all that is kept.

The supervisor writes one JSON envelope, `{"secrets": {NAME: value}}`, into a pipe (`handing_over`); the worker reads it
to its end and closes it (`receive`). No value is ever in an environment, on a command line or on a disk. A value that
turns up in a text is masked there (`Mask`).
"""

import asyncio
import json
import os
import re
import stat
from base64 import b64encode, urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import groupby
from operator import itemgetter
from typing import Annotated, Any, NoReturn, Self
from urllib.parse import quote, quote_plus

import msgspec

from tako_runtime.errors import InvalidValue, NotCarried, TakoError

#: The environment variable that names the file descriptor of the envelope. It holds a number, never a secret.
VARIABLE = "TAKO_SECRETS_FD"

#: Shorter values are not masked: they would shred ordinary text. A line of a longer value needs more, being no secret
#: by itself; and a value that is longer than any key is masked as a whole only, or a worker would start late.
SHORTEST, SHORTEST_LINE, LONGEST_BY_LINE = 6, 16, 1 << 16


class SecretMissing(TakoError, KeyError):
    """There is no such secret here."""

    code = "secret_missing"
    __str__ = Exception.__str__  # a KeyError's own shows the repr of its message


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
        if (value := self._value(name)) is None:
            raise SecretMissing(
                f"the secret {name} is not set: `tako secrets set {name}` sets it",
                hint=f"This process was given: {', '.join(self._names) or 'no secrets at all'}.",
            )
        return value

    def get(self, name: str, default: str | None = None) -> str | None:
        return self._value(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
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
    number = os.environ.pop(VARIABLE, "")  # what this process starts is not meant by it
    try:
        fd = int(number)
        if stat.S_IFMT(os.fstat(fd).st_mode) not in (stat.S_IFIFO, stat.S_IFSOCK):
            return {}
    except (ValueError, OSError, OverflowError):
        return {}
    os.set_inheritable(fd, False)
    with open(fd, "rb") as pipe:
        values = _decoded(pipe.read())
    if values is None:
        raise InvalidValue(
            'what was handed over as secrets is not one whole {"secrets": {NAME: text}} with names in UPPER_SNAKE',
            hint="It is not shown, for it may hold secrets. A supervisor that was killed just then leaves half of one.",
        )
    Secrets.__init__(secrets, values)  # the same object: others have imported it before
    return values


@asynccontextmanager
async def handing_over(values: Mapping[str, str]) -> AsyncIterator[int]:
    """The read end of a pipe with the envelope, for one child that is started within:

        async with handing_over(values) as fd:
            await asyncio.create_subprocess_exec(*words, pass_fds=[fd], env={**env, VARIABLE: str(fd)})

    It never waits for the child: what does not fit into the pipe is written by the event loop as the child reads, and
    dropped when the child ends without having read. Raises `InvalidValue` for what is not NAME: text.
    """
    data = _encoded(values)
    reading, writing = os.pipe()
    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(writing, "wb", 0))
        transport.write(data)
        transport.close()  # once all is written, or nobody is left to read it
        yield reading
    finally:
        os.close(reading)


def _encoded(values: Mapping[str, str]) -> bytes:
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


class Mask:
    """Puts `[secret NAME]` in the place of every secret's value: as it is, or as URL encoding, base64 (also within a
    longer one), JSON, `repr` or `ascii` spell it; the lines of a private key one by one, too. Not found is a value cut
    in two, in hexadecimal, in base64 with line breaks, compressed or encrypted.

    `warn(place, name)` is called once for each place and name, so a place is "the result of step charge", without a
    run's id. `too_short` names the secrets that are not masked.

    >>> Mask({"STRIPE_KEY": "sk_live_1"}).text("Bearer sk_live_1", "an example")
    'Bearer [secret STRIPE_KEY]'
    """

    def __init__(self, values: Mapping[str, str], warn: Callable[[str, str], None] = lambda place, name: None) -> None:
        self._warn, self._warned = warn, set[tuple[str, str]]()
        self.too_short = tuple(name for name, value in values.items() if len(value.strip()) < SHORTEST)
        forms: dict[str, str] = {}
        for name, value in values.items():
            if name not in self.too_short:
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
        parts, done, at = [], 0, 0
        while found := self._find(text, at):
            start, at = found.start(), found.start() + 1
            for form, name in self._by_head[found[0]]:  # the longest first
                if text.startswith(form, start):
                    if start >= done:
                        parts += [text[done:start], f"[secret {name}]"]
                    if (place, name) not in self._warned:
                        self._warned.add((place, name))
                        self._warn(place, name)
                    done = max(done, start + len(form))
                    break
        return "".join(parts) + text[done:] if parts else text

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
