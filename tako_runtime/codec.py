"""Values <-> stored text: JSON, through msgspec, with the typed round trip.

What a step returns on its first pass is what it returns on replay. So a value is encoded and decoded at once, into the
annotation where there is one, and the decoded one is what the handler sees, both times.
"""

import contextlib
import functools
import inspect
import math
import re
import sys
import types
import typing
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import msgspec
import msgspec.inspect

from tako_runtime.errors import NotCarried, PayloadRefused, TooLarge, Unreadable
from tako_runtime.masking import masked_json

#: The largest value that is stored, in bytes of its JSON text: 1 MiB unless the app says otherwise.
MAX_VALUE = 1 << 20


def encode(value: object, what: object, *, limit: int = MAX_VALUE) -> str:
    """JSON text of `value`; the text of `what` names it in errors ("step 'charge'", "the payload of 'fulfill-order'").

    Carries what msgspec can encode (dataclasses, datetime, Decimal, UUID, enums, sets, TypedDict, Struct, attrs) and
    pydantic models. Raises `NotCarried` for any other type and for NaN or infinity (JSON would turn them into null),
    `TooLarge` past `limit` bytes. Every value passes here on its way to the store: a secret's is masked here.

    >>> encode({"n": 1}, "an example")
    '{"n":1}'
    """
    if value is None:  # what most handlers return
        return "null"
    try:
        data = _encoder.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NotCarried(f"{what}: a value of type {_name(type(value))} cannot be stored: {error}") from None
    data = masked_json(data, what)
    if len(data) > limit:
        raise TooLarge(f"{what}: the value takes {len(data):,} bytes as JSON; the limit is {limit:,}")
    text = data.decode()
    if "null" in text and _has_lost_float(msgspec.to_builtins(value, enc_hook=_encode_foreign)):
        raise NotCarried(f"{what}: NaN and infinity cannot be stored", hint="Use None or a text for 'no number'.")
    return text


