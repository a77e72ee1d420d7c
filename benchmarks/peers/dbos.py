"""DBOS Transact: a queue, a workflow of steps, its system database in a file (SQLite) or in Postgres."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from dbos import DBOS, DBOSClient, DBOSConfig, run_dbos_database_migrations

from benchmarks.multiply import in_postgres, in_sqlite
from benchmarks.peer import Peer
from benchmarks.place import Place
from benchmarks.told import BEGAN, ENDED, WOKE, tell
from benchmarks.work import FAN_OUT, SEQUENCE, SLEEPER, Payload, async_body, body
from tako_runtime.clock import SystemClock

if TYPE_CHECKING:
    import subprocess

QUEUE, VERSION = "bench", "1"

COPIED = {
    "workflow_status": {"workflow_uuid": "workflow_uuid || '-' || copy"},
    "operation_outputs": {"workflow_uuid": "workflow_uuid || '-' || copy"},
}

#: A workflow in a thread, which took half the time of a coroutine here; only steps at once and many sleeps want those.
step = DBOS.step()(body)
async_step = DBOS.step()(async_body)


@DBOS.workflow(name=SEQUENCE)
def sequence(given: Payload) -> None:
    tell(BEGAN, given["run"])
    for n in range(1, given["steps"] + 1):
        step(given, n)
    tell(ENDED, given["run"])


@DBOS.workflow(name=FAN_OUT)
async def fan_out(given: Payload) -> None:
    tell(BEGAN, given["run"])
    await asyncio.gather(*(async_step(given, n) for n in range(1, given["steps"] + 1)))
    tell(ENDED, given["run"])


@DBOS.workflow(name=SLEEPER)
async def sleeper(given: Payload) -> None:
    tell(BEGAN, given["run"])
    await DBOS.sleep_async(max(0.0, given["wake"] - SystemClock().now() / 1e6))
    tell(WOKE, given["run"])


def url_of(place: Place) -> str:
    return place.url or f"sqlite:///{place.folder}/dbos.sqlite"


class DbosSqlite(Peer):
    title = "DBOS, SQLite"
    module = distribution = "dbos"
    settings: ClassVar = {
        "default": {"polling": 1.0, "wal": False},
        "tuned": {"polling": 0.01, "wal": True},
    }
    said: ClassVar = {
        "default": "its queue polls once a second; rollback journal",
        "tuned": "queue polled every 10 ms; its file switched to WAL, which the engine does not do by itself",
    }
    best = 100
    asleep = 10_000
    drains: ClassVar = {1: 60, 10: 150, 100: 250}

    def prepare(self) -> None:
        run_dbos_database_migrations(system_database_url=url_of(self.place))
        if self.options["wal"]:
            with sqlite3.connect(self.place.folder / "dbos.sqlite") as db:
                db.execute("PRAGMA journal_mode = WAL")

    def connect(self) -> None:
        logging.getLogger("dbos").setLevel(logging.ERROR)
        self.client = DBOSClient(system_database_url=url_of(self.place))

    def enqueue(self, workflow: str, given: Payload) -> None:
        self.client.enqueue({"workflow_name": workflow, "queue_name": QUEUE, "app_version": VERSION}, given)

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        """In transactions of ours, which is what its client offers for many. They are made by the client's own engine,
        which is no public name of it: a second one would open the file beside it."""
        options = {"workflow_name": workflow, "queue_name": QUEUE, "app_version": VERSION}
        for at in range(0, len(given), 1_000):
            with self.client._sys_db.engine.begin() as transaction:
                for one in given[at : at + 1_000]:
                    self.client.enqueue_in_transaction(transaction, options, one)

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.python("-m", "benchmarks.peers", "dbos")

    def multiply(self, times: int) -> None:
        in_sqlite(self.place.folder / "dbos.sqlite", COPIED, times)

    def close(self) -> None:
        self.client.destroy()


class DbosPostgres(DbosSqlite):
    title = "DBOS, Postgres"
    store = "postgres"
    settings: ClassVar = {"default": {"polling": 1.0}, "tuned": {"polling": 0.01}}
    said: ClassVar = {"default": "its queue polls once a second", "tuned": "queue polled every 10 ms"}
    drains: ClassVar = {1: 100, 10: 400, 100: 500}

    def prepare(self) -> None:
        run_dbos_database_migrations(system_database_url=url_of(self.place))

    def multiply(self, times: int) -> None:
        in_postgres(self.place.url, "dbos", COPIED, times)


def work() -> None:
    place = Place.of_this_process()
    config: DBOSConfig = {
        "name": "bench", "system_database_url": url_of(place), "application_version": VERSION, "log_level": "WARNING",
    }  # fmt: skip
    DBOS(config=config)
    DBOS.launch()
    DBOS.register_queue(
        QUEUE, worker_concurrency=place.options["concurrency"], polling_interval_sec=place.options["polling"]
    )
    while True:
        time.sleep(3600)
