"""The example of a payload fits its type."""

import datetime
import enum
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NotRequired, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest

from tako_runtime import codec
from tako_runtime.example import example


class Size(enum.Enum):
    SMALL = "s"


class Address(msgspec.Struct):
    street: str
    floor: int | None
    kind: Literal["home", "work"] = "work"


@dataclass
class Order:
    id: int
    items: list[str]
    total: Decimal
    address: Address
    at: datetime.datetime
    size: Size
    tags: set[str] = field(default_factory=set)
    gift: bool = False


class Tree(msgspec.Struct):
    name: str
    left: "Tree | None" = None


class Hook(TypedDict):
    url: str
    tries: NotRequired[int]


class Mail(pydantic.BaseModel):
    to: str
    at: datetime.date
    copies: int = 2


TYPES = [
    int, str, bool, float, list[int], dict[str, int], tuple[int, str], UUID, Decimal, datetime.timedelta, Order, Tree,
    Hook, Mail, list[Order], Order | None, Any, dict, None,
]  # fmt: skip


@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_an_example_reads_as_its_type(annotation: Any) -> None:
    text = example(annotation)
    assert text
    codec.decode(text, annotation)


def test_an_example_has_every_field_and_the_defaults_of_those_that_have_one() -> None:
    assert msgspec.json.decode(example(Order)) == {
        "id": 1, "items": ["items"], "total": "1.00", "at": "2026-01-31T09:00:00Z", "size": "s", "tags": [],
        "gift": False, "address": {"street": "street", "floor": 1, "kind": "work"},
    }  # fmt: skip
    assert msgspec.json.decode(example(Mail)) == {"to": "to", "at": "2026-01-31"}


class Odd:
    pass


def test_of_a_type_that_no_json_reads_as_there_is_no_example() -> None:
    assert example(Odd) == ""
    assert example(dict[bytes, Odd]) == ""
