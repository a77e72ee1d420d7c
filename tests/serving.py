"""`python -m tako_runtime serve` as a process of its own, in a project of its own, and what its log says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import BOTH, until
from workers import gone

import tako_runtime
from tako_runtime.store import Home, version

Event = dict[str, Any]


def project(root: Path, flows: str, config: str = "") -> Path:
    """A folder with a tako.toml and one file of workflows."""
    (root / "workflows").mkdir(parents=True)
    (root / "tako.toml").write_text(f'name = "shop"\n{textwrap.dedent(config)}')
    (root / "workflows" / "flows.py").write_text(textwrap.dedent(flows))
    return root


def keep_secrets(home: Home, values: Mapping[str, str]) -> Path:
    """Put secrets where the server finds them."""
    home.app_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home.app_dir / "secrets.json"
    path.touch(0o600)
    path.write_text(json.dumps({"secrets": values}))
    return path


def newer_tako(folder: Path, script: str = "ALTER TABLE runs ADD COLUMN shade TEXT;\n") -> Path:
    """Where to import a tako from that has one more migration."""
    copied = folder / "tako_runtime"
    shutil.copytree(Path(tako_runtime.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for dialect in BOTH:
        number = version.newest(dialect) + 1
        (copied / "store" / "migrations" / dialect / f"{number:04}_shade.sql").write_text(script)
    return folder


class Serving:
    def __init__(self, home: Home, root: Path, env: Mapping[str, str], words: tuple[str, ...]) -> None:
        self.log = home.data_dir / f"serve{env.get('TAKO_RELEASE', '')}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tako_runtime", "serve", "--log-level", "debug", *words], cwd=root,
                env={**os.environ, **home.environment(), **env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def events(self) -> list[Event]:
        """All that it has said so far; a line that is no JSON fails."""
        return [json.loads(line) for line in self.log.read_bytes().split(b"\n")[:-1]]

    def saw(self, name: str, fits: Callable[[Event], object] = lambda _: True) -> list[Event]:
        return [event for event in self.events if event["event"] == name and fits(event)]

    def wait_for(self, name: str, fits: Callable[[Event], object] = lambda _: True) -> Event:
        """The first event of that name that fits, once it is there."""
        return until(lambda: self.saw(name, fits))[0]

    def printed(self, text: str) -> Event:
        """What user code has said, once it has."""
        return self.wait_for("output", lambda event: text in event["message"])

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def serving(home: Home, root: Path, *words: str, env: Mapping[str, str] | None = None) -> Iterator[Serving]:
    """A server, stopped in order at the end."""
    server = Serving(home, root, env or {}, words)
    try:
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.log.read_text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        for event in server.saw("worker.spawned"):  # whatever has failed, nothing outlives its test
            if not gone(event["pid"]):
                os.killpg(event["pid"], signal.SIGKILL)
