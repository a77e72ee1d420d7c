"""tako's handlers for the work that every engine does."""

import asyncio
from datetime import UTC, datetime

from benchmarks.told import BEGAN, ENDED, WOKE, tell
from benchmarks.work import FAN_OUT, SEQUENCE, SLEEPER, Payload, async_body
from tako_runtime import Step, workflow


@workflow(SEQUENCE)
async def sequence(payload: Payload, step: Step) -> None:
    tell(BEGAN, payload["run"])
    for n in range(1, payload["steps"] + 1):
        await step.run(f"step-{n}", async_body, payload, n)
    tell(ENDED, payload["run"])


@workflow(FAN_OUT)
async def fan_out(payload: Payload, step: Step) -> None:
    tell(BEGAN, payload["run"])
    await asyncio.gather(*(step.run(f"step-{n}", async_body, payload, n) for n in range(1, payload["steps"] + 1)))
    tell(ENDED, payload["run"])


@workflow(SLEEPER)
async def sleeper(payload: Payload, step: Step) -> None:
    tell(BEGAN, payload["run"])
    await step.sleep_until(datetime.fromtimestamp(payload["wake"], UTC))
    tell(WOKE, payload["run"])
