"""The only module that writes to the terminal.

What a command was asked for (a table, a document, a log) goes to stdout; what it says beside that (notes, questions,
errors) to stderr. Colour and width are those of the terminal: `NO_COLOR`, `TERM` and `COLUMNS` are heeded, and into a
file or a pipe goes plain text, its lines as long as they need to be.

At a terminal a log may have a foot (`foot`): lines that stay below all that is written. The cursor rests where the foot
begins, so one erase takes it away, whatever the terminal made of it when its size changed.
"""

import io
import json
import os
import re
import sys
import threading
from functools import cache
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from rich.console import Console, RenderableType
    from rich.style import StyleType
    from rich.text import Text

#: So wide that nothing is cut where nobody has said how wide it may be.
_BOUNDLESS = 10_000

#: Between two columns of a table, and what a column must have room for.
_GAP = 2
_LEAST = 8

#: Takes away what is below the cursor; the lines of a foot are cut off at the edge, and not continued.
_ERASE, _CUT, _WRAP = "\r\x1b[J", "\x1b[?7l", "\x1b[?7h"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def prepare() -> None:
    """Neither a stream that the caller has closed nor a character that the terminal's encoding lacks must end a
    command; and no file that it opens may get a standard stream's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 -- for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]  # 0 is what some terminals say that do not know: nothing at all would be shown


def flush() -> bool:
    """Send what is buffered; False where nobody takes it any more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return False
    return True


def stdout_is_terminal() -> bool:
    return sys.stdout.isatty()


def can_ask() -> bool:
    """Whether there is a person to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def can_show(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def ellipsis() -> str:
    """What stands for the rest of what was cut short."""
    return "…" if can_show("…") else "~"


def clean(text: str) -> str:
    """Text that came from outside, without what would steer the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


# --- stdout ----------------------------------------------------------------------------------------------------------


def text(words: str) -> None:
    """Words as they are."""
    _write(sys.stdout, words.rstrip("\n") + "\n" if words else "")


def document(value: Any) -> None:
    """The one JSON document of a command with `--json`."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not unicode, default=str) + "\n")
    sys.stdout.flush()


def json_line(value: dict[str, Any]) -> None:
    """One JSON object of a log, on its own line, at once."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")
    sys.stdout.flush()


def show(*parts: "RenderableType") -> None:
    """Tables and texts for people, on stdout."""
    _print(sys.stdout, *parts)


def foot(lines: "Sequence[Text]") -> None:
    """Keep these lines below all that is written, in place of those before; none: no foot. For a terminal only."""
    with _foot.lock:
        _foot.lines = list(lines)
        fresh = _below()
        if fresh != _foot.shown:
            sys.stdout.write((_ERASE if _foot.shown else "") + fresh)
            sys.stdout.flush()
            _foot.shown = fresh


def redraw() -> None:
    """The terminal has another size: draw the foot anew."""
    with _foot.lock:
        if _foot.shown:
            _foot.shown = _below()
            sys.stdout.write(_ERASE + _foot.shown)
            sys.stdout.flush()


def steer(codes: str) -> None:
    """Codes for the terminal itself: its cursor, how it pastes."""
    sys.stdout.write(codes)
    sys.stdout.flush()


def be_plain() -> None:
    """From now on stdout gets what a file would: no colour, no lines cut or broken."""
    _plain.add(sys.stdout)
    _console.cache_clear()


def width() -> int:
    """How wide a line on stdout may be."""
    return _console(sys.stdout).width


# --- stderr ----------------------------------------------------------------------------------------------------------


def passing(words: str) -> None:
    """What goes on right now, at a terminal only: the next thing that is said takes its place."""
    if sys.stderr.isatty():
        room = _console(sys.stderr).width - 1
        sys.stderr.write(f"\r\x1b[K{clean(words).splitlines()[0][:room] if words else ''}")
        sys.stderr.flush()


def note(words: str) -> None:
    """Something worth knowing beside the result."""
    _print(sys.stderr, styled(clean(words), "dim"))


def lines(said: "Sequence[str]") -> None:
    """Lines of a process elsewhere, as they are."""
    _print(sys.stderr, *(styled(f"  {clean(line)}") for line in said))


def error(message: str, hint: str = "") -> None:
    """What went wrong, and what to do next."""
    first = styled("error: ", "bold red").append(clean(message), "default not bold")
    _print(sys.stderr, *([first, styled(clean(hint), "yellow")] if hint else [first]))


