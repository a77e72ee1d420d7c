"""1. @workflow, enqueue, signal: what an app calls.

    @workflow("fulfill-order", retries=4)
    async def fulfill_order(payload: Order, step: Step) -> Receipt: ...

    run_id = await fulfill_order.enqueue(Order(...), unique_key="order:42")
    await signal("approval:42", {"approved": True})

An enqueue is done when it returns: the run is on disk, synced, whatever happens to this process next.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar

from msgspec import structs

from tako_runtime import clock, codec, store
from tako_runtime.clock import Duration, MachineClock, SystemClock
from tako_runtime.errors import DuplicateWorkflow, GroupUnhealthy, InvalidValue, Unreadable
from tako_runtime.masking import NOT_IN_NAMES, named_in
from tako_runtime.run import NewRun, new_id
from tako_runtime.state import Backoff
from tako_runtime.store.base import Enqueue, ListHealth, SendSignal, Unhealthy

P = ParamSpec("P")
R = TypeVar("R")

#: Every workflow that this process has imported, by name.
registry: dict[str, "Workflow[..., Any]"] = {}

_clock, _machine = SystemClock(), MachineClock()


def workflow(
    name: str,
    *,
    retries: int = 2,
    backoff: Backoff = Backoff(),  # noqa: B008 -- frozen
    schedule: str | None = None,
    timezone: str | None = None,
    catchup: Literal["latest", "skip"] = "latest",
    overlap: Literal["allow", "skip"] = "allow",
    group: str = "default",
    timeout: Duration | None = None,
    local: bool = False,
) -> "Callable[[Callable[P, R]], Workflow[P, R]]":
    """Make a handler a workflow.

    The handler takes `(payload, step)`, or `(step)` alone; `async def` or plain `def` (that one runs in a thread, and
    its step methods block). `retries=4` is five attempts. `timeout` bounds one attempt's running time, parked time not
    counted. `group` is the lane of workers that run it.

    `schedule` is a cron expression in `timezone` (UTC unless said), by which it is started without a payload. Of the
    times that an outage swallowed the latest is made up for, or none with `catchup="skip"`. With `overlap="skip"` a
    time that comes while the last such run lives is passed over.

    Where several servers share a store, the runs of a `local` workflow stay on the server that starts them, in a store
    of its own: for what is done to that machine, such as warming its cache or cleaning its files. Its schedule fires
    on each server. Where there is one store anyway, it makes no difference.

    Raises `InvalidValue` for what cannot be meant, `DuplicateWorkflow` where the name is taken.
    """

    def declare(handler: Callable[P, R]) -> "Workflow[P, R]":
        return Workflow(
            name, handler, retries=retries, backoff=backoff, schedule=schedule, timezone=timezone, catchup=catchup,
            overlap=overlap, group=group, timeout=timeout, local=local,
        )  # fmt: skip

    if callable(name):
        raise InvalidValue("@workflow needs a name", hint='Write @workflow("fulfill-order").')
    return declare


class Workflow(Generic[P, R]):
    """A named handler. Calling it calls the plain function, so that a test can hand in a stand-in for the step."""

    def __init__(
        self,
        name: str,
        handler: Callable[P, R],
        *,
        retries: int,
        backoff: Backoff,
        schedule: str | None,
        timezone: str | None,
        catchup: str,
        overlap: str,
        group: str,
        timeout: Duration | None,
        local: bool,
    ) -> None:
        _check_name(name, "a workflow's name")
        _check_group(group, f"the group of {name!r}")
        check_count(retries, f"retries of {name!r}")
        check_backoff(backoff, f"backoff of {name!r}")
        self.name, self.handler, self.group = name, handler, group
        self.its_result = f"the result of {name!r}"  # in errors
        self.retries, self.backoff = retries, backoff
        self.schedule, self.timezone, self.catchup, self.overlap = schedule, timezone, catchup, overlap
        self.timeout = None if timeout is None else clock.duration(timeout, f"timeout of {name!r}", least=1_000)
        if not isinstance(local, bool):
            raise InvalidValue(f"local of {name!r} is True or False, not {local!r}")
        self.local = local
        _check_handler(handler, name)
        self.blocking = not inspect.iscoroutinefunction(handler)
        self.takes_payload, self.payload_type = _payload_of(handler, name)
        _check_schedule(self)
        self.__doc__ = handler.__doc__
        self.__name__ = getattr(handler, "__name__", name)
        self.__module__ = handler.__module__
        self.__wrapped__ = handler
        _register(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.handler(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name!r}>"

    async def enqueue(
        self,
        payload: object = None,
        *,
        run_at: datetime | None = None,
        delay: Duration | None = None,
        retries: int | None = None,
        unique_key: str | None = None,
        priority: int = 0,
    ) -> str:
        """Start a run, now, after `delay` or at `run_at`; answers its id once it is on disk.

        While a run of this workflow with the same `unique_key` is alive, answers that one's id and starts none. A
        higher `priority` is claimed first. Raises `PayloadRefused` for a payload that the handler could not take and
        `InvalidValue` for a time that cannot be meant, with nothing stored; `TakoUnavailable` where no store is found;
        under `tako dev`, `GroupUnhealthy` while the workers that would take the run cannot work.
        """
        op = self._enqueue([payload], run_at, delay, retries, lambda _: unique_key, priority)
        [run_id] = await self._stored(op)
        return run_id

    def enqueue_sync(
        self,
        payload: object = None,
        *,
        run_at: datetime | None = None,
        delay: Duration | None = None,
        retries: int | None = None,
        unique_key: str | None = None,
        priority: int = 0,
    ) -> str:
        """`enqueue` for code without an event loop."""
        op = self._enqueue([payload], run_at, delay, retries, lambda _: unique_key, priority)
        [run_id] = self._stored_sync(op)
        return run_id

    async def enqueue_many(
        self,
        payloads: Iterable[object],
        *,
        run_at: datetime | None = None,
        delay: Duration | None = None,
        retries: int | None = None,
        unique_key: Callable[[Any], str | None] = lambda _: None,
        priority: int = 0,
    ) -> list[str]:
        """Start a run for each payload in one transaction: all of them, or none. Answers their ids in order.

        `unique_key` is called with each payload, for instance `unique_key=lambda order: f"order:{order.id}"`.
        """
        return await self._stored(self._enqueue(payloads, run_at, delay, retries, unique_key, priority))

    def enqueue_many_sync(
        self,
        payloads: Iterable[object],
        *,
        run_at: datetime | None = None,
        delay: Duration | None = None,
        retries: int | None = None,
        unique_key: Callable[[Any], str | None] = lambda _: None,
        priority: int = 0,
    ) -> list[str]:
        """`enqueue_many` for code without an event loop."""
        return self._stored_sync(self._enqueue(payloads, run_at, delay, retries, unique_key, priority))

    async def _stored(self, op: Enqueue) -> list[str]:
        opened = store.current(local=self.local)
        if store.developing():
            refuse_unhealthy(self.group, await opened.do(ListHealth()), lambda: store.locate().app_dir)
        return await opened.do(op)

    def _stored_sync(self, op: Enqueue) -> list[str]:
        opened = store.current(local=self.local)
        if store.developing():
            refuse_unhealthy(self.group, opened.do_sync(ListHealth()), lambda: store.locate().app_dir)
        return opened.do_sync(op)

    def _enqueue(
        self,
        payloads: Iterable[object],
        run_at: datetime | None,
        delay: Duration | None,
        retries: int | None,
        unique_key: Callable[[Any], str | None],
        priority: int,
    ) -> Enqueue:
        now = (_machine if self.local else _clock).now()  # that of the store in which it will be
        if run_at is not None and delay is not None:
            raise InvalidValue(f"enqueue of {self.name!r}: give run_at or delay, not both")
        ahead = 0
        if run_at is not None:
            ahead = max(0, clock.instant(run_at, "run_at") - now)
        elif delay is not None:
            ahead = clock.duration(delay, "delay")
        due = now + (store.pace().real(ahead) if ahead else 0)
        if retries is not None:
            check_count(retries, "retries")
        base, longest = self.backoff.base_micros, self.backoff.max_micros
        most = store.limits().max_value
        runs = [
            new_run(
                self.name, self.group, codec.payload_text(payload, self.payload_type, self.name, limit=most), now=now,
                due=due, retries=self.retries if retries is None else retries, backoff_base=base,
                backoff_max=longest, priority=priority, unique_key=unique_key(payload),
            )
            for payload in payloads
        ]  # fmt: skip
        return Enqueue(now=now, runs=runs)


def new_run(
    workflow: str,
    group: str,
    payload: str,
    *,
    now: int,
    due: int,
    retries: int,
    backoff_base: int,
    backoff_max: int,
    priority: int = 0,
    unique_key: str | None = None,
    scheduled_at: int | None = None,
) -> NewRun:
    """A run to be inserted, whoever starts it; `InvalidValue` for what no store could hold."""
    if due > clock.LATEST:
        raise InvalidValue(f"the run of {workflow!r} would be due past the year 9999")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 1 << 31:
        raise InvalidValue(f"priority must be a whole number of at most 32 bits, not {priority!r}")
    if unique_key is not None and not is_text(unique_key):
        raise InvalidValue(f"unique_key must be text of 1 to 500 characters, not {unique_key!r:.80}")
    if unique_key is not None and (secret := named_in(unique_key)):
        raise InvalidValue(f"the unique_key has the value of secret {secret} in it", hint=NOT_IN_NAMES)
    return NewRun(
        id=new_id(now), workflow=workflow, group=group, payload=payload, created_at=now, due_at=due, retries=retries,
        backoff_base=backoff_base, backoff_max=backoff_max, priority=priority, unique_key=unique_key,
        release=release(), scheduled_at=scheduled_at,
    )  # fmt: skip


def refuse_unhealthy(group: str, unhealthy: list[Unhealthy], app_dir: Callable[[], Path]) -> None:
    """Raise `GroupUnhealthy`, with what its worker said, if the group is one of these: who develops learns at once what
    in production would only keep the run waiting."""
    if said := [one for one in unhealthy if one.group == group]:
        from tako_runtime.health import believed  # all is well most of the time

        for one in believed(said, app_dir()):
            raise GroupUnhealthy(f"group {group} cannot work: {one.reason}\n{one.details}".rstrip())


async def signal(name: str, payload: object = None) -> int:
    """Send `payload` to every run that waits for `name`; answers how many that woke.

    Where nobody waits, the signal is kept on disk for `signal_retention` (seven days unless tako.toml says otherwise)
    and given to the first wait on that name. Several kept signals are taken in the order in which they were sent.

    Where several servers share a store, that is all runs in it, and those of `local` workflows on this server; and a
    kept signal is kept for all servers.
    """
    op, beside, woken = signal_op(name, payload), store.beside(), 0
    if beside is not None:
        woken = await beside.do(unkept(op, local=True))
    return woken + await store.current().do(unkept(op) if woken else op)


def signal_sync(name: str, payload: object = None) -> int:
    """`signal` for code without an event loop."""
    op, beside, woken = signal_op(name, payload), store.beside(), 0
    if beside is not None:
        woken = beside.do_sync(unkept(op, local=True))
    return woken + store.current().do_sync(unkept(op) if woken else op)


def unkept(op: SendSignal, *, local: bool = False) -> SendSignal:
    """The same signal for those alone who wait for it now, in that store or in this machine's own."""
    return structs.replace(op, expires_at=None, now=_machine.now() if local else op.now)


