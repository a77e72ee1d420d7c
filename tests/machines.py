"""Servers to deploy to: Debian or Ubuntu in a container, with systemd as PID 1, its own sshd, network and disk.

A base image is made once with debootstrap and kept in the user's cache; a machine is an overlay on it, whose upper half
is a tmpfs of a set size, so that its disk may fill up and nothing is left behind. A machine can lose its power, its
cable, and be started again. Needs root, systemd-nspawn, debootstrap and ip; skips, and says so, where they are not.

Users on a machine: root, and `deploy`, who may linger and has no other right. One key opens both.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import until
from sshd import make_key

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tako-tests"
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "openssh-server", "python3", "procps",
)  # fmt: skip
UBUNTU = "http://archive.ubuntu.com/ubuntu"


class Suite(NamedTuple):
    """Where a suite comes from, if not from Debian; `script` is debootstrap's, where that has none of this name, and
    `later` is what only the suite's updates have."""

    mirror: str = ""
    script: str = ""
    later: tuple[str, ...] = ()


#: 22.04 has the oldest systemd that will do (249), and its Python is too old: the newer one that it offers is taken.
SUITES = {"jammy": Suite(UBUNTU, later=("python3.11",)), "noble": Suite(UBUNTU, "gutsy")}
#: What a server's timers do is none of our business.
UNWANTED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer", "dpkg-db-backup.timer")
NEEDED = ("systemd-nspawn", "debootstrap", "ip", "ssh", "ssh-keygen")
DISK = "1500m"

#: Starts the container in cgroups of its own, in each hierarchy that systemd looks at, and again after a `reboot`.
KEEPER = """
name=$1; shift
while :; do
    for root in $(awk '$3 == "cgroup2" || ($3 == "cgroup" && $4 ~ /name=systemd/) { print $2 }' /proc/mounts); do
        find "$root/$name" -depth -type d -exec rmdir {} + 2>/dev/null
        mkdir -p "$root/$name"
    done
    (
        for root in $(awk '$3 == "cgroup2" || ($3 == "cgroup" && $4 ~ /name=systemd/) { print $2 }' /proc/mounts); do
            sh -c 'echo $PPID > "$1/cgroup.procs"' - "$root/$name"
        done
        exec systemd-nspawn "$@"
    )
    [ $? = 133 ] || break
done
"""


