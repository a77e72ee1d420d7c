"""The real command, as a person or a program runs it: as a process of its own, in a project of its own."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import pytest

TAKO = [sys.executable, "-m", "tako_cli"]
PATIENCE = 60.0

Event = dict[str, Any]

FLOWS = """
    import asyncio
    import subprocess
    from pathlib import Path

    from tako_runtime import Backoff, Step, workflow

    def note(line):
        with Path("bodies.txt").open("a") as file:
            file.write(line + "\\n")
        return line

    @workflow("greet")
    async def greet(payload: str, step: Step) -> str:
        name = await step.run("prepare", note, payload)
        return await step.run("greet", lambda: f"hello {name}")

    @workflow("fail", retries=1, backoff=Backoff(base="10ms", max="10ms"))
    async def fail(payload: dict, step: Step) -> None:
        await step.run("prepare", note, "prepare")
        await step.run("break", breaks, payload)

    def breaks(payload):
        if not Path("mended").exists():
            raise ValueError("no such card")

    @workflow("ask")
    async def ask(payload: dict, step: Step):
        return await step.wait_for("approval", timeout="7d")

    @workflow("nap")
    async def nap(payload: dict, step: Step) -> None:
        await step.sleep("2h")

    @workflow("hold", retries=1, backoff=Backoff(base="10ms", max="10ms"))
    async def hold(payload: dict, step: Step) -> None:
        await step.run("before", note, "before")
        await step.run("held", held)

    async def held():
        note("held")
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}")
        while not Path("go").exists():
            await asyncio.sleep(0.02)
        child.kill()
        child.wait()

    @workflow("yearly", schedule="0 0 1 1 *", timezone="Europe/Lisbon", group="reports")
    def yearly(payload: None, step) -> None: ...
"""


def environment(**given: str) -> dict[str, str]:
    """The machine's environment without what would change what a command says."""
    ours = ("TAKO_", "_TAKO", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | given


def tako(*words: str, cwd: Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A command with nobody at a terminal."""
    return subprocess.run(
        [*TAKO, *words], cwd=cwd, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE,
        env=environment(**env),
    )  # fmt: skip


def done(*words: str, cwd: Path, stdin: str = "", **env: str) -> str:
    """What a command printed that must succeed."""
    ended = tako(*words, cwd=cwd, stdin=stdin, **env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def document(*words: str, cwd: Path, code: int = 0, stdin: str = "") -> Any:
    """The one JSON document that a command prints with --json, and nothing beside it."""
    ended = tako(*words, "--json", cwd=cwd, stdin=stdin)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert ended.stderr == ""
    return json.loads(ended.stdout)


def start(project: Path, name: str, payload: Any = None, *words: str) -> str:
    """Start a run; its id."""
    answer = document("runs", "start", name, "--payload", json.dumps(payload), *words, cwd=project)
    return str(answer["run"]["id"])


def run_of(project: Path, run: str) -> dict[str, Any]:
    return dict(document("runs", "show", run, cwd=project)["run"])


def make_project(folder: Path, flows: str = FLOWS, config: str = 'name = "shop"\n') -> Path:
    (folder / "workflows").mkdir(parents=True)
    (folder / "tako.toml").write_text(config)
    (folder / "workflows" / "flows.py").write_text(textwrap.dedent(flows))
    return folder


class Dev:
    """`tako dev --json` in a project, and the events of its log."""

    def __init__(self, project: Path, *words: str) -> None:
        self.events: list[Event] = []
        self._fresh: SimpleQueue[Event | None] = SimpleQueue()
        self.process = subprocess.Popen(
            [*TAKO, "dev", "--json", *words], cwd=project, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._fresh.put(json.loads(line))
        self._fresh.put(None)

    def wait_for(self, name: str, fits: Callable[[Event], bool] = lambda _: True) -> Event:
        """The next event of that name that fits."""
        patient_until = time.monotonic() + PATIENCE  # others may come without end
        while True:
            try:
                event = self._fresh.get(timeout=max(0.0, patient_until - time.monotonic()))
            except Empty:
                event = None
            if event is None:
                pytest.fail(f"no event {name} in {self.events}")
            self.events.append(event)
            if event["event"] == name and fits(event):
                return event

    def had(self, name: str, fits: Callable[[Event], bool]) -> Event:
        """The same, or one that was passed over: processes do not take turns at the log."""
        passed = (event for event in self.events if event["event"] == name and fits(event))
        return next(passed, None) or self.wait_for(name, fits)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    @property
    def workers(self) -> list[int]:
        """The process ids of all the workers it has started so far."""
        return [event["pid"] for event in self.events if event["event"] == "worker.spawned"]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._reader.join(PATIENCE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def developing(project: Path, *words: str) -> Iterator[Dev]:
    dev = Dev(project, *words)
    try:
        yield dev
    finally:
        dev.close()


def is_alive(pid: int) -> bool:
    """Whether a process is there, and not merely unburied."""
    asked = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return asked.stdout.strip()[:1] not in ("", "Z")


def at_terminal(*words: str, cwd: Path, columns: int = 80, answer: str = "", **env: str) -> tuple[int, str]:
    """A command with a person at a terminal, who types `answer`: its exit code, and all that the terminal shows."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*TAKO, *words], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
            env=environment(COLUMNS=str(columns), TERM="xterm-256color", **env),
        )  # fmt: skip
    finally:
        os.close(theirs)
    os.write(ours, answer.encode())
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the last process at this terminal has gone
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(PATIENCE), shown.decode().replace("\r\n", "\n")


def plain(shown: str) -> str:
    """What a terminal shows, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", shown)
