"""tako deploy"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tako_cli import output
from tako_cli.commands import Json, Parallel, Yes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.text import Text

    from tako_cli.deploy.carry_out import Result
    from tako_cli.deploy.facts import Facts
    from tako_cli.deploy.plan import Plan
    from tako_cli.deploy.release import Release
    from tako_cli.remote import Remote
    from tako_runtime.config import Config

#: So many runs are named that a release does not know all of.
_NAMED = 10

Env = Annotated[str, typer.Option("--env", metavar="ENV", help="Where to: an environment of tako.toml.")]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="Go on with the other servers when one fails, instead of stopping.")
]


def deploy(
    env: Env = "production",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, down to the commands; change nothing.")
    ] = False,
    yes: Yes = False,
    parallel: Parallel = False,
    keep_going: KeepGoing = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the servers that run this release already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put this project on your servers, with no work lost.

    Every server is asked first, and nothing is changed if one of them cannot take it. Then the release is packed, sent
    and installed beside the one that runs, and proves itself there: its workflows load, a worker of each group boots,
    the app answers, all for some seconds. Only then does it take over; running steps end, and their runs go on under
    it. A release that fails any of this is not taken, and what ran before runs on.

    \b
    Examples:
      tako deploy
      tako deploy --env staging --dry-run
    """
    from tako_cli import context
    from tako_cli.deploy.carry_out import Result
    from tako_cli.deploy.plan import plan
    from tako_cli.deploy.release import pack

    config, names = context.servers(env)
    refuse_to_share(config, names)
    secrets = _secrets(config, env)
    remotes = connected(config, names)
    facts = preflight(config, env, remotes, as_json=as_json, keep_going=keep_going, secrets=secrets or {})
    left_out = [name for name in names if name not in [one.server for one in facts]]
    output.passing("packs the release")
    release = pack(config, env, [one.target for one in facts if one.target], secrets=secrets)
    for remark in release.notes:
        note(remark)
    if resume:
        facts = [one for one in facts if not (one.current == release.id and one.runs_current)]
    plans = [plan(config, release, one, secrets=secrets, by=_by(release)) for one in facts]
    if dry_run:
        _show_plans(release, plans, as_json=as_json)
        return
    note(f"release {release.id}: {release.files} files, {_size(release.size)}")
    results = carried_out(plans, remotes, yes=yes, parallel=parallel, keep_going=keep_going)
    results += [Result(name, release.id, error="it could not be asked, or was not fit") for name in left_out]
    finish(results, as_json=as_json)


# --- before anything is changed --------------------------------------------------------------------------------------


def refuse_to_share(config: "Config", names: "Sequence[str]") -> None:
    """Several servers cannot share a SQLite file."""
    from tako_runtime.errors import Refused

    if len(names) < 2 or config.storage.url != "sqlite":
        return
    from tako_cli import context
    from tako_cli.deploy.plan import to_be_shared

    if shared := to_be_shared(config, names, context.manifest(config)):
        those = f"{', '.join(shared[:_NAMED])}{' and others' * (len(shared) > _NAMED)}"
        raise Refused(
            f"{len(names)} servers cannot share one SQLite file, and not every workflow is local: {those}",
            hint='Keep the runs in Postgres ([storage] url = "postgres"), or say of every workflow that its runs stay '
            "on the server that started them: @workflow(NAME, local=True).",
        )


def connected(config: "Config", names: "Sequence[str]") -> "dict[str, Remote]":
    from tako_cli.deploy.facts import connect

    return {remote.name: remote for remote in connect(config, names, asking=output.can_ask())}


