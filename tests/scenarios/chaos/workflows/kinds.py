"""Runs of every kind, whose bodies leave a line for each time that they run. What a body returns names that time."""

import asyncio
import os
import random
import time

from tako_runtime import Backoff, Step, SyncStep, workflow
from tako_runtime.clock import SystemClock

#: A crash uses an attempt up; here nothing but crashes and chance ends one, so there are enough for any night.
AGAIN = {"retries": 500, "backoff": Backoff(base="20ms", max="200ms")}


def body(run_id: str, name: str, lasts: float = 0.0) -> str:
    """One line, with the time at which it began, in microseconds."""
    began, this_time = SystemClock().now(), os.urandom(8).hex()
    file = os.open(os.environ["CHAOS_BODIES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{run_id} {name} {this_time} {began}\n".encode())
    os.close(file)
    time.sleep(lasts)
    return this_time


async def async_body(run_id: str, name: str) -> str:
    return body(run_id, name)


def unlucky(run_id: str, name: str) -> str:
    this_time = body(run_id, name)
    if random.random() < 0.5:
        raise RuntimeError("bad luck")
    return this_time


@workflow("steps", **AGAIN)
async def steps(n: int, step: Step) -> int:
    for name in "abc":
        await step.run(name, async_body, step.run_id, name)
    return n


@workflow("flaky", **AGAIN)
async def flaky(n: int, step: Step) -> int:
    await step.run("a", body, step.run_id, "a")
    await step.run("b", unlucky, step.run_id, "b", retries=1, backoff=Backoff(base="10ms", max="10ms"))
    await step.run("c", body, step.run_id, "c")
    return n


@workflow("sleeps", **AGAIN)
async def sleeps(n: int, step: Step) -> int:
    await step.run("a", body, step.run_id, "a")
    await step.sleep("300ms")
    assert await step.wait_for(f"never:{n}", timeout="1s") is None  # parks until it is due
    await step.run("b", body, step.run_id, "b")
    return n


@workflow("asks", **AGAIN)
async def asks(n: int, step: Step) -> int:
    await step.run("a", body, step.run_id, "a")
    answer = await step.wait_for(f"go:{n}")
    await step.run("b", body, step.run_id, "b")
    return answer


@workflow("fans", **AGAIN)
async def fans(n: int, step: Step) -> int:
    await asyncio.gather(*(step.run(f"s{i}", async_body, step.run_id, f"s{i}") for i in range(5)))
    return n


@workflow("renders", group="media", **AGAIN)
def renders(n: int, step: SyncStep) -> int:
    step.run("a", body, step.run_id, "a", 0.02)
    step.run("b", body, step.run_id, "b", 0.02)
    return n


@workflow("beats", schedule="* * * * * *", **AGAIN)
async def beats(step: Step) -> None:
    await step.run("a", async_body, step.run_id, "a")
