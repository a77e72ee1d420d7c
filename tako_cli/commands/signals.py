"""tako signals"""

from typing import Annotated

import typer

from tako_cli import output
from tako_cli.commands import AtEnv, AtServer, Json

app = typer.Typer(no_args_is_help=True, help="Signals: who waits for one, and which ones nobody took.")


@app.command("ls")
def ls(
    limit: Annotated[
        int, typer.Option("--limit", "-n", metavar="N", min=1, max=100_000, help="At most so many of each.")
    ] = 50,
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """List the signals that runs wait for, and those that are kept.

    A kept one was sent while nobody waited for its name. Where a run waits for a name much like it, that is pointed
    out.

    \b
    Examples:
      tako signals ls
      tako signals ls --env production
    """
    from tako_cli import context

    with context.site(env, server) as site:
        found = site.signals(limit + 1)
    more = [kind for kind, listed in found.items() if len(listed) > limit]
    shown = {kind: listed[:limit] for kind, listed in found.items()}
    if as_json:
        output.document({"signals": shown})
        return
    from tako_cli import wording
    from tako_cli.overview import signals

    if shown["waiting"] or shown["kept"]:
        output.show(*signals(shown, wording.now()))
    else:
        output.note("no run waits for a signal, and none is kept")
    if more:
        output.note(f"the first {limit} that are {' and the first that are '.join(more)}; more with --limit")
