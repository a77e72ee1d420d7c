"""The embedded store's file, from outside: how it is, and putting it aside."""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple, cast

import apsw

from tako_runtime import holders
from tako_runtime.errors import Refused
from tako_runtime.store import shape, version
from tako_runtime.store.sqlite import Q, translated, version_of

#: How long a look waits for a lock, and how long `set_aside` waits for those who have it open to leave: workers whose
#: supervisor was killed do within seconds. In milliseconds.
PATIENCE = 6_000

#: What SQLite keeps beside the file.
_COMPANIONS = ("-wal", "-shm", "-journal")

#: No more than so many of the things that are wrong with a damaged file are told.
_TOLD = 3

_DAMAGED = (apsw.NotADBError, apsw.CorruptError)


class Examined(NamedTuple):
    """What a look at the file has found. `damage` is empty where it is sound; else the rest may be unknown. `serves` is
    the version that a tako has to know to work with it, `newest` the one that this one does."""

    path: Path
    size: int
    mode: int
    version: int
    newest: int
    serves: int = 1
    damage: tuple[str, ...] = ()
    runs: int = 0
    latest: int | None = None


def examine(path: Path) -> Examined | None:
    if not path.exists():
        return None
    seen = path.stat()
    found = Examined(path, seen.st_size, seen.st_mode & 0o777, 0, version.newest("sqlite"))
    try:
        with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as db:
            db.set_busy_timeout(PATIENCE)
            there = version_of(db)
            found = found._replace(version=there.number, serves=there.serves)
            said = [str(line) for (line,) in db.execute(f"PRAGMA quick_check({_TOLD})")]
            if said != ["ok"]:
                return found._replace(damage=tuple(said))
            shape.check(db, path)
            runs, latest = _counted(db) if found.version else (0, None)
            return found._replace(runs=runs, latest=latest)
    except _DAMAGED as error:
        return found._replace(damage=(str(error),))
    except apsw.Error as error:
        raise translated(error, path) from error


class Aside(NamedTuple):
    """Where the file is now, and how many runs are in it; None for one that cannot be read."""

    path: Path
    runs: int | None


def set_aside(path: Path) -> Aside | None:
    """The file gets `-before` into its name, in the place of the last one that was put aside. A file under another name
    that somebody still writes to would lose what they write, so nobody may."""
    if not path.exists():
        return None
    there = path.with_name(f"{path.stem}-before{path.suffix}")
    try:
        runs = _alone_in_one_file(path)
    except apsw.BusyError:
        others = ", ".join(f"process {one.pid} ({one.command})" for one in holders.of_file(path))
        raise Refused(
            f"{path} is open in {others or 'another process'}",
            hint="Nothing was put aside. Stop that first: it would go on in the old store.",
        ) from None
    except (*_DAMAGED, apsw.SQLError):  # it is damaged, or another program's
        runs = None
    except apsw.Error as error:
        raise translated(error, path) from error
    for end in ("", *_COMPANIONS):  # beside a damaged file they are still there
        source, target = Path(f"{path}{end}"), Path(f"{there}{end}")
        if source.exists():
            source.replace(target)
        else:
            target.unlink(missing_ok=True)
    return Aside(there, runs)


def _alone_in_one_file(path: Path) -> int | None:
    """How many runs there are, once nobody else has the file open, and all that was committed is in it."""
    with closing(apsw.Connection(str(path))) as db:
        db.set_busy_timeout(PATIENCE)
        db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
        db.execute("BEGIN EXCLUSIVE")
        runs = _counted(db)[0] if db.pragma("user_version") else 0
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = DELETE").fetchall()
        return runs


def _counted(db: apsw.Connection) -> tuple[int, int | None]:
    [found] = cast("list[tuple[int, int | None]]", db.execute(Q["look_over"]).fetchall())
    return found
