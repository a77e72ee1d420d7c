"""What goes wrong while a worker's loop carries a batch out: signal handlers, forks, disks."""

import asyncio
import errno
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import Carried, finished, healthy, script, whose
from workers import result, shown, work

from tako_runtime import Step, workflow
from tako_runtime.errors import StoreBusy, StoreError
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.store.turnstile import Turnstile
from tako_runtime.workflow import Workflow

pytestmark = pytest.mark.usefixtures("clean_registry")


class Late(Exception):
    """What a signal handler may raise anywhere in the main thread."""


def failing(monkeypatch: pytest.MonkeyPatch, before: Exception | None = None, after: Exception | None = None) -> None:
    """The first save that the loop carries out comes to grief."""
    execute, failed = SqliteStore.execute, threading.Event()

    def comes_to_grief(self: SqliteStore, batch: Sequence[base.Operation[Any]]) -> Any:
        mine = threading.current_thread() is threading.main_thread() and any(type(op) is base.SaveStep for op in batch)
        if failed.is_set() or not mine:
            return execute(self, batch)
        failed.set()
        if before is not None:
            raise before
        done = execute(self, batch)
        if after is not None:
            raise after
        return done

    monkeypatch.setattr(SqliteStore, "execute", comes_to_grief)


def saves_one(bodies: list[str]) -> Workflow[..., Any]:
    @workflow("saves-one")
    async def handler(step: Step) -> str:
        async def body() -> str:
            bodies.append("ran")
            return "saved"

        return await step.run("body", body)

    return handler


@pytest.mark.parametrize(
    ("trouble", "who"),
    [
        ({"before": StoreBusy("the disk is full")}, ["thread"]),
        ({"after": Late("too late")}, ["loop", "loop"]),  # it is asked for again, and is there
    ],
    ids=["refused by the store", "raised by a signal handler after the commit"],
)
def test_trouble_in_the_loop_costs_no_body_and_no_attempt_and_stores_once(
    opened: StoreThread,
    home: Home,
    carried: Carried,
    monkeypatch: pytest.MonkeyPatch,
    trouble: dict[str, Exception],
    who: list[str],
) -> None:
    bodies: list[str] = []
    run_id = saves_one(bodies).enqueue_sync()
    failing(monkeypatch, **trouble)
    work(opened, home)
    assert (result(opened, run_id), bodies, whose(carried, base.SaveStep)) == ("saved", ["ran"], who)
    assert len(shown(opened, run_id)["attempts"]) == 1


class Connection:
    """The connection of a store, but for what a test has otherwise."""

    def __init__(self, opened: StoreThread) -> None:
        assert isinstance(opened._store, SqliteStore)
        self.store, self.db = opened._store, opened._store._db

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


@pytest.mark.parametrize("after", ["BEGIN", "INSERT INTO signals"])
def test_what_a_signal_handler_raises_within_a_transaction_is_told_and_costs_nothing(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str
) -> None:
    class Interrupted(Connection):
        def execute(self, text: str, *bound: Any) -> Any:
            done = self.db.execute(text, *bound)
            if text.startswith(after):
                monkeypatch.undo()
                raise Late("too late")
            return done

    async def send() -> None:
        opened.outbox().serve([])
        monkeypatch.setattr(opened._store, "_db", Interrupted(opened))
        for n in range(2):
            await opened.do(base.SendSignal(name=str(n), payload="1", now=0, expires_at=1 << 60))

    asyncio.run(send())
    assert [each.name for each in opened.do_sync(base.KeptSignals(now=0))] == ["0", "1"]
    [told] = [record for record in caplog.records if record.name == "asyncio"]
    assert told.exc_info is not None
    assert isinstance(told.exc_info[1], Late)


