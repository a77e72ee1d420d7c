"""The disk that a store is on."""

import shutil
from pathlib import Path

from tako_cli.doctor import Finding, broken, warning, well
from tako_runtime.disk import NETWORK, nearest

#: With less free space a store may stop taking runs any minute; with so much less than is comfortable it will.
LEAST, COMFORTABLE = 50 << 20, 500 << 20


def network(folder: Path, filesystem: str | None) -> Finding:
    if filesystem in NETWORK:
        return broken(
            "disk", f"{folder} is on a network disk ({filesystem}), where a store gets damaged",
            "Move the project to a disk of this machine; on a server, set data_dir in [deploy].",
        )  # fmt: skip
    return well("disk", filesystem or "of this machine")


def space(folder: Path) -> Finding:
    """What a store in this folder has left to grow."""
    free = shutil.disk_usage(nearest(folder)).free
    shown, mend = f"{size(free)} free", "Make room: tako runs prune --before 7d, or delete what else is there."
    if free < LEAST:
        return broken("space", f"{shown} for {folder}: soon no run can be stored", mend)
    return warning("space", shown, mend) if free < COMFORTABLE else well("space", shown)


def size(count: int) -> str:
    """Bytes as people write them.

    >>> size(1 << 20), size(2_500), size(12)
    ('1.0 MiB', '2.4 KiB', '12 bytes')
    """
    for unit, each in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count} bytes"
