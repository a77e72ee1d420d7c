"""What a person sees of a whole app: `tako status`, `tako signals ls`. Values of `control.py` in, renderables out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from tako_cli import output, wording
from tako_cli.timeline import short_id
from tako_cli.wording import Json

if TYPE_CHECKING:
    from rich.text import Text

#: How much of a broken worker's last words is shown.
_LAST_LINES = 12


def status(found: Json, now: int, here: Path, at: str = "") -> "list[Text]":
    """The app as it stands, from the outside in. `at` is how a command that is typed next says where."""
    parts = _facts(found, Path(found["store"]), here, now, at)
    parts += [_gap(), *_groups(found["groups"], now)]
    parts += [part for group in found["groups"] for part in _unhealthy(group, now)]
    if found["workers"]:
        parts += [_gap(), *_workers(found["workers"], now)]
    if found["schedules"]:
        parts += [_gap(), *_schedules(found["schedules"], now)]
    return parts


def _facts(found: Json, store: Path, here: Path, now: int, at: str) -> "list[Text]":
    who, dead, kept = found["supervisor"], found["runs"]["dead"], found["signals_kept"]
    own, secrets = found["process"], found["secrets"] or {"unread": False, "old": []}
    old = [f"process {one['pid']} ({one['what']}, {one['release']})" for one in secrets["old"]]
    facts = [
        ("app", found["app"]),
        ("store", str(store.relative_to(here) if store.is_relative_to(here) else store)),
        ("local", found.get("local_store") or ""),
        ("runs by", f"{who['what']}, process {who['pid']}" if who else "nobody"),
        ("process", f"{own['message']} ({wording.age(own['since'], now)} ago)" if own else ""),
        ("secrets", f"old ones in {', '.join(old)}" if old else ""),
        ("secrets", f"changed, and not handed over yet: tako secrets push{at}" if secrets["unread"] else ""),
        ("paused", f"by {found['paused']}: nothing is claimed" if found["paused"] else ""),
        ("runs", ", ".join(f"{n} {word}" for word, n in found["runs"].items() if n and word != "dead") or "none alive"),
        ("dead", f"{dead} in the last day: tako runs ls --status dead{at}" if dead else ""),
        ("kept", f"{kept} signal{'s' * (kept != 1)} that nobody took: tako signals ls{at}" if kept else ""),
    ]
    width = max(len(name) for name, _ in facts) + 2
    return [
        output.styled(name.ljust(width), "dim").append(output.one_line(words), "default not dim")
        for name, words in facts
        if words
    ]


def _gap() -> "Text":
    return output.styled("")


def _groups(groups: list[Json], now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for group in groups:
        up, wanted, each = group["workers"]["up"], group["workers"]["wanted"], group["concurrency"]
        rows.append(
            [
                output.one_line(group["group"]),
                f"{up} up" + (f" of {wanted}" if wanted else ""),
                f"{group['running']}" + (f" of {up * each}" if up and each else ""),
                str(group["due"]),
                wording.age(group["oldest_due_at"], now) if group["oldest_due_at"] else "",
                output.styled("unhealthy", "bold red") if group["unhealthy"] else "",
            ]
        )
    return output.table(["GROUP", "WORKERS", "RUNNING", "DUE", "OLDEST", ""], rows, flexible=[0], right=[3, 4])


def _unhealthy(group: Json, now: int) -> "list[Text]":
    parts: list[Text] = []
    for one in group["unhealthy"]:
        since = f"{wording.at(one['since'], now)} on {output.one_line(one['host'])}"
        head = output.styled(f"group {output.one_line(group['group'])} is unhealthy since {since}: ", "red")
        parts += [_gap(), head.append(output.one_line(one["reason"]))]
        lines = one["details"].splitlines()[-_LAST_LINES:]
        parts += [output.styled(f"  {output.clean(line)}", "dim") for line in lines]
    return parts


def _workers(workers: list[Json], now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for worker in workers:
        lease = f"ends {wording.distance(worker['lease_until'], now)}" if worker["up"] else "gone"
        rows.append(
            [
                f"w-{short_id(output.one_line(worker['id']))}",
                wording.named(output.one_line(worker["group"]), worker.get("local", False)),
                str(worker["pid"]),
                str(worker["running"]),
                output.styled(lease, "" if worker["up"] else "red"),
                output.one_line(worker["host"]),
                output.one_line(worker["release"]),
            ]
        )
    headings = ["WORKER", "GROUP", "PID", "RUNS", "LEASE", "HOST", "RELEASE"]
    return output.table(headings, rows, flexible=[5, 6, 1, 0], right=[2, 3])


def _schedules(schedules: list[Json], now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for one in schedules:
        next_at = f"{wording.distance(one['next_at'], now)}, {wording.at(one['next_at'], now)}"
        zone = "" if one["timezone"] == "UTC" else f" {one['timezone']}"
        rows.append(
            [
                wording.named(output.one_line(one["workflow"]), one.get("local", False)),
                output.one_line(one["schedule"] + zone),
                next_at if one["next_at"] else "once a supervisor runs",
            ]
        )
    return output.table(["SCHEDULE", "WHEN", "NEXT"], rows, flexible=[1, 0])


# --- signals ---------------------------------------------------------------------------------------------------------


def signals(found: Json, now: int) -> "list[Text]":
    """Who waits for what, and what was sent that nobody has waited for; then the names that look mistyped."""
    parts: list[Text] = []
    if found["waiting"]:
        parts += _waiting(found["waiting"], now)
    if found["kept"]:
        parts += [*([_gap()] if parts else []), *_kept(found["kept"], now)]
    near = {one["name"]: one["near"] for one in found["kept"] if one["near"]}
    if near:
        parts.append(_gap())
    for name, awaited in near.items():
        line = output.styled("kept ", "yellow").append(output.one_line(name), "bold").append(", and a run waits for ")
        parts.append(line.append(output.one_line(awaited), "bold").append(": mistyped?"))
    return parts


def _waiting(waits: list[Json], now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for wait in waits:
        until = wording.distance(wait["until"], now) if wait["until"] else "never"
        name = output.one_line(wait["signal"])
        workflow = wording.named(output.one_line(wait["workflow"]), wait.get("local", False), wait.get("server"))
        rows.append([name, short_id(wait["run"]), workflow, wording.age(wait["since"], now), until])
    return output.table(["WAITED FOR", "RUN", "WORKFLOW", "SINCE", "TIMES OUT"], rows, flexible=[2, 0], right=[3])


def _kept(kept: list[Json], now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for one in kept:
        name = output.styled(output.one_line(one["name"]), "yellow" if one["near"] else "")
        payload = output.one_line(json.dumps(one["payload"], ensure_ascii=False))
        expires = wording.distance(one["expires_at"], now)
        rows.append([name, wording.age(one["sent_at"], now), expires, output.styled(payload, "dim")])
    return output.table(["KEPT", "AGE", "EXPIRES", "PAYLOAD"], rows, flexible=[3, 0], right=[1])
