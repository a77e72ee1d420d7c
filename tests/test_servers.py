"""Several servers on one store: processes with data folders of their own and a database that they share."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from conftest import Caller, until
from postgres import Server
from serving import keep_secrets
from serving import project as project_of
from serving import serving as serve
from workers import SupervisorProcess, serving, shown, status, worker_process

from tako_runtime import Step, clock, log, rotation, store
from tako_runtime.clock import SECOND, SystemClock
from tako_runtime.control import Control
from tako_runtime.reclaim import reclaim
from tako_runtime.run import WorkerRecord
from tako_runtime.state import Returned, Waits, cancel, settle
from tako_runtime.store import Home, base, open_store
from tako_runtime.store.base import ListWorkers
from tako_runtime.store.commit import StoreThread
from tako_runtime.supervisor import RECLAIM_EVERY
from tako_runtime.workflow import Workflow, workflow

# They run processes of their own.
pytestmark = pytest.mark.slow

STORES = ("postgres",)

FLOWS = """
import asyncio, os, pathlib
from tako_runtime import Step, workflow

@workflow("where")
async def where(payload: str, step: Step) -> str:
    return os.environ["TAKO_DATA_DIR"]

@workflow("holds")
async def holds(payload: str, step: Step) -> str:
    async def body() -> str:
        while not pathlib.Path(payload).exists():
            await asyncio.sleep(0.02)
        return os.environ["TAKO_DATA_DIR"]
    return await step.run("hold", body)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose groups are at rest, of which two workers are wanted in `busy`."""
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "flows.py").write_text(FLOWS)
    (tmp_path / "tako.toml").write_text(
        'name = "shop"\n[workflows]\nlease = "2s"\nidle_timeout = "60s"\n[workflows.busy]\nworkers = 2\n'
    )
    return tmp_path


@pytest.fixture
def homes(home: Home, tmp_path_factory: pytest.TempPathFactory) -> list[Home]:
    """Three servers: one of them is where the test enqueues."""
    return [home, *(home._replace(data_dir=Path(tmp_path_factory.mktemp(f"s{n}"))) for n in range(2))]


@pytest.fixture
def flows(clean_registry: object) -> dict[str, Workflow[..., object]]:
    """What the app enqueues: never called here."""

    @workflow("where")
    async def where(payload: str, step: Step) -> str: ...  # type: ignore[empty-body]

    @workflow("holds")
    async def holds(payload: str, step: Step) -> str: ...  # type: ignore[empty-body]

    return {"where": where, "holds": holds}  # type: ignore[dict-item]


def spawned(servers: list[SupervisorProcess], group: str = "default") -> list[list[int]]:
    found = [[e["pid"] for e in server.events("worker.spawned") if e["group"] == group] for server in servers]
    return [pids for pids in found if pids]


def up(servers: list[SupervisorProcess]) -> None:
    until(lambda: all(server.events("relay.listening") for server in servers))


def test_one_server_wakes_a_group_at_rest_and_hears_at_once_of_what_another_enqueues(
    opened: StoreThread, homes: list[Home], project: Path, flows: dict[str, Workflow[..., object]]
) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(home, project, f"s{n}")) for n, home in enumerate(homes[1:])]
        up(servers)
        control, places = Control(opened), set()
        waited = 0
        for n in range(20):
            run = control.find(flows["where"].enqueue_sync(f"{n}"))
            assert control.wait(run)["status"] == "succeeded"
            found = control.find(run.id)
            waited += (found.started_at or 0) - found.created_at if n else 0  # the first one wakes the group
            places.add(shown(opened, run.id)["result"])
        assert waited < 5 * SECOND, "with the look once a second it would be ten"
        assert len(places) == 1
        assert len(spawned(servers)) == 1


def test_a_server_that_is_stopped_leaves_a_group_to_the_others_though_a_step_of_its_own_goes_on(
    opened: StoreThread, homes: list[Home], project: Path, flows: dict[str, Workflow[..., object]], tmp_path: Path
) -> None:
    released = tmp_path / "released"
    with serving(homes[1], project, "first") as first:
        up([first])
        flows["holds"].enqueue_sync(str(released))
        until(lambda: spawned([first]) and wakers(homes[0]))
        until(lambda: first.events("run.started"))
        first.process.terminate()
        until(lambda: first.events("worker.draining"))
        until(lambda: not wakers(homes[0]))
        assert first.process.poll() is None
        released.touch()


def wakers(home: Home) -> list[str]:
    """Who may wake which group, as the leases say."""
    with psycopg.connect(home.url) as db:
        rows = db.execute(f'SELECT name FROM "{home.schema}".leases WHERE name LIKE %s', ("wake %",)).fetchall()  # noqa: S608
    return [name for (name,) in rows]


def test_a_group_has_its_number_of_workers_on_each_server(
    opened: StoreThread, homes: list[Home], project: Path
) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(home, project, "same")) for home in homes[1:]]
        until(lambda: len(opened.do_sync(ListWorkers())) == 4)
        assert [len(pids) for pids in spawned(servers, "busy")] == [2, 2]


def test_another_server_takes_up_what_a_dead_one_had_in_hand(
    opened: StoreThread, homes: list[Home], project: Path, tmp_path: Path, flows: dict[str, Workflow[..., object]]
) -> None:
    gate = tmp_path / "gate"
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(home, project, f"s{n}")) for n, home in enumerate(homes[1:])]
        up(servers)
        run_id = flows["holds"].enqueue_sync(str(gate))
        until(lambda: shown(opened, run_id)["status"] == "running")
        [first] = [server for server in servers if spawned([server])]
        for pid in [first.process.pid, *first.spawned]:  # the whole machine, at once
            os.kill(pid, signal.SIGKILL)
        [other] = [server for server in servers if server is not first]
        until(lambda: other.events("run.reclaimed"))
        gate.touch()
        until(lambda: status(opened, run_id)[0] == "succeeded")
        place = homes[1 + servers.index(other)].data_dir
        assert shown(opened, run_id)["result"] == str(place)


# --- another url -----------------------------------------------------------------------------------------------------


def test_a_changed_database_url_reaches_every_connection_and_one_that_is_of_no_use_none(
    home: Home, server: Server, tmp_path: Path, flows: dict[str, Workflow[..., object]]
) -> None:
    home = home._replace(env="production")
    opened = open_store(home)
    store.use(opened)
    name = home.url.partition("?")[0].rpartition("/")[2]
    old, new = f"old_{name}", f"new_{name}"
    server.ask(f'CREATE ROLE "{old}" LOGIN; CREATE ROLE "{new}" LOGIN; GRANT "{old}" TO "{new}"')
    server.ask(f'GRANT ALL ON SCHEMA "{home.schema}" TO "{old}"', home.url)
    server.ask(f'GRANT ALL ON ALL TABLES IN SCHEMA "{home.schema}" TO "{old}"', home.url)
    server.ask(f'GRANT ALL ON ALL SEQUENCES IN SCHEMA "{home.schema}" TO "{old}"', home.url)

    def url(role: str) -> str:
        return home.url.replace("tako@", f"{role}@")

    def connections(role: str) -> int:
        return [who for (who,) in server.ask("SELECT usename FROM pg_stat_activity")].count(role)

    bare = home._replace(url="postgres", data_dir=tmp_path / "data")
    keep_secrets(bare, {"DATABASE_URL": url(old)})
    root = project_of(tmp_path / "shop", FLOWS, '[storage]\nurl = "postgres"\n')

    def works() -> None:
        run_id = flows["where"].enqueue_sync("")
        until(lambda: status(opened, run_id)[0] == "succeeded")

    with closing(opened), serve(bare, root) as running:
        running.wait_for("relay.listening")
        works()
        assert connections(old) > 0
        keep_secrets(bare, {"DATABASE_URL": url(new)})
        running.process.send_signal(signal.SIGHUP)
        until(lambda: connections(old) == 0)
        server.ask(f'ALTER ROLE "{old}" NOLOGIN')
        until(lambda: len(running.saw("relay.listening")) == 2)
        works()

        keep_secrets(bare, {"DATABASE_URL": url(old)})
        running.process.send_signal(signal.SIGHUP)
        assert "refuses the connection" in running.wait_for("secret.refused")["message"]
        assert rotation.standing(bare.app_dir)["unread"]
        works()
        assert connections(new) > 0
    store.use(None)


# --- who waits for a run on another server ----------------------------------------------------------------------------


@pytest.fixture
def heard(home: Home) -> Iterator[list[str]]:
    """What is sent to all machines, from now on."""
    notes: list[str] = []
    ended = threading.Event()

    def listen() -> None:
        with psycopg.connect(home.url, autocommit=True) as db:
            db.execute(f'LISTEN "{home.schema}"')
            up.set()
            while not ended.is_set():
                notes.extend(note.payload.partition("\t")[2] for note in db.notifies(timeout=0.1))

    up = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        up.wait(20)
        yield notes
        ended.set()
        listening.result()


def test_who_waits_for_a_run_hears_of_its_end_on_another_server(
    opened: StoreThread, homes: list[Home], monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    """It would look only after ten minutes."""
    monkeypatch.setattr("tako_runtime.control.LOOK", 600.0)
    caller = Caller(opened)
    relayed: list[dict[str, Any]] = []
    with (
        log.sink(relayed.append),
        closing(open_store(homes[1])) as there,
        opened.relay(),
        ThreadPoolExecutor(1) as pool,
    ):
        until(lambda: [line for line in relayed if line["event"] == "relay.listening"])
        run = caller.started()
        control = Control(opened)
        waiting = pool.submit(control.wait, control.find(run.id))
        until(lambda: awaited(homes[0]) == [run.seq])
        assert there.do_sync(base.Apply(change=settle(run, Returned("1"), caller.now)))
        assert waiting.result(60)["status"] == "succeeded"
        assert awaited(homes[0]) == []
        until(lambda: "ended" in heard)


def test_an_end_that_nobody_waits_for_on_another_server_is_not_sent_to_them(
    opened: StoreThread, homes: list[Home], heard: list[str]
) -> None:
    caller = Caller(opened)
    for _ in range(3):
        run = caller.started()
        assert caller.settle(run, Returned("1"))
    caller.do(base.AwaitEnd(seq=run.seq))  # it has ended: nothing will come of it
    caller.signal("the last")
    caller.apply(cancel(caller.started(), "stop", caller.now))
    until(lambda: "cancel" in heard)
    assert "ended" not in heard
    assert awaited(homes[0]) == []


def awaited(home: Home) -> list[int]:
    with psycopg.connect(home.url) as db:
        return [run for (run,) in db.execute(f'SELECT run FROM "{home.schema}".awaited').fetchall()]  # noqa: S608


# --- a server whose clock is off -------------------------------------------------------------------------------------


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """By how many nanoseconds this machine's clock is off, as its last item says."""
    by, right = [0], time.time_ns  # noqa: TID251
    monkeypatch.setattr("tako_runtime.clock.time.time_ns", lambda: right() + by[-1])
    monkeypatch.setattr("tako_runtime.store.postgres.COMPARE_EVERY", 0)
    yield by
    clock.standard.ahead = 0