def preflight(
    config: "Config",
    env: str,
    remotes: "Mapping[str, Remote]",
    *,
    as_json: bool,
    keep_going: bool = False,
    sends: bool = True,
    secrets: "Mapping[str, str] | None" = None,
) -> "list[Facts]":
    """What every server answers, with `secrets` also of the shared store (`ask_all`). Raises `Refused` where one cannot
    take it, after a table of all; those that can are enough with `keep_going`. Where nothing is sent, whoever answers
    can."""
    from tako_cli.deploy.facts import ask_all
    from tako_runtime.errors import Refused

    output.passing(f"asks {', '.join(remotes)}")
    facts = ask_all(config, env, list(remotes.values()), secrets=secrets)
    output.passing("")
    bad = [one for one in facts if (one.problems if sends else one.place is None)]
    if not bad:
        return facts
    good = [one for one in facts if one not in bad]
    if not as_json:
        output.show(*table(facts))
    message = "\n".join(f"{one.server}: {problem}" for one in bad for problem in one.problems)
    hints = "\n".join(dict.fromkeys(hint for one in bad for hint in one.hints if hint))
    if not (keep_going and good):
        raise Refused(f"{message}\nNothing was changed.", hint=hints)
    note(message)
    return good


def table(facts: "Sequence[Facts]") -> "list[Text]":
    rows = []
    for one in facts:
        answer = one.answer
        free = f"{min(answer['free'], answer['free_data']) >> 20} MiB" if answer.get("free") else "-"
        python = answer["python"][1] if answer.get("python") else "-"
        rows.append(
            [one.server, python or "-", str(answer.get("systemd") or "-"), free, one.current or "-",
             "; ".join(output.one_line(problem) for problem in one.problems) or "ready"]
        )  # fmt: skip
    return output.table(["server", "python", "systemd", "free", "release", ""], rows, flexible=[5, 4])


def _secrets(config: "Config", env: str) -> "dict[str, str] | None":
    """Those of the environment; None where nobody has ever kept one here. Raises where a required one is missing."""
    from tako_cli.vault import Vault
    from tako_runtime.errors import ConfigError

    vault = Vault(config.root, env)
    given = vault.reveal()
    if missing := [name for name in config.secrets.required if name not in given]:
        raise ConfigError(
            f"required secrets that are not set for {env}: {', '.join(missing)}",
            hint=f"Nothing was sent. Set them: tako secrets set {missing[0]} --env {env}",
        )
    return given if vault.file.exists() else None


def _by(release: "Release") -> "dict[str, Any]":
    import getpass
    import socket

    from tako_cli.deploy.facts import schema
    from tako_runtime import clock

    when = clock.iso(clock.SystemClock().now())
    return {
        "by": f"{getpass.getuser()}@{socket.gethostname()}",
        "when": when,
        "schema": schema(),
        "dirty": release.dirty,
    }


def _show_plans(release: "Release", plans: "Sequence[Plan]", *, as_json: bool) -> None:
    if as_json:
        steps = [
            {"server": plan.server, "release": plan.release,
             "steps": [{"name": step.name, "title": step.title, "command": step.text} for step in plan.steps]}
            for plan in plans
        ]  # fmt: skip
        output.document({"release": release.id, "plan": steps})
        return
    for plan in plans:
        output.text(f"{plan.server}: release {plan.release}")
        for number, step in enumerate(plan.steps, 1):
            output.text(f"  {number}. {step.title}")
            output.text("\n".join(f"     {line}" for line in step.text.strip().splitlines()))
    output.note("nothing was changed")


# --- carrying it out -------------------------------------------------------------------------------------------------


def carried_out(
    plans: "Sequence[Plan]", remotes: "Mapping[str, Remote]", *, yes: bool, parallel: bool, keep_going: bool
) -> "list[Result]":
    """Do it, and tell of each step."""
    from tako_cli.deploy.carry_out import Carrier

    width = max((len(plan.server) for plan in plans), default=0)

    def tell(server: str, what: str, seconds: float | None) -> None:
        if seconds is None:
            output.passing(f"{server:<{width}}  {what}")
        else:
            note(f"{server:<{width}}  {what:<36}{seconds:6.1f} s")

    carrier = Carrier(plans, remotes, tell, parallel=parallel, keep_going=keep_going)
    return carrier.carry_out(_asking(yes))


