"""Which project, which store, what its workflows declare. Every import that costs time is made where it is needed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tako_cli import output

if TYPE_CHECKING:
    from tako_runtime.config import Config
    from tako_runtime.control import Control
    from tako_runtime.manifest import Declared, Manifest, Mistake
    from tako_runtime.store import Home
    from tako_runtime.store.commit import StoreThread

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
def opened() -> "Iterator[tuple[StoreThread, Home]]":
    """The store of this folder's project, or of the app that the environment names, and where it is."""
    from tako_runtime import store

    home = store.locate()
    thread = store.open_store(home)
    try:
        yield thread, home
    finally:
        thread.close()


@contextmanager
def control() -> "Iterator[Control]":
    """The operations on that store."""
    from tako_runtime.control import Control

    with opened() as (thread, home):
        yield Control(thread, app_dir=home.app_dir)


def environment(config: "Config", home: "Home", shell: "Mapping[str, str] | None" = None) -> dict[str, str]:
    """What a process of the project's own finds in its environment. The shell's variables win over those of
    tako.toml."""
    return {**config.variables(DEV), **(os.environ if shell is None else shell), **home.environment(), "TAKO_ENV": DEV}


def secrets(config: "Config", home: "Home") -> dict[str, str]:
    """What a process of the project's own is given here: the team's secrets of development, and over them this user's
    own from the file beside the store."""
    from tako_cli.vault import reveal

    shared = reveal(config.root, DEV) if is_development(home) else {}
    return {**shared, **own_secrets(home)}


def own_secrets(home: "Home") -> dict[str, str]:
    """Those of the file beside the store."""
    from tako_runtime.secrets import stored

    return stored(home.app_dir)


def manifest(config: "Config") -> "Manifest":
    """What the workflows declare, read in a process of its own, so that user code cannot take this one down."""
    from tako_runtime.manifest import read
    from tako_runtime.store import project_home

    home = project_home(config.name, config.root, config.storage.url)
    return read(config.root, config.workflows.dir, environment(config, home), secrets(config, home))


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
    """A line of a file as an editor understands it: relative to the current folder where it is below it. 0 is none."""
    path = Path(file)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{line}" if line else str(shown)


def known() -> "Config | None":
    """The configuration of the app whose store this folder's commands open, where there is one: an app that only the
    environment names has none here."""
    from tako_runtime import config, store

    path = config.find()
    found = config.load(path) if path is not None else None
    return found if found is not None and found.name == store.locate().app else None


def is_development(home: "Home") -> bool:
    """Whether it is a project's own, which `tako dev` works for, and not a server's."""
    return home.data_dir.name == ".tako"


def note_if_nothing_runs(then: str) -> None:
    """Say so where the project's own store has nobody who works on it, and what will be `then`."""
    from tako_runtime import store
    from tako_runtime.feed import supervising

    home = store.locate()
    if is_development(home) and supervising(home.app_dir) is None:
        output.note(f"nothing runs here now: {then}")


def note_if_scaled(home: "Home") -> None:
    """Say so where schedules fire sooner than by the clock, whose times are shown."""
    from tako_runtime.feed import supervising

    who = supervising(home.app_dir)
    if who is not None and who.pace.scale != 1:
        output.note(f"{who.what} runs here: schedules fire sooner than at these times, {who.pace} times as fast")


def how_to_run(home: "Home") -> str:
    """What to do where no supervisor runs."""
    return "Start one with: tako dev" if is_development(home) else "Start the app's service on this server."
