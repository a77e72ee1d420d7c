"""Local workflows: in an environment whose servers share a store, their runs stay on the server that starts them."""

import asyncio
import os
import signal as signals
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from beside import FLOWS, TICKS, TOML, Stores, make
from conftest import Caller, finished, script, until
from postgres import Server
from serving import keep_secrets
from test_app import asked, configured, free_port, on_server
from workers import gone, serving

from tako_runtime import Step, clock, rotation, store
from tako_runtime.control import Control
from tako_runtime.store import Home, Local, base, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.workflow import Workflow, signal, signal_sync, workflow

# They run processes of their own.
pytestmark = pytest.mark.slow

STORES = ("postgres",)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make(tmp_path / "shop", FLOWS)


@pytest.fixture
def homes(home: Home, tmp_path_factory: pytest.TempPathFactory) -> list[Home]:
    """Two servers. The test itself is a process of the first."""
    return [home, home._replace(data_dir=Path(tmp_path_factory.mktemp("s2")))]


@pytest.fixture
def both(opened: StoreThread, homes: list[Home]) -> Iterator[list[Stores]]:
    """What is on the two servers. This process is an app's on the first."""
    found = [Stores(opened, home) for home in homes]
    store.use(opened, found[0].local)
    yield found
    for one in found:
        one.local.close()


@pytest.fixture
def flows(clean_registry: object) -> dict[str, Workflow[..., Any]]:
    """What the app enqueues: never called here."""
    made = {}
    for name, local in {
        "shared": False,
        "warm": True,
        "holds": True,
        "waits": True,
        "sends": True,
        "asks": False,
    }.items():

        @workflow(name, local=local)
        async def flow(payload: str, step: Step) -> Any: ...

        made[name] = flow
    return made


def names(runs: list[dict[str, Any]]) -> list[str]:
    return [run["workflow"] for run in runs]


# --- where a run goes ------------------------------------------------------------------------------------------------


def test_every_way_to_enqueue_puts_a_local_run_into_the_servers_own_store_and_any_other_into_the_shared_one(
    both: list[Stores], flows: dict[str, Workflow[..., Any]]
) -> None:
    async def enqueue(flow: Workflow[..., Any]) -> None:
        await flow.enqueue("1")
        await flow.enqueue_many(["2", "3"])

    for name in ("warm", "shared"):
        asyncio.run(enqueue(flows[name]))
        flows[name].enqueue_sync("4")
        flows[name].enqueue_many_sync(["5", "6"])
    assert names(both[0].runs()["local"]) == ["warm"] * 6
    assert names(both[0].runs()["shared"]) == ["shared"] * 6
    assert both[1].runs()["local"] == []
    assert not both[1].home.file.exists(), "nobody made one there"


def test_a_unique_key_holds_in_each_servers_own_store(
    both: list[Stores], homes: list[Home], flows: dict[str, Workflow[..., Any]], opened: StoreThread
) -> None:
    first = flows["warm"].enqueue_sync("1", unique_key="k")
    assert flows["warm"].enqueue_sync("2", unique_key="k") == first
    store.use(opened, both[1].local)
    assert flows["warm"].enqueue_sync("3", unique_key="k") != first


def test_a_script_finds_both_stores_and_needs_no_database_for_a_local_run(home: Home, tmp_path: Path) -> None:
    """The database is none that anybody could reach."""
    code = """
        from tako_runtime import Step, workflow
        @workflow("warm", local=True)
        async def warm(payload: str, step: Step) -> None: ...
        print(warm.enqueue_sync("x"))
    """
    away = home._replace(url="postgresql://nobody@127.0.0.1:1/nothing")
    run_id = finished(script(code, home=away)).strip()
    with closing(open_store(away.embedded())) as own:
        assert Control(own).find(run_id).workflow == "warm"


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_where_the_store_is_a_servers_own_anyway_local_changes_nothing(
    opened: StoreThread, home: Home, tmp_path: Path, clean_registry: object
) -> None:
    @workflow("warm", local=True)
    async def warm(payload: str, step: Step) -> str: ...  # type: ignore[empty-body]

    project = make(tmp_path / "shop", FLOWS + TICKS)
    with serving(home, project) as server:
        run = Control(opened).find(warm.enqueue_sync("starts shared"))
        assert Control(opened).wait(run)["status"] == "succeeded"
        until(lambda: Control(opened).list_runs(workflow="shared", statuses=["succeeded"]))
        until(lambda: Control(opened).list_runs(workflow="ticks", statuses=["succeeded"]))
        assert len(server.events("worker.spawned")) == 1
    assert [file.name for file in home.app_dir.glob("*.db")] == ["runs.db"]


