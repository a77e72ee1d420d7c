"""A workflow called directly is the plain function, so a stand-in step is all that a unit test needs."""

import asyncio
import inspect
from decimal import Decimal

import pytest

import services
from workflows.daily_report import daily_report
from workflows.fulfill_order import Order, fulfill_order

FAN_OUT = ["notify-warehouse", "reserve-stock", "send-receipt"]


class Bailed(Exception):
    """The workflow ended itself."""


class StandInSyncStep:
    """Runs each step at once and remembers its name."""

    def __init__(self):
        self.ran = []

    def run(self, name, fn, *args, **options):
        self.ran.append(name)
        return fn(*args)


class StandInStep:
    """The same for async handlers. Sleeps take no time; a signal that was not given has timed out."""

    def __init__(self, **signals):
        self.signals = signals
        self.ran = []

    async def run(self, name, fn, *args, **options):
        self.ran.append(name)
        result = fn(*args)
        return await result if inspect.isawaitable(result) else result

    async def sleep(self, duration):
        pass

    async def wait_for(self, name, *, timeout):
        return self.signals.get(name)

    def bail(self, reason):
        raise Bailed(reason)

    def key(self, name):
        return f"test:{name}"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(services, "PAUSE", 0)


def order(total):
    return Order(id=42, items=["teapot"], total=Decimal(total), email="ada@example.com", address="8 Harbour Street")


def test_a_small_order_is_charged_and_shipped_without_approval():
    step = StandInStep()
    receipt = asyncio.run(fulfill_order(order("499.00"), step))
    assert receipt.order_id == 42
    assert receipt.tracking == "TRACK-000042"
    assert step.ran[:2] == ["check-stock", "charge"]
    assert sorted(step.ran[2:5]) == FAN_OUT
    assert step.ran[5:] == ["ship"]


def test_a_large_order_is_shipped_once_it_is_approved():
    step = StandInStep(**{"approval:42": {"approved": True}})
    receipt = asyncio.run(fulfill_order(order("649.00"), step))
    assert receipt.tracking == "TRACK-000042"
    assert step.ran[-1] == "ship"


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        pytest.param({}, "approval timed out", id="timeout"),
        pytest.param({"approval:42": {"approved": False}}, "approval refused", id="refusal"),
    ],
)
def test_a_large_order_that_is_not_approved_is_refunded(signals, reason):
    step = StandInStep(**signals)
    with pytest.raises(Bailed, match=reason):
        asyncio.run(fulfill_order(order("649.00"), step))
    assert step.ran == ["check-stock", "charge", "refund"]


def test_the_same_key_gives_the_same_charge():
    first, again = (asyncio.run(services.charge_card(Decimal(10), "key")) for _ in range(2))
    assert first == again


def test_the_daily_report_mails_the_sales_it_collected(capsys):
    step = StandInSyncStep()
    sales = daily_report(None, step)
    assert step.ran == ["day", "collect", "mail"]
    assert f"{sales.orders} orders, {sales.revenue} in sales" in capsys.readouterr().out
