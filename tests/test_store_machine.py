"""The store against a model: whatever is asked for in whatever order, both come to the same runs, waits and signals."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import apsw
import pytest
from conftest import BOTH, Caller
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tako_runtime import state
from tako_runtime.clock import DAY, HOUR, MINUTE
from tako_runtime.errors import Refused
from tako_runtime.failure import Failure
from tako_runtime.run import Run
from tako_runtime.state import Bailed, Failed, Interrupted, Outcome, Raised, Returned, Sleeps, Waits, WorkerLost
from tako_runtime.store import Home, base, open_store

STORES = BOTH
NAMES = ("approval", "stock")
KEEP = 2 * DAY
LIVE = ("pending", "running")
which = st.integers(0, 1_000)  # of those that are there, counted round
some_run = precondition(lambda self: self.some(0, "running"))
some_wait = precondition(lambda self: any(told.waits for told in self.runs))
some_end = precondition(lambda self: self.some(0, "cancelled", "dead"))


@dataclass
class Wait:
    step: str
    signal: str
    position: int
    deadline: int | None


@dataclass
class Told:
    """A run, as the model has it. What a wait got is in `steps`, beside what steps returned."""

    id: str
    order: int
    priority: int
    key: str | None
    due: int | None
    status: str = "pending"
    reason: str = "queued"
    claim: int = 0
    worker: str | None = None
    attempt: int = 0
    attempt_open: bool = False
    budget: int = 3
    cancelling: bool = False
    steps: dict[str, bytes | None] = field(default_factory=dict)
    waits: list[Wait] = field(default_factory=list)
    unanswered: dict[str, Wait] = field(default_factory=dict)  # an end closes waits, a retry may open them again
    seen: list[Run] = field(default_factory=list)  # every claim of it, as its worker was given it


class StoreAgainstModel(RuleBasedStateMachine):
    def __init__(self, new_home: Callable[[Path], Home]) -> None:
        super().__init__()
        self.new_home = new_home

    @initialize(keys=st.lists(st.sampled_from([None, "a", "b"]), min_size=3, max_size=3))
    def open(self, keys: list[str | None]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="tako-", dir="/tmp", ignore_cleanup_errors=True)
        self.home = self.new_home(Path(self.folder.name))
        self.store = open_store(self.home)
        self.caller = Caller(self.store)
        self.caller.join("w-2")
        self.runs: list[Told] = []
        self.kept: list[tuple[str, str, int]] = []  # name, payload, expiry
        self.sent = 0
        for key in keys:
            self.enqueue(0, key, 0)
        self.claim(2, "w-1")

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.close()
        if (path := self.home.app_dir / "runs.db").exists():
            file = apsw.Connection(str(path))
            assert file.pragma("integrity_check") == "ok"
            file.close()
        self.folder.cleanup()

    # --- the model ---

    @property
    def now(self) -> int:
        return self.caller.now

    def some(self, n: int, *statuses: str) -> Told | None:
        there = [run for run in self.runs if run.status in statuses]
        return there[n % len(there)] if there else None

    def holder(self, key: str | None) -> Told | None:
        return next((run for run in self.runs if key and run.key == key and run.status in LIVE), None)

    def end(self, told: Told, status: str) -> None:
        told.status, told.worker, told.cancelling, told.attempt_open, told.waits = status, None, False, False, []

    def settle(self, told: Told, outcome: Outcome) -> bool:
        """Write the outcome, under the newest claim. What would go on and was asked to cancel does not land as it was
        seen; as it is, it ends."""
        out_of_attempts = isinstance(outcome, Raised) and told.attempt >= told.budget
        ends = isinstance(outcome, Returned | Bailed | Failed) or out_of_attempts
        if told.cancelling and not ends:
            assert not self.caller.settle(told.seen[-1], outcome)
            assert self.caller.settle(self.caller.get(told.seen[-1]), outcome)
            self.end(told, "cancelled")
            return False
        assert self.caller.settle(told.seen[-1], outcome)
        told.worker = None
        return True

    # --- what may happen ---

    @rule(priority=st.integers(-1, 1), key=st.sampled_from([None, None, "a", "b"]), delay=st.sampled_from([0, 0, HOUR]))
    def enqueue(self, priority: int, key: str | None, delay: int) -> None:
        run_id = self.caller.enqueue(priority=priority, unique_key=key, due_at=self.now + delay)
        holder = self.holder(key)
        if holder is not None:
            assert run_id == holder.id
        else:
            self.runs.append(Told(run_id, len(self.runs), priority, key, self.now + delay))

    @rule(limit=st.integers(1, 3), worker=st.sampled_from(["w-1", "w-2"]))
    def claim(self, limit: int, worker: str) -> None:
        due = [run for run in self.runs if run.status == "pending" and run.due is not None and run.due <= self.now]
        due.sort(key=lambda run: (-run.priority, run.due, run.order))
        claimed = self.caller.claim(limit=limit, worker=worker)
        assert [each.run.id for each in claimed] == [run.id for run in due[:limit]]
        for each, told in zip(claimed, due, strict=False):
            told.status, told.reason, told.worker = "running", "claimed", worker
            told.claim += 1
            told.attempt += not told.attempt_open
            told.attempt_open = True
            told.seen.append(each.run)
            assert (each.run.claim, each.run.attempt) == (told.claim, told.attempt)
            answered = {step.name: step.result for step in each.steps if step.status in ("done", "timed_out")}
            assert answered == told.steps

    @some_run
    @rule(n=which)
    def save(self, n: int) -> None:
        if told := self.some(n, "running"):
            name = f"s{len(told.steps) % 4}"
            value = str(self.now).encode()
            stored = self.caller.save(told.seen[-1], name, 1, result=value)
            assert stored is not None
            assert stored.result == told.steps.setdefault(name, value)

    @some_run
    @rule(n=which, name=st.sampled_from(NAMES), again=st.booleans(), timeout=st.sampled_from([None, MINUTE, DAY]))
    def wait(self, n: int, name: str, again: bool, timeout: int | None) -> None:
        told = self.some(n, "running")
        if told is None:
            return
        step = f"{name}#2" if again else name
        position = 2 if again else 1
        asked = self.caller.wait(told.seen[-1], step, signal=name, position=position, timeout=timeout)
        assert asked is not None
        if step in told.steps:
            assert asked.result == told.steps[step]
            return
        deadline = None if timeout is None else self.now + timeout
        wait = told.unanswered.setdefault(step, Wait(step, name, position, deadline))
        kept = next((each for each in self.kept if each[0] == name), None)
        if kept is not None:
            self.kept.remove(kept)
            self.answer(told, wait, kept[1].encode())
        elif wait not in told.waits:
            told.waits.append(wait)
        assert (asked.result, asked.due_at) == (told.steps.get(step), wait.deadline)

    def answer(self, told: Told, wait: Wait, payload: bytes) -> None:
        told.steps[wait.step] = payload
        del told.unanswered[wait.step]
        told.waits = [each for each in told.waits if each.step != wait.step]

    @some_wait
    @rule(n=which)
    def expire(self, n: int) -> None:
        waiting = [run for run in self.runs if run.status == "running" and run.waits]
        told = waiting[n % len(waiting)] if waiting else None
        late = [w for w in told.waits if w.deadline is not None and w.deadline <= self.now] if told else []
        if told and late:
            expired = self.caller.expire(told.seen[-1], late[0].step)
            assert expired is not None
            assert expired.status == "timed_out"
            self.answer(told, late[0], b"null")

    @rule(name=st.sampled_from(NAMES))
    def signal(self, name: str) -> None:
        self.sent += 1
        payload = str(self.sent)
        took = 0
        for told in self.runs:
            waits = [w for w in told.waits if w.signal == name and (w.deadline is None or w.deadline > self.now)]
            if waits:
                took += 1
                self.answer(told, min(waits, key=lambda w: (w.position, w.step)), payload.encode())
                if told.status == "pending" and told.reason == "waiting":
                    told.reason, told.due = "queued", self.now
        assert self.caller.signal(name, payload, keep=KEEP) == took
        if not took:
            self.kept.append((name, payload, self.now + KEEP))

    @some_wait
    @rule(n=which, named=st.booleans())
    def park_on_waits(self, n: int, named: bool) -> None:
        """On the open ones, or also on one that was answered while the handler came to rest."""
        waiting = [run for run in self.runs if run.status == "running" and run.waits]
        if not waiting:
            return
        told = waiting[n % len(waiting)]
        answered = [name for name in told.steps if name.startswith(NAMES)][:1] if named else []
        due = min((w.deadline for w in told.waits if w.deadline is not None), default=None)
        if self.settle(told, Waits((*(w.step for w in told.waits), *answered), due)):
            told.status, told.reason, told.due = "pending", "waiting", due
            if answered:
                told.reason, told.due = "queued", self.now

    @some_run
    @rule(n=which, length=st.sampled_from([MINUTE, DAY]))
    def sleep(self, n: int, length: int) -> None:
        told = self.some(n, "running")
        if told and self.settle(told, Sleeps(self.now + length)):
            told.status, told.reason, told.due = "pending", "sleeping", self.now + length

    @some_run
    @rule(n=which)
    def interrupt(self, n: int) -> None:
        told = self.some(n, "running")
        if told and self.settle(told, Interrupted()):
            told.status, told.reason, told.due = "pending", "queued", self.now

    @some_run
    @rule(n=which, how=st.sampled_from(["succeeded", "cancelled", "dead"]))
    def finish(self, n: int, how: str) -> None:
        outcomes = {"succeeded": Returned("1"), "cancelled": Bailed("x"), "dead": Failed(Failure("E", "m"))}
        told = self.some(n, "running")
        if told and self.settle(told, outcomes[how]):
            self.end(told, how)

    @some_run
    @rule(n=which)
    def fail(self, n: int) -> None:
        told = self.some(n, "running")
        if told and self.settle(told, Raised(Failure("E", "m"))):
            self.again(told, least=1)

    def again(self, told: Told, least: int) -> None:
        if told.attempt >= told.budget:
            self.end(told, "dead")
            return
        told.status, told.reason, told.attempt_open = "pending", "retrying", False
        told.due = self.caller.get(told.seen[-1]).due_at
        assert told.due is not None
        assert self.now + least <= told.due <= self.now + HOUR

    @rule(worker=st.sampled_from(["w-1", "w-2"]))
    def crash(self, worker: str) -> None:
        """The worker dies; its runs are given back, and it starts again."""
        for run in self.caller.do(base.RunsOf(worker=worker)):
            told = next(each for each in self.runs if each.id == run.id)
            assert (told.status, told.worker) == ("running", worker)
            cancelled = told.cancelling
            assert self.caller.settle(run, WorkerLost("in step charge"))
            told.worker = None
            if cancelled:
                self.end(told, "cancelled")
            else:
                self.again(told, least=0)
        self.caller.do(base.RemoveWorker(worker=worker))
        self.caller.join(worker)

    @rule(n=which)
    def cancel(self, n: int) -> None:
        told = self.some(n, *LIVE)
        if told:
            [found] = self.caller.do(base.FindRuns(prefix=told.id))
            assert self.caller.apply(state.cancel(found, "by Ada", self.now))
            if told.status == "pending":
                self.end(told, "cancelled")
            else:
                told.cancelling = True

    @some_end
    @rule(n=which)
    def retry(self, n: int) -> None:
        told = self.some(n, "cancelled", "dead")
        if told is None:
            return
        [found] = self.caller.do(base.FindRuns(prefix=told.id))
        change = state.retry(found, self.now)
        if self.holder(told.key):
            with pytest.raises(Refused):
                self.caller.apply(change)
            return
        assert self.caller.apply(change)
        told.status, told.reason, told.due, told.budget = "pending", "queued", self.now, told.attempt + 3

    @rule(n=which, outcome=st.sampled_from([Returned("9"), Interrupted(), WorkerLost(), Waits(("approval",), None)]))
    def write_under_a_claim_of_before(self, n: int, outcome: Outcome) -> None:
        stale = [
            (told, seen)
            for told in self.runs
            for seen in told.seen
            if seen.claim < told.claim or told.status != "running"
        ]
        if stale:
            _, seen = stale[n % len(stale)]
            assert self.caller.save(seen, "s0") is None
            assert self.caller.wait(seen, NAMES[0]) is None
            assert self.caller.expire(seen, NAMES[0]) is None
            assert not self.caller.settle(seen, outcome)

    @rule(length=st.sampled_from([1, MINUTE - 1, MINUTE, HOUR, DAY]))
    def let_time_pass(self, length: int) -> None:
        self.caller.clock.advance(length)
        self.kept = [each for each in self.kept if each[2] > self.now]

    # --- what always holds ---

    @invariant()
    def every_run_is_where_the_model_has_it(self) -> None:
        stored = {run.id: run for run in self.caller.do(base.ListRuns(limit=1_000))}
        assert len(stored) == len(self.runs)
        for told in self.runs:
            run = stored[told.id]
            assert (run.status, run.claim, run.attempt, run.worker) == (
                told.status, told.claim, told.attempt, told.worker,
            )  # fmt: skip
            assert (run.cancelling is not None) == told.cancelling
            assert (run.finished_at is None) == (told.status in LIVE)
            if told.status == "pending":
                assert (run.reason, run.due_at) == (told.reason, told.due)

    @invariant()
    def no_run_is_in_two_hands(self) -> None:
        in_hand = [run.id for worker in ("w-1", "w-2") for run in self.caller.do(base.RunsOf(worker=worker))]
        assert sorted(in_hand) == sorted(told.id for told in self.runs if told.status == "running")

    @invariant()
    def signals_are_neither_lost_nor_doubled(self) -> None:
        kept = [(each.name, each.payload.decode()) for each in self.caller.do(base.KeptSignals(now=self.now))]
        assert kept == [(name, payload) for name, payload, _ in self.kept]
        waits = {(wait.run_id, wait.step, wait.signal, wait.deadline) for wait in self.caller.do(base.OpenWaits())}
        assert waits == {(told.id, w.step, w.signal, w.deadline) for told in self.runs for w in told.waits}
        for told in self.runs:
            if told.seen:
                steps = self.caller.do(base.Steps(seq=told.seen[0].seq))
                assert {s.name: s.result for s in steps if s.status != "waiting"} == told.steps

    @invariant()
    def used_up_attempts_are_all_there(self) -> None:
        for told in self.runs:
            if told.seen:
                used = [attempt.n for attempt in self.caller.do(base.Attempts(seq=told.seen[0].seq))]
                assert used == list(range(1, told.attempt + (not told.attempt_open)))


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_the_store_does_what_the_model_does(home: Home, examples: int) -> None:
    schemas = count()  # each example has one of its own in the test's database

    def new_home(folder: Path) -> Home:
        return home._replace(data_dir=folder, env=f"example-{next(schemas)}")

    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: StoreAgainstModel(new_home),
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