def _asking(yes: bool) -> "Callable[[Mapping[str, Mapping[str, Any]]], bool]":
    """Say what the release does not know of what is there; whether to go on."""
    from tako_runtime.errors import Refused

    def go_on(unfit: "Mapping[str, Mapping[str, Any]]") -> bool:
        strange, more = [], 0
        for server, found in _together(unfit):
            if found["orphaned"]:
                named = ", ".join(f"{flow}: {count}" for flow, count in found["orphaned"].items())
                count = sum(found["orphaned"].values())
                note(f"{server}: orphaned: {count} ({named}). They are kept until a release has their workflow again.")
            for flow, count in found["elsewhere"].items():
                note(
                    f"{server}: {count} live run{'s' * (count != 1)} of {flow} {'are' if count != 1 else 'is'} in the "
                    "store that this release has others in (local was changed). They end where they are; new ones go "
                    "into the other store, and a unique_key holds in each."
                )
            if found["unread"]:
                note(f"{server}: {found['unread']} runs may have finished steps that are not in this release: their "
                     "workflows' code computes the names of steps, so only running it would tell")  # fmt: skip
            more += found.get("more", 0)  # an older release, that one goes back to, counts none
            strange += [
                f"{server}: run {run['id']} ({run['workflow']}) has finished {', '.join(run['steps'])}"
                for run in found["strange"]
            ]
        if not strange:
            return True
        note("this release's code does not name steps that parked runs have finished; what took their place will run:")
        for line in strange[:_NAMED]:
            note(f"  {line}")
        if (others := more + len(strange) - _NAMED) > 0:
            note(f"  and {others} more")
        if yes:
            return True
        if not output.can_ask():
            raise Refused(
                "runs would not find their finished steps again", hint="Nothing runs anew yet. --yes goes on."
            )
        return output.confirm("Go on?")

    return go_on


def _together(unfit: "Mapping[str, Mapping[str, Any]]") -> "list[tuple[str, Mapping[str, Any]]]":
    """Servers that share a store have found the same: it is told once."""
    told: list[tuple[str, Mapping[str, Any]]] = []
    for found in unfit.values():
        if all(found != other for _, other in told):
            told.append((", ".join(server for server, other in unfit.items() if other == found), found))
    return told


def finish(results: "Sequence[Result]", *, as_json: bool) -> None:
    """Say how it went; exit code 1 where a server has not got it."""
    from dataclasses import asdict

    output.passing("")
    if as_json:
        output.document({"servers": [asdict(one) for one in results]})
    else:
        if not results:
            output.text("Every server runs this release already.")
        for one in results:
            if one.last_lines:
                note(f"{one.server}: the last lines of what failed:")
                output.lines(one.last_lines)
            if one.draining:
                note(f"{one.server}: {', '.join(one.draining)} still drains: what it has in hand ends, or goes on here")
        output.show(*output.table(["server", "release", "", "time", ""], [_row(one) for one in results], flexible=[4]))
    for one in results:
        if one.state == "failed" and not as_json:
            output.error(f"{one.server}: {one.error.removeprefix(f'{one.server}: ')}", one.hint)
    if any(one.state != "taken" for one in results):
        states = {one.state for one in results}
        if not as_json and "not tried" in states:
            resume = "for the rest, once it is mended: tako deploy --resume"
            note(resume if "taken" in states else "nothing was switched: what ran before runs on")
        raise typer.Exit(1)


def _row(one: "Result") -> list[str]:
    said = one.error.strip().splitlines()
    return [one.server, one.release, one.state, f"{one.seconds:.1f} s", output.one_line(said[-1]) if said else ""]


def note(words: str) -> None:
    """A line that stays."""
    output.passing("")
    output.note(words)


def _size(count: int) -> str:
    from tako_cli.doctor.disk import size

    return size(count)
