"""tako app"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import AtServer, Json, Parallel, Yes

if TYPE_CHECKING:
    from tako_cli.remote import Remote
    from tako_runtime.config import Config

app = typer.Typer(no_args_is_help=True, help="Stop, start, restart or remove the app on your servers.")

Env = Annotated[str, typer.Option("--env", metavar="ENV", help="Of which environment.")]


@app.command("stop")
def stop(env: Env = "production", server: AtServer = None, parallel: Parallel = False, as_json: Json = False) -> None:
    """Stop the app, until it is started again.

    What is in hand ends or stops at its next step, and goes on after the start. Runs can be enqueued meanwhile.

    \b
    Example:
      tako app stop --server web-1
    """
    _do("stop", "stopped", env, server, parallel=parallel, as_json=as_json)


@app.command("start")
def start(env: Env = "production", server: AtServer = None, parallel: Parallel = False, as_json: Json = False) -> None:
    """Start the app that was stopped.

    \b
    Example:
      tako app start
    """
    _do("start", "started", env, server, parallel=parallel, as_json=as_json)


@app.command("restart")
def restart(
    env: Env = "production", server: AtServer = None, parallel: Parallel = False, as_json: Json = False
) -> None:
    """Stop the app and start it again.

    No connection is refused meanwhile where [app] takes its socket as {fd}.

    \b
    Example:
      tako app restart
    """
    _do("restart", "restarted", env, server, parallel=parallel, as_json=as_json)


@app.command("remove")
def remove(
    env: Env = "production",
    server: AtServer = None,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Keep a copy of the store on the server, or nothing at all.")
    ] = True,
    yes: Yes = False,
    parallel: Parallel = False,
    as_json: Json = False,
) -> None:
    """Take units, releases, secrets and store off the servers.

    It drains first. A copy of the store stays on the server unless told otherwise.

    \b
    Examples:
      tako app remove --env staging
      tako app remove --server web-2 --no-copy --yes
    """
    from tako_cli import context
    from tako_runtime.errors import InvalidValue

    config, names = context.servers(env, server)
    rest = "a copy of its store stays" if copy else "its runs are lost for good"
    if config.storage.url != "sqlite":
        own = "a copy of each server's own store stays" if copy else "local runs are lost for good"
        rest = f"what is in its database stays, and {own}"
    what = f"{config.name} ({env}) from {', '.join(names)}; {rest}"
    if not yes and not output.can_ask():
        raise InvalidValue(f"this would remove {what}, and nobody is here to confirm it", hint="Say --yes.")
    if not yes and not output.confirm(f"Remove {what}?"):
        raise typer.Abort
    _do("remove", "removed", env, server, copy=copy, parallel=parallel, as_json=as_json)


def _do(
    verb: str, done: str, env: str, server: str | None, *, copy: bool = True, parallel: bool, as_json: bool
) -> None:
    """On one server after the other, of which the first that fails stops it; or on all at once."""
    from concurrent.futures import ThreadPoolExecutor

    from tako_cli import context
    from tako_runtime.errors import TakoError

    config, names = context.servers(env, server)
    remotes = context.remotes_of(config, names)
    rows: list[dict[str, Any]] = []
    failed: list[TakoError] = []

    def work(remote: "Remote") -> "dict[str, str] | TakoError":
        output.passing(f"{remote.name}: {verb}")
        try:
            return _carried_out(config, env, remote, verb, copy=copy)
        except TakoError as error:
            return error

    with ThreadPoolExecutor(len(remotes)) as pool:
        for remote, told in zip(remotes, pool.map(work, remotes) if parallel else map(work, remotes), strict=False):
            output.passing("")
            if isinstance(told, TakoError):
                failed.append(told)
                if not parallel:
                    break
                continue
            state = None if verb == "remove" else told.get("state")
            rows.append({"server": remote.name, "release": told["release"], "state": state, "kept": told.get("kept")})
            if not as_json:
                output.text(f"{remote.name}: {config.name} is {done}")
                if told.get("kept"):
                    output.note(f"its store is kept there in {told['kept']}")
    for error in failed[:-1]:
        output.error(str(error), error.hint)
    if failed:
        raise failed[-1]
    if as_json:
        output.document({"servers": rows})


def _carried_out(config: "Config", env: str, remote: "Remote", verb: str, *, copy: bool) -> dict[str, str]:
    import json

    from tako_cli import afar
    from tako_cli.deploy import service
    from tako_cli.deploy.facts import locked
    from tako_runtime import clock
    from tako_runtime.errors import Refused

    remote.connect()
    done = remote.run(service.words(config, env, verb, copy=copy))
    if done.code == 0:
        return service.read(done.out)
    if done.code in (afar.NO_APP, afar.NO_RUNTIME):
        raise afar.explained(config, env, remote, done)
    if done.code == service.LOCKED:
        now = clock.SystemClock().now() / clock.SECOND
        raise Refused(f"{remote.name}: {locked(json.loads(done.out or '{}'), now)}", hint="Wait for it to end.")
    said = done.err.strip() or f"sh ended with {done.code}"
    raise Refused(f"{remote.name}: {said}", hint=f"What it says itself: tako logs --env {env} --server {remote.name}")
