"""7. Step: run, sleep, wait_for, bail, fail.

What a handler is given. Each method asks the attempt whether the step is there already, does it if not, and stores it
before the handler goes on. There is one implementation, which is async; `SyncStep` only bridges to it.
"""

import asyncio
import functools
import inspect
import logging
import types
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, overload

from tako_runtime import clock, codec, failure
from tako_runtime.clock import Duration
from tako_runtime.errors import InvalidValue, NotCarried, StepFailed, StepMisuse, StepTimeout
from tako_runtime.failure import Failure
from tako_runtime.log import emit, in_step
from tako_runtime.run import StepKey, StepRecord
from tako_runtime.state import Backoff, Bailed, Failed
from tako_runtime.store.base import ExpireWait, OpenWait
from tako_runtime.workflow import check_backoff, check_count, check_signal_name

if TYPE_CHECKING:
    from tako_runtime.attempt import Attempt

T = TypeVar("T")

#: A sleep shorter than this stays in its slot; a longer one parks the run.
INLINE_SLEEP = 30 * clock.SECOND


class Suspension(BaseException):
    """The handler stops here: its run is parked, handed back, lost, or has said its last word.

    Not an `Exception`, so that `except Exception` around a step does not swallow it. Let it pass.
    """


class NotBegun(BaseException):
    """A body had to wait for a thread, and when it got one it might not begin any more."""


