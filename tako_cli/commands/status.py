"""tako status"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tako_cli import output
from tako_cli.commands import AtEnv, AtServer, Json

if TYPE_CHECKING:
    from tako_runtime.site import Site


def status(env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """Show how the app stands: groups, workers, schedules, runs.

    Of an environment with several servers each is asked; ends with 1 if one does not answer.

    \b
    Examples:
      tako status
      tako status --env production
    """
    from tako_cli import context

    if env not in (None, context.DEV) and len(context.servers(str(env), server)[1]) > 1:
        _of_all(str(env), as_json=as_json)
        return
    with context.site(env, server) as site:
        found = site.status()
        if as_json:
            output.document({"status": found})
        else:
            _show(site, found)


def _of_all(env: str, *, as_json: bool) -> None:
    """One after the other; who does not answer holds nobody up."""
    from tako_cli import afar, context
    from tako_runtime.errors import TakoError

    config, names = context.servers(env)
    rows: list[dict[str, Any]] = []
    for remote in context.remotes_of(config, names):
        if not as_json:
            output.show(output.styled("" if remote.name == names[0] else "\n").append(remote.name, "bold underline"))
        try:
            with afar.site(config, env, remote) as site:
                rows.append({"server": remote.name, "status": site.status(), "error": None})
                if not as_json:
                    _show(site, rows[-1]["status"])
        except TakoError as error:
            said = {"message": str(error), "hint": error.hint, "code": error.code}
            rows.append({"server": remote.name, "status": None, "error": said})
            if not as_json:
                output.error(str(error), error.hint)
    if as_json:
        output.document({"servers": rows})
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


def _show(site: "Site", found: dict[str, Any]) -> None:
    from tako_cli import context, wording
    from tako_cli.overview import status as overview

    output.show(*overview(found, wording.now(), Path.cwd(), site.at))
    if found["supervisor"] is None:
        output.note(f"no supervisor runs {site.where}. {context.how_to_run(site)}")
    elif found["schedules"]:
        context.note_if_scaled(site)
