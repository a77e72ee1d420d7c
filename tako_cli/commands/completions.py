"""tako completions"""

from enum import StrEnum
from typing import Annotated

import typer

from tako_cli import output
from tako_cli.commands import Json


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completions(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="Which shell.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Print what makes a shell complete tako.

    \b
    Examples:
      tako completions bash > ~/.local/share/bash-completion/completions/tako
      tako completions zsh > ~/.zfunc/_tako
      tako completions fish > ~/.config/fish/completions/tako.fish
    """
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="tako", complete_var="_TAKO_COMPLETE", shell=shell)
    if as_json:
        output.document({"completions": {"shell": shell, "script": script}})
    else:
        output.text(script)
