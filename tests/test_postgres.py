"""The shared store: what happens when the connection to it goes, and what its schema is."""

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import apsw
import msgspec
import psycopg
import pytest
from conftest import Caller, until
from postgres import NoPostgres, Server, programs
from scenarios.flows import orders
from scenarios.lasting import ticking
from wire import Cut, Wire, wire
from workers import shown, status, worker_process, workers

from tako_runtime import store
from tako_runtime.clock import SECOND
from tako_runtime.control import Control
from tako_runtime.errors import ConfigError, Refused, StoreUnreachable
from tako_runtime.run import StepRecord
from tako_runtime.secrets import envelope
from tako_runtime.state import Returned
from tako_runtime.store import Home, base, database, open_store, queries, version
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.pipeline import Query
from tako_runtime.store.postgres import PostgresStore

# They run processes of their own.
pytestmark = pytest.mark.slow

STORES = ("postgres",)
NEWEST = queries.migrations("postgres")[-1][0]
CUTS: list[Cut] = ["before the commit", "after the commit"]


@pytest.fixture
def line(server: Server) -> Iterator[Wire]:
    with wire(server.folder / f".s.PGSQL.{server.port}") as one:
        yield one


@pytest.fixture
def away(home: Home, line: Wire) -> Home:
    """The same store, over that wire."""
    name = home.url.partition("?")[0].rpartition("/")[2]
    return home._replace(url=f"postgresql://tako@127.0.0.1:{line.port}/{name}")


@pytest.fixture
def far(away: Home) -> Iterator[StoreThread]:
    with closing(open_store(away)) as thread:
        yield thread


# --- a commit whose answer was lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_that_is_cut_off_at_its_commit_is_carried_out_once(far: StoreThread, line: Wire, cut: Cut) -> None:
    caller = Caller(far)
    caller.enqueue()
    line.cuts.append(cut)
    assert caller.signal("go", "1") == 0
    assert [kept.payload for kept in caller.do(base.KeptSignals(now=caller.now))] == [b"1"]
    line.cuts.append(cut)
    second = caller.enqueue()
    assert len({run.id for run in caller.do(base.ListRuns())} | {second}) == 2
    line.cuts.append(cut)
    claimed = caller.claim(limit=5)
    assert [each.run.claim for each in claimed] == [1, 1]
    line.cuts.append(cut)
    assert caller.settle(claimed[0].run, Returned("1"))
    assert len(caller.do(base.Attempts(seq=claimed[0].run.seq))) == 1
    assert line.cuts == []


def test_a_batch_that_is_cut_off_again_and_again_is_carried_out_once(far: StoreThread, line: Wire) -> None:
    caller = Caller(far)
    line.cuts += [CUTS[0], CUTS[0], CUTS[1]]
    run_id = caller.enqueue()
    assert [run.id for run in caller.do(base.ListRuns())] == [run_id]


def test_what_several_callers_wrote_together_is_in_once_when_its_answer_was_lost(far: StoreThread, line: Wire) -> None:
    caller = Caller(far)
    line.cuts += [CUTS[1], CUTS[0], CUTS[1]]
    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(lambda _: caller.enqueue(), range(60)))
    assert sorted(ids) == sorted(run.id for run in caller.do(base.ListRuns(limit=100)))


def test_a_batch_that_still_waits_on_the_server_when_its_connection_is_lost_is_not_carried_out_twice(
    far: StoreThread, line: Wire, home: Home, server: Server
) -> None:
    """Its backend does not notice that nobody is there: it waits for a lock, and then goes on to the commit."""
    caller = Caller(far)

    def waiting(count: int) -> bool:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return server.ask(asked, home.url) == [(count,)]

    with psycopg.connect(home.url) as other, ThreadPoolExecutor(1) as pool:
        other.execute(f'LOCK TABLE "{home.schema}".runs IN SHARE MODE')
        enqueuing = pool.submit(caller.enqueue)
        until(lambda: waiting(1))
        line.cut()
        until(lambda: waiting(2))
        other.rollback()
        run_id = enqueuing.result(30)
        until(lambda: waiting(0))
    assert [run.id for run in caller.do(base.ListRuns())] == [run_id]


