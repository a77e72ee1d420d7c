"""The bell: a ring reaches whoever listens, in this process and in others, and troubles nobody else."""

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from conftest import script

from tako_runtime import bell as bells
from tako_runtime.bell import Bell, Listener
from tako_runtime.store import Home


@pytest.fixture
def bell(home: Home) -> Any:
    bell = Bell(home.app_dir)
    yield bell
    bell.close()


class Ear:
    """A listener that notes what it hears."""

    def __init__(self, bell: Bell, name: str) -> None:
        self.listener: Listener = bell.listen(name)
        self.heard: asyncio.Queue[set[str]] = asyncio.Queue()
        self.listener.start(self.heard.put_nowait)

    async def hears(self) -> set[str]:
        async with asyncio.timeout(20):
            return await self.heard.get()


def in_a_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


def test_a_ring_reaches_every_listener_with_its_topics(bell: Bell) -> None:
    async def body() -> None:
        ears = [Ear(bell, f"w-{n}") for n in range(5)]
        bell.ring({"due:default", "signal"})
        assert [await ear.hears() for ear in ears] == [{"due:default", "signal"}] * 5
        for ear in ears:
            ear.listener.close()

    in_a_loop(body)


def test_a_ring_before_anybody_listens_and_one_to_a_listener_that_has_left_are_no_errors(bell: Bell) -> None:
    async def body() -> None:
        bell.ring({"signal"})
        left, here = Ear(bell, "w-1"), Ear(bell, "w-2")
        left.listener.close()
        bell.ring({"signal"})
        assert await here.hears() == {"signal"}
        assert left.heard.empty()
        here.listener.close()
        assert list(bell._folder.iterdir()) == []

    in_a_loop(body)


def test_rings_that_were_not_heard_yet_are_heard_together(bell: Bell) -> None:
    async def body() -> None:
        ear = Ear(bell, "w-1")
        for topic in ("due:a", "due:b", "cancel"):
            bell.ring({topic})
        heard: set[str] = set()
        while heard != {"due:a", "due:b", "cancel"}:
            heard |= await ear.hears()
        ear.listener.close()

    in_a_loop(body)


def test_only_who_waits_for_an_end_is_rung_when_a_run_ends(bell: Bell) -> None:
    async def body() -> None:
        worker, waiting = Ear(bell, "w-1"), Ear(bell, bells.WAITING + "1")
        bell.ring({"ended"})
        assert await waiting.hears() == {"ended"}
        assert worker.heard.empty()
        bell.ring({"ended", "due:default"})
        assert await worker.hears() == {"ended", "due:default"}
        worker.listener.close()
        waiting.listener.close()

    in_a_loop(body)


def test_a_socket_whose_process_is_gone_is_taken_away_and_the_others_are_rung(bell: Bell, home: Home) -> None:
    async def body() -> None:
        dead = script(
            """
            import sys
            from tako_runtime.bell import Bell
            from tako_runtime.store import locate
            listener = Bell(locate().app_dir).listen("w-dead")
            print("listening", flush=True)
            sys.stdin.readline()
            """,
            home=home,
        )
        assert dead.stdout is not None
        assert dead.stdout.readline() == "listening\n"
        dead.kill()
        dead.communicate()
        ear = Ear(bell, "w-1")
        assert sorted(path.name for path in bell._folder.iterdir()) == ["w-1", "w-dead"]
        bell.ring({"signal"})
        assert await ear.hears() == {"signal"}
        assert [path.name for path in bell._folder.iterdir()] == ["w-1"]
        ear.listener.close()

    in_a_loop(body)


def test_a_listener_that_does_not_listen_blocks_nobody(bell: Bell) -> None:
    async def body() -> None:
        deaf, ear = bell.listen("w-deaf"), Ear(bell, "w-1")
        for n in range(5_000):  # far more than any buffer takes
            bell.ring({f"due:group-{n:04}-{'x' * 100}"})
        bell.ring({"signal"})
        assert await ear.hears()
        assert "w-deaf" in [path.name for path in bell._folder.iterdir()]
        deaf.close()
        ear.listener.close()

    in_a_loop(body)


