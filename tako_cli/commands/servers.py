"""tako servers"""

import os
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import Json

if TYPE_CHECKING:
    from rich.text import Text

    from tako_cli.deploy.facts import Facts

app = typer.Typer(no_args_is_help=True, help="Your servers: which there are, and whether they are fit.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="What it is called in tako.toml.")]


@app.command("ls")
def ls(as_json: Json = False) -> None:
    """List the servers of tako.toml.

    \b
    Example:
      tako servers ls
    """
    from tako_cli import context

    config = context.project()
    rows: list[dict[str, Any]] = [
        {"server": name, "host": one.host, "envs": [env for env, told in config.envs.items() if name in told.servers]}
        for name, one in config.servers.items()
    ]
    if as_json:
        output.document({"servers": rows})
    elif rows:
        shown = [[row["server"], row["host"], ", ".join(row["envs"])] for row in rows]
        output.show(*output.table(["SERVER", "HOST", "ENVIRONMENTS"], shown, flexible=[1, 2]))
    else:
        output.note("no server yet; add one: tako servers add web-1 deploy@web-1.example.com")


@app.command("check")
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Only these.", show_default=False)
    ] = None,
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="For which environment.")] = "production",
    as_json: Json = False,
) -> None:
    """Ask the servers whether they can take a deploy; change nothing.

    Ends with 1 if one of them cannot.

    \b
    Examples:
      tako servers check
      tako servers check web-1 --env staging
    """
    from tako_cli import context
    from tako_cli.deploy.facts import ask_all

    config, theirs = context.servers(env)
    for name in names or ():
        context.servers(env, name)
    chosen = [name for name in theirs if not names or name in names]
    output.passing(f"asks {', '.join(chosen)}")
    found = ask_all(config, env, context.remotes_of(config, chosen), secrets={})
    output.passing("")
    if as_json:
        output.document({"servers": [_row(one) for one in found]})
    else:
        output.show(*_table(found))
        for one in found:
            for problem, hint in zip_longest(one.problems, one.hints, fillvalue=""):
                output.error(f"{one.server}: {problem}", hint)
    if any(one.problems for one in found):
        raise typer.Exit(1)


@app.command("add")
def add(
    name: Name,
    host: Annotated[str, typer.Argument(metavar="HOST", help="What ssh is told: deploy@web-1.example.com, an alias.")],
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="In which environment.")] = "production",
    as_json: Json = False,
) -> None:
    """Add a server to tako.toml.

    Your file stays as it is otherwise, comments too.

    \b
    Example:
      tako servers add web-1 deploy@web-1.example.com
    """
    from tako_cli import context, registry

    registry.add(context.project().path, name, host, env)
    if as_json:
        output.document({"server": {"server": name, "host": host, "env": env}})
        return
    output.text(f"{name} ({host}) is a server of {env}.")
    output.note(f"whether it can take a deploy: tako servers check {name} --env {env}")


@app.command("rm")
def rm(name: Name, as_json: Json = False) -> None:
    """Take a server out of tako.toml.

    What runs there runs on: take that down before, with tako app remove.

    \b
    Example:
      tako servers rm web-1
    """
    from tako_cli import context, registry

    emptied = registry.remove(context.project().path, name)
    if as_json:
        output.document({"server": {"server": name, "emptied": emptied}})
        return
    output.text(f"{name} is out of tako.toml.")
    for env in emptied:
        output.note(f"{env} had no other server, and is out too")


@app.command("shell")
def shell(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which one, if there are several.", show_default=False)
    ] = None,
    env: Annotated[str, typer.Option("--env", metavar="ENV", help="Of which environment.")] = "production",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the words of the command, and log in nowhere.")
    ] = False,
) -> None:
    """Log in to a server, with the settings that tako uses.

    \b
    Example:
      tako servers shell web-1
    """
    from tako_cli import context
    from tako_runtime.errors import Refused

    config, names = context.servers(env, name)
    if len(names) > 1:
        raise Refused(f"{env} has several servers", hint=f"Say which: tako servers shell {names[0]}")
    [remote] = context.remotes_of(config, names)
    words = remote.interactive()
    if as_json:
        output.document({"shell": {"server": remote.name, "words": words}})
        return
    remote.connect()
    output.flush()
    os.execvp(words[0], words)  # noqa: S606 -- ssh takes our place


def _row(one: "Facts") -> dict[str, Any]:
    answer = one.answer
    problems = zip_longest(one.problems, one.hints, fillvalue="")
    return {
        "server": one.server, "host": one.host, "ready": not one.problems, "release": one.current or None,
        "python": (answer.get("python") or [None, None])[1], "systemd": answer.get("systemd"),
        "free": min(answer["free"], answer["free_data"]) if answer.get("free") else None,
        "problems": [{"problem": why, "hint": hint} for why, hint in problems],
    }  # fmt: skip


def _table(found: "list[Facts]") -> "list[Text]":
    from tako_cli.commands.deploy import table

    return table(found)
