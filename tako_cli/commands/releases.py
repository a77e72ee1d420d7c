"""tako releases, tako rollback"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import Json, Parallel, Yes
from tako_cli.commands.deploy import (
    Env,
    KeepGoing,
    carried_out,
    connected,
    finish,
    preflight,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tako_cli.deploy.facts import Facts

app = typer.Typer(no_args_is_help=True, help="What was deployed to your servers.")


@app.command("ls")
def ls(env: Env = "production", as_json: Json = False) -> None:
    """List the releases that each server has, the newest first.

    \b
    Example:
      tako releases ls
    """
    from tako_cli import context

    config, names = context.servers(env)
    facts = preflight(config, env, connected(config, names), as_json=as_json, keep_going=True, sends=False)
    rows = [row for one in facts for row in _rows(one)]
    if as_json:
        output.document({"releases": rows})
        return
    shown = [
        [row["server"], row["release"], row["state"], _short(str(row["when"] or "")), str(row["by"] or "")]
        for row in rows
    ]
    output.show(*output.table(["server", "release", "", "deployed", "by"], shown, flexible=[4, 1]))


def rollback(
    release: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Which one; else the one before.", show_default=False)
    ] = None,
    env: Env = "production",
    yes: Yes = False,
    parallel: Parallel = False,
    keep_going: KeepGoing = False,
    as_json: Json = False,
) -> None:
    """Go back to an earlier release, within seconds.

    Nothing is packed, sent or installed: every server has to have it. It proves itself as at a deploy, and takes over
    in the same way. Runs that only the newer code knows are told of first.

    \b
    Examples:
      tako rollback
      tako rollback 3f2a91c04b7e --env staging
    """
    from tako_cli import context
    from tako_cli.deploy.plan import back
    from tako_runtime.errors import Refused

    config, names = context.servers(env)
    remotes = connected(config, names)
    facts = preflight(config, env, remotes, as_json=as_json, sends=False)
    wanted = {one.server: _chosen(one, release) for one in facts}
    if release is None and len(set(wanted.values())) > 1:
        raise Refused(
            "the servers do not have the same release before the one that runs: "
            + ", ".join(f"{server}: {name}" for server, name in wanted.items()),
            hint=f"Say which: tako rollback {next(iter(wanted.values()))} --env {env}",
        )
    plans = [back(config, one, wanted[one.server]) for one in facts]
    finish(carried_out(plans, remotes, yes=yes, parallel=parallel, keep_going=keep_going), as_json=as_json)


def _chosen(facts: "Facts", release: str | None) -> str:
    """The release that is meant, on one server. Raises where it does not have it, or could not use it."""
    from tako_runtime.errors import NotFound, Refused

    ready = [str(one["id"]) for one in facts.releases if one["ready"]]
    wanted = release or facts.previous
    found = [name for name in ready if name == wanted] or [name for name in ready if wanted and name.startswith(wanted)]
    if not wanted or not found:
        what = f"has no release {wanted}" if wanted else "has no release before the one that runs"
        there = ", ".join(name for name in ready if name != facts.current)
        raise NotFound(f"{facts.server}: it {what}", hint=f"It has {there}." if there else "Deploy one: tako deploy")
    if len(found) > 1:
        raise Refused(f"{facts.server}: {wanted} is the beginning of several: {', '.join(found)}")
    known = facts.known(found[0])
    schema, needed = (facts.answer.get("schema") or 0), int((known or {}).get("schema") or 0)
    if needed and schema > needed:
        raise Refused(
            f"{facts.server}: {found[0]} cannot open the store any more: it is for a newer tako",
            hint="Deploy what it had with the tako of today: check that commit out, and tako deploy.",
        )
    return found[0]


def _short(when: str) -> str:
    """A time to the minute, in UTC as it was written.

    >>> _short("2026-11-25T08:26:43.297418Z")
    '2026-11-25 08:26'
    """
    return when[:16].replace("T", " ")


def _rows(facts: "Facts") -> "Sequence[dict[str, Any]]":
    rows = []
    for one in sorted(facts.releases, key=lambda one: float(one["at"]), reverse=True):
        name = str(one["id"])
        unit = facts.unit_state(name)
        runs = {"active": "runs", "deactivating": "drains", "activating": "starts"}.get(unit, "")
        state = ("current" if runs == "runs" else f"current, {runs or 'down'}") if name == facts.current else runs
        rows.append(
            {
                "server": facts.server, "release": name, "current": name == facts.current, "unit": unit or None,
                "state": state if one["ready"] else "not finished", "when": one.get("when"), "by": one.get("by"),
                "commit": one.get("commit"),
            }
        )  # fmt: skip
    return rows
