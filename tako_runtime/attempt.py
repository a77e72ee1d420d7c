"""6. One attempt at one run: a short list of stages on one value.

    read the payload -> call the handler -> let what is in flight end -> settle -> write

The handler runs in this task. Its steps come back here: what is done already, what may begin, what must stop. When
every step call in progress is a sleep or a wait, and no other branch of the handler can move, the run parks and its
slot is free.
"""

import asyncio
import contextlib
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Protocol, TypeVar

from tako_runtime import announce, clock, codec, failure, log
from tako_runtime.branches import Branches
from tako_runtime.clock import Clock, Pace
from tako_runtime.errors import NotCarried, RunTimeout, StepMisuse, StoreBusy, Unreadable
from tako_runtime.failure import Failure
from tako_runtime.inflight import InFlight
from tako_runtime.log import emit
from tako_runtime.masking import NOT_IN_NAMES, named_in
from tako_runtime.run import Claimed, Status, StepKey, StepRecord
from tako_runtime.state import (
    Bailed,
    Cancelled,
    Failed,
    Interrupted,
    Outcome,
    Raised,
    Returned,
    Sleeps,
    Waits,
    settle,
)
from tako_runtime.step import NotBegun, Step, Suspension, SyncStep
from tako_runtime.store.base import Apply, ExpireWait, GetRun, OpenWait, Operation, SaveStep, Steps
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import Workflow, names_something

R = TypeVar("R")

#: The attempt whose handler this code belongs to.
_current: "contextvars.ContextVar[Attempt | None]" = contextvars.ContextVar("tako_attempt", default=None)


class Desk(Protocol):
    """What a worker lends to its attempts."""

    store: StoreThread
    clock: Clock
    pace: Pace
    handlers: ThreadPoolExecutor
    bodies: ThreadPoolExecutor
    max_value: int
    inflight: InFlight
    lease_until: int

    async def confirm_lease(self) -> bool: ...
    def handler_ended(self, attempt: "Attempt") -> None: ...
    def ended(self, attempt: "Attempt", broken: BaseException | None) -> None: ...


class ClaimLost(Suspension):
    """Somebody else has this run."""


