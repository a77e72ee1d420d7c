"""Who holds it: the processes that listen on a port, or have a file open. One that may not be looked into, or is gone
meanwhile, is left out."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: A command line is told so far.
_LONGEST = 60

_LISTENING = "0A"
_PROC = Path("/proc")


class Holder(NamedTuple):
    pid: int
    command: str


def of_port(port: int) -> list[Holder]:
    """Those that listen on a TCP port, whatever the address; none is named where they are another user's."""
    if not _PROC.joinpath("net/tcp").exists():
        return _by_lsof("-nP", f"-iTCP:{port}", "-sTCP:LISTEN")
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    return _with_open(sockets.__contains__) if sockets else []


def of_file(path: Path) -> list[Holder]:
    """Those that have a file open, but for this one."""
    if not _PROC.joinpath("self/fd").exists():
        return _by_lsof(str(path))
    return _with_open(str(path.resolve()).__eq__)


def ancestors(pid: int) -> Iterator[int]:
    """A process, its parent, and so on."""
    while pid > 1:
        yield pid
        said = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
        pid = int(said) if said.strip().isdigit() else 0


def _listening(port: int) -> Iterator[str]:
    """The inodes of the sockets, from the kernel's tables."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in _PROC.joinpath("net", table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                    yield rest[5]


def _with_open(wanted: Callable[[str], bool]) -> list[Holder]:
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if any(wanted(target) for target in _targets(entry / "fd")):
                    words = entry.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
                    found.append(Holder(int(entry.name), _short(" ".join(words))))
    return sorted(found)


def _targets(folder: Path) -> Iterator[str]:
    for descriptor in folder.iterdir():
        with suppress(OSError):
            yield str(descriptor.readlink())


def _by_lsof(*words: str) -> list[Holder]:
    try:
        said = subprocess.run(["lsof", "-Fp", *words], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    pids = {int(line[1:]) for line in said.splitlines() if line[:1] == "p"} - {os.getpid()}
    return [Holder(pid, _command(pid)) for pid in sorted(pids)]


def _command(pid: int) -> str:
    said = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return _short(said.stdout)


def _short(command: str) -> str:
    program, *words = command.split() or ["unknown"]
    told = " ".join([program.rpartition("/")[2], *words])
    return told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."
