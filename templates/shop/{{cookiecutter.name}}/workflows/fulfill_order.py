import asyncio
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

from tako_runtime import Step, workflow

from services import charge_card, check_stock, notify_warehouse, refund, reserve_stock, send_receipt, ship

APPROVAL_ABOVE = 500


@dataclass
class Order:
    id: int
    items: list[str]
    total: Decimal
    email: str
    address: str


@dataclass
class Receipt:
    order_id: int
    charge_id: str
    tracking: str


@workflow("fulfill-order", retries=4)
async def fulfill_order(payload: Order, step: Step) -> Receipt:
    """Take an order from payment to parcel. It may take a week, and survives every restart in between."""

    await step.run("check-stock", check_stock, payload.items)

    # A finished step is never run again. But should the machine stop after the card was charged and before that was
    # stored, the step has to run again; the key is still the same then, so the provider does not charge twice.
    charge = await step.run("charge", charge_card, payload.total, step.key("charge"))

    if payload.total > APPROVAL_ABOVE:
        # Nothing runs while a person thinks it over: the run is a row in the store until the signal or the timeout.
        decision = await step.wait_for(f"approval:{payload.id}", timeout=timedelta(days=7))
        if decision is None or not decision["approved"]:
            await step.run("refund", refund, charge)
            step.bail("approval timed out" if decision is None else "approval refused")

    # Three steps at once, each stored on its own: if one fails, only that one is tried again.
    await asyncio.gather(
        step.run("reserve-stock", reserve_stock, payload.id, payload.items),
        step.run("notify-warehouse", notify_warehouse, payload.id, payload.address),
        step.run("send-receipt", send_receipt, payload.id, payload.email),
    )

    # Time to pack. The hour to wake up is stored, so make it days if you like: a restart does not start it over.
    await step.sleep(timedelta(seconds=5))

    # Carriers have bad moments: two more tries here, before the whole run counts as failed and is retried.
    tracking = await step.run("ship", ship, payload.id, payload.address, retries=2)
    return Receipt(payload.id, charge.id, tracking)
