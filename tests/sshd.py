"""A real sshd on loopback, run by the user who runs the tests and with a configuration of its own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import until

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Sshd:
    """One that lets the user of the tests in, with a key that only this test has."""

    def __init__(self, folder: Path) -> None:
        assert SSHD is not None
        self.folder = folder
        self.user = pwd.getpwuid(os.getuid()).pw_name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        make_key(folder / "id")
        (folder / "authorized").write_text((folder / "id.pub").read_text())
        self.new_host_key()
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nPermitRootLogin yes\nMaxStartups 100\n"
        )
        (folder / "known").touch()
        (folder / "ssh_config").write_text(
            f"Host web\n  HostName 127.0.0.1\n  Port {self.port}\n  User {self.user}\n  IdentityFile {folder}/id\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n  GlobalKnownHostsFile /dev/null\n"
        )
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd wants to be able to go
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def program(self) -> str:
        """What TAKO_SSH is to be."""
        return f"ssh -F {self.folder}/ssh_config"

    def start(self) -> None:
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(self._listens)

    def stop(self) -> None:
        """With every session of its."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def sessions(self) -> list[int]:
        """The processes that serve connections."""
        assert self.process is not None
        found = [self.process.pid]
        for pid in found:  # grows as it goes: children, and theirs
            asked = subprocess.run(["pgrep", "-P", str(pid), "sshd"], capture_output=True, text=True, check=False)
            found += map(int, asked.stdout.split())
        return found[1:]

    def freeze(self) -> None:
        """From now on nothing is answered, as with a cable pulled out."""
        for pid in self.sessions():
            os.kill(pid, signal.SIGSTOP)

    def new_host_key(self) -> None:
        make_key(self.folder / "host")

    def be_known(self) -> None:
        key = " ".join((self.folder / "host.pub").read_text().split()[:2])
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {key}\n")

    @property
    def fingerprint(self) -> str:
        words = ["ssh-keygen", "-lf", str(self.folder / "host.pub")]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tako-test", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def running() -> Iterator[Sshd]:
    """An sshd whose host key is known; skips, and says so, where there is none."""
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd here: apt install openssh-server")
    with tempfile.TemporaryDirectory(prefix="tako-sshd-", dir="/tmp") as folder:
        one = Sshd(Path(folder))
        try:
            one.be_known()
            yield one
        finally:
            one.stop()
