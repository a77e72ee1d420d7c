"""What is said of an attempt: how it began, and what became of its run."""

from collections.abc import Mapping

from tako_runtime import clock
from tako_runtime.clock import Pace
from tako_runtime.log import emit
from tako_runtime.run import Run, Status, StepKey, StepRecord
from tako_runtime.state import Change, Failed, Outcome, Raised, Returned

History = Mapping[StepKey, StepRecord]


def begun(run: Run, history: History, now: int) -> None:
    by = _woken_by(run, history, now) if history else ""
    emit(
        "run.woken" if by else "run.resumed" if history else "run.started", max_attempts=run.max_attempts,
        done=len(history), by=by, ms=(now - (run.due_at or now)) / 1_000,
    )  # fmt: skip


def _woken_by(run: Run, history: History, now: int) -> str:
    """Where a parked run goes on within its attempt: what it had waited for, which is the last that happened."""

    def ended(step: StepRecord) -> int:
        at = step.finished_at if step.finished_at is not None else step.due_at
        return at if at is not None and at <= now else 0

    last = max(history.values(), key=ended)
    if last.kind == "run" or ended(last) < (run.attempt_started_at or 0):
        return ""
    if last.kind == "sleep":
        return "the end of its sleep"
    signal = last.name.partition("#")[0]
    return f"signal {signal}" if last.status == "done" else f"the deadline of signal {signal}"


def diverged(history: History, uses: Mapping[StepKey, int]) -> None:
    """Steps that were done before and that this pass had no use for: the code is another by now."""
    left = []
    for key in history:
        name, _, number = key.name.partition("#")
        if key.kind == "run" and uses.get(StepKey("run", name), 0) < int(number or 1):
            left.append(key.name)
    if left:
        emit("run.diverged", steps=", ".join(left))


def settled(
    run: Run, history: History, outcome: Outcome, change: Change, began: int, pace: Pace, parked_for: StepRecord | None
) -> None:
    """`began` is when this pass did; `parked_for` the sleep or wait that it parks for."""
    ms = (change.now - (run.started_at or change.now)) / 1_000
    if isinstance(outcome, Returned):
        emit("run.succeeded", ms=ms)
        return
    match change.status:
        case Status.CANCELLED:
            emit("run.cancelled", reason=change.reason, ms=ms)
        case Status.DEAD:
            emit("run.dead", reason=change.reason, error=_shown(outcome), ms=ms)
        case _:
            until = "a signal" if change.due_at is None else clock.iso(change.due_at)
            since = change.now if parked_for is None else parked_for.started_at
            signals = [key.name for key, step in history.items() if step.status == "waiting"]
            emit(
                f"run.{change.reason}", until=until, pause=clock.spell((change.due_at or 0) - change.now),
                max_attempts=change.max_attempts, error=outcome.failure.line if isinstance(outcome, Raised) else "",
                traceback=_shown(outcome), signals=", ".join(signals),
                ms=(change.now - began) / 1_000, **pace.told((change.due_at or since) - since),
            )  # fmt: skip


def _shown(outcome: Outcome) -> str:
    return outcome.failure.traceback if isinstance(outcome, Raised | Failed) else ""