class Step:
    """The checkpoints of one run, given to its handler.

    Names tell steps apart: a name used again gets a number in the order of the calls (`send`, `send#2`), so the calls
    must come in the same order on every pass. Code between steps runs again on every pass.
    """

    def __init__(self, attempt: "Attempt") -> None:
        self._attempt = attempt

    @functools.cached_property
    def log(self) -> "logging.LoggerAdapter[logging.Logger]":
        """Python's logging, with the run, its workflow, and the step whose body calls it."""
        run = self._attempt.run
        return _Log(logging.getLogger(f"workflow.{run.workflow}"), {"run": run.id, "workflow": run.workflow})

    @property
    def run_id(self) -> str:
        return self._attempt.run.id

    @property
    def workflow(self) -> str:
        return self._attempt.run.workflow

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. A parked run goes on within its attempt."""
        return self._attempt.run.attempt

    @property
    def scheduled_at(self) -> datetime | None:
        """The time that a schedule fired this run for, in UTC; None for a run that was enqueued."""
        at = self._attempt.run.scheduled_at
        return None if at is None else clock.moment(at)

    def key(self, name: str) -> str:
        """An idempotency key for `name` in this run, the same over all attempts.

        A step's body runs again if its worker died after it acted and before that was stored. Hand this key to the
        service that it calls, and the service can tell the second call from a new one.
        """
        if not isinstance(name, str) or not name:
            raise InvalidValue(f"step.key needs a name, not {name!r}")
        return f"{self._attempt.run.id}:{name}"

    @overload
    async def run(
        self,
        name: str,
        fn: Callable[..., Awaitable[T]],
        *args: Any,
        retries: int = 0,
        backoff: Backoff | None = None,
        retry: bool = True,
        timeout: Duration | None = None,
    ) -> T: ...
    @overload
    async def run(
        self, name: str, fn: Callable[..., T], *args: Any, retries: int = 0, backoff: Backoff | None = None,
        retry: bool = True, timeout: Duration | None = None,
    ) -> T: ...  # fmt: skip
    async def run(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        retries: int = 0,
        backoff: Backoff | None = None,
        retry: bool = True,
        timeout: Duration | None = None,
    ) -> Any:
        """Do `fn(*args)` once and for all, and give what it returned, now and on every replay.

        `fn` is async, or sync (it runs in a thread). It is tried `retries` times more after a failure, with `backoff`
        between; then its exception goes to the handler, as each replay will have it: its class, its message and what
        JSON can carry of the rest, without any secret. If it is caught there, the failure is as final as a result.
        Uncaught, it fails the attempt, and the next attempt runs the step again, unless `retry` is False: then the run
        is dead. `timeout` bounds each try; past it the handler gets `StepTimeout`.

        The value comes back as `fn`'s return annotation says, else as plain JSON data. Raises `NotCarried` for a value
        that cannot be stored and `TooLarge` past the size limit: those end the run, since no retry can mend them.
        """
        attempt = self._attempt
        wanted = codec.returns(fn)
        codec.decoder(wanted)  # an annotation that cannot be read back must not cost the body's side effects
        limit = None if timeout is None else clock.duration(timeout, "timeout", least=1_000)
        if retries != 0:
            check_count(retries, f"retries of step {name!r}")
        if backoff is not None:
            check_backoff(backoff, f"backoff of step {name!r}")
        if attempt.branches.released:
            await attempt.refuse()
        key, position, record = attempt.begin("run", name)
        if record is None:
            backoff = backoff or _STEP_BACKOFF
            if not _is_async(fn):
                call = functools.partial(attempt.in_thread, fn)
                doing = self._do(key, position, wanted, call, args, retries, backoff, retry, limit)
                return await attempt.see_through(key, doing)
            try:
                return await self._do(key, position, wanted, fn, args, retries, backoff, retry, limit)
            finally:
                attempt.branches.leave(key)
        attempt.branches.leave(key)
        if record.error is not None:
            raise attempt.failed(failure.rebuild(failure.read(record.error)), key, final=not retry)
        emit("step.cached", step=key.name, ms=((record.finished_at or 0) - record.started_at) / 1_000)
        return attempt.reading(key, record, wanted)

    async def _do(
        self,
        key: StepKey,
        position: int,
        wanted: Any,
        call: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        retries: int,
        backoff: Backoff,
        retry: bool,
        timeout: int | None,
    ) -> Any:
        attempt = self._attempt
        tries = 0
        while True:
            tries += 1
            started = attempt.now()
            if not attempt.may_start(key, started):
                await attempt.confirm_start(key)
                started = attempt.now()
            try:
                token = in_step.set(key.name)
                try:
                    value = await (call(*args) if timeout is None else _limited(key, call, args, timeout))
                except (SystemExit, KeyboardInterrupt) as error:  # the step fails, the worker goes on
                    raise StepFailed(f"step {key.name!r} called for the end of its process: {error!r}") from None
                finally:
                    in_step.reset(token)
                text, carried = codec.carry(value, wanted, key, limit=attempt.max_value)
            except NotBegun:
                tries -= 1
                await attempt.not_begun(key)
                continue
            except Exception as error:  # noqa: BLE001 -- a step may raise anything; it is raised again below
                described = failure.describe(error, f"the error of step {key.name!r}")
                if tries <= retries and retry and not isinstance(error, NotCarried | StepMisuse):
                    pause = backoff.delay(tries, f"{self.run_id}:{key.name}")
                    pause = attempt.pace.real(pause)
                    emit(
                        "step.retrying", step=key.name, n=tries, tries=retries + 1, pause=clock.spell(pause),
                        error=described.line, ms=(attempt.now() - started) / 1_000, **attempt.pace.told(pause),
                    )  # fmt: skip
                    await attempt.pause(key, attempt.now() + pause)
                    continue
                now = attempt.now()
                record = StepRecord(
                    "run", key.name, position, "failed", attempt.run.attempt, started, now, error=described.text()
                )
                await attempt.save(record)
                emit("step.failed", step=key.name, error=described.line, ms=(now - started) / 1_000)
                again = failure.as_replayed(error, described)
                raise attempt.failed(again, key, final=not retry) from again.__cause__
            now = attempt.now()
            record = StepRecord(
                "run", key.name, position, "done", attempt.run.attempt, started, now, result=text.encode()
            )
            stored = await attempt.save(record)
            if stored is not record:  # somebody's first write won: go on with that
                return attempt.reading(key, stored, wanted)
            emit("step.done", step=key.name, ms=(now - started) / 1_000)
            return carried

    async def sleep(self, length: Duration, *, name: str | None = None) -> None:
        """Sleep for a timedelta, seconds, or text such as "3d". The end is stored first: no restart moves it. From 30 s
        on the run parks and takes up no worker meanwhile."""
        micros = clock.duration(length, "sleep")
        await self._sleep(name or "sleep", lambda _: micros)

    async def sleep_until(self, when: datetime, *, name: str | None = None) -> None:
        """Sleep until a datetime with a time zone."""
        until = clock.instant(when, "sleep_until")
        await self._sleep(name or "sleep", lambda now: until - now)

    async def _sleep(self, name: str, length: Callable[[int], int]) -> None:
        attempt = self._attempt
        if attempt.branches.released:
            await attempt.refuse()
        key, position, record = attempt.begin("sleep", name)
        try:
            now = attempt.now()
            if record is None:
                until = min(now + attempt.pace.real(length(now)), clock.LATEST)
                record = await attempt.save(
                    StepRecord("sleep", key.name, position, "sleeping", attempt.run.attempt, now, due_at=until)
                )
            due = cast(int, record.due_at)
            while (now := attempt.now()) < due:
                await attempt.wait(key, record, parks=attempt.pace.durable(due - now) >= INLINE_SLEEP)
        finally:
            attempt.branches.leave(key)

    async def wait_for(self, name: str, *, timeout: Duration | None = None) -> Any:
        """The payload of the next signal `name`, or None once `timeout` has passed. The deadline is stored once: no
        restart moves it. A signal that was sent before is kept and taken at once."""
        check_signal_name(name)
        micros = None if timeout is None else clock.duration(timeout, "timeout")
        attempt = self._attempt
        if attempt.branches.released:
            await attempt.refuse()
        key, position, record = attempt.begin("wait", name)
        try:
            if record is None or record.status == "waiting":
                record = await self._wait(key, position, name, micros, record)
                ms = (attempt.now() - record.started_at) / 1_000
                if record.status == "done":
                    emit("wait.done", signal=name, step=key.label, ms=ms)
                else:
                    told = attempt.pace.told((record.due_at or 0) - record.started_at)
                    emit("wait.timed_out", signal=name, step=key.label, ms=ms, **told)
        finally:
            attempt.branches.leave(key)
        return attempt.reading(key, record, Any)

    async def _wait(
        self, key: StepKey, position: int, signal: str, timeout: int | None, record: StepRecord | None
    ) -> StepRecord:
        attempt = self._attempt
        now = attempt.now()
        if record is None:
            due = None if timeout is None else min(now + attempt.pace.real(timeout), clock.LATEST)
            record = StepRecord("wait", key.name, position, "waiting", attempt.run.attempt, now, due_at=due)
        seq, claim = attempt.run.seq, attempt.run.claim
        if record.due_at is None or now < record.due_at or timeout == 0:
            record = await attempt.save_wait(OpenWait(seq=seq, claim=claim, step=record, signal=signal, now=now))
        while record.status == "waiting":
            now = attempt.now()
            if record.due_at is not None and now >= record.due_at:
                record = await attempt.save_wait(ExpireWait(seq=seq, claim=claim, name=key.name, now=now))
            else:
                await attempt.wait(key, record, parks=True)
                record = attempt.history[key]
        return record

    def bail(self, reason: str) -> NoReturn:
        """End the run `cancelled`, for a reason that people read; no retries."""
        self._attempt.conclude(Bailed(failure.clean(str(reason), "the reason of a bail")))

    def fail(self, error: BaseException | str) -> NoReturn:
        """End the run `dead`, with an exception or a text; no retries."""
        if not isinstance(error, BaseException):
            self._attempt.conclude(Failed(Failure(type="Failed", message=failure.clean(str(error)))))
        self._attempt.conclude(Failed(failure.describe(error)))


class _Log(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {}), "step": in_step.get()}
        return msg, kwargs


_STEP_BACKOFF = Backoff()


async def _limited(key: StepKey, call: Callable[..., Awaitable[Any]], args: tuple[Any, ...], timeout: int) -> Any:
    """A step's body that may run for `timeout` microseconds."""
    try:
        async with asyncio.timeout(timeout / clock.SECOND) as scope:
            return await call(*args)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise StepTimeout(f"step {key.name!r} ran past its timeout of {clock.spell(timeout)}") from error


