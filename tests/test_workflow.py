"""What an app calls: workflows declared, enqueue and signal in all their forms, with nothing else running."""

import asyncio
import functools
import inspect
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from declared import Order, declared

from tako_runtime import Backoff, Step, Workflow, workflow
from tako_runtime.clock import SECOND
from tako_runtime.errors import (
    DuplicateWorkflow,
    InvalidValue,
    NotCarried,
)

pytestmark = pytest.mark.usefixtures("clean_registry")


# --- declaring -------------------------------------------------------------------------------------------------------


def test_a_workflow_is_called_as_the_plain_function_that_it_is() -> None:
    @workflow("double")
    def double(payload: int, step: Step) -> int:
        """Twice as much."""
        return payload * 2

    @workflow("treble")
    async def treble(step: Step, /) -> int:
        return 3

    nobody: Any = None
    assert double(21, nobody) == 42
    assert asyncio.run(treble(nobody)) == 3
    assert (double.blocking, treble.blocking) == (True, False)
    assert (double.__doc__, double.__name__, double.__module__) == ("Twice as much.", "double", __name__)
    assert list(inspect.signature(double).parameters) == ["payload", "step"]
    assert repr(double) == "<workflow 'double'>"


def test_a_workflow_has_what_was_declared_and_else_the_documented_values(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    plain = declared("plain")
    assert (plain.retries, plain.backoff, plain.group, plain.timeout) == (2, Backoff("1s", "1h"), "default", None)
    assert (plain.schedule, plain.timezone, plain.catchup, plain.overlap) == (None, None, "latest", "allow")
    told = declared("told", retries=4, backoff=Backoff("5s"), group="media", timeout="2m")
    assert (told.retries, told.backoff, told.group, told.timeout) == (4, Backoff("5s"), "media", 120 * SECOND)
    assert clean_registry == {"plain": plain, "told": told}


def test_a_handler_may_do_without_a_payload() -> None:
    @workflow("alone")
    async def alone(step: Step) -> None: ...

    @workflow("untyped")
    async def untyped(payload, step): ...

    assert (alone.takes_payload, untyped.takes_payload, untyped.payload_type) == (False, True, Any)
    assert declared().payload_type is Order


def test_a_handlers_payload_type_is_found_though_another_annotation_cannot_be() -> None:
    @workflow("typed")
    async def typed(payload: "Order", step: "OnlyForTheTypeChecker") -> None: ...  # noqa: F821

    assert typed.payload_type is Order


def test_a_workflow_may_refer_to_itself_and_to_what_is_declared_after_it() -> None:
    @workflow("first")
    async def first(payload: Order, step: Step) -> None:
        await first.enqueue(payload)
        await second.enqueue(payload)

    @workflow("second")
    async def second(payload: Order, step: Step) -> None: ...

    assert first.payload_type is Order


@pytest.mark.parametrize("name", ["fulfill-order", "a", "x" * 100, "v2.1_b", "Über"])
def test_letters_digits_and_a_few_marks_make_a_name(name: str) -> None:
    assert declared(name).name == name


@pytest.mark.parametrize("group", ["email", "a", "x" * 63, "gpu-2"])
def test_a_group_is_named_as_tako_toml_can_name_it(group: str) -> None:
    assert declared("in-a-group", group=group).group == group


@pytest.mark.parametrize("name", ["", "x" * 101, "two words", "a/b", "a#2", "a:b", "'", "a\n", None, 7, b"x"])
def test_what_is_no_name_is_refused(name: Any, clean_registry: dict[str, Workflow[..., object]]) -> None:
    with pytest.raises(InvalidValue, match="name"):
        declared(name)
    with pytest.raises(InvalidValue, match="group of 'x'"):
        declared("x", group=name)
    with pytest.raises(InvalidValue, match="group of 'x'"):
        declared("x", group="bulk_mail")
    assert clean_registry == {}


def test_a_decorator_without_its_name_says_how_to_write_it() -> None:
    with pytest.raises(InvalidValue) as caught:
        workflow(lambda step: None)  # type: ignore[arg-type]
    assert '@workflow("' in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"retries": -1}, {"retries": 1.5}, {"retries": True}, {"retries": None}, {"retries": 10**9},
        {"timeout": 0}, {"timeout": -1}, {"timeout": math.nan}, {"timeout": "soon"}, {"backoff": 3}, {"backoff": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_where_they_are_declared(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=f"{next(iter(fields))} of 'fulfill-order'"):
        declared(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schedule": 15}, "schedule of 'fulfill-order' is text, not 15"),
        ({"schedule": "@daily", "timezone": 2}, "timezone of 'fulfill-order' is text, not 2"),
        ({"catchup": "lates"}, "catchup of 'fulfill-order' is 'latest' or 'skip', not 'lates'"),
        ({"overlap": "skp"}, "overlap of 'fulfill-order' is 'allow' or 'skip', not 'skp'"),
        ({"timezone": "Europe/Berlin"}, "'fulfill-order' has a timezone and no schedule"),
        ({"schedule": "@daily"}, "'fulfill-order' is started by a schedule, which has no payload to give: Expected"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_cannot_be_meant_is_refused_where_it_is_declared(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        declared(**fields)
    assert str(caught.value).startswith(says)


def test_a_handler_that_can_do_without_a_payload_can_be_scheduled(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    def alone(step: Step) -> None: ...

    def maybe(payload: Order | None, step: Step) -> None: ...

    def anything(payload, step) -> None: ...  # type: ignore[no-untyped-def]

    for n, handler in enumerate((alone, maybe, anything)):
        flow = workflow(f"scheduled-{n}", schedule="@daily", timezone="Asia/Tokyo", catchup="skip")(handler)
        assert (flow.schedule, flow.timezone, flow.catchup, flow.overlap) == ("@daily", "Asia/Tokyo", "skip", "allow")
    assert len(clean_registry) == 3


def nothing() -> None: ...
def too_much(payload: Order, step: Step, more: int) -> None: ...


@pytest.mark.parametrize("handler", [nothing, too_much])
def test_a_handler_that_takes_something_else_is_refused(handler: Callable[..., None]) -> None:
    with pytest.raises(InvalidValue) as caught:
        workflow("odd")(handler)
    assert "(payload, step)" in caught.value.hint


def test_a_payload_type_that_nothing_can_be_read_into_is_refused_where_it_is_declared() -> None:
    with pytest.raises(NotCarried, match="cannot be read back"):

        @workflow("odd")
        async def odd(payload: asyncio.Event, step: Step) -> None: ...


def yields(payload: Order, step: Step) -> Iterator[int]:
    yield 1


async def yields_async(payload: Order, step: Step) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("handler", [yields, yields_async, functools.partial(yields)])
def test_a_handler_with_a_yield_in_it_is_refused_since_a_call_of_it_does_nothing(handler: Callable[..., Any]) -> None:
    with pytest.raises(InvalidValue, match="the handler of 'odd' is a generator"):
        workflow("odd")(handler)


FUTURE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Any
import datetime
from tako_runtime import Step, workflow
if TYPE_CHECKING:
    from elsewhere import Cart

def declare(name, wanted):
    async def handler(payload, step: Step): ...
    handler.__annotations__["payload"] = wanted
    return workflow(name)(handler)

def in_a_function():
    class Inner: ...
    async def handler(payload: Inner, step: Step): ...
    return workflow("inner")(handler)

@workflow("good")
async def good(payload: Above | None, step: Step): ...
"""


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("Ordr", "name 'Ordr' is not defined"),
        ("Cart", "name 'Cart' is not defined"),
        ("Below", "name 'Below' is not defined"),
        ("list[Ordr]", "name 'Ordr' is not defined"),
        ("datetime.dat", "no attribute 'dat'"),
        ("int |", "must be an expression"),
    ],
)
def test_a_payload_annotation_that_names_nothing_is_refused_where_it_is_declared(wanted: str, said: str) -> None:
    module: dict[str, Any] = {"Above": Order, "__name__": "flows"}
    exec(compile(FUTURE, "flows.py", "exec"), module)  # noqa: S102 -- a module with its own __future__
    assert module["good"].payload_type == Order | None
    with pytest.raises(InvalidValue) as caught:
        module["declare"]("odd", wanted)
    for part in ("'payload' in the handler of 'odd'", wanted, said):
        assert part in str(caught.value)
    assert "TYPE_CHECKING" in caught.value.hint
    with pytest.raises(InvalidValue, match="'Inner' is not defined"):
        module["in_a_function"]()
    module["Below"] = Order
    assert module["declare"]("now", "Below").payload_type is Order


def test_two_workflows_of_one_name_are_a_mistake_that_names_both_places(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    first = declared("twice")
    with pytest.raises(DuplicateWorkflow) as caught:

        @workflow("twice")
        async def another(step: Step) -> None: ...

    for place in (first.handler.__code__.co_filename, __file__):
        assert re.search(rf"{re.escape(place)}:\d+", str(caught.value)), place
    assert clean_registry == {"twice": first}


def test_the_same_function_imported_anew_takes_its_own_place(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    declared("again")
    again = declared("again")
    assert clean_registry == {"again": again}
