"""Secrets in a process: the object that has them, and how they are masked where they turn up."""

import ast
import base64
import copy
import dataclasses
import inspect
import json
import pickle
import pprint
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tako_runtime import codec
from tako_runtime.errors import NotCarried, TakoError
from tako_runtime.masking import Mask, too_short
from tako_runtime.secrets import SecretMissing, Secrets, secrets

KEY = "sk_live_51Hx+/=vT9"


# ---------------------------------------------------------------------------------------------------------- the object


def test_a_secret_is_found_by_its_name() -> None:
    given_ = Secrets({"STRIPE_KEY": KEY, "EMPTY": ""})
    assert given_["STRIPE_KEY"] == given_.get("STRIPE_KEY") == KEY
    assert given_["EMPTY"] == ""
    assert list(given_) == ["STRIPE_KEY", "EMPTY"]
    assert len(given_) == 2
    assert "EMPTY" in given_
    assert "OTHER" not in given_
    assert given_.get("OTHER") is None
    assert given_.get("OTHER", "else") == "else"


def test_a_secret_that_is_not_there_is_named_with_the_file_that_they_come_from() -> None:
    with pytest.raises(KeyError) as caught:
        Secrets({"STRIPE": KEY})["STRIPE_KEY"]
    error = caught.value
    assert isinstance(error, TakoError)
    assert str(error) == "the secret STRIPE_KEY is not set"
    assert error.hint == (
        "This process was given: STRIPE. tako secrets set sets one; on a server they come from the file secrets.json "
        "beside the store."
    )
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again), again.hint) == (SecretMissing, str(error), error.hint)
    with pytest.raises(SecretMissing) as caught_bare:
        Secrets({})["STRIPE_KEY"]
    assert caught_bare.value.hint.startswith("This process was given: no secrets at all.")


def test_it_cannot_be_changed() -> None:
    held: Any = Secrets({"STRIPE_KEY": KEY})
    with pytest.raises(TypeError):
        held["STRIPE_KEY"] = "other"
    with pytest.raises(TypeError):
        del held["STRIPE_KEY"]
    with pytest.raises(AttributeError):
        held.STRIPE_KEY = "other"


@dataclasses.dataclass
class Holder:
    inner: object


SHOWN: dict[str, Callable[[Any], object]] = {
    "repr": repr,
    "str": str,
    "format": format,
    "f-string": lambda held: f"{held} {held!r:>80}",
    "percent": lambda held: "%s %r" % (held, held),  # noqa: UP031
    "pprint": pprint.pformat,
    "a dataclass": lambda held: repr(dataclasses.asdict(Holder(held))),
    "json with a default": lambda held: json.dumps(held, default=repr),
    "members": lambda held: repr(inspect.getmembers(held)),
    "slots": lambda held: [repr(getattr(held, name)) for name in type(held).__slots__],
    "copy": lambda held: repr(copy.copy(held)),
    "deepcopy": lambda held: repr(copy.deepcopy([held])),
    "list": list,
}

