"""The contract of `store/base.py`, sentence by sentence, and what the store thread promises its callers."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from conftest import BOTH, Caller, finished, script

from tako_runtime import state
from tako_runtime.bell import Bell
from tako_runtime.clock import DAY, HOUR, MINUTE, SECOND
from tako_runtime.errors import Refused, StoreError
from tako_runtime.failure import Failure
from tako_runtime.run import NewRun, Run, ScheduleRecord, Status, StepKey, StepRecord, first_id_at
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
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread

STORES = BOTH
BROKE = Failure("ValueError", "no such card")
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


def ids(runs: list[Run]) -> list[str]:
    return [run.id for run in runs]


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


def test_one_stale_save_among_many_does_not_hurt_the_others(caller: Caller, opened: StoreThread) -> None:
    lost, held = caller.started(), caller.started()
    caller.settle(lost, WorkerLost())
    step = StepRecord("run", "a", 1, "done", 1, 0, 0, result=b"1")
    saves = [base.SaveStep(seq=run.seq, claim=run.claim, step=step) for run in (lost, held, held)]
    ends = [base.Apply(change=settle(run, Returned("1"), caller.now)) for run in (lost, held, held)]
    assert together(opened, *saves) == [None, step, step]
    assert together(opened, *ends) == [False, True, False]
    assert (caller.get(lost).status, caller.get(held).status) == ("pending", "succeeded")
    assert [len(caller.do(base.Attempts(seq=run.seq))) for run in (lost, held)] == [1, 1]


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


# --- waits and signals -----------------------------------------------------------------------------------------------


def test_a_wait_takes_the_oldest_kept_signal_of_its_name(caller: Caller) -> None:
    caller.signal("other", '"other"')
    caller.signal("approval", '"first"')
    caller.signal("approval", '"second"')
    run = caller.started()
    for name, payload in (("approval", b'"first"'), ("approval#2", b'"second"')):
        step = caller.wait(run, name, signal="approval")
        assert step is not None
        assert (step.status, step.result, step.finished_at) == ("done", payload, caller.now)
    third = caller.wait(run, "approval#3", signal="approval")
    assert third is not None
    assert third.status == "waiting"
    assert [kept.name for kept in caller.do(base.KeptSignals(now=caller.now))] == ["other"]


def test_a_wait_that_is_opened_again_answers_as_the_first_time_and_takes_no_second_signal(caller: Caller) -> None:
    caller.signal("approval", '"first"')
    caller.signal("approval", '"second"')
    run = caller.started()
    first = caller.wait(run, "approval")
    assert caller.wait(run, "approval") == first
    assert len(caller.do(base.KeptSignals(now=caller.now))) == 1
    waiting = caller.wait(run, "go", timeout=HOUR)
    caller.clock.advance(SECOND)
    assert caller.wait(run, "go", timeout=HOUR) == waiting
    [opened] = caller.do(base.OpenWaits())
    assert waiting is not None
    assert (opened.since, opened.deadline) == (waiting.started_at, waiting.due_at)


def test_the_next_signal_finds_an_open_wait_and_wakes_its_parked_run(caller: Caller) -> None:
    run = caller.started()
    waiting = caller.wait(run, "approval")
    assert waiting is not None
    assert (waiting.status, waiting.result) == ("waiting", None)
    caller.settle(run, Waits(("approval",), None))
    assert caller.claim() == []
    caller.clock.advance(HOUR)
    assert caller.signal("approval", '{"ok":true}') == 1
    stored = caller.get(run)
    assert (stored.status, stored.reason, stored.due_at) == ("pending", "queued", caller.now)
    [again] = caller.claim()
    assert [(s.status, s.result, s.finished_at) for s in again.steps] == [("done", b'{"ok":true}', caller.now)]
    assert caller.do(base.OpenWaits()) == []


def test_a_signal_for_a_running_run_is_there_when_it_looks(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval")
    assert caller.signal("approval") == 1
    assert caller.get(run) == run
    assert [step.status for step in caller.do(base.Steps(seq=run.seq))] == ["done"]


def test_a_signal_for_a_run_that_pauses_before_a_retry_is_taken_without_cutting_the_pause_short(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval")
    caller.settle(run, Raised(BROKE))
    before = caller.get(run)
    assert caller.signal("approval") == 1
    assert caller.get(run) == before
    assert [step.status for step in caller.do(base.Steps(seq=run.seq))] == ["done"]


def test_a_signal_goes_to_every_run_that_waits_and_to_one_wait_of_each(caller: Caller) -> None:
    runs = [caller.started() for _ in range(3)]
    for run in runs:
        caller.wait(run, "approval#2", signal="approval", position=2)
        caller.wait(run, "approval", position=1)
        caller.settle(run, Waits(("approval", "approval#2"), None))
    assert caller.signal("approval", '"one"') == 3
    for run in runs:
        assert [step.status for step in caller.do(base.Steps(seq=run.seq))] == ["done", "waiting"]
    assert caller.signal("approval", '"two"') == 3
    assert caller.signal("approval", '"three"') == 0
    for run in runs:
        assert [step.result for step in caller.do(base.Steps(seq=run.seq))] == [b'"one"', b'"two"']


def test_a_signal_that_nobody_waits_for_is_kept_and_listed(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "another")
    sent = caller.now
    assert caller.signal("approval", '{"ok":1}') == 0
    [kept] = caller.do(base.KeptSignals(now=caller.now))
    assert kept == base.KeptSignal("approval", b'{"ok":1}', sent, sent + 7 * DAY)


def test_a_signal_that_is_not_to_be_kept_goes_to_those_alone_who_wait(caller: Caller) -> None:
    run = caller.started()
    send = base.SendSignal(name="approval", payload="1", now=caller.now, expires_at=None)
    assert caller.do(send) == 0
    assert caller.do(base.KeptSignals(now=caller.now)) == []
    caller.wait(run, "approval")
    assert caller.do(send) == 1


def test_a_kept_signal_is_found_by_its_name_and_dropped_by_its_time_and_no_other_with_it(caller: Caller) -> None:
    for name, payload in (("approval", '"first"'), ("other", '"other"'), ("approval", '"second"')):
        caller.clock.advance(1)
        caller.signal(name, payload)
    first, second = caller.do(base.KeptSignals(now=caller.now, name="approval"))
    assert (first.payload, second.payload) == (b'"first"', b'"second"')
    drop = base.DropKept(name="approval", sent_at=first.sent_at)
    assert caller.do(drop) is True
    assert caller.do(drop) is False
    assert {kept.payload for kept in caller.do(base.KeptSignals(now=caller.now))} == {b'"second"', b'"other"'}


def test_a_kept_signal_that_has_expired_is_neither_taken_nor_listed(caller: Caller) -> None:
    caller.signal("approval", '"old"', keep=HOUR)
    caller.clock.advance(HOUR)
    caller.signal("approval", '"new"', keep=HOUR)
    assert [kept.payload for kept in caller.do(base.KeptSignals(now=caller.now))] == [b'"new"']
    run = caller.started()
    step = caller.wait(run, "approval")
    assert step is not None
    assert step.result == b'"new"'


def test_a_wait_with_a_signal_before_it_times_out_never(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval", timeout=HOUR)
    caller.signal("approval", '"just in time"')
    caller.clock.advance(HOUR)
    step = caller.expire(run, "approval")
    assert step is not None
    assert (step.status, step.result) == ("done", b'"just in time"')


def test_a_wait_that_times_out_says_so_whenever_asked_and_gets_no_signal_any_more(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval", timeout=HOUR)
    caller.clock.advance(HOUR)
    assert caller.signal("approval", '"late"') == 0
    step = caller.expire(run, "approval")
    assert step is not None
    assert (step.status, step.result, step.finished_at) == ("timed_out", b"null", caller.now)
    assert caller.do(base.OpenWaits()) == []
    caller.clock.advance(1)
    assert caller.expire(run, "approval") == step
    assert caller.wait(run, "approval") == step
    assert [kept.payload for kept in caller.do(base.KeptSignals(now=caller.now))] == [b'"late"']


def test_a_signal_before_the_deadline_wins_and_one_at_the_deadline_is_kept(caller: Caller) -> None:
    runs = [caller.started(), caller.started()]
    caller.wait(runs[0], "approval", timeout=HOUR)
    caller.wait(runs[1], "approval", timeout=HOUR + 1)
    caller.clock.advance(HOUR)
    assert caller.signal("approval") == 1
    caller.clock.advance(1)
    assert caller.signal("approval") == 0
    steps = [caller.expire(run, "approval") for run in runs]
    assert [step and step.status for step in steps] == ["timed_out", "done"]


def test_a_run_that_parks_after_the_signal_came_is_due_at_once(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval")
    caller.wait(run, "stock", position=2)
    assert caller.signal("stock") == 1
    assert caller.settle(run, Waits(("approval", "stock"), None))
    stored = caller.get(run)
    assert (stored.status, stored.reason, stored.due_at) == ("pending", "queued", caller.now)
    assert len(caller.claim()) == 1


def test_the_deadline_of_a_wait_survives_an_end_and_a_retry_unmoved(caller: Caller) -> None:
    run = caller.started()
    waiting = caller.wait(run, "approval", timeout=DAY)
    caller.settle(run, Failed(BROKE))
    caller.clock.advance(HOUR)
    caller.apply(state.retry(caller.get(run), caller.now))
    [again] = caller.claim()
    assert caller.wait(again.run, "approval", timeout=DAY) == waiting
    assert caller.signal("approval") == 1


def test_a_parked_run_becomes_due_at_its_first_deadline(caller: Caller) -> None:
    run = caller.started()
    caller.wait(run, "approval", timeout=HOUR)
    caller.settle(run, Waits(("approval",), caller.now + HOUR))
    caller.clock.advance(HOUR - 1)
    assert caller.claim() == []
    caller.clock.advance(1)
    assert [each.run.id for each in caller.claim()] == [run.id]


# --- workers ---------------------------------------------------------------------------------------------------------


def test_workers_are_listed_with_their_leases_and_a_renewal_moves_only_ones_own(caller: Caller) -> None:
    caller.clock.advance(1)
    caller.join("w-2", group="media")
    assert caller.do(base.RenewLease(worker="w-2", until=77))
    one, two = caller.do(base.ListWorkers())
    assert (one.id, two.id, two.group, two.lease_until) == ("w-1", "w-2", "media", 77)
    assert one.lease_until != 77


def test_a_worker_that_is_not_there_any_more_cannot_renew_its_lease(caller: Caller) -> None:
    assert caller.do(base.RemoveWorker(worker="w-1"))
    assert not caller.do(base.RenewLease(worker="w-1", until=caller.now + HOUR))
    assert caller.do(base.ListWorkers()) == []


def test_a_worker_that_was_given_up_neither_renews_nor_claims_and_its_runs_can_be_given_back(caller: Caller) -> None:
    run = caller.started()
    caller.enqueue()
    [seen] = caller.do(base.ListWorkers())
    assert caller.do(base.GiveUpWorker(worker="w-1", seen=seen.lease_until))
    assert not caller.do(base.RenewLease(worker="w-1", until=caller.now + DAY))
    assert caller.claim() == []
    assert caller.settle(run, WorkerLost())
    assert caller.do(base.RemoveWorker(worker="w-1"))


def test_a_worker_that_has_renewed_its_lease_since_it_was_looked_at_is_not_given_up(caller: Caller) -> None:
    [seen] = caller.do(base.ListWorkers())
    assert caller.do(base.RenewLease(worker="w-1", until=caller.now + DAY))
    assert not caller.do(base.GiveUpWorker(worker="w-1", seen=seen.lease_until))
    assert caller.do(base.RenewLease(worker="w-1", until=caller.now + 2 * DAY))
    assert not caller.do(base.GiveUpWorker(worker="nobody", seen=0))


def test_a_worker_leaves_the_list_once_its_runs_have_been_given_back(caller: Caller) -> None:
    run = caller.started()
    assert not caller.do(base.RemoveWorker(worker="w-1"))
    assert len(caller.do(base.ListWorkers())) == 1
    caller.settle(run, WorkerLost())
    assert caller.do(base.RemoveWorker(worker="w-1"))
    assert caller.do(base.RemoveWorker(worker="w-1"))


def test_the_runs_of_a_worker_are_those_that_it_has_in_hand(caller: Caller) -> None:
    caller.join("w-2")
    parked, ended, held = caller.started(), caller.started(), caller.started()
    caller.enqueue()
    [other] = caller.claim(worker="w-2")
    caller.settle(parked, Interrupted())
    caller.settle(ended, Returned("1"))
    assert caller.do(base.RunsOf(worker="w-1")) == [held]
    assert ids(caller.do(base.RunsOf(worker="w-2"))) == [other.run.id]
    assert caller.do(base.RunsOf(worker="nobody")) == []


# --- an operator's wake, and the pause -------------------------------------------------------------------------------


def asleep(caller: Caller, *lengths: int) -> Run:
    """A run that sleeps, parked, in so many branches."""
    run = caller.started()
    for n, length in enumerate(lengths, 1):
        until = caller.now + length
        caller.save(run, f"nap-{n}", n, "sleeping", kind="sleep", due_at=until, finished_at=None, result=None)
    caller.settle(run, Sleeps(caller.now + min(lengths)))
    return caller.get(run)


def test_the_run_that_is_due_next_is_found_by_what_it_is_pending_for(caller: Caller) -> None:
    assert caller.do(base.NextDue()) is None
    caller.enqueue(workflow="other", due_at=caller.now + HOUR)
    later, sooner = asleep(caller, 3 * HOUR), asleep(caller, 2 * HOUR)
    [delayed] = caller.do(base.ListRuns(workflow="other"))
    assert caller.do(base.NextDue()) == delayed
    assert caller.do(base.NextDue(reason="sleeping")) == sooner
    assert caller.do(base.NextDue(reason="waiting")) is None
    assert later.due_at == caller.now + 3 * HOUR


def test_a_run_that_an_operator_wakes_goes_on_within_its_attempt_and_its_sleep_is_over(caller: Caller) -> None:
    run = asleep(caller, HOUR)
    caller.clock.advance(MINUTE)
    assert caller.claim() == []
    assert caller.apply(state.wake(run, caller.now))
    [again] = caller.claim()
    assert (again.run.id, again.run.attempt, again.run.claim) == (run.id, 1, 2)
    assert [(step.name, step.due_at) for step in again.steps] == [("nap-1", caller.now)]


def test_a_wake_ends_the_sleep_that_would_have_ended_first_and_no_other(caller: Caller) -> None:
    run = asleep(caller, 2 * HOUR, HOUR)
    second = caller.now + 2 * HOUR
    caller.clock.advance(MINUTE)
    assert caller.apply(state.wake(run, caller.now))
    assert [step.due_at for step in caller.do(base.Steps(seq=run.seq))] == [second, caller.now]


def test_a_wake_that_comes_when_the_run_is_in_hand_already_changes_nothing(caller: Caller) -> None:
    run = asleep(caller, HOUR)
    caller.clock.advance(HOUR)
    caller.claim()
    assert not caller.apply(state.wake(run, caller.now))


def test_while_an_app_is_paused_nothing_is_claimed_and_nothing_counts_as_due(caller: Caller) -> None:
    def take(holder: str) -> bool:
        until = caller.now + SECOND
        return caller.do(base.TakeLease(name=base.PAUSE, holder=holder, until=until, now=caller.now))

    caller.enqueue()
    assert caller.do(base.Paused(now=caller.now)) is None
    assert take("tako dev 7")
    assert not take("tako dev 8")
    assert caller.do(base.Paused(now=caller.now)) == "tako dev 7"
    assert caller.claim() == []
    assert caller.do(base.Demand(now=caller.now)) == base.Due(frozenset(), caller.now + SECOND)
    caller.do(base.DropLease(name=base.PAUSE, holder="tako dev 7"))
    assert caller.do(base.Demand(now=caller.now)).groups == {"default"}
    assert len(caller.claim()) == 1


def test_a_pause_ends_with_whoever_renews_it(caller: Caller) -> None:
    caller.enqueue()
    caller.do(base.TakeLease(name=base.PAUSE, holder="tako dev 7", until=caller.now + SECOND, now=caller.now))
    assert caller.claim() == []
    caller.clock.advance(SECOND)
    assert caller.do(base.Paused(now=caller.now)) is None
    assert len(caller.claim()) == 1


def test_the_end_of_a_pause_rings_for_those_who_claim(caller: Caller, opened: StoreThread) -> None:
    async def heard() -> None:
        rung = asyncio.Event()
        listener = opened.bell.listen("c-waits")
        listener.start(lambda topics: rung.set() if "later" in topics else None)
        try:
            await opened.do(base.DropLease(name=base.PAUSE, holder="tako dev 7"))
            async with asyncio.timeout(20):
                await rung.wait()
        finally:
            listener.close()

    caller.do(base.TakeLease(name=base.PAUSE, holder="tako dev 7", until=caller.now + HOUR, now=caller.now))
    asyncio.run(heard())


# --- leader, schedules, old runs -------------------------------------------------------------------------------------


def test_a_lease_has_one_holder_until_it_lapses_or_is_dropped(caller: Caller) -> None:
    def take(holder: str, name: str = "leader") -> bool:
        until = caller.now + HOUR
        return caller.do(base.TakeLease(name=name, holder=holder, until=until, now=caller.now))

    assert take("a")
    assert take("a")
    assert not take("b")
    assert take("b", "another")
    caller.do(base.DropLease(name="leader", holder="b"))
    assert not take("b")
    caller.do(base.DropLease(name="leader", holder="a"))
    assert take("b")
    caller.clock.advance(HOUR)
    assert take("a")


def test_a_lease_that_a_clock_far_ahead_has_taken_holds_nobody_up(caller: Caller) -> None:
    def take(holder: str) -> bool:
        return caller.do(base.TakeLease(name="leader", holder=holder, until=caller.now + HOUR, now=caller.now))

    caller.clock.advance(HOUR)
    assert take("ahead")
    caller.clock.advance(-HOUR)
    assert not take("b"), "two clocks are never quite the same"
    caller.clock.advance(-1)
    assert take("b")


def schedule(workflow: str, next_at: int = 100, **fields: Any) -> ScheduleRecord:
    told = {"group": "default", "expression": "* * * * *", "timezone": "UTC", "catchup": "latest", "overlap": "allow"}
    return ScheduleRecord(workflow=workflow, next_at=next_at, **told | fields)


def test_a_group_whose_due_runs_nobody_declares_is_named_with_the_first_of_them(caller: Caller) -> None:
    due, later = caller.now, caller.now + 60_000_000
    for workflow, group, at in [
        ("old", "a", due), ("order", "a", due), ("old", "b", due), ("order", "c", later), ("x", "d", later),
    ]:  # fmt: skip
        caller.enqueue(workflow=workflow, group=group, due_at=at)
    caller.do(base.Demand(now=caller.now))

    def nobodys(**declared: list[str]) -> dict[str, str]:
        return caller.do(base.Undeclared(declared=declared))

    assert nobodys(a=["order"], b=["order"], c=[]) == {"b": "old"}, "what is not due is not looked at"
    assert nobodys(a=["order", "old"], b=["old"]) == {}
    assert nobodys(d=["x"]) == {"a": "old", "b": "old"}
    caller.do(base.Demand(now=later))
    assert nobodys(a=["old"], b=["old"], d=["x"]) == {"c": "order"}


def test_schedules_are_those_of_the_manifest_and_an_unchanged_one_keeps_its_place(caller: Caller) -> None:
    caller.do(base.SetSchedules(schedules=[schedule("b"), schedule("a"), schedule("c")]))
    assert [s.workflow for s in caller.do(base.ListSchedules())] == ["a", "b", "c"]
    moved = [
        schedule("a", 500),
        schedule("b", 500, expression="5 * * * *"),
        schedule("d", 500),
        schedule("e", 500, timezone="Europe/Paris", overlap="skip"),
    ]
    caller.do(base.SetSchedules(schedules=moved))
    found = {s.workflow: s for s in caller.do(base.ListSchedules())}
    assert {name: s.next_at for name, s in found.items()} == {"a": 100, "b": 500, "d": 500, "e": 500}
    assert found["e"] == moved[3]


def test_a_schedule_fires_once_and_only_at_the_time_that_was_seen(caller: Caller) -> None:
    caller.do(base.SetSchedules(schedules=[schedule("order", caller.now)]))

    def fire(run: NewRun | None) -> bool:
        seen, then = caller.now, caller.now + HOUR
        return caller.do(
            base.FireSchedule(workflow="order", seen_next_at=seen, next_at=then, fired_at=seen, run=run, now=seen)
        )

    first = caller.new(scheduled_at=caller.now)
    assert fire(first)
    assert not fire(caller.new())
    assert ids(caller.do(base.ListRuns())) == [first.id]
    [stored] = caller.do(base.ListSchedules())
    assert (stored.next_at, stored.last_at, stored.last_run, stored.alive) == (
        caller.now + HOUR, caller.now, first.id, True,
    )  # fmt: skip
    [claimed] = caller.claim()
    assert claimed.run.scheduled_at == caller.now
    caller.settle(claimed.run, Returned("1"))
    assert [s.alive for s in caller.do(base.ListSchedules())] == [False]
    caller.clock.advance(HOUR)
    assert fire(None)
    assert len(caller.do(base.ListRuns())) == 1


def test_pruning_deletes_what_ended_before_with_its_steps_and_attempts_and_nothing_else(caller: Caller) -> None:
    runs = [caller.started() for _ in range(4)]
    for run in runs[:3]:
        caller.save(run, "charge")
        caller.settle(run, Returned("1"))
        caller.clock.advance(SECOND)
    before = caller.now - SECOND
    assert caller.do(base.Prune(group="media", before=caller.now, limit=10)).count == 0
    first = caller.do(base.Prune(group="default", before=before, limit=1))
    assert first.count == 1
    assert first.after is not None
    assert caller.do(base.Prune(group="default", before=before, limit=10, after=first.after)).count == 1
    assert caller.do(base.Prune(group="default", before=before, limit=10)).count == 0
    assert ids(caller.do(base.ListRuns())) == [runs[3].id, runs[2].id]
    for run, kept in zip(runs, (0, 0, 1, 0), strict=True):
        assert len(caller.do(base.Steps(seq=run.seq))) == kept
        assert len(caller.do(base.Attempts(seq=run.seq))) == kept


def test_the_groups_that_have_ended_runs_are_told(caller: Caller) -> None:
    assert caller.do(base.EndedGroups()) == []
    for group in ("media", "email"):
        caller.join(f"w-{group}", group)
        for _ in range(2):
            caller.enqueue(group=group)
            [claimed] = caller.claim(worker=f"w-{group}", group=group)
            caller.settle(claimed.run, Returned("1"))
    caller.started()
    assert caller.do(base.EndedGroups()) == ["email", "media"]


def test_expired_signals_go_the_oldest_first_and_no_more_than_asked_for(caller: Caller) -> None:
    for n in range(4):
        caller.signal(f"s{n}", keep=(n + 1) * HOUR)
    caller.clock.advance(3 * HOUR)
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 2
    assert [kept.name for kept in caller.do(base.KeptSignals(now=0))] == ["s2", "s3"]
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 1
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 0
    assert [kept.name for kept in caller.do(base.KeptSignals(now=0))] == ["s3"]


def ended_in_many_ways(caller: Caller) -> dict[str, str]:
    """A run of each name, which says its workflow and how it ended, all of them at the same instant; name by id."""
    made: dict[str, str] = {}
    for workflow in ("order", "pack"):
        for end, outcome in (("done", Returned("1")), ("dead", Failed(BROKE)), ("gone", Bailed("x"))):
            made[caller.enqueue(workflow=workflow)] = f"{workflow} {end}"
            [claimed] = caller.claim(workflows=("order", "pack"))
            caller.settle(claimed.run, outcome)
    caller.clock.advance(SECOND)
    return made


def test_pruning_takes_only_the_workflow_and_the_ends_that_it_is_asked_for(caller: Caller) -> None:
    made = ended_in_many_ways(caller)
    live = caller.enqueue()

    def left_after(**asked: Any) -> list[str]:
        caller.do(base.Prune(group="default", before=caller.now, limit=100, **asked))
        return [made.get(run.id, "live") for run in reversed(caller.do(base.ListRuns()))]

    all_but = list(made.values())
    for asked, gone in (
        ({"workflow": "pack", "statuses": [Status.DEAD]}, {"pack dead"}),
        ({"statuses": [Status.DEAD, Status.CANCELLED]}, {"order dead", "order gone", "pack gone"}),
        ({"workflow": "order"}, {"order done"}),
        ({}, {"pack done"}),
    ):
        all_but = [name for name in all_but if name not in gone]
        assert left_after(**asked) == [*all_but, "live"]
    assert caller.do(base.FindRuns(prefix=live))


def test_pruning_walks_over_what_does_not_fit_a_stretch_at_a_time_and_comes_to_an_end(caller: Caller) -> None:
    made = ended_in_many_ways(caller)
    after: tuple[int, int] | None = (0, 0)
    counts = []
    while after is not None:
        pruned = caller.do(base.Prune(group="default", before=caller.now, limit=2, workflow="pack", after=after))
        counts.append(pruned.count)
        after = pruned.after
    assert [count for count in counts if count] == [1, 2]
    assert {made[run.id].split()[0] for run in caller.do(base.ListRuns())} == {"order"}


def test_a_run_that_goes_on_again_is_not_pruned_however_long_ago_it_had_ended(caller: Caller) -> None:
    run = caller.started()
    caller.settle(run, Failed(BROKE))
    caller.apply(state.retry(caller.get(run), caller.clock.advance(DAY)))
    assert caller.do(base.Prune(group="default", before=caller.clock.advance(DAY), limit=10)) == base.Pruned(0, None)
    assert caller.get(run).status == "pending"


def test_ended_runs_are_counted_by_when_and_how_they_ended(caller: Caller) -> None:
    first = caller.now
    ended_in_many_ways(caller)
    caller.started()

    def counted(**asked: Any) -> int:
        return caller.do(base.CountEnded(**{"before": caller.now, **asked}))

    assert counted() == 6
    assert counted(before=first) == 0
    assert counted(since=caller.now) == 0
    assert counted(workflow="pack") == 3
    assert counted(statuses=(Status.DEAD,)) == 2
    assert counted(statuses=(Status.DEAD,), since=caller.now) == 0
    assert counted(statuses=(Status.DEAD, Status.SUCCEEDED), workflow="pack") == 2


# --- what is there ---------------------------------------------------------------------------------------------------


def test_demand_tells_which_groups_have_due_runs_and_when_the_next_one_becomes_due(caller: Caller) -> None:
    assert caller.do(base.Demand(now=caller.now)) == base.Due(frozenset(), None)
    caller.enqueue(group="a")
    caller.enqueue(group="a", priority=1)
    caller.enqueue(group="b", workflow="unknown")
    caller.enqueue(group="c", due_at=caller.now + HOUR)
    caller.enqueue(group="d", due_at=caller.now + 2 * HOUR)
    assert caller.do(base.Demand(now=caller.now)) == base.Due(frozenset({"a", "b"}), caller.now + HOUR)
    due = caller.do(base.Demand(now=caller.clock.advance(HOUR)))
    assert due == base.Due(frozenset({"a", "b", "c"}), caller.now + HOUR)
    parked = caller.started()
    caller.wait(parked, "go")
    caller.settle(parked, Waits(("go",), None))
    assert caller.do(base.Demand(now=caller.now)) == due


def test_the_data_version_changes_when_another_process_has_written(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    before = caller.do(base.DataVersion())
    caller.enqueue()
    assert caller.do(base.DataVersion()) == before
    finished(
        script("from tako_runtime import store\nfrom tako_runtime.store import base\n"
               "store.current().do_sync(base.ListRuns()); store.current().close()", home=home)
    )  # fmt: skip
    assert caller.do(base.DataVersion()) == before
    finished(script("from tako_runtime import signal_sync\nsignal_sync('go')", home=home))
    assert caller.do(base.DataVersion()) != before


def test_a_run_is_found_by_its_number_or_not_at_all(caller: Caller) -> None:
    run = caller.started()
    assert caller.do(base.GetRun(seq=run.seq)) == run
    assert caller.do(base.GetRun(seq=run.seq + 1)) is None


def test_runs_are_found_by_the_beginning_of_their_id(caller: Caller) -> None:
    for made in ("aa-1", "aa-2", "ab-1", "b", "a%", "a_"):
        caller.enqueue(id=made)

    def found(prefix: str, limit: int = 5) -> list[str]:
        return sorted(ids(caller.do(base.FindRuns(prefix=prefix, limit=limit))))

    assert found("aa-1") == ["aa-1"]
    assert found("aa") == ["aa-1", "aa-2"]
    assert found("a%") == ["a%"]
    assert found("a_") == ["a_"]
    assert found("'") == []
    assert len(found("a", limit=2)) == 2
    assert len(found("", limit=100)) == 6


def test_runs_are_found_by_the_end_of_their_id_where_none_begins_so(caller: Caller) -> None:
    for made in ("aa-1", "ab-1", "ac-2", "2b"):
        caller.enqueue(id=made)

    def found(end: str, limit: int = 5) -> list[str]:
        return sorted(ids(caller.do(base.FindRuns(prefix=end, limit=limit))))

    assert found("c-2") == ["ac-2"]
    assert found("-1") == ["aa-1", "ab-1"]
    assert found("2") == ["2b"]
    assert found("_-1") == found("%") == found("xaa-1") == []
    assert len(found("-1", limit=1)) == 1


def test_runs_are_listed_newest_first_by_status_workflow_and_age(caller: Caller) -> None:
    made: dict[str, str] = {}
    for name, fields, outcome in [
        ("done", {}, Returned("1")),
        ("pack", {"workflow": "pack"}, None),
        ("dead", {}, Failed(BROKE)),
        ("gone", {}, Bailed("x")),
        ("held", {}, None),
        ("queued", {"due_at": caller.now + DAY}, None),
    ]:
        made[caller.enqueue(**fields)] = name
        caller.clock.advance(SECOND)
        if name not in ("queued", "pack"):
            [claimed] = caller.claim()
            if outcome is not None:
                caller.settle(claimed.run, outcome)

    def listed(**where: Any) -> list[str]:
        return [made[run.id] for run in caller.do(base.ListRuns(**where))]

    everything = ["queued", "held", "gone", "dead", "pack", "done"]
    assert listed() == everything
    assert listed(limit=2) == ["queued", "held"]
    assert listed(workflow="order") == [name for name in everything if name != "pack"]
    assert listed(statuses=[Status.SUCCEEDED]) == ["done"]
    assert listed(statuses=[Status.PENDING]) == ["queued", "pack"]
    assert listed(statuses=[Status.DEAD, Status.SUCCEEDED, Status.RUNNING]) == ["held", "dead", "done"]
    assert listed(statuses=[Status.DEAD, Status.SUCCEEDED], limit=1) == ["dead"]
    assert listed(statuses=[Status.PENDING, Status.SUCCEEDED], workflow="pack") == ["pack"]
    assert listed(workflow="nowhere") == []
    since = first_id_at(caller.now - 4 * SECOND)
    assert listed(since_id=since) == everything[:4]
    assert listed(since_id=since, statuses=[Status.DEAD, Status.SUCCEEDED]) == ["dead"]
    assert listed(since_id=since, workflow="pack") == []
    assert listed(statuses=[Status.DEAD, Status.DEAD]) == ["dead"]


def test_open_waits_are_listed_for_one_run_or_for_all(caller: Caller) -> None:
    one, two = caller.started(), caller.started()
    caller.wait(one, "z", position=1, timeout=HOUR)
    caller.wait(one, "a", position=2)
    caller.wait(two, "m#2", signal="m")
    of_one = caller.do(base.OpenWaits(seq=one.seq))
    assert of_one == [
        base.Wait("z", one.id, "z", caller.now, caller.now + HOUR, "order"),
        base.Wait("a", one.id, "a", caller.now, None, "order"),
    ]
    assert [wait.signal for wait in caller.do(base.OpenWaits())] == ["a", "m", "z"]
    assert [wait.signal for wait in caller.do(base.OpenWaits(limit=2))] == ["a", "m"]
    assert caller.do(base.OpenWaits(seq=two.seq)) == [base.Wait("m", two.id, "m#2", caller.now, None, "order")]


def test_kept_signals_are_listed_oldest_first(caller: Caller) -> None:
    for name in ("c", "a", "b"):
        caller.signal(name)
    assert [kept.name for kept in caller.do(base.KeptSignals(now=caller.now))] == ["c", "a", "b"]
    assert [kept.name for kept in caller.do(base.KeptSignals(now=caller.now, limit=2))] == ["c", "a"]
    assert caller.do(base.CountKept(now=caller.now)) == 3
    assert caller.do(base.CountKept(now=caller.now + 8 * DAY)) == 0


def test_live_runs_are_counted_by_status_and_reason(caller: Caller) -> None:
    assert caller.do(base.CountRuns()) == {}
    ended, asleep, retrying = caller.started(), caller.started(), caller.started()
    caller.settle(ended, Returned("1"))
    caller.settle(asleep, Sleeps(caller.now + HOUR))
    caller.settle(retrying, Raised(BROKE))
    caller.started()
    for _ in range(3):
        caller.enqueue()
    assert caller.do(base.CountRuns()) == {
        ("pending", "sleeping"): 1,
        ("pending", "retrying"): 1,
        ("pending", "queued"): 3,
        ("running", "claimed"): 1,
    }


def test_a_groups_queue_is_what_is_due_and_nobody_has_claimed(caller: Caller) -> None:
    assert caller.do(base.Queues(now=caller.now)) == []
    oldest = caller.now
    caller.started()
    caller.enqueue(group="b")
    caller.clock.advance(SECOND)
    caller.enqueue(group="b", priority=9)
    caller.enqueue(group="a", due_at=caller.now + SECOND)
    caller.enqueue(group="a", due_at=caller.now + HOUR)
    assert caller.do(base.Queues(now=caller.now)) == [base.Queue("b", 2, oldest)]
    later = caller.clock.advance(SECOND)  # nobody has made claimable what became due: it counts all the same
    assert caller.do(base.Queues(now=later)) == [base.Queue("a", 1, later), base.Queue("b", 2, oldest)]
    caller.enqueue(group="a")
    caller.do(base.Demand(now=later))
    assert caller.do(base.Queues(now=later)) == [base.Queue("a", 2, later), base.Queue("b", 2, oldest)]


def test_ahead_of_a_run_stand_those_that_are_claimed_before_it(caller: Caller) -> None:
    for priority, due in ((0, 5), (1, 9), (0, 3), (0, 3), (1, 2), (-1, 0), (0, 8)):
        caller.enqueue(priority=priority, due_at=caller.now + due * SECOND)
    caller.enqueue(group="other", priority=99)
    caller.enqueue(priority=99, due_at=caller.now + HOUR)
    now = caller.clock.advance(10 * SECOND)
    runs = [run for run in caller.do(base.ListRuns()) if run.group == "default" and (run.due_at or 0) <= now]

    def ahead() -> dict[str, int]:
        return {run.id: caller.do(base.RunsAhead(run=run, now=now)) for run in runs}

    before = ahead()
    caller.do(base.Demand(now=now))  # makes claimable what has become due: it stands where it stood
    assert ahead() == before
    claimed = [one.run.id for one in caller.claim(limit=100)]
    assert before == {run: place for place, run in enumerate(claimed)}


def test_what_workers_have_in_hand_is_counted(caller: Caller) -> None:
    assert caller.do(base.InHand()) == {}
    caller.join("w-2")
    caller.started()
    for _ in range(3):
        caller.enqueue()
    caller.claim(limit=2, worker="w-2")
    assert caller.do(base.InHand()) == {"w-1": 1, "w-2": 2}


def test_live_runs_come_page_by_page_with_what_they_have_finished(caller: Caller) -> None:
    taken = caller.started()
    for position, name in enumerate(["b", "a", "a#2"], 1):
        caller.save(taken, name, position)
    caller.save(taken, "failed", 4, "failed", result=None, error="{}")
    ended = caller.started()
    caller.do(base.Apply(change=settle(ended, Returned("1"), caller.now)))
    waiting = [caller.enqueue(workflow="order" if number % 2 else "other") for number in range(4)]
    whole = [base.Live(one, "order" if number % 2 else "other", "pending", ()) for number, one in enumerate(waiting)]
    whole += [base.Live(taken.id, "order", "running", ["b", "a", "a#2"])]
    assert caller.do(base.LiveRuns()) == whole
    assert caller.do(base.LiveRuns(limit=2)) == whole[:2]
    assert caller.do(base.LiveRuns(after=whole[2], limit=2)) == whole[3:]
    assert caller.do(base.LiveRuns(after=whole[-1])) == []


# --- who is told -----------------------------------------------------------------------------------------------------


def test_the_bell_rings_with_whom_a_write_concerns(caller: Caller, opened: StoreThread) -> None:
    heard: list[set[str]] = []

    class Ear(Bell):
        def ring(self, topics: set[str]) -> None:
            heard.append(topics)

    opened.bell = Ear(opened.bell._folder)

    def rung(do: Callable[[], object]) -> set[str]:
        heard.clear()
        do()
        return set().union(*heard)

    assert rung(caller.enqueue) == {"due:default"}
    assert rung(lambda: caller.enqueue(group="media", due_at=caller.now + HOUR)) == {"later"}
    run = caller.claim()[0].run
    assert rung(lambda: caller.save(run, "a")) == set()
    assert rung(lambda: caller.signal("kept")) == set()
    caller.wait(run, "approval")
    caller.wait(run, "approval#2", signal="approval", position=2)
    assert rung(lambda: caller.signal("approval")) == {"signal"}
    assert rung(lambda: caller.apply(state.cancel(run, "by Ada", caller.now))) == {"cancel"}
    assert rung(lambda: caller.settle(caller.get(run), Interrupted())) == {"ended"}
    other = caller.started()
    assert rung(lambda: caller.settle(other, Raised(BROKE))) == {"later"}
    third = caller.started()
    caller.wait(third, "go")
    caller.settle(third, Waits(("go",), None))
    assert rung(lambda: caller.signal("go")) == {"due:default"}
    assert rung(lambda: caller.do(base.ListRuns())) == set()


# --- the store thread ------------------------------------------------------------------------------------------------


def together(opened: StoreThread, *ops: base.Operation[Any]) -> list[Any]:
    """The answers of operations that one pass of an event loop queues; exceptions as they are."""

    async def ask() -> list[Any]:
        return await asyncio.gather(*map(opened.do, ops), return_exceptions=True)

    return asyncio.run(ask())


def test_an_operation_that_fails_does_not_hurt_those_that_travel_with_it(caller: Caller, opened: StoreThread) -> None:
    taken = caller.enqueue()
    new = [caller.new() for _ in range(4)]
    batch = [base.Enqueue(runs=[run], now=caller.now) for run in new]
    batch.insert(2, base.Enqueue(runs=[caller.new(id=taken)], now=caller.now))
    answers = together(opened, *batch)
    assert isinstance(answers.pop(2), StoreError)
    assert answers == [[run.id] for run in new]
    assert len(caller.do(base.ListRuns())) == 5


def test_an_operation_that_no_store_knows_is_an_error_of_its_caller_alone(caller: Caller, opened: StoreThread) -> None:
    class Unknown(base.Operation[int], frozen=True):
        pass

    unknown, known = together(opened, Unknown(), base.Enqueue(runs=[caller.new()], now=caller.now))
    assert isinstance(unknown, StoreError)
    assert len(known) == 1


def test_many_threads_and_event_loops_use_one_store_at_once(caller: Caller, opened: StoreThread) -> None:
    def from_a_thread(n: int) -> list[str]:
        return [opened.do_sync(base.Enqueue(runs=[caller.new()], now=caller.now))[0] for _ in range(n)]

    def from_a_loop(n: int) -> list[str]:
        async def ask() -> list[str]:
            batch = [base.Enqueue(runs=[caller.new()], now=caller.now) for _ in range(n)]
            return [answer for [answer] in await asyncio.gather(*map(opened.do, batch))]

        return asyncio.run(ask())

    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(each, 25) for each in (from_a_thread, from_a_loop) * 8]
        made = [run_id for job in jobs for run_id in job.result()]
    assert len(set(made)) == 16 * 25
    assert {run.id for run in caller.do(base.ListRuns(limit=1_000))} == set(made)


@pytest.mark.usefixtures("hurried_threads")
def test_event_loops_that_come_and_go_in_many_threads_do_not_trip_over_each_other(opened: StoreThread) -> None:
    async def ask() -> int:
        return await opened.do(base.DataVersion())

    def come_and_go() -> None:
        for _ in range(100):
            asyncio.run(ask())

    with ThreadPoolExecutor(16) as pool:
        for job in [pool.submit(come_and_go) for _ in range(16)]:
            job.result()


@pytest.fixture
def hurried_threads() -> Any:
    """Threads take turns as often as they can, so that a race that takes days elsewhere takes a second here."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_caller_who_gives_up_waiting_does_not_stop_the_others(caller: Caller, opened: StoreThread) -> None:
    async def ask() -> list[Any]:
        impatient = asyncio.ensure_future(opened.do(base.Enqueue(runs=[caller.new()], now=caller.now)))
        patient = asyncio.ensure_future(opened.do(base.Enqueue(runs=[caller.new()], now=caller.now)))
        await asyncio.sleep(0)
        impatient.cancel()
        return await asyncio.gather(impatient, patient, return_exceptions=True)

    gone, there = asyncio.run(ask())
    assert isinstance(gone, asyncio.CancelledError)
    assert len(there) == 1
    assert caller.enqueue()