def signal_op(name: str, payload: object) -> SendSignal:
    check_signal_name(name)
    now, limits = _clock.now(), store.limits()
    text = codec.encode(payload, f"the payload of signal {name!r}", limit=limits.max_value)
    return SendSignal(name=name, payload=text, now=now, expires_at=now + limits.signal_retention)


def release() -> str:
    """The release this process belongs to; "dev" outside a deployment."""
    return os.environ.get("TAKO_RELEASE", "dev")


def check_signal_name(name: str) -> None:
    if not (isinstance(name, str) and names_something(name)):
        raise InvalidValue(f"a signal's name is printable text of 1 to 500 characters without '#', not {name!r}")
    if secret := named_in(name):
        raise InvalidValue(f"the signal's name has the value of secret {secret} in it", hint=NOT_IN_NAMES)


@functools.lru_cache(1_024)
def names_something(text: str) -> bool:
    """Whether it may name a step or a signal: `#` is for the numbers of a name's uses."""
    return is_text(text) and "#" not in text and text.isprintable()


def is_text(value: object) -> bool:
    """Whether it is text of 1 to 500 characters that a store takes: no half of a surrogate pair."""
    if not isinstance(value, str) or not 0 < len(value) <= 500:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_once = False  # whether what has a name is declared once, even where the same function stands at another line


