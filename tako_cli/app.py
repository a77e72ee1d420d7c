"""The command line as a whole, and the one place where an error becomes a message and an exit code.

    0 done    1 failed    2 wrong usage    3 bad configuration    4 not found    130 stopped with Ctrl-C

With `--json`, an error is the one JSON document on stdout: `{"error": {"message", "hint", "code"}}`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer._click.exceptions import NoArgsIsHelpError, UsageError  # typer has no public names for its own copies
from typer.core import TyperGroup

from tako_cli import output
from tako_cli.commands import (
    backup,
    completions,
    config,
    cron,
    deploy,
    dev,
    doctor,
    init,
    logs,
    releases,
    runs,
    secrets,
    servers,
    service,
    signals,
    status,
    store,
    workflows,
)
from tako_cli.commands import run as run_

DONE, FAILED, USAGE, BAD_CONFIG, NOT_FOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130


class InOrder(TyperGroup):
    """The commands in the order in which one meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: name == "completions")


app = typer.Typer(name="tako", cls=InOrder, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command("init")(init.init)
app.command("dev")(dev.dev)
app.command("run", context_settings={"allow_interspersed_args": False})(run_.run)
app.command("status")(status.status)
app.command("logs")(logs.logs)
app.command("deploy")(deploy.deploy)
app.command("rollback")(releases.rollback)
app.add_typer(releases.app, name="releases")
app.add_typer(servers.app, name="servers")
app.add_typer(service.app, name="app")
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.add_typer(runs.app, name="runs")
app.add_typer(signals.app, name="signals")
app.add_typer(workflows.app, name="workflows")
app.add_typer(cron.app, name="cron")
app.add_typer(secrets.app, name="secrets")
app.add_typer(config.app, name="config")
app.add_typer(store.app, name="store")
app.command("doctor")(doctor.doctor)
app.command("completions")(completions.completions)


def _version(wanted: bool) -> None:
    if wanted:
        from tako_runtime import __version__

        output.text(f"tako {__version__}")
        raise typer.Exit


@app.callback()
def tako(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Durable workflows next to your app: scaffold, develop and operate them.

    Begin with tako init, then tako dev in the new folder.
    """


def main() -> None:
    """The console script."""
    if sys.platform == "win32":
        sys.exit("tako runs on Linux and macOS. On Windows, use it inside WSL: https://learn.microsoft.com/windows/wsl")
    code = run(sys.argv[1:])
    sys.exit(code if output.flush() else FAILED)


def run(words: Sequence[str]) -> int:
    """Carry out one command; its exit code. Nothing but the interpreter's own end is raised."""
    output.prepare()
    as_json = "--json" in words[: words.index("--") if "--" in words else None]
    if "_TAKO_COMPLETE" in os.environ:  # a shell asks what could come next
        from typer._completion_classes import completion_init

        completion_init()
    try:
        return _carry_out(words)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "tako"
        return _fail(error.format_message(), f"See {command} --help.", "usage", USAGE, as_json)
    except typer.Abort:  # the end of input where an answer was asked for
        return _fail("nothing was done", "", "aborted", FAILED, as_json)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED
    except Exception as error:  # noqa: BLE001 -- this is the place
        return _explain(error, as_json)


def _carry_out(words: Sequence[str]) -> int:
    try:
        return _command().main(list(words), prog_name="tako", standalone_mode=False) or DONE
    except NoArgsIsHelpError as error:
        output.text(error.format_message())
        return DONE


def _command() -> Any:
    """The tree of commands, whose help is coloured at a terminal and plain elsewhere."""
    coloured = output.stdout_is_terminal()
    app.rich_markup_mode = "rich" if coloured else None
    command = typer.main.get_command(app)
    todo: list[Any] = [command] if coloured else []
    while todo:  # the plain help needs a mark where lines are to be kept; the coloured one would print it
        one = todo.pop()
        first, blank, rest = (one.help or "").partition("\n\n")
        one.help = first + blank + blank * rest.startswith("\b") + rest.replace("\b\n", "")
        todo += getattr(one, "commands", {}).values()
    return command


def _explain(error: Exception, as_json: bool) -> int:
    from tako_runtime.errors import ConfigError, InvalidValue, NotFound, TakoError, TakoUnavailable

    if os.environ.get("TAKO_TRACEBACK"):
        output.traceback(error)
    match error:
        case TakoError():
            codes = {NotFound: NOT_FOUND, ConfigError: BAD_CONFIG, TakoUnavailable: BAD_CONFIG, InvalidValue: USAGE}
            code = next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)
            return _fail(str(error), error.hint, error.code, code, as_json)
        case FileNotFoundError(filename=None) if _folder_is_gone():
            return _fail("the current folder is there no more", "Change to another one.", "system", FAILED, as_json)
        case OSError(strerror=str(reason)):
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{reason}", "", "system", FAILED, as_json)
    hint = "This is a defect of tako. TAKO_TRACEBACK=1 before the command shows where it comes from."
    return _fail(f"{type(error).__name__}: {error}", hint, "internal", FAILED, as_json)


def _folder_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _fail(message: str, hint: str, code: str, exit_code: int, as_json: bool) -> int:
    try:
        if as_json:
            output.document({"error": {"message": message, "hint": hint, "code": code}})
            return exit_code
    except BrokenPipeError:
        return FAILED
    except OSError:  # the disk below stdout is full, which may be what the message says
        exit_code = FAILED
    output.error(message, hint)
    return exit_code
