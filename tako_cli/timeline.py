"""What a person sees of runs: the table of many, the timeline of one. Values of `control.py` in, renderables out."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tako_cli import output, wording
from tako_cli.wording import Json
from tako_runtime import clock
from tako_runtime.run import SHORT_ID

if TYPE_CHECKING:
    from rich.text import Text


_LONGEST_VALUE = 30  # lines
_LONGEST_LINE = 400  # characters


def runs_table(runs: list[Json], now: int) -> "list[Text]":
    """One run a line."""
    rows: list[list[str | Text]] = []
    for run in runs:
        end = run["finished_at"] or (clock.iso(now) if run["status"] == "running" else None)
        rows.append(
            [
                short_id(run["id"]),
                wording.named(output.clean(run["workflow"]), run.get("local", False), run.get("server")),
                wording.status(wording.state(run)),
                f"{run['attempt']}/{run['max_attempts']}",
                wording.age(run["created_at"], now),
                wording.took(run["started_at"], end),
                output.styled(output.one_line(wording.why(run, now)), "dim"),
            ]
        )
    headings = ["RUN", "WORKFLOW", "STATUS", "TRY", "AGE", "TOOK", ""]
    return output.table(headings, rows, flexible=[6, 1], right=[4, 5])


def short_id(run: str) -> str:
    """How a run is called where its whole id takes too much room: by its end, which every command takes."""
    return run[-SHORT_ID:]


# --- one run ---------------------------------------------------------------------------------------------------------


def timeline(run: Json, now: int, root: Path, place: str = "") -> "list[Text]":
    """A run from its start to where it stands. `place` is where its worker is in it: "in step charge"."""
    parts = [_title(run), *_facts(run, now, place)]
    if run["steps"]:
        parts += [_heading("Steps"), *_steps(run, now)]
    if run["attempts"] and (len(run["attempts"]) > 1 or run["attempts"][0]["error"]):
        parts += [_heading("Attempts"), *_attempts(run, now, root)]
    for name in ("payload", "result"):
        if run[name] is not None:
            parts += [_heading(name.capitalize()), _value(run[name])]
    return parts


def _title(run: Json) -> "Text":
    return output.styled(output.clean(run["workflow"]), "bold").append("  ").append(wording.status(wording.state(run)))


def _heading(words: str) -> "Text":
    return output.styled("\n").append(words, "bold")


def _facts(run: Json, now: int, place: str) -> "list[Text]":
    def time(name: str) -> str:
        return f"{wording.at(run[name], now)} ({wording.distance(run[name], now)})" if run[name] else ""

    facts = [
        ("run", run["id"]),
        ("reason", "" if run["waiting_for"] else wording.why(run, now)),
        *(("waits for", _awaited(wait, now)) for wait in run["waiting_for"]),
        ("now", place),
        ("server", run.get("server") or ""),
        ("store", "the server's own, for the workflow is local" if run.get("local", False) else ""),
        ("attempt", f"{run['attempt']} of {run['max_attempts']}"),
        ("group", run["group"] if run["group"] != "default" else ""),
        ("key", run["unique_key"] or ""),
        ("priority", str(run["priority"]) if run["priority"] else ""),
        ("release", run["release"] if run["release"] != "dev" else ""),
        ("created", time("created_at")),
        ("started", time("started_at")),
        ("finished", time("finished_at")),
        ("took", wording.took(run["started_at"], run["finished_at"])),
    ]
    width = max(len(name) for name, value in facts if value) + 2
    return [_fact(name.ljust(width), output.one_line(value)) for name, value in facts if value]


def _fact(name: str, value: str) -> "Text":
    below = " " * len(name)
    lines = textwrap.fill(value, max(output.width(), 40), initial_indent=below, subsequent_indent=below)
    return output.styled(name, "dim").append(lines[len(name) :], "not dim")


def _awaited(wait: Json, now: int) -> str:
    until = f"until {wording.at(wait['until'], now)} ({wording.distance(wait['until'], now)})"
    return f"{wait['signal']}, {until if wait['until'] else 'without a deadline'}"


def _steps(run: Json, now: int) -> "list[Text]":
    rows: list[list[str | Text]] = []
    for step in run["steps"]:
        name = step["name"] if step["kind"] == "run" or step["name"] == "sleep" else f"{step['kind']} {step['name']}"
        detail, style = _detail(step, now)
        if step["attempt"] > 1:
            detail = f"attempt {step['attempt']}" + (f": {detail}" if detail else "")
        rows.append(
            [
                wording.mark(step["status"]),
                output.one_line(name),
                wording.status(step["status"]),
                wording.took(step["started_at"], step["finished_at"]),
                output.styled(output.one_line(detail), style),
            ]
        )
    return output.table([""] * 5, rows, flexible=[4, 1], right=[3])


def _detail(step: Json, now: int) -> tuple[str, str]:
    """The one thing worth saying of a step, and its style."""
    if step["error"]:
        return wording.error_line(step["error"]), "red"
    if step["status"] in ("sleeping", "waiting"):
        if step["until"] is None:
            return f"for {wording.age(step['started_at'], now)}, without a deadline", ""
        return f"until {wording.at(step['until'], now)} ({wording.distance(step['until'], now)})", ""
    if step["result"] is None:
        return "", ""
    return json.dumps(step["result"], ensure_ascii=False), "dim"


def _attempts(run: Json, now: int, root: Path) -> "list[Text]":
    parts: list[Text] = []
    for attempt in run["attempts"]:
        head = output.styled(f"{attempt['n']}  ").append(wording.status(attempt["outcome"]))
        times = f"  from {wording.at(attempt['started_at'], now)}"
        if attempt["finished_at"]:
            times += f", {wording.took(attempt['started_at'], attempt['finished_at'])}"
        parts.append(head.append(times, "dim"))
        if attempt["error"]:
            error = attempt["error"]
            lines = wording.frames(error["traceback"], root) or [wording.error_line(error)]
            parts += [
                output.styled(f"     {output.clean(line)}", "dim" if line[:1] == " " else "red") for line in lines
            ]
    return parts


def _value(value: Any) -> "Text":
    lines = json.dumps(value, indent=2, ensure_ascii=False).splitlines()
    left = len(lines) - _LONGEST_VALUE
    if left > 0:
        lines = [*lines[:_LONGEST_VALUE], f"... {left} lines more: --json shows them all"]
    return output.styled("\n".join(output.clean(_cut(line)) for line in lines))


def _cut(line: str) -> str:
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}... ({len(line)} characters)"
