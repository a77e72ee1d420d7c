"""tako backup, tako restore"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tako_cli import output
from tako_cli.commands import AtServer, Json, Yes

if TYPE_CHECKING:
    from tako_cli.remote import Remote
    from tako_runtime.config import Config

Env = Annotated[str, typer.Option("--env", metavar="ENV", help="Of which environment; development is here.")]


def backup(
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; else a name with the time in it.")
    ] = None,
    env: Env = "production",
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Copy an app's store here, while the app runs.

    The copy is of one instant, and is checked before it gets its name. It has all that runs carry: keep it where nobody
    else can read it.

    \b
    Examples:
      tako backup
      tako backup --env staging --output before.db
    """
    from tako_cli import context
    from tako_cli.doctor.disk import size
    from tako_runtime import store
    from tako_runtime.clock import SystemClock, moment
    from tako_runtime.errors import Refused
    from tako_runtime.store.copying import checked

    config = context.project()
    target = to or Path(f"{config.name}-{env}-{moment(SystemClock().now()):%Y%m%d-%H%M%S}.db")
    if target.exists():
        raise Refused(f"{target} is there already", hint="Nothing is overwritten: give another name with --output.")
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        if env == context.DEV:
            store.backup(store.project_home(config.name, config.root, config.storage.url), part)
        else:
            _download(config, env, _the_one(env, server), part)
        found = checked(part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    if as_json:
        output.document({"backup": {"file": str(target), "bytes": found.size, "runs": found.runs}})
    else:
        output.text(f"{target}: {found.runs:,} runs, {size(found.size)}, sound")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy that tako backup has made.")],
    env: Env = "production",
    server: AtServer = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Put a copy of a store back.

    The app has to be stopped. The store that is there is put aside, not deleted. What has happened since the copy was
    made is not known any more: steps that have finished since then run again.

    \b
    Example:
      tako app stop && tako restore before.db && tako app start
    """
    import json

    from tako_cli import afar, context
    from tako_runtime import store
    from tako_runtime.errors import InvalidValue, Refused
    from tako_runtime.store.copying import checked

    config = context.project()
    if config.storage.url != "sqlite":
        raise Refused(
            f"the runs of {config.name} are in a database, not in a file of tako's own",
            hint=f"Stop the app, and restore it with pg_restore: tako backup --env {env} says how it is called.",
        )
    found = checked(file)
    remote = None if env == context.DEV else _the_one(env, server)
    place = remote.name if remote is not None else "this project"
    what = f"{file.name} with {found.runs:,} runs the store of {config.name} on {place}"
    if not yes and not output.can_ask():
        raise InvalidValue(f"this would make {what}, and nobody is here to confirm it", hint="Say --yes.")
    if not yes and not output.confirm(f"Make {what}?"):
        raise typer.Abort
    if remote is None:
        with file.open("rb") as data:
            _, aside = store.restore(store.project_home(config.name, config.root, config.storage.url), data)
        told = {"path": str(config.root / ".tako"), "runs": found.runs, "aside": str(aside.path) if aside else None}
    else:
        remote.connect()
        done = remote.run(afar.there(config, env, afar.runtime("restore")), input=file)
        if done.code == 1:
            message, _, hint = done.err.strip().partition("\n")
            raise Refused(f"{remote.name}: {message}", hint=hint or f"Stop it first: tako app stop --env {env}")
        if done.code != 0:
            raise afar.explained(config, env, remote, done)
        told = dict(json.loads(done.out))
    if as_json:
        output.document({"restored": {"server": remote.name if remote else None, **told}})
        return
    output.text(f"{place}: the store has {told['runs']:,} runs now")
    if told["aside"]:
        output.note(f"the one before is in {told['aside']}")


def _download(config: "Config", env: str, remote: "Remote", part: Path) -> None:
    from tako_cli import afar
    from tako_cli.remote import CommandFailed
    from tako_runtime.errors import Refused

    remote.connect()
    with part.open("wb") as file:
        part.chmod(0o600)
        try:
            remote.download(afar.there(config, env, afar.runtime("backup")), file)
        except CommandFailed as error:
            if error.done.code == 1:
                message, _, hint = error.done.err.strip().partition("\n")
                raise Refused(f"{remote.name}: {message}", hint=hint) from None
            raise afar.explained(config, env, remote, error.done) from None


def _the_one(env: str, server: str | None) -> "Remote":
    """The server whose store is meant."""
    from tako_cli import context
    from tako_runtime.errors import Refused

    config, names = context.servers(env, server)
    if len(names) > 1 and config.storage.url == "sqlite":
        raise Refused(f"each server of {env} has a store of its own", hint=f"Say which: --server {names[0]}")
    return context.remotes_of(config, names)[0]
