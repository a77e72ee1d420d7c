"""Who carries a batch out on the embedded store: the loop of a worker where all in it wait for it, else the thread."""

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import finished, healthy, lock_held, script
from workers import eventually, result, shown, work

from tako_runtime import Step, SyncStep, workflow
from tako_runtime.errors import StoreBusy, StoreError
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore
from tako_runtime.store.turnstile import Turnstile
from tako_runtime.worker import Worker
from tako_runtime.workflow import Workflow

pytestmark = pytest.mark.usefixtures("clean_registry")

Carried = list[tuple[str, list[type[base.Operation[Any]]]]]


@pytest.fixture
def carried(opened: StoreThread, monkeypatch: pytest.MonkeyPatch) -> Carried:
    """Each batch: who has carried it out ("loop" or "thread"), and its operations. However busy the disk is, it counts
    as fast."""
    monkeypatch.setattr("tako_runtime.store.commit.AT_ONCE", 1 << 60)
    opened._slow = False
    batches: Carried = []
    execute = SqliteStore.execute

    def noting(self: SqliteStore, batch: Sequence[base.Operation[Any]]) -> Any:
        who = "loop" if threading.current_thread() is threading.main_thread() else "thread"
        batches.append((who, [type(op) for op in batch]))
        return execute(self, batch)

    monkeypatch.setattr(SqliteStore, "execute", noting)
    return batches


def whose(batches: Carried, kind: type[base.Operation[Any]]) -> list[str]:
    """Who has carried out the operations of that kind."""
    return [who for who, kinds in batches for each in kinds if each is kind]


def test_what_all_runs_of_a_worker_wait_for_its_loop_carries_out(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("together")
    async def handler(n: int, step: Step) -> int:
        async def body() -> int:
            return n

        return await step.run("first", body) + await step.run("second", body)

    ids = handler.enqueue_many_sync([1, 2, 3])
    work(opened, home)
    assert [result(opened, each) for each in ids] == [2, 4, 6]
    assert set(whose(carried, base.SaveStep)) == set(whose(carried, base.Apply)) == {"loop"}
    assert [kinds.count(base.SaveStep) for _, kinds in carried if base.SaveStep in kinds] == [3, 3]


def test_a_loop_does_not_wait_for_the_disk_while_another_run_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    both, saved = asyncio.Barrier(2), asyncio.Event()

    @workflow("busy")
    async def busy(step: Step) -> None:
        await both.wait()
        await step.run("long", saved.wait)

    @workflow("saves")
    async def saves(step: Step) -> None:
        async def body() -> None: ...

        await both.wait()
        await step.run("first", body)
        await step.run("second", body)
        saved.set()

    busy.enqueue_sync()
    saves.enqueue_sync()
    work(opened, home, concurrency=2)
    assert whose(carried, base.SaveStep)[:2] == ["thread", "thread"]


def test_a_loop_does_not_wait_for_the_disk_while_another_branch_of_the_same_run_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("branches")
    async def handler(step: Step) -> None:
        async def body() -> None: ...

        saved = asyncio.Event()

        async def saves() -> None:
            await asyncio.gather(step.run("first", body), step.run("beside", body))
            await step.run("second", body)
            saved.set()

        await asyncio.gather(saves(), saved.wait())
        await step.run("alone", body)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep) == ["thread", "thread", "thread", "loop"]


