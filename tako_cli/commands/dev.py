"""tako dev"""

from typing import Annotated

import typer


def dev(
    once: Annotated[
        bool,
        typer.Option("--once", help="Work until no run is queued, running or retrying; 1 if one of them ended dead."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin with an empty store; the old one is put aside.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The log as one JSON object a line.")] = False,
) -> None:
    """Run this project's workflows here, with one log.

    Workers start when there is work. Ctrl-C lets runs reach their next step boundary and stops; a second one stops at
    once. Nothing is lost either way: the next tako dev goes on.

    \b
    Examples:
      tako dev
      tako dev --fresh
    """
    import os

    from tako_cli import context
    from tako_cli.dev.session import develop
    from tako_runtime import store

    config = context.project()
    os.environ.update(context.environment(config, store.project_home(config.name, config.root, config.storage.url)))
    raise typer.Exit(develop(config, context.manifest(config), once=once, fresh=fresh, as_json=as_json))