REFUSED: dict[str, Callable[[Any], object]] = {
    "format with a width": lambda held: format(held, "99"),
    "vars": vars,
    "dict": dict,
    "keywords": lambda held: dict(**held),
    "json": json.dumps,
    "msgspec json": msgspec.json.encode,
    "msgspec msgpack": msgspec.msgpack.encode,
    "msgspec builtins": msgspec.to_builtins,
    "a stored value": lambda held: codec.encode({"secrets": held}, "the result"),
    **{f"pickle {n}": lambda held, n=n: pickle.dumps(held, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "pickle of a method": lambda held: pickle.dumps(held.get),
    "reduce": lambda held: held.__reduce_ex__(4),
    "getstate": lambda held: held.__getstate__(),
}


@pytest.mark.parametrize("how", SHOWN)
def test_what_shows_it_shows_no_value(how: str) -> None:
    shown = str(SHOWN[how](Secrets({"STRIPE_KEY": KEY})))
    assert shown
    assert KEY not in shown


@pytest.mark.parametrize("how", REFUSED)
def test_what_would_carry_it_away_is_refused_without_a_value(how: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        REFUSED[how](Secrets({"STRIPE_KEY": KEY}))
    assert KEY not in f"{caught.value!r} {caught.value.__context__!r}"


def test_pickling_it_says_why_not() -> None:
    with pytest.raises(NotCarried, match="stay in the process"):
        pickle.dumps(secrets)


# --------------------------------------------------------------------------------------------------------------- masks

LABEL = "[secret KEY]"

text = st.text(st.characters(exclude_categories=["Cs"]))
#: Values with the characters that one encoding or another spells in its own way.
awkward = st.sampled_from("ab1'\"\\/+= %&?~\n\r\t\0\x7f\u00e9\u2028\U0001f600")
values = (
    st.text(awkward | st.characters(exclude_categories=["Cs"]), min_size=6)
    .map(str.strip)
    .filter(lambda value: len(value) >= 6)
)

ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "quote": quote,
    "quote all": lambda value: quote(value, safe=""),
    "quote_plus": quote_plus,
    "quote in lower case": lambda value: re.sub("%..", lambda code: code[0].lower(), quote(value, safe="")),
    "json": lambda value: json.dumps(value)[1:-1],
    "json with unicode": lambda value: msgspec.json.encode(value).decode()[1:-1],
    "repr": lambda value: repr(value)[1:-1],
    "repr within other quotes": lambda value: repr('"' + value)[2:-1],
    "ascii": lambda value: ascii(value)[1:-1],
    "bytes": lambda value: repr(value.encode())[2:-1],
    "json of repr": lambda value: json.dumps(repr(value)[1:-1])[1:-1],
    "json of json": lambda value: json.dumps(json.dumps(value)[1:-1])[1:-1],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(before=text, value=values, after=text)
@example(before="", value="abcdef\\", after="n")
@example(before="[secret KEY]", value="secret KEY", after="]")
def test_no_value_survives_in_any_spelling_whatever_is_around_it(
    encoding: str, before: str, value: str, after: str
) -> None:
    spell = ENCODINGS[encoding]
    pieces = Mask({"KEY": value}).text(spell(before) + spell(value) + spell(after), "here").split(LABEL)
    # What was put in begins behind the first piece at the latest and ends before the last one.
    assert len(pieces) > 1
    assert len(pieces[0]) <= len(spell(before))
    assert len(pieces[-1]) <= len(spell(after))
    assert not any(spell(value) in piece for piece in pieces)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@given(before=st.binary(), value=values, after=st.binary())
def test_no_value_survives_within_longer_base64(
    encode: Callable[[bytes], bytes], before: bytes, value: str, after: bytes
) -> None:
    assume(value.encode() not in before + after)
    pieces = Mask({"KEY": value}).text(encode(before + value.encode() + after).decode(), "here").split(LABEL)
    assert len(pieces) > 1
    for piece in pieces:
        for offset in range(4):
            cut = re.sub("[^A-Za-z0-9+/]", "", piece.replace("-", "+").replace("_", "/"))[offset:]
            assert value.encode() not in base64.b64decode(cut[: len(cut) // 4 * 4])


@given(before=text, first=values, second=values, after=text)
def test_of_two_secrets_that_overlap_in_a_text_no_end_stays_behind(
    before: str, first: str, second: str, after: str
) -> None:
    shared = first + second
    held = {"FIRST": shared[: len(first) + 3].strip(), "SECOND": shared[len(first) - 3 :].strip()}
    masked = Mask(held).text(f"{before}{shared}{after}", "here")
    pieces = re.split(r"\[secret (?:FIRST|SECOND)\]", masked)
    assert len(pieces[0]) <= len(before)
    assert len(pieces[-1]) <= len(after)


@given(st.lists(text), st.dictionaries(st.sampled_from(["A", "B", "C"]), values))
def test_a_text_without_a_secret_is_given_back_as_it_is(texts: list[str], held: dict[str, str]) -> None:
    mask = Mask(held, lambda place, name: pytest.fail(f"warned of {name} at {place}"))
    for ordinary in texts:
        assume(not any(value[:3] in ordinary for value in held.values()))
        assume(len(ordinary) < 6)  # shorter than any spelling of a value
        assert mask.text(ordinary, "here") is ordinary


def test_at_one_place_the_longest_value_wins() -> None:
    mask = Mask({"KEY": "abcdef", "LONG_KEY": "abcdefgh"})
    assert mask.text("abcdef abcdefgh abcdefg", "here") == "[secret KEY] [secret LONG_KEY] [secret KEY]g"


def test_a_basic_authorization_header_is_masked() -> None:
    header = "Basic " + base64.b64encode(b"user:correct horse battery").decode()
    assert Mask({"PASSWORD": "correct horse battery"}).text(header, "here") == "Basic dXNlcjp[secret PASSWORD]k="
    alone = base64.b64encode(b"correct horse").decode()
    assert Mask({"PASSWORD": "correct horse"}).text(f"<{alone}>", "here") == "<[secret PASSWORD]>"


def test_white_space_around_a_value_does_not_hide_it() -> None:
    assert Mask({"KEY": " hunter2\n"}).text("it is hunter2.", "here") == "it is [secret KEY]."


PEM = "-----BEGIN PRIVATE KEY-----\n" + "\n".join(f"MIIEvQIBADANBgkq{n:048d}" for n in range(5)) + "\nshort==\n"


@pytest.mark.parametrize("spell", ENCODINGS.values(), ids=ENCODINGS)
def test_each_line_of_a_private_key_is_masked_and_a_short_one_only_with_the_others(spell: Callable[[str], str]) -> None:
    mask = Mask({"KEY": PEM})
    assert mask.text(f"<{spell(PEM.strip())}>", "here") == f"<{LABEL}>"
    for line in PEM.splitlines():
        assert mask.text(f"<{spell(line)}>", "here") == (f"<{spell(line)}>" if line == "short==" else f"<{LABEL}>")


def test_a_value_longer_than_any_key_is_masked_as_a_whole_only() -> None:
    lines = [f"a line with number {n:06d}" for n in range(4000)]
    mask = Mask({"KEY": "\n".join(lines)})
    assert mask.text("<{}>".format("\n".join(lines)), "here") == f"<{LABEL}>"
    assert mask.text(lines[7], "here") == lines[7]


def test_a_value_with_two_names_goes_by_the_later_one_every_time() -> None:
    assert Mask({"OLD_KEY": "hunter2", "KEY": "hunter2"}).text("hunter2", "here") == LABEL


def test_values_of_less_than_six_characters_are_named_and_not_masked() -> None:
    values = {"PIN": "12345", "EMPTY": "", "BLANK": "  1234   ", "KEY": "123456"}
    mask = Mask(values)
    assert too_short(values) == ["PIN", "BLANK"], "an empty one is nothing that could turn up"
    assert mask.text("12345 1234 123456", "here") == f"12345 1234 {LABEL}"


def test_without_secrets_nothing_is_masked() -> None:
    assert Mask({}).text("anything", "here") == "anything"
    assert Mask({}).json('{"a": 1.10}', "here") == '{"a": 1.10}'


def test_one_warning_is_given_for_each_place_and_name() -> None:
    warned: list[tuple[str, str]] = []
    mask = Mask({"KEY": "hunter2", "OTHER": "hunter3"}, lambda place, name: warned.append((place, name)))
    for place in ("the result of step charge", "a log line", "the result of step charge"):
        mask.text("hunter2 hunter2", place)
    mask.json('["hunter3", "hunter2"]', "a log line")
    assert warned == [("the result of step charge", "KEY"), ("a log line", "KEY"), ("a log line", "OTHER")]


# ---------------------------------------------------------------------------------------------------------- JSON texts

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), text)
documents = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=10)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    else:
        yield str(value)


@given(document=documents, value=values, before=text, after=text, as_key=st.booleans(), spaced=st.booleans())
@example(document="abcdef\n", value="abcdef\\", before="", after="", as_key=False, spaced=False)
@example(document="\nabcdef", value="nabcdef", before="", after="", as_key=False, spaced=False)
def test_masked_json_is_json_without_the_value(
    document: Any, value: str, before: str, after: str, as_key: bool, spaced: bool
) -> None:
    secret = before + value + after
    whole = {"document": document, "secret": {secret: 1} if as_key else [secret]}
    source = json.dumps(whole) if spaced else msgspec.json.encode(whole).decode()
    masked = json.loads(Mask({"KEY": value}).json(source, "here"))
    assert not any(value in piece for string in strings(masked) for piece in string.split(LABEL))


@given(document=documents)
def test_json_in_which_only_the_beginning_of_a_value_turns_up_is_given_back_as_it_is(document: Any) -> None:
    source = json.dumps([document, "hunter", 1.10])
    assert Mask({"KEY": "hunter2\U0001f511"}).json(source, "here") is source


def test_a_number_that_is_a_secret_is_masked_and_the_others_stay_numbers() -> None:
    masked = Mask({"ACCOUNT": "12345678"}).json(
        '{"n": 12345678, "m": 1234567, "big": 112345678000000000000000}', "here"
    )
    assert json.loads(masked) == {
        "n": "[secret ACCOUNT]",
        "m": 1234567,
        "big": "1[secret ACCOUNT]000000000000000",
    }


def test_what_is_not_json_is_masked_as_text() -> None:
    assert Mask({"KEY": "hunter2"}).json('{"a": "hunter2', "here") == f'{{"a": "{LABEL}'
    deep = "[" * 100_000 + '"hunter2'
    assert Mask({"KEY": "hunter2"}).json(deep, "here") == "[" * 100_000 + f'"{LABEL}'


def test_a_secret_in_a_repr_in_json_reads_as_it_did_but_for_the_secret() -> None:
    masked = Mask({"KEY": 'it\'s "q"'}).text(repr({"key": 'it\'s "q"', "n": [1]}), "here")
    assert ast.literal_eval(masked) == {"key": LABEL, "n": [1]}
