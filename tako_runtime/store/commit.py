"""The store thread: one synced commit carries what many callers queued.

Callers, async or sync, queue operations and wait. The thread takes everything that is queued, runs it in one
transaction, rings the bell, then resolves the futures. What one pass of an event loop queues travels together: a
hundred handlers that go on in the same pass make one batch, not a hundred.

A batch that all runs in a worker's loop wait for is carried out by the loop itself, if the disk is fast and no lock is
to be waited for (`StoreThread.at_once`): there is nothing else that the loop could do meanwhile, and two threads that
wake each other up take longer than the disk does.
"""

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from tako_runtime import clock
from tako_runtime.bell import ENDED, Bell
from tako_runtime.clock import Clock, MachineClock, SystemClock
from tako_runtime.errors import StoreBusy, StoreError, StoreUnreachable, TakoError
from tako_runtime.store.base import Operation, Store, Topics
from tako_runtime.store.outbox import Outbox, Parcel, Trouble

R = TypeVar("R")

#: A synced batch that takes longer than this, in microseconds, has the next ones left to the thread: a loop may have
#: more to do than its runs know of, and beside so slow a disk the waking up does not count.
AT_ONCE = 10_000

#: So that a flood of callers holds the write lock, which other processes wait for, only so long at a time.
MAX_BATCH = 1_000

#: How long a sync caller waits for its turn, in seconds. An async one sets its own limit (`asyncio.timeout`); the store
#: itself says that it is busy where another process holds it for long.
PATIENCE = 60.0


