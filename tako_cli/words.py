"""What people type, as values: times, payloads, lists of words."""

import sys
from pathlib import Path

import typer


def listed(words: list[str] | None) -> list[str]:
    """The words of an option that may be given several times, and have several words with commas."""
    return [word.strip() for given in words or () for word in given.split(",") if word.strip()]


def instant(text: str, option: str) -> int:
    """An instant: so long ago, or a date and time, the local one where it names no zone."""
    from datetime import datetime

    from tako_cli import wording
    from tako_runtime import clock
    from tako_runtime.errors import InvalidValue

    try:
        return clock.instant(datetime.fromisoformat(text).astimezone())
    except (ValueError, OverflowError):
        pass
    try:
        return max(0, wording.now() - clock.duration(text.removesuffix("ago").strip(), option))
    except InvalidValue:
        hint = "Write how long ago (90s, 2h, 3d), or a date and time: 2026-11-22T09:00, 2026-11-22T09:00Z."
        raise InvalidValue(f"{option} {text!r} names no time", hint=hint) from None


def payload(text: str) -> str:
    """The payload's JSON from where the option says."""
    from tako_runtime.errors import InvalidValue, NotFound

    words = text
    try:
        if text == "-":
            words = sys.stdin.read()
        elif text.startswith("@"):
            words = Path(text[1:]).expanduser().read_text("utf-8")
        words.encode()
    except FileNotFoundError:
        raise NotFound(f"no file {text[1:]}", hint="@FILE is looked up from the current folder.") from None
    except UnicodeError:
        raise InvalidValue(f"the payload {text!r:.80} is not text in UTF-8") from None
    return words


def name(text: str | None) -> str | None:
    """A name as it is; the bytes of a shell that are no text are none."""
    if text is not None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter(f"{text!r} is not text in UTF-8") from None
    return text
