"""A project -> what is sent of it: one file with everything that a server needs, made the same from the same tree.

    look at the files -> read what the workflows declare -> lock the dependencies -> write the archive

Each of these may fail, and nothing has been sent by then. In the archive are the project's files where they are in the
project, and beside them

    RELEASE.json                    app, commit, required secrets, ...; the server adds the id and what it is told
    .release/manifest.json          what the workflows declare
    .release/requirements-TAG.txt   the dependencies for a server of that kind, to be installed with --require-hashes in
                                    the folder that it lies in
    .release/wheels/                the runtime, pip, and with `vendor = true` all that is locked

The manifest is read in a copy of what is sent, so that a module that git ignores is missed here and not on the server.
"""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec

from tako_cli.deploy import lock, tree, wheels
from tako_cli.deploy.lock import Locked, Target
from tako_cli.deploy.tree import Entry, Tree
from tako_runtime import __version__
from tako_runtime.config import Config
from tako_runtime.errors import ConfigError, Refused
from tako_runtime.manifest import Manifest, read
from tako_runtime.store import project_home

#: The folder of a release that is tako's own.
OURS = ".release"

#: The time of every file where no commit has one: the first that all archives can have.
_EPOCH = 315_532_800

#: How many archives stay beside the project.
_KEPT = 3


@dataclass(frozen=True, slots=True)
class Release:
    """What is sent. `id` names the tree: the commit's short hash, with `-dirty-HASH` where the files differ from it;
    `tree-HASH` where there is no git. `digest` is the SHA-256 of `file`: the same tree has another one with another
    tako or other versions of its dependencies."""

    id: str
    file: Path
    digest: str
    size: int
    files: int
    commit: str | None
    dirty: bool
    manifest: Manifest
    required: tuple[str, ...]
    requirements: Mapping[Target, str]  # the file for each, as a path in the release
    pip: str  # the wheel, as a path in the release
    vendored: bool
    notes: tuple[str, ...] = ()

    @property
    def other_id(self) -> str:
        """The id for a server that has `id` with another digest."""
        return f"{self.id}-{self.digest[:6]}"


def pack(
    config: Config, env: str, targets: Sequence[Target], *, secrets: Mapping[str, str] | None = None, anew: bool = False
) -> Release:
    """Make the release of a project for servers of these kinds. `secrets` are for modules that read them at import;
    `anew` finds new versions of the dependencies. Raises `Refused`, `ConfigError` or another `TakoError`."""
    files = tree.look(config.root)
    notes = [*_checked(config, files)]
    manifest = _manifest(config, env, files, secrets or {})
    kept = config.root / ".tako" / "deploy"
    wanted = lock.needs(config.root)
    if config.storage.url.startswith("postgres"):
        wanted.extras.add("postgres")
    locks: dict[Target, Locked] = {}
    for target in dict.fromkeys(targets):
        locks[target] = lock.lock(wanted, target, kept / "locks", vendor=config.deploy.vendor, anew=anew)
    runtime, pip = wheels.runtime(), wheels.pip()
    carried: dict[str, bytes | Path] = {runtime.name: runtime.data, pip.name: pip.data}
    if config.deploy.vendor:
        for target, locked in locks.items():
            carried |= lock.wheelhouse(locked, wanted.options, target, kept / "wheels")
    ours: dict[str, bytes | Path] = {f"{OURS}/wheels/{name}": content for name, content in carried.items()}
    for target, locked in locks.items():
        text = locked.text(target, runtime, vendored=config.deploy.vendor)
        ours[f"{OURS}/requirements-{target.tag}.txt"] = text.encode()
    ours[f"{OURS}/manifest.json"] = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
    written, dirty = _written(files, ours, kept, _about(config, files, pip.name, targets))
    return Release(
        written.id(files.commit, dirty=dirty), written.file, written.digest, written.file.stat().st_size,
        len(files.files), files.commit, dirty, manifest, config.secrets.required,
        {target: f"{OURS}/requirements-{target.tag}.txt" for target in locks}, f"{OURS}/wheels/{pip.name}",
        config.deploy.vendor, tuple(notes),
    )  # fmt: skip


# --- before anything is written --------------------------------------------------------------------------------------


def _checked(config: Config, files: Tree) -> Iterator[str]:
    """What is worth knowing of the files. Raises for what would not be a release."""
    paths = {entry.path for entry in files.files}
    if config.path.name not in paths:
        raise Refused(f"git ignores {config.path.name}, so no server would get it", hint="Take it out of .gitignore.")
    if clash := sorted(path for path in paths if path.split("/")[0] in (OURS, "RELEASE.json")):
        raise Refused(f"{tree.shown(clash[0])}: that name is tako's own in a release", hint="Rename it.")
    folder = config.workflows.dir
    there = {path.relative_to(config.root).as_posix() for path in (config.root / folder).rglob("*.py")}
    there = {path for path in there if not any(part.startswith(("_", ".")) for part in path.split("/"))}
    if unsent := sorted(there - paths):
        what = f"git ignores it: {tree.some(map(tree.shown, unsent))}"
        if not there & paths:
            raise Refused(
                f"no workflow would be sent: {folder}/ is there, but {what}",
                hint=f"Take it out of .gitignore; git check-ignore -v {tree.shown(unsent[0])} names the line.",
            )
        yield f"a workflow is not sent, for {what}"
    if files.size > config.deploy.max_size:
        largest = sorted(files.files, key=lambda entry: entry.size, reverse=True)[:5]
        named = ", ".join(f"{tree.shown(entry.path)} ({_size(entry.size)})" for entry in largest)
        raise Refused(
            f"the project's files have {_size(files.size)}, and max_size is {_size(config.deploy.max_size)}: {named}",
            hint="Have git ignore data and keep it in the server's shared/ folder, or raise max_size in [deploy].",
        )
    own = config.app is not None and not any("{fd}" in word for word in config.app.command)
    if config.app is not None and own and (config.app.health or any("{port}" in word for word in config.app.command)):
        yield (
            "[app] command binds its port itself: at each switch nobody is answered from when the old app is told to "
            "end until the new one is up; with {fd}, as a socket that stays open, everybody is"
        )
    if files.left_out:
        yield f"never sent, though git tracks it: {tree.some(map(tree.shown, files.left_out))}"


