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
    process: Annotated[
        bool, typer.Option("--process", help="Workers as in production: each group's own, started when there is work.")
    ] = False,
    time_scale: Annotated[
        float,
        typer.Option("--time-scale", metavar="N", help="Sleeps, waits, retries and schedules pass N times faster."),
    ] = 1,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain lines: no colour, no footer, no keys; as into a file.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Tracebacks whole, with the frames of libraries too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The log as one JSON object a line.")] = False,
) -> None:
    """Run workflows, schedules and app here, with one log.

    What you save is at work at once: runs go on with the new code from their next step on, and the app is started
    again. While a file cannot be imported, the code as it was before goes on. A breakpoint() in a step gets this
    terminal. With --once nothing is watched, and the app is not started.

    Ctrl-C lets runs reach their next step boundary and stops; a second one stops at once. Nothing is lost either way:
    the next tako dev goes on. At a terminal, ? shows the keys.

    \b
    Examples:
      tako dev
      tako dev --fresh
      tako dev --port 8001
      tako dev --time-scale 3600
      tako dev --once --json
    """
    import os
    from dataclasses import replace

    from tako_cli import context, output
    from tako_cli.dev.session import Options, develop
    from tako_runtime import clock, store
    from tako_runtime.config import Config

    def read() -> Config:
        config = context.project()
        if config.app is None or no_app or once:
            return replace(config, app=None)
        return replace(config, app=replace(config.app, port=port or config.app.port))

    pace = clock.Pace(time_scale)
    config = read()
    if port is not None and config.app is None:
        why = "it goes with neither --no-app nor --once" if no_app or once else "tako.toml has no [app]"
        raise typer.BadParameter(f"there is no app to start: {why}", param_hint="'--port'")
    shell = dict(os.environ)
    os.environ.update(context.environment(config, store.project_home(config.name, config.root, config.storage.url)))
    if plain:
        output.be_plain()
    options = Options(
        read, shell, once=once, fresh=fresh, process=process, plain=plain, verbose=verbose, as_json=as_json, pace=pace
    )
    raise typer.Exit(develop(config, context.manifest(config), options))
