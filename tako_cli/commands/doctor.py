"""tako doctor"""

from typing import TYPE_CHECKING

import typer

from tako_cli import output
from tako_cli.commands import Json

if TYPE_CHECKING:
    from rich.text import Text

    from tako_cli.doctor import Finding

_STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}

#: Where the name of a check begins, and where what is wrong does.
_NAMES, _INDENT = 9, 22


def doctor(as_json: Json = False) -> None:
    """Say what is wrong here, and how to mend it.

    Nothing is changed, and it may be asked while tako dev runs. Outside a project it looks at the machine only. Ends
    with 1 if something is broken; a warning is no failure.

    \b
    Example:
      tako doctor
    """
    findings = _examined()
    if as_json:
        output.document(
            {"doctor": [{"check": f.check, "ok": f.ok, "message": f.message, "mend": f.mend} for f in findings]}
        )
    else:
        output.show(*(line for finding in findings for line in _lines(finding)))
        counts = {level: sum(finding.level == level for finding in findings) for level in ("broken", "warning")}
        warnings = f"{counts['warning']} warning{'s' * (counts['warning'] != 1)}" if counts["warning"] else ""
        output.note(
            ", ".join(filter(None, [f"{counts['broken']} broken" * bool(counts["broken"]), warnings])) or "well"
        )
    if any(not finding.ok for finding in findings):
        raise typer.Exit(1)


def _examined() -> "list[Finding]":
    from tako_cli.doctor.machine import machine, reading
    from tako_runtime import config

    started, path = reading(), config.find()
    of_project: list[Finding] = []
    deploys = False
    if path is not None:
        from tako_cli.doctor.project import project

        of_project = list(project(path))
        deploys = any(f.check == "tako.toml" and f.ok for f in of_project) and bool(config.load(path).servers)
    return [*machine(started, deploys=deploys), *of_project]


def _lines(finding: "Finding") -> "list[Text]":
    level = output.styled(finding.level.ljust(_NAMES), _STYLES[finding.level])
    head = level.append(finding.check.ljust(_INDENT - _NAMES), "default not bold")
    first, *rest = _wrapped(finding.message, _INDENT)
    lines = [head.append(first, "default not bold"), *(output.styled(" " * _INDENT + line) for line in rest)]
    mend = _wrapped(f"mend: {finding.mend}", _NAMES) if finding.mend else []
    return lines + [output.styled(" " * _NAMES + line, "cyan") for line in mend]


def _wrapped(words: str, indent: int) -> list[str]:
    """As lines; a path or a command longer than one stays whole, to be copied."""
    import textwrap

    room = max(output.width() - indent, 24)
    parts = [textwrap.wrap(one, room, break_long_words=False, break_on_hyphens=False) for one in words.split("\n")]
    return [output.clean(line) for part in parts for line in part]
