"""Huey over SQLite: a task queue without steps, the upper reference. A task that is killed is lost."""

from typing import TYPE_CHECKING, ClassVar

from huey import SqliteHuey

from benchmarks.peer import Peer
from benchmarks.place import Place, installed
from benchmarks.told import BEGAN, ENDED, tell
from benchmarks.work import SEQUENCE, Payload, body

if TYPE_CHECKING:
    import subprocess

NO_STEPS = "it has tasks, no steps"


def sequence(given: Payload) -> None:
    tell(BEGAN, given["run"])
    for n in range(1, given["steps"] + 1):
        body(given, n)
    tell(ENDED, given["run"])


class HueySqlite(Peer):
    title = "Huey, SQLite"
    module = distribution = "huey"
    settings: ClassVar = {
        "default": {"delay": 0.1, "longest": 10.0},
        "tuned": {"delay": 0.001, "longest": 0.01},
    }
    said: ClassVar = {
        "default": "each thread polls after 0.1 s, and after up to 10 s when idle",
        "tuned": "each thread polls every 1 to 10 ms",
    }
    best = 1
    drains: ClassVar = {1: 2_000, 10: 2_000, 100: 1_000}
    missing: ClassVar = {
        "steps": NO_STEPS,
        "fan-out": NO_STEPS,
        "wake": "it has delayed tasks, no sleep within one",
        "kill": "a task leaves the queue before it runs: one that is killed is lost",
        "history": "it keeps no tasks that have ended",
    }

    def connect(self) -> None:
        self.huey, self.task = opened(self.place)

    def enqueue(self, workflow: str, given: Payload) -> None:
        self.task(given)

    def worker(self) -> "subprocess.Popen[bytes]":
        return self.place.spawn(
            installed("huey_consumer"), "benchmarks.peers.huey_app.huey",
            "--workers", str(self.options["concurrency"]), "--worker-type", "thread", "--quiet",
            "--delay", str(self.options["delay"]), "--max-delay", str(self.options["longest"]),
        )  # fmt: skip

    def close(self) -> None:
        self.huey.storage.close()


def opened(place: Place) -> "tuple[SqliteHuey, object]":
    huey = SqliteHuey("bench", filename=str(place.folder / "huey.db"))
    return huey, huey.task(name=SEQUENCE)(sequence)
