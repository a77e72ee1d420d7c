"""The store's contract for those who share it: workers, leases and schedules, who is told, and the store thread."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import BOTH, BROKE, Caller, finished, ids, script

from tako_runtime import state
from tako_runtime.bell import Bell
from tako_runtime.clock import DAY, HOUR, SECOND
from tako_runtime.errors import StoreError
from tako_runtime.run import NewRun, ScheduleRecord, StepRecord
from tako_runtime.state import Interrupted, Raised, Returned, Waits, WorkerLost, settle
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread

STORES = BOTH


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


# --- the pause -------------------------------------------------------------------------------------------------------


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


# --- leader, schedules -----------------------------------------------------------------------------------------------


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