class Relaying(Protocol):
    """What passes on, within, what other machines write."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def begin_anew(self) -> None:
        """The store may be elsewhere now."""


class StoreThread:
    """A store that any thread and any event loop of this process may use. Its connection is used by one of them at a
    time. `close()` waits for what is queued.

    A `patient` one may begin while the store cannot be had: it is opened at the first use that finds it, and until then
    each use fails with that `StoreBusy`.

    SQLite must not be carried over a fork. So before one the connection is closed, in whatever thread the fork happens,
    and the parent opens it again at the next use; a child opens a store of its own.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        bell: Bell,
        relay: "Callable[[Bell], Relaying] | None" = None,
        name: str = "tako-store",
        patient: bool = False,
    ) -> None:
        self.bell = bell
        self.shared = relay is not None  # whether other machines have it too
        self._relay, self._patient = relay, patient
        self._relaying: Relaying | None = None
        self._open_store = open_store
        self._store: Store | None = None
        self._queue: SimpleQueue[Parcel | None] = SimpleQueue()
        self._door = threading.Lock()  # held to queue something, and to close
        self._closed = ""
        self._using = threading.Lock()  # held while the connection is in use; a fork takes it
        self._here: int | None = None  # the thread that uses it at once
        self._sent = 0  # how many parcels the thread has yet to carry out
        self._slow = False  # whether the last batch took long that was synced
        self._outboxes: dict[asyncio.AbstractEventLoop, Outbox] = {}
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name=name, daemon=True)
        _forks.alive.add(self)
        self._thread.start()
        opened.result()

    @property
    def clock(self) -> Clock:
        """The one that its times are of. Who works for a store that no other machine has goes by this one's own, though
        the process may know of a shared one too, and by how much that one's is ahead."""
        return SystemClock() if self.shared else MachineClock()

    def do(self, op: Operation[R]) -> "asyncio.Future[R]":
        """Run `op`; the answer comes after the commit that carries it. Raises `StoreBusy` for what may work later."""
        return self.outbox().do(op)

    def outbox(self) -> Outbox:
        """What takes the operations of the running event loop: for who has many, and saves the looking it up."""
        loop = asyncio.get_running_loop()
        outbox = self._outboxes.get(loop)
        if outbox is None:
            with self._door:
                live = {lp: box for lp, box in self._outboxes.items() if not lp.is_closed()}
                outbox = live[loop] = Outbox(loop, self)
                self._outboxes = live
        return outbox

    def do_sync(self, op: Operation[R], timeout: float = PATIENCE) -> R:
        """The same for callers without an event loop. `StoreBusy` if its turn has not come after `timeout` seconds."""
        future = self.ask(op)
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.cancel():  # it is its turn: the answer is near
                return future.result()
            raise StoreBusy(f"the store has been locked for {timeout:g} s") from None

    def ask(self, op: Operation[R]) -> "Future[R]":
        """The same for who sets a limit of his own."""
        if self._in_the_midst():  # of a signal handler, or a finalizer
            raise StoreError("the store cannot be asked in the midst of a commit of the same thread")
        future: Future[R] = Future()
        self.send(Parcel([op], [future], None))
        return future

    def relay(self) -> AbstractContextManager[object]:
        """Within, this machine's bell rings for what other machines write to a shared store. One process of a machine
        does it for all of them."""
        if self._relay is None:
            return contextlib.nullcontext()
        self._relaying = self._relay(self.bell)
        return self._relaying

    def reopen(self) -> None:
        """Go on with the store where its secrets say by now that it is, and if it cannot be opened there, as before.
        Raises what opening it raises."""
        fresh = self._open_store()
        with self._using:
            if self._store is not None:
                self._store.close()
            self._store = fresh
        if self._relaying is not None:
            self._relaying.begin_anew()

    def close(self) -> None:
        with self._door:
            if self._closed:
                return
            self._closed = "the store is closed"
            self._queue.put(None)
        self._thread.join()
        self.bell.close()

    def at_once(self, parcel: Parcel) -> bool:
        """Carry it out in the caller's own thread, if nothing stands in its way; whether it was. What fails here has
        not been written: the thread does it again, with patience, and says what is the matter."""
        if self.shared or self._slow or not self._using.acquire(blocking=False):
            return False
        answers: Sequence[Any] | None = None
        try:
            self._here = threading.get_ident()
            store = self._store
            if store is None or self._closed or self._sent:  # nor may it overtake what the loop has sent before
                return False
            store.in_doubt = False
            with store.turn_at_once(any(op.writes for op in parcel.ops)) as is_ours:
                if not is_ours:
                    return False
                answers, topics = self._execute(store, parcel.ops)
            if topics:
                self.bell.ring(topics)
        except TakoError:
            return False
        except Exception as error:  # noqa: BLE001 -- a bug; or a signal handler's, which the loop must hear of as well
            parcel.report(error)
            if answers is None:
                if store is None or not store.in_doubt:
                    return False
                answers = [Trouble(_unknown(error))] * len(parcel.ops)
        finally:
            self._here = None
            self._using.release()
        parcel.resolve(answers)
        return True

    def send(self, parcel: Parcel) -> None:
        """To the thread. Raises `StoreError` once it is closed."""
        with self._door:
            if self._closed:
                raise StoreError(self._closed)
            self._sent += 1
            self._queue.put(parcel)

    # --- around a fork ---

    def before_fork(self) -> None:
        if self._in_the_midst():
            return
        self._using.acquire()
        if self._store is not None:
            self._store.close()
            self._store = None

    def after_fork(self) -> None:
        if not self._in_the_midst():
            self._using.release()

    def _in_the_midst(self) -> bool:
        """Where a signal handler has come in while its thread carries out a batch. If it forks, the parent has to go on
        with its connection; the child has it, and must end within the handler."""
        return self._here == threading.get_ident()

    def after_fork_in_child(self) -> None:
        self._closed = "the store was opened before a fork: open one of this process's own"
        self._door = self._using = threading.Lock()  # threads of the parent may have held them

    # --- the thread ---

    def _run(self, opened: "Future[None]") -> None:
        try:
            with self._using:
                self._store = self._open_store()
        except BaseException as error:  # noqa: BLE001 -- it belongs to the caller, who waits for it
            if not (self._patient and isinstance(error, StoreBusy)):
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
            self._commit([parcel for parcel in parcels if parcel is not None])
        with self._using:
            if self._store is not None:
                self._store.close()
                self._store = None  # a later fork must not close it again: its files' numbers are others' then

    def _commit(self, parcels: list[Parcel]) -> None:
        if not parcels:
            return
        with self._using:
            begun, answers, topics = self._transact(parcels)
            with self._door:
                self._sent -= len(parcels)
        if topics and topics != ENDED:
            self.bell.ring(topics)
        at = 0
        for parcel in begun:
            parcel.answer(answers[at : at + len(parcel.ops)])
            at += len(parcel.ops)
        if topics == ENDED:  # nobody starts late for that: the handlers go on first
            self.bell.ring(topics)

    def _transact(self, parcels: list[Parcel]) -> tuple[list[Parcel], Sequence[Any], Topics]:
        """Everything in one transaction. Who has given up waiting by the time that the turn comes is not served."""
        begun: list[Parcel] | None = None
        try:
            store = self._store = self._store or self._open_store()
            writes = any(op.writes for parcel in parcels for op in parcel.ops)
            with store.turn() if writes else contextlib.nullcontext():
                begun = [parcel for parcel in parcels if parcel.begin()]
                ops = begun[0].ops if len(begun) == 1 else [op for parcel in begun for op in parcel.ops]
                if not ops:
                    return [], (), set()
                try:
                    answers, topics = self._execute(store, ops)
                except Exception as error:  # noqa: BLE001 -- every error has a caller who waits for it
                    answers, topics = _one_by_one(store, ops, error)
                return begun, answers, topics
        except Exception as error:  # noqa: BLE001 -- the turn did not come, or the file cannot be opened any more
            begun = [parcel for parcel in parcels if parcel.begin()] if begun is None else begun
            return begun, [Trouble(error)] * sum(len(parcel.ops) for parcel in begun), set()

    def _execute(self, store: Store, ops: Sequence[Operation[Any]]) -> tuple[list[Any], Topics]:
        began = clock.monotonic()
        try:
            return store.execute(ops)
        finally:
            slow = clock.monotonic() - began > AT_ONCE
            if slow or any(op.writes and op.acknowledged for op in ops):  # what waits for no disk shows nothing of it
                self._slow = slow


