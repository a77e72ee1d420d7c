"""tako status"""

from pathlib import Path

from tako_cli import output
from tako_cli.commands import Json


def status(as_json: Json = False) -> None:
    """Show how the app stands: groups, workers, schedules, runs.

    \b
    Example:
      tako status
    """
    from tako_cli import context
    from tako_runtime import store

    home, config = store.locate(), context.known()
    with context.control() as control:
        found = {"app": home.app, "store": store.where(home), **control.status(config)}
    if as_json:
        output.document({"status": found})
        return
    from tako_cli import wording
    from tako_cli.overview import status as overview

    output.show(*overview(found, wording.now(), Path.cwd()))
    if found["supervisor"] is None:
        output.note(f"no supervisor runs here. {context.how_to_run(home)}")
    elif found["schedules"]:
        context.note_if_scaled(home)
