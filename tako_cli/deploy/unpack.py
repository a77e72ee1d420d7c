"""What a server runs to unpack a release: this file alone, with nothing but Python, before anything else is there.

    python3 - RELEASES ID SHA256 ARCHIVE [FACTS] < unpack.py
    python3 -c "$(cat unpack.py)" RELEASES ID SHA256 - [FACTS] < archive.tar.gz

It makes `RELEASES/ID`, whole or not at all: everything goes into a temporary folder beside it, is synced, and is
renamed at the end. Of a connection that is cut, or a disk that is full, nothing stays but such a folder (`.ID.*`),
which the next one removes. FACTS is a JSON object that joins `RELEASE.json`. A release that is there already with the
same bytes is left as it is.

Refused are `..`, absolute paths, names twice, devices, hard links, and symbolic links that lead out of the release, by
themselves or through others.
"""

import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from typing import IO, Any, BinaryIO, cast

#: More than any release has; a file that says so of itself is no release.
MOST_FILES = 1_000_000

RELEASE = b"RELEASE.json"


class Bad(Exception):
    """The archive is none that tako makes."""


def unpack(releases: str, name: str, digest: str, archive: BinaryIO, facts: dict[str, Any]) -> str:
    """Make the release; where it is. Raises `Bad` or `OSError`, and there is none."""
    place = os.path.join(releases, name)
    os.makedirs(releases, mode=0o755, exist_ok=True)
    if os.path.lexists(place):
        return _as_it_was(place, digest)
    for other in os.listdir(releases):
        if other.startswith(f".{name}."):
            shutil.rmtree(os.path.join(releases, other), ignore_errors=True)
    made = tempfile.mkdtemp(prefix=f".{name}.", dir=releases)
    try:
        os.chmod(made, 0o755)  # noqa: S103 -- the app may run as another user
        reading = _Hashing(archive)
        _fill(os.fsencode(made), reading)
        if reading.to_its_end() != digest:
            raise Bad("the archive is not the one that was sent: it was cut short or changed on its way")
        _describe(made, {**facts, "id": name, "digest": digest})
        _sync(made)
        os.rename(made, place)
        _sync_folder(releases)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return place


def _as_it_was(place: str, digest: str) -> str:
    try:
        with open(os.path.join(os.fsencode(place), RELEASE), "rb") as file:
            there = json.load(file)["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Bad(f"{place} is there already, and is no release of tako's") from None
    if there != digest:
        raise Bad(f"{place} is there already, with another content")
    return place


class _Hashing:
    """A file that is read once from front to back, and its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def to_its_end(self) -> str:
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()


def _fill(top: bytes, archive: "_Hashing") -> None:
    """Files first, links last: nothing is ever written through a link."""
    links: list[tuple[bytes, bytes]] = []
    seen: set[bytes] = set()
    try:
        with tarfile.open(
            fileobj=cast("BinaryIO", archive), mode="r|gz", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                path = _inside(member.name)
                if path in seen or len(seen) >= MOST_FILES:
                    raise Bad(f"{path!r} is in it twice" if path in seen else "it has too many files")
                seen.add(path)
                if member.issym():
                    links.append((path, member.linkname.encode("utf-8", "surrogateescape")))
                elif member.isdir():
                    os.makedirs(os.path.join(top, path), mode=0o755, exist_ok=True)
                elif member.isreg():
                    _write(os.path.join(top, path), tar.extractfile(member), 0o755 if member.mode & 0o100 else 0o644)
                else:
                    raise Bad(f"{path!r} is neither a file nor a folder nor a symbolic link")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's
            raise
        raise Bad(f"the archive cannot be read: {error}") from error
    under = {path for path, _ in links}
    for path in seen:
        parts = path.split(b"/")
        if any(b"/".join(parts[:end]) in under for end in range(1, len(parts))):
            raise Bad(f"{path!r} lies behind a symbolic link")
    for path, target in links:
        place = os.path.join(top, path)
        os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
        os.symlink(target, place)
    real = os.path.realpath(top)
    for path, target in links:  # once all are there, for one may lead through another
        leads = os.path.realpath(os.path.join(top, path))
        if os.path.isabs(target) or os.path.commonpath([real, leads]) != real:
            raise Bad(f"the link {path!r} leads out of the release, to {target!r}")


def _inside(name: str) -> bytes:
    path = name.encode("utf-8", "surrogateescape")
    parts = path.split(b"/")
    if path.startswith(b"/") or b".." in parts or not path or b"\0" in path or b"" in parts or b"." in parts:
        raise Bad(f"{path!r} is no path inside a release")
    return path


def _write(place: bytes, content: "IO[bytes] | None", mode: int) -> None:
    os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
    assert content is not None
    file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(file, "wb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
        os.fchmod(file, mode)


def _describe(made: str, facts: dict[str, Any]) -> None:
    path = os.path.join(os.fsencode(made), RELEASE)
    try:
        with open(path, "rb") as file:
            known = json.load(file)
        known = {**known, **facts}
    except (OSError, ValueError, TypeError) as error:
        raise Bad(f"it has no RELEASE.json: {error}") from error
    with open(path, "w", encoding="utf-8") as out:
        json.dump(known, out, indent=2, sort_keys=True)
        out.write("\n")


def _sync(made: str) -> None:
    """What is renamed must be on disk: a power cut must not leave a release with empty files."""
    for folder, _, names in os.walk(os.fsencode(made)):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                _sync_file(path)
        _sync_folder(folder)


def _sync_file(path: bytes) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(path: "str | bytes") -> None:
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def main(words: list[str]) -> int:
    releases, name, digest, archive, *rest = words
    os.umask(0o022)
    try:
        facts = json.loads(rest[0]) if rest else {}
        if archive == "-":
            place = unpack(releases, name, digest, sys.stdin.buffer, facts)
        else:
            with open(archive, "rb") as file:
                place = unpack(releases, name, digest, file, facts)
    except (Bad, OSError) as error:
        sys.stderr.write(f"the release {name} was not unpacked: {error}\n")
        return 1
    sys.stdout.write(f"{place}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
