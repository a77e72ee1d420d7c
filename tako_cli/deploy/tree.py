"""Which files of a project go to a server: what git tracks or does not ignore, without what no server should have.

Where there is no git, the rules of the `.gitignore` files hold as git would read them. Names are as the file system has
them: bytes that are no UTF-8 are kept (`os.fsdecode`). What would be another thing over there than it is here (a link
out of the project, a submodule that is not checked out) is refused, all of it at once.
"""

import os
import posixpath
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pathspec

from tako_runtime.errors import Refused, TakoError

#: Never sent, tracked or not, as gitignore patterns; and every folder with a `pyvenv.cfg`, which is a virtual
#: environment.
NEVER = (
    ".git", ".tako", ".env*", ".venv", "__pycache__", "*.pyc", ".pytest_cache", ".mypy_cache", ".ruff_cache",
    ".hypothesis", ".tox", ".nox", ".ipynb_checkpoints", ".DS_Store",
)  # fmt: skip

#: How many names an error or a note has.
_NAMED = 5

_GITLINK = b"160000"

#: What a hook of git's has in its environment, and would lead into another repository.
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its path in the project, and what a release keeps of it."""

    path: str
    size: int
    executable: bool = False
    link: str | None = None  # where a symbolic link points


@dataclass(frozen=True, slots=True)
class Tree:
    """The files, sorted by their bytes. `commit` is the one that is checked out, None without git; `missing` says that
    a tracked file is gone, and `left_out` has what git tracks and no server gets."""

    root: Path
    files: tuple[Entry, ...]
    commit: str | None = None
    missing: bool = False
    left_out: tuple[str, ...] = ()
    submodules: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


def look(root: Path) -> Tree:
    """The files of the project in `root`. Raises `Refused` for what cannot be sent as it is."""
    listing = _Listing(root)
    if _is_repository(root):
        listing.by_git("")
        commit = _commit(root)
    else:
        listing.by_walking()
        commit = None
    entries, missing, links = [], False, []
    for path in listing.kept():
        try:
            seen = (root / path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            missing = True
            continue
        if stat.S_ISLNK(seen.st_mode):
            link = os.readlink(root / path)  # noqa: PTH115 -- as it is written
            if _leaves(root, path, link):
                links.append(f"{shown(path)} -> {shown(link)}")
            entries.append(Entry(path, 0, link=link))
        elif stat.S_ISREG(seen.st_mode):
            entries.append(Entry(path, seen.st_size, bool(seen.st_mode & stat.S_IXUSR)))
    if links:
        raise Refused(
            f"symbolic links that would lead out of the release: {some(links)}",
            hint="Make them relative, to something inside the project (ln -sr), or have git ignore them.",
        )
    left_out = tuple(sorted(listing.tracked & listing.never))
    return Tree(root, tuple(entries), commit, missing, left_out, tuple(listing.submodules))


def differs(tree: Tree) -> bool:
    """Whether the files are not what the commit has, right now."""
    if tree.missing or _commit(tree.root) != tree.commit:
        return True
    prefix = len(_git(tree.root, "rev-parse", "--show-prefix").rstrip(b"\n"))
    seen = _git(
        tree.root, "status", "--porcelain", "-z", "-uall", "--no-renames", "--ignore-submodules=none", "--", "."
    )
    ours = {entry.path for entry in tree.files} | set(tree.submodules)
    rule = pathspec.GitIgnoreSpec.from_lines(NEVER)
    for line in seen.split(b"\0")[:-1]:
        path = os.fsdecode(line[3 + prefix :])
        if path in ours or (b"D" in line[:2] and not rule.match_file(path)):
            return True
    return False


def shown(path: str) -> str:
    """A path as a person can read it, on one line."""
    return path if path.isprintable() else ascii(path)[1:-1]


def some(names: Iterable[str]) -> str:
    """The first few of them."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more


