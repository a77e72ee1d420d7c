"""A server that the laptop reaches over SSH: a real sshd on loopback, and a release of the project where a deploy puts
it, without systemd."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sshd as ssh
from cli import FLOWS, environment, make_project, tako
from conftest import finished, script, until
from sshd import Sshd

from tako_runtime.feed import supervising

RELEASE = "r1"


class Web:
    """The project here, and the same one on the server `web-1`."""

    def __init__(self, folder: Path, sshd: Sshd, flows: str) -> None:
        self.app = f"shop-{secrets.token_hex(4)}"
        self.sshd, self.data = sshd, folder / "data"
        config = (
            f'name = "{self.app}"\n[deploy]\ndata_dir = "{self.data}"\n[envs.production]\nservers = ["web-1"]\n'
            '[servers.web-1]\nhost = "web"\n'
        )
        self.project = make_project(folder / "project", flows, config)
        self.base = folder / "server"
        self.release = self.base / "releases" / RELEASE
        make_project(self.release, flows, config)
        (self.release / ".venv").symlink_to(sys.prefix)
        (self.base / "current").symlink_to(f"releases/{RELEASE}")
        self.app_dir.mkdir(parents=True, mode=0o700)
        share = Path("/opt/tako") if os.getuid() == 0 else Path.home() / ".local" / "share" / "tako"
        share.mkdir(parents=True, exist_ok=True)
        self._link = share / self.app
        self._link.symlink_to(self.base)
        (self.release / ".release").mkdir()
        said = subprocess.run(
            [sys.executable, "-m", "tako_runtime", "manifest"], cwd=self.release, env=self.environment,
            capture_output=True, check=True,
        )  # fmt: skip
        (self.release / ".release" / "manifest.json").write_bytes(said.stdout)
        self._serving: subprocess.Popen[bytes] | None = None

    @property
    def app_dir(self) -> Path:
        return self.data / "production" / "apps" / self.app

    @property
    def environment(self) -> dict[str, str]:
        """What the unit of the release has."""
        return environment(TAKO_APP_NAME=self.app, TAKO_DATA_DIR=str(self.data / "production"), TAKO_RELEASE=RELEASE)

    def serve(self) -> "subprocess.Popen[bytes]":
        """Start the release's supervisor; it is up."""
        with (self.base / "log").open("ab") as log:
            self._serving = subprocess.Popen(
                [sys.executable, "-m", "tako_runtime", "serve"], cwd=self.release, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(lambda: supervising(self.app_dir) is not None)
        return self._serving

    def tako(self, *words: str, stdin: str = "", **env: str) -> "subprocess.CompletedProcess[str]":
        return tako(*words, cwd=self.project, stdin=stdin, TAKO_SSH=self.sshd.program, **env)

    def afar(self, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """A command, about the server."""
        return self.tako(*words, "--env", "production", stdin=stdin)

    def document(self, *words: str, code: int = 0, stdin: str = "") -> Any:
        """The one JSON document of a command about the server."""
        ended = self.afar(*words, "--json", stdin=stdin)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return json.loads(ended.stdout)

    def there(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """The same command on the server itself, in the release's folder."""
        return tako(*words, cwd=self.release, **{k: v for k, v in self.environment.items() if k.startswith("TAKO_")})

    def start(self, workflow: str, payload: Any = None) -> str:
        return str(self.document("runs", "start", workflow, "--payload", json.dumps(payload))["run"]["id"])

    def python(self, code: str) -> str:
        """What a piece of Python prints that runs there."""
        process = script(f"import os; os.environ.update({self.environment!r})\n{code}", cwd=self.release)
        return finished(process)

    def close(self) -> None:
        self._link.unlink()
        with suppress(OSError):
            self._link.parent.rmdir()
        if self._serving is not None:
            self._serving.terminate()
            try:
                self._serving.wait(20)
            except subprocess.TimeoutExpired:
                self._serving.kill()
                self._serving.wait()


@contextmanager
def deployed(flows: str = FLOWS) -> Iterator[Web]:
    """A server with a release that nobody has started yet."""
    with ssh.running() as sshd, tempfile.TemporaryDirectory(prefix="tako-web-", dir="/tmp") as folder:
        web = Web(Path(folder), sshd, flows)
        try:
            yield web
        finally:
            web.close()
            shutil.rmtree(web.base, ignore_errors=True)
