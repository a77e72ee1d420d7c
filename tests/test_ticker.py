"""Cron's service: real stores and, where it matters, real processes. When a schedule fires is in test_cron.py."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cli import make_project
from conftest import Caller, FakeClock, until
from workers import eventually, freeze, now, serving, shown

from tako_runtime import clock, config, disk, log
from tako_runtime.cron import CORRECTION
from tako_runtime.errors import StoreBusy, StoreError
from tako_runtime.manifest import Declared, Manifest, Mistake
from tako_runtime.run import Run, Status
from tako_runtime.server import Server
from tako_runtime.state import Returned
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.ticker import LEASE, Cron

NOON = clock.instant(datetime(2027, 1, 15, 12, tzinfo=UTC))
DAILY, HOURLY = "0 12 * * *", "0 * * * *"
BROKEN = (Mistake("workflows/other.py", 1, "SyntaxError: invalid syntax", ""),)


def declared(name: str = "report", schedule: str | None = DAILY, **fields: Any) -> Declared:
    told = {"group": "default", "retries": 2, "backoff_base": clock.SECOND, "backoff_max": clock.HOUR}
    return Declared(name=name, payload=None, file="f.py", line=1, schedule=schedule, **told | fields)


class Rig:
    """A supervisor's cron on a clock that stands still, and what it fires."""

    def __init__(self, opened: StoreThread, ticking: FakeClock, host: str = "here") -> None:
        self.opened, self.clock, self.host = opened, ticking, host
        self.cron = Cron(opened, ticking, host)

    def restart(self, host: str = "here") -> None:
        self.cron = Cron(self.opened, self.clock, host)

    def declare(self, *flows: Declared, mistakes: tuple[Mistake, ...] = ()) -> None:
        asyncio.run(self.cron.declare(Manifest(flows, mistakes)))

    def tick(self) -> int | None:
        return asyncio.run(self.cron.tick())

    def pass_time(self, micros: int) -> int | None:
        self.clock.advance(micros)
        return self.tick()

    def runs(self, workflow: str | None = None) -> list[Run]:
        """In the order in which they were fired."""
        return sorted(self.opened.do_sync(base.ListRuns(workflow=workflow, limit=1_000)), key=lambda run: run.seq)

    def fired(self, workflow: str | None = None) -> list[int]:
        """For how long after noon each run was fired."""
        return [run.scheduled_at - NOON for run in self.runs(workflow) if run.scheduled_at is not None]

    def schedules(self) -> dict[str, str]:
        return {one.workflow: one.expression for one in self.opened.do_sync(base.ListSchedules())}


@pytest.fixture
def rig(opened: StoreThread) -> Rig:
    return Rig(opened, FakeClock(NOON - clock.HOUR))


@contextmanager
def events() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    with log.sink(lines.append):
        yield lines


# --- firing ----------------------------------------------------------------------------------------------------------


def test_a_schedule_fires_at_its_time_a_run_that_carries_it_and_what_the_workflow_declares(rig: Rig) -> None:
    rig.declare(declared(group="reports", retries=7))
    assert rig.tick() == NOON
    assert rig.pass_time(clock.HOUR - 1) == NOON
    assert rig.runs() == []
    assert rig.pass_time(1) == NOON + clock.DAY
    [run] = rig.runs()
    assert (run.workflow, run.group, run.retries, run.payload) == ("report", "reports", 7, b"null")
    assert (run.scheduled_at, run.due_at, run.status) == (NOON, NOON, Status.PENDING)
    rig.tick()
    assert len(rig.runs()) == 1


def test_a_firing_is_an_event_that_says_how_late_it_was(rig: Rig) -> None:
    rig.declare(declared())
    rig.tick()
    with events() as lines:
        rig.pass_time(clock.HOUR + 250_500)
    [fired] = [line for line in lines if line["event"] == "cron.fired"]
    [run] = rig.runs()
    assert (fired["workflow"], fired["run"], fired["late_ms"]) == ("report", run.id, 250.5)
    assert fired["scheduled_at"] == "2027-01-15T12:00:00.000000Z"


def test_a_new_schedule_does_not_fire_for_the_past_and_an_edited_one_begins_anew(rig: Rig) -> None:
    rig.clock.advance(clock.HOUR)
    rig.declare(declared())
    assert rig.tick() == NOON + clock.DAY, "noon is now, and was there before the schedule"
    rig.clock.advance(3 * clock.DAY)
    rig.declare(declared(schedule=HOURLY))
    assert rig.tick() == NOON + 3 * clock.DAY + clock.HOUR
    assert rig.runs() == []
    rig.declare(declared(schedule=HOURLY, timezone="Europe/Berlin"))
    rig.clock.advance(3 * clock.HOUR)
    rig.tick()
    assert rig.runs() == []
    rig.pass_time(clock.HOUR)
    assert rig.fired() == [3 * clock.DAY + 4 * clock.HOUR]


