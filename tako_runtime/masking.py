"""What keeps the values of secrets out of the store and the log: where one turns up in a text that a process stores or
logs, `[secret NAME]` stands in its place (`guarded`).
"""

import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec

from tako_runtime import log

#: Shorter values are not masked: they would shred ordinary text. A line of a longer value needs more, being no secret
#: by itself; and a value that is longer than any key is masked as a whole only, or a worker would start late.
SHORTEST, SHORTEST_LINE, LONGEST_BY_LINE = 6, 16, 1 << 16

#: The hint where a value turns up in a name.
NOT_IN_NAMES = "Names are stored as they are, since things are found by them: make it of something else."


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


def masked_json(data: bytes, place: object) -> bytes:
    """The same for JSON, which is JSON still."""
    for mask in _masks:
        data = mask.json(data.decode(errors="replace"), log.place(str(place))).encode()
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
