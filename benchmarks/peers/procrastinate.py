"""Procrastinate: a task queue in Postgres without steps, the upper reference. Its worker listens, and polls beside."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

from benchmarks.multiply import in_postgres
from benchmarks.peer import Peer
from benchmarks.place import Place
from benchmarks.told import BEGAN, ENDED, tell
from benchmarks.work import SEQUENCE, Payload, async_body

if TYPE_CHECKING:
    import subprocess

NO_STEPS = "it has tasks, no steps"

COPIED = {
    "procrastinate_jobs": {"id": "id + copy * many", "worker_id": "NULL"},
    "procrastinate_events": {"id": "id + copy * many", "job_id": "job_id + copy * many"},
}


async def sequence(given: Payload) -> None:
    tell(BEGAN, given["run"])
    for n in range(1, given["steps"] + 1):
        await async_body(given, n)
    tell(ENDED, given["run"])


class ProcrastinatePostgres(Peer):
    title = "Procrastinate, Postgres"
    module, distribution, store = "procrastinate", "procrastinate", "postgres"
    settings: ClassVar = {"default": {"pool": 10}, "tuned": {"pool": 20}}
    said: ClassVar = {"default": "as it comes", "tuned": "a pool of 20 connections"}
    best = 100
    drains: ClassVar = {1: 500, 10: 1_000, 100: 1_000}
    missing: ClassVar = {
        "steps": NO_STEPS,
        "fan-out": NO_STEPS,
        "wake": "it has delayed tasks, no sleep within one",
        "kill": 'a task that is killed stays in "doing": the team writes a periodic task of its own that retries those',
    }

    def prepare(self) -> None:
        with App(connector=SyncPsycopgConnector(conninfo=self.place.url)).open() as app:
            app.schema_manager.apply_schema()

    def connect(self) -> None:
        self.app = App(connector=SyncPsycopgConnector(conninfo=self.place.url))
        self.app.open()
        self.task = self.app.task(name=SEQUENCE)(sequence)

    def enqueue(self, workflow: str, given: Payload) -> None:
        self.task.defer(given=given)

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        for at in range(0, len(given), 1_000):
            self.task.batch_defer(*({"given": one} for one in given[at : at + 1_000]))

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.python("-m", "benchmarks.peers", "procrastinate")

    def multiply(self, times: int) -> None:
        in_postgres(self.place.url, "public", COPIED, times)

    def close(self) -> None:
        self.app.close()


def work() -> None:
    logging.disable(logging.INFO)
    place = Place.of_this_process()
    pool = place.options["pool"]
    app = App(connector=PsycopgConnector(conninfo=place.url, min_size=1, max_size=pool))
    app.task(name=SEQUENCE)(sequence)
    app.run_worker(concurrency=place.options["concurrency"])
