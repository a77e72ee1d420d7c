"""tako cron"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import AtEnv, AtServer, Json

if TYPE_CHECKING:
    from rich.text import Text

app = typer.Typer(no_args_is_help=True, help="What schedules start, and when.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The scheduled workflow's name.")]


@app.command("ls")
def ls(env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """List when each schedule fires next, and what it did last.

    Those of local workflows are listed for each server, under its name. Times are shown as in the schedule's own time
    zone, and in UTC. Ends with 1 if a file cannot be imported.

    \b
    Example:
      tako cron ls
    """
    import msgspec

    from tako_cli import context, wording
    from tako_cli.several import timetables
    from tako_runtime import timetable

    with context.site(env, server) as site:
        asked = timetables(site)
        mistakes = list(dict.fromkeys(mistake for _, each in asked for mistake in each.mistakes))
        found = [
            {
                **timetable.standing(one, each.runs, wording.now()),
                "local": one.workflow in each.local,
                **({"server": name} if name else {}),
            }
            for name, each in asked
            for one in each.records
        ]
        found.sort(key=lambda one: str(one["workflow"]) if "server" in one else "")
        if as_json:
            output.document({"schedules": found, "mistakes": msgspec.to_builtins(mistakes)})
        else:
            for one in found:
                output.show(*_standing(one))
            context.tell(mistakes)
            if found:
                context.note_if_nothing_runs(site, "schedules fire while tako dev runs")
                context.note_if_scaled(site)
            elif not mistakes:
                output.note('no workflow has a schedule; one gets it with @workflow(NAME, schedule="0 9 * * *")')
    if mistakes:
        raise typer.Exit(1)


@app.command("next")
def next_(
    name: Name,
    count: Annotated[int, typer.Option("--count", "-n", metavar="N", min=1, max=1000, help="How many times.")] = 5,
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Show when a schedule fires next, in its own time zone and in UTC.

    On the day of a clock change it says what that does to it.

    \b
    Example:
      tako cron next daily-report -n 10
    """
    from tako_cli import context, wording
    from tako_runtime import timetable

    with context.site(env, server) as site:
        one = timetable.choose(site.schedules().records, name)
        times = timetable.upcoming(one, wording.now(), count)
        if as_json:
            output.document({"next": times})
            return
        output.show(_title(one.workflow, one.expression, one.timezone))
        for time in times:
            output.show(*_lines("", _spelled(time)), *([_note(time["note"])] if time["note"] else []))
        context.note_if_scaled(site)


@app.command("fire")
def fire(name: Name, env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """Start a run of a scheduled workflow now, as if this were its time.

    Its schedule stays as it is, and a run of it that is alive holds nothing up.

    \b
    Example:
      tako cron fire daily-report
    """
    from tako_cli import context, wording
    from tako_runtime.control import run_json
    from tako_runtime.errors import NotFound

    with context.site(env, server) as site:
        flow = context.choose(site.manifest(), name)
        if flow.schedule is None:
            hint = f"Start a run of it: tako runs start {flow.name}"
            raise NotFound(f"workflow {flow.name!r} has no schedule", hint=hint)
        run = site.start(flow, "null", scheduled_at=wording.now())
        if as_json:
            output.document({"run": run_json(run)})
            return
        output.text(f"{run.id}  {flow.name}  fired")
        context.note_if_nothing_runs(site, "it goes on when you start tako dev")


# --- what they share -------------------------------------------------------------------------------------------------


def _standing(one: dict[str, Any]) -> "list[Text]":
    from tako_cli import wording

    parts = [
        _title(wording.named(one["workflow"], one["local"], one.get("server")), one["expression"], one["timezone"])
    ]
    now = wording.now()
    if one["error"]:
        parts += _lines("", [one["error"]])
    if one["next"]:
        parts += _lines("next", [*_spelled(one["next"]), wording.distance(one["next"]["at"], now)])
        parts += [_note(one["next"]["note"])] if one["next"]["note"] else []
    if one["overdue"]:
        parts += _lines("due", [*_spelled(one["overdue"]), "and has not fired yet"])
    if one["last"]:
        run = one["last_run"] or {"id": "", "status": None}
        state = (wording.state(run) if run["status"] else "pruned") if run["id"] else ""
        parts += _lines("last", [*_spelled(one["last"]), state, run["id"]])
    usual = {"group": "default", "catchup": "latest", "overlap": "allow"}
    unusual = [f"{key} {one[key]}" for key, value in usual.items() if one[key] != value]
    return [*parts, *(_lines("", unusual) if unusual else [])]


def _title(workflow: str, expression: str, timezone: str) -> "Text":
    return output.styled(output.clean(workflow), "bold").append(
        f"  {output.one_line(expression)}  {output.clean(timezone)}", "not bold cyan"
    )


def _spelled(time: dict[str, Any]) -> list[str]:
    """A time as the schedule's zone shows it and, where that is another, as UTC does."""
    from datetime import UTC, datetime

    local = datetime.fromisoformat(time["local"])
    utc = local.astimezone(UTC)
    clock = "%H:%M:%S" if local.second else "%H:%M"
    if local.utcoffset() == utc.utcoffset():
        return [f"{local:%a %Y-%m-%d {clock}} UTC"]
    day = "" if local.date() == utc.date() else "%Y-%m-%d "
    return [f"{local:%a %Y-%m-%d {clock}} {local.isoformat()[19:]}", f"{utc:{day}{clock}} UTC"]


def _lines(label: str, parts: Sequence[str]) -> "list[Text]":
    """A label and its parts, on as many lines as the terminal makes them take."""
    width = 8 if label else 2
    lines = [""]
    for part in filter(None, parts):
        if lines[-1] and len(lines[-1]) + 2 + len(part) > output.width() - width:
            lines.append("")
        lines[-1] += "  " * bool(lines[-1]) + output.clean(part)
    first = output.styled(f"  {label}".ljust(width), "dim").append(lines[0], "not dim")
    return [first, *(output.styled(" " * width + line) for line in lines[1:])]


def _note(words: str) -> "Text":
    return output.styled(f"      {words}", "yellow")
