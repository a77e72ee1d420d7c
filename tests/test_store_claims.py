"""The store's contract for a run in a worker's hand: enqueued, claimed, its steps and changes written, retried."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from conftest import BOTH, BROKE, Caller

from tako_runtime import state
from tako_runtime.clock import DAY, HOUR, SECOND
from tako_runtime.errors import Refused, StoreError
from tako_runtime.run import Run, StepKey, StepRecord
from tako_runtime.state import (
    Bailed,
    Cancelled,
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
from tako_runtime.store import base

STORES = BOTH
ENDS: list[Outcome] = [Returned("1"), Bailed("enough"), Failed(BROKE), Cancelled("by Ada")]


def picture(caller: Caller) -> Any:
    """All that the store tells: what must be the same after a write that does not land."""
    runs = caller.do(base.ListRuns(limit=1_000))
    return (
        runs,
        [caller.do(base.Steps(seq=run.seq)) for run in runs],
        [caller.do(base.Attempts(seq=run.seq)) for run in runs],
        caller.do(base.OpenWaits()),
        caller.do(base.KeptSignals(now=caller.now)),
        caller.do(base.ListWorkers()),
    )


# --- enqueue ---------------------------------------------------------------------------------------------------------


def test_an_enqueued_run_is_stored_as_it_was_given(caller: Caller) -> None:
    new = caller.new(
        workflow="pack", group="media", payload='{"n":1}', due_at=caller.now + HOUR, retries=4, backoff_base=5,
        backoff_max=9, priority=3, unique_key="order:1", release="r7", scheduled_at=caller.now,
    )  # fmt: skip
    assert caller.do(base.Enqueue(runs=[new], now=caller.now)) == [new.id]
    [run] = caller.do(base.ListRuns())
    given = msgspec.structs.asdict(new) | {"payload": b'{"n":1}'}
    assert {name: getattr(run, name) for name in given} == given
    assert (run.status, run.reason, run.attempt, run.max_attempts) == ("pending", "queued", 0, 5)
    assert (run.claim, run.worker, run.losses, run.cancelling) == (0, None, 0, None)
    assert (run.started_at, run.attempt_started_at, run.finished_at, run.result, run.error) == (None,) * 5


def test_enqueue_answers_the_ids_in_the_order_of_the_runs(caller: Caller) -> None:
    runs = [caller.new(priority=n % 3, unique_key=f"k{n % 4}" if n % 2 else None) for n in range(20)]
    answered = caller.do(base.Enqueue(runs=runs, now=caller.now))
    holders = {"k1": runs[1].id, "k3": runs[3].id}
    assert answered == [holders[run.unique_key] if run.unique_key else run.id for run in runs]


def test_enqueue_stores_all_of_its_runs_or_none(caller: Caller) -> None:
    twice = caller.new()
    with pytest.raises(StoreError):
        caller.do(base.Enqueue(runs=[caller.new(), twice, caller.new(), twice], now=caller.now))
    assert caller.do(base.ListRuns()) == []
    assert caller.do(base.Enqueue(runs=[], now=caller.now)) == []


def test_the_second_run_with_a_live_unique_key_is_the_first(caller: Caller) -> None:
    first = caller.enqueue(unique_key="order:1", payload="1")
    assert caller.enqueue(unique_key="order:1", payload="2") == first
    [run] = caller.do(base.ListRuns())
    assert (run.id, run.payload) == (first, b"1")


def test_a_unique_key_is_scoped_to_its_workflow(caller: Caller) -> None:
    assert caller.enqueue(unique_key="k") != caller.enqueue(unique_key="k", workflow="pack")
    assert caller.enqueue() != caller.enqueue()


def test_a_unique_key_holds_within_one_enqueue_too(caller: Caller) -> None:
    runs = [caller.new(unique_key="k"), caller.new(unique_key="k"), caller.new(unique_key="k", workflow="pack")]
    assert caller.do(base.Enqueue(runs=runs, now=caller.now)) == [runs[0].id, runs[0].id, runs[2].id]
    assert len(caller.do(base.ListRuns())) == 2


@pytest.mark.parametrize("parked", [Sleeps(2_000_000_000 * SECOND), Waits(("go",), None), Raised(BROKE), Interrupted()])
def test_a_unique_key_holds_while_its_run_runs_and_while_it_is_parked(caller: Caller, parked: Outcome) -> None:
    run = caller.started(unique_key="k")
    assert caller.enqueue(unique_key="k") == run.id
    if isinstance(parked, Waits):
        caller.wait(run, "go")
    assert caller.settle(run, parked)
    assert caller.enqueue(unique_key="k") == run.id


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_a_unique_key_is_free_again_once_its_run_has_ended(caller: Caller, end: Outcome) -> None:
    run = caller.started(unique_key="k")
    assert caller.settle(run, end)
    assert caller.enqueue(unique_key="k") != run.id


# --- claim -----------------------------------------------------------------------------------------------------------


def test_runs_are_claimed_by_priority_then_oldest_due_then_insertion(caller: Caller) -> None:
    told = [(0, -1), (5, 0), (0, -2), (0, -1), (-3, -9), (5, -1), (5, 0)]
    runs = [caller.new(priority=priority, due_at=caller.now + late * SECOND) for priority, late in told]
    caller.do(base.Enqueue(runs=runs, now=caller.now))
    expected = [runs[n].id for n in (5, 1, 6, 2, 0, 3, 4)]
    one_by_one = [caller.claim()[0].run.id for _ in range(3)]
    assert one_by_one + [each.run.id for each in caller.claim(limit=10)] == expected


def test_a_claim_takes_no_more_than_asked_for_and_nothing_twice(caller: Caller) -> None:
    enqueued = {caller.enqueue() for _ in range(5)}
    first, second, third = (caller.claim(limit=2) for _ in range(3))
    assert [len(taken) for taken in (first, second, third)] == [2, 2, 1]
    assert {each.run.id for each in first + second + third} == enqueued
    assert caller.claim() == []


def test_only_runs_of_the_group_and_the_named_workflows_are_claimed(caller: Caller) -> None:
    caller.join("w-2", group="media")
    here = caller.enqueue()
    other_flow, other_group = caller.enqueue(workflow="pack"), caller.enqueue(group="media")
    assert caller.claim(workflows=()) == []
    assert [each.run.id for each in caller.claim(limit=9, workflows=["order", "order"])] == [here]
    assert [each.run.id for each in caller.claim(limit=9, workflows=["pack", "no'such"])] == [other_flow]
    assert [each.run.id for each in caller.claim(limit=9, group="media", worker="w-2")] == [other_group]


def test_a_run_is_not_claimed_before_it_is_due(caller: Caller) -> None:
    later = caller.enqueue(due_at=caller.now + HOUR)
    caller.clock.advance(HOUR - 1)
    assert caller.claim() == []
    caller.clock.advance(1)
    assert [each.run.id for each in caller.claim()] == [later]


def test_a_run_that_became_due_takes_its_place_by_priority(caller: Caller) -> None:
    later = caller.enqueue(due_at=caller.now + HOUR, priority=1)
    now = caller.enqueue()
    caller.clock.advance(HOUR)
    assert [each.run.id for each in caller.claim(limit=2)] == [later, now]


def test_a_claimed_run_runs_in_the_hands_of_its_worker_under_a_new_number(caller: Caller) -> None:
    caller.enqueue()
    caller.clock.advance(SECOND)
    [claimed] = caller.claim()
    run = claimed.run
    assert claimed.steps == ()
    assert (run.status, run.worker, run.claim, run.attempt) == ("running", "w-1", 1, 1)
    assert (run.started_at, run.attempt_started_at) == (caller.now, caller.now)
    assert run == caller.get(run)
    caller.settle(run, Interrupted())
    [claimed] = caller.claim()
    assert claimed.run.claim == 2


def test_a_parked_run_goes_on_within_its_attempt_and_a_failed_one_begins_the_next(caller: Caller) -> None:
    run = caller.started()
    began = caller.now
    caller.settle(run, Sleeps(caller.clock.advance(SECOND)))
    [again] = caller.claim()
    assert (again.run.attempt, again.run.attempt_started_at, again.run.started_at) == (1, began, began)
    caller.settle(again.run, Raised(BROKE))
    caller.clock.advance(HOUR)
    [next_one] = caller.claim()
    assert (next_one.run.attempt, next_one.run.attempt_started_at, next_one.run.started_at) == (2, caller.now, began)


def test_a_claim_brings_the_steps_in_the_order_of_their_calls(caller: Caller) -> None:
    run = caller.started()
    for name, position in (("c", 3), ("a", 1), ("b", 2)):
        caller.save(run, name, position)
    caller.settle(run, Interrupted())
    [again] = caller.claim()
    assert [step.name for step in again.steps] == ["a", "b", "c"]


def test_a_worker_that_is_not_on_the_list_gets_no_runs(caller: Caller) -> None:
    caller.enqueue()
    assert caller.claim(worker="w-2") == []
    assert caller.do(base.RemoveWorker(worker="w-1"))
    assert caller.claim() == []
    caller.join("w-2")
    assert len(caller.claim(worker="w-2")) == 1


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_saved_step_is_there_as_it_was_given(caller: Caller) -> None:
    run = caller.started()
    step = StepRecord("run", "charge", 4, "failed", 1, 10, 20, 30, b'"\xc3\xa9"', BROKE.text())
    assert caller.do(base.SaveStep(seq=run.seq, claim=run.claim, step=step)) == step
    assert caller.do(base.Steps(seq=run.seq)) == [step]


def test_the_first_write_of_a_step_wins(caller: Caller) -> None:
    run = caller.started()
    first = caller.save(run, "charge", result=b"1")
    assert first is not None
    assert caller.save(run, "charge", status="failed", result=None, error="late") == first
    assert caller.do(base.Steps(seq=run.seq)) == [first]


def test_steps_of_one_name_and_several_kinds_do_not_collide(caller: Caller) -> None:
    run = caller.started()
    caller.save(run, "go")
    caller.save(run, "go", 2, kind="sleep", status="sleeping", due_at=5)
    caller.wait(run, "go", position=3)
    assert [step.kind for step in caller.do(base.Steps(seq=run.seq))] == ["run", "sleep", "wait"]


def test_a_failed_step_that_is_to_be_run_again_counts_as_not_written_once(caller: Caller) -> None:
    run = caller.started()
    caller.save(run, "charge", status="failed", result=None, error="broke")
    caller.settle(run, Raised(BROKE, rerun=(StepKey("run", "charge"),)))
    caller.clock.advance(HOUR)
    [again] = caller.claim()
    assert [(step.status, step.rerun) for step in again.steps] == [("failed", True)]
    mended = caller.save(again.run, "charge", 2, result=b"2")
    assert mended is not None
    assert (mended.status, mended.result, mended.error, mended.rerun, mended.attempt) == ("done", b"2", None, False, 2)
    assert caller.save(again.run, "charge", result=b"3") == mended
    assert caller.do(base.Steps(seq=run.seq)) == [mended]


def test_a_failed_step_that_the_handler_went_on_from_stays_failed(caller: Caller) -> None:
    run = caller.started()
    caught = caller.save(run, "charge", status="failed", result=None, error="caught")
    caller.save(run, "ship", 2, status="failed", result=None, error="broke")
    caller.settle(run, Raised(BROKE, rerun=(StepKey("run", "ship"),)))
    caller.clock.advance(HOUR)
    [again] = caller.claim()
    assert caller.save(again.run, "charge") == caught


# --- a lost claim ----------------------------------------------------------------------------------------------------

STALE_WRITES: dict[str, Callable[[Caller, Run], Any]] = {
    "save": lambda caller, run: caller.save(run, "new"),
    "save over": lambda caller, run: caller.save(run, "again", result=b"9"),
    "wait": lambda caller, run: caller.wait(run, "new"),
    "wait for a kept signal": lambda caller, run: caller.wait(run, "kept"),
    "expire": lambda caller, run: caller.expire(run, "approval"),
    "return": lambda caller, run: caller.settle(run, Returned("1")),
    "raise": lambda caller, run: caller.settle(run, Raised(BROKE, rerun=(StepKey("run", "done"),))),
    "park": lambda caller, run: caller.settle(run, Waits(("approval",), None)),
    "interrupt": lambda caller, run: caller.settle(run, Interrupted()),
    "lose": lambda caller, run: caller.settle(run, WorkerLost()),
    "cancel": lambda caller, run: caller.apply(state.cancel(run, "by Ada", caller.now)),
}
SINCE: dict[str, Callable[[Caller, Run], object]] = {
    "claimed anew": lambda caller, run: caller.settle(run, Interrupted()) and caller.claim(),
    "given back": lambda caller, run: caller.settle(run, WorkerLost()),
    "ended": lambda caller, run: caller.settle(run, Returned("1")),
}


@pytest.mark.parametrize("write", STALE_WRITES)
@pytest.mark.parametrize("since", SINCE)
def test_a_write_under_a_claim_that_is_lost_changes_nothing_and_says_so(caller: Caller, write: str, since: str) -> None:
    caller.signal("kept")
    run = caller.started()
    caller.wait(run, "approval")
    caller.save(run, "done", 2)
    caller.save(run, "again", 3, status="failed")
    caller.settle(run, Raised(BROKE, rerun=(StepKey("run", "again"),)))
    caller.clock.advance(HOUR)
    [claimed] = caller.claim()
    assert SINCE[since](caller, claimed.run)
    before = picture(caller)
    assert not STALE_WRITES[write](caller, claimed.run)
    assert picture(caller) == before


# --- changes ---------------------------------------------------------------------------------------------------------


def test_a_change_is_written_whole(caller: Caller) -> None:
    run = caller.started()
    caller.save(run, "charge", status="failed")
    change = settle(run, Raised(BROKE, rerun=(StepKey("run", "charge"),)), caller.clock.advance(SECOND))
    assert caller.apply(change)
    stored = caller.get(run)
    for name in (
        "status", "reason", "due_at", "worker", "attempt_started_at", "finished_at", "losses", "max_attempts",
        "cancelling", "result", "error",
    ):  # fmt: skip
        assert getattr(stored, name) == getattr(change, name), name
    assert caller.do(base.Attempts(seq=run.seq)) == [change.used]
    assert [step.rerun for step in caller.do(base.Steps(seq=run.seq))] == [True]


def test_every_attempt_that_was_used_up_is_kept_with_its_error(caller: Caller) -> None:
    caller.enqueue()
    for outcome in (Raised(BROKE), WorkerLost("in step charge"), Returned("1")):
        caller.clock.advance(HOUR)
        [claimed] = caller.claim()
        caller.settle(claimed.run, outcome)
    attempts = caller.do(base.Attempts(seq=claimed.run.seq))
    assert [(a.n, a.outcome, a.error is not None) for a in attempts] == [
        (1, "failed", True),
        (2, "lost", True),
        (3, "succeeded", False),
    ]


def test_a_request_to_cancel_stops_what_would_go_on_and_lets_an_end_through(caller: Caller) -> None:
    for outcome in (Sleeps(caller.now + HOUR), Waits((), None), Interrupted(), Raised(BROKE), WorkerLost()):
        run = caller.started()
        seen = caller.get(run)
        assert caller.apply(state.cancel(run, "by Ada", caller.now))
        asked = caller.get(run)
        assert (asked.status, asked.cancelling, asked.worker) == ("running", "by Ada", "w-1")
        assert not caller.settle(seen, outcome)
        assert caller.get(run) == asked
        assert caller.settle(asked, outcome)
        assert (caller.get(run).status, caller.get(run).reason) == ("cancelled", "by Ada")
    run = caller.started()
    assert caller.apply(state.cancel(run, "by Ada", caller.now))
    assert caller.settle(run, Returned("1"))
    assert (caller.get(run).status, caller.get(run).cancelling) == ("succeeded", None)


def test_a_change_decided_on_another_status_does_not_land(caller: Caller) -> None:
    caller.enqueue()
    [queued] = caller.do(base.ListRuns())
    cancel = state.cancel(queued, "by Ada", caller.now)
    caller.claim()
    before = picture(caller)
    assert not caller.apply(cancel)
    assert picture(caller) == before


def test_the_waits_of_a_run_end_with_it(caller: Caller) -> None:
    for end in ENDS:
        run = caller.started()
        caller.wait(run, "approval")
        assert caller.settle(run, end)
        assert caller.do(base.OpenWaits()) == []
    assert caller.signal("approval") == 0


# --- retry -----------------------------------------------------------------------------------------------------------


def test_a_retried_run_keeps_its_finished_steps_and_runs_its_failed_ones_again(caller: Caller) -> None:
    run = caller.started()
    done = caller.save(run, "charge")
    caller.save(run, "ship", 2, status="failed")
    caller.settle(run, Failed(BROKE))
    assert caller.apply(state.retry(caller.get(run), caller.now))
    [again] = caller.claim()
    assert [(step.name, step.rerun) for step in again.steps] == [("charge", False), ("ship", True)]
    assert (again.run.attempt, again.run.max_attempts) == (2, 4)
    assert caller.save(again.run, "charge", result=b"9") == done


def test_a_retry_from_a_step_forgets_that_step_and_all_after_it(caller: Caller) -> None:
    run = caller.started()
    for position, name in enumerate("abc", 1):
        caller.save(run, name, position)
    caller.settle(run, Returned("1"))
    assert caller.apply(state.retry(caller.get(run), caller.now, drop_from=2))
    assert [step.name for step in caller.do(base.Steps(seq=run.seq))] == ["a"]
    assert caller.get(run).result is None


def test_a_retry_from_a_step_forgets_its_open_wait_so_that_no_signal_goes_there(caller: Caller) -> None:
    run = caller.started()
    caller.save(run, "charge")
    caller.wait(run, "approval", position=2, timeout=HOUR)
    caller.settle(run, Raised(BROKE))
    assert caller.apply(state.retry(caller.get(run), caller.now, drop_from=2))
    assert caller.do(base.OpenWaits()) == []
    assert caller.signal("approval", '"yes"') == 0
    [again] = caller.claim()
    step = caller.wait(again.run, "approval", position=2, timeout=DAY)
    assert step is not None
    assert (step.status, step.result) == ("done", b'"yes"')


def test_a_retry_of_a_run_whose_unique_key_has_a_new_holder_is_refused_and_changes_nothing(caller: Caller) -> None:
    run = caller.started(unique_key="k")
    caller.settle(run, Failed(BROKE))
    caller.enqueue(unique_key="k")
    before = picture(caller)
    with pytest.raises(Refused, match="unique key") as caught:
        caller.apply(state.retry(caller.get(run), caller.now))
    assert "cancel it" in caught.value.hint
    assert picture(caller) == before
