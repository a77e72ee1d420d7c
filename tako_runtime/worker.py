"""5. Claim runs, run attempts, renew the lease, leave when idle.

A worker is a process that executes the runs of one group. It sleeps until the bell rings, a slot comes free, or the
next run is due; a look once a second (one number read from the store) is the net under the bell. Its lease is renewed
by a thread of its own, which no handler can block.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tako_runtime import clock, codec, failure
from tako_runtime.attempt import Attempt, whose
from tako_runtime.clock import REAL_TIME, Clock, Pace
from tako_runtime.errors import StepFailed, StoreBusy, StoreError, StoreUnreachable
from tako_runtime.inflight import InFlight
from tako_runtime.log import emit
from tako_runtime.run import Claimed, WorkerRecord, new_id
from tako_runtime.state import Interrupted, settle
from tako_runtime.store.base import (
    AddWorker,
    Apply,
    ClaimRuns,
    DataVersion,
    Demand,
    RemoveWorker,
    RenewLease,
    RunsOf,
)
from tako_runtime.store.commit import PATIENCE, StoreThread
from tako_runtime.workflow import Workflow, release

#: The net under the bell, in seconds.
LOOK = 1.0

#: How soon it claims again, in seconds, where a run is due that another transaction has in hand.
SOON = 0.005

#: How soon a lease is renewed again that could not be, since the store was busy, in seconds.
AGAIN = 0.5

#: The share of a lease that is left for handlers to stop in, where it cannot be renewed and others go by it; and the
#: last moment of that, in seconds, in which the process ends.
STOPPING, LAST = 0.25, 0.2

#: Attempts that were abandoned get this long to unwind before their worker starts over without them.
UNWIND = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works. Durations are microseconds."""

    group: str = "default"
    concurrency: int = 10
    idle_timeout: int | None = None
    grace: int = 30 * clock.SECOND
    lease: int = 15 * clock.SECOND
    max_value: int = codec.MAX_VALUE
    pace: Pace = REAL_TIME


