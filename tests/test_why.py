"""Why a run stands where it stands: as a table, and of runs in a real store."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Caller

from tako_runtime import clock, inflight, state
from tako_runtime.clock import HOUR, SECOND
from tako_runtime.config import parse
from tako_runtime.control import Control
from tako_runtime.failure import Failure
from tako_runtime.inflight import InFlight, Place
from tako_runtime.manifest import Declared, Manifest, Mistake
from tako_runtime.run import Run, StepRecord, WorkerRecord
from tako_runtime.state import Bailed, Failed, Outcome, Raised, Returned, Sleeps, Waits
from tako_runtime.store import Home, base
from tako_runtime.store.base import Unhealthy, Wait
from tako_runtime.store.commit import StoreThread
from tako_runtime.why import CAUSES, Seen, why

NOW = 1_800_000_000 * SECOND
DUE, LATER = NOW - 10 * SECOND, NOW + HOUR
BROKE = Failure("ValueError", "no such card")


def at(micros: int) -> str:
    return clock.iso(micros)


def run(**fields: Any) -> Run:
    """A run that is due and that nobody has claimed."""
    told: dict[str, Any] = {
        "seq": 7, "id": "0199-run", "workflow": "charge", "group": "media", "status": "pending", "reason": "queued",
        "priority": 0, "due_at": DUE, "attempt": 2, "max_attempts": 3, "retries": 2, "backoff_base": SECOND,
        "backoff_max": HOUR, "claim": 5, "worker": None, "losses": 0, "cancelling": None, "created_at": 0,
        "started_at": 10, "attempt_started_at": DUE, "finished_at": None, "scheduled_at": None, "unique_key": None,
        "release": "r1", "payload": b"null", "result": None, "error": None,
    }  # fmt: skip
    return Run(**told | fields)


def worker(n: int = 1, host: str = "web-1") -> WorkerRecord:
    return WorkerRecord(f"w-{n}", "media", host, 100 + n, "r1", 0, LATER)


def step(name: str, kind: str = "run", status: str = "done", **fields: Any) -> StepRecord:
    return StepRecord(kind, name, 1, status, 2, DUE, **fields)


def sick(host: str = "web-1") -> Unhealthy:
    return Unhealthy("media", host, DUE, "workflows/media.py:3: ModuleNotFoundError: No module named 'ffmpeg'", "")


RUNNING: dict[str, Any] = {"status": "running", "reason": "claimed", "worker": "w-1"}
HELD = "in worker w-1 (process 101 on web-1)"
IN_CHARGE = Place("in step charge", NOW - SECOND)
ENDED = {"finished_at": DUE, "due_at": None}

TABLE: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    # its row, what else is seen, the cause, the sentence
    ({"status": "succeeded", **ENDED}, {}, "succeeded", f"It succeeded at {at(DUE)}."),
    ({"status": "cancelled", "reason": "cancelled by an operator", **ENDED}, {},
     "cancelled", f"It was cancelled by an operator, at {at(DUE)}."),
    ({"status": "cancelled", "reason": "ordered\n twice.", **ENDED}, {},
     "cancelled", f"It was cancelled (ordered twice), at {at(DUE)}."),
    ({"status": "dead", "reason": "ValueError: no such card (attempt 3 of 3)", **ENDED}, {},
     "dead", f"It is dead since {at(DUE)}: ValueError: no such card (attempt 3 of 3)."),
    # running
    (RUNNING, {"worker": worker(), "place": IN_CHARGE},
     "running", f"It is in step charge since {at(NOW - SECOND)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker(), "place": IN_CHARGE, "steps": [step("charge", finished_at=NOW)]},
     "running", f"It is after step charge, which ended at {at(NOW)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker(), "place": IN_CHARGE, "steps": [step("charge", finished_at=DUE)]},
     "running", f"It is in step charge since {at(NOW - SECOND)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker(), "place": Place("before its first step", None)},
     "running", f"It is before its first step since {at(DUE)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker(), "steps": [step("approval", "wait", "waiting")]},
     "running", f"It is waiting in step approval since {at(DUE)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker(), "place": IN_CHARGE, "steps": [step("nap", "sleep", "sleeping", due_at=NOW + 1)]},
     "running", f"It is in sleep nap until {at(NOW + 1)}, {HELD}, attempt 2 of 3."),
    (RUNNING, {"worker": worker()}, "running", f"It is under way since {at(DUE)}, {HELD}, attempt 2 of 3."),
    ({**RUNNING, "cancelling": "by Ada"}, {"worker": worker(), "place": IN_CHARGE},
     "cancelling", f"It stops at its next step (by Ada); now it is in step charge since {at(NOW - SECOND)}, {HELD}."),
    (RUNNING, {"place": IN_CHARGE, "supervised": True}, "lost",
     f"Its worker w-1 is gone, and the supervisor gives it back: in step charge since {at(NOW - SECOND)}."),
    (RUNNING, {"place": IN_CHARGE}, "lost",
     f"Its worker w-1 is gone, and it goes on once a supervisor runs: in step charge since {at(NOW - SECOND)}."),
    # parked
    ({"reason": "sleeping", "due_at": LATER}, {}, "sleeping", f"It sleeps until {at(LATER)}."),
    ({"reason": "waiting", "due_at": None}, {"waits": [Wait("approval:42", "r", "approval:42", DUE, None, "charge")]},
     "waiting", "It waits for signal approval:42 without a deadline."),
    ({"reason": "waiting", "due_at": LATER},
     {"waits": [Wait("a", "r", "a", DUE, LATER, "charge"), Wait("b", "r", "b", DUE, None, "charge")]},
     "waiting", f"It waits for the first of 2 signals: a until {at(LATER)}; b without a deadline."),
    ({"reason": "retrying", "due_at": LATER, "error": BROKE.text()}, {}, "retrying",
     f"It is retried at {at(LATER)}, because attempt 2 of 3 failed: ValueError: no such card."),
    ({"due_at": LATER, "attempt": 0}, {}, "delayed", f"It was enqueued for later: it is due at {at(LATER)}."),
    # due
    ({}, {"declared": [], "workers": [worker()]}, "no_workflow",
     f"It is due since {at(DUE)}, but no workflow charge in group media is declared in this release."),
    ({}, {"declared": ["default"], "supervised": True}, "no_workflow",
     f"It is due since {at(DUE)}, but no workflow charge in group media is declared in this release (it is in group "
     "default)."),
    ({}, {"declared": [], "mistakes": ["workflows/media.py:3: SyntaxError: invalid syntax"]}, "no_workflow",
     f"It is due since {at(DUE)}, but no workflow charge in group media is declared in this release; what could not be "
     "imported: workflows/media.py:3: SyntaxError: invalid syntax."),
    ({}, {"paused": "tako dev, process 7", "workers": [worker()], "unhealthy": [sick()], "ahead": 3}, "paused",
     f"It is due since {at(DUE)}, queued behind 3 runs in group media; nothing is claimed, as tako dev, process 7 has "
     "paused the app."),
    ({}, {"unhealthy": [sick()], "supervised": True, "declared": ["media"], "ahead": 3}, "unhealthy",
     f"It is due since {at(DUE)}, queued behind 3 runs in group media, whose workers are unhealthy: {sick().reason} "
     f"(since {at(DUE)})."),
    ({}, {"unhealthy": [sick()], "workers": [worker()]}, "unhealthy", "unhealthy"),
    ({}, {"unhealthy": [sick()], "workers": [worker(2, "web-2")]}, "next", "whose 1 worker has 0 runs in hand"),
    ({}, {}, "no_supervisor",
     f"It is due since {at(DUE)}, first in the queue of group media; no worker is up and none comes: no supervisor "
     "runs here."),
    ({}, {"supervised": True}, "starting", "no worker is up yet, and the supervisor starts one"),
    ({"reason": "retrying"}, {"supervised": True}, "starting", "is due since"),
    ({}, {"workers": [worker()], "in_hand": 10, "hands": 10, "ahead": 12}, "busy",
     f"It is due since {at(DUE)}, queued behind 12 runs in group media, whose 1 worker has 10 runs in hand, of the 10 "
     "that it can have."),
    ({}, {"workers": [worker(), worker(2)], "in_hand": 20, "hands": 20}, "busy",
     f"It is due since {at(DUE)}, first in the queue of group media, whose 2 workers have 20 runs in hand, of the 20 "
     "that they can have."),
    ({}, {"workers": [worker()], "in_hand": 8, "hands": 10, "ahead": 2}, "busy", "behind 2 runs"),
    ({}, {"workers": [worker()], "in_hand": 8, "hands": 10, "ahead": 1}, "next", "behind 1 run in"),
    ({}, {"workers": [worker()], "in_hand": 1, "ahead": 1}, "busy", "whose 1 worker has 1 run in hand."),
    ({}, {"workers": [worker()]}, "next", "whose 1 worker has 0 runs in hand."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "rest", "cause", "says"), TABLE, ids=[row[2] for row in TABLE])
def test_why(row: dict[str, Any], rest: dict[str, Any], cause: str, says: str) -> None:
    found = why(Seen(run=run(**row), now=NOW, **rest))
    assert found.cause == cause
    assert says in found.sentence
    assert found.sentence == says or not says.startswith("It ")
    assert re.fullmatch(r"I.*[^.]\.", found.sentence), "one sentence on one line"


def test_every_cause_is_in_the_table() -> None:
    assert {cause for _, _, cause, _ in TABLE} == set(CAUSES)


# --- of a real store -------------------------------------------------------------------------------------------------


@pytest.fixture
def control(caller: Caller, opened: StoreThread, home: Home) -> Control:
    return Control(opened, caller.clock, home.app_dir)


@pytest.mark.parametrize(
    ("outcome", "cause"),
    [
        (Returned("1"), "succeeded"),
        (Bailed("enough"), "cancelled"),
        (Failed(BROKE), "dead"),
        (Raised(BROKE), "retrying"),
        (Sleeps(2_000_000_000 * SECOND), "sleeping"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_an_outcome_made_of_a_run_is_why(caller: Caller, control: Control, outcome: Outcome, cause: str) -> None:
    started = caller.started()
    caller.settle(started, outcome)
    answer = control.why(started.id[:30])
    assert answer["cause"] == cause
    now = caller.get(started)
    assert (answer["run"], answer["workflow"], answer["status"]) == (started.id, "order", now.status)


def test_a_parked_run_says_for_which_signals_it_waits(caller: Caller, control: Control) -> None:
    started = caller.started()
    caller.wait(started, "approval:42", timeout=HOUR)
    caller.wait(started, "stop", position=2)
    caller.settle(started, Waits(("approval:42", "stop"), caller.now + HOUR))
    answer = control.why(started.id)
    assert answer["cause"] == "waiting"
    until = clock.iso(caller.now + HOUR)
    assert f"the first of 2 signals: approval:42 until {until}; stop without a deadline" in answer["sentence"]


def test_a_running_run_says_in_which_step_and_in_which_worker_until_that_is_gone(
    caller: Caller, control: Control, home: Home
) -> None:
    started = caller.started()
    beside = InFlight(home.app_dir, "w-1", room=1)
    beside.take(started.seq).note("charge", caller.clock.advance(SECOND))
    answer = control.why(started.id)
    assert answer["cause"] == "running"
    assert f"in step charge since {clock.iso(caller.now)}, in worker w-1" in answer["sentence"]
    caller.apply(state.cancel(caller.get(started), "by Ada", caller.now))
    assert control.why(started.id)["cause"] == "cancelling"
    caller.clock.advance(2 * HOUR)  # its lease has lapsed
    assert control.why(started.id)["cause"] == "lost"
    beside.close()


def test_a_worker_whose_process_is_gone_is_not_taken_for_up(caller: Caller, control: Control, home: Home) -> None:
    started = caller.started()
    path = home.app_dir / "workers" / "w-1"
    path.parent.mkdir(parents=True)
    path.touch()  # what it leaves, without the lock that ended with it
    assert inflight.gone(home.app_dir, "w-1")
    assert control.why(started.id)["cause"] == "lost"


def declares(*flows: tuple[str, str], mistakes: tuple[Mistake, ...] = ()) -> Manifest:
    return Manifest(tuple(Declared(name, group, 2, 1, 1, None, "f.py", 1) for name, group in flows), mistakes)


def test_a_due_run_says_what_it_is_behind_of_and_what_holds_that_up(caller: Caller, control: Control) -> None:
    config = parse(b'name = "shop"\n[workflows]\nconcurrency = 2\n', Path("/tako.toml"))
    [first, second, third] = [caller.enqueue() for _ in range(3)]
    assert control.why(third, config, lambda: declares())["cause"] == "no_workflow"
    assert control.why(third, config, lambda: declares(("order", "media")))["cause"] == "no_workflow"
    good = declares(("order", "default"))
    assert control.why(second, config, lambda: good)["cause"] == "next"
    caller.claim()
    assert "behind 1 run in group default" in control.why(third, config, lambda: good)["sentence"]
    assert control.why(second, config, lambda: good)["cause"] == "next"
    busy = control.why(third, config, lambda: good)
    assert busy["cause"] == "busy"
    assert "whose 1 worker has 1 run in hand, of the 2 that it can have" in busy["sentence"]
    assert control.why(first)["cause"] == "running"
    report = base.ReportHealth(group="default", host="host", now=caller.now, reason="no module ffmpeg")
    caller.do(report)
    sick = control.why(third, config, lambda: good)
    assert sick["cause"] == "unhealthy"
    assert "no module ffmpeg" in sick["sentence"]


def test_without_a_worker_and_a_supervisor_nobody_is_coming(opened: StoreThread, home: Home, caller: Caller) -> None:
    waiting = caller.enqueue(group="media")
    assert Control(opened, caller.clock, home.app_dir).why(waiting)["cause"] == "no_supervisor"


def test_what_the_release_declares_is_asked_only_where_it_matters(caller: Caller, control: Control) -> None:
    def never() -> Manifest:
        raise AssertionError

    started = caller.started()
    assert control.why(started.id, None, never)["cause"] == "running"
    caller.settle(started, Sleeps(caller.now + HOUR))
    assert control.why(started.id, None, never)["cause"] == "sleeping"
    later = caller.enqueue(due_at=caller.now + HOUR)
    assert control.why(later, None, never)["cause"] == "delayed"
