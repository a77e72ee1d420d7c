"""tako workflows"""

from typing import TYPE_CHECKING

import typer

from tako_cli import output
from tako_cli.commands import AtEnv, AtServer, Json

if TYPE_CHECKING:
    from rich.text import Text

    from tako_runtime.manifest import Declared

app = typer.Typer(no_args_is_help=True, help="What the project's workflows declare.")


@app.command("ls")
def ls(env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """List the workflows.

    Ends with 1 if a file cannot be imported.
    """
    import msgspec

    from tako_cli import context
    from tako_runtime.manifest import spelled

    with context.site(env, server) as site:
        found = site.manifest()
    if as_json:
        flows = [spelled(flow) for flow in found.workflows]
        output.document({"workflows": flows, "mistakes": msgspec.to_builtins(found.mistakes)})
    else:
        if found.workflows:
            output.show(*_table(found.workflows))
        elif not found.mistakes:
            output.note("no workflow is declared yet")
        context.tell(found.mistakes)
    if found.mistakes:
        raise typer.Exit(1)


def _table(flows: "tuple[Declared, ...]") -> "list[Text]":
    from tako_cli import context

    rows: list[list[str | Text]] = []
    for flow in flows:
        schedule = f"{flow.schedule} {flow.timezone or 'UTC'}" if flow.schedule else ""
        payload = "" if flow.payload in (None, "NoneType") else flow.payload or ""
        place = output.styled(context.place(flow.file, flow.line), "dim")
        name = output.styled(flow.name, "bold").append(" (local)" if flow.local else "", "not bold")
        rows.append([name, schedule, flow.group, payload, place])
    return output.table(["WORKFLOW", "SCHEDULE", "GROUP", "PAYLOAD", "FILE"], rows, flexible=[3, 4, 0])
