"""An exception <-> the text that is stored of it.

A failure is kept with its class, its message and the frames a user can do something about. A step that failed and whose
handler went on from there must fail the same way on replay, or the handler would take another branch: `rebuild` gives
the exception back as its own class, where that class is still there.
"""

import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime.errors import StepFailed

_HERE = str(Path(__file__).parent)


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is stored of an exception: `type` as people read it, `message`, `traceback` as text; the rest rebuilds
    it."""

    type: str
    message: str
    traceback: str = ""
    module: str = ""
    args: Any = None
    state: Any = None

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @property
    def line(self) -> str:
        """`ValueError: no such card`, on one line."""
        message = " ".join(self.message.split())
        return f"{self.type}: {message}" if message else self.type


def describe(error: BaseException) -> Failure:
    """What to store of `error`. Never raises, whatever `error` does when it is printed or encoded."""
    try:
        message = clean(str(error))
    except Exception as broken:  # noqa: BLE001 -- a user's __str__ may raise anything
        message = f"<no message: {type(broken).__name__} in __str__>"
    return Failure(
        type=type(error).__qualname__,
        message=message,
        traceback=clean(_traceback(error)),
        module=type(error).__module__,
        args=_carried(list(error.args)),
        state=_carried(vars(error) or None) if hasattr(error, "__dict__") else None,
    )


def read(text: str) -> Failure:
    """The failure of stored text; text that is not one any more is shown as it is."""
    try:
        return msgspec.json.decode(text, type=Failure)
    except msgspec.MsgspecError:
        return Failure(type="Unreadable", message=text)


def rebuild(failure: Failure) -> Exception:
    """The exception as its own class if it can be found and made without calling its `__init__`, else `StepFailed`."""
    found: Any = sys.modules.get(failure.module)
    for name in failure.type.split("."):
        found = getattr(found, name, None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            error = found.__new__(found)
            error.args = tuple(failure.args) if failure.args is not None else (failure.message,)
            vars(error).update(failure.state or {})
            return error
        except (TypeError, ValueError):
            pass
    return StepFailed(failure.line)


def clean(text: str) -> str:
    """Without lone surrogates (from undecodable file names, for instance), which no store takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _carried(value: Any) -> Any:
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except Exception:  # noqa: BLE001 -- a user's exception may hold anything; what cannot be kept is left out
        return None


def _traceback(error: BaseException) -> str:
    """The traceback without the frames of tako itself and of the event loop's machinery, which nobody can mend."""
    report = traceback.TracebackException.from_exception(error, compact=True)
    seen: list[traceback.TracebackException | None] = [report]
    while seen:
        part = seen.pop()
        if part is None:
            continue
        kept = [frame for frame in part.stack if not _machinery(frame.filename)]
        part.stack = traceback.StackSummary.from_list(kept)
        seen += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    return "".join(report.format()).rstrip()


def _machinery(filename: str) -> bool:
    return filename.startswith(_HERE) or filename.endswith(("/asyncio/tasks.py", "/concurrent/futures/thread.py"))
