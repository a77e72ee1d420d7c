"""The main job, told as it happens: `make demo`.

Scaffolds a shop in a temporary folder, starts `tako dev`, starts an order, kills its worker with SIGKILL in the middle
of a step, watches a new worker go on, approves the order, and prints the run's timeline. Exit 0 if all of it was as it
should be; `tests/test_demo.py` runs it too.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

TAKO = [sys.executable, "-m", "tako_cli"]
PATIENCE = 60.0  # seconds for any one thing to happen

Event = dict[str, Any]


class Unexpected(Exception):
    """The demonstration did not show what it should."""


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def tako(*words: str, cwd: Path, show: bool = True) -> str:
    """Run a tako command as a person would."""
    if show:
        print(f"$ {shlex.join(['tako', *words])}", flush=True)
    done = subprocess.run([*TAKO, *words], cwd=cwd, capture_output=True, text=True, check=False, timeout=PATIENCE)
    if done.returncode != 0:
        raise Unexpected(f"tako {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


class Dev:
    """`tako dev --json`, and the events it has logged."""

    def __init__(self, project: Path) -> None:
        self.events: list[Event] = []
        self._fresh: SimpleQueue[Event] = SimpleQueue()
        self._process = subprocess.Popen([*TAKO, "dev", "--json"], cwd=project, stdout=subprocess.PIPE, text=True)
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._fresh.put(json.loads(line))

    def wait_for(self, what: str, fits: Callable[[Event], bool]) -> Event:
        """The next event that fits, showing the log up to it."""
        while True:
            try:
                event = self._fresh.get(timeout=PATIENCE)
            except Empty:
                raise Unexpected(f"{what} did not happen within {PATIENCE:g} s") from None
            self.events.append(event)
            if event["event"] != "worker.spawned":
                print(f"  | {event.get('message', '')}", flush=True)
            if fits(event):
                return event

    def latest(self, name: str) -> Event:
        return next(event for event in reversed(self.events) if event["event"] == name)

    def bodies(self, line: str) -> int:
        """How often a step's body came to the line that it prints."""
        return sum(event["event"] == "output" and line in event["message"] for event in self.events)

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(PATIENCE)


@contextmanager
def developing(project: Path) -> Iterator[Dev]:
    dev = Dev(project)
    try:
        yield dev
    finally:
        dev.end()


def named(event: str, **facts: object) -> Callable[[Event], bool]:
    return lambda seen: seen["event"] == event and all(seen.get(name) == value for name, value in facts.items())


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tako-demo-") as folder:
        show(Path(folder))


def show(folder: Path) -> None:
    say("1. An empty folder becomes a project")
    tako("init", "shop", "--yes", cwd=folder)
    shop = folder / "shop"
    print("  ", ", ".join(sorted(str(p.relative_to(shop)) for p in shop.rglob("*.py"))))

    say("2. tako dev runs it; an order comes in")
    with developing(shop) as dev:
        dev.wait_for("the start of tako dev", named("dev.ready"))
        started = tako("runs", "start", "fulfill-order", "--payload", "@order.json", "--json", cwd=shop)
        run = json.loads(started)["run"]["id"]
        dev.wait_for("the first step", named("step.done", run=run, step="check-stock"))

        pid = dev.latest("worker.spawned")["pid"]
        say(f"3. In the middle of the step 'charge': kill -9 {pid}, the worker")
        os.kill(pid, signal.SIGKILL)
        lost = dev.wait_for("the loss", named("run.reclaimed", run=run))
        dev.wait_for("the next worker", named("step.cached", run=run, step="check-stock"))
        dev.wait_for("the charge", named("step.done", run=run, step="charge"))
        dev.wait_for("the question", named("run.waiting", run=run))
        if "in step charge" not in lost["message"]:
            raise Unexpected(f"the worker did not die in step charge: {lost['message']}")
        if dev.bodies("stock: there are") != 1:
            raise Unexpected("a finished step ran again")

        say("4. The order is over 500: the run waits for a person, and takes up no worker. We approve it")
        tako("runs", "signal", "approval:42", "--payload", '{"approved": true}', cwd=shop)
        dev.wait_for("the end", named("run.succeeded", run=run))

        say("5. The run's timeline")
        print(tako("runs", "show", run, cwd=shop))
        found = json.loads(tako("runs", "show", run, "--json", cwd=shop, show=False))["run"]
    check(found, dev)
    say("Shown: the worker was killed in the middle of a step. The step that had finished did not run again; the one")
    print(f"that was cut off did (that is what step.key is for). The run went on in attempt {found['attempt']}, waited")
    print("for its approval without a worker, and ended succeeded. Nothing was lost.")


def check(run: dict[str, Any], dev: Dev) -> None:
    """What the words above claim."""
    outcomes = [attempt["outcome"] for attempt in run["attempts"]]
    if run["status"] != "succeeded" or outcomes != ["lost", "succeeded"]:
        raise Unexpected(f"the run is {run['status']}, its attempts {outcomes}")
    if any(step["status"] != "done" for step in run["steps"]):
        raise Unexpected("a step is not done")
    for line in ("stock: there are", "payments: charge", "carrier: order 42"):
        if dev.bodies(line) != 1:
            raise Unexpected(f"{line!r} was printed {dev.bodies(line)} times")


if __name__ == "__main__":
    try:
        main()
    except Unexpected as error:
        sys.exit(f"demo: {error}")
