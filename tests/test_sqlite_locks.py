"""Many who write to the embedded store: one commit for all, whose turn it is, and trouble that passes."""

import asyncio
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import finished, healthy, lock_held, script, until

from tako_runtime.bell import Bell
from tako_runtime.errors import StoreBusy, StoreLocked
from tako_runtime.store import Home, base, open_store, sqlite
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore

# --- one commit for many ---------------------------------------------------------------------------------------------


@pytest.fixture
def counted(home: Home) -> Iterator[tuple[StoreThread, Callable[[], int]]]:
    """A store, and how many transactions it has committed."""
    commits: list[None] = []

    def connect() -> base.Store:
        store = SqliteStore(home.app_dir / "runs.db")
        store._db.set_commit_hook(lambda: bool(commits.append(None)))
        return store

    opened = StoreThread(connect, Bell(home.app_dir))
    yield opened, lambda: len(commits)
    opened.close()


def keep(name: str) -> base.SendSignal:
    return base.SendSignal(name=name, payload="1", now=0, expires_at=1 << 60)


def test_what_one_pass_of_a_loop_asks_for_is_one_commit(counted: tuple[StoreThread, Callable[[], int]]) -> None:
    opened, commits = counted
    before = commits()

    async def ask() -> None:
        await asyncio.gather(*(opened.do(keep(f"s{n}")) for n in range(500)))

    asyncio.run(ask())
    assert commits() - before == 1
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 500


def test_what_many_threads_ask_for_while_the_store_is_busy_is_one_commit(
    counted: tuple[StoreThread, Callable[[], int]], path: Path
) -> None:
    opened, commits = counted
    before = commits()
    with ThreadPoolExecutor(33) as pool:
        with lock_held(path):
            first = pool.submit(opened.do_sync, keep("first"))
            until(opened._using.locked)  # its turn has not come
            rest = [pool.submit(opened.do_sync, keep(f"s{n}")) for n in range(32)]
            until(lambda: opened._queue.qsize() == 32)
        assert [job.result() for job in [first, *rest]] == [0] * 33
    assert commits() - before == 2


def test_reading_takes_no_lock_and_commits_nothing(counted: tuple[StoreThread, Callable[[], int]], path: Path) -> None:
    opened, commits = counted
    before = commits()
    with lock_held(path):
        assert opened.do_sync(base.ListRuns(), timeout=20) == []
        assert opened.do_sync(base.CountRuns(), timeout=20) == {}
    assert commits() == before


def test_closing_waits_for_what_is_queued(home: Home, path: Path) -> None:
    opened = open_store(home)
    with ThreadPoolExecutor(9) as pool:
        with lock_held(path):
            asked = [pool.submit(opened.do_sync, keep("s0"))]
            until(opened._using.locked)  # its turn has not come
            asked += [pool.submit(opened.do_sync, keep(f"s{n}")) for n in range(1, 8)]
            until(lambda: opened._queue.qsize() == 7)
            closing = pool.submit(opened.close)
            until(lambda: opened._closed)
        closing.result(timeout=60)
        assert [job.result(timeout=60) for job in asked] == [0] * 8
    again = open_store(home)
    assert len(again.do_sync(base.KeptSignals(now=0))) == 8
    again.close()


# --- trouble that passes ---------------------------------------------------------------------------------------------

HOLDS_THE_LOCK = """
    import sys
    from pathlib import Path
    from tako_runtime.store.turnstile import Turnstile
    with Turnstile(Path(sys.argv[1]), 60):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def holder(path: Path, opened: StoreThread) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the writers' lock until it reads a line."""
    process = script(HOLDS_THE_LOCK, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_callers_are_told_that_the_store_is_locked_and_by_whom_and_what_they_asked_for_is_not_stored(
    home: Home, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE", 1)
    opened = open_store(home)

    async def ask() -> list[Any]:
        asked = [asyncio.ensure_future(opened.do(keep(f"s{n}"))) for n in range(50)]
        await asyncio.wait(asked, timeout=20)  # for all of them together, not for one after the other
        return [each.exception() if each.done() else each for each in asked]

    told = asyncio.run(ask())
    assert {type(each) for each in told} == {StoreLocked}
    assert str(holder.pid) in str(told[0])
    finished_by_hand(holder)
    assert opened.do_sync(keep("after")) == 0
    assert [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))] == ["after"]
    opened.close()


def test_a_caller_without_patience_is_told_even_where_its_turn_has_begun(
    opened: StoreThread, holder: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(opened.do_sync, keep("s"), timeout=1)
        try:
            assert isinstance(asked.exception(timeout=20), StoreBusy)
        finally:
            finished_by_hand(holder)
    assert opened.do_sync(base.KeptSignals(now=0)) == []


def test_a_caller_whose_turn_has_not_come_is_told_so_and_is_not_served_later(
    opened: StoreThread, holder: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(opened.do_sync, keep("patient"), timeout=60)
        until(opened._using.locked)
        with pytest.raises(StoreBusy, match="locked for 1 s") as caught:
            opened.do_sync(keep("impatient"), timeout=1)
        assert "Nothing was stored" in caught.value.hint
        finished_by_hand(holder)
        assert patient.result() == 0
    assert [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))] == ["patient"]


