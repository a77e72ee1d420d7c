"""tako logs"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tako_cli import output
from tako_cli.commands import AtServer

if TYPE_CHECKING:
    from tako_cli.journal import Line


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Since then: 2h ago, 3d ago, or ISO 8601.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="Of this run: its id, or the beginning or the end of it.")
    ] = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", min=1, max=1_000_000, help="Without --since: the newest N.")
    ] = 100,
    env: Annotated[
        str, typer.Option("--env", metavar="ENV", help="Whose: an environment of tako.toml.")
    ] = "production",
    server: AtServer = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each event as one JSON object a line.")] = False,
) -> None:
    """Show the log of an app on its servers.

    It is what systemd's journal has of it, of every release. The lines of several servers are in the order of their
    times. A connection that breaks is made again.

    \b
    Examples:
      tako logs -f
      tako logs --since 1h --run 9c3fa911
    """
    from collections import deque

    from tako_cli import context, journal, words
    from tako_cli.dev.lines import Lines

    config, names = context.servers(env, server)
    remotes = context.remotes_of(config, names)
    asked = journal.Asked(
        since=None if since is None else words.instant(since, "--since"),
        newest=lines if since is None else None, run=words.name(run),
    )  # fmt: skip
    unread: list[bool] = []
    shown = Lines(Path("/"), [], [], as_json=as_json, lost=lambda: unread.append(True))
    cursors: dict[str, str] = {}

    def show(line: "Line") -> None:
        cursors[line.server] = line.cursor
        event = {**line.event, "server": line.server}
        source = str(event["source"])
        if len(names) > 1 and not as_json:
            source = f"{line.server} {'worker' if source == 'default' else source}"
        shown.show(source, event)
        if unread:
            raise BrokenPipeError

    for remote in remotes:
        remote.connect()
    found = journal.history(config, env, remotes, asked)
    for line in found if since is not None else deque(found, maxlen=lines):
        show(line)
    if follow:
        for line in journal.follow(config, env, remotes, asked, cursors, output.note):
            show(line)
    elif not cursors:
        output.note("nothing is there")