def _is_async(fn: Callable[..., Any]) -> bool:
    if type(fn) is types.FunctionType and fn.__code__.co_flags & inspect.CO_COROUTINE:
        return True  # most are: `inspect` takes twenty times as long to say so
    return inspect.iscoroutinefunction(fn)


class SyncStep:
    """`Step` for a plain `def` handler: the same methods, which block. They run on the worker's event loop; this face
    only carries the call over and waits."""

    def __init__(self, step: Step, loop: asyncio.AbstractEventLoop) -> None:
        self._step, self._loop = step, loop

    @property
    def log(self) -> "logging.LoggerAdapter[logging.Logger]":
        return self._step.log

    @property
    def run_id(self) -> str:
        return self._step.run_id

    @property
    def workflow(self) -> str:
        return self._step.workflow

    @property
    def attempt(self) -> int:
        return self._step.attempt

    @property
    def scheduled_at(self) -> datetime | None:
        return self._step.scheduled_at

    def key(self, name: str) -> str:
        return self._step.key(name)

    def run(
        self,
        name: str,
        fn: Callable[..., T],
        *args: Any,
        retries: int = 0,
        backoff: Backoff | None = None,
        retry: bool = True,
        timeout: Duration | None = None,
    ) -> T:
        step = self._step.run(name, fn, *args, retries=retries, backoff=backoff, retry=retry, timeout=timeout)
        return self._bridge(step)

    def sleep(self, length: Duration, *, name: str | None = None) -> None:
        self._bridge(self._step.sleep(length, name=name))

    def sleep_until(self, when: datetime, *, name: str | None = None) -> None:
        self._bridge(self._step.sleep_until(when, name=name))

    def wait_for(self, name: str, *, timeout: Duration | None = None) -> Any:
        return self._bridge(self._step.wait_for(name, timeout=timeout))

    def bail(self, reason: str) -> NoReturn:
        self._step.bail(reason)

    def fail(self, error: BaseException | str) -> NoReturn:
        self._step.fail(error)

    def _bridge(self, step: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()
