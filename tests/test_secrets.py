"""Secrets: handed over through a pipe, found nowhere else, masked where they turn up."""

import ast
import asyncio
import base64
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import pickle
import pprint
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import msgspec
import pytest
from conftest import until
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tako_runtime import codec
from tako_runtime.errors import InvalidValue, NotCarried, TakoError
from tako_runtime.masking import Mask, too_short
from tako_runtime.secrets import VARIABLE, SecretMissing, Secrets, handing_over, receive, secrets

SCENARIOS = Path(__file__).with_name("scenarios_secrets")
KEY = "sk_live_51Hx+/=vT9"
MIB = {"BIG": "€" + "x" * (1 << 20), "STRIPE_KEY": KEY, "EMPTY": ""}

proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows a process in /proc")


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TAKO_")}


@asynccontextmanager
async def child(scenario: str, values: Mapping[str, str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A process of the scenario that was handed the values, and the inode of the pipe. Killed in the end."""
    async with handing_over(values) as fd:
        pipe = os.fstat(fd).st_ino
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            SCENARIOS / f"{scenario}.py",
            pass_fds=[fd],
            env={**clean_environment(), VARIABLE: str(fd)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        yield process, pipe
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process) -> Any:
    """The one line that a scenario prints."""
    assert process.stdout is not None
    assert process.stderr is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    return json.loads(line or pytest.fail((await process.stderr.read()).decode()))


def open_files() -> set[str]:
    return {entry.name for entry in Path("/dev/fd").iterdir() if _is_open(int(entry.name))}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:  # the folder's own
        return False
    return True


# ------------------------------------------------------------------------------------------------------- handed over


def test_a_mebibyte_of_secrets_arrives_whole() -> None:
    async def scenario() -> None:
        async with child("receive", MIB) as (process, _):
            seen = await said(process)
        assert seen["digests"] == {name: hashlib.sha256(value.encode()).hexdigest() for name, value in MIB.items()}
        assert seen["same"]

    asyncio.run(scenario())


def test_nothing_a_worker_starts_inherits_the_pipe_a_value_or_the_pipes_number() -> None:
    async def scenario() -> None:
        async with child("receive", {"STRIPE_KEY": KEY}) as (process, pipe):
            grandchild = (await said(process))["grandchild"]
        assert grandchild["pipes"]  # its own output, at least
        assert pipe not in grandchild["pipes"]
        assert VARIABLE not in grandchild["environ"]
        assert KEY not in json.dumps(grandchild["environ"])

    asyncio.run(scenario())


def test_a_child_that_is_started_while_the_envelope_is_read_does_not_inherit_the_pipe() -> None:
    done = subprocess.run(
        [sys.executable, SCENARIOS / "fork_while_reading.py"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"inherited": False, "length": 1 << 20}


def test_another_child_of_the_supervisor_inherits_neither_end() -> None:
    async def scenario() -> None:
        async with handing_over(MIB) as fd:
            pipe = os.fstat(fd).st_ino
            other = await asyncio.create_subprocess_exec(
                sys.executable, SCENARIOS / "look.py", close_fds=False, stdout=subprocess.PIPE
            )
            out, _ = await other.communicate()
        assert pipe not in json.loads(out)["pipes"]

    asyncio.run(scenario())


@proc
def test_a_value_is_in_neither_the_environment_nor_the_command_line_of_the_worker() -> None:
    async def scenario() -> None:
        async with child("receive", {"STRIPE_KEY": KEY}) as (process, pipe):
            await said(process)
            of = Path(f"/proc/{process.pid}")
            environ, words = (of / "environ").read_bytes(), (of / "cmdline").read_bytes()
            files = [str(link.readlink()) for link in (of / "fd").iterdir()]
        assert VARIABLE.encode() in environ
        assert KEY.encode() not in environ + words
        assert files
        assert f"pipe:[{pipe}]" not in files

    asyncio.run(scenario())


def test_a_child_that_never_reads_holds_nobody_up_and_leaves_no_thread_and_no_file_behind() -> None:
    async def scenario() -> None:
        await asyncio.to_thread(int)  # the thread in which `until` will look is there before
        files, threads = open_files(), set(threading.enumerate())
        async with child("never_reads", MIB) as (process, _):
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), 60) == b"up\n"
            assert not any("secret" in thread.name.lower() for thread in threading.enumerate())
            async with child("receive", {"STRIPE_KEY": KEY}) as (second, _):  # the next one is served meanwhile
                assert list((await said(second))["digests"]) == ["STRIPE_KEY"]
            assert open_files() - files  # what waits to be read
        await asyncio.to_thread(until, lambda: open_files() == files and threads >= set(threading.enumerate()))

    asyncio.run(scenario())


def test_a_child_that_cannot_be_started_leaves_no_file_behind() -> None:
    async def start() -> None:
        async with handing_over(MIB) as fd:
            await asyncio.create_subprocess_exec("/no/such/interpreter", pass_fds=[fd])

    async def scenario() -> None:
        await asyncio.to_thread(int)
        files = open_files()
        with pytest.raises(FileNotFoundError):
            await start()
        await asyncio.to_thread(until, lambda: open_files() == files)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "values",
    [
        {"stripe_key": KEY},
        {"A-B": KEY},
        {"": KEY},
        {"KEY\n": KEY},
        {"KEY": 12345678},
        {"KEY": None},
        {"KEY": KEY + "\udc80"},
    ],
    ids=repr,
)
def test_what_is_no_secret_is_refused_before_anything_is_started_and_not_shown(values: dict[str, str]) -> None:
    async def hand_over() -> None:
        async with handing_over(values):
            pytest.fail("handed over")

    with pytest.raises(InvalidValue, match="UPPER_SNAKE") as caught:
        asyncio.run(hand_over())
    assert KEY not in f"{caught.value!r} {caught.value.hint}"
    assert caught.value.__context__ is None


# ------------------------------------------------------------------------------------------------------------ received


def told(error: BaseException) -> str:
    """All that an error reporter could tell: message, hint, chain, and the variables of the module's own frames."""
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    frames = [frame for frame in report.stack if frame.filename.endswith("tako_runtime/secrets.py")]
    assert frames
    return "".join(traceback.StackSummary.from_list(frames).format()) + repr((error, error.__cause__, vars(error)))


@pytest.fixture
def hand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], int]]:
    """Puts bytes into a pipe and names its read end, as the supervisor does."""
    before = Secrets({name: secrets[name] for name in secrets})

    def put(content: bytes) -> int:
        reading, writing = os.pipe()
        os.write(writing, content)
        os.close(writing)
        monkeypatch.setenv(VARIABLE, str(reading))
        return reading

    yield put
    Secrets.__init__(secrets, {name: before[name] for name in before})


