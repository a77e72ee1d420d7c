"""How times, states and errors read to a person. Values in, words out.

Times of day are the local ones of whoever reads. `now` is an instant in microseconds, as everywhere.
"""

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tako_cli import output
from tako_runtime import clock

if TYPE_CHECKING:
    from rich.text import Text

Json = dict[str, Any]

STYLES = {
    "succeeded": "green", "done": "green", "running": "cyan", "queued": "", "retrying": "yellow", "sleeping": "blue",
    "waiting": "magenta", "cancelled": "bright_black", "timed_out": "yellow", "dead": "bold red", "failed": "red",
    "lost": "red",
}  # fmt: skip

#: Mark of a step's state, and what stands for it where the terminal's encoding has no such character.
_MARKS = {"done": ("✓", "+"), "failed": ("✗", "x"), "timed_out": ("✗", "x")}
_UNDER_WAY = ("•", "*")

_LONGEST_TRACEBACK = 16  # lines
_HEADING = "Traceback (most recent call last):"
_FRAME = '  File "'


def status(word: str) -> "Text":
    return output.styled(word.replace("_", " "), STYLES.get(word, ""))


def named(name: str, local: bool, server: str | None = None) -> str:
    """The name of a workflow or a group, and whether that is local, and where: "warm-cache (local, web-1)"."""
    said = [word for word in ("local" if local else "", server) if word]
    return f"{name} ({', '.join(said)})" if said else name


def state(run: Json) -> str:
    """One word for where a run stands: its status, or why it is pending."""
    return str(run["reason"] if run["status"] == "pending" else run["status"])


def mark(state: str) -> "Text":
    pair = _MARKS.get(state, _UNDER_WAY)
    return output.styled(pair[0] if output.can_show(pair[0]) else pair[1], STYLES.get(state, ""))


def why(run: Json, now: int) -> str:
    """What there is to say of a run beside its state: until when it is parked, what it died of."""
    due = micros(run["run_at"])
    ahead = "" if due is None or due <= now else clock.spell(_round(due - now))
    match state(run):
        case "sleeping":
            return f"wakes in {ahead}" if ahead else "wakes now"
        case "waiting":
            return f"times out in {ahead}" if ahead else "for a signal" if due is None else "timing out"
        case "retrying":
            error = error_line(run["error"])
            return f"again {'in ' + ahead if ahead else 'now'}: {error}" if error else f"again in {ahead}"
        case "queued":
            return f"due in {ahead}" if ahead else ""
        case "running":
            return f"is being cancelled: {run['cancelling']}" if run["cancelling"] else ""
        case "dead" | "cancelled":
            return str(run["reason"])
    return ""


def error_line(error: Json | None) -> str:
    if not error:
        return ""
    message = " ".join(str(error["message"]).split())
    return f"{error['type']}: {message}" if message else str(error["type"])


def frames(traceback: str, root: Path, *, whole: bool = False) -> list[str]:
    """The lines of a stored traceback, files relative to `root`. Unless it is wanted `whole`, the frames are those of
    the project's own code, if there are any, and what is long is cut to its end, which is where it happened."""
    lines = traceback.replace(f'File "{root}/', 'File "').splitlines()
    if whole:
        return lines
    lines = _own([line for line in lines if line != _HEADING and line.strip(" ^~")])
    if len(lines) > _LONGEST_TRACEBACK:
        lines = [f"  ... {len(lines) - _LONGEST_TRACEBACK} lines more", *lines[-_LONGEST_TRACEBACK:]]
    return lines


def _own(lines: list[str]) -> list[str]:
    """Without the frames of libraries and of the interpreter, where there are others."""
    kept: list[str] = []
    left_out, within = 0, False
    for line in lines:
        if line.startswith(_FRAME):
            within = line.startswith((f"{_FRAME}/", f"{_FRAME}<")) or "/site-packages/" in line
            left_out += within
        within = within and line.startswith("  ")
        if not within:
            kept.append(line)
    return kept if any(line.startswith(_FRAME) for line in kept) or not left_out else lines


def now() -> int:
    return clock.SystemClock().now()


def micros(iso: str | None) -> int | None:
    """The instant of a time in a run's JSON."""
    return None if iso is None else clock.instant(datetime.fromisoformat(iso))


def at(iso: str | None, now: int) -> str:
    """A time of day, with its date unless that is today's."""
    instant = micros(iso)
    if instant is None:
        return ""
    local, today = clock.moment(instant).astimezone(), clock.moment(now).astimezone()
    return local.strftime("%H:%M:%S" if local.date() == today.date() else "%Y-%m-%d %H:%M:%S")


_TIME = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def with_local_times(text: str, now: int, *, distances: bool = True) -> str:
    """A sentence of the runtime's, whose times are UTC, as it reads here."""
    return _TIME.sub(
        lambda found: f"{at(found[0], now)} ({distance(found[0], now)})" if distances else at(found[0], now), text
    )


def distance(iso: str | None, now: int) -> str:
    """How long ago, or how far ahead."""
    instant = micros(iso)
    if instant is None:
        return ""
    return f"in {clock.spell(_round(instant - now))}" if instant > now else f"{age(iso, now)} ago"


def age(iso: str | None, now: int) -> str:
    """How long ago, in one unit."""
    since = max(0, now - (micros(iso) or now))
    for unit, size in (("d", clock.DAY), ("h", clock.HOUR), ("m", clock.MINUTE)):
        if since >= size:
            return f"{since // size}{unit}"
    return f"{since // clock.SECOND}s"


def took(start: str | None, end: str | None) -> str:
    """The time from one to the other."""
    first, last = micros(start), micros(end)
    return "" if first is None or last is None else clock.spell(max(0, last - first))


def _round(duration: int) -> int:
    """Whole seconds where nobody wants more."""
    return max(duration // clock.SECOND, 1) * clock.SECOND if duration >= 10 * clock.SECOND else duration