def decode(text: str | bytes, annotation: object = Any) -> Any:
    """The value of stored text, as `annotation`. Raises `Unreadable` where it is not JSON, or does not fit.

    >>> decode('["a", "b"]', tuple[str, str])
    ('a', 'b')
    """
    try:
        return decoder(annotation)(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def shown(text: bytes) -> Any:
    """A stored value for people and programs; text that is not JSON any more is shown as it is."""
    try:
        return decode(text)
    except Unreadable:
        return text.decode(errors="replace")


def carry(value: object, annotation: object, what: object, *, limit: int = MAX_VALUE) -> tuple[str, Any]:
    """The stored text of `value` and the value as every replay will see it.

    >>> carry((1, 2), Any, "an example")
    ('[1,2]', [1, 2])
    """
    text = encode(value, what, limit=limit)
    try:
        return text, _decoder(annotation)(text)
    except msgspec.ValidationError as error:
        _refuse_masked(text, f"{what}: {error}")
        raise NotCarried(
            f"{what}: returned {_name(type(value))}, which does not fit its annotation {_name(annotation)}: {error}",
            hint="Mend the return annotation, or return what it says.",
        ) from None


def payload_text(value: object, annotation: object, workflow: str, *, limit: int = MAX_VALUE) -> str:
    """The stored text of a payload, or `PayloadRefused` where the handler could not take it."""
    what = f"the payload of {workflow!r}"
    text = encode(value, what, limit=limit)
    try:
        decoder(annotation)(text)
    except msgspec.ValidationError as error:
        _refuse_masked(text, f"{what}: {error}")
        raise PayloadRefused(f"{what} does not fit {_name(annotation)}: {error}") from None
    return text


def _refuse_masked(text: str, what: str) -> None:
    """Where the mask of a secret is why a value does not fit its type, say so."""
    if (mask := re.search(r"\[secret ([A-Z0-9_]+)\]", text)) is not None:
        raise NotCarried(
            f"{what}; the value of secret {mask[1]} is in it, and is not stored",
            hint=f'Carry the name of the secret, and read secrets["{mask[1]}"] where it is used.',
        ) from None


def decoder(annotation: object) -> Callable[[str | bytes], Any]:
    """The decode function for an annotation; `NotCarried` for one that no stored text can be read into."""
    try:
        return _decoder(annotation)
    except TypeError as error:
        raise NotCarried(
            f"the annotation {_name(annotation)} cannot be read back from stored JSON: {error}",
            hint="Give each member of a union its own tag (msgspec.Struct, tag=True), or return one type.",
        ) from None


def returns(fn: Callable[..., Any]) -> Any:
    """The type that `fn`'s value is read back into: its return annotation without `Awaitable`, or `Any`."""
    if type(fn) is types.FunctionType:
        annotation = fn.__annotations__.get("return", Any)
    else:
        while isinstance(fn, functools.partial):
            fn = fn.func
        if inspect.isclass(fn):
            return fn
        if not inspect.isroutine(fn):
            fn = type(fn).__call__
        fn = getattr(fn, "__func__", fn)
        annotation = getattr(fn, "__annotations__", {}).get("return", Any)
    if annotation is Any or type(annotation) is type:  # every lambda, every plain class: nothing to look up
        return annotation
    try:
        return _returned[fn]
    except KeyError:
        found = _returned[fn] = _returns(fn)
        return found
    except TypeError:  # a callable that cannot be a key
        return _returns(fn)


#: By function, held weakly: a closure made for one call must not outlive it with all that it holds.
_returned: "weakref.WeakKeyDictionary[Callable[..., Any], Any]" = weakref.WeakKeyDictionary()


def _returns(fn: Callable[..., Any]) -> Any:
    annotation = annotations(fn).get("return", Any)
    if annotation in (typing.NoReturn, typing.Never) or annotation is inspect.Signature.empty:
        return Any
    if typing.get_origin(annotation) in (Awaitable, Coroutine):
        annotation = typing.get_args(annotation)[-1]
    return annotation


def annotations(fn: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of `fn` that can be resolved."""
    found = {}
    for name in getattr(inspect.unwrap(fn), "__annotations__", {}):
        with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
            found[name] = annotation(fn, name)
    return found


def annotation(fn: Callable[..., Any], name: str) -> Any:
    """The annotation of one of `fn`'s parameters, `Any` where it has none; names that live only inside an enclosing
    function are found there too. Raises what its text raises where nobody can resolve it."""
    inner: Any = inspect.unwrap(fn)
    written = getattr(inner, "__annotations__", {})
    if name not in written:
        return Any
    names, cells = getattr(inner, "__code__", None), getattr(inner, "__closure__", None)
    scope = {}
    for free, cell in zip(names.co_freevars if names else (), cells or (), strict=False):
        with contextlib.suppress(ValueError):  # a name that its function has not reached yet
            scope[free] = cell.cell_contents
    one = types.SimpleNamespace(__annotations__={name: written[name]})
    return typing.get_type_hints(one, getattr(inner, "__globals__", {}), scope, include_extras=True)[name]


@functools.lru_cache(maxsize=4096)
def _decoder(annotation: Any) -> Callable[[str | bytes], Any]:
    if annotation is object:
        annotation = Any
    foreign = _foreign_part(annotation)
    if foreign is not None:
        raise TypeError(f"there is no way to read {_name(foreign)} back")
    return msgspec.json.Decoder(annotation, dec_hook=_decode_foreign).decode


def _foreign_part(annotation: Any) -> Any:
    """A type within `annotation` that neither msgspec nor pydantic can read; None if there is none."""
    known: Any = (msgspec.inspect.Type, msgspec.inspect.Field)
    todo: list[Any] = [msgspec.inspect.type_info(annotation)]
    seen: list[Any] = []
    while todo:
        part = todo.pop()
        if any(part is one for one in seen):
            continue
        seen.append(part)
        if isinstance(part, msgspec.inspect.CustomType) and not _is_model(part.cls):
            return part.cls
        for name in part.__struct_fields__:
            inner = getattr(part, name)
            todo += [one for one in (inner if isinstance(inner, tuple) else (inner,)) if isinstance(one, known)]
    return None


def _is_model(wanted: Any) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and inspect.isclass(wanted) and issubclass(wanted, pydantic.BaseModel)


def _encode_foreign(value: Any) -> Any:
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        hidden = (pydantic.SecretStr, pydantic.SecretBytes)
        if _contains(value.model_dump(), hidden):
            raise TypeError("it has a field that hides its value; keep secrets out of payloads and results")
        return value.model_dump(mode="json", round_trip=True)
    raise TypeError(f"no way to carry {_name(type(value))}")


def _decode_foreign(wanted: Any, value: Any) -> Any:
    if _is_model(wanted):
        pydantic = sys.modules["pydantic"]
        try:
            # By name, as it was stored; by alias too, as a payload may come from outside.
            return wanted.model_validate_json(msgspec.json.encode(value), by_name=True, by_alias=True)
        except pydantic.ValidationError as error:
            places = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors())
            raise ValueError(places) from None
    raise TypeError(f"no way to read {_name(wanted)} back")


_encoder = msgspec.json.Encoder(enc_hook=_encode_foreign)


def _has_lost_float(value: Any) -> bool:
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value))


def _contains(value: Any, kinds: tuple[type, ...]) -> bool:
    return any(isinstance(leaf, kinds) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple | set | frozenset):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _name(annotation: object) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
