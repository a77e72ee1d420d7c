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
    no_app: Annotated[bool, typer.Option("--no-app", help="Without the app of [app].")] = False,
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", min=1, max=65535, help="Where the app listens, for once.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The log as one JSON object a line.")] = False,
) -> None:
    """Run this project here, with one log: its workflows, its schedules, its app.

    Workers start when there is work; the app of [app] is started at once, and again when it ends, but not with --once.
    Ctrl-C lets runs reach their next step boundary and stops; a second one stops at
    once. Nothing is lost either way: the next tako dev goes on.

    \b
    Examples:
      tako dev
      tako dev --fresh
      tako dev --port 8001
      tako dev --once --json
    """
    import os
    from dataclasses import replace

    from tako_cli import context
    from tako_cli.dev.session import develop
    from tako_runtime import store

    config = context.project()
    if port is not None and (no_app or once or config.app is None):
        why = "tako.toml has no [app]" if config.app is None else "it goes with neither --no-app nor --once"
        raise typer.BadParameter(f"there is no app to start: {why}", param_hint="'--port'")
    if no_app or once:
        config = replace(config, app=None)
    elif port is not None and config.app is not None:
        config = replace(config, app=replace(config.app, port=port))
    os.environ.update(context.environment(config, store.project_home(config.name, config.root)))
    raise typer.Exit(develop(config, context.manifest(config), once=once, fresh=fresh, as_json=as_json))
