"""tako runs"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output, words
from tako_cli.commands import AtEnv, AtServer, Json, Yes

if TYPE_CHECKING:
    from tako_runtime.control import Control
    from tako_runtime.run import Run
    from tako_runtime.site import Site

app = typer.Typer(no_args_is_help=True, help="List, show, explain, start, retry, signal, cancel runs.")

Id = Annotated[str, typer.Argument(metavar="ID", help="A run's id, or the beginning or the end of it.")]
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
OfWorkflow = Annotated[
    str | None,
    typer.Option("--workflow", "-w", metavar="NAME", help="Of this workflow only.", callback=words.name),
]
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
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first.

    \b
    Examples:
      tako runs ls --status dead --since 2h
      tako runs ls --workflow fulfill-order --status waiting,sleeping
    """
    from tako_cli import context

    with context.site(env, server) as site:
        runs = _listed(site, status, workflow, since, limit + 1)
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
def show(run: Id, env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """Show one run: steps, attempts, errors, what it waits for.

    \b
    Example:
      tako runs show 9c3fa911
    """
    from tako_cli import context

    with context.site(env, server) as site:
        found = site.find(run)
        shown = site.show(found.id)
        place, folder = ("", Path()) if as_json else (site.place(found), site.folder(found.release))
    if as_json:
        output.document({"run": shown})
        return
    from tako_cli import wording
    from tako_cli.timeline import timeline

    output.show(*timeline(shown, wording.now(), folder, place))


@app.command("why")
def why(run: Id, env: AtEnv = None, server: AtServer = None, as_json: Json = False) -> None:
    """Say in one sentence why a run stands where it stands.

    \b
    Example:
      tako runs why 9c3fa911
    """
    from tako_cli import context

    with context.site(env, server) as site:
        found = site.why(run)
        hint = "" if as_json else _what_to_do(site, found)
    if as_json:
        output.document({"why": found})
        return
    from tako_cli import wording

    output.show(output.styled(output.clean(wording.with_local_times(found["sentence"], wording.now()))))
    if hint:
        output.note(hint)


@app.command("tail")
def tail(
    run: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A run's id, or the beginning or the end of it.")
    ] = None,
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each event as one JSON object a line.")] = False,
) -> None:
    """Follow a run until it ends, or all runs until Ctrl-C.

    What has happened to the run comes first; then each event as it happens, from the supervisor. Where none runs, it is
    what the store has.

    \b
    Examples:
      tako runs tail 9c3fa911
      tako runs tail --json | grep run.dead
    """
    import asyncio

    from tako_cli import context
    from tako_cli.following import show_events

    with context.site(env, server) as site:
        found = site.find(run).id if run is not None else None
        asyncio.run(show_events(site.tail(found), site.root(), as_json=as_json))


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
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Start a run.

    \b
    Examples:
      tako runs start fulfill-order --payload @order.json
      tako runs start fulfill-order --payload '{"id": 42}' --key order:42 --wait
      tako runs start daily-report --in 5m
    """
    from tako_cli import context
    from tako_runtime import clock, store
    from tako_runtime.control import run_json

    text = words.payload(payload)
    micros = clock.duration(delay, "--in") if delay is not None else 0
    with context.site(env, server) as site:
        flow = context.choose(site.manifest(), name)
        if site.development and store.in_development() and site.who() is not None:
            site.refuse_unhealthy(flow.group)
        before = site.now()
        run = site.start(flow, text, delay=micros, unique_key=key, priority=priority)
        is_new = run.created_at >= before
        if not as_json:
            _say_started(site, run, is_new, delay)
        shown = site.wait(run) if wait else run_json(run)
    if as_json:
        output.document({"run": shown, "started": is_new})
    elif wait:
        _say_end(shown)
    if wait and shown["status"] != "succeeded":
        raise typer.Exit(1)


@app.command("retry")
def retry(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="ID...", help="Ids, or the beginnings or ends of them.")
    ] = None,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Forget this step and what came after it.")
    ] = None,
    status: Status = None,
    workflow: OfWorkflow = None,
    since: Since = None,
    yes: Yes = False,
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Let dead or cancelled runs go on.

    Steps that have finished are not run again. A run that waits for its retry is taken up at once.

    \b
    Examples:
      tako runs retry 9c3fa911
      tako runs retry 9c3fa911 --from charge
      tako runs retry --status dead --workflow fulfill-order --since 1d
    """
    from tako_cli import context

    if bool(runs) == bool(status):
        raise typer.BadParameter("give the ids of runs, or --status to choose them", param_hint="'ID...'")
    if runs and (workflow or since):
        raise typer.BadParameter("goes with --status, not with ids", param_hint="'--workflow' / '--since'")
    with context.site(env, server) as site:
        if runs:
            ids = [site.find(run).id for run in runs]  # all are looked up before any is changed
        else:
            ids = [run["id"] for run in _listed(site, status, workflow, since, _ALL)]
            if ids:
                _confirm("retry", _counted(len(ids), words.listed(status), workflow), site, yes)
        _change(ids, lambda run: site.retry(run, from_step), "goes on", as_json)


