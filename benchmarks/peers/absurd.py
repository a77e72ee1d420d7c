"""Absurd: tasks of steps, all in Postgres functions; its worker polls."""

import asyncio
import os
import subprocess
from typing import ClassVar

import psycopg
from absurd_sdk import Absurd, AsyncAbsurd, AsyncTaskContext

from benchmarks.multiply import in_postgres
from benchmarks.peer import Peer
from benchmarks.place import Place, installed
from benchmarks.told import BEGAN, ENDED, WOKE, tell
from benchmarks.work import FAN_OUT, SEQUENCE, SLEEPER, Payload, async_body

QUEUE = "bench"


def _other(column: str) -> str:
    return f"md5({column}::text || copy)::uuid"


COPIED = {
    f"t_{QUEUE}": {"task_id": _other("task_id"), "last_attempt_run": _other("last_attempt_run")},
    f"r_{QUEUE}": {"run_id": _other("run_id"), "task_id": _other("task_id")},
    f"c_{QUEUE}": {"task_id": _other("task_id"), "owner_run_id": _other("owner_run_id")},
}


async def sequence(given: Payload, ctx: AsyncTaskContext) -> None:
    tell(BEGAN, given["run"])
    for n in range(1, given["steps"] + 1):
        await ctx.step(f"step-{n}", lambda n=n: async_body(given, n))
    tell(ENDED, given["run"])


async def fan_out(given: Payload, ctx: AsyncTaskContext) -> None:
    tell(BEGAN, given["run"])
    await asyncio.gather(
        *(ctx.step(f"step-{n}", lambda n=n: async_body(given, n)) for n in range(1, given["steps"] + 1))
    )
    tell(ENDED, given["run"])


async def sleeper(given: Payload, ctx: AsyncTaskContext) -> None:
    tell(BEGAN, given["run"])
    await ctx.sleep_until("sleep", given["wake"])
    tell(WOKE, given["run"])


class AbsurdPostgres(Peer):
    title = "Absurd, Postgres"
    module, distribution, store = "absurd_sdk", "absurd-sdk", "postgres"
    settings: ClassVar = {
        "default": {"poll": 0.25, "claim": 120},
        "tuned": {"poll": 0.01, "claim": 2},
    }
    said: ClassVar = {
        "default": "its worker polls every 0.25 s, and a claim lasts 120 s",
        "tuned": "polled every 10 ms; a claim lasts 2 s",
    }
    best = 100
    drains: ClassVar = {1: 200, 10: 500, 100: 600}

    def prepare(self) -> None:
        command = [installed("absurdctl"), "init"]
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "ABSURD_DATABASE_URL": self.place.url}
        )
        with psycopg.connect(self.place.url, autocommit=True) as db:
            Absurd(db, queue_name=QUEUE).create_queue(QUEUE)

    def connect(self) -> None:
        self.db = psycopg.connect(self.place.url, autocommit=True)
        self.app = Absurd(self.db, queue_name=QUEUE)

    def enqueue(self, workflow: str, given: Payload) -> None:
        self.app.spawn(workflow, given, queue=QUEUE)

    def enqueue_many(self, workflow: str, given: "list[Payload]") -> None:
        """It has no call for many: so many calls in a transaction of ours."""
        for at in range(0, len(given), 1_000):
            with self.db.transaction():
                for one in given[at : at + 1_000]:
                    self.enqueue(workflow, one)

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.python("-m", "benchmarks.peers", "absurd")

    def multiply(self, times: int) -> None:
        in_postgres(self.place.url, "absurd", COPIED, times)

    def close(self) -> None:
        self.db.close()


async def _work() -> None:
    place = Place.of_this_process()
    app = AsyncAbsurd(place.url, queue_name=QUEUE)
    for name, handler in ((SEQUENCE, sequence), (FAN_OUT, fan_out), (SLEEPER, sleeper)):
        app.register_task(name)(handler)
    await app.start_worker(
        concurrency=place.options["concurrency"],
        poll_interval=place.options["poll"],
        claim_timeout=place.options["claim"],
    )


def work() -> None:
    asyncio.run(_work())
