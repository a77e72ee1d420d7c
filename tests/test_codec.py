"""Values through the store: what a step returns on its first pass is what it returns on every replay, type and all."""

import asyncio
import collections
import datetime as dt
import functools
import math
import pathlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Never, NoReturn
from uuid import uuid4

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from values import VALUES, Box, Card, Colour, Customer, Money, Page, Parcel, Point, money, number, order, same, text

from tako_runtime import codec
from tako_runtime.errors import NotCarried, PayloadRefused, TooLarge, Unreadable

# --- the round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotation", VALUES, ids=str)
def test_a_typed_value_comes_back_the_same_on_the_first_pass_and_on_replay(annotation: Any) -> None:
    @given(VALUES[annotation])
    def carried(value: Any) -> None:
        stored, now = codec.carry(value, annotation, "step 'one'")
        replayed = codec.decode(stored, annotation)
        assert same(now, replayed)
        assert same(now, value)

    carried()


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@given(json_data | st.tuples(json_data) | st.sets(st.integers()) | st.dictionaries(st.integers(), text) | order | money)
def test_without_an_annotation_the_first_pass_gives_the_same_plain_data_as_a_replay(value: Any) -> None:
    stored, now = codec.carry(value, Any, "step 'one'")
    assert same(now, codec.decode(stored, Any))
    assert same(codec.decode(codec.encode(now, "again"), Any), now)


@given(json_data)
def test_plain_data_comes_back_as_it_is(value: Any) -> None:
    assert same(codec.carry(value, Any, "step 'one'")[1], value)


def test_text_and_bytes_are_both_read() -> None:
    assert codec.decode(b'"\xc3\xa9"', str) == codec.decode('"é"', str) == "é"


def test_a_value_may_be_narrower_than_its_annotation_on_both_passes() -> None:
    class Base(pydantic.BaseModel):
        a: int

    class Sub(Base):
        b: int = 2

    stored, now = codec.carry(Sub(a=1), Base, "step 'one'")
    assert same(now, Base(a=1))
    assert same(now, codec.decode(stored, Base))
    stored, now = codec.carry(1, float, "step 'one'")
    assert same(now, 1.0)
    assert same(now, codec.decode(stored, float))


# --- pydantic --------------------------------------------------------------------------------------------------------


def test_a_pydantic_model_with_aliases_comes_back() -> None:
    class Camel(pydantic.BaseModel):
        first_name: str = pydantic.Field(alias="firstName")

    stored, now = codec.carry(Camel(firstName="Ada"), Camel, "step 'one'")
    assert same(now, Camel(firstName="Ada"))
    assert same(now, codec.decode(stored, Camel))


def test_a_strict_pydantic_model_with_a_computed_field_comes_back() -> None:
    class Square(pydantic.BaseModel, extra="forbid"):
        side: int

        @pydantic.computed_field
        @property
        def area(self) -> int:
            return self.side**2

    assert same(codec.carry(Square(side=3), Square, "step 'one'")[1], Square(side=3))


def test_a_pydantic_model_inside_a_dataclass_in_a_list_names_the_place_of_a_misfit() -> None:
    @dataclass
    class Crowd:
        people: list[Customer]

    someone = {"id": str(uuid4()), "since": "2026-01-01", "limit": "1"}
    with pytest.raises(PayloadRefused) as caught:
        codec.payload_text({"people": [someone, {**someone, "since": "never"}]}, Crowd, "greet")
    assert "$.people[1]" in str(caught.value)
    assert "since" in str(caught.value)


