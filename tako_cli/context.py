"""Which project, which store, what its workflows declare. Every import that costs time is made where it is needed."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from tako_cli import output

if TYPE_CHECKING:
    from tako_cli.remote import Remote
    from tako_runtime.config import Config
    from tako_runtime.manifest import Declared, Manifest, Mistake
    from tako_runtime.site import Site
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
def site(env: str | None = None, server: str | None = None) -> "Iterator[Site]":
    """The app that a command is about: that of this folder, or, of an environment with servers, the one there. Where
    its servers share a store, the first that can be reached answers for all, but for what is local to the others."""
    from tako_cli import afar
    from tako_cli.remote import Unreachable
    from tako_cli.several import Several

    if env in (None, DEV):
        if server is not None:
            raise typer.BadParameter("say of which environment: --env ENV", param_hint="'--server'")
        with here() as found:
            yield found
        return
    config, names = servers(str(env), server)
    remotes = remotes_of(config, names)
    if len(remotes) > 1 and config.storage.url == "sqlite":
        with _each(config, str(env), remotes) as sites:
            yield cast("Site", Several(sites, shared=False))
        return
    for remote in remotes:
        try:
            remote.connect()
            break
        except Unreachable as error:
            if remote is remotes[-1]:
                raise
            output.note(f"{error}; asks the next one")
    with afar.site(config, str(env), remote) as found:
        others = remotes[remotes.index(remote) + 1 :]
        if others and any(flow.local for flow in found.manifest().workflows):
            with _each(config, str(env), others, least=0) as sites:
                yield cast("Site", Several({remote.name: found, **sites}))
        else:
            yield found


@contextmanager
def _each(config: "Config", env: str, remotes: "Sequence[Remote]", least: int = 1) -> "Iterator[dict[str, Site]]":
    """The app on each of these servers that answers, which are so many at least."""
    from tako_cli import afar
    from tako_runtime.errors import TakoError

    sites: dict[str, Site] = {}
    with ExitStack() as stack:
        for at, remote in enumerate(remotes, 1):
            try:
                found = stack.enter_context(afar.site(config, env, remote))
                found.now()  # it answers
                sites[remote.name] = found
            except TakoError as error:
                if at == len(remotes) and len(sites) < least:
                    raise
                output.note(f"{error}; what only {remote.name} has is not looked at")
        yield sites


@contextmanager
def here() -> "Iterator[Site]":
    """The app of this folder's project, or the one that the environment names."""
    from tako_runtime.site import Site

    with opened() as (thread, home), closing(Site(thread, home, lambda: manifest(project()), known())) as site:
        yield site


def servers(env: str, server: str | None = None) -> "tuple[Config, Sequence[str]]":
    """The servers of an environment, or the one of them that is meant. Raises `ConfigError` where there are none."""
    from difflib import get_close_matches

    from tako_runtime.errors import ConfigError

    config = project()
    if env not in config.envs:
        near = get_close_matches(env, config.envs, 1, 0.5)
        known = f"Did you mean {near[0]}?" if near else f"There is: {', '.join(config.envs)}." if config.envs else ""
        how = f'Say where it runs: [envs.{env}] with servers = ["web-1"], and [servers.web-1] with its host.'
        raise ConfigError(f"{config.path}: there is no environment {env!r} with servers", hint=known or how)
    names = config.envs[env].servers
    if server is not None and server not in names:
        raise ConfigError(
            f"{config.path}: {server} is not a server of the environment {env}", hint=f"It has {', '.join(names)}."
        )
    return config, names if server is None else (server,)


def remotes_of(config: "Config", names: "Sequence[str]") -> "list[Remote]":
    """These servers. Where a person is there, ssh may ask."""
    from tako_cli.deploy.facts import connect

    return connect(config, names, asking=output.can_ask())


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


def note_if_nothing_runs(site: "Site", then: str) -> None:
    """Say so where the project's own store has nobody who works on it, and what will be `then`."""
    if site.development and site.who() is None:
        output.note(f"nothing runs here now: {then}")


def note_if_scaled(site: "Site") -> None:
    """Say so where schedules fire sooner than by the clock, whose times are shown."""
    who = site.who() if site.development else None
    if who is not None and who.pace.scale != 1:
        output.note(f"{who.what} runs here: schedules fire sooner than at these times, {who.pace} times as fast")


def how_to_run(site: "Site") -> str:
    """What to do where no supervisor runs."""
    if site.development:
        return "Start one with: tako dev"
    return f"Start it with: tako app start{site.at}" if site.at else "Start the app's service on this server."
