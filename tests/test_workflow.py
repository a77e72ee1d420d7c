"""What an app calls: workflows declared, enqueue and signal in all their forms, with nothing else running."""

import asyncio
import functools
import inspect
import json
import math
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydantic
import pytest
from conftest import finished, script

import tako_runtime
from tako_runtime import Backoff, Step, Workflow, clock, signal, signal_sync, store, workflow
from tako_runtime.clock import DAY, SECOND
from tako_runtime.errors import (
    ConfigError,
    DuplicateWorkflow,
    InvalidValue,
    NotCarried,
    PayloadRefused,
    StoreError,
    TakoUnavailable,
    TooLarge,
)
from tako_runtime.run import Run
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread

pytestmark = pytest.mark.usefixtures("clean_registry")


@dataclass
class Order:
    id: int
    total: float = 0.0


class Customer(pydantic.BaseModel):
    name: str


def declared(name: str = "fulfill-order", **fields: Any) -> Workflow[..., Any]:
    @workflow(name, **fields)
    async def fulfill_order(payload: Order, step: Step) -> None: ...

    return fulfill_order


def runs(opened: StoreThread) -> list[Run]:
    return opened.do_sync(base.ListRuns(limit=1_000))


# --- declaring -------------------------------------------------------------------------------------------------------


def test_a_workflow_is_called_as_the_plain_function_that_it_is() -> None:
    @workflow("double")
    def double(payload: int, step: Step) -> int:
        """Twice as much."""
        return payload * 2

    @workflow("treble")
    async def treble(step: Step, /) -> int:
        return 3

    nobody: Any = None
    assert double(21, nobody) == 42
    assert asyncio.run(treble(nobody)) == 3
    assert (double.blocking, treble.blocking) == (True, False)
    assert (double.__doc__, double.__name__, double.__module__) == ("Twice as much.", "double", __name__)
    assert list(inspect.signature(double).parameters) == ["payload", "step"]
    assert repr(double) == "<workflow 'double'>"


