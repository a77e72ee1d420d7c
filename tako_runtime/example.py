"""What a payload may look like, from its type: a beginning for whoever starts a run by hand."""

from typing import Any

import msgspec
from msgspec import NODEFAULT, inspect

from tako_runtime import codec
from tako_runtime.errors import TakoError

#: What stands for a value of a type; a text is the name of its field.
_VALUES: dict[type, Any] = {
    inspect.BoolType: True, inspect.DateTimeType: "2026-01-31T09:00:00Z", inspect.DateType: "2026-01-31",
    inspect.TimeType: "09:00:00", inspect.TimeDeltaType: "P1D", inspect.DecimalType: "1.00",
    inspect.UUIDType: "00000000-0000-4000-8000-000000000000", inspect.DictType: {}, inspect.BytesType: "",
}  # fmt: skip
_EMPTY: dict[Any, Any] = {list: [], set: [], frozenset: [], tuple: [], dict: {}}


def example(annotation: Any) -> str:
    """JSON text that reads as `annotation`; "null" where anything does, "" where none could be made.

    >>> example(dict[str, int]), example(list[str])
    ('{}', '["text"]')
    """
    try:
        text = msgspec.json.encode(_value(inspect.type_info(annotation), "text", ())).decode()
        codec.decode(text, annotation)
    except (TakoError, TypeError, ValueError, AttributeError, RecursionError):
        return ""
    return text


def _value(kind: inspect.Type, name: str, within: tuple[Any, ...]) -> Any:
    match kind:
        case inspect.Metadata():
            return _value(kind.type, name, within)
        case inspect.UnionType():
            some = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
            return _value(some[0], name, within)
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.EnumType():
            return next(iter(kind.cls)).value
        case inspect.StrType():
            return name
        case inspect.IntType() | inspect.FloatType():
            return max(1, kind.ge or 1, (kind.gt or 0) + 1)
        case inspect.TupleType():
            return [_value(one, name, within) for one in kind.item_types]
        case inspect.CollectionType():
            return [_value(kind.item_type, name, within)]
        case _ if (cls := getattr(kind, "cls", None)) is not None and cls not in within:
            return {field: value for field, value in _fields(kind, (*within, cls)) if value is not NODEFAULT}
    return _VALUES.get(type(kind))


def _fields(kind: Any, within: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The fields of a dataclass, a Struct, a TypedDict or a pydantic model; those that need not be there with their
    defaults."""
    of_pydantic = getattr(kind.cls, "model_fields", None)
    if of_pydantic is not None:
        return [
            (name, _value(inspect.type_info(field.annotation), name, within) if field.is_required() else NODEFAULT)
            for name, field in of_pydantic.items()
        ]
    found = []
    for field in kind.fields:
        value: Any = NODEFAULT
        if field.required:
            value = _value(field.type, field.name, within)
        elif field.default is not NODEFAULT:
            value = msgspec.to_builtins(field.default)
        else:
            value = _EMPTY.get(field.default_factory, NODEFAULT)
        found.append((field.encode_name, value))
    return found
