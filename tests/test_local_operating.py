"""What an operator sees and does of local runs: beside those of the shared store, and on each of several servers."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from beside import FLOWS, make
from cli import Dev, developing, document, done, tako
from conftest import Caller, until
from test_metrics import read
from workers import serving

from tako_cli.overview import status as overview
from tako_cli.several import Several
from tako_runtime import clock
from tako_runtime.control import Control
from tako_runtime.errors import NotFound, Refused
from tako_runtime.manifest import Declared, Manifest
from tako_runtime.metrics import gauges
from tako_runtime.run import ScheduleRecord
from tako_runtime.site import Site
from tako_runtime.state import Returned, Sleeps, Waits
from tako_runtime.store import Home, Local, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.file import examine

# They run processes of their own.
pytestmark = pytest.mark.slow

STORES = ("postgres",)

WARM = Declared("warm", "default", 2, 1, 1, None, "flows.py", 1, local=True)
ORDER = Declared("order", "default", 2, 1, 1, None, "flows.py", 1)


@pytest.fixture
def local(home: Home) -> Iterator[Local]:
    own = Local(home)
    yield own
    own.close()


@pytest.fixture
def control(caller: Caller, opened: StoreThread, home: Home, local: Local) -> Control:
    return Control(opened, caller.clock, home.app_dir, local)


@pytest.fixture
def own(local: Local, caller: Caller) -> Caller:
    """Calls the server's own store, at the clock of `caller`."""
    found = Caller(local.made())
    found.clock = caller.clock
    return found


# --- one server ------------------------------------------------------------------------------------------------------


def test_runs_of_both_stores_are_listed_by_their_age_and_say_where_they_are(
    control: Control, caller: Caller, own: Caller
) -> None:
    ids = []
    for where in (caller, own, caller, own):
        caller.clock.advance(1_000)
        ids.insert(0, where.enqueue(workflow="warm" if where is own else "order"))
    found = control.list_runs()
    assert [(run["id"], run["local"]) for run in found] == list(zip(ids, [True, False, True, False], strict=True))
    assert [run["id"] for run in control.list_runs(limit=3)] == ids[:3]
    assert [run["id"] for run in control.list_runs(workflow="warm")] == [ids[0], ids[2]]


def test_an_id_is_found_in_either_store_and_one_that_begins_several_is_refused(
    control: Control, caller: Caller, own: Caller
) -> None:
    shared, mine = caller.enqueue(), own.enqueue()
    assert (control.find(shared).local, control.find(mine).local) == (False, True)
    assert control.show(mine[-12:])["local"] is True
    with pytest.raises(Refused, match="several ids"):
        control.find(shared[:10])
    with pytest.raises(NotFound):
        control.find("ffffffff")


def test_a_local_run_is_explained_woken_cancelled_and_retried_where_it_is(
    control: Control, caller: Caller, own: Caller
) -> None:
    run = own.started()
    own.save(run, "first")
    assert control.why(run.id)["cause"] == "running"
    own.settle(run, Sleeps(caller.now + 10**9))
    assert control.wake()["id"] == run.id
    assert control.cancel(run.id)["status"] == "cancelled"
    again = control.retry(run.id)
    assert (again["status"], again["local"]) == ("pending", True)
    assert [step["name"] for step in control.show(run.id)["steps"]] == ["first"]
    assert caller.do(base.ListRuns()) == []


def test_a_run_is_started_in_the_store_to_which_its_workflow_belongs(control: Control, local: Local) -> None:
    assert local.there() is None
    assert control.start(ORDER, "1").local is False
    assert local.there() is None, "nobody needs one yet"
    run = control.start(WARM, "1", unique_key="k")
    assert run.local is True
    assert control.start(WARM, "2", unique_key="k").id == run.id


def test_a_signal_of_an_operators_goes_where_that_of_the_app_does(
    opened: StoreThread, local: Local, caller: Caller, own: Caller
) -> None:
    control = Control(opened, local=local)
    for where in (caller, own):
        run = where.started()
        where.wait(run, "go")
        where.settle(run, Waits(("go",), None))
    listed = control.signals()["waiting"]
    assert [(wait["signal"], wait["local"]) for wait in listed] == [("go", False), ("go", True)]
    assert control.signal("go", "1") == 2
    assert control.signal("later", "2") == 0
    assert [kept["name"] for kept in control.signals()["kept"]] == ["later"]
    assert own.do(base.KeptSignals(now=0)) == []


def test_status_counts_both_and_marks_what_is_the_servers_own(control: Control, caller: Caller, own: Caller) -> None:
    own.join("w-2", "cache")
    own.do(base.SetSchedules(schedules=[ScheduleRecord("warm", "cache", "0 9 * * *", "UTC", "latest", "allow", None)]))
    caller.enqueue()
    own.enqueue()
    own.enqueue(group="cache")
    caller.clock.advance(1)
    found = control.status()
    assert found["runs"]["queued"] == 3
    assert {group["group"]: group["due"] for group in found["groups"]} == {"default": 2, "cache": 1}
    assert [(worker["group"], worker["local"]) for worker in found["workers"]][-1] == ("cache", True)
    assert [(one["workflow"], one["local"]) for one in found["schedules"]] == [("warm", True)]


