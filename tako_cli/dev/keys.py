"""What a terminal sends, as keys: "a" is a letter, "<up>" an arrow, and what is pasted is one text."""

import codecs
import re

#: Sequences and control characters that mean something here; the others are nothing.
_NAMES = {
    "\r": "<enter>", "\n": "<enter>", "\x7f": "<backspace>", "\x08": "<backspace>", "\t": "<tab>", "\x04": "<esc>",
    "\x01": "<home>", "\x05": "<end>", "\x02": "<left>", "\x06": "<right>", "\x10": "<up>", "\x0e": "<down>",
    "\x15": "<clear>", "\x0b": "<cut>", "\x17": "<word>",
    "\x1b[A": "<up>", "\x1b[B": "<down>", "\x1b[C": "<right>", "\x1b[D": "<left>", "\x1b[H": "<home>",
    "\x1b[F": "<end>", "\x1b[1~": "<home>", "\x1b[4~": "<end>", "\x1b[7~": "<home>", "\x1b[8~": "<end>",
    "\x1b[3~": "<delete>",
}  # fmt: skip
_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?<=>]*[ -/]*[@-~]|O[ -~])")
_BEGINNING = re.compile(r"\x1b(?:\[[0-9;?<=>]*[ -/]*|O)?")
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"

#: How long a sequence may take to arrive, in seconds; what has not gone on by then was the key Esc.
PATIENCE = 0.05


class Keys:
    """Bytes in, keys out; a key may come in several pieces."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._text = ""
        self._pasting = False

    @property
    def unfinished(self) -> bool:
        """Whether what has come last may be the beginning of a key."""
        return bool(self._text) and not self._pasting

    def feed(self, data: bytes) -> list[str]:
        """The keys that are whole now."""
        self._text += self._decode(data)
        keys: list[str] = []
        while self._text and (taken := self._take(keys)):
            self._text = self._text[taken:]
        return keys

    def flush(self) -> list[str]:
        """What has begun as a sequence and did not go on."""
        begun, self._text = self._text, ""
        return ["<esc>"] if begun else []

    def _take(self, keys: list[str]) -> int:
        """Take one key off the beginning of the text; how long it was, 0 where more has to come."""
        text = self._text
        if self._pasting:
            pasted, end, _ = text.partition(_PASTED)
            if not end:
                return 0
            self._pasting = False
            keys.append(" ".join(pasted.split()))
            return len(pasted) + len(end)
        if text[0] == "\x1b":
            if found := _SEQUENCE.match(text):
                self._pasting = found[0] == _PASTE
                keys += [name] if (name := _NAMES.get(found[0].replace("\x1bO", "\x1b["))) else []
                return found.end()
            return 0 if _BEGINNING.fullmatch(text) else 2  # Alt and a key is nothing here
        key = _NAMES.get(text[0]) or (text[0] if text[0].isprintable() else "")
        keys += [key] if key else []
        return 1
