"""The feed: who looks on gets each event, and troubles the supervisor in no way."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import finished, script, until
from workers import eventually

from tako_runtime import clock, feed, log
from tako_runtime.feed import Feed, Follower, follow, supervising
from tako_runtime.store import Home


def in_a_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await body()

    asyncio.run(limited())


async def reading(home: Home) -> Follower:
    follower = await follow(home.app_dir)
    assert follower is not None
    return follower


def test_every_reader_gets_every_event_with_its_source(home: Home) -> None:
    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            readers = [await reading(home) for _ in range(3)]
            feed.publish("media", {"event": "run.started", "run": "r", "message": "zwölf"})
            feed.publish("tako", {"event": "worker.died", "pid": 7})
            for reader in readers:
                told = {"event": "run.started", "run": "r", "message": "zwölf", "source": "media"}
                assert await reader.next() == told
                assert await reader.next() == {"event": "worker.died", "pid": 7, "source": "tako"}
                reader.close()

    in_a_loop(body)


def test_what_the_supervisor_itself_announces_reads_as_in_the_log(home: Home) -> None:
    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            reader = await reading(home)
            with log.sink(feed.announce):
                log.emit("worker.died", pid=7, how="exit code 3", group="media")
            event = await reader.next()
            assert event is not None
            assert event["message"] == "the worker process 7 is gone: exit code 3"
            assert (event["level"], event["source"], event["group"]) == ("warning", "tako", "media")
            assert event["at"] <= clock.iso(clock.SystemClock().now())
            reader.close()

    in_a_loop(body)


def test_an_event_may_come_from_any_thread(home: Home) -> None:
    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            reader = await reading(home)
            await asyncio.gather(*(asyncio.to_thread(feed.publish, "tako", {"n": n}) for n in range(50)))
            heard = [await reader.next() for _ in range(50)]
            assert sorted(event["n"] for event in heard if event) == list(range(50))
            reader.close()

    in_a_loop(body)


def test_a_reader_that_reads_nothing_is_dropped_and_the_others_and_the_supervisor_go_on(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MOST_BEHIND", 200_000)
    big = {"event": "output", "text": "x" * 50_000}

    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            sleeper = socket.socket(socket.AF_UNIX)
            sleeper.connect(str(feed._path))
            await eventually(lambda: len(feed._readers) == 1)
            awake = await reading(home)
            for _ in range(100):
                feed.publish("default", big)
                assert (await awake.next() or {})["text"] == big["text"]
            assert len(feed._readers) == 1
            received = 0
            while part := await asyncio.to_thread(sleeper.recv, 1 << 20):
                received += len(part)
            assert received < 100 * 50_000
            sleeper.close()
            awake.close()

    in_a_loop(body)


def test_who_has_been_let_in_misses_nothing_and_a_supervisor_that_does_not_answer_lets_nobody_in(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "ANSWER", 0.1)

    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            reader = await reading(home)
            feed.publish("tako", {"n": 1})
            assert await reader.next() == {"n": 1, "source": "tako"}
            reader.close()
        silent = socket.socket(socket.AF_UNIX)
        silent.bind(str(feed._path))
        silent.listen()
        assert await follow(home.app_dir) is None
        silent.close()

    in_a_loop(body)


def test_the_end_of_the_supervisor_brings_what_was_on_its_way_and_then_the_end(home: Home) -> None:
    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            reader = await reading(home)
            feed.publish("tako", {"event": "worker.died"})
            await asyncio.sleep(0)
        assert (await reader.next() or {})["event"] == "worker.died"
        assert await reader.next() is None
        reader.close()
        assert await follow(home.app_dir) is None

    in_a_loop(body)


def test_only_the_same_user_may_connect(home: Home) -> None:
    async def body() -> None:
        async with Feed(home.app_dir) as feed:
            assert stat.S_IMODE(feed._path.stat().st_mode) == 0o600
            assert stat.S_IMODE(feed._path.parent.stat().st_mode) == 0o700
            if os.getuid() == 0:
                assert await asyncio.to_thread(_refused_to_a_stranger, feed._path)

    in_a_loop(body)


def _refused_to_a_stranger(path: Path) -> bool:
    """Where the folders would let everybody through, the socket's own mode does not."""
    for folder in (path.parent, *path.parent.parents):
        with contextlib.suppress(OSError):
            if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
                folder.chmod(0o755)
    code = f"""
import os, socket
os.setuid(65534)
try:
    socket.socket(socket.AF_UNIX).connect({str(path)!r})
except PermissionError:
    print("refused")
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return asked.stdout == "refused\n"


def test_a_path_that_is_too_long_for_a_socket_goes_where_the_bell_goes(home: Home) -> None:
    deep = Home("shop", home.data_dir / ("deep" * 30))

    async def body() -> None:
        async with Feed(deep.app_dir) as feed:
            assert len(os.fsencode(feed._path)) < 104
            reader = await reading(deep)
            feed.publish("tako", {"n": 1})
            assert await reader.next() == {"n": 1, "source": "tako"}
            reader.close()
            assert stat.S_IMODE(feed._path.parent.stat().st_mode) == 0o700
        feed._path.parent.rmdir()

    in_a_loop(body)


def test_a_feed_that_cannot_be_had_is_said_and_stops_nobody(home: Home) -> None:
    home.app_dir.mkdir(parents=True)
    (home.app_dir / "feed").write_text("in the way")
    said: list[dict[str, Any]] = []

    async def body() -> None:
        with log.sink(said.append):
            async with Feed(home.app_dir) as feed:
                feed.publish("tako", {"n": 1})

    in_a_loop(body)
    assert [event["event"] for event in said] == ["feed.missing"]


def test_who_supervises_is_told_until_its_process_is_gone_however_it_went(home: Home) -> None:
    assert supervising(home.app_dir) is None
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = script(
            """
            import asyncio, signal
            from tako_runtime import store
            from tako_runtime.feed import Feed
            from tako_runtime.server import alone

            async def main():
                ended = asyncio.Event()
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
                app_dir = store.locate().app_dir
                with alone(app_dir, "tako dev"):
                    async with Feed(app_dir):
                        print("up", flush=True)
                        await ended.wait()

            asyncio.run(main())
            """,
            home=home,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n", process.communicate()
        assert supervising(home.app_dir) == feed.Supervising(process.pid, "tako dev")
        process.send_signal(number)
        if number == signal.SIGTERM:
            finished(process)
        else:
            process.communicate()
        until(lambda: supervising(home.app_dir) is None)


def test_a_command_tells_of_a_run_that_it_has_ended_and_of_nothing_else(home: Home) -> None:
    feed.tell(home.app_dir, "run.cancelled", run="r", reason="nobody runs here")
    heard: list[dict[str, Any]] = []

    async def body() -> None:
        async with Feed(home.app_dir, heard.append) as served:

            def say(line: bytes) -> None:
                with socket.socket(socket.AF_UNIX) as speaker:
                    speaker.connect(str(served._path))
                    with contextlib.suppress(OSError):
                        speaker.sendall(line)

            odd = {"at": "x", "level": "info", "message": "m"}
            for line in (
                b"no json\n", b"[]\n", b"1\n", b"\xff\n", b'{"event":"run.cancelled"}\n', b"x" * 200_000,
                json.dumps({**odd, "event": "run.dead"}).encode() + b"\n",
                json.dumps({**odd, "event": ["run.cancelled"]}).encode() + b"\n",
            ):  # fmt: skip
                await asyncio.to_thread(say, line)
            await asyncio.to_thread(feed.tell, home.app_dir, "run.cancelled", run="r", reason="enough")
            await eventually(lambda: heard)

    in_a_loop(body)
    [event] = heard
    assert (event["event"], event["run"], event["level"], event["message"]) == (
        "run.cancelled", "r", "info", "cancelled: enough",
    )  # fmt: skip
