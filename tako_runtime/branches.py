"""Where the branches of a handler are: which step calls are in flight, which sleep or wait, and when none can move.

An attempt has one `Branches`. A step call enters it, waits in it, and leaves it. When every call in progress is a sleep
or a wait that is worth parking for, and no other branch of the handler can move (`standstill.py`), it says so, once.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tako_runtime.run import StepKey, StepRecord
from tako_runtime.standstill import at_standstill

#: Passes of the event loop that news of a step's end may need to get through to the branch that waits for it. Each
#: gather or task group on the way costs one or two.
QUIET_PASSES = 20

#: How long, in seconds, until a handler is looked at again that waits, but has a branch that can still move.
LOOK = 1.0


@dataclass(slots=True)
class Waiting:
    """A step call that sleeps or waits; `record` is what is stored of it, if it is stored."""

    future: "asyncio.Future[None]"
    record: StepRecord | None
    parks: bool

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Branches:
    """The step calls in progress of one attempt, and the tasks that its handler consists of.

    `park(records)` is called where nothing moves any more, with the sleeps and waits that all of it is for.
    """

    def __init__(self, park: Callable[[list[StepRecord]], None]) -> None:
        self.released = False  # no step may begin any more, and none waits
        self.waiting: dict[StepKey, Waiting] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.in_flight: set[StepKey] = set()  # step calls in progress that neither sleep nor wait
        self.entered = 0  # how many step calls there were so far
        self._park = park
        self._loop = asyncio.get_running_loop()
        self._quiet: asyncio.Event | None = None
        self._look: asyncio.TimerHandle | None = None

    @property
    def single(self) -> bool:
        """Whether the handler has one branch: where that waits, all of it does."""
        return len(self.tasks) <= 1

    def enter(self, key: StepKey) -> int:
        """A step call begins; which one it is, in the order of the calls. `leave` must follow."""
        self.entered += 1
        self.in_flight.add(key)
        return self.entered

    def leave(self, key: StepKey) -> None:
        """The step call is over, or goes to sleep."""
        self.in_flight.discard(key)
        if not self.in_flight:
            if self._quiet is not None:
                self._quiet.set()
            if self.waiting:
                self._consider_parking()

    async def wait(self, key: StepKey, record: StepRecord | None, *, parks: bool, seconds: float | None) -> bool:
        """Be asleep for so long, or until somebody wakes it; then the call is in flight again. False, and it is not,
        where all were released meanwhile."""
        waiting = self.waiting[key] = Waiting(self._loop.create_future(), record, parks)
        timer = None if seconds is None else self._loop.call_later(seconds, waiting.wake)
        self.leave(key)
        try:
            await waiting.future
        finally:
            del self.waiting[key]
            if timer is not None:
                timer.cancel()
        if self.released:
            return False
        self.in_flight.add(key)
        return True

    def release(self) -> None:
        """Let every sleep and wait go: each finds that it must stop."""
        self.released = True
        self._park = _not_now  # and let go of the attempt: two that hold each other are left to the garbage collector
        if self._look is not None:
            self._look.cancel()
        for waiting in self.waiting.values():
            waiting.wake()

    async def until_quiet(self) -> None:
        """Until no step call is in flight."""
        while self.in_flight:
            self._quiet = self._quiet or asyncio.Event()
            self._quiet.clear()
            await self._quiet.wait()

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """The handler has made a task: a branch, which may come to a step call of its own."""
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self.tasks.discard(task)
        self._consider_parking()

    # --- parking ---

    def _consider_parking(self) -> None:
        if self._can_park():
            self._loop.call_soon(self._park_if_still_quiet, self.entered, QUIET_PASSES)

    def _can_park(self) -> bool:
        return (
            not (self.released or self.in_flight)
            and bool(self.waiting)
            and all(waiting.parks for waiting in self.waiting.values())
        )

    def _park_if_still_quiet(self, entered: int, passes: int) -> None:
        """Another branch of the handler may be on its way to its next step call: give it time to make it."""
        if self.entered != entered or not self._can_park():
            return
        if passes:
            self._loop.call_soon(self._park_if_still_quiet, entered, passes - 1)
        elif at_standstill(self.tasks, {waiting.future for waiting in self.waiting.values()}):
            self._park([waiting.record for waiting in self.waiting.values() if waiting.record is not None])
        else:
            if self._look is not None:
                self._look.cancel()
            self._look = self._loop.call_later(LOOK, self._consider_parking)


def _not_now(records: list[StepRecord]) -> None:
    """Nobody parks what has been released."""
