"""tako runs"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import Json, Yes

if TYPE_CHECKING:
    from tako_runtime.control import Control

app = typer.Typer(no_args_is_help=True, help="List, show, start, retry, signal and cancel runs.")

Id = Annotated[str, typer.Argument(metavar="ID", help="A run's id, or the beginning of it.")]
Payload = Annotated[
    str, typer.Option("--payload", "-p", metavar="JSON", help="JSON; @FILE reads a file, - reads standard input.")
]
Status = Annotated[
    list[str] | None,
    typer.Option(
        "--status", "-s", metavar="STATUS", help="pending, running, succeeded, cancelled, dead; or why it is pending: "
        "queued, retrying, sleeping, waiting. Several: dead,cancelled.",
    ),
]  # fmt: skip
OfWorkflow = Annotated[str | None, typer.Option("--workflow", "-w", metavar="NAME", help="Of this workflow only.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Created since then: 2h ago, 3d ago, or ISO 8601.")
]

#: How many runs a bulk operation looks at, and a filter that the store does not have.
_ALL = 1_000_000


@app.command("ls")
def ls(
    status: Status = None,
    workflow: OfWorkflow = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, max=_ALL, help="At most so many.")] = 50,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    \b
    Examples:
      tako runs ls --status dead --since 2h
      tako runs ls --workflow fulfill-order --status waiting,sleeping
    """
    from tako_cli import context

    with context.control() as control:
        runs = _listed(control, status, workflow, since, limit + 1)
    shown = runs[:limit]
    if as_json:
        output.document({"runs": shown})
        return
    from tako_cli import wording
    from tako_cli.timeline import runs_table

    if shown:
        output.show(*runs_table(shown, wording.now()))
    else:
        filtered = status or workflow or since
        output.note("no run matches" if filtered else "no runs yet; start one: tako runs start NAME")
    if len(runs) > limit:
        output.note(f"the newest {limit}; more with --limit")


@app.command("show")
def show(run: Id, as_json: Json = False) -> None:
    """Show one run: steps, attempts, errors, what it waits for.

    \b
    Example:
      tako runs show 0199a3b2-1c4d
    """
    from tako_cli import context

    with context.control() as control:
        found = control.find(run)
        shown = control.show(found.id)
    if as_json:
        output.document({"run": shown})
        return
    from tako_cli import wording
    from tako_cli.timeline import timeline
    from tako_runtime import inflight, store

    place = inflight.last_seen(store.locate().app_dir, found.worker).get(found.seq, "") if found.worker else ""
    output.show(*timeline(shown, wording.now(), Path.cwd(), place))


@app.command("start")
def start(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The workflow's name.")],
    payload: Payload = "null",
    delay: Annotated[str | None, typer.Option("--in", metavar="TIME", help="Not now, but in 5m, 1h30m, 3d.")] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", "-k", metavar="KEY", help="While a run with this key is alive, start no second one."),
    ] = None,
    priority: Annotated[int, typer.Option("--priority", metavar="N", help="A higher one is taken first.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end; exit with 1 unless it succeeds.")] = False,
    as_json: Json = False,
) -> None:
    """Start a run.

    \b
    Examples:
      tako runs start fulfill-order --payload @order.json
      tako runs start fulfill-order --payload '{"id": 42}' --key order:42 --wait
      tako runs start daily-report --in 5m
    """
    from tako_cli import context, wording
    from tako_runtime import clock, store
    from tako_runtime.control import run_json

    text = _payload(payload)
    micros = clock.duration(delay, "--in") if delay is not None else 0
    flow = context.choose(context.manifest(context.project()), name)
    before = wording.now()
    with context.control() as control:
        if store.in_development() and context.developing(store.locate()) is not None:
            control.refuse_unhealthy(flow.group)
        run = control.start(flow, text, delay=micros, unique_key=key, priority=priority)
        is_new = run.created_at >= before
        if not as_json:
            _say_started(run.id, flow.name, is_new, delay)
        shown = control.wait(run) if wait else run_json(run)
    if as_json:
        output.document({"run": shown, "started": is_new})
    elif wait:
        _say_end(shown)
    if wait and shown["status"] != "succeeded":
        raise typer.Exit(1)


