"""Where one measurement happens: a folder of its own, a database of its own where one is needed, and its processes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.told import VARIABLE, Told

ROOT = Path(__file__).parent.parent

Options = dict[str, Any]


def installed(program: str) -> str:
    """A command beside this interpreter's own."""
    return str(Path(sys.executable).parent / program)


@dataclass(slots=True)
class Place:
    """`options` are the peer's settings. `url` is that of a new database, or empty for an embedded one."""

    folder: Path
    url: str
    options: Options
    told: Told | None = None
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @classmethod
    def of_this_process(cls) -> "Place":
        """As the process that started this one has it."""
        return cls(**{**json.loads(os.environ["BENCHMARK_PLACE"]), "folder": Path(os.environ["BENCHMARK_FOLDER"])})

    def environment(self) -> dict[str, str]:
        assert self.told is not None
        return {
            **os.environ,
            "BENCHMARK_PLACE": json.dumps({"folder": "", "url": self.url, "options": self.options}),
            "BENCHMARK_FOLDER": str(self.folder),
            VARIABLE: str(self.told.path),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }

    def spawn(self, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
        """A process of this place; what it says goes to a file there."""
        with (self.folder / f"output-{len(self.started)}.log").open("wb") as output:
            process = subprocess.Popen(
                words, cwd=self.folder, env=self.environment() | environment,
                stdin=subprocess.PIPE, stdout=output, stderr=output,
            )  # fmt: skip
        self.started.append(process)
        return process

    def python(self, *words: str, **environment: str) -> "subprocess.Popen[bytes]":
        return self.spawn(sys.executable, *words, **environment)

    def output(self, lines: int = 15) -> str:
        """The last lines of each process."""
        found = []
        for path in sorted(self.folder.glob("output-*.log")):
            text = path.read_text(errors="replace").strip()
            if text:
                found.append("\n".join(text.splitlines()[-lines:]))
        return "\n---\n".join(found)

    def end(self) -> None:
        """All processes are told to leave, and those that do not are killed."""
        for process in self.started:
            process.terminate()
        for process in reversed(self.started):
            stop(process)
        self.started.clear()


def stop(process: "subprocess.Popen[bytes]", seconds: float = 5) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def new_place(url: str, options: Options) -> Iterator[Place]:
    """With an empty folder, which is gone afterwards."""
    place = Place(Path(tempfile.mkdtemp(prefix="tako-benchmark-")), url, options, Told())
    try:
        yield place
    finally:
        place.end()
        assert place.told is not None
        place.told.close()
        shutil.rmtree(place.folder, ignore_errors=True)
