"""The life of a run, as a table: what each outcome makes of it, and what an operator may ask for."""

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tako_runtime import failure, state
from tako_runtime.clock import HOUR, SECOND
from tako_runtime.errors import InvalidValue, Refused
from tako_runtime.failure import Failure
from tako_runtime.run import Run, Status, StepKey, StepRecord, first_id_at, new_id
from tako_runtime.state import (
    Backoff,
    Bailed,
    Cancelled,
    Change,
    Failed,
    Interrupted,
    Outcome,
    Raised,
    Returned,
    Sleeps,
    Waits,
    WorkerLost,
    settle,
)

STARTED, NOW = 1_000 * SECOND, 1_007 * SECOND
BROKE = Failure("ValueError", "no such card", "Traceback ...")
CHARGE = StepKey("run", "charge")


def run(**fields: Any) -> Run:
    """A run in its second of three attempts, in the hands of a worker."""
    told: dict[str, Any] = {
        "seq": 7, "id": "0199-run", "workflow": "fulfill-order", "group": "default", "status": "running",
        "reason": "claimed", "priority": 0, "due_at": STARTED, "attempt": 2, "max_attempts": 3, "retries": 2,
        "backoff_base": SECOND, "backoff_max": HOUR, "claim": 5, "worker": "w-1", "losses": 0, "cancelling": None,
        "created_at": 0, "started_at": 10, "attempt_started_at": STARTED, "finished_at": None, "scheduled_at": None,
        "unique_key": "order:42", "release": "r1", "payload": b"null", "result": None, "error": None,
    }  # fmt: skip
    return Run(**told | fields)


def about(n: int, base: int = SECOND, longest: int = HOUR) -> tuple[int, int]:
    """Between which pauses the one after `n` failed tries lies."""
    pause = min(base * 2 ** (n - 1), longest)
    return NOW + round(pause * 0.8), NOW + min(round(pause * 1.2), longest)


SITUATIONS: dict[str, dict[str, Any]] = {
    "attempts left": {},
    "last attempt": {"attempt": 3},
    "asked to cancel": {"cancelling": "by Ada"},
    "asked to cancel, last attempt": {"attempt": 3, "cancelling": "by Ada"},
}
OK = ("succeeded", "returned", None, "succeeded", None)
BAILED = ("cancelled", "too dear", None, "cancelled", None)
FAILED = ("dead", "ValueError: no such card", None, "failed", "ValueError")
STOPPED = ("cancelled", "by Ada", None, "cancelled", None)
LOST = "worker died during attempt"