def test_old_local_runs_are_counted_and_pruned_with_the_others(control: Control, caller: Caller, own: Caller) -> None:
    for where in (caller, own):
        where.settle(where.started(), Returned("1"))
    before = caller.now + 1
    assert control.prunable(before) == 2
    assert control.prune(before) == 2
    assert control.list_runs() == []


def test_gauges_mark_what_is_the_servers_own(caller: Caller, own: Caller, opened: StoreThread, local: Local) -> None:
    caller.enqueue()
    own.enqueue()
    own.enqueue()
    found = read(asyncio.run(gauges([opened, local.made()], ["default"], caller.now)))
    assert found.value("tako_queue_depth", group="default") == 1
    assert found.value("tako_queue_depth", group="default", local="true") == 2
    assert found.value("tako_runs", status="pending", reason="queued", local="true") == 2


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_commands_show_local_runs_beside_the_others(home: Home, tmp_path: Path) -> None:
    """`tako dev` works off both stores of a project whose store is shared, and the commands see what it has done."""
    project = make(tmp_path / "shop", FLOWS, f'name = "shop"\n[storage]\nurl = "{home.url}"\n')
    warm = document("runs", "start", "warm", "--payload", '"starts shared"', cwd=project)["run"]
    asks = document("runs", "start", "waits", "--payload", '"go"', cwd=project)["run"]
    assert (warm["local"], asks["local"]) == (True, True)
    ended = tako("dev", "--once", "--json", cwd=project)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = document("runs", "ls", cwd=project)["runs"]
    assert sorted((run["workflow"], run["local"], run["status"]) for run in runs) == [
        ("shared", False, "succeeded"), ("waits", True, "pending"), ("warm", True, "succeeded"),
    ]  # fmt: skip
    table = done("runs", "ls", cwd=project)
    assert "warm (local)" in table
    assert "shared (local)" not in table
    assert "waits (local)" in done("signals", "ls", cwd=project)
    assert "local" in done("runs", "show", warm["id"], cwd=project)
    assert "warm (local)" in done("workflows", "ls", cwd=project)
    assert document("runs", "signal", "go", cwd=project)["signal"]["woken"] == 1
    assert tako("dev", "--once", cwd=project).returncode == 0
    assert document("runs", "show", asks["id"], cwd=project)["run"]["status"] == "succeeded"


def test_tako_dev_puts_what_is_saved_to_work_for_local_runs_too(home: Home, tmp_path: Path) -> None:
    project = make(tmp_path / "shop", FLOWS, f'name = "shop"\n[storage]\nurl = "{home.url}"\n')
    flows = project / "workflows" / "flows.py"

    def result(dev: Dev) -> Any:
        run = document("runs", "start", "warm", "--payload", '"x"', "--wait", cwd=project)["run"]
        assert (run["local"], run["status"]) == (True, "succeeded"), dev.events
        return run["result"]

    with developing(project) as dev:
        dev.wait_for("dev.ready")
        assert result(dev) == str(project / ".tako")
        flows.write_text(FLOWS.replace('return os.environ["TAKO_DATA_DIR"]', 'return "as it is saved now"'))
        dev.wait_for("code.reloaded")
        until(lambda: result(dev) == "as it is saved now")


def test_whoever_follows_a_local_run_sees_its_end_and_cron_ls_its_schedule(
    opened: StoreThread, home: Home, tmp_path: Path
) -> None:
    flows = (
        FLOWS + '\n@workflow("nightly", local=True, schedule="0 3 * * *")\nasync def nightly(step: Step) -> None: ...\n'
    )
    project = make(tmp_path / "shop", flows)
    with serving(home, project):
        site = Site(opened, home, lambda: Manifest(()))
        listed = until(lambda: site.schedules().records and site.schedules())
        assert (listed.records[0].workflow, listed.local) == ("nightly", {"nightly"})

        async def followed() -> list[str]:
            run = await asyncio.to_thread(site.start, WARM, '"x"')
            return [event["event"] async for event in site.tail(run.id)]

        assert asyncio.run(asyncio.wait_for(followed(), 60))[-1] == "run.succeeded"
        site.close()


def test_a_servers_own_store_is_told_of_and_can_be_copied_before_its_app_is_removed(
    opened: StoreThread, home: Home, own: Caller, tmp_path: Path
) -> None:
    """As `tako app remove` does it."""
    own.enqueue()
    site = Site(opened, home, lambda: Manifest(()))
    found = site.status()
    assert found["local_store"] == str(home.file)
    assert any(str(home.file) in str(line) for line in overview(found, own.now, tmp_path))
    site.close()
    environment = {**os.environ, **home.environment(), "TAKO_STORAGE": "sqlite"}
    copied = subprocess.run(
        [sys.executable, "-m", "tako_runtime", "backup"], env=environment, capture_output=True, check=True, timeout=60
    ).stdout
    (tmp_path / "copy.db").write_bytes(copied)
    kept = examine(tmp_path / "copy.db")
    assert kept is not None
    assert (kept.damage, kept.runs) == ((), 1)