def test_an_unchanged_schedule_keeps_its_place_when_it_is_declared_again(rig: Rig) -> None:
    rig.declare(declared())
    rig.tick()
    rig.clock.advance(clock.HOUR)
    rig.restart()
    rig.declare(declared(catchup="skip", overlap="skip"))
    rig.tick()
    assert rig.fired() == [0]


def test_a_schedule_that_is_dropped_stops_at_the_switch(rig: Rig) -> None:
    rig.declare(declared("a"), declared("b"), declared("c"))
    rig.tick()
    rig.declare(declared("a"), declared("b", schedule=None))
    rig.pass_time(clock.HOUR)
    assert [run.workflow for run in rig.runs()] == ["a"]
    assert rig.schedules() == {"a": DAILY}
    rig.declare(declared("a"), declared("c"))
    rig.tick()
    assert [run.workflow for run in rig.runs()] == ["a"], "back again, it is new"


def test_while_a_file_is_broken_its_schedules_go_on_and_those_of_the_others_are_taken_over(rig: Rig) -> None:
    rig.declare(declared("kept"), declared("dropped"))
    rig.tick()
    rig.declare(declared("added"), declared("dropped", schedule=None), mistakes=BROKEN)
    rig.tick()
    assert rig.schedules() == {"added": DAILY, "kept": DAILY}
    rig.pass_time(clock.HOUR)
    assert sorted(run.workflow for run in rig.runs()) == ["added", "kept"]


def test_an_expression_that_cannot_be_read_leaves_the_one_before_it_alone(rig: Rig) -> None:
    rig.declare(declared("a"))
    rig.tick()
    rig.declare(declared("a", schedule="0 25 * * *"), declared("new", schedule="@dayly"), mistakes=BROKEN)
    rig.pass_time(clock.HOUR)
    assert rig.schedules() == {"a": DAILY}
    assert [run.workflow for run in rig.runs()] == ["a"]


# --- outages and clocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("catchup", "fired"), [("latest", [3 * clock.DAY]), ("skip", [])])
def test_after_three_days_down_one_run_fires_or_none_and_then_it_goes_on(
    rig: Rig, catchup: str, fired: list[int]
) -> None:
    rig.declare(declared(catchup=catchup))
    rig.tick()
    rig.restart()
    rig.clock.advance(3 * clock.DAY + 2 * clock.HOUR)
    rig.declare(declared(catchup=catchup))
    assert rig.tick() == NOON + 4 * clock.DAY
    assert rig.fired() == fired
    rig.pass_time(23 * clock.HOUR)
    assert rig.fired() == [*fired, 4 * clock.DAY]


def test_three_days_of_every_second_are_one_run(rig: Rig) -> None:
    rig.declare(declared(schedule="* * * * * *"))
    rig.tick()
    rig.restart()
    rig.declare(declared(schedule="* * * * * *"))
    rig.pass_time(3 * clock.DAY)
    assert rig.fired() == [3 * clock.DAY - clock.HOUR]


def test_with_overlap_skip_a_time_is_passed_over_while_the_last_run_lives(rig: Rig, opened: StoreThread) -> None:
    caller = Caller(opened)
    rig.declare(declared("order", schedule=HOURLY, overlap="skip"), declared("other", schedule=HOURLY))
    rig.tick()
    rig.pass_time(clock.HOUR)
    with events() as lines:
        rig.pass_time(clock.HOUR)
    assert rig.fired("order") == [0]
    assert rig.fired("other") == [0, clock.HOUR]
    told = [(line["workflow"], line["note"]) for line in lines if line["event"] == "cron.passed_over"]
    assert told == [("order", "overlap")]
    caller.settle(caller.claim()[0].run, Returned("1"))
    rig.pass_time(clock.HOUR)
    assert rig.fired("order") == [0, 2 * clock.HOUR]


def test_a_clock_that_is_set_back_repeats_nothing_and_one_set_forward_fires_the_latest(rig: Rig) -> None:
    rig.declare(declared(schedule=HOURLY))
    rig.tick()
    rig.pass_time(clock.HOUR)
    for back in (clock.MINUTE, clock.HOUR, CORRECTION - clock.HOUR):
        rig.clock.advance(-back)
        rig.tick()
        rig.restart()
        rig.declare(declared(schedule=HOURLY))
        rig.tick()
        rig.pass_time(back)
    assert rig.fired() == [0]
    rig.pass_time(5 * clock.HOUR + clock.MINUTE)
    assert rig.fired() == [0, 5 * clock.HOUR]
    rig.pass_time(clock.HOUR)
    assert rig.fired() == [0, 5 * clock.HOUR, 6 * clock.HOUR]


