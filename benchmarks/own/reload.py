"""reload: `tako dev` is up; from a file's save to the first line of the first run on the new code, while runs are
started all the time. In a project as scaffolded by `tako init`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Row, Target, new_home, row
from benchmarks.own.engine import Opened
from benchmarks.own.pipe import FOLDER, ROOT
from benchmarks.own.workflows.told_version import tell_version
from tako_cli.scaffold import scaffold
from tako_runtime.store import project_home

#: Between two enqueues, in seconds: so much of what is measured is the measuring's.
OFTEN = 0.002


def measure(quick: bool) -> list[Row]:
    found = []
    with new_home() as scratch:
        _, project = scaffold("shop", "shop", scratch.data_dir, ask=False)
        file = shutil.copy(ROOT / FOLDER / "told_version.py", project / "workflows")
        path = scratch.data_dir / "versions"
        os.mkfifo(path)
        pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        with developing(project) as events:
            opened = Opened(project_home("shop", project))
            for number in range(1, 7 if quick else 25):
                text = Path(file).read_text().replace(f"NUMBER = {number - 1}\n", f"NUMBER = {number}\n")
                saved = time.monotonic_ns()
                Path(file).write_text(text)
                found.append((_first_of(number, pipe, str(path)) - saved) / 1e6)
                next(event for event in events if event["event"] == "worker.started")
                time.sleep(1)  # until the next process stands by, as it does before a person saves again
            opened.close()
        os.close(pipe)
    return [row("save to the first run on new code", "ms", found[1:], Target("<", 150))]


@contextmanager
def developing(project: Path) -> Iterator[Iterator[dict[str, object]]]:
    """The events of a `tako dev` there, once its worker is up."""
    words = [sys.executable, "-m", "tako_cli", "dev", "--no-app", "--json"]
    with subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        events = map(json.loads, process.stdout)
        try:
            next(event for event in events if event["event"] == "worker.started")
            yield events
        finally:
            process.terminate()
            for _ in events:
                pass


def _first_of(number: int, pipe: int, path: str) -> int:
    """When the first line of the first run on that version ran."""
    while True:
        tell_version.enqueue_sync(path)
        time.sleep(OFTEN)
        try:
            said = os.read(pipe, 1 << 16)
        except BlockingIOError:
            continue
        for at in range(0, len(said), 16):
            if int.from_bytes(said[at + 8 : at + 16], "big") == number:
                return int.from_bytes(said[at : at + 8], "big")
