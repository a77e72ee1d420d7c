"""An exception <-> the text that is stored of it.

A failure is kept with its class, its message and the frames a user can do something about. A step that failed and whose
handler went on from there must fail the same way on replay, or the handler would take another branch: `rebuild` gives
the exception back as its own class, where that class is still there.
"""

import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tako_runtime.errors import StepFailed
from tako_runtime.masking import masked, masked_json

#: What is kept of a message or a traceback, in characters.
LONGEST = 20_000

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


def describe(error: BaseException, what: str = "an error") -> Failure:
    """What to store of `error`. Never raises, whatever `error` does when it is looked at. `what` names it where a
    secret is masked in it."""
    message = _asked(lambda: clean(str(error), what))
    made_of: Any = _asked(lambda: error.__reduce__()[1] if _library_made(type(error)) else error.args)
    state: Any = _asked(lambda: {n: kept for n, v in vars(error).items() if (kept := _carried(v, what)) is not None})
    return Failure(
        type=type(error).__qualname__,
        message=f"<no message: {type(error).__qualname__} cannot be printed>" if message is None else message,
        traceback=clean(_traceback(error), what),
        module=type(error).__module__,
        args=_carried(list(made_of), what) if made_of is not None else None,
        state=state or None,
    )


def read(text: str) -> Failure:
    """The failure of stored text; text that is not one any more is shown as it is."""
    try:
        return msgspec.json.decode(text, type=Failure)
    except msgspec.MsgspecError:
        return Failure(type="Unreadable", message=text)


def rebuild(failure: Failure) -> Exception:
    """The exception as its own class, if it can be found and made without running the user's `__init__`; else
    `StepFailed` with the same words."""
    found: Any = sys.modules.get(failure.module)
    for name in failure.type.split("."):
        found = getattr(found, name, None)
    if isinstance(found, type) and issubclass(found, Exception):
        args = failure.args if failure.args is not None else (failure.message,)
        try:
            error: Exception = found.__new__(found, *args)
            if _library_made(found):
                error.__init__(*args)  # type: ignore[misc]
            else:
                error.args = tuple(args)
            vars(error).update(failure.state or {})
            return error
        except Exception:  # noqa: BLE001 -- a user's __new__ may ask for anything
            return StepFailed(failure.line)
    return StepFailed(failure.line)


def as_replayed(error: Exception, failure: Failure) -> Exception:
    """The exception of a step that has just failed, as it is rebuilt on each replay, so that what a handler makes of it
    is the same then. For people it keeps what it came from, and where."""
    again = rebuild(failure).with_traceback(error.__traceback__)
    again.__cause__ = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return again


def clean(text: str, what: str = "an error") -> str:
    """Without lone surrogates (from undecodable file names, for instance), which no store takes, and without the value
    of a secret; the middle of what is very long is left out."""
    text = masked(text.encode("utf-8", "backslashreplace").decode(), what)
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n[... {len(text) - LONGEST:,} characters left out ...]\n{text[-half:]}"
    return text


def _library_made(kind: type) -> bool:
    """Whether `__init__` is the interpreter's own, which only fills in fields (an OSError's errno and filename)."""
    return isinstance(kind.__init__, types.WrapperDescriptorType)  # type: ignore[misc]


def _asked(question: Callable[[], Any]) -> Any:
    """The answer, or None where an exception of the user's does not like to be asked."""
    try:
        return question()
    except BaseException:  # noqa: BLE001 -- even a SystemExit in a __str__
        return None


def _carried(value: Any, what: str) -> Any:
    try:
        data = masked_json(msgspec.json.encode(value), what)
        return msgspec.json.decode(data) if len(data) <= LONGEST else None
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