class _Forks:
    """Every store thread of this process, closed around each fork; threads that fork do so one after the other."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[StoreThread] = weakref.WeakSet()
        self._one = threading.Lock()
        self._closed: list[StoreThread] = []

    def before(self) -> None:
        self._one.acquire()
        self._closed = list(self.alive)
        for thread in self._closed:
            thread.before_fork()

    def after_in_parent(self) -> None:
        for thread in self._closed:
            thread.after_fork()
        self._closed = []
        self._one.release()

    def after_in_child(self) -> None:
        for thread in self._closed:
            thread.after_fork_in_child()
        self.alive, self._one, self._closed = weakref.WeakSet(), threading.Lock(), []


_forks = _Forks()
os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child)


def _one_by_one(store: Store, ops: Sequence[Operation[Any]], error: Exception) -> tuple[list[Any], Topics]:
    """The batch was rolled back. Give each operation its own transaction, so that one cannot fail another; but not
    where nobody can be asked, which is no operation's fault."""
    if len(ops) == 1 or isinstance(error, StoreUnreachable):
        return [Trouble(error)] * len(ops), set()
    answers: list[Any] = []
    topics: Topics = set()
    for op in ops:
        try:
            [answer], rung = store.execute([op])
            topics |= rung
        except Exception as its_own:  # noqa: BLE001
            answer = Trouble(its_own)
        answers.append(answer)
    return answers, topics


def _unknown(error: Exception) -> StoreUnreachable:
    return StoreUnreachable(
        f"{type(error).__name__} was raised in the midst of a commit: whether it was stored is not known",
        hint="A signal handler that raises stops whatever its process is about: let it only take a note.",
    )