class Machine:
    """One server. `program` is what TAKO_SSH is to be; `root@NAME` and `deploy@NAME` are its hosts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        number = _own_number()
        self._unique = self._link = f"tako-t{number}"
        self.address, self._gateway = f"10.231.{number}.2", f"10.231.{number}.1"
        self.root = folder / name
        self.console = folder / f"{name}.log"
        self._keeper: subprocess.Popen[bytes] | None = None
        self._disk = folder / f"{name}.disk"

    def make(self, base: Path) -> None:
        """Its disk, who may log in, and its first boot."""
        name, folder, disk = self.name, self.folder, self._disk
        self.root.mkdir()
        disk.mkdir()
        _do("mount", "-t", "tmpfs", "-o", f"size={DISK}", self._unique, str(disk))
        (disk / "upper").mkdir()
        (disk / "work").mkdir()
        layers = f"lowerdir={base},upperdir={disk}/upper,workdir={disk}/work"
        _do("mount", "-t", "overlay", self._unique, "-o", layers, str(self.root))
        (self.root / "etc/hostname").write_text(f"{name}\n")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost {name}\n")
        (self.root / "etc/resolv.conf").unlink(missing_ok=True)
        (self.root / "etc/resolv.conf").touch()
        make_key(self.root / "etc/ssh/ssh_host_ed25519_key")
        for home, owner in (("root", 0), ("home/deploy", 1000)):
            authorized = self.root / home / ".ssh" / "authorized_keys"
            authorized.parent.mkdir(mode=0o700, exist_ok=True)
            authorized.write_text((folder / "key.pub").read_text())
            for path in (authorized.parent, authorized):
                os.chown(path, owner, owner)
        host_key = " ".join((self.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])
        with (folder / "known").open("a") as known:
            known.write(f"{self.address} {host_key}\n")
        with (folder / "ssh_config").open("a") as config:
            config.write(
                f"Host {name}\n  HostName {self.address}\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
                f"  UserKnownHostsFile {folder}/known\n  GlobalKnownHostsFile /dev/null\n"
            )
        self._connect()
        self.boot()

    @property
    def program(self) -> str:
        return f"ssh -F {self.folder}/ssh_config"

    @property
    def gateway(self) -> str:
        """The address of this side, as the machine sees it."""
        return self._gateway

    # --- what may happen to a server ---

    def boot(self) -> None:
        """Start it, and wait until its systemd says that all is up."""
        words = [
            "sh", "-c", KEEPER, "keeper", self._unique, "--quiet", "--register=no", "--keep-unit", "--boot",
            f"--directory={self.root}", f"--machine={self._unique}", f"--hostname={self.name}", "--console=pipe",
            "--kill-signal=SIGRTMIN+3", "--link-journal=no", "--timezone=off", "--resolv-conf=off",
            f"--network-namespace-path=/run/netns/{self._unique}", "--capability=CAP_NET_ADMIN",
        ]  # fmt: skip
        with self.console.open("ab") as log:
            self._keeper = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        self.wait_until_up()

    def wait_until_up(self) -> None:
        until(self._is_up, 60)

    def power_cut(self) -> None:
        """Every process of it is gone at once; its disk stays."""
        assert self._keeper is not None
        self._keeper.kill()
        for root in _cgroup_roots():
            for procs in (root / self._unique).rglob("cgroup.procs"):
                for pid in _pids(procs):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self._keeper.wait()
        until(
            lambda: not any(_pids(p) for root in _cgroup_roots() for p in (root / self._unique).rglob("cgroup.procs"))
        )

    def reboot(self) -> None:
        """In order: its systemd stops all that runs, and it comes up again."""
        self.run("touch", "/run/before")
        self.attempt("systemctl", "reboot")
        until(lambda: self.attempt("test", "!", "-e", "/run/before").returncode == 0, 120)
        self.wait_until_up()

    def cut(self) -> None:
        """Pull the cable."""
        _do("ip", "link", "set", self._link, "down")

    def mend(self) -> None:
        _do("ip", "link", "set", self._link, "up")

    def fill_disk(self, leave: int = 0) -> None:
        """Nothing more can be written, but for so many bytes."""
        with (self._disk / "filling").open("wb") as file:
            seen = os.statvfs(self._disk)
            os.posix_fallocate(file.fileno(), 0, max(seen.f_bavail * seen.f_frsize - leave, 1))

    def empty_disk(self) -> None:
        (self._disk / "filling").unlink(missing_ok=True)

    def remove(self) -> None:
        """All of it."""
        if self._keeper is not None:
            self.power_cut()
        _do("umount", "-l", str(self.root), check=False)
        _do("umount", "-l", str(self._disk), check=False)
        _do("ip", "netns", "del", self._unique, check=False)
        _do("ip", "link", "del", self._link, check=False)
        for root in _cgroup_roots():
            for path in sorted((root / self._unique).rglob("*"), reverse=True):
                if path.is_dir():
                    path.rmdir()
            with contextlib.suppress(FileNotFoundError):
                (root / self._unique).rmdir()
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{self._unique}", ignore_errors=True)

    # --- a look at it, by another way than the one under test ---

    def run(self, *words: str, user: str = "root", check: bool = True) -> str:
        """What a command prints there."""
        done = self.attempt(*words, user=user)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def attempt(self, *words: str, user: str = "root") -> "subprocess.CompletedProcess[str]":
        import shlex

        told = ["-o", "ControlPath=none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=3", "-o", "LogLevel=ERROR"]
        return subprocess.run(
            [*self.program.split(), *told, f"{user}@{self.name}", "--", shlex.join(words)], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    # --- how ---

    def _connect(self) -> None:
        _do("ip", "netns", "add", self._unique)
        _do("ip", "link", "set", f"{self._link}p", "netns", self._unique, "name", "eth0")
        _do("ip", "addr", "add", f"{self._gateway}/24", "dev", self._link)
        _do("ip", "link", "set", self._link, "up")
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"],
                      ["link", "set", "eth0", "up"]):  # fmt: skip
            _do("ip", "-n", self._unique, *words)

    def _is_up(self) -> bool:
        assert self._keeper is not None
        if self._keeper.poll() is not None:
            pytest.fail(f"{self.name} did not come up:\n{self.console.read_text(errors='replace')[-2000:]}")
        return self.attempt("systemctl", "is-system-running", "--wait").stdout.strip() in ("running", "degraded")


@contextlib.contextmanager
def machines(*names: str, suite: str = "bookworm") -> Iterator[list[Machine]]:
    """Servers of these names, removed at the end."""
    if why := _impossible():
        pytest.skip(f"no servers here: {why}")
    base = image(suite)
    with tempfile.TemporaryDirectory(prefix="tako-machines-", dir="/tmp") as place:
        folder = Path(place)
        make_key(folder / "key")
        running: list[Machine] = []
        try:
            for name in names:
                running.append(Machine(name, folder))  # before it is made: what fails half-way goes too
                running[-1].make(base)
            yield running
        finally:
            for one in running:
                one.remove()


@cache
def _impossible() -> str:
    """Why this machine cannot run servers; "" where it can."""
    if os.getuid() != 0:
        return "only root can run them"
    if lacking := [tool for tool in NEEDED if shutil.which(tool) is None]:
        return f"no {', '.join(lacking)}: apt install systemd-container debootstrap iproute2 openssh-client"
    probe = f"tako-probe-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="tako-probe-", dir="/tmp") as folder:
        for words in (["mount", "-t", "tmpfs", "tako-probe", folder], ["umount", folder],
                      ["ip", "netns", "add", probe], ["ip", "netns", "del", probe]):  # fmt: skip
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                return f"{' '.join(words[:3])}: {done.stderr.strip()}"
    if not all(os.access(root, os.W_OK) for root in _cgroup_roots()):
        return "cgroups cannot be written"
    return ""


def image(suite: str) -> Path:
    """The base of that suite, made at first use."""
    known = SUITES.get(suite, Suite())
    wanted = hashlib.sha256(repr((PACKAGES, UNWANTED, *known.later)).encode()).hexdigest()[:8]
    base = CACHE / f"{suite}-{wanted}"
    if base.exists():
        return base
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{suite}-", dir=CACHE))
    words = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(new)]
    steps = [[*words, *(word for word in (known.mirror, known.script) if word)]]
    if known.later:
        apt = ["chroot", str(new), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
        steps += [[*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *known.later]]
    for words in steps:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(new)
            said = f"{done.stdout[-300:]}{done.stderr[-300:]}"
            pytest.skip(f"no servers here: {words[0]} for {suite} says: {said}")
        if words[0] == "debootstrap" and known.later:
            sources = [f"deb {known.mirror} {pocket} main universe\n" for pocket in (suite, f"{suite}-updates")]
            (new / "etc/apt/sources.list").write_text("".join(sources))
            shutil.copy("/etc/resolv.conf", new / "etc/resolv.conf")
    for timer in UNWANTED:
        (new / "etc/systemd/system" / timer).symlink_to("/dev/null")
    for key in (new / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    _do("chroot", str(new), "useradd", "--create-home", "--uid", "1000", "--shell", "/bin/bash", "deploy")
    linger = new / "var/lib/systemd/linger"
    linger.mkdir(parents=True, exist_ok=True)
    (linger / "deploy").touch()
    (new / "etc/machine-id").write_text("")
    (new / "etc/ssh/sshd_config.d/tests.conf").write_text("UseDNS no\nMaxStartups 100\n")
    new.chmod(0o755)
    with contextlib.suppress(OSError):  # somebody else was faster
        new.rename(base)
    return base


def _own_number() -> int:
    """Of a network that nobody else has, nor gets: its link is made at once."""
    for number in range(1, 250):
        words = ["ip", "link", "add", f"tako-t{number}", "type", "veth", "peer", "name", f"tako-t{number}p"]
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return number
    pytest.fail("there are 250 servers already")


def _cgroup_roots() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(m[1]) for m in mounts if m[2] == "cgroup2" or (m[2] == "cgroup" and "name=systemd" in m[3])]


def _pids(procs: Path) -> list[int]:
    try:
        return [int(pid) for pid in procs.read_text().split()]
    except OSError:  # the cgroup is gone
        return []


def _do(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"


def _main(arguments: Sequence[str]) -> None:
    """By hand: a server to look at, until Enter is pressed."""
    with machines("web", suite=arguments[0] if arguments else "bookworm") as [web]:
        sys.stdout.write(f"{web.program} root@web\n")
        sys.stdin.readline()


if __name__ == "__main__":
    _main(sys.argv[1:])