def test_a_process_whose_clock_is_off_goes_by_the_databases_and_says_so(
    home: Home, off: list[int], server: Server
) -> None:
    def error() -> int:
        [(shown,)] = server.ask("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS int8)")
        return abs(SystemClock().now() - int(str(shown)))

    told: list[dict[str, Any]] = []
    off.append(-600 * 10**9)
    with log.sink(told.append), closing(open_store(home)) as opened:
        caller = Caller(opened)
        assert error() < SECOND
        off.append(3_600 * 10**9)  # somebody sets it, at work
        caller.enqueue()
        assert error() < SECOND
        off.append(0)
        caller.enqueue()
        assert clock.standard.ahead == 0
        caller.enqueue()
    said = [(line["event"], line.get("off"), line.get("direction")) for line in told if line["event"][:6] == "clock."]
    assert said == [("clock.off", "10m", "behind"), ("clock.off", "1h", "ahead of"), ("clock.right", None, None)]


@pytest.mark.parametrize("seconds", [-600, 600])
def test_a_worker_whose_servers_clock_is_off_is_not_taken_for_dead(
    opened: StoreThread, homes: list[Home], project: Path, seconds: int
) -> None:
    def lease() -> int:
        return {worker.id: worker.lease_until for worker in opened.do_sync(ListWorkers())}[mine]

    off = {"TEST_CLOCK_OFF": str(seconds)}
    with (
        serving(homes[2], project) as right,
        worker_process(homes[1], "--lease", "2s", script="clock_off.py", env=off) as wrong,
    ):
        [told] = wrong.up().events("clock.off")
        assert told["off"] == "10m"
        mine = wrong.events("worker.started")[0]["worker"]
        first = lease()
        assert abs(first - SystemClock().now()) < 10 * SECOND
        until(lambda: lease() > first + RECLAIM_EVERY + SECOND)  # meanwhile the other one has looked
        assert not right.events("clock.off")