@app.command("retry")
def retry(
    runs: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Ids, or the beginnings of them.")] = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Forget this step and what came after it.")
    ] = None,
    status: Status = None,
    workflow: OfWorkflow = None,
    since: Since = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Let dead or cancelled runs go on.

    Steps that have finished are not run again. A run that waits for its retry is taken up at once.

    \b
    Examples:
      tako runs retry 0199a3b2-1c4d
      tako runs retry 0199a3b2-1c4d --from charge
      tako runs retry --status dead --workflow fulfill-order --since 1d
    """
    from tako_cli import context

    if bool(runs) == bool(status):
        raise typer.BadParameter("give the ids of runs, or --status to choose them", param_hint="'ID...'")
    if runs and (workflow or since):
        raise typer.BadParameter("goes with --status, not with ids", param_hint="'--workflow' / '--since'")
    with context.control() as control:
        if runs:
            ids = [control.find(run).id for run in runs]  # all are looked up before any is changed
        else:
            ids = [run["id"] for run in _listed(control, status, workflow, since, _ALL)]
            if ids:
                of = f" of {workflow}" if workflow else ""
                _confirm(f"{len(ids)} {' or '.join(_words(status))} run{'s' * (len(ids) > 1)}{of}", yes)
        _change(ids, lambda run: control.retry(run, from_step), "goes on", as_json)


@app.command("signal")
def signal(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The signal's name, as in step.wait_for(NAME).")],
    payload: Payload = "null",
    as_json: Json = False,
) -> None:
    """Send a signal to the runs that wait for it.

    Where none does, it is kept, for the first that will.

    \b
    Example:
      tako runs signal approval:42 --payload '{"approved": true}'
    """
    from tako_cli import context

    text = _payload(payload)
    with context.control() as control:
        woken = control.signal(name, text)
    if as_json:
        output.document({"signal": {"name": name, "woken": woken, "kept": not woken}})
    elif woken:
        output.text(f"{name} woke {woken} run{'s' if woken > 1 else ''}")
    else:
        output.text(f"nobody waits for {name}: it is kept for 7 days, for the first who does")


@app.command("cancel")
def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or the beginnings of them.")],
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept with the run.")
    ] = "cancelled by an operator",
    as_json: Json = False,
) -> None:
    """Cancel runs.

    A pending one ends now, a running one at its next step.

    \b
    Example:
      tako runs cancel 0199a3b2-1c4d --reason "ordered twice"
    """
    from tako_cli import context

    with context.control() as control:
        ids = [control.find(run).id for run in runs]
        _change(ids, lambda run: control.cancel(run, reason), "cancelled", as_json)


# --- what they share -------------------------------------------------------------------------------------------------


def _words(status: list[str] | None) -> list[str]:
    return [word.strip() for words in status or () for word in words.split(",") if word.strip()]


def _listed(
    control: "Control", status: list[str] | None, workflow: str | None, since: str | None, limit: int
) -> list[dict[str, Any]]:
    """The runs that the filters of the command line choose."""
    from tako_cli.wording import state
    from tako_runtime.errors import InvalidValue
    from tako_runtime.run import Reason
    from tako_runtime.run import Status as RunStatus

    wanted = _words(status)
    known = [*RunStatus, *Reason]
    if (status and not wanted) or any(word not in known for word in wanted):
        unknown = ", ".join(word for word in wanted if word not in known) or "''"
        raise InvalidValue(f"no such status: {unknown}", hint=f"There is: {', '.join(known)}.")
    reasons = [word for word in wanted if word in list(Reason)]
    statuses = dict.fromkeys("pending" if word in reasons else word for word in wanted)
    found = control.list_runs(
        statuses=list(statuses), workflow=workflow, since=_since(since), limit=_ALL if reasons else limit
    )
    if reasons:
        found = [run for run in found if run["status"] in wanted or state(run) in wanted]
    return found[:limit]


def _since(text: str | None) -> int | None:
    """An instant: so long ago, or a date and time, the local one where it names no zone."""
    from datetime import datetime

    from tako_cli import wording
    from tako_runtime import clock
    from tako_runtime.errors import InvalidValue

    if text is None:
        return None
    try:
        return clock.instant(datetime.fromisoformat(text).astimezone())
    except (ValueError, OverflowError):
        pass
    try:
        return max(0, wording.now() - clock.duration(text.removesuffix("ago").strip(), "--since"))
    except InvalidValue:
        hint = "Write how long ago (90s, 2h, 3d), or a date and time: 2026-11-22T09:00, 2026-11-22T09:00Z."
        raise InvalidValue(f"--since {text!r} names no time", hint=hint) from None


def _payload(text: str) -> str:
    """The payload's JSON from where the option says."""
    from tako_runtime.errors import InvalidValue, NotFound

    try:
        if text == "-":
            return sys.stdin.read()
        if text.startswith("@"):
            return Path(text[1:]).expanduser().read_text("utf-8")
    except FileNotFoundError:
        raise NotFound(f"no file {text[1:]}", hint="@FILE is looked up from the current folder.") from None
    except UnicodeDecodeError:
        raise InvalidValue(f"the payload {text} is not text in UTF-8") from None
    return text


def _confirm(what: str, yes: bool) -> None:
    from tako_runtime.errors import InvalidValue

    if not yes and not output.can_ask():
        raise InvalidValue(f"this would retry {what}, and nobody is here to confirm it", hint="Say --yes.")
    if not yes and not output.confirm(f"Retry {what}?"):
        raise typer.Abort


def _change(ids: list[str], change: Any, done: str, as_json: bool) -> None:
    """Change each run; what one refuses does not hold up the others."""
    from tako_runtime.errors import Refused

    changed, refused = [], []
    for run in dict.fromkeys(ids):
        try:
            changed.append(change(run))
        except Refused as error:
            if len(ids) == 1:
                raise
            refused.append({"id": run, "message": str(error), "hint": error.hint})
    if as_json:
        output.document({"runs": changed, "refused": refused})
    else:
        for run in changed:
            word = "is asked to stop at its next step" if run["cancelling"] else done
            output.text(f"{run['id']}  {output.clean(run['workflow'])}  {word}")
        for one in refused:
            output.error(one["message"], one["hint"])
        if not ids:
            output.note("no run matches")
    if refused:
        raise typer.Exit(1)


def _say_started(run: str, workflow: str, is_new: bool, delay: str | None) -> None:
    from tako_cli import context
    from tako_runtime import store

    output.text(f"{run}  {workflow}  {'started' if is_new else 'is alive with this key: no second one was started'}")
    if is_new and delay is not None:
        output.note(f"it is due in {delay}")
    home = store.locate()
    if home.data_dir.name == ".tako" and context.developing(home) is None:
        output.note("nothing runs here now: it goes on when you start tako dev")


def _say_end(run: dict[str, Any]) -> None:
    import json

    from tako_cli import wording

    word = wording.state(run)
    end = (
        output.styled("")
        .append(wording.status(word))
        .append(f" after {wording.took(run['created_at'], run['finished_at'])}")
    )
    if word != "succeeded":
        end.append(f": {output.clean(run['reason'])}")
    output.show(end)
    if run["result"] is not None:
        output.text(output.clean(json.dumps(run["result"], indent=2, ensure_ascii=False)))