#: outcome -> situation -> (status, reason, due, what the used-up attempt was, the class of the stored error)
TABLE: dict[Outcome, dict[str, tuple[Any, ...]]] = {
    Returned('{"id":1}'): dict.fromkeys(SITUATIONS, OK),
    Bailed("too dear"): dict.fromkeys(SITUATIONS, BAILED),
    Failed(BROKE): dict.fromkeys(SITUATIONS, FAILED),
    Cancelled("by Ada"): dict.fromkeys(SITUATIONS, STOPPED),
    Raised(BROKE, rerun=(CHARGE,)): {
        "attempts left": ("pending", "retrying", about(2), "failed", "ValueError"),
        "last attempt": ("dead", "ValueError: no such card (attempt 3 of 3)", None, "failed", "ValueError"),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    Raised(BROKE, final=True): {
        "attempts left": ("dead", "ValueError: no such card (no retry can mend it)", None, "failed", "ValueError"),
        "last attempt": ("dead", "ValueError: no such card (no retry can mend it)", None, "failed", "ValueError"),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    Sleeps(NOW + HOUR): {
        "attempts left": ("pending", "sleeping", NOW + HOUR, None, None),
        "last attempt": ("pending", "sleeping", NOW + HOUR, None, None),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    Waits(("approval",), NOW + HOUR): {
        "attempts left": ("pending", "waiting", NOW + HOUR, None, None),
        "last attempt": ("pending", "waiting", NOW + HOUR, None, None),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    Waits(("approval", "stock"), None): {
        "attempts left": ("pending", "waiting", None, None, None),
        "last attempt": ("pending", "waiting", None, None, None),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    Interrupted(): {
        "attempts left": ("pending", "queued", NOW, None, None),
        "last attempt": ("pending", "queued", NOW, None, None),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
    WorkerLost("in step charge"): {
        "attempts left": ("pending", "retrying", NOW, "lost", "WorkerDied"),
        "last attempt": ("dead", f"{LOST} 3 in step charge", None, "lost", "WorkerDied"),
        "asked to cancel": STOPPED,
        "asked to cancel, last attempt": STOPPED,
    },
}
ROWS = [(outcome, situation) for outcome, row in TABLE.items() for situation in row]


@pytest.mark.parametrize(("outcome", "situation"), ROWS, ids=lambda given: str(given)[:60])
def test_each_outcome_makes_of_a_run_what_the_table_says(outcome: Outcome, situation: str) -> None:
    status, reason, due, used, error = TABLE[outcome][situation]
    before = run(**SITUATIONS[situation])
    change = settle(before, outcome, NOW)
    assert (change.status, change.reason) == (status, reason)
    if isinstance(due, tuple):
        assert change.due_at is not None
        assert due[0] <= change.due_at <= due[1]
    elif change.status == Status.PENDING:
        assert change.due_at == due
    if used is None:
        assert change.used is None
        assert change.attempt_started_at == STARTED
    else:
        assert change.used is not None
        assert (change.used.n, change.used.worker, change.used.outcome) == (before.attempt, "w-1", used)
        assert (change.used.started_at, change.used.finished_at) == (STARTED, NOW)
        assert change.attempt_started_at is None
    if error is None:
        assert change.error is None
        assert change.used is None or change.used.error is None
    else:
        assert change.error is not None
        assert failure.read(change.error).type == error
        assert change.used is not None
        assert change.used.error == change.error


@pytest.mark.parametrize(("outcome", "situation"), ROWS, ids=lambda given: str(given)[:60])
def test_each_change_names_the_claim_it_was_made_under_and_ends_or_frees_the_run(
    outcome: Outcome, situation: str
) -> None:
    change = settle(run(**SITUATIONS[situation]), outcome, NOW)
    assert (change.seq, change.claim, change.seen_status, change.now) == (7, 5, Status.RUNNING, NOW)
    assert change.worker is None
    assert change.group == "default"
    assert change.cancelling is None
    assert change.finished_at == (NOW if change.status.ended else None)
    assert change.goes_on == (change.status is Status.PENDING)
    assert (change.result is not None) == (change.status is Status.SUCCEEDED)


def test_the_table_has_every_outcome() -> None:
    assert {type(outcome) for outcome in TABLE} == set(Outcome.__args__)


@pytest.mark.parametrize(("outcome", "situation"), ROWS, ids=lambda given: str(given)[:60])
def test_settle_gives_the_same_for_the_same_and_leaves_the_run_alone(outcome: Outcome, situation: str) -> None:
    before = run(**SITUATIONS[situation])
    assert settle(before, outcome, NOW) == settle(before, outcome, NOW)
    assert before == run(**SITUATIONS[situation])


def test_a_result_is_stored_as_it_was_returned() -> None:
    assert settle(run(), Returned('{"id":1}'), NOW).result == '{"id":1}'


def test_the_steps_that_the_next_attempt_runs_again_are_named() -> None:
    assert settle(run(), Raised(BROKE, rerun=(CHARGE,)), NOW).rerun == (CHARGE,)
    assert settle(run(attempt=3), Raised(BROKE, rerun=(CHARGE,)), NOW).rerun == (CHARGE,)


def test_a_run_that_waits_names_the_waits_it_parks_on() -> None:
    assert settle(run(), Waits(("approval", "stock"), None), NOW).open_waits == ("approval", "stock")
    assert settle(run(), Sleeps(NOW), NOW).open_waits == ()


def test_a_run_that_recovers_shows_its_last_error_no_more_and_one_that_is_cancelled_still_does() -> None:
    text = BROKE.text()
    assert settle(run(error=text), Returned("1"), NOW).error is None
    assert settle(run(error=text), Bailed("enough"), NOW).error == text
    assert settle(run(error=text), Sleeps(NOW), NOW).error == text


# --- lost workers ----------------------------------------------------------------------------------------------------


def test_the_first_lost_worker_costs_no_pause_and_from_the_second_on_there_is_backoff() -> None:
    for losses, (least, most) in enumerate([(NOW, NOW), about(1), about(2), about(3)]):
        change = settle(run(losses=losses, max_attempts=100), WorkerLost(), NOW)
        assert change.due_at is not None
        assert least <= change.due_at <= most
        assert change.losses == losses + 1


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("in step charge", f"{LOST} 3 in step charge"),
        ("before its first step", f"{LOST} 3 before its first step"),
        ("", f"{LOST} 3"),
    ],
)
def test_a_run_whose_worker_dies_in_its_last_attempt_is_dead_and_says_where(where: str, said: str) -> None:
    change = settle(run(attempt=3), WorkerLost(where), NOW)
    assert (change.status, change.reason) == (Status.DEAD, said)
    assert change.error is not None
    assert failure.read(change.error).message == said


def test_a_run_that_kills_every_worker_ends_dead_within_its_budget() -> None:
    alive = run(attempt=1, max_attempts=5, retries=4)
    for attempt in itertools.count(1):
        change = settle(alive, WorkerLost("in step boom"), NOW)
        if change.status is Status.DEAD:
            break
        alive = msgspec.structs.replace(alive, attempt=attempt + 1, losses=change.losses)
    assert attempt == 5


# --- backoff ---------------------------------------------------------------------------------------------------------


def test_a_failed_attempt_waits_about_twice_as_long_as_the_one_before() -> None:
    for attempt in range(1, 11):
        change = settle(run(attempt=attempt, max_attempts=100, retries=99), Raised(BROKE), NOW)
        least, most = about(attempt)
        assert change.due_at is not None
        assert least <= change.due_at <= most


def test_after_an_operators_retry_the_pauses_begin_small_again() -> None:
    again = settle(run(attempt=8, max_attempts=10, retries=2), Raised(BROKE), NOW)
    least, most = about(1)
    assert again.due_at is not None
    assert least <= again.due_at <= most


@given(
    base=st.integers(0, 10 * HOUR),
    longest=st.integers(0, 100 * HOUR),
    n=st.integers(1, 1_000_000),
    seed=st.text(max_size=40),
)
def test_a_pause_doubles_with_a_jitter_of_a_fifth_and_never_passes_the_cap(
    base: int, longest: int, n: int, seed: str
) -> None:
    if base > longest:
        base, longest = longest, base
    pause = Backoff(base=base / SECOND, max=longest / SECOND).delay(n, seed)
    ideal = min(base * 2 ** min(n - 1, 64), longest)
    assert pause <= longest
    assert ideal * 0.8 - 1 <= pause <= ideal * 1.2 + 1
    assert pause == Backoff(base=base / SECOND, max=longest / SECOND).delay(n, seed)


def test_runs_that_failed_together_do_not_come_back_together() -> None:
    backoff = Backoff(base="10s", max="1h")
    pauses = [backoff.delay(1, f"run-{i}") for i in range(1_000)]
    assert len(set(pauses)) > 900
    assert min(pauses) < 8.5 * SECOND
    assert max(pauses) > 11.5 * SECOND


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"base": "2h"}, "longer than max"),
        ({"base": -1}, "backoff base"),
        ({"max": "soon"}, "backoff max"),
        ({"base": float("nan")}, "backoff base"),
    ],
)
def test_a_backoff_that_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        Backoff(**fields)


