"""What kind of disk a store is on, why it cannot be there, and what has to be done there so that it stays."""

import os
import subprocess
from pathlib import Path

from tako_runtime.errors import StoreError

#: The kernel's table of mounts (proc(5)).
TABLE = Path("/proc/self/mountinfo")

#: SQLite's locks and its shared memory do not hold on these, whatever they promise.
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "webdav", "9p", "afs", "ceph", "glusterfs", "lustre", "beegfs",
    "gpfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone",
}  # fmt: skip


def filesystem(folder: Path) -> str | None:
    """The kind of file system a folder is on, or will be; None where the machine does not say."""
    place = nearest(folder).resolve()
    if TABLE.exists():
        return of_mounts(place, TABLE.read_text("utf-8", errors="replace"))
    said = subprocess.run(["mount"], capture_output=True, text=True, check=False).stdout
    found = [(point, kinds) for line in said.splitlines() for _, _, rest in [line.partition(" on ")]
             for point, _, kinds in [rest.rpartition(" (")] if place.is_relative_to(point)]  # fmt: skip
    return max(found, key=lambda one: len(one[0]))[1].split(",")[0].rstrip(")") if found else None


def of_mounts(place: Path, table: str) -> str | None:
    """The kind of file system at a path, by the table of mounts: the deepest one, and of several at
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
    return next(place for place in (folder, *folder.parents) if _is_there(place))


def _is_there(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # the one above it may not be looked into
        return False


def make_private(folder: Path) -> None:
    """The folder, and those above it that are not there, for this user only."""
    for one in (*reversed(folder.parents), folder):  # `parents=True` would leave those to the umask
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)


def sync(folder: Path) -> None:
    """What was renamed in it outlives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unusable(error: OSError, file: Path) -> StoreError:
    """Why a file of the store cannot be made or opened, and what to do."""
    there = nearest(file)
    if there != file and not there.is_dir():
        return StoreError(
            f"{there} is a file, and a folder for the store has to be there",
            hint="Move it away, or rename it: tako makes the folder.",
        )
    return StoreError(
        f"{file} cannot be opened: {error.strerror}",
        hint=f"tako keeps runs there: this user needs to write to {there}. Look at its owner and mode.",
    )
