"""Which project, which store, what its workflows declare. Every import that costs time is made where it is needed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tako_cli import output

if TYPE_CHECKING:
    from tako_runtime.config import Config
    from tako_runtime.control import Control
    from tako_runtime.manifest import Declared, Manifest, Mistake
    from tako_runtime.store import Home

#: The environment whose variables `tako dev` uses: those of [vars], and over them those of [vars.development].
DEV = "development"


def project() -> "Config":
    """The project around the current folder."""
    from tako_runtime import config
    from tako_runtime.errors import TakoUnavailable

    path = config.find()
    if path is None:
        raise TakoUnavailable(
            f"no tako.toml in {Path.cwd()} or above it",
            hint="Change to your project's folder, or make a project: tako init NAME",
        )
    return config.load(path)


@contextmanager
def control() -> "Iterator[Control]":
    """The operations on the store of this folder's project, or of the app that the environment names."""
    from tako_runtime import store
    from tako_runtime.control import Control

    opened = store.open_store(store.locate())
    try:
        yield Control(opened)
    finally:
        opened.close()


def environment(config: "Config", home: "Home") -> dict[str, str]:
    """What a process of the project's own finds in its environment. The shell's variables win over those of
    tako.toml."""
    return {**config.variables(DEV), **os.environ, **home.environment(), "TAKO_ENV": DEV}


def manifest(config: "Config") -> "Manifest":
    """What the workflows declare, read in a process of its own, so that user code cannot take this one down."""
    from tako_runtime.manifest import read
    from tako_runtime.store import project_home

    return read(config.root, config.workflows.dir, environment(config, project_home(config.name, config.root)))


def tell(mistakes: "Sequence[Mistake]") -> None:
    """Say what is wrong with the workflows, and where."""
    for mistake in mistakes:
        output.error(f"{place(mistake.file, mistake.line)}: {mistake.message}")


def choose(found: "Manifest", name: str) -> "Declared":
    """The declared workflow of that name; `NotFound` with the nearest names, and with the files that could not be
    imported, as it may be in one of them."""
    from tako_runtime.control import choose as choose_declared
    from tako_runtime.errors import NotFound

    try:
        return choose_declared(found.workflows, name)
    except NotFound as error:
        broken = [f"{place(one.file, one.line)}: {one.message}" for one in found.mistakes]
        raise NotFound(str(error), hint="\n".join([error.hint, *broken])) from None


def place(file: str, line: int) -> str:
    """A line of a file as an editor understands it: relative to the current folder where it is below it."""
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"


def developing(home: "Home") -> int | None:
    """The process id of the `tako dev` that runs this app, if one does."""
    try:
        pid = int((home.app_dir / "supervisor.pid").read_text().partition(" ")[0])
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid
