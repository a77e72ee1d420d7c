"""The disk that a store is on."""

import shutil
import subprocess
from pathlib import Path

from tako_cli.doctor import Finding, broken, warning, well

#: SQLite's locks and its shared memory do not hold on these, whatever they promise.
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs",
    "gpfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone",
}  # fmt: skip

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


def filesystem(folder: Path) -> str | None:
    """The kind of file system a folder is on, or will be; None where the machine does not say."""
    place = nearest(folder).resolve()
    table = Path("/proc/self/mountinfo")
    if table.exists():
        return of_mounts(place, table.read_text("utf-8", errors="replace"))
    said = subprocess.run(["mount"], capture_output=True, text=True, check=False).stdout
    found = [(point, kinds) for line in said.splitlines() for _, _, rest in [line.partition(" on ")]
             for point, _, kinds in [rest.rpartition(" (")] if place.is_relative_to(point)]  # fmt: skip
    return max(found, key=lambda one: len(one[0]))[1].split(",")[0].rstrip(")") if found else None


def of_mounts(place: Path, table: str) -> str | None:
    """The kind of file system at a path, by the kernel's table of mounts (proc(5)): the deepest one, and of several at
    one point the last.

    >>> of_mounts(Path("/home/ada"), "1 0 8:1 / / rw - ext4 /dev/sda1 rw\\n2 1 0:4 / /home rw - nfs4 nas:/ rw\\n")
    'nfs4'
    """
    deepest, kind = -1, None
    for line in table.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), after.split()[0]
    return kind


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there already."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def size(count: int) -> str:
    """Bytes as people write them.

    >>> size(1 << 20), size(2_500), size(12)
    ('1.0 MiB', '2.4 KiB', '12 bytes')
    """
    for unit, each in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= each:
            return f"{count / each:.1f} {unit}"
    return f"{count} bytes"
