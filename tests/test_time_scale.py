"""`tako dev --time-scale`: durable time passes faster, real work does not, and what is stored is right at any pace."""

import asyncio
import math
import re
import signal as signals
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cli import Dev, at_terminal, developing, document, done, make_project, plain, run_of, start, tako
from conftest import Caller, FakeClock, until
from msgspec import structs
from serving import project as served
from serving import serving
from workers import LaterClock, now, shown, status, work

from tako_runtime import Backoff, Step, clock, cron, log, store, workflow
from tako_runtime.clock import DAY, HOUR, MINUTE, SECOND, Pace
from tako_runtime.control import Control
from tako_runtime.errors import ConfigError, InvalidValue
from tako_runtime.failure import Failure
from tako_runtime.feed import Supervising
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.run import Run
from tako_runtime.state import Raised, WorkerLost, settle
from tako_runtime.store import Home, base, open_store, project_home
from tako_runtime.store.commit import StoreThread
from tako_runtime.ticker import Cron

# They run processes of their own.
pytestmark = pytest.mark.slow

HOUR_A_SECOND = Pace(3600)
NINE = clock.instant(datetime(2027, 1, 15, 9, tzinfo=UTC))

registry = pytest.mark.usefixtures("clean_registry")


# --- the pace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, -1, 0.5, 86_401, math.nan, math.inf, -math.inf])
def test_a_scale_that_makes_no_sense_is_refused(scale: float) -> None:
    with pytest.raises(InvalidValue, match="from 1 to 86400"):
        Pace(scale)


def test_an_hour_is_a_second_and_nothing_is_shortened_to_nothing() -> None:
    assert HOUR_A_SECOND.real(HOUR) == SECOND
    assert HOUR_A_SECOND.durable(SECOND) == HOUR
    assert [HOUR_A_SECOND.real(micros) for micros in (0, 1, 1_000)] == [0, 1, 1]
    assert HOUR_A_SECOND.real(-HOUR) == -SECOND


def test_without_a_scale_every_duration_is_itself_to_the_microsecond() -> None:
    for micros in (0, 1, clock.LATEST, clock.LATEST - 1, -5):
        assert clock.REAL_TIME.real(micros) == clock.REAL_TIME.durable(micros) == micros
    assert clock.REAL_TIME.told(HOUR) == {}


