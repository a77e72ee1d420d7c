"""An index of wheels on this disk, and projects that need some of them: what packing is tested with."""

import hashlib
import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from cli import make_project

from tako_cli.deploy import lock, release, unpack, wheels
from tako_cli.deploy.lock import Target
from tako_cli.deploy.release import Release
from tako_runtime import config
from tako_runtime.config import Config

FLOWS = """
    from tako_runtime import workflow

    @workflow("greet")
    async def greet(payload: str, step) -> str:
        return payload
"""

#: What the runtime needs, as the index has it, and for which platform.
OF_THE_RUNTIME = {"apsw": "3.99.0", "msgspec": "0.99.0", "croniter": "6.5.0", "tzdata": "2026.1"}

SERVER = Target("3.11", "x86_64", "2.36")
NEWER = Target("3.13", "aarch64", "2.41")


def make_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", needs: Iterable[str] = ()) -> Path:
    """A wheel with one module that has its version."""
    module = name.replace("-", "_")
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {one}" for one in needs),
    ]
    data = wheels._zipped({f"{module}.py": f"VERSION = {version!r}\n".encode()}, f"{module}-{version}.dist-info", lines)
    path = folder / f"{module}-{version}-{tag}.whl"
    path.write_bytes(data)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip and uv find anything."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, version in OF_THE_RUNTIME.items():
        if name == "apsw":
            for server in (SERVER, NEWER):
                python = f"cp{server.python.replace('.', '')}"
                make_wheel(folder, name, version, f"{python}-{python}-manylinux_2_28_{server.machine}")
        else:
            make_wheel(folder, name, version)
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return folder


@pytest.fixture(params=["uv", "pip"])
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two that may find the versions, alone."""
    if request.param == "pip":
        monkeypatch.setattr(lock, "find_uv", lambda: None)
    elif lock.find_uv() is None:
        pytest.skip("there is no uv here")
    return str(request.param)


def git(folder: Path, *words: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "ada", f"GIT_{who}_EMAIL": "ada@example.com", f"GIT_{who}_DATE": "1750000000 +0000"}
    options = ["-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *options, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(folder: Path) -> str:
    """Commit all there is; the commit."""
    if not (folder / ".git").exists():
        git(folder, "init", "-q", ".")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "all")
    return git(folder, "rev-parse", "HEAD").strip()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A project without git."""
    return make_project(tmp_path / "shop", FLOWS)


def load(root: Path) -> Config:
    return config.load(root / "tako.toml")


def pack(root: Path, *targets: Target, anew: bool = False) -> Release:
    return release.pack(load(root), "production", targets or [SERVER], anew=anew)


def names(made: Release) -> set[str]:
    """The project's files in an archive."""
    with tarfile.open(made.file, encoding="utf-8", errors="surrogateescape") as tar:
        return {name for name in tar.getnames() if not name.startswith(".release/") and name != "RELEASE.json"}


def read(made: Release, path: str) -> str:
    with tarfile.open(made.file) as tar:
        file = tar.extractfile(path)
        assert file is not None
        return file.read().decode()


def unpacked(made: Release, releases: Path) -> Path:
    """As a server does it."""
    assert hashlib.sha256(made.file.read_bytes()).hexdigest() == made.digest
    with made.file.open("rb") as file:
        return Path(unpack.unpack(str(releases), made.id, made.digest, file, {"by": "ada"}))