def test_a_ring_crosses_from_one_process_to_another(bell: Bell, home: Home) -> None:
    async def body() -> None:
        ear = Ear(bell, "w-1")
        ringer = script("from tako_runtime import signal_sync; signal_sync('nobody')", home=home)
        _, said = await asyncio.to_thread(ringer.communicate)
        assert ringer.returncode == 0, said
        assert ear.heard.empty()  # nobody waits for it: it concerns nobody
        ringer = script(
            """
            from tako_runtime import workflow
            @workflow("order")
            async def order(step): ...
            order.enqueue_sync()
            """,
            home=home,
        )
        assert await ear.hears() == {"due:default"}
        _, said = await asyncio.to_thread(ringer.communicate)
        assert ringer.returncode == 0, said
        ear.listener.close()

    in_a_loop(body)


def test_an_app_on_a_long_path_has_its_bell_too(home: Home) -> None:
    async def body() -> None:
        app_dir = home.data_dir / ("long-" * 30) / ("é" * 60) / "apps" / "shop"
        one, other = Bell(app_dir), Bell(app_dir)
        ear = Ear(one, "w-" + "0" * 36)
        assert not one._folder.is_relative_to(home.data_dir)
        other.ring({"signal"})
        assert await ear.hears() == {"signal"}
        assert Bell(app_dir.parent / "market")._folder != one._folder
        ear.listener.close()
        one.close()
        other.close()
        one._folder.rmdir()

    in_a_loop(body)


def test_the_longest_path_that_needs_no_other_folder_holds_a_workers_socket(home: Home) -> None:
    async def body() -> None:
        room = bells._LONGEST_FOLDER - len(os.fsencode(home.data_dir)) - len("//bell")
        bell = Bell(home.data_dir / ("x" * room))
        assert len(os.fsencode(bell._folder)) == bells._LONGEST_FOLDER
        assert bell._folder.is_relative_to(home.data_dir)
        try:
            ear = Ear(bell, "w-" + "0" * 36)
        except OSError:
            ear = None
        assert ear is not None, "a worker's id does not fit behind the longest folder"
        ear.listener.close()

    in_a_loop(body)


def test_a_short_folder_that_is_open_to_others_is_not_used_and_the_worker_does_without_its_bell(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = home.data_dir / ("long-" * 30)
    uid = 4_000_000_000  # whose runtime folder is not there
    open_to_all = Path(f"/tmp/tako-{uid}")
    monkeypatch.setattr(os, "getuid", lambda: uid)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    try:
        bell = Bell(long)
        assert bell._folder.is_relative_to(long)
        bell.ring({"signal"})
        listener = bell.listen("w-" + "0" * 36)  # the look once a second has to do
        listener.close()
        bell.close()
    finally:
        open_to_all.rmdir()


def test_only_the_user_may_ring(bell: Bell) -> None:
    async def body() -> None:
        ear = Ear(bell, "w-1")
        assert stat.S_IMODE(bell._folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((bell._folder / "w-1").stat().st_mode) == 0o600
        ear.listener.close()

    in_a_loop(body)


def test_noise_on_the_socket_is_no_error(bell: Bell) -> None:
    async def body() -> None:
        ear = Ear(bell, "w-1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"\xff\xfe \x00", str(bell._folder / "w-1"))
        await ear.hears()
        bell.ring({"signal"})
        assert await ear.hears() == {"signal"}
        ear.listener.close()

    in_a_loop(body)


def test_a_worker_that_comes_back_under_its_name_hears_again(bell: Bell) -> None:
    async def body() -> None:
        left_behind = bell.listen("w-1")
        left_behind._socket.close()
        ear = Ear(bell, "w-1")
        bell.ring({"signal"})
        assert await ear.hears() == {"signal"}
        ear.listener.close()

    in_a_loop(body)


def test_who_was_rung_so_often_at_once_that_rings_were_lost_looks_at_everything(bell: Bell) -> None:
    async def body() -> None:
        ear = Ear(bell, "w-1")
        for _ in range(2_000):  # nobody reads meanwhile
            bell.ring({"due:other"})
        bell.ring({"signal"})
        assert await ear.hears() == {"due:other", "later", "signal", "cancel", "ended"}
        ear.listener.close()

    in_a_loop(body)