# --- who works on it -------------------------------------------------------------------------------------------------


def test_runs_of_both_kinds_start_each_other_and_end_on_the_side_to_which_they_belong(
    both: list[Stores], homes: list[Home], project: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    with serving(homes[0], project) as server:
        flows["shared"].enqueue_sync("starts local")
        [warm] = both[0].ended("warm")
        assert warm["payload"] == "from shared"
        assert warm["unique_key"] == "k"
        flows["warm"].enqueue_sync("starts shared")
        until(lambda: len(both[0].control.list_runs(workflow="shared", statuses=["succeeded"])) == 2)
        until(lambda: not both[0].control.counts())
        assert len(server.events("worker.spawned")) == 2, "one for each store"
    assert set(names(both[0].runs()["shared"])) == {"shared"}
    assert set(names(both[0].runs()["local"])) == {"warm"}


def test_a_server_without_a_local_workflow_makes_no_store_of_its_own(
    both: list[Stores], homes: list[Home], tmp_path: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    project = make(tmp_path / "plain", FLOWS.replace(", local=True", ""))
    with serving(homes[1], project):
        run = both[0].control.find(flows["shared"].enqueue_sync("x"))
        assert both[0].control.wait(run)["status"] == "succeeded"
    assert not homes[1].file.exists()


def test_a_local_run_is_worked_on_by_its_own_server_alone(
    both: list[Stores], homes: list[Home], project: Path, opened: StoreThread, flows: dict[str, Workflow[..., Any]]
) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(home, project, f"s{n}")) for n, home in enumerate(homes)]
        until(lambda: all(server.events("relay.listening") for server in servers))
        for one in both:
            store.use(opened, one.local)
            flows["warm"].enqueue_many_sync(["x"] * 20)
        for one in both:
            results = {run["result"] for run in one.ended("warm", 20)}
            assert results == {str(one.home.data_dir)}


def test_a_local_schedule_fires_on_each_server_and_a_shared_one_on_one(
    both: list[Stores], homes: list[Home], tmp_path: Path
) -> None:
    shared_ticks = TICKS.replace('"ticks", local=True', '"beats"').replace("ticks(", "beats(")
    project = make(tmp_path / "shop", FLOWS + TICKS + shared_ticks)
    with ExitStack() as stack:
        for n, home in enumerate(homes):
            stack.enter_context(serving(home, project, f"s{n}"))
        fired = [{run["scheduled_at"] for run in one.ended("ticks", 3)} for one in both]
        until(lambda: len(both[0].control.list_runs(workflow="beats", statuses=["succeeded"])) >= 3)
    for one in both:
        times = [run["scheduled_at"] for run in one.runs("ticks")["local"]]
        assert len(times) == len(set(times)), "each time fires once on a server"
    assert fired[0] & {run["scheduled_at"] for run in both[1].runs("ticks")["local"]}, "and on both"
    times = [run["scheduled_at"] for run in both[0].runs("beats")["shared"]]
    assert len(times) == len(set(times))
    assert both[0].runs("ticks")["shared"] == []


