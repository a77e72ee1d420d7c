"""tako: in a file (SQLite), and in a shared database (Postgres)."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.multiply import in_postgres, in_sqlite
from benchmarks.peer import Peer
from benchmarks.place import ROOT
from benchmarks.work import Payload
from benchmarks.workflows import measured
from tako_runtime import store
from tako_runtime.store import EMBEDDED, Home, open_store
from tako_runtime.workflow import Workflow

APP = "bench"

WORKFLOWS: "dict[str, Workflow]" = {each.name: each for each in (measured.sequence, measured.fan_out, measured.sleeper)}

#: What a copy of a run gets instead: `copy` counts from 1, `many` is above every number that is taken. Ids are in the
#: order of the copies, as those of a real history are in the order of time.
COPIED = {
    "runs": {"seq": "seq + copy * many", "id": "(10000000 + copy) || substr(id, 9)"},
    "steps": {"run": "run + copy * many"},
    "attempts": {"run": "run + copy * many"},
}


class TakoSqlite(Peer):
    title = "tako, SQLite"
    module = "tako_runtime"
    distribution = "tako"
    settings: ClassVar = {"default": {"concurrency": 10}, "tuned": {"concurrency": 100}}
    said: ClassVar = {"default": "as it comes", "tuned": "concurrency 100 where it is free to choose"}
    best = 100
    drains: ClassVar = {1: 600, 10: 6_000, 100: 15_000}

    def prepare(self) -> None:
        self.home = Home(APP, self.place.folder / "data", self.place.url or EMBEDDED, "production")
        self.environment = {"TAKO_APP_NAME": APP, "TAKO_DATA_DIR": str(self.home.data_dir)}
        (self.place.folder / "workflows").mkdir()
        shutil.copy(ROOT / "benchmarks" / "workflows" / "measured.py", self.place.folder / "workflows")
        self._configure(0)

    def _configure(self, workers: int) -> None:
        (self.place.folder / "tako.toml").write_text(
            f'name = "{APP}"\n[workflows]\nworkers = {workers}\nconcurrency = {self.options["concurrency"]}\n'
            f'[storage]\nurl = "{self.home.url}"\n'
        )

    def connect(self) -> None:
        os.environ.update(self.environment)
        self.opened = open_store(self.home)
        store.use(self.opened)

    def enqueue(self, workflow: str, given: Payload) -> None:
        WORKFLOWS[workflow].enqueue_sync(given)

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        for at in range(0, len(given), 1_000):
            WORKFLOWS[workflow].enqueue_many_sync(given[at : at + 1_000])

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.python(
            "-m", "tako_runtime", "worker", "--dir", "workflows", "--concurrency", str(self.options["concurrency"]),
            **self.home.environment(),
        )  # fmt: skip

    def deployed(self, workers: int) -> "subprocess.Popen[bytes]":
        self._configure(workers)
        return self.place.python("-m", "tako_runtime", "serve", **self.environment)

    def multiply(self, times: int) -> None:
        in_sqlite(self.home.app_dir / "runs.db", COPIED, times)

    def close(self) -> None:
        store.use(None)
        self.opened.close()


class TakoPostgres(TakoSqlite):
    title = "tako, Postgres"
    store = "postgres"
    drains: ClassVar = {1: 300, 10: 2_500, 100: 8_000}

    def multiply(self, times: int) -> None:
        in_postgres(self.place.url, self.home.schema, COPIED, times)