# --- what an operator asks for ---------------------------------------------------------------------------------------

PENDING = {"status": "pending", "worker": None}
QUEUED = {**PENDING, "reason": "queued", "attempt": 0, "attempt_started_at": None}
RETRYING = {**PENDING, "reason": "retrying", "attempt_started_at": None, "error": BROKE.text(), "losses": 1}
PARKED = {**PENDING, "reason": "waiting", "due_at": None}
SLEEPING = {**PENDING, "reason": "sleeping"}
SUCCEEDED = {**PENDING, "status": "succeeded", "attempt_started_at": None, "finished_at": NOW, "result": b"1"}
CANCELLED = {**SUCCEEDED, "status": "cancelled", "result": None, "reason": "by Ada"}
DEAD = {**CANCELLED, "status": "dead", "attempt": 3, "error": BROKE.text(), "losses": 2}


@pytest.mark.parametrize(("fields", "used"), [(QUEUED, False), (RETRYING, False), (PARKED, True), (SLEEPING, True)])
def test_a_pending_run_is_cancelled_at_once(fields: dict[str, Any], used: bool) -> None:
    change = state.cancel(run(**fields), "by Ada", NOW)
    assert (change.status, change.reason, change.finished_at) == (Status.CANCELLED, "by Ada", NOW)
    assert change.seen_status == Status.PENDING
    assert (change.used is not None) == used
    assert change.used is None or change.used.outcome == "cancelled"


def test_a_running_run_is_asked_to_stop_and_keeps_its_worker_and_its_attempt() -> None:
    change = state.cancel(run(), "by Ada", NOW)
    assert (change.status, change.cancelling, change.worker) == (Status.RUNNING, "by Ada", "w-1")
    assert (change.attempt_started_at, change.finished_at, change.used) == (STARTED, None, None)
    assert not change.goes_on


@pytest.mark.parametrize("fields", [SUCCEEDED, CANCELLED, DEAD], ids=lambda f: f["status"])
def test_an_ended_run_cannot_be_cancelled(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=f"already ended: {fields['status']}"):
        state.cancel(run(**fields), "by Ada", NOW)