@contextmanager
def declaring_once() -> Iterator[None]:
    """No module is edited and imported anew within: a function that is there twice is a mistake too."""
    global _once
    before, _once = _once, True
    try:
        yield
    finally:
        _once = before


def _register(new: Workflow[..., Any]) -> None:
    """A second workflow of the same name is a mistake, unless it is the same function imported anew."""
    old = registry.get(new.name)
    if old is not None and (_origin(old) != _origin(new) or (_once and _place(old) != _place(new))):
        raise DuplicateWorkflow(f"workflow {new.name!r} is declared twice: in {_place(old)} and in {_place(new)}")
    registry[new.name] = new


def _origin(flow: Workflow[..., Any]) -> tuple[str, str]:
    return flow.handler.__module__, getattr(flow.handler, "__qualname__", "")


def _place(flow: Workflow[..., Any]) -> str:
    code = getattr(flow.handler, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else flow.handler.__module__


def _payload_of(handler: Callable[..., Any], name: str) -> tuple[bool, Any]:
    """Whether the handler takes a payload beside the step, and the type it is read into."""
    parameters = [
        p for p in inspect.signature(handler).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    if len(parameters) not in (1, 2):
        raise InvalidValue(
            f"the handler of {name!r} takes {len(parameters)} arguments", hint="It takes (payload, step), or (step)."
        )
    if len(parameters) == 1:
        return False, None
    annotation = _annotation_of(handler, parameters[0], name)
    codec.decoder(annotation)  # an annotation that nothing can be read into is a mistake of now, not of the first run
    return True, annotation


def _annotation_of(handler: Callable[..., Any], payload: inspect.Parameter, name: str) -> Any:
    """One that names nothing is a mistake of now: read as anything, the payload would be whatever somebody sends."""
    try:
        return codec.annotation(handler, payload.name)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        raise InvalidValue(
            f"the annotation of {payload.name!r} in the handler of {name!r} cannot be resolved: "
            f"{payload.annotation!r}: {said}",
            hint="The type has to be there when the handler is declared: define or import it above, at the top level "
            "of the module, not under `if TYPE_CHECKING`. To take whatever comes, annotate with Any.",
        ) from None


def _check_handler(handler: Callable[..., Any], name: str) -> None:
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise InvalidValue(
            f"the handler of {name!r} is a generator: it has a yield in it, and calling it would do nothing",
            hint="A handler returns its result. Write what it did at each yield as a step.",
        )


def _check_schedule(flow: Workflow[..., Any]) -> None:
    """What can be told without the calendar, which the manifest asks: an app that only enqueues need not load that."""
    for what, value in (("schedule", flow.schedule), ("timezone", flow.timezone)):
        if value is not None and not isinstance(value, str):
            raise InvalidValue(f"{what} of {flow.name!r} is text, not {value!r}")
    for what, given, known in (
        ("catchup", flow.catchup, ("latest", "skip")),
        ("overlap", flow.overlap, ("allow", "skip")),
    ):
        if given not in known:
            raise InvalidValue(f"{what} of {flow.name!r} is {' or '.join(map(repr, known))}, not {given!r}")
    if flow.schedule is None and flow.timezone is not None:
        raise InvalidValue(f"{flow.name!r} has a timezone and no schedule", hint="Give it a schedule, or no timezone.")
    if flow.schedule is not None and flow.takes_payload:
        try:
            codec.decode("null", flow.payload_type)
        except Unreadable as error:
            raise InvalidValue(
                f"{flow.name!r} is started by a schedule, which has no payload to give: {error}",
                hint="Let the handler take (step) alone, or a payload that may be None.",
            ) from None


def _check_name(name: str, what: str) -> None:
    ok = isinstance(name, str) and 0 < len(name) <= 100 and all(c.isalnum() or c in "-_." for c in name)
    if not ok:
        raise InvalidValue(f"{what} is 1 to 100 letters, digits, '-', '_' or '.', not {name!r}")


def _check_group(group: str, what: str) -> None:
    """As tako.toml names it in [workflows.GROUP]."""
    if not isinstance(group, str) or not store.APP_NAME.fullmatch(group):
        raise InvalidValue(f"{what} is a-z, 0-9 and '-', a letter first, no '-' last, 63 at most, not {group!r}")


def check_backoff(value: Backoff, what: str) -> None:
    if not isinstance(value, Backoff):
        raise InvalidValue(f"{what} is a Backoff, not {value!r}", hint='Write backoff=Backoff(base="1s", max="1h").')


def check_count(value: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000:
        raise InvalidValue(f"{what} must be a whole number from 0 on, not {value!r}")
