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

    \b
    Examples:
      tako store copy --from sqlite --to postgres --dry-run
      tako store copy --from sqlite --to postgres
    """
    import msgspec

    from tako_runtime import store
    from tako_runtime.server import alone

    home = store.locate()
    with alone(home.app_dir, "tako store copy"):
        moved = store.copy(home, dry_run=dry_run)
    if as_json:
        output.document({"copied": msgspec.to_builtins(moved), "dry_run": dry_run})
        return
    cells = [[output.styled(text) for text in (one.table, f"{one.rows:,}", one.checksum)] for one in moved]
    output.show(*output.table(["table", "rows", "checksum"], cells, right={1}))
    output.note(
        "checked, and taken back: nothing was kept"
        if dry_run
        else 'copied and checked. Write url = "postgres" under [storage], and start the app'
    )


@app.command("migrate")
def migrate(
    breaking: Annotated[
        bool, typer.Option("--breaking", help="Also to what older releases of tako cannot work with.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the store to this tako's version.

    The app does so itself when it starts, but for what is breaking.

    \b
    Example:
      tako store migrate --breaking
    """
    from tako_runtime import store

    home = store.locate()
    store.migrate(home, breaking=breaking)
    if as_json:
        output.document({"store": store.where(home)})
    else:
        output.note(f"{store.where(home)} is up to date")
