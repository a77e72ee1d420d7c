"""What one pass of an event loop asks of the store, on its way there and back."""

import asyncio
import contextlib
from collections.abc import Sequence, Sized
from typing import Any, Protocol, TypeVar

from tako_runtime.errors import StoreError, TakoError
from tako_runtime.store.base import Operation

R = TypeVar("R")


class Trouble:
    """An answer that is an exception."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, TakoError) else StoreError(f"{type(error).__name__}: {error}")
        if self.error is not error:
            self.error.__cause__ = error


class Parcel:
    """Operations that travel together, and the futures that wait for them."""

    __slots__ = ("futures", "loop", "ops")

    def __init__(self, ops: list[Operation[Any]], futures: list[Any], loop: asyncio.AbstractEventLoop | None) -> None:
        self.ops, self.futures, self.loop = ops, futures, loop

    def begin(self) -> bool:
        """False where a sync caller has given up waiting, and was told that nothing was stored."""
        return self.loop is not None or self.futures[0].set_running_or_notify_cancel()

    def answer(self, answers: Sequence[Any]) -> None:
        """From the store thread."""
        if self.loop is None:
            self.resolve(answers)
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed, and its callers are gone with it
            self.loop.call_soon_threadsafe(self.resolve, answers)

    def report(self, error: Exception) -> None:
        """To the event loop, in its thread."""
        if self.loop is not None:
            self.loop.call_exception_handler({"message": "exception in the midst of a commit", "exception": error})

    def resolve(self, answers: Sequence[Any]) -> None:
        for future, answer in zip(self.futures, answers, strict=True):
            if future.done():  # its caller was cancelled; what it wrote stays
                continue
            if type(answer) is Trouble:
                future.set_exception(answer.error)
            else:
                future.set_result(answer)


class Carrier(Protocol):
    """Who carries parcels out (`commit.StoreThread`)."""

    def at_once(self, parcel: Parcel) -> bool: ...
    def send(self, parcel: Parcel) -> None: ...


class Outbox:
    """What one pass of an event loop queues, handed over at its end."""

    __slots__ = ("_carrier", "_futures", "_hands", "_loop", "_ops", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, carrier: Carrier) -> None:
        self._loop, self._carrier = loop, carrier
        self._ops: list[Operation[Any]] = []
        self._futures: list[asyncio.Future[Any]] = []
        self._hands: list[Sized] = []
        self._waiting: set[object] = set()

    def do(self, op: Operation[R], hand: object = None) -> "asyncio.Future[R]":
        """As `StoreThread.do`. `hand` is the one of those at work (`serve`) that waits for the answer, if all of it
        does."""
        if not self._ops:
            self._loop.call_soon(self._hand_over)
        future: asyncio.Future[R] = asyncio.Future(loop=self._loop)
        self._ops.append(op)
        self._futures.append(future)
        if hand is not None:
            self._waiting.add(hand)
        return future

    def serve(self, hands: Sized) -> None:
        """The loop is there for those who are at work: for as many as `hands` has by then. What all of them wait for it
        carries out itself (`StoreThread.at_once`); the loop of an app, which serves nobody here, never does."""
        self._hands.append(hands)

    def leave(self, hands: Sized) -> None:
        self._hands = [others for others in self._hands if others is not hands]

    def _hand_over(self) -> None:
        parcel = Parcel(self._ops, self._futures, self._loop)
        all_wait = bool(self._hands) and len(self._waiting) >= sum(map(len, self._hands))
        self._ops, self._futures, self._waiting = [], [], set()
        if all_wait and self._carrier.at_once(parcel):
            return
        try:
            self._carrier.send(parcel)
        except StoreError as error:  # it was closed meanwhile
            parcel.resolve([Trouble(error)] * len(parcel.ops))