def test_a_clock_that_was_days_ahead_neither_silences_a_schedule_nor_its_next_leader(rig: Rig) -> None:
    rig.declare(declared(schedule=HOURLY))
    rig.tick()
    rig.pass_time(10 * clock.DAY)
    assert len(rig.runs()) == 1
    rig.clock.advance(-10 * clock.DAY)
    rig.restart("there")  # the one that was killed holds its lease for ten days more
    rig.declare(declared(schedule=HOURLY))
    assert rig.tick() == NOON
    rig.pass_time(clock.HOUR)
    assert rig.fired()[1:] == [0]


# --- several ---------------------------------------------------------------------------------------------------------


def test_one_of_several_leads_and_when_it_falls_silent_another_does(opened: StoreThread) -> None:
    ticking = FakeClock(NOON)
    first, second = Rig(opened, ticking, "here"), Rig(opened, ticking, "there")
    every_second = declared(schedule="* * * * * *")
    first.declare(every_second)
    second.declare(every_second)
    assert first.tick() == NOON + clock.SECOND
    ticking.advance(clock.SECOND)
    assert second.tick() is None, "it is not for this one"
    assert second.runs() == []
    assert first.tick() == NOON + 2 * clock.SECOND
    assert second.tick() == NOON + 2 * clock.SECOND, "nothing is left to do"
    ticking.advance(LEASE)
    assert second.tick() == ticking.now() + clock.SECOND, "it takes over, and makes up for each second"
    assert first.tick() == ticking.now() + clock.SECOND
    assert second.fired() == [n * clock.SECOND for n in range(1, 7)]


def test_one_that_was_killed_and_is_started_again_leads_on_at_once(rig: Rig) -> None:
    rig.declare(declared(schedule="* * * * * *"))
    rig.tick()
    rig.pass_time(clock.SECOND)
    rig.restart()
    rig.declare(declared(schedule="* * * * * *"))
    assert rig.pass_time(clock.SECOND) == rig.clock.now() + clock.SECOND
    assert len(rig.runs()) == 2


def test_two_that_both_believe_to_lead_fire_once(opened: StoreThread) -> None:
    ticking = FakeClock(NOON - 1)
    rigs = [Rig(opened, ticking) for _ in range(2)]
    for rig in rigs:
        rig.declare(declared())
    rigs[0].tick()
    ticking.advance(1)

    async def believes() -> bool:
        return True

    async def both() -> None:
        await asyncio.gather(*(rig.cron.tick() for rig in rigs))

    for rig in rigs:
        rig.cron._leads = believes  # type: ignore[method-assign]
    asyncio.run(both())
    assert rigs[0].fired() == [0]


def test_while_nothing_is_due_nothing_is_written(opened: StoreThread, home: Home) -> None:
    rig = Rig(opened, FakeClock(NOON))
    rig.declare(declared())
    rig.tick()
    watcher = open_store(home)
    try:
        before = watcher.do_sync(base.DataVersion())
        for _ in range(10):
            rig.pass_time(clock.HOUR)
        assert watcher.do_sync(base.DataVersion()) == before
        rig.pass_time(clock.DAY)
        assert watcher.do_sync(base.DataVersion()) != before
    finally:
        watcher.close()


def test_a_leader_that_stops_hands_over_at_once(opened: StoreThread) -> None:
    ticking = FakeClock(NOON)
    first, second = Rig(opened, ticking, "here"), Rig(opened, ticking, "there")
    first.declare(declared())

    async def live() -> None:
        running = asyncio.create_task(first.cron.run())
        while not opened.do_sync(base.ListSchedules())[0].next_at:
            await asyncio.sleep(0)
        first.cron.stop()
        await running

    asyncio.run(live())
    ticking.advance(clock.DAY)
    second.declare(declared())
    second.tick()
    assert second.fired() == [clock.DAY]


# --- the loop --------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_set_forward_is_seen_though_nothing_tells_of_it(rig: Rig) -> None:
    rig.declare(declared())

    async def live() -> None:
        running = asyncio.create_task(rig.cron.run())
        await eventually(lambda: rig.opened.do_sync(base.ListSchedules())[0].next_at)
        rig.clock.advance(clock.HOUR)
        await eventually(rig.runs)
        rig.cron.stop()
        await running

    asyncio.run(live())
    assert rig.fired() == [0]


def test_a_busy_store_is_asked_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.declare(declared())
    tick, asked = rig.cron.tick, list[int]()

    async def busy_at_first() -> int | None:
        asked.append(1)
        if len(asked) == 1:
            raise StoreBusy
        rig.cron.stop()
        return await tick()

    monkeypatch.setattr(rig.cron, "tick", busy_at_first)
    with events() as lines:
        asyncio.run(rig.cron.run())
    assert [line["event"] for line in lines] == ["store.busy"]
    assert len(asked) == 2


