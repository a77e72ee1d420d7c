"""tako backup, tako restore"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import AtServer, Json, Yes

if TYPE_CHECKING:
    from tako_cli.remote import Remote
    from tako_runtime.config import Config
    from tako_runtime.store import Home

Env = Annotated[str, typer.Option("--env", metavar="ENV", help="Of which environment; development is here.")]
Local = Annotated[
    bool, typer.Option("--local", help="A server's own runs, those of local workflows, beside a database.")
]


def backup(
    to: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; else a name with the time in it.")
    ] = None,
    local: Local = False,
    env: Env = "production",
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Copy an app's store here, while the app runs.

    The copy is of one instant, and is checked before it gets its name. It has all that runs carry: keep it where nobody
    else can read it. Where each server has a store of its own, there is a file for each.

    A database's own tools copy what is in that: this says how they are called. The runs of local workflows are not in
    it, but with each server: --local copies those.

    \b
    Examples:
      tako backup
      tako backup --env staging --output before.db
      tako backup --local
    """
    from tako_cli import context
    from tako_runtime import store
    from tako_runtime.errors import Refused, TakoError

    config = context.project()
    if env == context.DEV:
        home = _here(config, local=local)
        made = _copied(to or _name(config, env), partial(store.backup, home), as_json=as_json)
        if as_json:
            output.document({"backup": made})
        return
    remotes = _whose(env, server, local=local)
    if to is not None and len(remotes) > 1:
        raise Refused(f"each server of {env} has a store of its own", hint="Without --output each gets its own name.")
    rows: list[dict[str, Any]] = []
    for remote in remotes:
        target = to or _name(config, env, remote.name if len(remotes) > 1 or local else "")
        try:
            made = _copied(target, partial(_download, config, env, remote, local), as_json=as_json)
            rows.append({"server": remote.name, "backup": made, "error": None})
        except TakoError as error:
            if len(remotes) == 1:
                raise
            said = {"message": str(error), "hint": error.hint, "code": error.code}
            rows.append({"server": remote.name, "backup": None, "error": said})
            if not as_json:
                output.error(str(error), error.hint)
    if as_json:
        output.document({"servers": rows} if len(remotes) > 1 else {"backup": rows[0]["backup"]})
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A copy that tako backup has made.")],
    local: Local = False,
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
    if config.storage.url != "sqlite" and not local:
        raise Refused(
            f"the runs of {config.name} are in a database, not in a file of tako's own",
            hint=f"Stop the app, and restore it with pg_restore: tako backup --env {env} says how it is called. "
            "A server's runs of local workflows: --local.",
        )
    found = checked(file)
    remote = None if env == context.DEV else _the_one(env, server, local=local)
    place = remote.name if remote is not None else "this project"
    of = f"{config.name}'s local workflows" if local else config.name
    what = f"{file.name} with {found.runs:,} runs the store of {of} on {place}"
    if not yes and not output.can_ask():
        raise InvalidValue(f"this would make {what}, and nobody is here to confirm it", hint="Say --yes.")
    if not yes and not output.confirm(f"Make {what}?"):
        raise typer.Abort
    if remote is None:
        with file.open("rb") as data:
            _, aside = store.restore(_here(config, local=local), data)
        told = {"path": str(config.root / ".tako"), "runs": found.runs, "aside": str(aside.path) if aside else None}
    else:
        remote.connect()
        done = remote.run(afar.there(config, env, _runtime("restore", local)), input=file)
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


def _name(config: "Config", env: str, server: str = "") -> Path:
    from tako_runtime.clock import SystemClock, moment

    words = [config.name, env, *([server] if server else []), f"{moment(SystemClock().now()):%Y%m%d-%H%M%S}"]
    return Path(f"{'-'.join(words)}.db")


def _copied(target: Path, copy: Callable[[Path], None], *, as_json: bool) -> dict[str, Any]:
    """Make a copy with that name, once it is checked."""
    from tako_cli.doctor.disk import size
    from tako_runtime.errors import Refused
    from tako_runtime.store.copying import checked

    if target.exists():
        raise Refused(f"{target} is there already", hint="Nothing is overwritten: give another name with --output.")
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        copy(part)
        found = checked(part)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    if not as_json:
        output.text(f"{target}: {found.runs:,} runs, {size(found.size)}, sound")
    return {"file": str(target), "bytes": found.size, "runs": found.runs}


def _here(config: "Config", *, local: bool) -> "Home":
    from tako_runtime import store

    home = store.project_home(config.name, config.root, config.storage.url)
    return home.embedded() if local else home


def _runtime(command: str, local: bool) -> list[str]:
    from tako_cli import afar

    return afar.runtime(command, *(["--local"] if local else []))


def _download(config: "Config", env: str, remote: "Remote", local: bool, part: Path) -> None:
    from tako_cli import afar
    from tako_cli.remote import CommandFailed
    from tako_runtime.errors import Refused

    remote.connect()
    with part.open("wb") as file:
        part.chmod(0o600)
        try:
            remote.download(afar.there(config, env, _runtime("backup", local)), file)
        except CommandFailed as error:
            if error.done.code == 1:
                message, _, hint = error.done.err.strip().partition("\n")
                raise Refused(f"{remote.name}: {message}", hint=hint) from None
            raise afar.explained(config, env, remote, error.done) from None


def _whose(env: str, server: str | None, *, local: bool) -> "Sequence[Remote]":
    """The servers whose stores are meant; one for the store that they share."""
    from tako_cli import context

    config, names = context.servers(env, server)
    return context.remotes_of(config, names if local or config.storage.url == "sqlite" else names[:1])


def _the_one(env: str, server: str | None, *, local: bool) -> "Remote":
    """The server whose store is meant."""
    from tako_runtime.errors import Refused

    found = _whose(env, server, local=local)
    if len(found) > 1:
        raise Refused(f"each server of {env} has a store of its own", hint=f"Say which: --server {found[0].name}")
    return found[0]
