"""The store's contract for a run that is parked: signals, waits and their deadlines, and sleeps that are woken."""

from conftest import BOTH, BROKE, Caller

from tako_runtime import state
from tako_runtime.clock import DAY, HOUR, MINUTE, SECOND
from tako_runtime.run import Run
from tako_runtime.state import Failed, Raised, Sleeps, Waits
from tako_runtime.store import base

STORES = BOTH


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


def test_expired_signals_go_the_oldest_first_and_no_more_than_asked_for(caller: Caller) -> None:
    for n in range(4):
        caller.signal(f"s{n}", keep=(n + 1) * HOUR)
    caller.clock.advance(3 * HOUR)
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 2
    assert [kept.name for kept in caller.do(base.KeptSignals(now=0))] == ["s2", "s3"]
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 1
    assert caller.do(base.ExpireSignals(now=caller.now, limit=2)) == 0
    assert [kept.name for kept in caller.do(base.KeptSignals(now=0))] == ["s3"]


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


# --- an operator's wake ----------------------------------------------------------------------------------------------


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