def test_a_lock_that_cannot_be_asked_for_is_left_to_the_thread(
    opened: StoreThread, home: Home, carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(_: Turnstile) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")
        return really(_)

    bodies: list[str] = []
    run_id, really = saves_one(bodies).enqueue_sync(), Turnstile.take
    monkeypatch.setattr(Turnstile, "take", take)
    work(opened, home)
    assert result(opened, run_id) == "saved"
    assert set(whose(carried, base.SaveStep) + whose(carried, base.Apply)) == {"thread"}


def test_a_signal_handler_may_fork_while_its_loop_carries_a_batch_out(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import asyncio, os, signal
            from tako_runtime import store
            from tako_runtime.store.base import KeptSignals, SendSignal
            from tako_runtime.store.sqlite import SqliteStore

            def fork(*_):
                child = os.fork()
                if child == 0:
                    os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

            def interrupted(self, batch):
                os.kill(os.getpid(), signal.SIGUSR1)
                return execute(self, batch)

            async def send():
                opened.outbox().serve([])
                for n in range(3):
                    await opened.do(SendSignal(name=str(n), payload="1", now=0, expires_at=1 << 60))

            opened, execute, SqliteStore.execute = store.current(), SqliteStore.execute, interrupted
            signal.signal(signal.SIGUSR1, fork)
            asyncio.run(send())
            SqliteStore.execute = execute
            print([kept.name for kept in opened.do_sync(KeptSignals(now=0))])
            opened.close()
            """,
            home=home,
        )
    )
    assert told.splitlines() == ["0", "0", "0", "['0', '1', '2']"]
    assert healthy(path)


def test_a_signal_handler_that_asks_the_store_in_the_midst_of_a_commit_is_refused(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = SqliteStore.execute

    def asks(self: SqliteStore, batch: Sequence[base.Operation[Any]]) -> Any:
        monkeypatch.setattr(SqliteStore, "execute", execute)
        with pytest.raises(StoreError, match="in the midst of a commit"):
            opened.do_sync(base.ListRuns())
        return execute(self, batch)

    async def look() -> list[Any]:
        opened.outbox().serve([])
        monkeypatch.setattr(SqliteStore, "execute", asks)
        return await opened.do(base.ListRuns())

    assert asyncio.run(look()) == []
    assert opened.do_sync(base.ListRuns()) == []


def test_a_checkpoint_that_fails_after_the_commit_does_not_have_it_done_again(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Checkpointing(Connection):
        def wal_checkpoint(self, **_: Any) -> None:
            raise apsw.IOError("disk I/O error")

    async def send() -> None:
        opened.outbox().serve([])
        db = Checkpointing(opened)
        monkeypatch.setattr(db.store, "_db", db)
        db.store._shrunk = True
        await opened.do(base.SendSignal(name="once", payload="1", now=0, expires_at=1 << 60))

    asyncio.run(send())
    assert [each.name for each in opened.do_sync(base.KeptSignals(now=0))] == ["once"]


@pytest.mark.slow
def test_a_loop_that_commits_while_other_threads_fork_loses_nothing(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import asyncio, os, threading
            from tako_runtime import store, workflow
            from tako_runtime.worker import Settings, Worker
            from tako_runtime.workflow import registry

            bodies = []

            @workflow("steps")
            async def steps(step):
                async def body(n):
                    bodies.append(n)
                for n in range(500):
                    await step.run("body", body, n)

            def fork():
                while not done.is_set():
                    child = os.fork()
                    if child == 0:
                        os._exit(0)
                    os.waitpid(child, 0)
                    forked.append(child)

            done, forked = threading.Event(), []
            steps.enqueue_sync()
            thread = threading.Thread(target=fork)
            thread.start()
            home = store.locate()
            worker = Worker(store.current(), home.app_dir, registry, Settings(idle_timeout=1))
            asyncio.run(worker.run())
            done.set()
            thread.join()
            store.current().close()
            print(bodies == list(range(500)), len(forked) > 0)
            """,
            home=home,
        ),
        60,
    )
    assert told == "True True\n"
    opened = open_store(home)
    [run] = opened.do_sync(base.ListRuns())
    assert (run.status, len(opened.do_sync(base.Steps(seq=run.seq)))) == ("succeeded", 500)
    opened.close()
    assert healthy(path)