def finished_by_hand(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    holder.wait(timeout=20)


def test_a_lock_ends_with_the_process_that_held_it(opened: StoreThread, holder: subprocess.Popen[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(opened.do_sync, keep("s"))
        until(opened._using.locked)
        holder.kill()
        assert waiting.result(timeout=20) == 0


def test_a_tool_that_holds_the_file_for_long_is_trouble_that_passes(
    home: Home, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 100)
    opened = open_store(home)
    tool = apsw.Connection(str(path))
    tool.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy, match="BusyError"):
        opened.do_sync(keep("s"))
    assert opened.do_sync(base.ListRuns()) == []
    tool.execute("ROLLBACK")
    assert opened.do_sync(base.KeptSignals(now=0)) == []
    assert opened.do_sync(keep("s")) == 0
    tool.close()
    opened.close()


def test_a_full_store_is_trouble_that_passes(home: Home, path: Path) -> None:
    stores: list[SqliteStore] = []

    def connect() -> base.Store:
        stores.append(SqliteStore(path))
        return stores[0]

    opened = StoreThread(connect, Bell(home.app_dir))
    full = stores[0]._db.pragma("page_count")
    stores[0]._db.pragma("max_page_count", full)
    large = base.SendSignal(name="large", payload="1" * 100_000, now=0, expires_at=1 << 60)
    with pytest.raises(StoreBusy, match="FullError"):
        opened.do_sync(large)
    assert opened.do_sync(base.KeptSignals(now=0)) == []
    stores[0]._db.pragma("max_page_count", 1 << 30)
    assert opened.do_sync(large) == 0
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 1
    opened.close()
    assert healthy(path)


def test_a_disk_that_takes_no_more_is_trouble_that_passes(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import resource
            from tako_runtime import store
            from tako_runtime.errors import StoreBusy
            from tako_runtime.store import base
            opened = store.current()
            def send(name):
                opened.do_sync(base.SendSignal(name=name, payload="1" * 100_000, now=0, expires_at=1 << 60))
            def kept():
                return [each.name for each in opened.do_sync(base.KeptSignals(now=0))]
            send("before")
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            for _ in range(5):
                try:
                    send("during")
                    print("stored")
                except StoreBusy as busy:
                    print("busy:", busy.hint[:18])
            print(kept())
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            send("after")
            print(kept())
            opened.close()
            """,
            home=home,
        )
    )
    *tries, during, after = told.splitlines()
    assert "busy: Nothing was stored" in tries
    stored = ["before"] + ["during"] * tries.count("stored")
    assert during == str(stored)
    assert after == str([*stored, "after"])
    assert healthy(path)


# --- many processes --------------------------------------------------------------------------------------------------


BUSY_PROCESS = """
    import asyncio, sys, threading, time
    from tako_runtime import clock, signal, store, workflow
    from tako_runtime.run import StepRecord, WorkerRecord, new_id
    from tako_runtime.state import Interrupted, Returned, settle
    from tako_runtime.store import base

    @workflow("order")
    async def order(payload, step): ...

    async def main(me, seconds):
        opened, now = store.current(), clock.SystemClock().now
        worker = "w-" + me
        await opened.do(base.AddWorker(worker=WorkerRecord(worker, "default", "host", 1, "dev", now(), now())))
        end, counts = time.monotonic() + seconds, [0, 0]
        async def enqueues():
            while time.monotonic() < end:
                await order.enqueue({"from": me})
                counts[0] += 1
        async def signals():
            while time.monotonic() < end:
                await signal("go:" + me, counts[0])
        async def lists():
            while time.monotonic() < end:
                await opened.do(base.ListRuns(limit=20))
                await opened.do(base.CountRuns())
        async def works():
            claim = dict(worker=worker, group="default", workflows=["order"])
            while time.monotonic() < end:
                for run in [each.run for each in await opened.do(base.ClaimRuns(limit=5, now=now(), **claim))]:
                    step = StepRecord("run", "a", 1, "done", run.attempt, now(), now(), result=b"1")
                    assert await opened.do(base.SaveStep(seq=run.seq, claim=run.claim, step=step)) == step
                    assert await opened.do(base.Apply(change=settle(run, Returned("1"), now())))
                    counts[1] += 1
        await asyncio.gather(enqueues(), signals(), lists(), works())
        print(*counts)

    asyncio.run(main(*sys.argv[1:2], float(sys.argv[2])))
    store.current().close()
"""


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_processes_that_enqueue_signal_list_and_save_never_hear_that_the_store_is_locked(
    home: Home, path: Path, seconds: float
) -> None:
    processes = [script(BUSY_PROCESS, n, seconds, home=home) for n in range(8)]
    told = [tuple(map(int, finished(process, seconds + 120).split())) for process in processes]
    assert all(enqueued > 0 for enqueued, _ in told)
    opened = open_store(home)
    live = opened.do_sync(base.CountRuns())
    opened.close()
    enqueued, ended = (sum(column) for column in zip(*told, strict=True))
    assert live.get(("pending", "queued"), 0) == enqueued - ended
    assert sum(live.values()) == enqueued - ended
    assert healthy(path)