def test_a_loop_that_is_closed_with_an_operation_under_way_does_not_stop_the_others(
    caller: Caller, opened: StoreThread
) -> None:
    loop = asyncio.new_event_loop()

    async def leave() -> None:
        task = asyncio.ensure_future(opened.do(base.Enqueue(runs=[caller.new()], now=caller.now)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()

    loop.run_until_complete(leave())
    loop.close()
    assert caller.enqueue()


def test_a_closed_store_says_so(opened: StoreThread) -> None:
    async def ask() -> None:
        await opened.do(base.ListRuns())

    opened.close()
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        opened.do_sync(base.ListRuns())
    with pytest.raises(StoreError, match="closed"):
        asyncio.run(ask())


def test_what_a_loop_has_asked_for_when_the_store_closes_is_answered(caller: Caller, opened: StoreThread) -> None:
    async def ask() -> Any:
        answer = opened.do(base.Enqueue(runs=[caller.new()], now=caller.now))
        opened.close()
        done, _ = await asyncio.wait([answer], timeout=10)
        return done and (answer.exception() or answer.result())

    assert isinstance(asyncio.run(ask()), list | StoreError)


def test_closing_waits_for_what_is_queued_and_nobody_is_left_without_an_answer(
    caller: Caller, opened: StoreThread, home: Home
) -> None:
    begun = threading.Barrier(9)

    def ask() -> tuple[list[str], StoreError]:
        told: list[str] = []
        begun.wait()
        while True:
            try:
                told += opened.do_sync(base.Enqueue(runs=[caller.new()], now=caller.now), timeout=10)
            except StoreError as error:
                return told, error

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        begun.wait()
        opened.close()
        asked = [job.result() for job in asking]
    assert {str(error) for _, error in asked} == {"the store is closed"}
    again = open_store(home)
    stored = again.do_sync(base.ListRuns(limit=100_000))
    again.close()
    assert sorted(ids(stored)) == sorted(run_id for told, _ in asked for run_id in told)


def test_a_store_that_cannot_be_opened_is_an_error_where_it_is_opened(home: Home) -> None:
    def nowhere() -> base.Store:
        raise StoreError("no disk")

    with pytest.raises(StoreError, match="no disk"):
        StoreThread(nowhere, Bell(home.app_dir))


def test_asking_without_a_loop_is_an_error_at_the_call_and_asks_for_nothing(
    caller: Caller, opened: StoreThread
) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        opened.do(base.Enqueue(runs=[caller.new()], now=caller.now))
    assert caller.do(base.ListRuns()) == []


# --- health ----------------------------------------------------------------------------------------------------------


def test_a_group_is_unhealthy_since_its_first_report_until_it_is_reported_healthy(caller: Caller) -> None:
    first = caller.now
    caller.do(base.ReportHealth(group="media", host="a", now=first, reason="no module", details="line 1"))
    caller.do(base.ReportHealth(group="media", host="a", now=first + SECOND, reason="exit code 3"))
    caller.do(base.ReportHealth(group="default", host="b", now=first, reason="frozen"))
    assert caller.do(base.ListHealth()) == [
        base.Unhealthy("default", "b", first, "frozen", ""),
        base.Unhealthy("media", "a", first, "exit code 3", ""),
    ]
    caller.do(base.ReportHealth(group="media", host="a", now=first, reason=None))
    caller.do(base.ReportHealth(group="media", host="never reported", now=first, reason=None))
    assert [one.group for one in caller.do(base.ListHealth())] == ["default"]


def test_a_fork_after_a_store_was_closed_closes_no_file_a_second_time(home: Home) -> None:
    """By then its files' numbers may be those of others."""
    thread = open_store(home)
    thread.do_sync(base.ListRuns())
    thread.close()
    pipes = [os.pipe() for _ in range(8)]  # they get the numbers that have just become free
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for pair in pipes:
        for end in pair:
            os.close(end)  # OSError, if somebody else has
