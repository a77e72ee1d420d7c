"""tako store"""

from enum import StrEnum
from typing import Annotated

import typer

from tako_cli import output
from tako_cli.commands import Json

app = typer.Typer(no_args_is_help=True, help="Where runs are kept.")


class Source(StrEnum):
    SQLITE = "sqlite"


class Target(StrEnum):
    POSTGRES = "postgres"


@app.command("copy")
def copy(
    source: Annotated[Source, typer.Option("--from", help="The store to copy.")],
    target: Annotated[Target, typer.Option("--to", help="The store to fill, which must have no runs yet.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Copy and check all of it, and take it back.")] = False,
    as_json: Json = False,
) -> None:
    """Copy all runs, steps, signals and schedules into a database.

    Stop the app first: runs that are in hand are not copied. Each table is read back, and its rows are counted and
    summed up, before anything is kept. The database is that of [storage] url, or of the secret DATABASE_URL.

    Runs and schedules of local workflows stay in this machine's own store; all else leaves it, and a copy of it as it
    was is kept beside it.

    \b
    Examples:
      tako store copy --from sqlite --to postgres --dry-run
      tako store copy --from sqlite --to postgres
    """
    import msgspec

    from tako_cli import context
    from tako_runtime import store
    from tako_runtime.errors import ConfigError
    from tako_runtime.server import alone

    home, config = store.locate(), context.known()
    found = context.manifest(config) if config is not None else None
    if found is not None and found.mistakes:
        context.tell(found.mistakes)
        raise ConfigError("which workflows are local is not known while a file cannot be imported")
    local = [flow.name for flow in found.workflows if flow.local] if found is not None else []
    with alone(home.app_dir, "tako store copy"):
        copied = store.copy(home, local=local, dry_run=dry_run)
    if as_json:
        told = {"copied": copied.tables, "stayed": copied.stayed, "before": str(copied.before or "") or None}
        output.document({**msgspec.to_builtins(told), "dry_run": dry_run})
        return
    cells = [[output.styled(text) for text in (one.table, f"{one.rows:,}", one.checksum)] for one in copied.tables]
    output.show(*output.table(["table", "rows", "checksum"], cells, right={1}))
    if found is None:
        output.note("no project here says which workflows are local: none is taken for one")
    for name, count in copied.stayed.items():
        output.note(f"{count:,} run{'s' * (count != 1)} of {name}, which is local, stay in {home.file}")
    output.note(
        "checked, and taken back: nothing was kept"
        if dry_run
        else f"copied and checked; {copied.before} is the store as it was. "
        'Write url = "postgres" under [storage], and start the app'
    )


@app.command("migrate")
def migrate(
    breaking: Annotated[
        bool, typer.Option("--breaking", help="Also to what older releases of tako cannot work with.")
    ] = False,
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="Whose store; development is here.")] = "development",
    as_json: Json = False,
) -> None:
    """Bring the store to the version of a newer tako.

    The app does so itself when it starts, but for what older releases could not work with: for that, stop the app on
    all its servers first. On a server it is done by the release that was sent there last.

    \b
    Examples:
      tako store migrate --breaking
      tako store migrate --breaking --env production
    """
    from tako_cli import context
    from tako_runtime import store

    if env == context.DEV:
        home = store.locate()
        store.migrate(home, breaking=breaking)
        places = [store.where(home)]
    else:
        places = _migrated_there(env, breaking=breaking)
    if as_json:
        output.document({"stores": places})
        return
    for place in places:
        output.note(f"{place} is up to date")


def _migrated_there(env: str, *, breaking: bool) -> list[str]:
    """On each server, for each may have a store of its own."""
    from tako_cli import context
    from tako_cli.commands.deploy import connected, preflight
    from tako_cli.deploy.plan import migrate
    from tako_runtime.errors import NotFound, Refused

    config, names = context.servers(env)
    remotes = connected(config, names)
    places = []
    facts = preflight(config, env, remotes, as_json=True)
    if running := [one.server for one in facts if one.runs]:
        raise Refused(f"{config.name} runs on {', '.join(running)}", hint=f"Stop it first: tako app stop --env {env}")
    for one in facts:
        ready = [release for release in one.releases if release["ready"]]
        if not ready or one.place is None:
            raise NotFound(f"{one.server}: it has no release", hint=f"Send one: tako deploy --env {env}")
        newest = max(ready, key=lambda release: float(release["at"]))
        said = remotes[one.server].done(migrate(one.place, str(newest["id"]), breaking=breaking).words)
        places.append(f"{one.server}: {said.strip()}")
    return places