@pytest.mark.parametrize(
    ("fields", "budget"), [(DEAD, 6), (CANCELLED, 5), (RETRYING, 3)], ids=["dead", "cancelled", "retrying"]
)
@pytest.mark.parametrize("drop_from", [None, 2])
def test_a_run_that_did_not_succeed_is_queued_again(fields: dict[str, Any], budget: int, drop_from: int | None) -> None:
    change = state.retry(run(**fields), NOW, drop_from)
    assert (change.status, change.reason, change.due_at) == (Status.PENDING, "queued", NOW)
    assert (change.finished_at, change.attempt_started_at, change.losses, change.cancelling) == (None, None, 0, None)
    assert (change.max_attempts, change.drop_from, change.fresh_steps) == (budget, drop_from, True)
    assert change.used is None
    assert change.seen_status == fields["status"]


def test_a_sleeping_run_that_is_woken_is_queued_within_its_attempt_and_the_sleep_that_ends_first_is_over() -> None:
    change = state.wake(run(**SLEEPING, due_at=NOW + 9), NOW)
    assert (change.status, change.reason, change.due_at) == (Status.PENDING, "queued", NOW)
    assert (change.attempt_started_at, change.used, change.ends_sleeps) == (STARTED, None, NOW + 9)
    assert change.seen_status == Status.PENDING


@pytest.mark.parametrize("fields", [{}, QUEUED, RETRYING, PARKED, SUCCEEDED, DEAD], ids=lambda f: f.get("reason", "-"))
def test_a_run_that_does_not_sleep_cannot_be_woken(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="it does not sleep"):
        state.wake(run(**fields), NOW)


def test_a_succeeded_run_is_run_again_only_from_a_step_on() -> None:
    with pytest.raises(Refused) as caught:
        state.retry(run(**SUCCEEDED), NOW)
    assert "--from STEP" in caught.value.hint
    change = state.retry(run(**SUCCEEDED), NOW, drop_from=2)
    assert (change.status, change.drop_from, change.result, change.max_attempts) == (Status.PENDING, 2, None, 5)


@pytest.mark.parametrize(
    ("fields", "said", "hint"),
    [
        ({}, "is running", "cancel it first"),
        (PARKED, r"pending \(waiting\)", "A signal"),
        (SLEEPING, r"pending \(sleeping\)", "due time"),
        (QUEUED, r"pending \(queued\)", "already"),
    ],
    ids=["running", "waiting", "sleeping", "queued"],
)
@pytest.mark.parametrize("drop_from", [None, 2])
def test_a_run_in_which_nothing_failed_cannot_be_retried(
    fields: dict[str, Any], said: str, hint: str, drop_from: int | None
) -> None:
    with pytest.raises(Refused, match=said) as caught:
        state.retry(run(**fields), NOW, drop_from)
    assert hint in caught.value.hint


def test_what_an_operator_asks_for_is_decided_the_same_way_twice() -> None:
    asked: list[Callable[[], Change]] = [
        lambda: state.retry(run(**DEAD), NOW, 1),
        lambda: state.cancel(run(), "by Ada", NOW),
        lambda: state.cancel(run(**PARKED), "by Ada", NOW),
    ]
    for ask in asked:
        assert ask() == ask()


def test_from_a_step_means_from_its_first_use_of_whatever_kind() -> None:
    steps = [
        StepRecord("run", "charge", 1, "done", 1, 0),
        StepRecord("wait", "ship", 3, "done", 1, 0),
        StepRecord("run", "ship", 2, "done", 1, 0),
        StepRecord("run", "ship#2", 4, "done", 1, 0),
    ]
    assert state.steps_from(steps, "ship") == 2
    assert state.steps_from(steps, "ship#2") == 4
    assert state.steps_from(steps, "refund") is None


# --- ids -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-4 * SECOND, 4 * SECOND), min_size=2, max_size=50))
def test_ids_keep_growing_while_the_clock_steps_back_a_little(steps: list[int]) -> None:
    start = 2_200_000_000 * SECOND  # far from every other test: the numbers are of the whole process
    ids = [new_id(start + step) for step in steps]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)
    assert all(len(made) == 36 and made[14] == "7" and made[19] in "89ab" for made in ids)


def test_an_id_made_at_an_instant_is_no_smaller_than_the_first_of_that_instant() -> None:
    for second in range(1_900_000_000, 1_900_000_100):
        now = second * SECOND + 999_999
        assert first_id_at(now) <= new_id(now) < first_id_at(now + SECOND)
