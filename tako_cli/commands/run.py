"""tako run"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tako_cli import output


def run(
    words: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="A program and its arguments, or script.py and its.")
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="An error of tako's own as one JSON document; the rest is the command's.")
    ] = False,
) -> None:
    """Run a command with the project's variables and secrets.

    It has [vars], [vars.development] and the shell's variables, which win, and finds the same store as tako dev.
    tako becomes the command: exit code, signals and terminal are its own.

    A first word that ends in .py is run by tako's own Python. It can import the project's modules, and what it starts
    gets no secrets. In any other command each Python process finds them in tako_runtime's secrets; on macOS only the
    first one that looks. No value is in the environment or on a command line.

    \b
    Examples:
      tako run backfill.py --since 2026-01-01
      tako run -- pytest -x
    """
    from tako_cli import context
    from tako_cli.become import become
    from tako_runtime import store
    from tako_runtime.errors import NotFound

    config = context.project()
    home = store.project_home(config.name, config.root, config.storage.url)
    if words[0].endswith(".py"):
        if not Path(words[0]).is_file():
            raise NotFound(f"no file {words[0]}", hint="A script is looked up from the current folder.")
        words = [sys.executable, "-m", "tako_runtime", "run", *words]
    secrets = context.secrets(config, home)
    if missing := [name for name in config.secrets.required if name not in secrets]:
        output.note(f"not set, though [secrets] requires it: {', '.join(missing)}")
    become(words, context.environment(config, home), secrets)
