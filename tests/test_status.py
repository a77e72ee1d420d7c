"""How an app stands, as a value; and which kept signals were likely mistyped."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Caller

from tako_runtime import clock
from tako_runtime.clock import DAY, HOUR, MINUTE, SECOND
from tako_runtime.config import parse
from tako_runtime.control import Control
from tako_runtime.failure import Failure
from tako_runtime.run import ScheduleRecord
from tako_runtime.signals import near_misses
from tako_runtime.state import Failed, Raised, Returned, Sleeps, Waits
from tako_runtime.store import Home, base
from tako_runtime.store.commit import StoreThread

BROKE = Failure("ValueError", "no such card")
CONFIG = parse(b'name = "shop"\n[workflows.media]\nworkers = 2\nconcurrency = 4\n', Path("/tako.toml"))


@pytest.fixture
def control(caller: Caller, opened: StoreThread, home: Home) -> Control:
    return Control(opened, caller.clock, home.app_dir)


def group(found: dict[str, Any], name: str) -> dict[str, Any]:
    [one] = [one for one in found["groups"] if one["group"] == name]
    return dict(one)


def test_with_nothing_there_a_status_is_still_whole(opened: StoreThread, home: Home) -> None:
    found = Control(opened, app_dir=home.app_dir).status()
    states = ("queued", "retrying", "sleeping", "waiting", "running", "dead")
    assert found["supervisor"] is None
    assert found["runs"] == dict.fromkeys(states, 0)
    assert (found["groups"], found["workers"], found["schedules"], found["signals_kept"]) == ([], [], [], 0)


def test_groups_are_those_of_the_configuration_and_those_that_the_store_knows_of(
    caller: Caller, control: Control
) -> None:
    caller.enqueue(group="old")
    caller.do(base.ReportHealth(group="sick", host="web-1", now=caller.now, reason="no ffmpeg", details="line 1"))
    assert [one["group"] for one in control.status(CONFIG)["groups"]] == ["default", "media", "old", "sick"]
    assert [one["group"] for one in control.status()["groups"]] == ["default", "old", "sick"]
    since = clock.iso(caller.now)
    sick = group(control.status(), "sick")
    assert sick["unhealthy"] == [{"host": "web-1", "since": since, "reason": "no ffmpeg", "details": "line 1"}]
    assert (sick["workers"]["wanted"], sick["concurrency"]) == (None, None)


def test_a_group_has_its_workers_its_queue_and_the_age_of_the_oldest_due_run(caller: Caller, control: Control) -> None:
    caller.join("w-m", "media")
    caller.join("w-lapsed", "media")
    caller.do(base.RenewLease(worker="w-lapsed", until=caller.now + SECOND))
    due = caller.now
    for _ in range(3):
        caller.enqueue(group="media")
    caller.claim(worker="w-m", group="media")
    caller.enqueue(group="media", due_at=caller.now + HOUR)
    caller.clock.advance(MINUTE)
    assert group(control.status(CONFIG), "media") == {
        "group": "media", "workers": {"wanted": 2, "up": 1}, "concurrency": 4, "running": 1, "due": 2,
        "oldest_due_at": clock.iso(due), "oldest_due_age": 60.0, "unhealthy": [],
    }  # fmt: skip
    assert group(control.status(CONFIG), "default")["oldest_due_age"] is None
    workers = {one["id"]: (one["up"], one["running"]) for one in control.status()["workers"]}
    assert workers == {"w-1": (True, 0), "w-m": (True, 1), "w-lapsed": (False, 0)}


def test_a_status_and_a_why_tell_who_has_paused_the_app(caller: Caller, control: Control) -> None:
    run = caller.enqueue()
    assert control.status()["paused"] is None
    caller.do(base.TakeLease(name=base.PAUSE, holder="tako dev, process 7", until=caller.now + SECOND, now=caller.now))
    assert control.status()["paused"] == "tako dev, process 7"
    assert control.why(run)["cause"] == "paused"
    caller.clock.advance(SECOND)
    assert control.status()["paused"] is None
    assert control.why(run)["cause"] != "paused"


def test_a_worker_is_told_with_all_that_the_store_knows_of_it(caller: Caller, control: Control) -> None:
    assert control.status()["workers"] == [
        {"id": "w-1", "group": "default", "host": "host", "pid": 1, "release": "dev", "up": True, "running": 0,
         "local": False, "started_at": clock.iso(caller.now), "lease_until": clock.iso(caller.now + HOUR)}
    ]  # fmt: skip


def test_runs_are_counted_by_where_they_stand_and_the_dead_of_the_last_day(caller: Caller, control: Control) -> None:
    for outcome in (Failed(BROKE), Returned("1")):
        caller.settle(caller.started(), outcome)
    caller.clock.advance(DAY + SECOND)  # those two are history
    for outcome in (Failed(BROKE), Raised(BROKE), Sleeps(caller.now + DAY), Returned("1")):
        caller.settle(caller.started(), outcome)
    waiting = caller.started()
    caller.wait(waiting, "go")
    caller.settle(waiting, Waits(("go",), None))
    caller.started()
    caller.enqueue()
    caller.enqueue()
    caller.signal("gone")
    found = control.status()
    expected = {"queued": 2, "retrying": 1, "sleeping": 1, "waiting": 1, "running": 1, "dead": 1}
    assert found["runs"] == expected
    assert found["signals_kept"] == 1
    assert found["dead_since"] == clock.iso(caller.now - DAY)


def test_schedules_are_told_with_their_next_firing(caller: Caller, control: Control) -> None:
    record = ScheduleRecord("yearly", "reports", "0 0 1 1 *", "Europe/Lisbon", "latest", "allow", caller.now + DAY)
    caller.do(base.SetSchedules(schedules=[record]))
    [schedule] = control.status()["schedules"]
    assert (schedule["workflow"], schedule["schedule"], schedule["timezone"]) == (
        "yearly", "0 0 1 1 *", "Europe/Lisbon",
    )  # fmt: skip
    assert schedule["next_at"] == clock.iso(caller.now + DAY)
    assert "reports" in [one["group"] for one in control.status()["groups"]]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "awaited", "near"),
    [
        ("aproval:42", "approval:42", True),
        ("Approval:42", "approval:42", True),
        ("approval-42", "approval:42", True),
        ("approved:42", "approval:42", True),
        ("approval:41", "approval:42", False),  # another order's
        ("approval:4", "approval:42", False),
        ("payment:42", "approval:42", False),
        ("go", "stop", False),
        ("ready ", "ready", True),
        ("order:7:paid:9", "order:7:payed:9", True),
        ("order:7:paid:9", "order:9:paid:7", False),
        ("same", "same", False),
    ],
)
def test_a_near_miss_is_a_slip_of_the_hand_and_not_another_number(kept: str, awaited: str, near: bool) -> None:
    assert near_misses([kept], [awaited]) == ({kept: awaited} if near else {})


def test_signals_are_listed_with_who_waits_and_what_is_kept(caller: Caller, control: Control) -> None:
    run = caller.started()
    since = caller.now
    caller.wait(run, "approval:42", timeout=HOUR)
    caller.wait(run, "approval:43", position=2)
    caller.signal("aproval:42", '{"by":"Ada"}')
    caller.signal("other")
    found = control.signals()
    assert found["waiting"] == [
        {"signal": "approval:42", "run": run.id, "workflow": "order", "step": "approval:42", "since": clock.iso(since),
         "until": clock.iso(since + HOUR), "local": False},
        {"signal": "approval:43", "run": run.id, "workflow": "order", "step": "approval:43", "since": clock.iso(since),
         "until": None, "local": False},
    ]  # fmt: skip
    assert found["kept"] == [
        {"name": "aproval:42", "payload": {"by": "Ada"}, "sent_at": clock.iso(since),
         "expires_at": clock.iso(since + 7 * DAY), "near": "approval:42"},
        {"name": "other", "payload": 1, "sent_at": clock.iso(since), "expires_at": clock.iso(since + 7 * DAY),
         "near": None},
    ]  # fmt: skip
    fewer = control.signals(limit=1)
    assert ([wait["signal"] for wait in fewer["waiting"]], [one["name"] for one in fewer["kept"]]) == (
        ["approval:42"], ["aproval:42"],
    )  # fmt: skip


def test_a_near_miss_is_found_among_waits_that_are_not_shown(caller: Caller, control: Control) -> None:
    run = caller.started()
    for n, name in enumerate(("a", "b", "c", "zebra:1")):
        caller.wait(run, name, position=n)
    caller.signal("zebbra:1")
    assert [one["near"] for one in control.signals(limit=1)["kept"]] == ["zebra:1"]