def _manifest(config: Config, env: str, files: Tree, secrets: Mapping[str, str]) -> Manifest:
    """What the workflows declare, when only what is sent is there; files as they are named in the project."""
    home = project_home(config.name, config.root)
    environment = {**os.environ, **config.variables(env), **home.environment(), "TAKO_ENV": env}
    with _mirrored(files) as copy:
        try:
            found = read(copy, config.workflows.dir, environment, secrets)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(copy), str(config.root)), hint=error.hint) from None
    inside = f"{copy}/"
    if found.mistakes:
        lines = [f"{one.file.removeprefix(inside)}:{one.line}: {one.message}" for one in found.mistakes]
        hint = "Nothing was sent. A file that is missing here may be one that git ignores: it is not sent."
        raise ConfigError("\n".join(lines).replace(inside, ""), hint=hint)
    flows = [msgspec.structs.replace(flow, file=flow.file.removeprefix(inside)) for flow in found.workflows]
    return Manifest(tuple(flows))


@contextmanager
def _mirrored(files: Tree) -> Iterator[Path]:
    """A folder in which each file that is sent is a link to the real one."""
    with tempfile.TemporaryDirectory(prefix="tako-pack-") as scratch:
        copy = Path(scratch).resolve() / "project"
        copy.mkdir()
        for entry in files.files:
            place = copy / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(entry.link if entry.link is not None else files.root / entry.path)
        yield copy


def _about(config: Config, files: Tree, pip: str, targets: Sequence[Target]) -> dict[str, Any]:
    return {
        "app": config.name,
        "commit": files.commit,
        "tako": __version__,
        "required": sorted(config.secrets.required),
        "vendored": config.deploy.vendor,
        "pip": f"{OURS}/wheels/{pip}",
        "requirements": {one.tag: f"{OURS}/requirements-{one.tag}.txt" for one in dict.fromkeys(targets)},
    }


def _size(count: int) -> str:
    from tako_cli.doctor.disk import size

    return size(count)


# --- the archive -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Written:
    file: Path
    digest: str
    tree: str  # the hash of the project's files alone

    def id(self, commit: str | None, *, dirty: bool) -> str:
        if commit is None:
            return f"tree-{self.tree[:12]}"
        return f"{commit[:12]}-dirty-{self.tree[:8]}" if dirty else commit[:12]


def _written(
    files: Tree, ours: Mapping[str, bytes | Path], kept: Path, about: Mapping[str, Any]
) -> tuple[_Written, bool]:
    """The archive, named by its id, and whether the files differ from the commit: asked once they have been read, so
    that an edit meanwhile cannot go by the commit's name."""
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    time = tree.commit_time(files.root) if files.commit else _EPOCH
    handle, name = tempfile.mkstemp(prefix=".packing-", dir=kept)
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as raw:
            out, content = _Hashing(raw), hashlib.sha256()
            with (
                gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=out, mtime=0) as packed,
                tarfile.open(
                    fileobj=packed, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
                ) as tar,
            ):
                for entry in files.files:
                    content.update(_add_file(tar, files.root, entry, time))
                told = json.dumps(about, indent=2, sort_keys=True).encode() + b"\n"
                for path, data in sorted({**ours, "RELEASE.json": told}.items()):
                    _add(tar, path, data if isinstance(data, bytes) else data.read_bytes(), time)
        dirty = files.commit is not None and tree.differs(files)
        written = _Written(fresh, out.hash.hexdigest(), content.hexdigest())
        file = kept / f"{written.id(files.commit, dirty=dirty)}.tar.gz"
        fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    for old in sorted(kept.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime_ns, reverse=True)[_KEPT:]:
        old.unlink(missing_ok=True)
    return _Written(file, written.digest, written.tree), dirty


def _add_file(tar: tarfile.TarFile, root: Path, entry: Entry, time: int) -> bytes:
    """Put a file of the project into the archive; what the tree's hash takes in of it."""
    info = _info(entry.path, time, 0o755 if entry.executable else 0o644)
    if entry.link is not None:
        info.type, info.linkname = tarfile.SYMTYPE, entry.link
        tar.addfile(info)
        return _fact(entry.path, "link", os.fsencode(entry.link))
    try:
        with (root / entry.path).open("rb") as file:
            info.size = os.fstat(file.fileno()).st_size
            reading = _Hashing(file)
            tar.addfile(info, reading)
    except OSError as error:
        raise Refused(
            f"{tree.shown(entry.path)} cannot be packed: {error.strerror or 'it changed meanwhile'}",
            hint="Nothing was sent. Try again once nothing writes there.",
        ) from error
    return _fact(entry.path, "executable" if entry.executable else "file", reading.hash.digest())


def _fact(path: str, kind: str, content: bytes) -> bytes:
    return b"%s\0%s\0%s" % (os.fsencode(path), kind.encode(), hashlib.sha256(content).digest())


def _add(tar: tarfile.TarFile, path: str, data: bytes, time: int) -> None:
    import io

    info = _info(path, time, 0o644)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _info(path: str, time: int, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mtime, info.mode = time, mode
    return info


class _Hashing:
    """A file, and the hash of what goes through it."""

    def __init__(self, file: "IO[bytes] | BinaryIO") -> None:
        self._file, self.hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        return data

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
