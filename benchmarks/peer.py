"""What every engine brings to be measured: one class in one file of `benchmarks/peers/`, against its public API."""

import subprocess
from collections.abc import Sequence
from typing import ClassVar

from benchmarks.place import Options, Place
from benchmarks.work import Payload


class Peer:
    """One engine at one place. A workload prepares it, enqueues, starts workers, and reads what the handlers told.

    Class attributes say what the table needs to know:

    - `settings`: "default" is the engine as it comes, "tuned" the quickest that its documented settings give here.
    - `best`: the concurrency at which it drains quickest.
    - `drains`: how many runs a drain takes by concurrency, for about two seconds of work.
    - `asleep`: the concurrency with which many runs sleep: an engine whose sleepers keep their places needs as many.
    - `missing`: what the engine has no such thing for: workload to reason.
    """

    title: ClassVar[str]
    module: ClassVar[str]
    distribution: ClassVar[str]
    store: ClassVar[str] = "sqlite"
    settings: ClassVar[dict[str, Options]] = {"default": {}, "tuned": {}}
    said: ClassVar[dict[str, str]] = {}
    best: ClassVar[int] = 100
    asleep: ClassVar[int] = 100
    drains: ClassVar[dict[int, int]] = {1: 200, 10: 1_000, 100: 2_000}
    missing: ClassVar[dict[str, str]] = {}

    def __init__(self, place: Place) -> None:
        self.place = place
        self.options = place.options

    def prepare(self) -> None:
        """The store's tables, and a server where the engine has one."""

    def connect(self) -> None:
        """As an application that enqueues."""

    def enqueue(self, workflow: str, given: Payload) -> None:
        raise NotImplementedError

    def enqueue_many(self, workflow: str, given: Sequence[Payload]) -> None:
        """By the engine's call for many; where it has none, one by one."""
        for one in given:
            self.enqueue(workflow, one)

    def backlog(self, workflow: str, given: Sequence[Payload]) -> None:
        """Runs that are due before there is a worker."""
        self.enqueue_many(workflow, given)

    def worker(self) -> "subprocess.Popen[bytes]":
        """One worker process, which does `options["concurrency"]` runs at once."""
        raise NotImplementedError

    def deployed(self, workers: int) -> "subprocess.Popen[bytes] | None":
        """What starts workers again when they die, and starts them when work is due, if the engine brings that."""
        return None

    def servers(self) -> list[int]:
        """Process ids of the engine's own servers, for their CPU, memory and flushes."""
        return []

    def multiply(self, times: int) -> None:
        """Each ended run of the store so many times over, as the engine has written it."""
        raise NotImplementedError

    def close(self) -> None:
        """The application's connection."""
