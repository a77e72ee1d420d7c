"""Secrets: handed over through a pipe, found nowhere else, masked where they turn up."""

import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import until

from tako_runtime.errors import InvalidValue
from tako_runtime.secrets import VARIABLE, Secrets, handing_over, receive, secrets

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