def test_a_server_whose_cron_cannot_go_on_ends_and_says_why(opened: StoreThread, home: Home, tmp_path: Path) -> None:
    loaded = config.load(make_project(tmp_path / "shop", TICKS) / "tako.toml")

    async def live() -> None:
        server = Server(opened, home, loaded, lambda source, event: None)

        async def fails() -> int | None:
            raise StoreError("the store is damaged")

        server.main.cron.tick = fails  # type: ignore[method-assign]
        async with asyncio.timeout(20):
            await server.run()

    with pytest.raises(StoreError, match="damaged"):
        asyncio.run(live())


def test_a_server_whose_store_is_on_a_network_disk_says_so(
    opened: StoreThread, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = config.load(make_project(tmp_path / "shop", TICKS) / "tako.toml")
    (tmp_path / "mountinfo").write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:4 / {home.data_dir} rw - nfs4 nas:/ rw\n"
    )
    monkeypatch.setattr(disk, "TABLE", tmp_path / "mountinfo")

    async def live() -> None:
        server = Server(opened, home, loaded, lambda source, event: None)
        asyncio.get_running_loop().call_soon(server.stop)
        async with asyncio.timeout(20):
            await server.run()

    with events() as heard:
        asyncio.run(live())
    told = [event for event in heard if event["event"] == "store.on_network"]
    assert [(event["kind"], event["folder"]) for event in told] == [("nfs4", str(home.app_dir))]


# --- processes -------------------------------------------------------------------------------------------------------

TICKS = """
    from tako_runtime import Step, workflow

    @workflow("tick", schedule="* * * * * *", group="cron")
    async def tick(step: Step) -> str:
        return step.scheduled_at.isoformat()
"""


def test_an_app_of_schedules_only_fires_though_no_worker_has_ever_run(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    with serving(home, make_project(tmp_path / "shop", TICKS)) as server:
        assert server.spawned == []
        done = until(lambda: opened.do_sync(base.ListRuns(statuses=[Status.SUCCEEDED])))
        run = shown(opened, done[-1].id)
        assert (run["workflow"], run["group"]) == ("tick", "cron")
        assert datetime.fromisoformat(run["result"]) == datetime.fromisoformat(run["scheduled_at"])
        assert {event["group"] for event in server.events("worker.spawned")} == {"cron"}


@pytest.mark.slow
def test_a_schedule_that_is_dropped_or_added_is_so_after_a_reload(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    root = make_project(tmp_path / "shop", TICKS)
    with serving(home, root) as server:
        until(lambda: server.events("cron.fired"))
        (root / "workflows" / "flows.py").write_text(
            'from tako_runtime import workflow\n\n@workflow("tock", schedule="* * * * * *")\ndef tock(step): ...\n'
        )
        server.process.send_signal(signal.SIGHUP)
        until(lambda: [event for event in server.events("cron.fired") if event["workflow"] == "tock"])
        switched = [event["workflow"] for event in server.events("cron.fired")].index("tock")
        until(lambda: len(server.events("cron.fired")) > switched + 2)
        assert {event["workflow"] for event in server.events("cron.fired")[switched:]} == {"tock"}
    assert [one.workflow for one in opened.do_sync(base.ListSchedules())] == ["tock"]


@pytest.mark.slow
def test_two_supervisors_fire_each_second_once_though_one_is_stopped_past_its_lease_and_one_is_killed(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    """As on two servers with one store: each process is all that `serve` is, but for the lock of one host."""
    root = make_project(tmp_path / "shop", TICKS)

    def fired(server: Any = None) -> int:
        return len(server.events("cron.fired") if server else opened.do_sync(base.ListRuns(limit=1_000)))

    with serving(home, root, "here") as first, serving(home, root, "there") as second:
        until(lambda: fired() >= 3)
        began = now()
        leader, other = (first, second) if fired(first) else (second, first)
        assert fired(other) == 0
        freeze(home, leader.process.pid)
        try:
            until(lambda: fired(other) >= LEASE // clock.SECOND + 2)
        finally:
            leader.process.send_signal(signal.SIGCONT)
        there = fired()
        until(lambda: fired() >= there + 2)  # with the stopped one back again
        leader, other = sorted((first, second), key=lambda one: one.events("cron.fired")[-1]["at"], reverse=True)
        before = fired(other)
        leader.process.kill()
        until(lambda: fired(other) >= before + 6, 30)
        until(lambda: now() - began >= 20 * clock.SECOND)
        other.stop()
        leader.process.wait()
    times = sorted(run.scheduled_at or 0 for run in opened.do_sync(base.ListRuns(limit=1_000)))
    assert times == list(range(times[0], times[-1] + 1, clock.SECOND)), "one run per second, none twice"
    assert len(times) >= 20