@pytest.mark.parametrize("scale", [1, 1.5, 3600, 86_399.125])
def test_a_child_reads_the_scale_that_it_was_given(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKO_ENV", "development")
    for name, value in Pace(scale).environment().items():
        monkeypatch.setenv(name, value)
    assert store.pace() == Pace(scale)
    assert Supervising(1, f"tako dev --time-scale {Pace(scale)}").pace == Pace(scale)


def test_in_production_no_variable_scales_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKO_TIME_SCALE", "3600")
    monkeypatch.setenv("TAKO_ENV", "production")
    assert store.pace() == clock.REAL_TIME
    monkeypatch.setenv("TAKO_ENV", "development")
    monkeypatch.setenv("TAKO_TIME_SCALE", "nan")
    with pytest.raises(ConfigError, match="TAKO_TIME_SCALE"):
        store.pace()


@pytest.mark.parametrize("scale", ["0", "-3", "nan", "inf", "1e9", "fast"])
def test_tako_dev_refuses_a_scale_that_makes_no_sense(scale: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "shop")
    ended = tako("dev", "--once", "--time-scale", scale, cwd=project)
    assert ended.returncode == 2
    assert "from 1 to 86400" in ended.stderr or "not a valid float" in ended.stderr
    assert not (project / ".tako").exists()


# --- a run's times ---------------------------------------------------------------------------------------------------


def step_of(opened: StoreThread, run_id: str) -> dict[str, Any]:
    [step] = shown(opened, run_id)["steps"]
    return dict(step)


def lasts(step: dict[str, Any]) -> timedelta:
    return datetime.fromisoformat(step["until"]) - datetime.fromisoformat(step["started_at"])


@registry
def test_a_sleep_of_an_hour_is_stored_as_one_of_a_second_and_parks_as_in_production(
    opened: StoreThread, home: Home
) -> None:
    passes = []

    @workflow("nap")
    async def nap(step: Step) -> None:
        passes.append(step.attempt)
        await step.sleep("1h")

    run_id = nap.enqueue_sync()
    ticking = LaterClock()
    work(opened, home, pace=HOUR_A_SECOND, later=ticking, idle_timeout=1)
    assert status(opened, run_id) == ("pending", "sleeping")
    assert lasts(step_of(opened, run_id)) == timedelta(seconds=1)
    work(opened, home, later="1s")  # whoever goes on, at whatever pace, finds an end on the machine's clock
    assert status(opened, run_id)[0] == "succeeded"
    assert passes == [1, 1]


@registry
def test_a_sleep_until_a_datetime_takes_its_share_of_the_way_there(opened: StoreThread, home: Home) -> None:
    at = clock.moment(now() + DAY)

    @workflow("until")
    async def sleeps(step: Step) -> None:
        await step.sleep_until(at)

    @workflow("past")
    async def past(step: Step) -> str:
        await step.sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
        return "at once"

    run_id, gone = sleeps.enqueue_sync(), past.enqueue_sync()
    work(opened, home, pace=HOUR_A_SECOND)
    assert timedelta(seconds=20) < lasts(step_of(opened, run_id)) <= timedelta(seconds=24)
    assert shown(opened, gone)["result"] == "at once"


@registry
@pytest.mark.parametrize("timeout", ["7d", "1us"])
def test_a_wait_times_out_so_much_sooner(timeout: str, opened: StoreThread, home: Home) -> None:
    @workflow("ask")
    async def ask(step: Step) -> Any:
        return [await step.wait_for("approval", timeout=timeout)]

    run_id = ask.enqueue_sync()
    lines: list[dict[str, Any]] = []
    with log.sink(lines.append):
        work(opened, home, pace=HOUR_A_SECOND)
        wait = lasts(step_of(opened, run_id))
        work(opened, home, later="170s", pace=HOUR_A_SECOND)
    assert wait == max(timedelta(seconds=clock.duration(timeout) / SECOND) / 3600, timedelta(microseconds=1))
    assert shown(opened, run_id)["result"] == [None]
    [missed] = [line for line in lines if line["event"] == "wait.timed_out"]
    assert "at time-scale 3600)" in log.words(missed)


@registry
def test_pauses_before_retries_are_shorter_and_the_stored_backoff_is_as_declared(
    opened: StoreThread, home: Home
) -> None:
    @workflow("fails", retries=1, backoff=Backoff(base="1h", max="1h"))
    async def fails(step: Step) -> None:
        await step.run("once", breaks, retries=1, backoff=Backoff(base="1ms", max="1ms"))

    def breaks() -> None:
        raise ValueError("no")

    run_id = fails.enqueue_sync()
    lines: list[dict[str, Any]] = []
    with log.sink(lines.append):
        work(opened, home, pace=HOUR_A_SECOND)
    assert status(opened, run_id) == ("pending", "retrying")
    [run] = opened.do_sync(base.ListRuns())
    assert run.backoff_base == HOUR, "at another pace, its next pause is its own again"
    [tried] = [line for line in lines if line["event"] == "step.retrying"]
    [failed] = [line for line in lines if line["event"] == "run.retrying"]
    assert re.search(r"again in .*s \(\S+ at time-scale 3600\): ValueError: no", log.words(failed))
    assert re.search(r"again in .*ms \(\S+ at time-scale 3600\): ValueError: no", log.words(tried))
    assert 0.8 <= clock.duration(re.findall(r"again in (\S+)", log.words(failed))[0]) / SECOND <= 1


def test_a_retry_and_a_second_loss_come_so_much_sooner(caller: Caller) -> None:
    run = caller.started(backoff_base=HOUR, backoff_max=HOUR)
    for outcome in (Raised(Failure(type="E", message="no")), WorkerLost()):
        again = Run(**{name: getattr(run, name) for name in run.__struct_fields__} | {"losses": 1})
        due = settle(again, outcome, caller.now, HOUR_A_SECOND).due_at or 0
        assert 0.8 * SECOND <= due - caller.now <= SECOND


@registry
def test_an_enqueue_for_later_is_due_so_much_sooner(
    opened: StoreThread, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow("later")
    async def later(step: Step) -> None: ...

    monkeypatch.setenv("TAKO_ENV", "development")
    monkeypatch.setenv("TAKO_TIME_SCALE", "3600")
    later.enqueue_sync(delay="1h")
    later.enqueue_sync(run_at=clock.moment(now() + HOUR))
    later.enqueue_sync(run_at=datetime(2020, 1, 1, tzinfo=UTC))
    gone, *ahead = sorted((run.due_at or 0) - run.created_at for run in opened.do_sync(base.ListRuns()))
    assert gone == 0
    assert all(0.9 * SECOND < micros <= SECOND for micros in ahead)


@registry
def test_code_and_its_timeouts_and_leases_run_by_the_machines_clock(opened: StoreThread, home: Home) -> None:
    """A tenth of a second of work would be six minutes at this scale."""

    def works() -> str:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        return "done"

    @workflow("busy", timeout="1m", retries=0)
    async def busy(step: Step) -> str:
        [worker] = await opened.do(base.ListWorkers())
        leases.append(worker.lease_until - worker.started_at)
        return await step.run("work", works, timeout="1m")

    leases: list[int] = []
    run_id = busy.enqueue_sync()
    work(opened, home, pace=HOUR_A_SECOND)
    assert shown(opened, run_id)["result"] == "done"
    assert leases == [15 * SECOND]


# --- schedules -------------------------------------------------------------------------------------------------------


def declared(schedule: str, **fields: Any) -> Declared:
    told = {"group": "default", "retries": 0, "backoff_base": SECOND, "backoff_max": HOUR}
    return Declared(name="report", payload=None, file="f.py", line=1, schedule=schedule, **told | fields)


class Schedules:
    """Cron on a clock that stands still, from eight in the morning on."""

    def __init__(self, opened: StoreThread, pace: Pace = HOUR_A_SECOND) -> None:
        self.opened, self.clock = opened, FakeClock(NINE - HOUR)
        self.restart(pace)

    def restart(self, pace: Pace) -> None:
        self.cron = Cron(self.opened, self.clock, "here", pace)

    def declare(self, schedule: str, **fields: Any) -> None:
        asyncio.run(self.cron.declare(Manifest((declared(schedule, **fields),))))

    def tick(self, passed: int = 0) -> int | None:
        self.clock.advance(passed)
        return asyncio.run(self.cron.tick())

    @property
    def fired(self) -> list[int]:
        runs = sorted(self.opened.do_sync(base.ListRuns(limit=10_000)), key=lambda run: run.seq)
        return [(run.scheduled_at or 0) - NINE for run in runs]

    @property
    def stored(self) -> base.ScheduleRecord:
        [one] = self.opened.do_sync(base.ListSchedules())
        return one


def test_a_daily_schedule_fires_every_24_seconds_for_the_days_that_follow(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("0 9 * * *")
    assert at.tick() == NINE
    assert at.tick(SECOND - 1) == NINE
    assert at.fired == []
    assert at.tick(1) == NINE + DAY
    at.tick(24 * SECOND)
    assert at.tick(24 * SECOND) == NINE + 3 * DAY
    assert at.fired == [0, DAY, 2 * DAY]


def test_a_firing_says_for_which_time_and_how_far_ahead_that_is(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("0 9 * * *")
    at.tick()
    lines: list[dict[str, Any]] = []
    with log.sink(lines.append):
        at.tick(SECOND + 100)
    [fired] = lines
    assert log.words(fired) == "fired for 2027-01-15T09:00:00.000000Z (59m59s ahead at time-scale 3600)"
    assert fired["late_ms"] == 0.1
    [run] = opened.do_sync(base.ListRuns())
    assert (run.created_at, run.due_at) == (at.clock.now(), at.clock.now()), "it runs now, by the machine's clock"


def test_a_slow_tick_is_no_outage_of_scaled_hours(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("* * * * *", catchup="skip")
    at.tick()
    at.tick(SECOND)
    assert at.fired == [MINUTE * n - HOUR for n in range(1, 61)]


def test_an_overlap_is_seen_in_the_store_and_a_last_firing_is_there_for_others(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("0 9 * * *", overlap="skip")
    at.tick()
    at.tick(SECOND)
    at.tick(24 * SECOND)
    assert at.fired == [0], "the run of the first is alive"
    [run] = opened.do_sync(base.ListRuns())
    assert (at.stored.last_run, at.stored.last_at) == (run.id, NINE - HOUR + SECOND)


def test_what_is_stored_of_a_schedule_is_its_place_in_the_machines_calendar(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("0 9 * * *")
    at.tick()
    for _ in range(100):
        at.tick(24 * SECOND)
    assert len(at.fired) == 100
    assert at.stored.next_at == NINE
    at.restart(clock.REAL_TIME)  # a crash, a stop: nobody has tidied up
    at.declare("0 9 * * *")
    assert at.tick() == NINE
    at.tick(NINE - at.clock.now())
    assert at.fired[100:] == [0], "the next one by the clock is neither passed over nor late"


def test_a_scaled_start_makes_up_for_an_outage_as_any_other(opened: StoreThread) -> None:
    at = Schedules(opened, clock.REAL_TIME)
    at.declare("0 9 * * *")
    at.tick()
    at.clock.advance(3 * DAY)
    at.restart(HOUR_A_SECOND)
    at.declare("0 9 * * *")
    assert at.tick() == NINE + 3 * DAY
    assert at.fired == [2 * DAY]


def test_an_edited_schedule_begins_anew_in_the_calendar_that_runs_ahead(opened: StoreThread) -> None:
    at = Schedules(opened)
    at.declare("0 9 * * *")
    at.tick()
    at.tick(10 * SECOND)  # it is six in the evening
    at.declare("0 20 * * *")
    assert at.tick() == NINE + 11 * HOUR
    at.declare("0 9 * * *")
    assert at.tick(30 * SECOND) == NINE + 2 * DAY
    assert at.fired == [0]


def test_other_schedules_of_an_unscaled_cron_are_late_as_ever() -> None:
    one = base.ScheduleRecord("report", "default", "* * * * *", "UTC", "skip", "allow", next_at=NINE)
    assert [firing.note for firing in cron.due([one], NINE + cron.LATE)] == ["fires"]
    assert [firing.note for firing in cron.due([one], NINE + 90 * SECOND)] == ["fires"]


# --- the command -----------------------------------------------------------------------------------------------------

FLOWS = """
    from datetime import UTC, datetime, timedelta
    from tako_runtime import Backoff, Step, workflow

    @workflow("journey")
    async def journey(payload: None, step: Step):
        await step.sleep("1h", name="night")
        await step.sleep_until(datetime.now(UTC) + timedelta(hours=1), name="morning")
        return await step.wait_for("tickets", timeout="1h")

    @workflow("far")
    async def far(payload: None, step: Step) -> None:
        await step.sleep("100d")

    @workflow("flaky", retries=1, backoff=Backoff(base="1h", max="1h"))
    async def flaky(payload: None, step: Step) -> int:
        if step.attempt == 1:
            raise ValueError("not yet")
        return step.attempt

    @workflow("child")
    async def child(payload: None, step: Step) -> None: ...

    @workflow("parent")
    async def parent(payload: None, step: Step) -> None:
        await child.enqueue(delay="1h")

    @workflow("hourly", schedule="30 * * * *")
    async def hourly(step: Step) -> str:
        return step.scheduled_at.isoformat()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "shop", FLOWS)


def of(run: str) -> Any:
    return lambda event: event.get("run") == run


def quit_(dev: Dev) -> None:
    dev.send(signals.SIGINT)
    assert dev.ended() == 0


def test_hours_pass_in_seconds_and_the_log_says_so(project: Path) -> None:
    with developing(project, "--time-scale", "3600") as dev:
        scaled = dev.wait_for("dev.scaled")
        assert scaled["time_scale"] == 3600
        assert "3600 times faster" in scaled["message"]
        run = start(project, "journey")
        slept = [dev.wait_for("run.sleeping", of(run))["message"] for _ in range(2)]
        waits = dev.wait_for("run.waiting", of(run))["message"]
        assert all(re.fullmatch(r"sleeps until \S+Z \((1h|59m5\ds|1h\ds) at time-scale 3600\)", line) for line in slept)
        assert re.fullmatch(r"waits for tickets, until \S+Z \(1h at time-scale 3600\)", waits)
        dev.wait_for("run.succeeded", of(run))
        failing = start(project, "flaky")
        assert "at time-scale 3600)" in dev.wait_for("run.retrying", of(failing))["message"]
        dev.wait_for("run.succeeded", of(failing))
        parent = start(project, "parent")
        dev.wait_for("run.succeeded", lambda event: event["workflow"] == "child")
        assert run_of(project, parent)["status"] == "succeeded"
        fired = [dev.wait_for("cron.fired", lambda event: event["workflow"] == "hourly") for _ in range(2)]
        assert all("ahead at time-scale 3600)" in one["message"] for one in fired)
        dev.had("run.succeeded", of(fired[1]["run"]))
        quit_(dev)
    times = [datetime.fromisoformat(run_of(project, one["run"])["result"]) for one in fired]
    assert times[1] - times[0] == timedelta(hours=1)
    assert all(at.minute == 30 for at in times)
    for step in run_of(project, run)["steps"]:
        assert timedelta(seconds=0.9) < lasts(step) <= timedelta(seconds=1)


def test_another_terminal_sees_times_of_the_clock_and_who_scales_them(project: Path) -> None:
    with developing(project, "--time-scale", "3600") as dev:
        dev.wait_for("dev.scaled")
        run = start(project, "far")
        dev.wait_for("run.sleeping", of(run))
        until_ = run_of(project, run)["run_at"]
        ahead = clock.instant(datetime.fromisoformat(until_)) - now()
        assert 0 < ahead <= 100 * DAY / 3600
        assert document("runs", "why", run, cwd=project)["why"]["sentence"] == f"It sleeps until {until_}."
        assert "(in 3" in done("runs", "show", run, cwd=project), "40 minutes"
        assert "runs by  tako dev --time-scale 3600, process" in done("status", cwd=project)
        for words in (["cron", "ls"], ["cron", "next", "hourly"], ["status"]):
            assert "3600 times as fast" in tako(*words, cwd=project).stderr
        started = tako("runs", "start", "child", "--in", "10h", cwd=project)
        assert "it is due in 10s (10h at time-scale 3600)" in started.stderr
        other = tako("dev", cwd=project)
        assert f"another tako dev --time-scale 3600 runs this app: process {dev.process.pid}" in other.stderr
        quit_(dev)
    assert tako("runs", "start", "child", "--in", "10h", cwd=project).stderr.startswith("it is due in 10h\n")


def test_after_a_crash_an_unscaled_start_finds_nothing_in_a_far_future(project: Path) -> None:
    with developing(project, "--time-scale", "86400") as dev:
        dev.wait_for("dev.scaled")
        run = start(project, "far")
        dev.wait_for("run.sleeping", of(run))
        for _ in range(30):
            dev.wait_for("cron.fired")
        dev.send(signals.SIGKILL)
        dev.process.wait()
        with developing(project) as next_dev:
            next_dev.wait_for("dev.ready")
            with closing(open_store(project_home("shop", project))) as opened:
                [hourly] = until(lambda: [one for one in opened.do_sync(base.ListSchedules()) if one.next_at])
                assert (hourly.next_at or 0) - now() <= HOUR
                assert (hourly.last_at or 0) <= now()
                asleep = next(one for one in opened.do_sync(base.ListRuns(limit=9_999)) if one.id == run)
                assert (asleep.due_at or 0) - now() <= 100 * SECOND
            quit_(next_dev)
        assert not [event for event in next_dev.events if event["event"] == "dev.scaled"]


@pytest.mark.parametrize("columns", [60, 80])
def test_a_person_sees_the_scale_at_the_start(columns: int, project: Path) -> None:
    code, seen = at_terminal("dev", "--once", "--time-scale", "3600", cwd=project, columns=columns)
    assert code == 0
    assert "schedules pass 3600 times faster" in " ".join(plain(seen).split())
    assert max(map(len, plain(seen).splitlines())) <= columns


def test_a_server_hands_its_children_no_scale_from_outside(home: Home, tmp_path: Path) -> None:
    flows = """
        from tako_runtime import store, workflow

        @workflow("asks")
        async def asks(step) -> str:
            return str(store.pace())
    """
    root = served(tmp_path / "shop", flows)
    with closing(open_store(home)) as opened:
        flow = declared("0 9 * * *")
        new = Control(opened).start(structs.replace(flow, name="asks", schedule=None), "null")
        with serving(home, root, "--env", "development", env={"TAKO_TIME_SCALE": "3600"}):
            until(lambda: status(opened, new.id)[0] == "succeeded")
        assert shown(opened, new.id)["result"] == "1"