def test_a_local_run_of_a_killed_worker_goes_on_in_another_one(
    both: list[Stores], homes: list[Home], project: Path, tmp_path: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    with serving(homes[0], project):
        flows["holds"].enqueue_sync(str(tmp_path / "gate"))
        own = until(both[0].local.there)
        [worker] = until(lambda: [w for w in own.do_sync(base.ListWorkers()) if own.do_sync(base.RunsOf(worker=w.id))])
        os.kill(worker.pid, signals.SIGKILL)
        until(lambda: both[0].runs("holds")["local"][0]["attempt"] == 2)
        (tmp_path / "gate").touch()
        [run] = both[0].ended("holds")
    assert run["attempt"] == 2


def test_workers_of_local_runs_leave_when_they_are_idle_and_a_wanted_number_is_there_for_a_local_group_alone(
    both: list[Stores], homes: list[Home], tmp_path: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    toml = 'name = "shop"\n[workflows]\nidle_timeout = "200ms"\n[workflows.cache]\nworkers = 2\n'
    local_group = (
        '\n@workflow("cached", local=True, group="cache")\nasync def cached(payload: str, step: Step) -> None: ...\n'
    )
    with serving(homes[0], make(tmp_path / "shop", FLOWS + local_group, toml)) as server:
        own = until(both[0].local.there)
        until(lambda: [w.group for w in own.do_sync(base.ListWorkers())] == ["cache"] * 2)
        flows["warm"].enqueue_sync("x")
        both[0].ended("warm")
        [pid] = [event["pid"] for event in server.events("worker.spawned") if event["group"] == "default"]
        until(lambda: gone(pid))
        assert both[0].shared.do_sync(base.ListWorkers()) == []
        assert [w.group for w in own.do_sync(base.ListWorkers())] == ["cache"] * 2


def test_local_workflows_go_on_while_the_database_is_away(
    own: Server, home: Home, tmp_path: Path, clean_registry: object
) -> None:
    there = home._replace(url=own.database())

    @workflow("warm", local=True)
    async def warm(payload: str, step: Step) -> str: ...  # type: ignore[empty-body]

    project = make(tmp_path / "shop", FLOWS + TICKS)
    beside = Local(there)
    with serving(there, project) as server:
        until(lambda: server.events("relay.listening") and server.events("code.declared"))
        local = Control(beside.made())
        own.stop()
        try:
            store.use(None, beside)
            store._current.home = there  # an app that has just started, and has reached no database
            before = len(local.list_runs(workflow="ticks"))
            run = local.find(warm.enqueue_sync("x"))
            assert local.wait(run)["status"] == "succeeded"
            until(lambda: len(local.list_runs(workflow="ticks", statuses=["succeeded"])) > before + 2)
        finally:
            own.start()
            store.use(None)
        assert server.process.poll() is None
    beside.close()


def test_a_server_that_starts_before_its_database_serves_its_app_and_local_runs_and_all_else_once_that_is_there(
    own: Server, home: Home, tmp_path: Path
) -> None:
    there, port = home._replace(url=own.database(), env="production"), free_port()
    wanted = f'workers = 1\n[storage]\nurl = "{there.url}"\n'
    project = configured(tmp_path / "shop", "port", port, TOML.partition("\n")[2] + wanted)
    everywhere = TICKS.replace("ticks", "anywhere").replace("local=True, ", "")
    (project / "workflows" / "flows.py").write_text(FLOWS + TICKS + everywhere)
    with closing(open_store(there)) as opened:  # a boot like any: it has been there before, and ended badly
        broken = base.ReportHealth(group="default", host=socket.gethostname(), now=1, reason="broken", details="")
        Caller(opened).do(broken)
    own.stop()
    with on_server(there, project) as server:
        server.wait_for("app.healthy")
        assert asked(port)["env"]["TAKO_STORAGE"] == there.url
        with closing(Local(there)) as beside:
            until(lambda: Control(beside.made()).list_runs(workflow="ticks", statuses=["succeeded"]))
        said = server.wait_for("store.busy")["message"]
        assert f"the database {own.folder}:5432/" in said
        assert "cannot be reached" in said
        own.start()
        with closing(open_store(there)) as opened:
            control = Control(opened, app_dir=there.app_dir)
            [ticked, *_] = until(lambda: control.list_runs(workflow="anywhere", statuses=["succeeded"]))
            assert ticked["result"] == str(there.data_dir)
            assert [group["unhealthy"] for group in control.status()["groups"]] == [[]]
        assert (server.saw("group.unhealthy"), server.saw("worker.died")) == ([], [])


KEEPERS = """
from tako_runtime import secrets

def wait(gate: str) -> str:
    import time
    while not pathlib.Path(gate).exists():
        time.sleep(0.02)
    return secrets["KEY"][-3:]

@workflow("here", local=True, retries=0)
async def kept_here(payload: str, step: Step) -> list[str]:
    return [await step.run("first", wait, payload), await step.run("second", wait, payload)]

@workflow("there", retries=0)
async def kept_there(payload: str, step: Step) -> list[str]:
    return [await step.run("first", wait, payload), await step.run("second", wait, payload)]
"""


def test_new_secrets_replace_the_workers_of_both_stores_at_their_next_step(
    both: list[Stores], homes: list[Home], tmp_path: Path, clean_registry: object
) -> None:
    @workflow("here", local=True)
    async def here(payload: str, step: Step) -> None: ...

    @workflow("there")
    async def there(payload: str, step: Step) -> None: ...

    keep_secrets(homes[0], {"KEY": "sk_live_before_one"})
    gate, app_dir = tmp_path / "gate", homes[0].app_dir
    with serving(homes[0], make(tmp_path / "shop", FLOWS + KEEPERS)) as server:
        here.enqueue_sync(str(gate))
        there.enqueue_sync(str(gate))
        until(lambda: [run["status"] for runs in both[0].runs().values() for run in runs] == ["running"] * 2)
        keep_secrets(homes[0], {"KEY": "sk_live_after_two"})
        server.process.send_signal(signals.SIGHUP)
        until(lambda: not rotation.standing(app_dir)["unread"])
        until(lambda: {each["pid"] for each in rotation.standing(app_dir)["old"]} == set(server.spawned[:2]))
        until(lambda: len(server.events("worker.draining")) == 2)  # both have heard that their next step is another's
        gate.touch()
        [run] = both[0].ended("here")
        [other] = until(lambda: both[0].control.list_runs(workflow="there", statuses=["succeeded"]))
        assert (run["result"], other["result"]) == (["one", "two"], ["one", "two"])
        until(lambda: rotation.standing(app_dir) == {"unread": False, "old": []})


def test_workers_of_both_stores_stop_with_their_supervisor_and_what_they_had_in_hand_uses_up_no_attempt(
    both: list[Stores], homes: list[Home], project: Path, tmp_path: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    gate = tmp_path / "gate"
    with serving(homes[0], project) as server:
        flows["holds"].enqueue_sync(str(gate))
        flows["shared"].enqueue_sync("x")
        until(lambda: len(server.events("worker.claimed")) == 2)
        server.process.terminate()
        until(lambda: server.events("worker.draining"))
        gate.touch()
        assert server.process.wait(30) == 0
        assert all(gone(pid) for pid in server.spawned)
    [run] = both[0].runs("holds")["local"]
    assert (run["attempt"], run["status"] in ("succeeded", "pending")) == (1, True)
    own = both[0].local.made()
    assert own.do_sync(base.ListWorkers()) == []


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_servers_own_runs_go_by_its_own_clock_though_the_databases_is_far_from_it(
    homes: list[Home], tmp_path: Path, clean_registry: object, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """All processes of the server know that clock but the workers of its own store, which need no database."""

    @workflow("naps", local=True)
    async def naps(step: Step) -> None: ...

    napping = '\n@workflow("naps", local=True)\nasync def naps(step: Step) -> None:\n    await step.sleep("5m")\n'
    (tmp_path / "off").mkdir()
    shift = f"import time\nright = time.time_ns\ntime.time_ns = lambda: right() + {seconds} * 10**9\n"
    (tmp_path / "off" / "sitecustomize.py").write_text(shift)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "off"))
    right, beside = time.time_ns, Local(homes[1])  # noqa: TID251
    monkeypatch.setattr("tako_runtime.clock.time.time_ns", lambda: right() + seconds * 10**9)
    with (
        serving(homes[1], make(tmp_path / "shop", FLOWS + TICKS + napping)) as server,
        closing(open_store(homes[1])) as app,
    ):
        assert abs(clock.standard.ahead) > 500 * clock.SECOND
        store.use(app, beside)
        own = Control(app, app_dir=homes[1].app_dir, local=beside)
        nap = naps.enqueue_sync()
        until(lambda: own.find(nap).reason == "sleeping")
        until(lambda: len(own.list_runs(workflow="ticks", statuses=["succeeded"])) > 6)
        assert own.find(nap).claim == 1, "it sleeps, and is not woken to find that it is too early"
        own.wake()
        assert own.wait(own.find(nap))["status"] == "succeeded"
        assert server.events("worker.frozen") == []
        assert len(server.events("worker.spawned")) == 1
    store.use(None)
    beside.close()
    clock.standard.ahead = 0


# --- signals ---------------------------------------------------------------------------------------------------------


def parked(one: Stores, kind: str, flow: Workflow[..., Any], name: str) -> str:
    """A run that waits for that signal."""
    run_id = flow.enqueue_sync(name)
    until(lambda: [run for run in one.runs()[kind] if run["id"] == run_id and run["reason"] == "waiting"])
    return run_id


def test_a_signal_wakes_local_runs_of_the_server_where_it_is_sent_and_shared_ones(
    both: list[Stores], homes: list[Home], project: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    with serving(homes[0], project):
        parked(both[0], "local", flows["waits"], "go")
        parked(both[0], "shared", flows["asks"], "go")
        assert signal_sync("go", "both") == 2
        [run] = both[0].ended("waits")
        assert run["result"] == "both"
        until(lambda: both[0].control.list_runs(workflow="asks", statuses=["succeeded"]))
        assert both[0].control.signals()["kept"] == []

        parked(both[0], "local", flows["waits"], "again")
        assert asyncio.run(signal("again", "local")) == 1
        assert [run["result"] for run in both[0].ended("waits", 2)] == ["local", "both"]
        assert both[0].control.signals()["kept"] == [], "one that a local run took is not kept for others"


def test_a_local_run_sends_signals_to_both_kinds_too(
    both: list[Stores], homes: list[Home], project: Path, flows: dict[str, Workflow[..., Any]]
) -> None:
    with serving(homes[0], project):
        parked(both[0], "local", flows["waits"], "go")
        parked(both[0], "shared", flows["asks"], "go")
        flows["sends"].enqueue_sync("go")
        [run] = both[0].ended("sends")
        assert run["result"] == 2


def test_a_signal_that_nobody_waits_for_is_kept_once_and_taken_once_by_the_next_wait_on_any_server(
    both: list[Stores], homes: list[Home], project: Path, opened: StoreThread, flows: dict[str, Workflow[..., Any]]
) -> None:
    """It is sent on the first server, and the local run that takes it is on the second."""
    with ExitStack() as stack:
        for n, home in enumerate(homes):
            stack.enter_context(serving(home, project, f"s{n}"))
        until(lambda: all(home.file.exists() for home in homes))
        assert signal_sync("early", 1) == 0
        assert signal_sync("early", 2) == 0
        store.use(opened, both[1].local)
        flows["waits"].enqueue_sync("early")
        [run] = both[1].ended("waits")
        assert run["result"] == 1, "the oldest first"
        [kept] = until(lambda: len(found := both[0].control.signals()["kept"]) == 1 and found)
        assert kept["payload"] == 2
        flows["asks"].enqueue_sync("early")
        [shared] = until(lambda: both[0].control.list_runs(workflow="asks", statuses=["succeeded"]))
        assert shared["result"] == 2
        assert both[0].control.signals() == {"waiting": [], "kept": []}


def test_a_local_run_that_waits_elsewhere_gets_what_nobody_else_waits_for(
    both: list[Stores], homes: list[Home], project: Path, opened: StoreThread, flows: dict[str, Workflow[..., Any]]
) -> None:
    with serving(homes[1], project):
        store.use(opened, both[1].local)
        parked(both[1], "local", flows["waits"], "go")
        store.use(opened, both[0].local)
        assert signal_sync("go", "from afar") == 0
        [run] = both[1].ended("waits")
        assert run["result"] == "from afar"


def test_no_signal_is_lost_whoever_is_killed_while_it_is_brought(
    both: list[Stores], homes: list[Home], tmp_path: Path, opened: StoreThread, flows: dict[str, Workflow[..., Any]]
) -> None:
    """The server that brings them is killed again and again; a hundred waits have a hundred signals in the end."""
    project = make(tmp_path / "shop", FLOWS)
    for n in range(100):
        signal_sync(f"s{n}", n)
    flows["waits"].enqueue_many_sync([f"s{n}" for n in range(100)])
    for _ in range(3):
        before = len(both[0].succeeded("waits"))
        with serving(homes[0], project) as server:
            until(lambda: len(both[0].succeeded("waits")) > min(before + 10, 99))  # noqa: B023
            server.process.kill()
            server.process.wait()
    with serving(homes[0], project) as server:
        until(lambda: server.events("relay.listening"))
        runs = both[0].ended("waits", 100)
    assert {run["payload"]: run["result"] for run in runs} == {f"s{n}": n for n in range(100)}
