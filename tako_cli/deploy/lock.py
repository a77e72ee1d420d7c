"""A project's dependencies -> exact versions with the hashes of their files, for one server's Python and platform.

They are what `uv.lock`, else `requirements.txt`, else `[project] dependencies` in `pyproject.toml` says, and what the
runtime needs. uv finds the versions where it is there, else pip does. An answer is kept beside the project, so that the
same requirements give the same versions at the next deploy, until somebody asks for new ones.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

from tako_cli.deploy import wheels
from tako_cli.deploy.wheels import Wheel, find_uv, project_name
from tako_runtime.errors import ConfigError, NotFound, TakoError

#: The machines and versions of glibc that uv has a platform for.
_UV_MACHINES = ("x86_64", "aarch64")
_UV_GLIBC = (17, 28, *range(31, 41))

#: Options of a requirements file that say where things are found.
_PLACES = ("--index-url", "--extra-index-url", "--find-links", "--no-index", "--trusted-host", "--pre")
_SHORT = {"-r": "--requirement", "-c": "--constraint", "-i": "--index-url", "-f": "--find-links", "-e": "--editable"}

#: So many wheelhouses are kept, and those that were used so many seconds before the newest one.
_KEPT, _LATELY = 5, 24 * 3600

_HASH = re.compile(r"--hash[= ](\w+:[0-9a-fA-F]+)")


@dataclass(frozen=True, slots=True)
class Target:
    """A server, as far as wheels go: its Python ("3.11"), its machine ("x86_64") and its glibc ("2.36")."""

    python: str
    machine: str
    glibc: str

    @classmethod
    def here(cls) -> "Target":
        """This machine, as if it were a server."""
        version = platform.libc_ver()[1] or "2.28"
        return cls(f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine(), version)

    @property
    def tag(self) -> str:
        return f"py{self.python}-{self.machine}-glibc{self.glibc}"

    @property
    def for_uv(self) -> list[str]:
        minor = max((each for each in _UV_GLIBC if each <= self._minor), default=_UV_GLIBC[0])
        return ["--python-version", self.python, "--python-platform", f"{self.machine}-manylinux_2_{minor}"]

    @property
    def for_pip(self) -> list[str]:
        old = {17: ["manylinux2014"], 12: ["manylinux2010"], 5: ["manylinux1"]}
        names = [name for minor in range(self._minor, 4, -1) for name in (f"manylinux_2_{minor}", *old.get(minor, []))]
        words = [word for name in names for word in ("--platform", f"{name}_{self.machine}")]
        return ["--python-version", self.python, "--implementation", "cp", *words]

    @property
    def _minor(self) -> int:
        return int(self.glibc.split(".")[1])


@dataclass(slots=True)
class Needs:
    """What a project asks for. `hashes` are those that its own file names: nothing else is taken for that name."""

    source: str = ""
    lines: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    hashes: dict[str, set[str]] = field(default_factory=dict)
    extras: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    def add(self, text: str, folder: Path, *, constraint: bool = False) -> None:
        """The lines of a requirements file in `folder`."""
        for line in _logical(text):
            parts = re.fullmatch(r"(--[\w-]+|-\w)[= ]?\s*(.*)", line)
            option, value = (_SHORT.get(parts[1], parts[1]), parts[2]) if parts else ("", "")
            if option in ("--requirement", "--constraint"):
                file = folder / value
                inner = _text(file, f"{self.source}: {line}")
                self.add(inner, file.parent, constraint=constraint or option == "--constraint")
            elif option in _PLACES:
                local = option == "--find-links" and (folder / value).exists()
                self.options.append(f"{option} {(folder / value).absolute() if local else value}".strip())
            elif not line.startswith("-") or option == "--editable":
                self._requirement(line, constraint=constraint)

    def _requirement(self, line: str, *, constraint: bool) -> None:
        hashes = set(_HASH.findall(line))
        line = _HASH.sub("", line).strip()
        name = project_name(line)
        direct = re.match(r"[^;]*?@\s*([a-z+]+):", line)
        if name == "tako":
            named = re.match(r"tako\s*\[(.*?)\]", line)
            self.extras |= {extra.strip() for extra in named[1].split(",")} if named else set()
            if not direct and not hashes:
                self.lines.append(line)
        elif direct[1] not in ("http", "https") if direct else re.match(r"-|\.|/|[a-z+]+:|[^\s;]*/", line):
            self.refused.append(line)
        else:
            (self.constraints if constraint else self.lines).append(line)
            if hashes:
                self.hashes.setdefault(name, set()).update(hashes)


@dataclass(frozen=True, slots=True)
class Locked:
    """Exact requirements, each with its hashes; without the runtime, which comes as a wheel."""

    lines: Mapping[str, Sequence[str]]
    indexes: Sequence[str] = ()

    def text(self, target: Target, runtime: Wheel, *, vendored: bool) -> str:
        """The file that a server installs from with `--require-hashes`, in the folder that it lies in."""
        head = [f"# Python {target.python}, {target.machine}, glibc {target.glibc}"]
        head += ["--no-index", "--find-links ./wheels"] if vendored else self.indexes
        return "\n".join([*head, f"./wheels/{runtime.name} --hash=sha256:{runtime.sha256}", self.plain(), ""])

    def plain(self) -> str:
        shown = (f"{line} {' '.join(f'--hash={one}' for one in hashes)}" for line, hashes in self.lines.items())
        return "\n".join(shown)


def needs(root: Path) -> Needs:
    """What the project in `root` says that it needs."""
    found = Needs()
    if (root / "uv.lock").is_file():
        found.source = "uv.lock"
        found.add(_of_uv(root), root)
    elif (root / "requirements.txt").is_file():
        found.source = "requirements.txt"
        found.add(_text(root / "requirements.txt", found.source), root)
    elif (root / "pyproject.toml").is_file():
        found.source = "pyproject.toml"
        found.add("\n".join(_of_pyproject(root / "pyproject.toml")), root)
    if found.refused:
        raise ConfigError(
            f"{found.source}: no hash can be given for {'; '.join(found.refused)}",
            hint="Name a version on an index, or a wheel's https address. Code of your own belongs in the project.",
        )
    return found


def lock(wanted: Needs, target: Target, kept: Path, *, vendor: bool, anew: bool = False) -> Locked:
    """The versions for one target; those that `kept` has for the same requirements, unless they are to be found
    `anew`."""
    runtime = wheels.runtime()
    asked = [wanted.lines, wanted.constraints, wanted.options, sorted(wanted.extras), target.tag, vendor]
    asked += [sorted((name, sorted(hashes)) for name, hashes in wanted.hashes.items()), runtime.needs]
    file = kept / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    indexes = [option for option in wanted.options if "index-url" in option]
    if not anew and file.is_file():
        return Locked(json.loads(file.read_text("utf-8")), indexes)
    with tempfile.TemporaryDirectory(prefix="tako-lock-") as scratch:
        place = Path(scratch)
        (place / runtime.name).write_bytes(runtime.data)
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        ours = f"tako{extras} @ {(place / runtime.name).as_uri()}"
        (place / "constraints.txt").write_text("\n".join(wanted.constraints) + "\n", "utf-8")
        (place / "in.txt").write_text("\n".join([*wanted.options, ours, *wanted.lines, ""]), "utf-8")
        uv = find_uv() if target.machine in _UV_MACHINES else None
        try:
            found = _by_uv(uv, place, target, vendor=vendor) if uv else _by_pip(place, target, vendor=vendor)
        except TakoError as error:
            hint = f"What runs on Python {target.python}, {target.machine}, glibc {target.glibc} was looked for"
            hint += ", as wheels alone, for vendor = true has no server build any." if vendor else "."
            raise TakoError(str(error), hint=hint) from None
    found.pop("tako", None)
    lines = {line: _trusted(name, hashes, wanted) for name, (line, hashes) in sorted(found.items())}
    kept.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(lines, indent=1), "utf-8")
    fresh.replace(file)
    return Locked(lines, indexes)


def wheelhouse(locked: Locked, options: Sequence[str], target: Target, kept: Path) -> dict[str, Path]:
    """The wheels of what is locked, by file name, for a server that cannot get them itself."""
    place = kept / hashlib.sha256((locked.plain() + target.tag).encode()).hexdigest()[:32]
    if not place.is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheels-", dir=kept) as scratch:
            (Path(scratch) / "in.txt").write_text("\n".join([*options, locked.plain(), ""]), "utf-8")
            words = ["download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", *target.for_pip]
            _pip([*words, "--dest", f"{scratch}/wheels", "-r", f"{scratch}/in.txt"], "the wheels cannot be got")
            (Path(scratch) / "wheels").mkdir(exist_ok=True)
            try:
                (Path(scratch) / "wheels").rename(place)
            except OSError:  # another deploy of this project's has brought the same ones meanwhile
                if not place.is_dir():
                    raise
    os.utime(place)
    _prune(kept)
    return {path.name: path for path in sorted(place.glob("*.whl"))}


def _prune(kept: Path) -> None:
    """The wheels of other dependencies go: all but those that were used last, or within a day."""
    used = {place: place.stat().st_mtime for place in kept.iterdir() if not place.name.startswith(".")}
    newest = max(used.values())
    for place in sorted(used, key=lambda place: used[place], reverse=True)[_KEPT:]:
        if used[place] < newest - _LATELY:
            shutil.rmtree(place, ignore_errors=True)


# --- where requirements are stated -----------------------------------------------------------------------------------


def _text(file: Path, named: str) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{named}: {why}") from None


def _logical(text: str) -> Iterator[str]:
    """The lines of a requirements file, without comments, continued ones as one."""
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        if words := re.sub(r"(^|\s)#.*", "", line).strip():
            yield " ".join(words.split())


def _of_uv(root: Path) -> str:
    uv = find_uv()
    if uv is None:
        raise NotFound(
            "the project has a uv.lock, and there is no uv here to read it",
            hint="Install uv, or put what it locks into requirements.txt and remove uv.lock.",
        )
    words = [uv, "export", "--locked", "--no-dev", "--no-emit-project", "--no-emit-package", "tako", "--no-header"]
    return _said(
        [*words, "--quiet", "--no-annotate", "--format", "requirements-txt"], "uv.lock cannot be used", cwd=root
    )


def _of_pyproject(file: Path) -> list[str]:
    try:
        told = tomllib.loads(_text(file, str(file)))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    project = told.get("project", {})
    if "dependencies" in project.get("dynamic", ()) or ("project" not in told and "poetry" in told.get("tool", {})):
        raise ConfigError(
            f"{file}: only the project's own build tool can tell its dependencies",
            hint="Export them into requirements.txt, with hashes where the tool can.",
        )
    stated = project.get("dependencies", [])
    if not isinstance(stated, list) or not all(isinstance(one, str) for one in stated):
        raise ConfigError(f"{file}: [project] dependencies is not a list of texts")
    return stated


# --- who finds the versions ------------------------------------------------------------------------------------------


def _by_uv(uv: str, place: Path, target: Target, *, vendor: bool) -> dict[str, tuple[str, list[str]]]:
    words = [uv, "pip", "compile", "--generate-hashes", "--no-header", "--no-annotate", "--quiet", *target.for_uv]
    words += ["--only-binary", ":all:"] if vendor else []
    said = _said([*words, "-c", str(place / "constraints.txt"), str(place / "in.txt")], _CANNOT)
    found = {}
    for line in _logical(said):
        if not line.startswith("-"):
            found[project_name(line)] = (_HASH.sub("", line).strip(), _HASH.findall(line))
    return found


def _by_pip(place: Path, target: Target, *, vendor: bool) -> dict[str, tuple[str, list[str]]]:
    report = place / "report.json"
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report), "--target", str(place)]
    if vendor or target != Target.here():
        words += ["--only-binary", ":all:", *target.for_pip]
    _pip([*words, "-c", str(place / "constraints.txt"), "-r", str(place / "in.txt")], _CANNOT)
    found = {}
    for one in json.loads(report.read_text("utf-8"))["install"]:
        name, version, got = one["metadata"]["name"], one["metadata"]["version"], one["download_info"]
        hashes = [f"{kind}:{value}" for kind, value in got["archive_info"]["hashes"].items()]
        found[project_name(name)] = (f"{name} @ {got['url']}" if one["is_direct"] else f"{name}=={version}", hashes)
    return found


_CANNOT = "the dependencies cannot be locked"


def _trusted(name: str, hashes: Sequence[str], wanted: Needs) -> list[str]:
    """The hashes that the project's own file has too, where it has any for that name."""
    own = wanted.hashes.get(name)
    left = sorted(hashes if own is None else set(hashes) & own)
    if not left:
        raise TakoError(
            f"{_CANNOT}: the files that are there of {name} are not those whose hashes {wanted.source} has",
            hint="Somebody has changed them, or the file was made for another platform: lock it anew.",
        )
    return left


def _pip(words: Sequence[str], what: str) -> None:
    options = ["--disable-pip-version-check", *words]
    if util.find_spec("pip") is not None:  # out of its wheel it would be compiled each time
        _said([sys.executable, "-m", "pip", *options], what)
        return
    made = wheels.pip()
    with tempfile.TemporaryDirectory(prefix="tako-pip-") as folder:
        (Path(folder) / made.name).write_bytes(made.data)
        _said([sys.executable, f"{folder}/{made.name}/pip", *options], what)


def _said(words: Sequence[str], what: str, cwd: Path | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, check=False)
    if done.returncode:
        said = re.sub(r"(?<=//)[^/@\s]+@", "", done.stderr.decode(errors="replace"))  # a password of an index
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith(("WARNING", "warning"))]
        raise TakoError("\n".join([f"{what}:", *lines[-12:]]))
    return done.stdout.decode()
