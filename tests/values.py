"""What users return: types of all kinds, and strategies for their values."""

import datetime as dt
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypedDict, TypeVar
from uuid import UUID

import attrs
import msgspec
import pydantic
from hypothesis import strategies as st


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 9


@dataclass(frozen=True)
class Money:
    amount: Decimal
    currency: str = "EUR"


class Place(TypedDict):
    street: str
    number: int


class Point(NamedTuple):
    x: float
    y: float


class Box(msgspec.Struct, frozen=True):
    label: str
    size: tuple[int, int, int]


class Card(msgspec.Struct, tag=True, frozen=True):
    last4: str


class Cash(msgspec.Struct, tag=True, frozen=True):
    given: int


@attrs.frozen
class Parcel:
    weight: float
    boxes: tuple[Box, ...] = ()


class Customer(pydantic.BaseModel):
    id: UUID
    since: dt.date
    limit: Decimal
    colours: frozenset[Colour] = frozenset()
    friend: Optional["Customer"] = None


@dataclass
class Order:
    id: UUID
    at: dt.datetime
    total: Money
    customer: Customer
    place: Place
    levels: set[Level] = field(default_factory=set)
    parcels: list[Parcel] = field(default_factory=list)
    notes: dict[str, str | None] = field(default_factory=dict)
    paid: Card | Cash | None = None


T = TypeVar("T")


@dataclass
class Page(Generic[T]):
    items: list[T]


text = st.text(st.characters(codec="utf-8"))
number = st.floats(allow_nan=False, allow_infinity=False)
zoned = st.datetimes(timezones=st.just(dt.UTC))
decimal = st.decimals(allow_nan=False, allow_infinity=False, places=2)
money = st.builds(Money, decimal, text)
box = st.builds(Box, text, st.tuples(*[st.integers()] * 3))
parcel = st.builds(Parcel, number, st.lists(box, max_size=2).map(tuple))
paid = st.builds(Card, text) | st.builds(Cash, st.integers()) | st.none()
colours = st.frozensets(st.sampled_from(Colour))
lone = st.builds(Customer, id=st.uuids(), since=st.dates(), limit=decimal, colours=colours)
customer = st.builds(Customer, id=st.uuids(), since=st.dates(), limit=decimal, friend=lone | st.none())
order = st.builds(
    Order,
    st.uuids(),
    zoned,
    money,
    customer,
    st.fixed_dictionaries({"street": text, "number": st.integers()}),
    st.sets(st.sampled_from(Level)),
    st.lists(parcel, max_size=2),
    st.dictionaries(text, text | st.none(), max_size=2),
    paid,
)

VALUES: dict[Any, st.SearchStrategy[Any]] = {
    None: st.none(),
    bool: st.booleans(),
    int: st.integers(),
    float: number,
    str: text,
    bytes: st.binary(),
    bytearray: st.binary().map(bytearray),
    Decimal: decimal,
    UUID: st.uuids(),
    dt.datetime: st.datetimes() | zoned,
    dt.date: st.dates(),
    dt.time: st.times(),
    dt.timedelta: st.timedeltas(),
    Colour: st.sampled_from(Colour),
    Level: st.sampled_from(Level),
    Literal["yes", "no"]: st.sampled_from(["yes", "no"]),
    set[int]: st.sets(st.integers()),
    frozenset[UUID]: st.frozensets(st.uuids()),
    tuple[int, str]: st.tuples(st.integers(), text),
    tuple[Decimal, ...]: st.lists(decimal).map(tuple),
    list[dt.date]: st.lists(st.dates()),
    dict[int, Money]: st.dictionaries(st.integers(), money),
    dict[UUID, list[Colour]]: st.dictionaries(st.uuids(), st.lists(st.sampled_from(Colour))),
    Mapping[str, int]: st.dictionaries(text, st.integers()),
    Sequence[Money]: st.lists(money),
    int | str | None: st.integers() | text | st.none(),
    Card | Cash: st.builds(Card, text) | st.builds(Cash, st.integers()),
    Annotated[int, msgspec.Meta(ge=0)]: st.integers(min_value=0),
    Money: money,
    Place: st.fixed_dictionaries({"street": text, "number": st.integers()}),
    Point: st.builds(Point, number, number),
    Box: box,
    Parcel: parcel,
    Customer: customer,
    list[Customer]: st.lists(customer, max_size=2),
    dict[str, Customer | None]: st.dictionaries(text, customer | st.none(), max_size=2),
    Page[Money]: st.builds(Page, st.lists(money)),
    Page[Customer]: st.builds(Page, st.lists(customer, max_size=2)),
    Order: order,
}


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: `1 == 1.0 == True` is not enough here."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return all(same(k, j) and same(v, w) for (k, v), (j, w) in zip(one.items(), other.items(), strict=True))
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    if isinstance(one, set | frozenset):
        return {(type(v), v) for v in one} == {(type(v), v) for v in other}
    inner = getattr(one, "__dict__", None)
    return same(inner, vars(other)) if inner and not isinstance(one, enum.Enum) else True
