"""Users with keys of their own, and a project with secrets for them."""

import subprocess
from pathlib import Path

import pytest

KEY = "sk_live_51Hx+/=vT9"
PASSPHRASE = "correct horse"  # noqa: S105

CONFIG = 'name = "shop"\n[envs.production]\nservers = ["web-1"]\n[servers.web-1]\nhost = "web-1"\n'

FLOWS = """
    from tako_runtime import secrets, workflow

    @workflow("reads")
    async def reads(payload: None, step) -> int:
        return len(secrets["STRIPE_KEY"])
"""


def someone(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """Be a user with an empty home of this name from now on."""
    home = folder / name
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return home


def ssh_key(home: Path, name: str = "id_ed25519", passphrase: str = "", comment: str = "ada@laptop") -> str:
    """Make an SSH key in a home; its public half."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    words = [
        "ssh-keygen",
        "-q",
        "-t",
        name.removeprefix("id_"),
        "-N",
        passphrase,
        "-C",
        comment,
        "-f",
        str(folder / name),
    ]
    subprocess.run(words, check=True, timeout=60)
    return (folder / f"{name}.pub").read_text().strip()