# --- several servers -------------------------------------------------------------------------------------------------


@pytest.fixture
def several(caller: Caller, opened: StoreThread, home: Home, tmp_path: Path) -> Iterator[dict[str, Site]]:
    """Two servers that share a store."""
    homes = {"web-1": home, "web-2": home._replace(data_dir=tmp_path / "web-2")}
    sites = {name: Site(opened, at, lambda: Manifest((WARM, ORDER))) for name, at in homes.items()}
    yield sites
    for site in sites.values():
        site.close()


def test_local_runs_of_each_server_are_listed_under_its_name(several: dict[str, Site], caller: Caller) -> None:
    shared = several["web-1"].start(ORDER, "1").id
    mine = {name: site.start(WARM, "1").id for name, site in several.items()}
    both = Several(several)
    found = {run["id"]: run.get("server") for run in both.list_runs()}
    assert found == {shared: None, mine["web-1"]: "web-1", mine["web-2"]: "web-2"}
    assert len(both.list_runs(limit=2)) == 2
    shown = both.show(mine["web-2"])
    assert (shown["server"], shown["local"]) == ("web-2", True)
    assert both.cancel(mine["web-2"], "enough")["status"] == "cancelled"
    assert several["web-2"].show(mine["web-2"])["status"] == "cancelled"
    assert both.retry(mine["web-2"])["status"] == "pending"
    assert both.show(shared[-12:]).get("server") is None
    with pytest.raises(Refused, match="several ids"):
        both.cancel(shared[:8], "too short to be one")
    with pytest.raises(NotFound):
        both.find("ffffffff")


def test_whoever_starts_a_local_run_on_several_servers_has_to_say_on_which(several: dict[str, Site]) -> None:
    both = Several(several)
    with pytest.raises(Refused, match="warm") as refused:
        both.start(WARM, "1")
    assert "--server web-1" in refused.value.hint
    assert both.start(ORDER, "1").local is False


def test_old_runs_of_the_shared_store_and_of_each_servers_own_are_counted_and_pruned_once(
    several: dict[str, Site], caller: Caller, tmp_path: Path
) -> None:
    before = caller.now + 1
    caller.settle(caller.started(), Returned("1"))
    for name, count in {"web-1": 1, "web-2": 2}.items():
        with closing(open_store(several[name]._home.embedded())) as opened:
            own = Caller(opened)
            for _ in range(count):
                own.settle(own.started(workflow="order"), Returned("1"))
            kept = own.enqueue()
    both = Several(several)
    assert both.prunable(before) == 4
    assert both.prunable(before, workflow="warm") == 0
    assert several["web-2"].prune(before, local=True) == 2
    assert both.prunable(before, statuses=["succeeded"]) == 2
    assert both.prune(before, statuses=["succeeded"]) == 2
    assert both.prunable(before) == 0
    assert several["web-2"].show(kept)["status"] == "pending"
    assert both.where == "on web-1, web-2"


def test_the_schedules_of_each_server_are_listed_under_its_name_and_those_of_the_shared_store_once(
    several: dict[str, Site], caller: Caller
) -> None:
    def scheduled(name: str) -> base.SetSchedules:
        return base.SetSchedules(
            schedules=[ScheduleRecord(name, "default", "0 9 * * *", "UTC", "latest", "allow", None)]
        )

    caller.do(scheduled("order"))
    for site in several.values():
        with closing(open_store(site._home.embedded())) as opened:
            opened.do_sync(scheduled("warm"))
    found = Several(several).timetables()
    told = [(server, [one.workflow for one in each.records]) for server, each in found]
    assert told == [(None, ["order"]), ("web-1", ["warm"]), ("web-2", ["warm"])]


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_servers_that_share_nothing_are_listed_together_and_changed_one_by_one(
    opened: StoreThread, caller: Caller, home: Home, tmp_path: Path
) -> None:
    away = home._replace(data_dir=tmp_path / "web-2")
    with closing(open_store(away)) as other:
        there = {"web-1": (opened, home), "web-2": (other, away)}
        sites = {name: Site(*at, lambda: Manifest((WARM,))) for name, at in there.items()}
        ids = {name: site.start(WARM, "1").id for name, site in sites.items()}
        both = Several(sites, shared=False)
        assert {run["id"]: run["server"] for run in both.list_runs()} == {run: name for name, run in ids.items()}
        assert both.show(ids["web-2"])["server"] == "web-2"
        assert [server for server, _ in both.timetables()] == ["web-1", "web-2"]
        for site in sites.values():
            [run] = site.list_runs()
            site.cancel(run["id"])
        assert both.prune(clock.SystemClock().now() + clock.SECOND) == 2
        for refused in (lambda: both.signal("go"), lambda: both.start(WARM, "1")):
            with pytest.raises(Refused) as error:
                refused()
            assert "--server web-1" in error.value.hint