def test_steps_that_run_in_threads_and_plain_handlers_are_waited_for_by_the_loop_too(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    @workflow("async-handler")
    async def handler(step: Step) -> None:
        await step.run("in a thread", int)
        await step.run("in another", int)

    @workflow("plain-handler")
    def plain(step: SyncStep) -> None:
        step.run("in a thread", int)
        step.run("in another", int)

    for each in (handler, plain):
        each.enqueue_sync()
        work(opened, home)
    # The first ones may come while the worker asks for what is due next, of which no run knows.
    assert whose(carried, base.SaveStep)[1::2] == whose(carried, base.Apply) == ["loop", "loop"]


def test_the_loop_of_an_app_never_waits_for_the_disk(opened: StoreThread, carried: Carried) -> None:
    @workflow("asked-for")
    async def handler(step: Step) -> None: ...

    asyncio.run(handler.enqueue())
    assert whose(carried, base.Enqueue) == ["thread"]


def test_after_a_slow_batch_the_thread_takes_over_until_one_is_fast_again(
    opened: StoreThread, home: Home, carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = "tako_runtime.store.commit.AT_ONCE"

    @workflow("slow-then-fast")
    async def handler(step: Step) -> None:
        async def takes(longest: int) -> None:
            monkeypatch.setattr(limit, longest)

        for longest in (-1, -1, 1 << 60, 1 << 60):
            await step.run("body", takes, longest)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep) == ["loop", "thread", "thread", "loop"]


@contextmanager
def transaction_of_a_tool(path: Path) -> Iterator[None]:
    db = apsw.Connection(str(path))
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.close()


@pytest.mark.parametrize("held", [lock_held, transaction_of_a_tool], ids=["by a writer", "by a tool"])
def test_the_loop_of_a_worker_goes_on_while_somebody_else_holds_the_store(
    opened: StoreThread, home: Home, path: Path, carried: Carried, held: Callable[[Path], AbstractContextManager[None]]
) -> None:
    holding = asyncio.Event()

    @workflow("held-up")
    async def handler(step: Step) -> str:
        async def body() -> str:
            lock.__enter__()
            holding.set()
            return "saved"

        return await step.run("body", body)

    lock = held(path)
    run_id = handler.enqueue_sync()

    async def meanwhile(worker: Worker) -> None:
        await holding.wait()
        await eventually(opened._using.locked)  # the thread waits for its turn: a loop that did would not come here
        lock.__exit__(None, None, None)
        await eventually(lambda: not worker.runs_in_hand)

    work(opened, home, meanwhile)
    assert result(opened, run_id) == "saved"
    assert whose(carried, base.SaveStep)[-1] == "thread"


def test_a_batch_does_not_overtake_what_its_loop_has_sent_before(opened: StoreThread) -> None:
    def keep(n: int) -> "asyncio.Future[int]":
        return opened.do(base.SendSignal(name="order", payload=str(n), now=0, expires_at=1 << 60))

    async def send() -> None:
        opened.outbox().serve([])
        for n in range(0, 100, 2):
            with opened._using:  # the thread takes the first one from its queue, and has to wait
                first = keep(n)
                await eventually(lambda: opened._sent and not opened._queue.qsize())
            await asyncio.gather(first, keep(n + 1))

    asyncio.run(send())
    kept = opened.do_sync(base.KeptSignals(now=0, limit=1_000))
    assert [int(each.payload) for each in kept] == list(range(100))


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


def test_what_the_store_refuses_in_the_loop_the_thread_does_again(
    opened: StoreThread, home: Home, carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[str] = []
    run_id = saves_one(bodies).enqueue_sync()
    failing(monkeypatch, before=StoreBusy("the disk is full"))
    work(opened, home)
    assert (result(opened, run_id), bodies) == ("saved", ["ran"])
    assert whose(carried, base.SaveStep) == ["thread"]


def test_what_a_signal_handler_raises_after_the_commit_undoes_nothing_and_nothing_is_done_twice(
    opened: StoreThread, home: Home, carried: Carried, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[str] = []
    run_id = saves_one(bodies).enqueue_sync()
    failing(monkeypatch, after=Late("too late"))
    work(opened, home)
    assert (result(opened, run_id), bodies) == ("saved", ["ran"])
    assert whose(carried, base.SaveStep) == ["loop", "loop"]  # it was asked for again, and was there
    assert len(shown(opened, run_id)["attempts"]) == 1


@pytest.mark.parametrize("after", ["BEGIN", "INSERT INTO signals"])
def test_what_a_signal_handler_raises_within_a_transaction_is_told_and_costs_nothing(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after: str
) -> None:
    store = opened._store
    assert isinstance(store, SqliteStore)
    db = store._db

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(db, name)

        def execute(self, text: str, *bound: Any) -> Any:
            done = db.execute(text, *bound)
            if text.startswith(after):
                monkeypatch.undo()
                raise Late("too late")
            return done

    async def send() -> None:
        opened.outbox().serve([])
        monkeypatch.setattr(store, "_db", Interrupted())
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


def test_reading_in_the_loop_takes_no_turn(opened: StoreThread, path: Path, carried: Carried) -> None:
    async def look() -> list[Any]:
        opened.outbox().serve([])
        return await opened.do(base.ListRuns())

    with lock_held(path):
        assert asyncio.run(look()) == []
    assert whose(carried, base.ListRuns) == ["loop"]


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


def test_a_handler_that_has_left_a_step_to_its_thread_is_at_work(
    opened: StoreThread, home: Home, carried: Carried
) -> None:
    begun, left = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        left.wait(20)

    @workflow("leaves-a-step")
    async def handler(step: Step) -> None:
        await step.run("first", int)
        leaving = asyncio.timeout(None)
        with suppress(TimeoutError):
            async with leaving:
                waiting = asyncio.create_task(asyncio.to_thread(begun.wait))
                waiting.add_done_callback(lambda _: leaving.reschedule(0))
                await step.run("slow", slow)
        left.set()
        await eventually(lambda: len(whose(carried, base.SaveStep)) == 2)

    handler.enqueue_sync()
    work(opened, home)
    assert whose(carried, base.SaveStep)[1:] == ["thread"]


def test_a_plain_handler_with_threads_of_its_own_is_one_run(opened: StoreThread, home: Home, carried: Carried) -> None:
    both, done = threading.Barrier(2), asyncio.Event()

    @workflow("busy-beside")
    async def busy(step: Step) -> None:
        await asyncio.to_thread(both.wait, 20)
        await done.wait()

    @workflow("threads")
    def plain(step: SyncStep) -> None:
        both.wait(20)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: step.run(f"step {n}", int), range(40)))
        loop.call_soon_threadsafe(done.set)

    async def meanwhile(worker: Worker) -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        busy.enqueue_sync()
        plain.enqueue_sync()
        await eventually(lambda: done.is_set() and not worker.runs_in_hand)

    loop: asyncio.AbstractEventLoop
    work(opened, home, meanwhile, concurrency=2)
    assert set(whose(carried, base.SaveStep)) == {"thread"}


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


def test_a_shared_store_is_never_asked_in_the_loop(opened: StoreThread, carried: Carried) -> None:
    async def look() -> None:
        opened.outbox().serve([])
        await opened.do(base.DataVersion())

    opened.shared = True
    asyncio.run(look())
    assert whose(carried, base.DataVersion) == ["thread"]


def test_a_checkpoint_that_fails_after_the_commit_does_not_have_it_done_again(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened._store
    assert isinstance(store, SqliteStore)
    db = store._db

    class Checkpointing:
        def __getattr__(self, name: str) -> Any:
            return getattr(db, name)

        def wal_checkpoint(self, **_: Any) -> None:
            raise apsw.IOError("disk I/O error")

    async def send() -> None:
        opened.outbox().serve([])
        monkeypatch.setattr(store, "_db", Checkpointing())
        store._shrunk = True
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