def test_a_reader_does_not_notice_that_the_connection_was_cut(far: StoreThread, line: Wire) -> None:
    caller = Caller(far)
    run_id = caller.enqueue()
    line.cut()
    assert [run.id for run in caller.do(base.ListRuns())] == [run_id]


def test_an_outcome_that_cannot_be_found_out_is_told_as_that(
    far: StoreThread, line: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(far)
    monkeypatch.setattr("tako_runtime.store.postgres.PATIENCE", SECOND // 10)
    line.cuts.append(CUTS[1])
    line.refuse()
    with pytest.raises(StoreUnreachable, match="whether it was stored is not known") as caught:
        caller.enqueue()
    assert "unique_key" in caught.value.hint


# --- a database that goes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_what_was_acknowledged_outlives_restarts_of_the_database(home: Home, own: Server, how: str) -> None:
    """Eight threads enqueue while it is restarted three times; none of them sees an error."""
    with closing(open_store(home._replace(url=own.database()))) as opened:
        caller, ended, ids = Caller(opened), threading.Event(), list[str]()

        def enqueue() -> None:
            while not ended.is_set():
                ids.append(caller.enqueue())

        with ThreadPoolExecutor(8) as pool:
            going = [pool.submit(enqueue) for _ in range(8)]
            for _ in range(3):
                before = len(ids)
                until(lambda before=before: len(ids) > before + 50)
                own.restart(how)
            ended.set()
            for each in going:
                each.result()
        assert sorted(ids) == sorted(run.id for run in caller.do(base.ListRuns(limit=len(ids) + 100)))


def test_a_database_that_is_away_for_long_is_an_error_that_names_it_and_goes_when_it_is_back(
    home: Home, own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tako_runtime.store.postgres.PATIENCE", SECOND // 5)
    with closing(open_store(home._replace(url=own.database()))) as opened:
        caller = Caller(opened)
        own.stop()
        with pytest.raises(StoreUnreachable, match="cannot be reached") as caught:
            caller.enqueue()
        assert str(own.folder) in str(caught.value)
        own.start()
        run_id = caller.enqueue()
        assert [run.id for run in caller.do(base.ListRuns())] == [run_id]


def test_of_several_hosts_it_goes_on_with_the_standby_that_was_promoted(home: Home, own: Server) -> None:
    name = own.database().partition("?")[0].rpartition("/")[2]
    try:
        standby = Server(standby_of=own)
    except NoPostgres as error:
        pytest.skip(f"NO STANDBY: {error}")
    url = f"postgresql://tako@/{name}?host={standby.folder},{own.folder}"  # the one that takes no writes comes first
    with closing(standby), closing(open_store(home._replace(url=url))) as opened:
        caller = Caller(opened)
        first = caller.enqueue()
        written = own.ask("SELECT pg_current_wal_lsn()")[0][0]
        until(lambda: standby.ask(f"SELECT pg_last_wal_replay_lsn() >= '{written}'")[0][0])
        own.stop()
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(caller.enqueue)  # it waits for somebody who takes it
            standby.promote()
            assert {run.id for run in caller.do(base.ListRuns())} == {first, second.result()}


def test_no_error_and_no_picture_of_a_database_shows_its_password(home: Home) -> None:
    for url in (
        "postgresql://ada:s3cret-pass@127.0.0.1:1/shop",
        "postgresql://ada:s3cret-pass@127.0.0.1:no/shop",
        "postgresql://ada:s3cret%zz@127.0.0.1/shop",
    ):
        with pytest.raises((StoreUnreachable, ConfigError)) as caught:
            open_store(home._replace(url=url))
        told = f"{caught.value} {caught.value!r} {caught.value.hint} {caught.value.__cause__!r}"
        assert "s3cret" not in told
    assert "127.0.0.1" in str(database.Database("postgresql://ada:s3cret-pass@127.0.0.1/shop", "x"))
    assert "s3cret" not in repr(database.Database("postgresql://ada:s3cret-pass@127.0.0.1/shop", "x"))


def test_who_gets_no_connection_is_told_so_and_gets_one_later(home: Home, server: Server) -> None:
    name = home.url.partition("?")[0].rpartition("/")[2]
    role = f"app_{name}"
    server.ask(f'CREATE ROLE "{role}" LOGIN; GRANT CREATE ON DATABASE "{name}" TO "{role}"')
    url = home.url.replace("tako@", f"{role}@")
    server.ask(f'ALTER ROLE "{role}" CONNECTION LIMIT 0')
    with pytest.raises(StoreUnreachable, match="too many connections"):
        open_store(home._replace(url=url))
    server.ask(f'ALTER ROLE "{role}" CONNECTION LIMIT 1')
    open_store(home._replace(url=url)).close()


def test_the_url_is_the_secret_where_the_project_says_only_postgres(home: Home) -> None:
    bare = home._replace(url="postgres")
    with pytest.raises(ConfigError, match="the secret DATABASE_URL is not set") as caught:
        open_store(bare)
    assert "secrets.json" in caught.value.hint
    home.app_dir.mkdir(parents=True, mode=0o700)
    secrets = home.app_dir / "secrets.json"
    secrets.write_bytes(msgspec.json.encode({"secrets": {"DATABASE_URL": home.url}}))
    secrets.chmod(0o600)
    with closing(open_store(bare)) as opened:
        run_id = Caller(opened).enqueue()
    assert home.url not in bare.environment().values()
    with closing(open_store(home)) as opened:
        assert [run.id for run in opened.do_sync(base.ListRuns())] == [run_id]


# --- a worker that cannot renew its lease ----------------------------------------------------------------------------


def stopped_at(log: Path) -> int:
    seen = [""]

    def still() -> bool:
        threading.Event().wait(0.5)  # ten lines would have come
        seen.append(log.read_text())
        return seen[-1] == seen[-2]

    until(still, 30)
    return int(seen[-1].split("\n")[-2])


@pytest.mark.parametrize("flow", [ticking.ticks, ticking.ticks_in_a_thread], ids=["async", "in a thread"])
def test_a_worker_that_cannot_renew_its_lease_stops_its_handlers_before_it_ends(
    home: Home, own: Server, tmp_path: Path, flow: Any
) -> None:
    home, log = home._replace(url=own.database()), tmp_path / "ticks"
    opened = open_store(home)
    store.use(opened)
    with closing(opened), worker_process(home, "--lease", "2s", "--dir", "scenarios/lasting") as worker:
        worker.up()
        run_id = flow.enqueue_sync(str(log))
        until(log.exists)
        own.stop()
        ended = stopped_at(log)
        own.start()
        lease = min(each.lease_until for each in opened.do_sync(base.ListWorkers()) if each.pid == worker.pid)
        assert ended < lease, "a lease that it has since begun anew with is a later one"
        assert status(opened, run_id) == ("running", "claimed"), "it is for others to give back"
    store.use(None)


def test_a_worker_goes_on_when_the_database_was_away_for_less_than_its_lease(home: Home, own: Server) -> None:
    home = home._replace(url=own.database())
    opened = open_store(home)
    store.use(opened)
    with closing(opened), worker_process(home) as worker:
        worker.up()
        before = workers(opened)
        own.restart()
        ids = orders.answers.enqueue_many_sync([f"{n}" for n in range(20)])
        until(lambda: Control(opened).counts() == {})
        assert {shown(opened, run_id)["status"] for run_id in ids} == {"succeeded"}
        assert workers(opened) == before
    store.use(None)


# --- the schema ------------------------------------------------------------------------------------------------------


def columns_of(text: str) -> set[str]:
    """Each table with its columns, as the migrations leave them, in whichever dialect."""
    db = apsw.Connection(":memory:")
    db.execute(text)
    found = db.execute(
        "SELECT t.name || '.' || c.name FROM sqlite_schema AS t, pragma_table_info(t.name) AS c WHERE t.type = 'table'"
    )
    return {name for (name,) in found}


def test_both_stores_have_the_same_tables_and_columns(opened: StoreThread, home: Home, server: Server) -> None:
    asked = (
        f"SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = '{home.schema}'"
    )
    here = {str(name) for (name,) in server.ask(asked, home.url)}
    embedded = columns_of("".join(script for _, script in queries.migrations("sqlite")))
    assert {name for name in here if not name.startswith(("writers.", "awaited.", "store."))} == embedded


def test_five_servers_that_start_at_once_make_one_schema(home: Home) -> None:
    with ThreadPoolExecutor(5) as pool:
        opened = list(pool.map(lambda _: open_store(home), range(5)))
    ids = {
        Caller(thread).enqueue() if n == 0 else thread.do_sync(base.ListRuns())[0].id for n, thread in enumerate(opened)
    }
    assert len(ids) == 1
    for thread in opened:
        thread.close()


def test_each_environment_has_a_schema_of_its_own(opened: StoreThread, home: Home) -> None:
    Caller(opened).enqueue()
    with closing(open_store(home._replace(env="staging"))) as other:
        assert other.do_sync(base.ListRuns()) == []
    assert home._replace(env="production").schema == "tako_shop_production"
    assert len(home._replace(app="a" * 63, env="production").schema) <= 63


def test_a_backup_is_the_databases_own_and_the_commands_for_it_are_told_without_a_password(
    home: Home, server: Server, tmp_path: Path
) -> None:
    with closing(open_store(home)) as opened:
        run_id = Caller(opened).enqueue()
    secret = home._replace(url=home.url.replace("tako@", "tako:s3cret-pass@"))

    def told(refused: "pytest.ExceptionInfo[Refused]") -> list[str]:
        assert "s3cret" not in f"{refused.value} {refused.value.hint}"
        program, *words = shlex.split(refused.value.hint.partition(": ")[2])
        return [str(programs() / program), *words]

    with pytest.raises(Refused, match="no file of tako's own") as caught:
        store.backup(secret, tmp_path / "copy")
    subprocess.run(told(caught), cwd=tmp_path, check=True)
    server.ask(f'DELETE FROM "{home.schema}".runs', home.url)
    with pytest.raises(Refused, match="no file of tako's own") as caught:
        store.restore(secret, BytesIO())
    subprocess.run(told(caught), cwd=tmp_path, check=True)
    with closing(open_store(home)) as opened:
        assert [run.id for run in opened.do_sync(base.ListRuns())] == [run_id]


# --- claims among many -----------------------------------------------------------------------------------------------


def test_stores_that_claim_at_once_share_the_runs_and_none_waits_for_another(opened: StoreThread, home: Home) -> None:
    caller = Caller(opened)
    caller.do(base.Enqueue(runs=[caller.new() for _ in range(400)], now=caller.now))
    others = [open_store(home) for _ in range(4)]

    def claim(thread: StoreThread) -> list[int]:
        taken: list[int] = []
        op = base.ClaimRuns(worker="w-1", group="default", workflows=["order"], limit=10, now=caller.now)
        while found := thread.do_sync(op):
            taken += [each.run.seq for each in found]
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [seq for own in pool.map(claim, others) for seq in own]
    assert len(taken) == len(set(taken)) == 400
    for thread in others:
        thread.close()


def test_a_claim_does_not_wait_for_rows_that_somebody_holds(opened: StoreThread, home: Home) -> None:
    caller = Caller(opened)
    for _ in range(3):
        caller.enqueue()
    with psycopg.connect(home.url) as other:
        other.execute(f'SELECT 1 FROM "{home.schema}".runs ORDER BY seq LIMIT 1 FOR UPDATE')
        assert len(caller.claim(limit=5)) == 2
    assert len(caller.claim(limit=5)) == 1


def test_a_run_is_not_given_away_while_a_step_of_it_is_being_saved(opened: StoreThread, home: Home) -> None:
    """Its worker was stopped between a write and its commit: who gives the run back waits for that."""
    caller = Caller(opened)
    run = caller.started()
    late = PostgresStore(database.Database(home.url, "x"), home.schema)
    step = StepRecord("run", "charge", 1, "done", 1, caller.now, caller.now, None, b"1")
    with closing(late), ThreadPoolExecutor(1) as pool:
        late._connect()
        with late._pipeline as line:
            late._command("BEGIN")
            assert late._run([op := base.SaveStep(seq=run.seq, claim=1, step=step)], {base.SaveStep: [(0, op)]}, set())
            line.rows(line.send(Query(b"SELECT 1")))  # it is written
            giving = pool.submit(caller.settle, run, Returned("1"))
            assert not giving.done()
            late._command("COMMIT")
        assert giving.result(20)
    assert [each.name for each in caller.do(base.Steps(seq=run.seq))] == ["charge"]


def test_large_values_travel_whole_however_many_there_are_at_once(opened: StoreThread) -> None:
    caller, large = Caller(opened), "x" * (1 << 20)
    for n in range(3):
        caller.signal(f"s{n}", f'"{large}"')
    caller.do(base.Enqueue(runs=[caller.new(payload=f'"{large}"') for _ in range(8)], now=caller.now))
    claimed = caller.claim(limit=8)
    assert [len(each.run.payload) for each in claimed] == [len(large) + 2] * 8
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda each: caller.settle(each.run, Returned(f'"{large}"')), claimed))


def test_text_that_a_database_cannot_hold_is_shown_by_its_symbol(opened: StoreThread) -> None:
    caller = Caller(opened)
    caller.do(base.ReportHealth(group="g", host="h", now=caller.now, reason="a\0b", details="\0"))
    [one] = caller.do(base.ListHealth())
    assert (one.reason, one.details) == ("a\u2400b", "\u2400")


def test_a_process_that_writes_nothing_more_is_forgotten(opened: StoreThread, home: Home, server: Server) -> None:
    Caller(opened).enqueue()
    server.ask(f"UPDATE \"{home.schema}\".writers SET at = now() - interval '2 days'", home.url)
    with closing(open_store(home)) as other:
        other.do_sync(base.GiveBackSpace())
    [(left,)] = server.ask(f'SELECT count(*) FROM "{home.schema}".writers', home.url)
    assert left == 1, "the one that forgot the others"


def test_a_runtime_tells_which_tako_the_store_is_for_of_the_database_that_it_is_handed_and_writes_nothing(
    home: Home, server: Server
) -> None:
    def told(url: str) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tako_runtime", "serves"], input=envelope({"DATABASE_URL": url}),
            capture_output=True, check=True, timeout=60,
            env={**os.environ, **home._replace(url="postgres").environment(), "TAKO_SECRETS_FD": "0"},
        )  # fmt: skip
        assert b"pass-7c1" not in done.stdout + done.stderr
        return dict(json.loads(done.stdout))

    assert told(home.url) == {"serves": None}
    made = server.ask(f"SELECT count(*) FROM pg_namespace WHERE nspname = '{home.schema}'", home.url)
    assert made == [(0,)]
    open_store(home).close()
    assert told(home.url) == {"serves": 1}
    server.ask(f'UPDATE "{home.schema}".store SET serves = 99', home.url)
    assert told(home.url) == {"serves": 99}
    away = told("postgresql://ada:pass-7c1@127.0.0.1:1/shop")
    assert "the database 127.0.0.1:1/shop cannot be reached" in str(away["error"])


def test_the_store_is_examined_without_being_made_or_brought_up_to_date(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.examine(home) is None
    with closing(open_store(home)) as opened:
        Caller(opened).enqueue()
    known = queries.migrations
    monkeypatch.setattr(version, "migrations", lambda dialect: [*known(dialect), (NEWEST + 1, "SELECT 1")])
    seen = store.examine(home)
    assert seen is not None
    assert (seen.version, seen.newest, seen.runs, seen.damage) == (NEWEST, NEWEST + 1, 1, ())
    with pytest.raises(Refused, match="not put aside"):
        store.set_aside(home)
