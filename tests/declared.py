"""Workflows that tests declare, and their payloads."""

from dataclasses import dataclass
from typing import Any

import pydantic

from tako_runtime import Step, Workflow, workflow
from tako_runtime.run import Run
from tako_runtime.store import base
from tako_runtime.store.commit import StoreThread


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
