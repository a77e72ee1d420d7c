"""tako config"""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from tako_cli import output
from tako_cli.commands import Json

if TYPE_CHECKING:
    from rich.text import Text

#: So wide are the names of keys.
_NAMES = 18

app = typer.Typer(no_args_is_help=True, help="What tako.toml says.")


@app.command("show")
def show(
    env: Annotated[str | None, typer.Option("--env", metavar="NAME", help="With this environment's variables.")] = None,
    server: Annotated[str | None, typer.Option("--server", metavar="NAME", help="As it holds on this server.")] = None,
    as_json: Json = False,
) -> None:
    """Show every value that holds, and where it comes from.

    \b
    Examples:
      tako config show
      tako config show --env production --server web-1
    """
    from tako_cli import context

    rows = context.project().explain(env, server)
    if as_json:
        output.document({"config": [{"key": key, "value": value, "source": source} for key, value, source in rows]})
    else:
        output.show(*_tables(rows))


@app.command("example")
def example(as_json: Json = False) -> None:
    """Print a tako.toml with every key, each explained.

    \b
    Example:
      tako config example > tako.toml
    """
    from importlib import resources

    text = resources.files("tako_runtime").joinpath("example.toml").read_text("utf-8")
    if as_json:
        output.document({"example": text})
    else:
        output.text(text)


def _tables(rows: "list[tuple[str, object, str]]") -> "list[Text]":
    """The values as the file would have them, under the table that each belongs to."""
    lines: list[Text] = []
    for section, inner in groupby(rows, key=lambda row: row[0].rpartition(".")[0]):
        lines += [output.styled(f"\n[{section}]", "bold")] if section else []
        shown = [
            (f"{key.rpartition('.')[2]:<{_NAMES}}{_written(value)}", source.removesuffix(f" [{section}]"))
            for key, value, source in inner
        ]
        room = [(len(stated) + 2, len(source)) for stated, source in shown]
        column = max((start for start, length in room if start + length <= output.width()), default=0)
        for stated, source in shown:
            fits = len(stated) + 2 <= column and column + len(source) <= output.width()
            between = " " * (column - len(stated)) if fits else "\n" + " " * _NAMES
            lines.append(output.styled(stated).append(between).append(source, "dim"))
    return lines


def _written(value: object) -> str:
    import json

    return "unset" if value is None else output.clean(json.dumps(value, ensure_ascii=False))