class Worker:
    """One worker of one group, until it is told to stop, has been idle for long, or loses its lease."""

    def __init__(
        self,
        store: StoreThread,
        app_dir: Path,
        workflows: Mapping[str, Workflow[..., Any]],
        settings: Settings,
        clock: Clock | None = None,
    ) -> None:
        self.store = store
        self.clock: Clock = clock or store.clock
        self.settings = settings
        self.max_value, self.pace = settings.max_value, settings.pace
        self.id = "w-" + new_id(self.clock.now())
        self._threads = (
            _Threads(settings.concurrency, "tako-handler"),
            _Threads(max(32, 4 * settings.concurrency), "tako-step"),
        )
        self.handlers: ThreadPoolExecutor = self._threads[0]
        self.bodies: ThreadPoolExecutor = self._threads[1]
        self._app_dir = app_dir
        self._workflows = {name: flow for name, flow in workflows.items() if flow.group == settings.group}
        self._busy = 0  # attempts whose handler has not ended
        self._attempts: dict[Attempt, asyncio.Task[None]] = {}
        self.inflight: InFlight
        self.lease_until = 0
        self._active_at = self.clock.now()
        self._lost_lease = False
        self._unwound_by: int | None = None  # others may start its runs then
        self._unsure = False  # whether the last claim has landed, its answer having been lost
        self._left = False
        self._claimed = False
        self._broken: BaseException | None = None
        self._stopping = ""
        self._working: asyncio.Task[str]
        self._wake = asyncio.Event()
        self._topics: set[str] = set()
        self._more = True  # there may be due runs that were not claimed yet
        self._again = False  # it is claimed for a second time, as something was left that is due

    async def run(self) -> str:
        """Work until told to stop; why it stopped: "drained", "idle" or "lost lease"."""
        settings = self.settings
        loop = asyncio.get_running_loop()
        loop.set_task_factory(_task)
        listener = self.store.bell.listen(self.id)
        self.inflight = InFlight(self._app_dir, self.id, room=2 * settings.concurrency)  # ends on their way count too
        await self._join()
        ended = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(loop, ended), name="tako-lease", daemon=True)
        renewal.start()
        listener.start(self._heard)
        emit(
            "worker.started", worker=self.id, group=settings.group, concurrency=settings.concurrency,
            workflows=", ".join(sorted(self._workflows)) or "none",
        )  # fmt: skip
        outbox = self.store.outbox()
        outbox.serve(self._attempts)
        try:
            reason = await self._work_while_held()
            await self._drain()
        finally:
            ended.set()
            listener.close()
            outbox.leave(self._attempts)
        if self._broken is not None:
            emit("worker.broken", worker=self.id, group=settings.group, error=failure.describe(self._broken).line)
            raise self._broken
        if not self._lost_lease:
            await self._leave()
        self.inflight.close()
        self.handlers.shutdown(wait=False, cancel_futures=True)
        self.bodies.shutdown(wait=False, cancel_futures=True)
        emit("worker.stopped", worker=self.id, group=settings.group, reason=reason)
        return reason

    async def _join(self) -> None:
        """Onto the list; a store that cannot be reached is waited for."""
        group, host, pause = self.settings.group, socket.gethostname(), AGAIN
        while True:
            now = self.clock.now()
            until = now + self.settings.lease
            try:
                await self.store.do(
                    AddWorker(worker=WorkerRecord(self.id, group, host, os.getpid(), release(), now, until))
                )
            except StoreUnreachable as error:
                emit("store.busy", error=str(error))
                if self._stopping:
                    raise
                await asyncio.sleep(pause)
                continue
            self.lease_until = until
            return

    def stop(self, reason: str = "drained") -> None:
        """Claim nothing more; let attempts reach their end or their next step boundary. Call it in the event loop."""
        self._stopping = self._stopping or reason
        self._wake.set()

    @property
    def runs_in_hand(self) -> int:
        return len(self._attempts)

    @property
    def going(self) -> int:
        """How much of the user's code is at work in threads, which nobody can stop."""
        return sum(len(threads.going) for threads in self._threads)

    # --- the loop ---

    async def _work_while_held(self) -> str:
        """A lost lease ends it wherever it is: it may wait for a store that does not answer."""
        self._working = asyncio.get_running_loop().create_task(self._work())
        try:
            return await self._working
        except asyncio.CancelledError:
            if self._lost_lease:
                return self._stopping
            raise

    async def _work(self) -> str:
        loop = asyncio.get_running_loop()
        version, looked_at = -1, loop.time()
        next_at: int | None = None
        busy = 0.0
        while not self._stopping:
            now = self.clock.now()
            try:
                if loop.time() - looked_at >= LOOK:
                    looked_at, last, version = loop.time(), version, await self.store.do(DataVersion())
                    if version != last:  # somebody has written; in case its bell was not heard, look at everything
                        self._more = True
                        self._topics |= {"cancel", "signal"}
                if self._free and (self._more or (next_at is not None and next_at <= now)):
                    next_at = await self._claim()
                topics, self._topics = self._topics, set()
                if "cancel" in topics:
                    await self._look_for_cancellations()
                if "signal" in topics:
                    await self._look_for_signals()
                busy = 0.0
            except StoreBusy as error:
                emit("store.busy", error=str(error))
                self._unsure = self._unsure or isinstance(error, StoreUnreachable)
                self._more = True  # what was asked for is not done: ask again, with growing pauses
                self._topics |= {"cancel", "signal"}
                busy = min(max(busy * 2, 0.05), 1.0)
                await asyncio.sleep(busy)
            idle_at = self._idle_at()
            if idle_at is not None and self.clock.now() >= idle_at:
                return "idle"
            if not (self._more and self._free):
                await self._sleep(min((at for at in (next_at, idle_at) if at is not None), default=None))
        return self._stopping

    @property
    def _free(self) -> int:
        """Free slots. A run whose handler has ended holds none, though its end may still be on its way to the disk: so
        the next claim travels with it, in one commit."""
        return self.settings.concurrency - self._busy

    async def _sleep(self, until: int | None) -> None:
        """Until something wakes it, or that instant, or it is time for a look."""
        ahead = LOOK if until is None else (until - self.clock.now()) / clock.SECOND
        timer = asyncio.get_running_loop().call_later(min(LOOK, ahead) if ahead > 0 else SOON, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()

    def _idle_at(self) -> int | None:
        """When it may leave, if nothing happens until then."""
        timeout = self.settings.idle_timeout
        return None if timeout is None or self._attempts or self._more else self._active_at + timeout

    def _heard(self, topics: set[str]) -> None:
        if f"due:{self.settings.group}" in topics or "later" in topics:
            self._more = True
        self._topics |= topics & {"cancel", "signal"}
        if self._more or self._topics:
            self._wake.set()

    # --- claiming ---

    async def _claim(self) -> int | None:
        """Claim for every free slot, begin the attempts; when the next run is due."""
        if self._unsure:
            await self._hand_back()
        free, now = self._free, self.clock.now()
        again, self._again, self._more = self._again, False, False
        claimed = await self.store.do(
            ClaimRuns(worker=self.id, group=self.settings.group, workflows=tuple(self._workflows), limit=free, now=now)
        )
        if self._lost_lease:  # it came too late, and whoever has reclaimed this worker gives it back
            return None
        if claimed and not self._claimed:
            self._claimed = True
            emit("worker.claimed", worker=self.id, group=self.settings.group)
        for each in claimed:
            self._begin(each)
        if len(claimed) == free:
            self._more = True
            return None
        due = await self.store.do(Demand(now=now))
        # A claim passes over what another transaction has in hand. That one may not have wanted it, and rings no bell
        # then: so what is still there is asked for a second time.
        self._again = not again and self.settings.group in due.groups
        self._more = self._more or self._again
        return due.next_at

    async def _hand_back(self) -> None:
        """A claim whose answer never came may have taken runs that nobody does now."""
        known = {(attempt.run.seq, attempt.run.claim) for attempt in self._attempts}
        for run in await self.store.do(RunsOf(worker=self.id)):
            if (run.seq, run.claim) not in known:
                await self.store.do(Apply(change=settle(run, Interrupted(), self.clock.now())))
        self._unsure = False

    def _begin(self, claimed: Claimed) -> None:
        run = claimed.run
        attempt = Attempt(claimed, self._workflows[run.workflow], self)
        self._busy += 1
        attempt.task = self._attempts[attempt] = asyncio.Task(attempt.perform(), name=run.id)
        if claimed.run.cancelling is not None:
            attempt.cancel(claimed.run.cancelling)

    # --- what attempts ask for (`attempt.Desk`) ---

    async def confirm_lease(self) -> bool:
        """After a stop longer than the lease (a suspended process, a laptop's lid) only the store can tell."""
        while not self._lost_lease:
            until = self.clock.now() + self.settings.lease
            try:
                held = await self.store.do(RenewLease(worker=self.id, until=until))
            except StoreBusy as error:
                emit("store.busy", error=str(error))
                await asyncio.sleep(1)
                continue
            if held:
                self.lease_until = until
                return True
            self._lose_lease()
        return False

    def handler_ended(self, attempt: Attempt) -> None:
        self._busy -= 1
        self._wake.set()

    def ended(self, attempt: Attempt, broken: BaseException | None) -> None:
        if broken is not None:  # it could not be written: give all back by leaving, rather than hold a run for ever
            self._broken = self._broken or broken
            self.stop("broken")
        del self._attempts[attempt]
        attempt.slot.give_up()
        if not self._attempts:
            self._active_at = self.clock.now()
        self._wake.set()

    # --- news from outside ---

    async def _look_for_cancellations(self) -> None:
        if self._attempts:
            asked = {
                (r.seq, r.claim): r.cancelling for r in await self.store.do(RunsOf(worker=self.id)) if r.cancelling
            }
            for attempt in self._attempts:
                reason = asked.get((attempt.run.seq, attempt.run.claim))
                if reason is not None:
                    attempt.cancel(reason)

    async def _look_for_signals(self) -> None:
        for attempt in list(self._attempts):
            if attempt.waits_for_signals:
                await attempt.look()

    # --- the lease ---

    def _renew(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
        """In a thread of its own, so that a handler that blocks the event loop does not cost its worker the lease.

        Where other machines have the store too, they go by the lease alone: one that cannot be renewed is lost some
        time before it ends, in which the handlers stop."""
        pause = every = self.settings.lease / 3 / clock.SECOND
        while not ended.wait(pause):
            now = self.clock.now()
            until = now + self.settings.lease
            asked = self.store.ask(RenewLease(worker=self.id, until=until))
            try:
                held = asked.result(self._renewable() if self.store.shared else PATIENCE)
            except (StoreBusy, TimeoutError):
                asked.cancel()
                if self.store.shared and not self._renewable():
                    loop.call_soon_threadsafe(self._lose_lease)
                    return
                pause = min(every, AGAIN, self._renewable() or AGAIN)
                continue
            except StoreError:
                return
            pause = every
            if not held:
                loop.call_soon_threadsafe(self._lose_lease)
                return
            self.lease_until = until

    def _renewable(self) -> float:
        """Seconds in which the lease may still be renewed, if the handlers are to have time to stop."""
        return max(0.0, (self.lease_until - self.clock.now() - STOPPING * self.settings.lease) / clock.SECOND)

    def _lose_lease(self) -> None:
        if not self._lost_lease and not self._left:
            self._lost_lease = True
            self._unwound_by = self.lease_until if self.store.shared else None
            self.lease_until = 0
            emit("worker.lost_lease", worker=self.id, group=self.settings.group, runs=len(self._attempts))
            for attempt in self._attempts:
                attempt.lose()
            self.stop("lost lease")
            self._working.cancel()

    # --- leaving ---

    async def _drain(self) -> None:
        """Attempts end, or stop at their next step boundary. Whoever started this process bounds the time."""
        if self._attempts and not self._lost_lease:
            emit("worker.draining", worker=self.id, group=self.settings.group, runs=len(self._attempts))
        for attempt in self._attempts:
            attempt.interrupt()
        while self._attempts:
            done, _ = await asyncio.wait(self._attempts.values(), timeout=self._patience())
            if not done:
                return
        while self._unwound_by is not None and self.going and (seconds := self._patience()):
            await asyncio.sleep(min(seconds, 0.05))  # a thread that ends tells no one

    def _patience(self) -> float | None:
        """Seconds that attempts have to come to their end."""
        if self._unwound_by is None:
            return UNWIND if self._lost_lease else None
        return min(UNWIND, max(0.0, (self._unwound_by - self.clock.now()) / clock.SECOND - LAST))

    async def _leave(self) -> None:
        """Off the list; a write that fails is made good by the lapse of the lease."""
        self._left = True
        try:
            await self.store.do(RemoveWorker(worker=self.id))
        except StoreError as error:
            emit("store.busy", error=str(error))


class _Threads(ThreadPoolExecutor):
    """Knows what it has going."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, name)
        self.going: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = super().submit(fn, *args, **kwargs)
        self.going.add(future)
        future.add_done_callback(self.going.discard)
        return future


def _task(loop: asyncio.AbstractEventLoop, coroutine: Any, **rest: Any) -> "asyncio.Task[Any]":
    """Every task that code of the user's makes: its attempt learns of it, and a `sys.exit` in it must not end the
    worker."""
    task: asyncio.Task[Any] = asyncio.Task(_contained(coroutine), loop=loop, **rest)
    attempt = whose()
    if attempt is not None:
        attempt.branches.adopt(task)
    return task


async def _contained(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        raise StepFailed(f"a task called for the end of its process: {error!r}") from None