def test_a_workflow_has_what_was_declared_and_else_the_documented_values(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    plain = declared("plain")
    assert (plain.retries, plain.backoff, plain.group, plain.timeout) == (2, Backoff("1s", "1h"), "default", None)
    assert (plain.schedule, plain.timezone, plain.catchup, plain.overlap) == (None, None, "latest", "allow")
    told = declared("told", retries=4, backoff=Backoff("5s"), group="media", timeout="2m")
    assert (told.retries, told.backoff, told.group, told.timeout) == (4, Backoff("5s"), "media", 120 * SECOND)
    assert clean_registry == {"plain": plain, "told": told}


def test_a_handler_may_do_without_a_payload() -> None:
    @workflow("alone")
    async def alone(step: Step) -> None: ...

    @workflow("untyped")
    async def untyped(payload, step): ...

    assert (alone.takes_payload, untyped.takes_payload, untyped.payload_type) == (False, True, Any)
    assert declared().payload_type is Order


def test_a_handlers_payload_type_is_found_though_another_annotation_cannot_be() -> None:
    @workflow("typed")
    async def typed(payload: "Order", step: "OnlyForTheTypeChecker") -> None: ...  # noqa: F821

    assert typed.payload_type is Order


def test_a_workflow_may_refer_to_itself_and_to_what_is_declared_after_it() -> None:
    @workflow("first")
    async def first(payload: Order, step: Step) -> None:
        await first.enqueue(payload)
        await second.enqueue(payload)

    @workflow("second")
    async def second(payload: Order, step: Step) -> None: ...

    assert first.payload_type is Order


@pytest.mark.parametrize("name", ["fulfill-order", "a", "x" * 100, "v2.1_b", "Über"])
def test_letters_digits_and_a_few_marks_make_a_name(name: str) -> None:
    assert declared(name).name == name


@pytest.mark.parametrize("group", ["email", "a", "x" * 63, "gpu-2"])
def test_a_group_is_named_as_tako_toml_can_name_it(group: str) -> None:
    assert declared("in-a-group", group=group).group == group


@pytest.mark.parametrize("name", ["", "x" * 101, "two words", "a/b", "a#2", "a:b", "'", "a\n", None, 7, b"x"])
def test_what_is_no_name_is_refused(name: Any, clean_registry: dict[str, Workflow[..., object]]) -> None:
    with pytest.raises(InvalidValue, match="name"):
        declared(name)
    with pytest.raises(InvalidValue, match="group of 'x'"):
        declared("x", group=name)
    with pytest.raises(InvalidValue, match="group of 'x'"):
        declared("x", group="bulk_mail")
    assert clean_registry == {}


def test_a_decorator_without_its_name_says_how_to_write_it() -> None:
    with pytest.raises(InvalidValue) as caught:
        workflow(lambda step: None)  # type: ignore[arg-type]
    assert '@workflow("' in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"retries": -1}, {"retries": 1.5}, {"retries": True}, {"retries": None}, {"retries": 10**9},
        {"timeout": 0}, {"timeout": -1}, {"timeout": math.nan}, {"timeout": "soon"}, {"backoff": 3}, {"backoff": None},
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_where_they_are_declared(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue, match=f"{next(iter(fields))} of 'fulfill-order'"):
        declared(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schedule": 15}, "schedule of 'fulfill-order' is text, not 15"),
        ({"schedule": "@daily", "timezone": 2}, "timezone of 'fulfill-order' is text, not 2"),
        ({"catchup": "lates"}, "catchup of 'fulfill-order' is 'latest' or 'skip', not 'lates'"),
        ({"overlap": "skp"}, "overlap of 'fulfill-order' is 'allow' or 'skip', not 'skp'"),
        ({"timezone": "Europe/Berlin"}, "'fulfill-order' has a timezone and no schedule"),
        ({"schedule": "@daily"}, "'fulfill-order' is started by a schedule, which has no payload to give: Expected"),
    ],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_cannot_be_meant_is_refused_where_it_is_declared(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        declared(**fields)
    assert str(caught.value).startswith(says)


def test_a_handler_that_can_do_without_a_payload_can_be_scheduled(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    def alone(step: Step) -> None: ...

    def maybe(payload: Order | None, step: Step) -> None: ...

    def anything(payload, step) -> None: ...  # type: ignore[no-untyped-def]

    for n, handler in enumerate((alone, maybe, anything)):
        flow = workflow(f"scheduled-{n}", schedule="@daily", timezone="Asia/Tokyo", catchup="skip")(handler)
        assert (flow.schedule, flow.timezone, flow.catchup, flow.overlap) == ("@daily", "Asia/Tokyo", "skip", "allow")
    assert len(clean_registry) == 3


def nothing() -> None: ...
def too_much(payload: Order, step: Step, more: int) -> None: ...


@pytest.mark.parametrize("handler", [nothing, too_much])
def test_a_handler_that_takes_something_else_is_refused(handler: Callable[..., None]) -> None:
    with pytest.raises(InvalidValue) as caught:
        workflow("odd")(handler)
    assert "(payload, step)" in caught.value.hint


def test_a_payload_type_that_nothing_can_be_read_into_is_refused_where_it_is_declared() -> None:
    with pytest.raises(NotCarried, match="cannot be read back"):

        @workflow("odd")
        async def odd(payload: asyncio.Event, step: Step) -> None: ...


def yields(payload: Order, step: Step) -> Iterator[int]:
    yield 1


async def yields_async(payload: Order, step: Step) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("handler", [yields, yields_async, functools.partial(yields)])
def test_a_handler_with_a_yield_in_it_is_refused_since_a_call_of_it_does_nothing(handler: Callable[..., Any]) -> None:
    with pytest.raises(InvalidValue, match="the handler of 'odd' is a generator"):
        workflow("odd")(handler)


FUTURE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Any
import datetime
from tako_runtime import Step, workflow
if TYPE_CHECKING:
    from elsewhere import Cart

def declare(name, wanted):
    async def handler(payload, step: Step): ...
    handler.__annotations__["payload"] = wanted
    return workflow(name)(handler)

def in_a_function():
    class Inner: ...
    async def handler(payload: Inner, step: Step): ...
    return workflow("inner")(handler)

@workflow("good")
async def good(payload: Above | None, step: Step): ...
"""


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("Ordr", "name 'Ordr' is not defined"),
        ("Cart", "name 'Cart' is not defined"),
        ("Below", "name 'Below' is not defined"),
        ("list[Ordr]", "name 'Ordr' is not defined"),
        ("datetime.dat", "no attribute 'dat'"),
        ("int |", "must be an expression"),
    ],
)
def test_a_payload_annotation_that_names_nothing_is_refused_where_it_is_declared(wanted: str, said: str) -> None:
    module: dict[str, Any] = {"Above": Order, "__name__": "flows"}
    exec(compile(FUTURE, "flows.py", "exec"), module)  # noqa: S102 -- a module with its own __future__
    assert module["good"].payload_type == Order | None
    with pytest.raises(InvalidValue) as caught:
        module["declare"]("odd", wanted)
    for part in ("'payload' in the handler of 'odd'", wanted, said):
        assert part in str(caught.value)
    assert "TYPE_CHECKING" in caught.value.hint
    with pytest.raises(InvalidValue, match="'Inner' is not defined"):
        module["in_a_function"]()
    module["Below"] = Order
    assert module["declare"]("now", "Below").payload_type is Order


def test_two_workflows_of_one_name_are_a_mistake_that_names_both_places(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    first = declared("twice")
    with pytest.raises(DuplicateWorkflow) as caught:

        @workflow("twice")
        async def another(step: Step) -> None: ...

    assert len(re.findall(rf"{re.escape(__file__)}:\d+", str(caught.value))) == 2
    assert clean_registry == {"twice": first}


def test_the_same_function_imported_anew_takes_its_own_place(
    clean_registry: dict[str, Workflow[..., object]],
) -> None:
    declared("again")
    again = declared("again")
    assert clean_registry == {"again": again}


# --- enqueue ---------------------------------------------------------------------------------------------------------

Enqueue = Callable[..., str]


@pytest.fixture(params=["enqueue", "enqueue_sync", "enqueue_many", "enqueue_many_sync"])
def enqueue(request: pytest.FixtureRequest, opened: StoreThread) -> Enqueue:
    """Each of the four ways to start a run, as one."""
    face: str = request.param

    def call(flow: Workflow[..., Any], payload: object = None, **fields: Any) -> str:
        if "many" in face:
            if "unique_key" in fields:
                key = fields.pop("unique_key")
                fields["unique_key"] = lambda _: key
            payload = [payload]
        answer = getattr(flow, face)(payload, **fields)
        if not face.endswith("sync"):
            answer = asyncio.run(answer)
        if "many" in face:
            [answer] = answer
        assert isinstance(answer, str)
        return answer

    return call


def test_an_enqueued_run_is_on_disk_when_its_id_comes_back(enqueue: Enqueue, home: Home) -> None:
    flow = declared(retries=4, backoff=Backoff("2s", "8s"), group="media")
    before = clock.SystemClock().now()
    run_id = enqueue(flow, Order(7, 9.5), priority=3, unique_key="order:7")
    after = clock.SystemClock().now()
    another = open_store(home)  # as another process would see it
    [run] = runs(another)
    another.close()
    assert uuid.UUID(run_id).version == 7
    assert (run.id, run.workflow, run.group, run.payload) == (run_id, "fulfill-order", "media", b'{"id":7,"total":9.5}')
    assert (run.max_attempts, run.retries, run.backoff_base, run.backoff_max) == (5, 4, 2 * SECOND, 8 * SECOND)
    assert (run.priority, run.unique_key, run.release) == (3, "order:7", "dev")
    assert before <= run.created_at == run.due_at <= after


def test_a_payload_may_be_given_as_the_plain_data_that_its_type_is_made_of(
    enqueue: Enqueue, opened: StoreThread
) -> None:
    enqueue(declared(), {"id": 7})
    [run] = runs(opened)
    assert json.loads(run.payload) == {"id": 7}


@pytest.mark.parametrize(
    ("fields", "later"),
    [
        ({"delay": "5m"}, 300 * SECOND),
        ({"delay": timedelta(days=3)}, 3 * DAY),
        ({"delay": 0}, 0),
        ({"delay": 1.5}, 1_500_000),
        ({"run_at": datetime(2020, 1, 1, tzinfo=UTC)}, 0),
    ],
    ids=str,
)
def test_a_run_starts_after_its_delay_and_never_before_now(
    enqueue: Enqueue, opened: StoreThread, fields: dict[str, Any], later: int
) -> None:
    enqueue(declared(), Order(1), **fields)
    [run] = runs(opened)
    assert run.due_at == run.created_at + later


def test_a_run_starts_at_its_time(enqueue: Enqueue, opened: StoreThread) -> None:
    when = datetime(2400, 2, 29, 12, tzinfo=UTC)
    enqueue(declared(), Order(1), run_at=when)
    [run] = runs(opened)
    assert run.due_at == clock.instant(when)


def test_retries_may_be_said_for_one_run(enqueue: Enqueue, opened: StoreThread) -> None:
    enqueue(declared(retries=9), Order(1), retries=0)
    [run] = runs(opened)
    assert (run.retries, run.max_attempts) == (0, 1)


def test_a_live_unique_key_gives_back_the_run_that_has_it(enqueue: Enqueue, opened: StoreThread) -> None:
    first = enqueue(declared(), Order(1), unique_key="order:1")
    assert enqueue(declared(), Order(2), unique_key="order:1") == first
    assert enqueue(declared("refund"), Order(1), unique_key="order:1") != first
    assert len(runs(opened)) == 2


def test_a_run_knows_the_release_that_started_it(
    enqueue: Enqueue, opened: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAKO_RELEASE", "20261122-1")
    enqueue(declared(), Order(1))
    assert [run.release for run in runs(opened)] == ["20261122-1"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"delay": -1}, "delay"),
        ({"delay": math.nan}, "delay"),
        ({"delay": "soon"}, "delay"),
        ({"delay": timedelta.max}, "9999"),
        ({"delay": timedelta(days=365 * 7990)}, "9999"),
        ({"run_at": datetime(2030, 1, 1)}, "no time zone"),  # noqa: DTZ001
        ({"run_at": "2030-01-01T00:00:00Z"}, "run_at"),
        ({"run_at": datetime(2030, 1, 1, tzinfo=UTC), "delay": 1}, "not both"),
        ({"retries": -1}, "retries"),
        ({"retries": 1.5}, "retries"),
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"priority": 1 << 31}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"unique_key": ""}, "unique_key"),
        ({"unique_key": 42}, "unique_key"),
        ({"unique_key": "x" * 501}, "unique_key"),
        ({"unique_key": "caf\udce9"}, "unique_key"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_cannot_be_meant_is_refused_at_the_call_and_nothing_is_stored(
    enqueue: Enqueue, opened: StoreThread, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidValue, match=said):
        enqueue(declared(), Order(1), **fields)
    assert runs(opened) == []


@pytest.mark.parametrize(
    ("annotation", "payload", "said"),
    [
        (Order, {"id": "seven"}, r"\$\.id"),
        (Order, {}, "`id`"),
        (Order, None, "Order"),
        (list[Order], [{"id": 1}, {"id": None}], r"\$\[1\]\.id"),
        (Customer, {"name": 5}, "name"),
        (int, "5", "int"),
    ],
    ids=str,
)
def test_a_payload_that_the_handler_could_not_take_is_refused_by_its_field_and_nothing_is_stored(
    enqueue: Enqueue, opened: StoreThread, annotation: Any, payload: object, said: str
) -> None:
    async def handler(payload: Any, step: Step) -> None: ...

    handler.__annotations__["payload"] = annotation
    flow = workflow("picky")(handler)
    with pytest.raises(PayloadRefused, match=said) as caught:
        enqueue(flow, payload)
    assert "'picky'" in str(caught.value)
    assert runs(opened) == []


def test_a_payload_that_cannot_be_stored_is_refused_and_nothing_is_stored(
    enqueue: Enqueue, opened: StoreThread
) -> None:
    @workflow("any")
    async def anything(payload, step): ...

    for payload, error in ((object(), NotCarried), (math.inf, NotCarried), ("x" * (1 << 20), TooLarge)):
        with pytest.raises(error, match="payload of 'any'"):
            enqueue(anything, payload)
    assert runs(opened) == []


def test_many_runs_are_started_in_one_transaction_in_order(opened: StoreThread) -> None:
    flow = declared()
    orders = [Order(n % 3) for n in range(6)]
    ids = flow.enqueue_many_sync(iter(orders), unique_key=lambda order: f"order:{order.id}" if order.id else None)
    assert len(ids) == 6
    assert ids[1] == ids[4]
    assert ids[2] == ids[5]
    assert len(set(ids)) == 4
    by_id = {run.id: json.loads(run.payload)["id"] for run in runs(opened)}
    assert [by_id[run_id] for run_id in ids] == [0, 1, 2, 0, 1, 2]
    assert flow.enqueue_many_sync([]) == []


def test_one_misfit_among_many_stores_none_of_them(opened: StoreThread) -> None:
    with pytest.raises(PayloadRefused):
        declared().enqueue_many_sync([Order(1), {"id": "two"}, Order(3)])
    with pytest.raises(InvalidValue):
        declared().enqueue_many_sync([Order(1), Order(2)], unique_key=lambda order: "" if order.id == 2 else None)
    assert runs(opened) == []


# --- signal ----------------------------------------------------------------------------------------------------------


def test_a_signal_that_nobody_waits_for_is_kept_for_seven_days(opened: StoreThread) -> None:
    assert signal_sync("approval:42", {"approved": True}) == 0
    assert asyncio.run(signal("approval:43")) == 0
    one, other = opened.do_sync(base.KeptSignals(now=0))
    assert (one.name, one.payload, other.name, other.payload) == (
        "approval:42", b'{"approved":true}', "approval:43", b"null",
    )  # fmt: skip
    assert one.expires_at - one.sent_at == 7 * DAY


@pytest.mark.parametrize("name", ["", "a#2", "x" * 501, "a\nb", "a\x00", None, 5, b"a", "caf\udce9"], ids=repr)
def test_what_is_no_signals_name_is_refused_and_nothing_is_kept(opened: StoreThread, name: Any) -> None:
    with pytest.raises(InvalidValue, match="signal"):
        signal_sync(name)
    with pytest.raises(InvalidValue, match="signal"):
        asyncio.run(signal(name))
    assert opened.do_sync(base.KeptSignals(now=0)) == []


def test_a_signals_payload_that_cannot_be_stored_is_refused_by_the_signals_name(opened: StoreThread) -> None:
    with pytest.raises(NotCarried, match="signal 'go'"):
        signal_sync("go", object())
    with pytest.raises(TooLarge, match="signal 'go'"):
        signal_sync("go", "x" * (1 << 20))
    assert opened.do_sync(base.KeptSignals(now=0)) == []


# --- limits ----------------------------------------------------------------------------------------------------------


def test_values_and_signals_go_by_the_limits_that_the_environment_hands_down(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in store.Limits(max_value=100, signal_retention=DAY).environment().items():
        monkeypatch.setenv(name, value)
    store.use(opened)  # they are looked for once
    assert store.limits() == store.Limits(100, DAY)
    with pytest.raises(TooLarge, match="the limit is 100"):
        signal_sync("go", "x" * 100)
    with pytest.raises(TooLarge, match="the limit is 100"):
        declared().enqueue_sync({"id": 1, "note": "x" * 100})
    signal_sync("go", "x")
    [kept] = opened.do_sync(base.KeptSignals(now=0))
    assert kept.expires_at - kept.sent_at == DAY
    assert runs(opened) == []


@pytest.mark.parametrize(("app", "expected"), [("shop", (2048, 3600)), ("another", (1 << 20, 7 * 86_400))])
def test_without_them_the_limits_are_those_of_the_apps_own_tako_toml_and_else_the_built_in_ones(
    home: Home, app: str, expected: tuple[int, int]
) -> None:
    text = f'name = "{app}"\n[workflows]\nmax_value = "2KiB"\nsignal_retention = "1h"\n'
    (home.data_dir / "tako.toml").write_text(text)
    code = "from tako_runtime import store; print(*store.limits())"
    told = finished(script(code, home=home, cwd=home.data_dir)).split()
    assert (int(told[0]), int(told[1]) // SECOND) == expected


@pytest.mark.parametrize(("size", "kept"), [("1MiB", "1h"), ("5", "a while")])
def test_limits_in_the_environment_that_cannot_be_read_are_told(
    opened: StoreThread, monkeypatch: pytest.MonkeyPatch, size: str, kept: str
) -> None:
    monkeypatch.setenv("TAKO_MAX_VALUE", size)
    monkeypatch.setenv("TAKO_SIGNAL_RETENTION", kept)
    store.use(opened)
    with pytest.raises(ConfigError, match="cannot be read"):
        signal_sync("go")
    assert opened.do_sync(base.KeptSignals(now=0)) == []


# --- from a process with nothing beside it ---------------------------------------------------------------------------

APP = """
    import asyncio, json, sys
    from tako_runtime import TakoError, signal, signal_sync, store, workflow

    @workflow("order")
    async def order(payload, step): ...

    async def main():
        return [await order.enqueue(1), *await order.enqueue_many([2, 3]), await signal("a")]

    try:
        told = asyncio.run(main()) + [order.enqueue_sync(4), *order.enqueue_many_sync([5]), signal_sync("b")]
        print(json.dumps({"told": told, "at": str(store.locate().app_dir)}))
    except TakoError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error), "hint": error.hint}))