def traceback(error: BaseException) -> None:
    import traceback as reports

    _write(sys.stderr, "".join(reports.format_exception(error)))


def confirm(question: str) -> bool:
    """A yes or a no from the person at the terminal."""
    import typer

    return typer.confirm(clean(question), err=True)


def ask_hidden(question: str) -> str:
    """An answer from the person at the terminal, which it does not show."""
    import typer

    return str(typer.prompt(clean(question), hide_input=True, err=True, default="", show_default=False))


# --- rich ------------------------------------------------------------------------------------------------------------


def styled(words: str, style: "StyleType" = "") -> "Text":
    from rich.text import Text

    return Text(words, style)


def one_line(words: str) -> str:
    """Text from outside as one line."""
    return clean(" ".join(words.split()))


def table(
    headings: "Sequence[str]",
    rows: "Sequence[Sequence[str | Text]]",
    *,
    flexible: "Sequence[int]" = (),
    right: "Collection[int]" = (),
) -> "list[Text]":
    """A table without lines; no headings, no line of them. Where it is too wide for the terminal, the flexible columns
    (by number, the first one first) are cut short; one without a heading is left out before it says nothing."""
    from rich.text import Text

    grid = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    if any(headings):
        grid.insert(0, [Text(heading, "dim") for heading in headings])
    widths = [max((row[i].cell_len for row in grid), default=0) for i in range(len(headings))]
    for i in flexible:
        excess = sum(widths) + _GAP * (sum(map(bool, widths)) - 1) - width()
        if excess > 0:
            least = max(_LEAST, len(headings[i]))
            fits = widths[i] - excess >= least
            widths[i] = widths[i] - excess if fits else min(widths[i], least) if headings[i] else 0
    return [_row(row, widths, right) for row in grid]


def _row(cells: "Sequence[Text]", widths: "Sequence[int]", right: "Collection[int]") -> "Text":
    line = styled("")
    for i, (cell, room) in enumerate(zip(cells, widths, strict=True)):
        if room:
            cell.truncate(room, overflow="ellipsis" if can_show("…") else "crop")
            padding = " " * (room - cell.cell_len)
            line.append(" " * _GAP if line else "").append(padding if i in right else "").append_text(cell)
            line.append("" if i in right else padding)
    line.rstrip()
    return line


#: Streams that are written to as if they were files, though they are a terminal's.
_plain: set[IO[str]] = set()


@cache
def _console(stream: IO[str]) -> "Console":
    from rich.console import Console

    terminal = stream.isatty() and stream not in _plain
    fixed = None if terminal or os.environ.get("COLUMNS", "").isdigit() else _BOUNDLESS
    coloured = None if terminal else False
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=fixed, force_terminal=coloured)


def _print(stream: IO[str], *parts: "RenderableType") -> None:
    """Written by us and not by rich, which ends the process where a pipe is closed."""
    _write(stream, _rendered(stream, *parts))


def _rendered(stream: IO[str], *parts: "RenderableType") -> str:
    console = _console(stream)
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    return captured.get()


class _Below:
    """What stays below, and how it was drawn last ("": it is away)."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.lines: list[Text] = []
        self.shown = ""


_foot = _Below()


def _write(stream: IO[str], text: str) -> None:
    """One write takes the foot away, adds the text and draws the foot again: nothing comes in between."""
    with _foot.lock:
        if not _foot.shown:
            stream.write(text)
            stream.flush()
            return
        if stream is not sys.stdout:  # stderr is the same terminal
            sys.stdout.write(_ERASE)
            sys.stdout.flush()
            stream.write(text)
            stream.flush()
            text = ""
        _foot.shown = _below()
        sys.stdout.write((_ERASE + text if text else "") + _foot.shown)
        sys.stdout.flush()


def _below() -> str:
    """The foot, drawn from where the cursor is, which ends up there again."""
    if not _foot.lines:
        return ""
    console = _console(sys.stdout)
    lines = [line.copy() for line in _foot.lines[-max(console.height - 1, 1) :]]
    for line in lines:
        line.truncate(console.width, overflow="ellipsis" if can_show("…") else "crop")
    rows = _rendered(sys.stdout, *lines).rstrip("\n").split("\n")
    up = f"\x1b[{len(rows) - 1}A" if len(rows) > 1 else ""
    return _CUT + "\n".join(rows) + up + "\r" + _WRAP
