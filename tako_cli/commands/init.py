"""tako init"""

from pathlib import Path
from typing import Annotated

import typer

from tako_cli import output
from tako_cli.commands import Json, Yes


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The app's name and its folder's; . for this folder.")],
    template: Annotated[
        str,
        typer.Option("--template", "-t", metavar="TEMPLATE", help="A name, or the path of a cookiecutter template."),
    ] = "shop",
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make a new project.

    \b
    Example:
      tako init shop
    """
    from tako_cli.scaffold import scaffold

    app, folder = scaffold(name, template, Path.cwd(), ask=not yes and not as_json and output.can_ask())
    if as_json:
        output.document({"project": {"name": app, "path": str(folder)}})
        return
    steps = [*([] if name == "." else [f"cd {name}"]), "tako dev"]
    output.text("\n".join([f"Made {app} in {folder}. Next:", "", *(f"  {step}" for step in steps)]))
