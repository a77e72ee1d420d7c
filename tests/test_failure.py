"""An exception goes into the store and comes back as its own class, so that a replay takes the same branch."""

import asyncio
import errno
import json
import subprocess
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tako_runtime import failure
from tako_runtime.errors import StepFailed, StepTimeout, TakoError
from tako_runtime.failure import Failure


class CardDeclined(Exception):
    """Made from other arguments than those it stores, and with attributes that a handler looks at."""

    def __init__(self, code: str, *, amount: int) -> None:
        super().__init__(f"declined: {code}")
        self.code, self.amount = code, amount


class Outer:
    class Inner(ValueError):
        pass


class Answered(Exception):
    """As HTTP libraries make them: a number that matters beside a connection that cannot be stored."""

    def __init__(self, status: int) -> None:
        super().__init__(f"answered {status}")
        self.status, self.connection = status, object()


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class QuitsInStr(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class HidesItsDict(Exception):
    @property
    def __dict__(self) -> Any:
        raise RuntimeError("none of your business")


class NeedsMore(Exception):
    def __new__(cls, *parts: object) -> "NeedsMore":
        assert len(parts) == 2, "two, please"
        return super().__new__(cls, *parts)


class LooksItUp(Exception):
    """Its `__new__` fails with something else than a TypeError when it is called without arguments."""

    def __new__(cls, *codes: str) -> "LooksItUp":
        return super().__new__(cls, {"E1": "first", "": codes[0]}[codes[0]])


def stored(error: BaseException) -> Failure:
    """What the store gives back of it."""
    return failure.read(failure.describe(error).text())


def raised(error: BaseException) -> BaseException:
    """The same exception, having been raised from a function."""

    def charge() -> None:
        raise error

    try:
        charge()
    except BaseException as caught:
        return caught
    raise AssertionError


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such card"), ValueError(), ValueError("a", 1, None), KeyError("key"), Outer.Inner("deep"),
        CardDeclined("stolen", amount=5), StepTimeout("too slow", hint="Be quicker."), TakoError("odd"),
        AssertionError(), StopIteration(3), TimeoutError("slow"),
    ],
    ids=repr,
)  # fmt: skip
def test_an_exception_comes_back_as_its_own_class_with_its_message_and_attributes(error: Exception) -> None:
    again = failure.rebuild(stored(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (FileNotFoundError(errno.ENOENT, "no such file", "a.txt"), ("errno", "strerror", "filename")),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ("errno", "strerror")),
        (subprocess.CalledProcessError(7, ["ls", "-l"]), ("returncode", "cmd")),
        (json.JSONDecodeError("bad", "{", 1), ("msg", "doc", "pos", "lineno")),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_handlers_ask_an_exception_of_the_library_for_is_there_on_replay(
    error: Exception, attributes: tuple[str, ...]
) -> None:
    again = failure.rebuild(stored(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert [getattr(again, name) for name in attributes] == [getattr(error, name) for name in attributes]


def test_an_attribute_that_cannot_be_stored_does_not_take_the_others_with_it() -> None:
    again = failure.rebuild(stored(Answered(404)))
    assert type(again) is Answered
    assert again.status == 404


def test_an_exception_whose_arguments_cannot_be_stored_keeps_its_class_and_message() -> None:
    again = failure.rebuild(stored(ValueError(object)))
    assert type(again) is ValueError
    assert str(again) == str(object)


@pytest.mark.parametrize(
    "gone",
    [
        Failure("Vanished", "m", module=__name__),
        Failure("Vanished", "m", module="no.such.module"),
        Failure("Outer.Vanished", "m", module=__name__),
        Failure("stored", "m", module=__name__),
        Failure("SystemExit", "m", module="builtins"),
        Failure("Failed", "m"),
    ],
    ids=lambda gone: f"{gone.module}:{gone.type}",
)
def test_a_failure_whose_class_is_not_there_as_an_exception_comes_back_as_step_failed(gone: Failure) -> None:
    again = failure.rebuild(gone)
    assert type(again) is StepFailed
    assert str(again) == f"{gone.type}: m"


@pytest.mark.parametrize(
    "error", [NeedsMore(1, 2), LooksItUp("E1"), ExceptionGroup("several", [ValueError("a")])], ids=repr
)
def test_a_class_that_cannot_be_made_without_its_arguments_comes_back_with_the_same_words(error: Exception) -> None:
    again = failure.rebuild(stored(error))
    assert isinstance(again, type(error) | StepFailed)
    assert str(error) in str(again)


# --- describing never fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Unprintable(1), QuitsInStr(), HidesItsDict("x")], ids=lambda e: type(e).__name__)
def test_an_exception_that_cannot_be_looked_at_is_described_all_the_same(error: Exception) -> None:
    described = stored(raised(error))
    assert described.type == type(error).__name__
    assert "charge" in described.traceback


@given(st.lists(st.text() | st.binary() | st.integers() | st.floats() | st.builds(object) | st.just(10**400)))
def test_whatever_the_arguments_a_failure_is_stored_and_read_back(arguments: list[Any]) -> None:
    described = failure.describe(ValueError(*arguments))
    assert failure.read(described.text()) == described
    described.text().encode()
    assert type(failure.rebuild(described)) is ValueError


def test_a_message_with_a_lone_surrogate_is_stored_escaped() -> None:
    assert stored(OSError("caf\udce9")).message == "caf\\udce9"


def test_exceptions_that_cause_each_other_in_a_circle_are_described() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert "one" in stored(one).traceback


def test_text_that_is_no_failure_any_more_is_shown_as_it_is() -> None:
    for text in ("", "{", '{"a":1}', "null", "the disk caught fire"):
        assert failure.read(text) == Failure("Unreadable", text)


def test_a_failure_is_one_line_where_one_line_is_wanted() -> None:
    assert failure.describe(ValueError("no\n such\t card ")).line == "ValueError: no such card"
    assert failure.describe(ValueError()).line == "ValueError"
    assert failure.describe(Outer.Inner("x")).line == "Outer.Inner: x"


# --- the traceback ---------------------------------------------------------------------------------------------------


def through_tako(error: Exception) -> Exception:
    """The exception as it looks after it has passed through frames of tako and of the event loop."""
    from tako_runtime.state import Backoff

    class Raises(str):
        def strip(self, *_: Any) -> str:
            raise error

    async def step() -> None:
        await asyncio.to_thread(Backoff, base=Raises("1s"))

    try:
        asyncio.run(step())
    except Exception as caught:
        return caught
    raise AssertionError


def test_the_traceback_shows_the_users_frames_and_none_of_tako_or_the_machinery() -> None:
    error = through_tako(ValueError("no such card"))
    passed = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    assert any("tako_runtime" in name for name in passed)
    assert any("concurrent/futures" in name for name in passed)
    shown = stored(error).traceback
    assert "in strip" in shown
    assert "in step" in shown
    assert shown.endswith("ValueError: no such card")
    assert "tako_runtime" not in shown
    assert "concurrent/futures" not in shown


def test_causes_contexts_and_the_members_of_a_group_are_shown_without_tako_too() -> None:
    cause = through_tako(KeyError("cause"))
    member = through_tako(IndexError("member"))
    context = through_tako(OSError("context"))
    group = ExceptionGroup("several", [member, ValueError("other")])
    group.__cause__ = cause
    member.__context__ = context
    shown = stored(raised(group)).traceback
    for word in ("several", "KeyError: 'cause'", "IndexError: member", "ValueError: other", "OSError: context"):
        assert word in shown
    assert "tako_runtime" not in shown


def test_a_deep_recursion_is_described_in_a_few_lines() -> None:
    def dig() -> None:
        dig()

    try:
        dig()
    except RecursionError as error:
        shown = stored(error).traceback
    assert "in dig" in shown
    assert len(shown.splitlines()) < 30


def test_of_a_very_long_message_the_middle_is_left_out() -> None:
    error = ValueError("begin" + "x" * 10_000_000 + "end")
    described = failure.describe(error)
    assert described.message.startswith("begin")
    assert described.message.endswith("end")
    assert "characters left out" in described.message
    assert len(described.text()) < 10 * failure.LONGEST
    assert str(failure.rebuild(described)) == described.message