def test_a_field_that_hides_its_value_is_refused_rather_than_stored_as_stars() -> None:
    class Login(pydantic.BaseModel):
        password: pydantic.SecretStr

    with pytest.raises(NotCarried, match="step 'login'"):
        codec.carry(Login(password=pydantic.SecretStr("hunter2")), Login, "step 'login'")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        object(),
        threading.Lock(),
        pathlib.Path("here"),
        lambda: 1,
        ValueError("x"),
        1j,
        range(3),
        collections.deque([1]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_value_that_cannot_be_stored_is_refused_with_the_step_and_the_type(value: object) -> None:
    for nested in (value, [value], {"deep": {"down": (value,)}}):
        with pytest.raises(NotCarried) as caught:
            codec.carry(nested, Any, "step 'charge'")
        assert "step 'charge'" in str(caught.value)
        assert type(value).__name__ in str(caught.value)
        assert "plain data" in caught.value.hint


def test_a_value_within_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(NotCarried, match="step 'charge'"):
        codec.carry(loop, Any, "step 'charge'")


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(NotCarried, match="surrogates"):
        codec.encode("caf\udce9", "step 'read'")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_wherever_they_are(number: float) -> None:
    class Model(pydantic.BaseModel):
        x: float

    places: list[Any] = [
        number, [1, [number]], {"a": None, "b": (number,)}, {number}, Point(1, number), Parcel(number), Model(x=number),
        [Page([Model(x=number)])],
    ]  # fmt: skip
    for value in places:
        with pytest.raises(NotCarried, match="step 'mean'"):
            codec.carry(value, Any, "step 'mean'")


def test_a_none_beside_real_numbers_is_no_nan() -> None:
    assert codec.carry({"a": None, "b": [1.5, "null"]}, Any, "s")[1] == {"a": None, "b": [1.5, "null"]}


def test_a_value_over_the_limit_is_refused_with_its_size_and_the_limit() -> None:
    assert codec.encode("x" * 98, "step 'fetch'", limit=100) == '"' + "x" * 98 + '"'
    with pytest.raises(TooLarge) as caught:
        codec.encode("x" * 1_499, "step 'fetch'", limit=1_000)
    for part in ("step 'fetch'", "1,501", "1,000"):
        assert part in str(caught.value)
    assert "return its key" in caught.value.hint


def test_the_size_is_counted_in_bytes_not_in_characters() -> None:
    with pytest.raises(TooLarge, match="62 bytes"):
        codec.encode("é" * 30, "step 'fetch'", limit=61)


def test_the_limit_is_a_mebibyte_unless_said() -> None:
    codec.carry("x" * (codec.MAX_VALUE - 2), str, "step 'fetch'")
    with pytest.raises(TooLarge):
        codec.carry("x" * (codec.MAX_VALUE - 1), str, "step 'fetch'")
    with pytest.raises(TooLarge):
        codec.payload_text("x" * codec.MAX_VALUE, str, "greet")


def test_a_value_that_does_not_fit_its_own_annotation_is_refused_with_both() -> None:
    with pytest.raises(NotCarried) as caught:
        codec.carry({"amount": "much"}, Money, "step 'sum'")
    for part in ("step 'sum'", "dict", "Money", "$.amount"):
        assert part in str(caught.value)


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    name: str


@pytest.mark.parametrize(
    "annotation",
    [Cat | Dog, list[Cat | Dog], dt.datetime | str, set[int] | list[int], Cat | Customer, Box | Card, Colour | str],
    ids=str,
)
def test_a_union_whose_members_look_alike_when_stored_is_refused_with_what_to_do(annotation: Any) -> None:
    with pytest.raises(NotCarried) as caught:
        codec.decoder(annotation)
    assert "tag" in caught.value.hint


def test_a_payload_that_does_not_fit_is_refused_with_the_workflow_and_the_field() -> None:
    with pytest.raises(PayloadRefused) as caught:
        codec.payload_text({"label": "a", "size": [1, 2, "3"]}, Box, "pack")
    for part in ("'pack'", "$.size[2]", "Box"):
        assert part in str(caught.value)


@pytest.mark.parametrize("broken", [b"", b"{", b"\xff", b'"\xff"', b"nan", b"{'a': 1}", b"1 2", b"[" * 100_000])
def test_stored_text_that_is_no_json_any_more_is_unreadable(broken: bytes) -> None:
    with pytest.raises(Unreadable):
        codec.decode(broken)


def test_stored_text_that_does_not_fit_any_more_is_unreadable_and_names_the_field() -> None:
    with pytest.raises(Unreadable, match="amount"):
        codec.decode("{}", Money)


# --- whose annotation ------------------------------------------------------------------------------------------------


def plain() -> Money: ...
async def coroutine() -> Money: ...
def awaitable() -> Awaitable[Money]: ...
def coroutine_made() -> Coroutine[Any, Any, Money]: ...
def quoted() -> "Money": ...
def optional(_: int) -> Money | None: ...
def silent(): ...
def fails() -> NoReturn:
    raise ValueError


def never() -> Never:
    raise ValueError


def unknown_parameter(_: "Nowhere") -> Money: ...  # noqa: F821
@functools.wraps(coroutine)
def wrapped(*_: Any) -> Any: ...
@functools.lru_cache
def cached() -> Money: ...


class Shop:
    def bound(self) -> Money: ...
    async def bound_async(self) -> Money: ...
    @classmethod
    def of_class(cls) -> Money: ...
    @staticmethod
    def static() -> Money: ...
    def __call__(self) -> Money: ...


class Unhashable(Shop):
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return self is other


def from_a_closure() -> Callable[[], Any]:
    @dataclass
    class Local:
        x: int

    def body() -> "Local":
        return Local(1)

    return body


@pytest.mark.parametrize(
    ("fn", "annotation"),
    [
        (plain, Money),
        (coroutine, Money),
        (awaitable, Money),
        (coroutine_made, Money),
        (quoted, Money),
        (optional, Money | None),
        (functools.partial(optional, 1), Money | None),
        (functools.partial(functools.partial(optional), 1), Money | None),
        (functools.partial(Shop().bound), Money),
        (functools.partial(Shop()), Money),
        (wrapped, Money),
        (cached, Money),
        (unknown_parameter, Money),
        (Shop().bound, Money),
        (Shop().bound_async, Money),
        (Shop.of_class, Money),
        (Shop.static, Money),
        (Shop(), Money),
        (Unhashable(), Money),
        (Unhashable().bound, Money),
        (Money, Money),
        (int, int),
        (silent, Any),
        (fails, Any),
        (never, Any),
        (lambda: 1, Any),
        (len, Any),
        ("text".upper, Any),
    ],
    ids=lambda given: getattr(given, "__name__", type(given).__name__),
)
def test_a_value_is_read_back_into_what_its_function_says_it_returns(fn: Any, annotation: Any) -> None:
    assert codec.returns(fn) == annotation


def test_an_annotation_that_says_nothing_asks_for_nothing() -> None:
    def whatever() -> object: ...

    stored, now = codec.carry({"a": (1,)}, codec.returns(whatever), "step 'one'")
    assert now == codec.decode(stored, codec.returns(whatever)) == {"a": [1]}


@pytest.mark.parametrize(
    "annotation", [threading.Lock().__class__, list[pathlib.Path], Page[asyncio.Event], Cat | asyncio.Event]
)
def test_an_annotation_that_nothing_stored_can_be_read_into_is_refused_before_anything_is_done(annotation: Any) -> None:
    with pytest.raises(NotCarried, match="cannot be read back"):
        codec.decoder(annotation)


def test_an_annotation_that_names_a_local_class_is_found_through_the_closure() -> None:
    found = codec.returns(from_a_closure())
    assert (found.__name__, found(3).x) == ("Local", 3)


def test_a_function_that_refers_to_what_its_scope_has_not_made_yet_still_has_its_annotation() -> None:
    def early() -> Money:
        return later()

    assert codec.returns(early) is Money

    def later() -> Money:
        return Money(Decimal(1))

    assert early() == Money(Decimal(1))


def test_a_body_that_is_made_anew_for_each_call_is_not_kept_alive() -> None:
    import gc
    import weakref

    class Payload:
        pass

    def body_of(payload: Payload) -> Callable[[], Payload]:
        return lambda: payload

    payload = Payload()
    kept = weakref.ref(payload)
    codec.returns(body_of(payload))
    del payload
    gc.collect()
    assert kept() is None
