"""One file per command. Each function here is thin: it reads its words, asks the part that knows, shows the answer."""

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Parallel = Annotated[bool, typer.Option("--parallel", help="All servers at once, instead of one after the other.")]

#: Where a command looks that can look elsewhere too.
AtEnv = Annotated[
    str | None, typer.Option("--env", metavar="ENV", help="On a server of this environment, instead of here.")
]
AtServer = Annotated[str | None, typer.Option("--server", metavar="NAME", help="On this one of its servers.")]
