"""Enqueue and signal in all their forms, and their limits."""

import asyncio
import json
import math
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import finished, script
from declared import Customer, Order, declared, runs

from tako_runtime import Backoff, Step, Workflow, clock, signal, signal_sync, store, workflow
from tako_runtime.clock import DAY, SECOND
from tako_runtime.errors import (
    ConfigError,
    InvalidValue,
    NotCarried,
    PayloadRefused,
    TooLarge,
)
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread

pytestmark = pytest.mark.usefixtures("clean_registry")


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