"""


def asked(home: Home | None = None, cwd: Path | None = None, **env: str) -> dict[str, Any]:
    setting = "".join(f"import os; os.environ[{name!r}] = {value!r}\n" for name, value in env.items())
    told: dict[str, Any] = json.loads(finished(script(setting + inspect.cleandoc(APP), home=home, cwd=cwd)))
    return told


def kept_in(home: Home) -> tuple[list[Run], list[base.KeptSignal]]:
    opened = open_store(home)
    found = runs(opened), opened.do_sync(base.KeptSignals(now=0))
    opened.close()
    return found


def test_a_script_with_the_variables_set_enqueues_and_signals_with_nothing_else_running(home: Home) -> None:
    told = asked(home)
    assert told["at"] == str(home.app_dir)
    found, signals = kept_in(home)
    assert sorted(run.payload for run in found) == [b"1", b"2", b"3", b"4", b"5"]
    assert {run.id for run in found} == {each for each in told["told"] if each}
    assert [kept.name for kept in signals] == ["a", "b"]


def test_a_script_in_a_project_finds_the_nearest_file_upwards(home: Home) -> None:
    root = home.data_dir.resolve()
    (root / "tako.toml").write_text('name = "outer"\n')
    inner = root / "inner"
    deep = inner / "a" / "b"
    deep.mkdir(parents=True)
    (inner / "tako.toml").write_text('name = "market"\n')
    told = asked(cwd=deep)
    assert told["at"] == str(inner / ".tako" / "apps" / "market")
    assert len(kept_in(store.project_home("market", inner))[0]) == 5
    assert asked(cwd=root)["at"] == str(root / ".tako" / "apps" / "outer")


def test_the_variables_win_over_a_project(home: Home) -> None:
    (home.data_dir / "tako.toml").write_text('name = "market"\n')
    assert asked(home, cwd=home.data_dir)["at"] == str(home.app_dir)


def test_a_script_that_belongs_to_no_app_is_told_what_to_do(home: Home) -> None:
    told = asked(cwd=home.data_dir)
    assert told["error"] == "TakoUnavailable"
    for part in ("no tako.toml", str(home.data_dir.resolve()), "TAKO_APP_NAME", "TAKO_DATA_DIR"):
        assert part in told["message"]
    assert "set TAKO_APP_NAME and TAKO_DATA_DIR" in told["hint"]
    assert list(home.data_dir.iterdir()) == []


@pytest.mark.parametrize(("there", "missing"), [("TAKO_APP_NAME", "TAKO_DATA_DIR"), ("TAKO_DATA_DIR", "TAKO_APP_NAME")])
def test_half_of_the_pair_is_an_error_even_inside_a_project(home: Home, there: str, missing: str) -> None:
    (home.data_dir / "tako.toml").write_text('name = "market"\n')
    told = asked(cwd=home.data_dir, **{there: "shop"})
    assert told["error"] == "TakoUnavailable"
    assert told["message"] == f"{there} is set and {missing} is not"


@pytest.mark.parametrize("app", ["Shop", "-shop", "shop-", "../shop", "s" * 64, "sh op"])
def test_a_variable_that_is_no_apps_name_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch, app: str) -> None:
    monkeypatch.setenv("TAKO_APP_NAME", app)
    monkeypatch.setenv("TAKO_DATA_DIR", str(home.data_dir))
    with pytest.raises(ConfigError, match="TAKO_APP_NAME"):
        store.locate()


def test_a_child_finds_the_same_home_by_the_environment_that_is_made_for_it(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    assert store.locate() == home


def test_a_store_that_cannot_be_opened_is_an_error_each_time_and_works_once_it_can(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    in_the_way = home.data_dir / "apps"
    in_the_way.write_text("a file")
    for _ in range(2):
        with pytest.raises(StoreError):
            signal_sync("go")
    in_the_way.unlink()
    try:
        assert signal_sync("go") == 0
    finally:
        store.current().close()
        store.use(None)


def test_half_of_the_pair_in_this_process_is_told_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKO_APP_NAME", "shop")
    with pytest.raises(TakoUnavailable, match="TAKO_DATA_DIR is not"):
        declared().enqueue_sync(Order(1))


# --- the public names ------------------------------------------------------------------------------------------------


def test_the_package_offers_what_it_lists_and_every_error_is_an_error_of_tako() -> None:
    assert len(set(tako_runtime.__all__)) == len(tako_runtime.__all__)
    for name in tako_runtime.__all__:
        offered = getattr(tako_runtime, name)
        if inspect.isclass(offered) and issubclass(offered, Exception):
            assert issubclass(offered, tako_runtime.TakoError)
    assert not issubclass(tako_runtime.Suspension, Exception)
