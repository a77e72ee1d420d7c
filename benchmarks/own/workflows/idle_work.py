"""Workflows that do nothing, so that what is left to measure is the engine."""

import os
import time
from pathlib import Path

from tako_runtime import Step, workflow

NAMES = ("a", "b", "c")


async def nothing() -> int:
    return 1


@workflow("three-steps")
async def three_steps(payload: dict[str, str], step: Step) -> None:
    for name in NAMES:
        await step.run(name, nothing)


@workflow("many-steps")
async def many_steps(payload: int, step: Step) -> None:
    for n in range(payload):
        await step.run(f"step-{n}", nothing)


@workflow("tell-time")
async def tell_time(payload: str, step: Step) -> None:
    """Write when the first line ran into the named pipe `payload`. The clock is one for all processes."""
    began = time.monotonic_ns()
    pipe = os.open(Path(payload), os.O_WRONLY)
    os.write(pipe, began.to_bytes(8, "big"))
    os.close(pipe)