@app.command("signal")
def signal(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The signal's name, as in step.wait_for(NAME).")],
    payload: Payload = "null",
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Send a signal to the runs that wait for it.

    Where none does, it is kept, for the first that will.

    \b
    Example:
      tako runs signal approval:42 --payload '{"approved": true}'
    """
    from tako_cli import context
    from tako_runtime import clock

    text = words.payload(payload)
    with context.site(env, server) as site:
        woken = site.signal(name, text)
        kept = "" if woken else clock.spell(site.limits().signal_retention)
    if as_json:
        output.document({"signal": {"name": name, "woken": woken, "kept": not woken}})
    elif woken:
        output.text(f"{name} woke {woken} run{'s' if woken > 1 else ''}")
    else:
        output.text(f"nobody waits for {name}: it is kept for {kept}, for the first who does")


@app.command("cancel")
def cancel(
    runs: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or the beginnings or ends of them.")],
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept with the run.")
    ] = "cancelled by an operator",
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Cancel runs.

    A pending one ends now, a running one at its next step.

    \b
    Example:
      tako runs cancel 9c3fa911 --reason "ordered twice"
    """
    from tako_cli import context

    with context.site(env, server) as site:
        ids = [site.find(run).id for run in runs]
        _change(ids, lambda run: site.cancel(run, reason), "cancelled", as_json)


@app.command("prune")
def prune(
    before: Annotated[str, typer.Option("--before", metavar="TIME", help="Ended before then: 30d ago, or ISO 8601.")],
    workflow: OfWorkflow = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            "--status", "-s", metavar="STATUS", help="succeeded, cancelled or dead ones only. Several: dead,cancelled."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many there are, and delete none.")] = False,
    yes: Yes = False,
    env: AtEnv = None,
    server: AtServer = None,
    as_json: Json = False,
) -> None:
    """Delete runs that ended long ago, with their steps.

    Live ones stay, whatever their age. It goes in small batches: nobody has to wait for it. On several servers it
    reaches what each has of its own, too.

    \b
    Examples:
      tako runs prune --before 30d --dry-run
      tako runs prune --before 2026-11-01 --status succeeded --yes
    """
    from tako_cli import context

    moment, statuses = words.instant(before, "--before"), words.listed(status)
    with context.site(env, server) as site:
        count = site.prunable(moment, workflow=workflow, statuses=statuses)
        if count and not dry_run:
            _confirm("delete", _counted(count, statuses, workflow), site, yes)
            count = site.prune(moment, workflow=workflow, statuses=statuses)
        where = f" {site.where}" if site.at else ""
    if as_json:
        output.document({"pruned": {"runs": 0 if dry_run else count, "found": count, "dry_run": dry_run}})
    elif dry_run or not count:
        output.text(f"{_counted(count, statuses, workflow)} ended before then{where}; none deleted")
    else:
        output.text(f"{_counted(count, statuses, workflow)} deleted{where}")


# --- what they share -------------------------------------------------------------------------------------------------


def _listed(
    site: "Control", status: list[str] | None, workflow: str | None, since: str | None, limit: int
) -> list[dict[str, Any]]:
    """The runs that the filters of the command line choose."""
    from tako_cli.wording import state
    from tako_runtime.errors import InvalidValue
    from tako_runtime.run import Reason
    from tako_runtime.run import Status as RunStatus

    wanted = words.listed(status)
    known = [*RunStatus, *Reason]
    if (status and not wanted) or any(word not in known for word in wanted):
        unknown = ", ".join(word for word in wanted if word not in known) or "''"
        raise InvalidValue(f"no such status: {unknown}", hint=f"There is: {', '.join(known)}.")
    reasons = [word for word in wanted if word in list(Reason)]
    statuses = dict.fromkeys("pending" if word in reasons else word for word in wanted)
    found = site.list_runs(
        statuses=list(statuses),
        workflow=workflow,
        since=None if since is None else words.instant(since, "--since"),
        limit=_ALL if reasons else limit,
    )
    if reasons:
        found = [run for run in found if run["status"] in wanted or state(run) in wanted]
    return found[:limit]


def _counted(count: int, statuses: list[str], workflow: str | None) -> str:
    """ "2 dead runs of fail" """
    which = f"{' or '.join(statuses)} " if statuses else ""
    return f"{count:,} {which}run{'s' * (count != 1)}{f' of {workflow}' if workflow else ''}"


def _confirm(verb: str, what: str, site: "Site", yes: bool) -> None:
    from tako_runtime.errors import InvalidValue

    what += f" {site.where}" if site.at else ""
    if not yes and not output.can_ask():
        raise InvalidValue(f"this would {verb} {what}, and nobody is here to confirm it", hint="Say --yes.")
    if not yes and not output.confirm(f"{verb.capitalize()} {what}?"):
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


def _say_started(site: "Site", run: "Run", is_new: bool, delay: str | None) -> None:
    from tako_cli import context
    from tako_runtime import clock, store

    said = "started" if is_new else "is alive with this key: no second one was started"
    output.text(f"{run.id}  {run.workflow}  {said}")
    if is_new and delay is not None:
        pace = store.pace() if site.development else clock.REAL_TIME
        if pace.scale != 1:
            delay = f"{clock.spell((run.due_at or 0) - run.created_at)} ({delay} at time-scale {pace})"
        output.note(f"it is due in {delay}")
    context.note_if_nothing_runs(site, "it goes on when you start tako dev")


def _what_to_do(site: "Site", why: dict[str, Any]) -> str:
    """What a person may do about it, if there is something."""
    import shlex

    from tako_cli import context

    match why["cause"]:
        case "dead" | "cancelled":
            return f"It goes on with: tako runs retry {why['run']}{site.at}"
        case "waiting":
            name = shlex.quote(next(iter(why["signals"]), "NAME"))
            sent = f"What was sent and nobody took: tako signals ls{site.at}"
            return f"Send it with: tako runs signal {name}{site.at}\n{sent}"
        case "no_supervisor" | "lost":
            return context.how_to_run(site)
        case "unhealthy":
            return f"What its workers said last: tako status{site.at}"
    return ""


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
