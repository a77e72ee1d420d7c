"""Workflows for workers that are killed, stopped and drained. Each payload says where its bodies leave their lines."""

import asyncio
import os
import random
import time
from dataclasses import dataclass
from typing import Any

from scenarios.flows._bodies import die, first, held, ran
from tako_runtime import Backoff, Step, SyncStep, workflow

SOON = Backoff(base="10ms", max="50ms")


@dataclass
class Case:
    """`log`: where bodies leave their lines. `gate`: a named pipe that holds the first who comes to it. `marker`: a
    file that says that the one death of this scenario has been died; `die`: where that is."""

    log: str
    gate: str = ""
    marker: str = ""
    die: str = ""


class CardRefused(Exception):
    pass


def body(case: Case, name: str) -> str:
    if case.die == f"before {name}" and first(case.marker):
        die()
    ran(case.log, name)
    if case.die == f"after {name}" and first(case.marker):
        die()
    return name


@workflow("two-steps", backoff=SOON)
async def two_steps(case: Case, step: Step) -> list[str]:
    return [await step.run("a", body, case, "a"), await step.run("b", body, case, "b")]


@workflow("saga", backoff=SOON)
async def saga(case: Case, step: Step) -> str:
    def ship() -> None:
        ran(case.log, "ship")
        raise CardRefused("no money", 42)

    await step.run("charge", body, case, "charge")
    try:
        await step.run("ship", ship)
    except CardRefused as refused:
        await step.run("refund", body, case, "refund")
        if first(case.marker):
            die()
        return f"refunded: {refused.args}"
    return "shipped"


@workflow("gated", backoff=SOON)
async def gated(case: Case, step: Step) -> list[str]:
    """The first who runs step a is held at the gate, in a thread."""

    def a() -> str:
        ran(case.log, "a")
        held(case.gate)
        return "a"

    return [await step.run("a", a), await step.run("b", body, case, "b")]


@workflow("gated-twice", backoff=SOON)
async def gated_twice(case: Case, step: Step) -> str:
    """The first who runs step a is held at the gate, the second at another."""

    def a() -> str:
        ran(case.log, "a")
        if held(case.gate):
            return "of the first claim"
        held(f"{case.gate}.second")
        return "of the second claim"

    return await step.run("a", a)


@workflow("gated-failure", backoff=SOON)
async def gated_failure(case: Case, step: Step) -> str:
    """The first who runs step a is held at the gate, and then fails; it is to be tried again a little later."""

    def a() -> str:
        ran(case.log, "a")
        if held(case.gate):
            raise CardRefused
        return "a"

    return await step.run("a", a, retries=3, backoff=Backoff(base="1500ms", max="3s"))


@workflow("gated-plain")
def gated_plain(case: Case, step: SyncStep) -> str:
    """A plain handler that blocks its own thread."""
    ran(case.log, "plain")
    held(case.gate)
    return step.run("b", body, case, "b")


@workflow("gated-loop")
async def gated_loop(case: Case, step: Step) -> str:
    """An async handler that does what it must not: it blocks the event loop."""
    ran(case.log, "loop")
    held(case.gate)
    return await step.run("b", body, case, "b")


@workflow("stubborn-cleanup")
async def stubborn_cleanup(case: Case, step: Step) -> None:
    """Takes its time when it is cancelled, until the gate is open."""
    ran(case.log, "began")
    try:
        await asyncio.Event().wait()
    finally:
        ran(case.log, "cleanup")
        await asyncio.to_thread(held, case.gate)


@workflow("kills-its-worker", retries=2, backoff=SOON)
async def kills_its_worker(case: Case, step: Step) -> None:
    def boom() -> None:
        ran(case.log, "boom")
        die()

    await step.run("boom", boom)


@workflow("waits", backoff=SOON)
async def waits(payload: tuple[str, str | None], step: Step) -> Any:
    name, timeout = payload
    return await step.wait_for(name, timeout=timeout)


@workflow("answers")
async def answers(payload: str, step: Step) -> str:
    return payload


@workflow("many-lives", retries=500, backoff=SOON)
async def many_lives(log: str, step: Step) -> list[str]:
    """Three steps whose bodies each leave a line of their own and return it: a body that runs after its step was saved
    would leave a line that the result does not have."""

    def named(name: str) -> str:
        time.sleep(random.uniform(0, 0.03))
        line = f"{step.run_id}/{name}/{os.urandom(6).hex()}"
        ran(log, line)
        time.sleep(random.uniform(0, 0.03))
        return line

    return [await step.run(name, named, name) for name in ("one", "two", "three")]


@workflow("spawns", retries=5, backoff=SOON)
async def spawns(case: Case, step: Step) -> str:
    """Starts a program that outlives its worker and holds its output open."""

    async def start() -> str:
        if first(case.marker):
            program = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
            ran(case.log, f"started:{program.pid}")
            die()
        return "a"

    return await step.run("a", start)


@workflow("in-email", group="email")
async def in_email(step: Step) -> str:
    return "sent"


@workflow("in-media", group="media")
async def in_media(case: Case, step: Step) -> str:
    """The first one is held at the gate, in a thread."""

    def encode() -> str:
        ran(case.log, "media")
        held(case.gate)
        return "encoded"

    return await step.run("encode", encode)


@workflow("sleeps")
async def sleeps(pause: str, step: Step) -> str:
    await step.sleep(pause)
    return "awake"
