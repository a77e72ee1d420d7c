"""A run's life so far, told from the store in the words of the log: what `tako runs tail` shows before it is live, and
where nobody is there to announce anything."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from tako_runtime import clock, log
from tako_runtime.run import Reason, Status, StepKey

Json = dict[str, Any]
Event = dict[str, Any]
Key = tuple[Any, ...]

#: What tells two events of one name and one run apart. Those that are not here have nothing in the store.
_BESIDE_NAME = {
    "run.enqueued": (),
    "run.started": ("attempt",),
    "run.retrying": ("attempt",),
    "run.reclaimed": ("attempt",),
    "run.succeeded": ("attempt",),
    "run.cancelled": ("attempt",),
    "run.dead": ("attempt",),
    "run.sleeping": ("until",),
    "run.waiting": ("until",),
    "step.done": ("step", "attempt"),
    "step.failed": ("step", "attempt"),
    "wait.done": ("signal", "attempt"),
    "wait.timed_out": ("signal", "attempt"),
}

#: After one of these a run says no more.
ENDS = frozenset({"run.succeeded", "run.cancelled", "run.dead"})


def key(event: Event) -> Key | None:
    """The same for an event that was heard live and for that event told from the store; None for one of which the store
    knows nothing."""
    name = "run.started" if event["event"] == "run.resumed" else event["event"]  # of that attempt, the first word
    beside = _BESIDE_NAME.get(name)
    return None if beside is None else (name, *(event.get(fact) for fact in beside))


def story(run: Json) -> list[Event]:
    """What has happened to a run, given as `Control.show` has it, in the order in which it happened."""
    events = [_event(run, "run.enqueued", run["created_at"], attempt=0), *_attempts(run), *_steps(run), *_stands(run)]
    return sorted(events, key=_place)


def _place(event: Event) -> tuple[str, int, int]:
    """Of what happened in one instant, an attempt's begin comes first, and its end last."""
    begun, own = event["event"] == "run.started", event["event"].startswith("run.")
    return event["at"], event["attempt"], 0 if begun else 2 if own else 1


def _attempts(run: Json) -> Iterator[Event]:
    attempts = run["attempts"]
    for attempt, following in zip(attempts, [*attempts[1:], None], strict=False):
        n, of = attempt["n"], run["max_attempts"]
        yield _event(run, "run.started", attempt["started_at"], attempt=n, max_attempts=of)
        if following is None and Status(run["status"]).ended:
            continue  # its end says it
        if attempt["outcome"] == "failed":
            again = following["started_at"] if following else run["run_at"]
            pause = clock.spell(max(0, _micros(again) - _micros(attempt["finished_at"]))) if again else "?"
            error = _line(attempt["error"])
            yield _event(
                run, "run.retrying", attempt["finished_at"], attempt=n, max_attempts=of, pause=pause, error=error
            )
        elif attempt["outcome"] == "lost":
            message = (attempt["error"] or {}).get("message", "worker died")
            then = f"goes on in attempt {n + 1}"
            yield _event(run, "run.reclaimed", attempt["finished_at"], attempt=n, message=message, then=then)


def _steps(run: Json) -> Iterator[Event]:
    for step in run["steps"]:
        if step["finished_at"] is None:
            continue
        facts = {"attempt": step["attempt"], "step": StepKey(step["kind"], step["name"]).label}
        facts["ms"] = (_micros(step["finished_at"]) - _micros(step["started_at"])) / 1_000
        match step["kind"], step["status"]:
            case "wait", "done" | "timed_out" as end:
                yield _event(run, f"wait.{end}", step["finished_at"], signal=step["name"], attempt=step["attempt"])
            case _, "done":
                yield _event(run, "step.done", step["finished_at"], **facts)
            case _, "failed":
                yield _event(run, "step.failed", step["finished_at"], **facts, error=_line(step["error"]))


def _stands(run: Json) -> Iterator[Event]:
    """Where it stands now, if that is an event of its own."""
    attempt, until = run["attempt"], run["run_at"] or "a signal"
    begun = [step["started_at"] for step in run["steps"] if step["status"] in ("sleeping", "waiting")]
    match run["status"], run["reason"]:
        case Status.SUCCEEDED, _:
            ms = (_micros(run["finished_at"]) - _micros(run["started_at"] or run["finished_at"])) / 1_000
            yield _event(run, "run.succeeded", run["finished_at"], attempt=attempt, ms=ms)
        case Status.CANCELLED | Status.DEAD as end, reason:
            yield _event(run, f"run.{end}", run["finished_at"], attempt=attempt, reason=reason, error=_trace(run))
        case Status.PENDING, Reason.SLEEPING if begun:
            yield _event(run, "run.sleeping", max(begun), attempt=attempt, until=until)
        case Status.PENDING, Reason.WAITING if begun:
            signals = ", ".join(wait["signal"] for wait in run["waiting_for"])
            yield _event(run, "run.waiting", max(begun), attempt=attempt, signals=signals, until=until)


def _event(run: Json, name: str, at: str, **facts: Any) -> Event:
    level = log.LEVELS[log.WORDS[name][0]]
    line = {"at": at, "level": level, "event": name, "run": run["id"], "workflow": run["workflow"], **facts}
    return {**line, "message": log.words(line), "source": run["group"]}


def _line(error: Json | None) -> str:
    return "" if error is None else f"{error['type']}: {error['message']}".removesuffix(": ")


def _trace(run: Json) -> str:
    return "" if run["error"] is None else str(run["error"]["traceback"])


def _micros(iso: str) -> int:
    return clock.instant(datetime.fromisoformat(iso))
