"""A consistent copy of the store's file, made while others work with it; and putting one back."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import IO

import apsw

from tako_runtime.errors import NotFound, Refused, StoreError
from tako_runtime.store.file import PATIENCE, Aside, Examined, examine, set_aside
from tako_runtime.store.sqlite import translated


def copy(path: Path, to: Path) -> None:
    """Copy the store into a file that is not there yet, as it is at one instant; nobody has to wait. Raises `NotFound`
    where there is none."""
    if not path.exists():
        raise NotFound(f"there is no store in {path.parent} yet")
    os.close(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        with (
            closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as source,
            closing(apsw.Connection(str(to))) as target,
        ):
            source.set_busy_timeout(PATIENCE)
            with target.backup("main", source, "main") as copying:
                copying.step(-1)  # all in one: what is written meanwhile is not in it
            target.execute("PRAGMA journal_mode = DELETE").fetchall()  # one file, with nothing beside it
    except apsw.Error as error:
        to.unlink(missing_ok=True)
        raise translated(error, path) from error


def checked(path: Path) -> Examined:
    """A file that is a sound copy of a store that this tako can open. Raises `StoreError` for any other."""
    found = examine(path)
    if found is None:
        raise NotFound(f"no file {path}")
    if found.damage or not found.version:
        raise StoreError(f"{path} is no copy of a store: {found.damage[0] if found.damage else 'it has no tables'}")
    if found.serves > found.newest:
        raise StoreError(f"{path} was written by a newer tako", hint="Upgrade tako first.")
    return found


def put_back(path: Path, data: IO[bytes]) -> tuple[Examined, Aside | None]:
    """Make a copy the store; the one that is there is put aside first. Raises `Refused` while another process has that
    one open, and `StoreError` for data that are no sound copy; then all is as it was."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600)) as file:
            shutil.copyfileobj(data, file)
            file.flush()
            os.fsync(file.fileno())
        found = checked(fresh)
        aside = set_aside(path)
        if path.exists():
            raise Refused(f"{path} came to be meanwhile: something uses it", hint="Stop the app first.")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return found._replace(path=path), aside