class Attempt:
    """One pass of a worker over a claimed run."""

    def __init__(self, claimed: Claimed, workflow: Workflow[..., Any], desk: Desk) -> None:
        self.run = claimed.run
        self.history = {step.key: step for step in claimed.steps if not step.rerun}
        self.max_value = desk.max_value
        self.now, self.pace = desk.clock.now, desk.pace
        self._workflow, self._desk = workflow, desk
        self._loop = asyncio.get_running_loop()
        self._store = desk.store.outbox()
        self.task: asyncio.Task[None]
        self.slot = desk.inflight.take(self.run.seq)
        self._uses: dict[StepKey, int] = {}
        self.branches = Branches(self._park)
        self._failures: list[tuple[BaseException, StepKey, bool, int]] = []
        self._stop: Outcome | None = None  # what must end this attempt at its next step boundary
        self._lost = False
        self._refused = False
        self._parked_for: StepRecord | None = None  # what it parks for, if that has an end
        self._waited = self.run.claim > 1  # an earlier pass may have
        self._asking = 0  # waits that are being begun or ended
        self._began = 0  # when this pass got going: before that, there is nothing to stop
        self._handler_ended = False

    # --- the stages ---

    async def perform(self) -> None:
        """All of it. What goes wrong is written to the run; the worker hears of what could not be written."""
        run, broken = self.run, None
        try:
            with log.about(run=run.id, workflow=run.workflow, attempt=run.attempt, group=run.group):
                self._began = self.now()
                announce.begun(run, self.history, self._began)
                try:
                    outcome = None if self._lost else self._misfit() or await self._call()
                except (Exception, SystemExit) as error:  # noqa: BLE001 -- what no stage expected ends its run only
                    outcome = Failed(failure.describe(error))
                self._desk.handler_ended(self)
                if outcome is None or self._lost:
                    emit("run.lost")
                else:
                    await self._settle(outcome)
        except asyncio.CancelledError:  # the worker leaves without it
            pass
        except BaseException as error:  # noqa: BLE001 -- the worker gives up what cannot be written
            broken = error
        self._desk.ended(self, broken)

    def _misfit(self) -> Outcome | None:
        """Read the payload. One that does not fit cannot be mended by a retry."""
        self._payload: Any = None
        if not self._workflow.takes_payload:
            return None
        try:
            self._payload = codec.decode(self.run.payload, self._workflow.payload_type)
        except Unreadable as error:
            message = f"the payload does not fit the handler of {self.run.workflow!r}: {error}"
            return Failed(Failure(type="PayloadRefused", message=failure.clean(message)))
        return None

    async def _call(self) -> Outcome | None:
        """Call the handler, let what is in flight end, and say what came of it."""
        value: Any = None
        raised: BaseException | None = None
        if not self._workflow.blocking:  # a plain handler stands in its step call, and this task waits for that
            self.branches.tasks.add(self.task)
        token = _current.set(self)
        try:
            value = await self._handler()
        except BaseException as error:  # noqa: BLE001 -- whatever a handler raises belongs to its run
            raised = error
        _current.reset(token)
        self._handler_ended = True
        self.branches.release()
        while self.branches.in_flight and not self._lost:
            with contextlib.suppress(asyncio.CancelledError):  # as in `_settle`
                await self.branches.until_quiet()
        return self._outcome(value, raised)

    def _handler(self) -> Awaitable[Any]:
        """The handler, under way."""
        step = Step(self)
        given = (self._payload,) if self._workflow.takes_payload else ()
        handler: Callable[..., Any] = self._workflow.handler
        if self._workflow.blocking:
            call = functools.partial(
                contextvars.copy_context().run, _contained, handler, *given, SyncStep(step, self._loop)
            )
            going: Awaitable[Any] = self._loop.run_in_executor(self._desk.handlers, call)
        else:
            going = handler(*given, step)
        limit = self._workflow.timeout
        return going if limit is None else _limited(going, limit)

    def _outcome(self, value: Any, raised: BaseException | None) -> Outcome | None:
        if self._lost:
            return None
        if (stop := self._stop) is not None and (
            isinstance(stop, Bailed | Failed | Sleeps | Waits)
            or self._refused
            or isinstance(raised, Suspension | asyncio.CancelledError)
        ):
            return stop
        if raised is not None:
            return self._raised(raised)
        try:
            return Returned(codec.encode(value, self._workflow.its_result, limit=self.max_value))
        except NotCarried as error:
            return Failed(failure.describe(error))

    def _raised(self, error: BaseException) -> Raised:
        """A failed step that nobody went on from is run again by the next attempt: the one whose exception this is, or
        that it came from, and those after which no other step began."""
        chain = _chain(error)
        to_blame = [final for failed, _, final, _ in self._failures if any(failed is link for link in chain)]
        rerun = tuple(
            key
            for failed, key, _, position in self._failures
            if position == self.branches.entered or any(failed is link for link in chain)
        )
        final = any(to_blame) or isinstance(error, NotCarried | StepMisuse)
        return Raised(failure.describe(error), final, rerun)

    async def _settle(self, outcome: Outcome) -> None:
        """Write what the outcome makes of the run. It is written until it is, or the claim is lost: a handler that has
        finished does not become one that failed because the disk was full for a second, or because a timer of its own
        cancels its task when it is too late."""
        asked = False
        while True:
            try:
                await self._write_end(outcome, asked)
            except asyncio.CancelledError:
                if self._lost:
                    raise
                asked = True
            else:
                return

    async def _write_end(self, outcome: Outcome, asked: bool) -> None:
        """`asked` says that the store was asked before, and that nobody has heard its answer."""
        change = settle(self.run, outcome, self.now(), self.pace, waited=self._waited)
        try:
            if not await self.write(Apply(change=change)):
                run = await self.write(GetRun(seq=self.run.seq))
                if run is not None and run.claim == self.run.claim and run.status == Status.RUNNING:
                    change = settle(run, outcome, self.now(), self.pace)  # it was asked to cancel meanwhile
                    asked = await self.write(Apply(change=change))
                if not asked:
                    emit("run.lost")
                    return
        except ClaimLost:
            emit("run.lost")
            return
        if self.history and isinstance(outcome, Returned | Sleeps | Waits):
            announce.diverged(self.history, self._uses)
        announce.settled(self.run, self.history, outcome, change, self._began, self.pace, self._parked_for)

    # --- what a step asks for ---

    def begin(self, kind: str, name: str) -> tuple[StepKey, int, StepRecord | None]:
        """Number the call, and say what is stored of it. `leave(key)` must follow: the call counts as in flight until
        then."""
        outer = log.in_step.get()
        if outer is not None:
            raise StepMisuse(
                f"step {name!r} was called inside the body of step {outer!r}",
                hint="A step is a leaf: call both from the handler, one after the other.",
            )
        if not (isinstance(name, str) and names_something(name)):
            raise StepMisuse(f"a step's name is printable text of 1 to 500 characters without '#', not {name!r}")
        if secret := named_in(name):
            raise StepMisuse(f"the step's name has the value of secret {secret} in it", hint=NOT_IN_NAMES)
        key = StepKey(kind, name)
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        if uses > 1:
            key = StepKey(kind, f"{name}#{uses}")
        return key, self.branches.enter(key), self.history.get(key)

    def may_start(self, key: StepKey, now: int) -> bool:
        """A step's body is about to run: whether it may. If not, only the store can tell (`confirm_start`)."""
        if self._lost or now >= self._desk.lease_until:
            return False
        self.slot.note(key.name, now)
        return True

    async def confirm_start(self, key: StepKey) -> None:
        """After a stop longer than the lease. Raises where the claim is gone."""
        if self._lost or not await self._desk.confirm_lease():
            self._lost_claim()
        self.slot.note(key.name, self.now())

    def failed(self, error: Exception, key: StepKey, final: bool) -> Exception:
        """Remember which step an exception comes from."""
        self._failures.append((error, key, final, self.branches.entered))
        return error

    def reading(self, key: StepKey, record: StepRecord, wanted: Any) -> Any:
        """The stored result as `wanted`. One that cannot be read any more ends the run: no retry can mend it."""
        try:
            return codec.decode(record.result if record.result is not None else b"null", wanted)
        except Unreadable as error:
            message = f"the stored result of step {key.label!r} cannot be read: {error}"
            self.conclude(Failed(Failure(type="Unreadable", message=failure.clean(message))))

    async def save(self, record: StepRecord) -> StepRecord:
        """Store a step before the handler goes on; the record that is stored, whoever wrote it."""
        seq, claim = self.run.seq, self.run.claim
        op = SaveStep(seq=seq, claim=claim, step=record)
        try:
            stored = await self._ask(op)
        except StoreBusy as error:
            stored = await self._write_later(op, error)
        if stored is None:
            self._lost_claim()
        return stored

    async def save_wait(self, op: OpenWait | ExpireWait) -> StepRecord:
        """Begin or end a wait; the record that is stored, where a look finds it too."""
        self._waited = True
        self._asking += 1
        try:
            stored = await self.write(op)
        finally:
            self._asking -= 1
        if stored is None:
            self._lost_claim()
        self.history[stored.key] = stored
        return stored

    def _lost_claim(self) -> NoReturn:
        """What a write that names the claim was answered with."""
        self.lose()
        raise ClaimLost

    async def write(self, op: Operation[R]) -> R:
        """Hand `op` to the store, again and again while the store is busy and the lease holds."""
        try:
            return await self._ask(op)
        except StoreBusy as error:
            return await self._write_later(op, error)

    def _ask(self, op: Operation[R]) -> "asyncio.Future[R]":
        return self._store.do(op, self if self.branches.single and not self._lost else None)

    async def _write_later(self, op: Operation[R], error: StoreBusy) -> R:
        pause = 0.05
        while True:
            emit("store.busy", error=str(error))
            if self._lost:
                raise ClaimLost from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)
            try:
                return await self._ask(op)
            except StoreBusy as again:
                error = again

    async def in_thread(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call `fn` in a thread, with this code's context; what it returns, or what comes of that where it can be
        awaited. Threads may be few: the body asks again, in its own, whether it may begin, and else raises
        `NotBegun`."""
        call = functools.partial(contextvars.copy_context().run, self._in_its_turn, fn, *args)
        try:
            value = await self._loop.run_in_executor(self._desk.bodies, call)
        except asyncio.CancelledError:
            emit("step.left")
            raise
        return await value if inspect.isawaitable(value) else value

    def _in_its_turn(self, fn: Callable[..., Any], *args: Any) -> Any:
        if self._called_off or self.now() >= self._desk.lease_until:
            raise NotBegun
        return _contained(fn, *args)

    @property
    def _called_off(self) -> bool:
        """It was stopped from outside. What a handler has begun before its own last word is still done."""
        return self._lost or isinstance(self._stop, Interrupted | Cancelled)

    async def not_begun(self, key: StepKey) -> None:
        """A step's body has not begun, and it must not: raises. Where only the lease is in doubt, it may be tried
        again."""
        if self._called_off:
            self.branches.leave(key)  # as in `wait`
            await self.refuse()

    async def see_through(self, key: StepKey, doing: Coroutine[Any, Any, R]) -> R:
        """Do a step whose body runs in a thread. A thread cannot be stopped: where its caller is cancelled (by a task
        group, by a timeout around it), the step stays in flight until it has ended and is stored, so that no other pass
        runs the same body beside it."""
        task = self._loop.create_task(doing)
        self.branches.tasks.discard(task)  # while its caller waits for it, it is no branch beside that

        def ended(task: "asyncio.Task[R]") -> None:
            if not task.cancelled():
                task.exception()  # its caller may be gone
            self.branches.leave(key)

        task.add_done_callback(ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                self.branches.adopt(task)
            raise

    async def pause(self, key: StepKey, until: int) -> None:
        """Wait in the slot, between two tries of a step."""
        while self.now() < until:
            await self.wait(key, None, parks=False, until=until)

    async def wait(self, key: StepKey, record: StepRecord | None, *, parks: bool, until: int | None = None) -> None:
        """Wait until the record is due, or a look finds news of it, or the attempt must stop: then it raises."""
        if self.branches.released:
            self.branches.leave(key)  # what waits for the others to become quiet must not be one of them
            await self.refuse()
        due = record.due_at if record is not None else until
        seconds = None if due is None else max(0, due - self.now()) / clock.SECOND
        if not await self.branches.wait(key, record, parks=parks, seconds=seconds):
            await self.refuse()

    def conclude(self, verdict: Bailed | Failed) -> NoReturn:
        """The handler has said its last word. The first one counts, even where it is swallowed."""
        if self._stop is None:
            self._stop = verdict
            self.branches.release()
        raise Suspension

    # --- what the worker asks for ---

    def interrupt(self) -> None:
        """Stop at the next step boundary and hand the run back, without using up the attempt."""
        self._halt(Interrupted())

    def cancel(self, reason: str) -> None:
        """Stop at the next step boundary: the run is cancelled."""
        self._halt(Cancelled(reason))

    def lose(self) -> None:
        """The claim is gone: stop at once, write nothing."""
        if not self._lost:
            self._lost = True
            self.branches.release()
            if self._began and not self._handler_ended and self.task is not asyncio.current_task():
                self.task.cancel()

    @property
    def waits_for_signals(self) -> bool:
        if self._asking:  # its signal may be in the same batch, and ring before the answer is here
            return True
        waiting = self.branches.waiting.values()
        return any(one.record is not None and one.record.kind == "wait" for one in waiting)

    async def look(self) -> None:
        """Wake the waits of this live attempt to which a signal has come meanwhile."""
        steps = await self.write(Steps(seq=self.run.seq))
        for step in steps:
            waiting = self.branches.waiting.get(step.key)
            if waiting is not None and step.kind == "wait" and step.status != "waiting":
                self.history[step.key] = step
                waiting.wake()

    # --- stopping and parking ---

    def _halt(self, outcome: Interrupted | Cancelled) -> None:
        if self._stop is None and not self._handler_ended:
            self._stop = outcome
            self.branches.release()

    async def refuse(self) -> NoReturn:
        """No step may begin. Before a drain unwinds the handler, what its other branches have in flight may end."""
        self._refused = True
        if self._stop is not None and not self._lost and not self._handler_ended:
            await self.branches.until_quiet()
        await asyncio.sleep(0)  # a handler that swallows this and tries again must not stop the event loop
        raise ClaimLost if self._lost else Suspension

    def _park(self, records: list[StepRecord]) -> None:
        ending = [record for record in records if record.due_at is not None]
        first = self._parked_for = min(ending, key=lambda record: record.due_at or 0, default=None)
        due = None if first is None else first.due_at
        waits = tuple(record.name for record in records if record.kind == "wait")
        self._stop = Waits(waits, due) if waits else Sleeps(due or self.now())
        self.branches.release()


def whose() -> Attempt | None:
    """The attempt whose handler this code belongs to; None within a step's body, whose tasks are its own affair."""
    return _current.get() if log.in_step.get() is None else None


async def _limited(going: Awaitable[Any], limit: int) -> Any:
    """A handler that may run for `limit` microseconds."""
    try:
        async with asyncio.timeout(limit / clock.SECOND) as scope:
            return await going
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise RunTimeout(f"the attempt ran past its timeout of {clock.spell(limit)}") from error


def _contained(fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn` in a thread. A StopIteration cannot leave it through a future: it would never be heard of."""
    try:
        return fn(*args)
    except StopIteration as error:
        raise RuntimeError(f"{getattr(fn, '__qualname__', fn)} raised StopIteration") from error


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and all that it came from, groups opened."""
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        link = todo.pop()
        if link is None or any(link is known for known in seen):
            continue
        seen.append(link)
        todo += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            todo += link.exceptions
    return seen
