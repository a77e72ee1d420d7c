"""Handlers that go on for as long as they are let, and leave a line with the time while they do."""

import asyncio
import time
from pathlib import Path

from tako_runtime import Step, SyncStep, workflow
from tako_runtime.clock import SystemClock


def tick(log: str) -> None:
    with Path(log).open("a") as file:
        file.write(f"{SystemClock().now()}\n")


@workflow("ticks")
async def ticks(log: str, step: Step) -> None:
    async def body() -> None:
        while True:
            tick(log)
            await asyncio.sleep(0.05)

    await step.run("tick", body)


@workflow("ticks-in-a-thread")
def ticks_in_a_thread(log: str, step: SyncStep) -> None:
    def body() -> None:
        while True:
            tick(log)
            time.sleep(0.05)

    step.run("tick", body)
