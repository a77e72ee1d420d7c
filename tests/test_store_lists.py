"""The store's contract for whoever looks at its runs: what is due, found, listed, counted, and pruned."""

from typing import Any

from conftest import BOTH, BROKE, Caller, ids

from tako_runtime import state
from tako_runtime.clock import DAY, HOUR, SECOND
from tako_runtime.run import Status, first_id_at
from tako_runtime.state import Bailed, Failed, Raised, Returned, Sleeps, Waits, settle
from tako_runtime.store import base

STORES = BOTH


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


# --- old runs --------------------------------------------------------------------------------------------------------


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
