"""`python -m tako_cli.reference`: the command reference (`docs/commands.md`), made from the commands' own help.

With `--write docs/commands.md` it is put between the file's markers; a test holds the two together.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tako_cli.app import app

BEGIN, END = "<!-- commands: made by python -m tako_cli.reference -->", "<!-- /commands -->"
WIDTH = 80


def reference() -> str:
    """Markdown: the help of every command, in the order in which `--help` lists them."""
    app.rich_markup_mode = None
    root = typer.main.get_command(app)
    parts = [f"**`{path}`**\n\n```text\n{help_text}\n```" for path, help_text in _helps(root, "tako")]
    return "\n\n".join(parts)


def _helps(command: Any, path: str) -> Iterator[tuple[str, str]]:
    context = command.make_context(path, [], resilient_parsing=True, max_content_width=WIDTH, terminal_width=WIDTH)
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
    for name, one in inner.items():
        yield from _helps(one, f"{path} {name}")


def written(page: str) -> str:
    """The text of a page with the reference put in."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        file = Path(sys.argv[2])
        file.write_text(written(file.read_text("utf-8")), "utf-8")
    else:
        sys.stdout.write(reference() + "\n")