def test_a_server_whose_clock_is_off_takes_nobodys_runs(opened: StoreThread, home: Home, off: list[int]) -> None:
    caller, now = Caller(opened), SystemClock().now()
    caller.do(base.AddWorker(worker=WorkerRecord("right", "default", "elsewhere", 1, "dev", now, now + 15 * SECOND)))
    off.append(600 * 10**9)
    caller.enqueue()  # whoever writes looks
    asyncio.run(reclaim(opened, home.app_dir, SystemClock().now()))
    assert "right" in {worker.id for worker in caller.do(ListWorkers())}


# --- behind a pooler -------------------------------------------------------------------------------------------------

POOLER = """
[databases]
* = host={folder} port={port} user=tako
[pgbouncer]
listen_addr =
unix_socket_dir = {own}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 3
max_client_conn = 100
"""


@pytest.fixture
def pooled(home: Home, server: Server) -> Iterator[Home]:
    """The same store behind pgbouncer in transaction mode."""
    own = server.folder / "pooler"
    own.mkdir(exist_ok=True)
    (own / "ini").write_text(POOLER.format(folder=server.folder, port=server.port, own=own))
    for path in (own, own / "ini"):
        server.own(path)
    try:
        pooler = server.spawn("pgbouncer", str(own / "ini"))
    except (FileNotFoundError, PermissionError):  # where the server's user may not look into a folder of the PATH
        pytest.skip("NO PGBOUNCER: apt-get install pgbouncer")
    until((own / ".s.PGSQL.6432").exists)
    name = home.url.partition("?")[0].rpartition("/")[2]
    yield home._replace(url=f"postgresql://tako@/{name}?host={own}&port=6432")
    pooler.terminate()
    assert isinstance(pooler, subprocess.Popen)
    pooler.wait()


