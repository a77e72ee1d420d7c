"""The world outside: payments, warehouse, carrier, mail. Fakes, so that the project runs as it is; put yours here.

These are plain functions that know nothing of workflows. A step may run one again when the machine stopped before its
result was stored, so what changes something also gets a name for it: an order's id, a charge, a key.
"""

import asyncio
import hashlib
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

PAUSE = 0.2  # seconds: what a call over the network takes


@dataclass
class Charge:
    id: str
    amount: Decimal


@dataclass
class Sales:
    orders: int
    revenue: Decimal


async def check_stock(items: list[str]) -> None:
    await _work(f"stock: there are {', '.join(items)}")


async def charge_card(amount: Decimal, key: str) -> Charge:
    """Like a real payment provider, give the same charge for the same key."""
    await _work(f"payments: charge {amount}")
    return Charge(id=f"ch_{hashlib.sha256(key.encode()).hexdigest()[:8]}", amount=amount)


async def refund(charge: Charge) -> None:
    await _work(f"payments: refund {charge.amount} of {charge.id}")


async def reserve_stock(order_id: int, items: list[str]) -> None:
    await _work(f"stock: reserve {', '.join(items)} for order {order_id}")


async def notify_warehouse(order_id: int, address: str) -> None:
    await _work(f"warehouse: pack order {order_id} for {address}")


async def send_receipt(order_id: int, email: str) -> None:
    await _work(f"mail: receipt for order {order_id} to {email}")


async def ship(order_id: int, address: str) -> str:
    """Hand the parcel to the carrier and give its tracking number."""
    await _work(f"carrier: order {order_id} to {address}")
    return f"TRACK-{order_id:06}"


def yesterday() -> date:
    return datetime.now(UTC).date() - timedelta(days=1)


def sales_of(day: date) -> Sales:
    time.sleep(PAUSE)  # a slow query; blocking is fine in a plain function
    print(f"database: sales of {day}")
    return Sales(orders=20 + day.day, revenue=Decimal("49.90") * (20 + day.day))


def mail_report(day: date, sales: Sales) -> None:
    time.sleep(PAUSE)
    print(f"mail: {day}: {sales.orders} orders, {sales.revenue} in sales")


async def _work(line: str) -> None:
    await asyncio.sleep(PAUSE)
    print(line)