def test_the_object_that_was_imported_before_has_the_secrets_and_the_pipe_is_closed(
    hand_in: Callable[[bytes], int],
) -> None:
    fd = hand_in(b'{"secrets": {"STRIPE_KEY": "sk_live_1", "EMPTY": ""}}')
    assert receive() == {"STRIPE_KEY": "sk_live_1", "EMPTY": ""}
    assert secrets["STRIPE_KEY"] == "sk_live_1"
    assert secrets["EMPTY"] == ""
    assert not _is_open(fd)
    assert VARIABLE not in os.environ


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hunter2-hunter2",
        b'{"secrets": {"KEY": "hunter2-hunter2"}',
        b'{"secrets": {"KEY": "hunter2-hunter2"}} hunter2',
        b'{"secrets": {"hunter2": "hunter2"}}',
        b'{"secrets": {"HUNTER2\\n": "hunter2"}}',
        b'{"secrets": {"KEY": ["hunter2"]}}',
        b'{"secrets": {"KEY": null}}',
        b'{"secrets": ["hunter2"]}',
        b'{"secrets": {}, "hunter2": "hunter2"}',
        b'{"KEY": "hunter2"}',
        b'["hunter2"]',
        b'{"secrets": {"KEY": "hunter2\xff"}}',
        b'{"secrets": {"KEY": "hunter2\\ud800"}}',
        b'{"secrets": ' + b"[" * 50_000,
    ],
    ids=lambda content: repr(content[:48]),
)
def test_a_malformed_envelope_is_an_error_that_shows_nothing_of_it(
    content: bytes, hand_in: Callable[[bytes], int]
) -> None:
    fd = hand_in(content)
    with pytest.raises(InvalidValue, match="not one whole") as caught:
        receive()
    assert "hunter2" not in told(caught.value).lower()
    assert caught.value.__context__ is None
    assert caught.value.hint
    assert not _is_open(fd)


def test_a_worker_with_a_malformed_envelope_ends_at_once_and_its_last_words_show_nothing_of_it(
    hand_in: Callable[[bytes], int],
) -> None:
    fd = hand_in(b'{"secrets": {"KEY": 12345, "x": "hunter2"}}')
    done = subprocess.run(
        [sys.executable, SCENARIOS / "receive.py"],
        pass_fds=[fd], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(fd)
    assert done.returncode == 1
    assert "not one whole" in done.stderr
    assert not re.search("hunter2|12345", done.stdout + done.stderr)


def test_without_the_variable_an_open_pipe_is_nobodys_and_stays_as_it_is(
    hand_in: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = hand_in(b"not for us")
    monkeypatch.delenv(VARIABLE)
    assert receive() == {}
    assert os.read(fd, 100) == b"not for us"
    os.close(fd)


@pytest.mark.parametrize("number", ["", "three", "-1", "99999", "9" * 30])
def test_a_number_that_is_no_open_file_means_no_secrets(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, number)
    assert receive() == {}


def test_a_file_that_is_no_pipe_means_no_secrets_and_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text('{"secrets": {"KEY": "value"}}')
    with (tmp_path / "file").open() as file:
        monkeypatch.setenv(VARIABLE, str(file.fileno()))
        assert receive() == {}
        assert file.read().startswith("{")


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
