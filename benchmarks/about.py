"""What the numbers are about: the machine, and every version and setting."""

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw

from benchmarks.peer import Peer

if TYPE_CHECKING:
    from postgres import Server


def about(
    classes: dict[str, type[Peer]], absent: dict[str, str], server: "Server | None", quick: bool
) -> dict[str, Any]:
    return {
        "machine": machine(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "sqlite": f"{apsw.sqlite_lib_version()} (tako, floor)",
        "postgres": str(server.ask("SHOW server_version")[0][0]) + ", its own defaults" if server else "none",
        "quick": quick,
        "absent": absent,
        "peers": {name: _peer(cls) for name, cls in classes.items()},
    }


def _peer(cls: type[Peer]) -> dict[str, Any]:
    return {
        "title": cls.title, "version": f"{cls.distribution} {metadata.version(cls.distribution)}", "store": cls.store,
        "settings": {name: cls.said.get(name, "as it comes") for name in cls.settings}, "best": cls.best,
        "missing": cls.missing,
    }  # fmt: skip


def machine() -> str:
    cpus = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    temporary = Path(tempfile.gettempdir())
    mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
    kinds = [(len(place), kind) for place, kind in mounts if temporary.is_relative_to(place)]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"{os.cpu_count()} x {cpus[0] if cpus else platform.machine()}, {memory[0] / 2**20:.0f} GB, "
        f"{platform.system()} {kernel}, {temporary} on {max(kinds)[1] if kinds else 'an unknown disk'}"
        if memory
        else platform.platform()
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