def test_a_store_works_behind_a_pooler_that_hands_out_sessions_by_the_transaction(pooled: Home, home: Home) -> None:
    threads = [open_store(pooled) for _ in range(8)]
    callers = [Caller(threads[0])]
    for thread in threads[1:]:
        callers.append(object.__new__(Caller))
        callers[-1].do, callers[-1].clock = thread.do_sync, callers[0].clock

    def life(n: int) -> None:
        caller = callers[n % len(callers)]
        caller.enqueue(workflow=f"w{n}", unique_key="one")
        [each] = caller.claim(workflows=[f"w{n}"])
        caller.save(each.run, "a")
        caller.wait(each.run, f"go-{n}", position=2)
        assert caller.settle(each.run, Waits((f"go-{n}",), None))
        assert caller.signal(f"go-{n}") == 1
        [again] = caller.claim(workflows=[f"w{n}"])
        assert [step.status for step in again.steps] == ["done", "done"]
        assert caller.settle(again.run, Returned("1"))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(life, range(120)))
    for thread in threads:
        thread.close()
    with closing(open_store(home)) as direct:
        assert Control(direct).counts() == {}


def test_it_says_whether_it_listens_behind_a_pooler_or_looks(pooled: Home, home: Home, project: Path) -> None:
    with serving(pooled, project) as server:
        [told] = until(lambda: server.events("relay.polling"))
        assert "DATABASE_DIRECT_URL" in told["message"]
    secrets = pooled.app_dir / "secrets.json"
    secrets.write_bytes(msgspec.json.encode({"secrets": {"DATABASE_DIRECT_URL": home.url}}))
    secrets.chmod(0o600)
    with serving(pooled, project) as server:
        until(lambda: server.events("relay.listening"))
        assert not server.events("relay.polling")


def test_it_listens_as_soon_as_it_is_told_of_a_database_where_it_can(pooled: Home, home: Home, project: Path) -> None:
    secrets = pooled.app_dir / "secrets.json"
    with closing(open_store(pooled)) as opened:
        events: list[str] = []
        with log.sink(lambda line: events.append(line["event"])), opened.relay():
            until(lambda: "relay.polling" in events)
            secrets.parent.mkdir(parents=True, exist_ok=True)
            secrets.write_bytes(msgspec.json.encode({"secrets": {"DATABASE_DIRECT_URL": home.url}}))
            secrets.chmod(0o600)
            opened.reopen()
            until(lambda: "relay.listening" in events)