# --- what there is ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Listing:
    """Paths in the project, and what was found out about them."""

    root: Path
    paths: set[str] = field(default_factory=set)
    tracked: set[str] = field(default_factory=set)
    never: set[str] = field(default_factory=set)
    submodules: list[str] = field(default_factory=list)

    def kept(self) -> list[str]:
        """Those that are sent, sorted by their bytes."""
        rule = pathspec.GitIgnoreSpec.from_lines(NEVER)
        environments = {path.removesuffix("pyvenv.cfg") for path in self.paths if _name(path) == "pyvenv.cfg"}
        for path in self.paths:
            if rule.match_file(path) or any(folder in environments for folder in _folders(path)):
                self.never.add(path)
        return sorted(self.paths - self.never, key=os.fsencode)

    def by_git(self, below: str) -> None:
        """What git has to say of a repository: the project's own, or a submodule, whose path `below` ends with "/"."""
        folder = self.root / below
        unready, nested = [], []
        for line in _git(folder, "ls-files", "-z", "--stage").split(b"\0")[:-1]:
            facts, _, name = line.partition(b"\t")
            path = below + os.fsdecode(name)
            if facts.startswith(_GITLINK):
                if (self.root / path / ".git").exists():
                    self.submodules.append(path)
                    self.by_git(f"{path}/")
                else:
                    unready.append(path)
                continue
            self.paths.add(path)
            self.tracked.add(path)
        for name in _git(folder, "ls-files", "-z", "--others", "--exclude-standard").split(b"\0")[:-1]:
            path = below + os.fsdecode(name)
            if not path.endswith("/"):
                self.paths.add(path)
            elif not pathspec.GitIgnoreSpec.from_lines(NEVER).match_file(path):
                nested.append(path)
        if unready:
            raise Refused(
                f"submodules that are not checked out: {some(map(shown, unready))}",
                hint="Check them out: git submodule update --init --recursive",
            )
        if nested:
            raise Refused(
                f"a repository of its own is in the project, and no submodule of it: {some(map(shown, nested))}",
                hint="Add it to .gitignore, or make it a submodule: git submodule add URL FOLDER",
            )

    def by_walking(self) -> None:
        """The same without git. What ignores the most deeply has the last word, as in git."""
        rule = pathspec.GitIgnoreSpec.from_lines(NEVER)
        rules: list[tuple[str, pathspec.GitIgnoreSpec]] = []

        def ignored(path: str) -> bool:
            for base, spec in reversed(rules):
                if (verdict := spec.check_file(path[len(base) :]).include) is not None:
                    return verdict
            return False

        def walk(below: str) -> None:
            before = len(rules)
            try:
                text = (self.root / below / ".gitignore").read_text("utf-8", "surrogateescape")
                rules.append((below, pathspec.GitIgnoreSpec.from_lines(text.split("\n"))))
            except OSError:
                pass
            with os.scandir(self.root / below) as found:
                inside = sorted(found, key=lambda each: each.name)
            for each in inside:
                path = below + each.name
                folder = each.is_dir(follow_symlinks=False)
                if rule.match_file(path) or ignored(f"{path}/" if folder else path):
                    continue
                if folder:
                    walk(f"{path}/")
                else:
                    self.paths.add(path)
            del rules[before:]

        walk("")


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _folders(path: str) -> Iterator[str]:
    """The folders around a path, each with its "/"."""
    at = path.find("/")
    while at >= 0:
        yield path[: at + 1]
        at = path.find("/", at + 1)


def _leaves(root: Path, path: str, link: str) -> bool:
    """Whether a link points out of the project, as it is written or by the links on its way."""
    written = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if written.startswith("/") or written.split("/")[0] == "..":
        return True
    top = os.path.realpath(root)
    return os.path.commonpath([top, os.path.realpath(root / path)]) != top


# --- git -------------------------------------------------------------------------------------------------------------


def _is_repository(root: Path) -> bool:
    """Whether git looks after this folder: neither one that is outside of any repository, nor one that the repository
    around it ignores."""
    try:
        asked = _asked(root, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        return False
    if asked.returncode == 0:
        return asked.stdout.strip() == b"true" and _asked(root, "check-ignore", "-q", ".").returncode != 0
    said = asked.stderr.decode(errors="replace").strip()
    if "not a git repository" in said:
        return False
    raise TakoError(f"git cannot say which files are the project's: {said}")


def _commit(root: Path) -> str | None:
    """None where nothing has been committed yet."""
    asked = _asked(root, "rev-parse", "--verify", "-q", "HEAD")
    return asked.stdout.decode().strip() or None


def commit_time(root: Path) -> int:
    """When what is checked out was committed, in seconds."""
    return int(_git(root, "show", "-s", "--format=%ct", "HEAD").split()[-1])


def _git(root: Path, *words: str) -> bytes:
    done = _asked(root, *words)
    if done.returncode:
        raise TakoError(f"git {words[0]} in {root}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _asked(root: Path, *words: str) -> "subprocess.CompletedProcess[bytes]":
    """In the folder's own repository, whatever our environment says."""
    env = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    env |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False, env=env)
