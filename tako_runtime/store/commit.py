"""The store thread: one thread owns the connection, and one synced commit carries what many callers queued.

Callers, async or sync, queue operations and wait. The thread takes everything that is queued, runs it in one
transaction, rings the bell, then resolves the futures. What one pass of an event loop queues travels together: a
hundred handlers that go on in the same pass make one batch, not a hundred.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from tako_runtime.bell import Bell
from tako_runtime.errors import StoreBusy, StoreError, TakoError
from tako_runtime.store.base import Operation, Store, Topics

R = TypeVar("R")

#: So that a flood of callers holds the write lock, which other processes wait for, only so long at a time.
MAX_BATCH = 1_000

#: How long a sync caller waits for its turn, in seconds. An async one sets its own limit (`asyncio.timeout`); the store
#: itself says that it is busy where another process holds it for long.
PATIENCE = 60.0


class StoreThread:
    """A store that any thread and any event loop of this process may use. Open it once; `close()` waits for what is
    queued. After a fork the child must not use it (its thread is not there): it opens its own."""

    def __init__(self, open_store: Callable[[], Store], bell: Bell, name: str = "tako-store") -> None:
        self.bell = bell
        self._queue: SimpleQueue[_Parcel | None] = SimpleQueue()
        self._outboxes: dict[asyncio.AbstractEventLoop, _Outbox] = {}
        self._pid = os.getpid()
        self._closed = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(open_store, opened), name=name, daemon=True)
        self._thread.start()
        opened.result()

    def do(self, op: Operation[R]) -> "asyncio.Future[R]":
        """Run `op`; the answer comes after the commit that carries it. Raises `StoreBusy` for what may work later."""
        self._check_open()
        loop = asyncio.get_running_loop()
        outbox = self._outboxes.get(loop)
        if outbox is None:
            outbox = self._outboxes[loop] = _Outbox(loop, self._queue)
            self._outboxes = {lp: box for lp, box in self._outboxes.items() if not lp.is_closed()}
        return cast("asyncio.Future[R]", outbox.send(op))

    def do_sync(self, op: Operation[R], timeout: float = PATIENCE) -> R:
        """The same for callers without an event loop. `StoreBusy` if its turn has not come after `timeout` seconds."""
        self._check_open()
        parcel = _Parcel([op], [Future()], None)
        self._queue.put(parcel)
        future = cast("Future[R]", parcel.futures[0])
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.cancel():  # the thread has begun with it: its answer is near
                return future.result()
            raise StoreBusy(f"the store has been locked for {timeout:g} s") from None

    def close(self) -> None:
        if not self._closed and self._pid == os.getpid():
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self.bell.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    # --- the thread ---

    def _run(self, open_store: Callable[[], Store], opened: "Future[None]") -> None:
        try:
            store = open_store()
        except BaseException as error:  # noqa: BLE001 -- it belongs to the caller, who waits for it
            opened.set_exception(error)
            return
        opened.set_result(None)
        ending = False
        while not ending:
            parcels = [self._queue.get()]
            size = len(parcels[0].ops) if parcels[0] else 0
            while size < MAX_BATCH:
                try:
                    parcels.append(self._queue.get_nowait())
                except Empty:
                    break
                size += len(parcels[-1].ops) if parcels[-1] else 0
            ending = None in parcels
            self._commit(store, [p for p in parcels if p is not None and p.begin()])
        store.close()

    def _commit(self, store: Store, parcels: "list[_Parcel]") -> None:
        ops = parcels[0].ops if len(parcels) == 1 else [op for parcel in parcels for op in parcel.ops]
        if not ops:
            return
        answers: Sequence[Any]
        try:
            answers, topics = store.execute(ops)
        except Exception as error:  # noqa: BLE001 -- every error has a caller who waits for it
            answers, topics = _one_by_one(store, ops, error)
        if topics:
            self.bell.ring(topics)
        at = 0
        for parcel in parcels:
            parcel.answer(answers[at : at + len(parcel.ops)])
            at += len(parcel.ops)


def _one_by_one(store: Store, ops: Sequence[Operation[Any]], error: Exception) -> tuple[list[Any], Topics]:
    """The batch was rolled back. Give each operation its own transaction, so that one cannot fail another."""
    if len(ops) == 1:
        return [_Raise(error)], set()
    answers: list[Any] = []
    topics: Topics = set()
    for op in ops:
        try:
            [answer], rung = store.execute([op])
            topics |= rung
        except Exception as its_own:  # noqa: BLE001
            answer = _Raise(its_own)
        answers.append(answer)
    return answers, topics


class _Raise:
    """An answer that is an exception."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, TakoError) else StoreError(f"{type(error).__name__}: {error}")
        if self.error is not error:
            self.error.__cause__ = error


class _Parcel:
    """Operations that travel together, and the futures that wait for them."""

    __slots__ = ("futures", "loop", "ops")

    def __init__(self, ops: list[Operation[Any]], futures: list[Any], loop: asyncio.AbstractEventLoop | None) -> None:
        self.ops, self.futures, self.loop = ops, futures, loop

    def begin(self) -> bool:
        """False where a sync caller has given up waiting, and was told that nothing was stored."""
        return self.loop is not None or self.futures[0].set_running_or_notify_cancel()

    def answer(self, answers: Sequence[Any]) -> None:
        if self.loop is None:
            _resolve(self.futures, answers)
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed, and its callers are gone with it
            self.loop.call_soon_threadsafe(_resolve, self.futures, answers)


def _resolve(futures: list[Any], answers: Sequence[Any]) -> None:
    for future, answer in zip(futures, answers, strict=True):
        if future.done():  # its caller was cancelled; what it wrote stays
            continue
        if type(answer) is _Raise:
            future.set_exception(answer.error)
        else:
            future.set_result(answer)


class _Outbox:
    """What one pass of an event loop queues, handed over at its end."""

    __slots__ = ("_futures", "_loop", "_ops", "_queue")

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: "SimpleQueue[_Parcel | None]") -> None:
        self._loop, self._queue = loop, queue
        self._ops: list[Operation[Any]] = []
        self._futures: list[asyncio.Future[Any]] = []

    def send(self, op: Operation[Any]) -> "asyncio.Future[Any]":
        if not self._ops:
            self._loop.call_soon(self._hand_over)
        future = self._loop.create_future()
        self._ops.append(op)
        self._futures.append(future)
        return future

    def _hand_over(self) -> None:
        parcel = _Parcel(self._ops, self._futures, self._loop)
        self._ops, self._futures = [], []
        self._queue.put(parcel)
