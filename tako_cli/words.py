"""What people type, as values: times, payloads, lists of words."""

import sys
from pathlib import Path


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

    try:
        if text == "-":
            return sys.stdin.read()
        if text.startswith("@"):
            return Path(text[1:]).expanduser().read_text("utf-8")
    except FileNotFoundError:
        raise NotFound(f"no file {text[1:]}", hint="@FILE is looked up from the current folder.") from None
    except UnicodeDecodeError:
        raise InvalidValue(f"the payload {text} is not text in UTF-8") from None
    return text
