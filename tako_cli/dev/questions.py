"""Questions to the person at the terminal: one of several, or a line of text. Keys in, rows and an answer out."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tako_cli import output

if TYPE_CHECKING:
    from rich.text import Text

#: So many choices, or rows of a text, are shown at once.
_SHOWN = 8


class Question(Protocol):
    """What is asked. `press` says whether the question is over; `answer` is None where it was not answered."""

    answer: Any

    def press(self, key: str) -> bool: ...

    def rows(self, width: int) -> "list[Text]": ...


class Choice:
    """One of several, each with words beside its name: arrows and Enter, or its number."""

    def __init__(self, title: str, options: Sequence[tuple[str, str, Any]]) -> None:
        self.answer: Any = None
        self._title, self._options = title, options
        self._at = 0

    def press(self, key: str) -> bool:
        if key in ("<up>", "k"):
            self._at = (self._at - 1) % len(self._options)
        elif key in ("<down>", "j", "<tab>"):
            self._at = (self._at + 1) % len(self._options)
        elif key == "<enter>" or (key.isdecimal() and 1 <= int(key) <= min(len(self._options), 9)):
            self.answer = self._options[self._at if key == "<enter>" else int(key) - 1][2]
            return True
        return key in ("<esc>", "q")

    def rows(self, width: int) -> "list[Text]":
        first = min(max(self._at - _SHOWN + 1, 0), max(len(self._options) - _SHOWN, 0))
        shown = self._options[first : first + _SHOWN]
        names = max(output.styled(name).cell_len for name, *_ in shown)
        rows = [_title(self._title, "up, down, Enter; Esc: none of them")]
        for n, (name, beside, _) in enumerate(shown, first):
            mark = ">" if n == self._at else " "
            style = "bold cyan" if n == self._at else ""
            row = output.styled("").append(f" {mark} {n + 1 if n < 9 else ' '} ", style or "dim")
            row.append(output.one_line(name), style)
            padding = " " * (names - output.styled(name).cell_len)
            rows.append(row.append(f"{padding}  {output.one_line(beside)}", "dim"))
        if len(self._options) > _SHOWN:
            rows[0].append(f"  ({self._at + 1} of {len(self._options)})", "dim")
        return rows


class Line:
    """A line of text that can be edited; `wrong(text)` says why it cannot be taken, "" where it can."""

    def __init__(self, title: str, text: str, wrong: Callable[[str], str]) -> None:
        self.answer: str | None = None
        self._title, self._text, self._wrong = title, text, wrong
        self._at = len(text)
        self._error = ""

    def press(self, key: str) -> bool:
        text, at = self._text, self._at
        self._error = ""
        match key:
            case "<enter>":
                self._error = self._wrong(text)
                self.answer = None if self._error else text
                return not self._error
            case "<esc>":
                return True
            case "<left>" | "<right>":
                self._at = min(max(at + (1 if key == "<right>" else -1), 0), len(text))
            case "<home>" | "<end>":
                self._at = 0 if key == "<home>" else len(text)
            case "<backspace>":
                self._edit(max(at - 1, 0), at)
            case "<delete>":
                self._edit(at, at + 1)
            case "<clear>":
                self._edit(0, at)
            case "<cut>":
                self._edit(at, len(text))
            case "<word>":
                self._edit(text[:at].rstrip().rfind(" ") + 1, at)
            case _ if key[0] != "<" or len(key) == 1:
                self._edit(at, at, key)
        return False

    def _edit(self, begin: int, end: int, text: str = "") -> None:
        self._text = self._text[:begin] + text + self._text[end:]
        self._at = begin + len(text)

    def rows(self, width: int) -> "list[Text]":
        title = _title(self._title, "Enter; Esc: leave it; Ctrl-U: empty it")
        rows, row_of_cursor = [output.styled("   ")], 0
        for n, letter in enumerate(self._text + " "):
            if rows[-1].cell_len + output.styled(letter).cell_len >= width:
                rows.append(output.styled("   "))
            rows[-1].append(letter if letter.isprintable() else "?", "reverse" if n == self._at else "")
            row_of_cursor = len(rows) - 1 if n == self._at else row_of_cursor
        first = max(row_of_cursor - _SHOWN + 1, 0)
        error = [output.styled(f"   {output.one_line(self._error)}", "red")] if self._error else []
        return [title, *rows[first : first + _SHOWN], *error]


def _title(words: str, keys: str) -> "Text":
    return output.styled(" ").append(output.one_line(words), "bold").append(f"  {keys}", "dim")
