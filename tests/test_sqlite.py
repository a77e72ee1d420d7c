"""What is SQLite's own: the file and its modes, migrations, plans, locks between processes, a full disk, damage."""

import asyncio
import fcntl
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import Caller, finished, script, until

from tako_runtime.bell import Bell
from tako_runtime.clock import HOUR, SECOND
from tako_runtime.errors import StoreBusy, StoreError, StoreLocked, StoreTooNew
from tako_runtime.run import Run, Status, StepRecord
from tako_runtime.state import Returned, Waits
from tako_runtime.store import Home, base, open_store, queries, sqlite
from tako_runtime.store import version as versions
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import Q, SqliteStore, in_bulk


@pytest.fixture
def path(home: Home) -> Path:
    return home.app_dir / "runs.db"


@pytest.fixture
def behind(opened: StoreThread, path: Path) -> Iterator[apsw.Connection]:
    """A second connection to the file, as a shell or a tool would have one."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    yield connection
    connection.close()


def healthy(path: Path) -> bool:
    with apsw.Connection(str(path)) as connection:
        found = connection.pragma("integrity_check")
    connection.close()
    return bool(found == "ok")


# --- the file --------------------------------------------------------------------------------------------------------


def test_only_the_user_may_read_the_files_and_the_folders_that_were_made_for_them(home: Home) -> None:
    before = os.umask(0o002)
    try:
        opened = open_store(Home("shop", home.data_dir / "new"))
        opened.do_sync(base.DataVersion())
        found = {path: stat.S_IMODE(path.stat().st_mode) for path in (home.data_dir / "new").rglob("*")}
        found[home.data_dir / "new"] = stat.S_IMODE((home.data_dir / "new").stat().st_mode)
        opened.close()
    finally:
        os.umask(before)
    assert {path.suffix for path in found} >= {".db", ".db-wal", ".db-shm"}
    assert {path: oct(mode) for path, mode in found.items() if mode != (0o700 if path.suffix == "" else 0o600)} == {}


def test_every_commit_is_synced_and_readers_do_not_wait_for_writers(path: Path, opened: StoreThread) -> None:
    opened.close()
    store = SqliteStore(path)
    assert store._db.pragma("journal_mode") == "wal"
    assert store._db.pragma("synchronous") == 2
    store.close()


def test_what_only_looks_sees_one_state_of_things_while_others_write(
    caller: Caller, behind: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.enqueue()
    groups = SqliteStore._groups

    def and_then_somebody_claims(store: SqliteStore, query: str) -> list[str]:
        found = groups(store, query)
        behind.execute("UPDATE runs SET ready = NULL, status = 'running'")
        return found

    monkeypatch.setattr(SqliteStore, "_groups", and_then_somebody_claims)
    assert caller.do(base.Undeclared(declared={"default": ("order",)})) == {}


def test_a_path_that_cannot_be_a_store_is_an_error_that_names_it(home: Home) -> None:
    (home.data_dir / "apps").write_text("a file, not a folder")
    with pytest.raises(StoreError, match=re.escape(f"{home.data_dir / 'apps'} is a file")) as caught:
        open_store(home)
    assert caught.value.hint


def test_a_file_that_is_no_database_is_said_to_be_damaged(path: Path, home: Home) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database at all\n" * 500)
    with pytest.raises(StoreError, match="damaged") as caught:
        open_store(home)
    assert "backup" in caught.value.hint
    assert path.read_bytes().startswith(b"not a database")


def test_eight_processes_may_open_a_new_store_at_the_same_instant(home: Home, path: Path) -> None:
    processes = [
        script(
            """
            import sys
            from tako_runtime import store
            from tako_runtime.store import base
            print("ready", flush=True)
            sys.stdin.readline()
            store.current().do_sync(base.SendSignal(name="here", payload="1", now=0, expires_at=1 << 60))
            store.current().close()
            """,
            home=home,
        )
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        finished(process)
    opened = open_store(home)
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 8
    opened.close()
    assert healthy(path)


# --- migrations ------------------------------------------------------------------------------------------------------


def schema(path: Path) -> list[Any]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    found = connection.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
    connection.close()
    return [(found), version(path)]


def version(path: Path) -> int:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    found = int(connection.pragma("user_version"))
    connection.close()
    return found


def test_migrations_are_numbered_without_gaps_and_lead_from_an_empty_file_to_the_newest(path: Path) -> None:
    numbers = [number for number, _ in queries.migrations("sqlite")]
    assert numbers == list(range(1, len(numbers) + 1))
    SqliteStore(path).close()
    assert version(path) == numbers[-1]


def test_a_file_that_a_newer_tako_wrote_is_refused_and_left_as_it_is(path: Path) -> None:
    SqliteStore(path).close()
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA user_version = {queries.migrations('sqlite')[-1][0] + 1}")
    connection.execute("CREATE TABLE of_the_future (x); UPDATE store SET serves = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match="this tako knows versions up to") as caught:
        SqliteStore(path)
    assert "Upgrade tako" in caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", [0, 1, 3, -1])
def test_a_file_whose_version_was_altered_is_refused_and_left_as_it_is(wrong: int, path: Path) -> None:
    SqliteStore(path).close()
    connection = apsw.Connection(str(path))
    connection.execute(f"PRAGMA user_version = {wrong}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"says that it has version {wrong}, and .*altered by hand") as caught:
        SqliteStore(path)
    assert "--fresh" in caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize("number", [0, queries.migrations("sqlite")[-1][0]])
def test_a_file_of_another_program_is_refused_and_left_as_it_is(number: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = apsw.Connection(str(path))
    connection.execute(f"CREATE TABLE notes (text); PRAGMA user_version = {number}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        SqliteStore(path)
    assert path.read_bytes() == before


def test_a_store_to_which_somebody_has_added_an_index_of_their_own_is_one(path: Path) -> None:
    SqliteStore(path).close()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE INDEX theirs ON runs (release)")
    connection.close()
    SqliteStore(path).close()


def test_an_older_file_is_migrated_and_keeps_its_runs(
    caller: Caller, opened: StoreThread, home: Home, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = caller.enqueue(payload='{"kept":1}')
    opened.close()
    known = queries.migrations("sqlite")
    next_one = known[-1][0] + 1
    later = [*known, (next_one, "CREATE TABLE a (x); INSERT INTO a VALUES (1);"), (next_one + 1, "DROP TABLE a;")]
    monkeypatch.setattr(versions, "migrations", lambda _: later)
    again = open_store(home)
    [run] = again.do_sync(base.ListRuns())
    again.close()
    assert (run.id, run.payload) == (run_id, b'{"kept":1}')
    assert version(path) == next_one + 1


def test_a_migration_that_fails_leaves_the_file_at_its_old_version_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SqliteStore(path).close()
    before = schema(path)
    known = queries.migrations("sqlite")
    next_one = known[-1][0] + 1
    broken = [*known, (next_one, "CREATE TABLE a (x);"), (next_one + 1, "CREATE TABLE b (y); CREATE TABLE a (x);")]
    monkeypatch.setattr(versions, "migrations", lambda _: broken)
    with pytest.raises(StoreError, match="table a already exists"):
        SqliteStore(path)
    assert schema(path) == before
    monkeypatch.setattr(versions, "migrations", lambda _: known)
    SqliteStore(path).close()


def test_a_store_that_is_open_while_another_process_migrates_sees_one_version_or_the_other(
    path: Path,
) -> None:
    with ThreadPoolExecutor(8) as pool:
        for store in list(pool.map(SqliteStore, [path] * 8)):
            assert sqlite.version_of(store._db) == (versions.newest("sqlite"), 1)
            store.close()
    assert healthy(path)


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apsw.Connection]:
    """A file with many ended runs, some parked and some due, and no statistics: as plain as a server's."""
    path = tmp_path_factory.mktemp("plans") / "runs.db"
    SqliteStore(path).close()
    db = apsw.Connection(str(path))
    db.execute(
        """
        WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)
        INSERT INTO runs (id, workflow, "group", status, reason, priority, due_at, max_attempts, retries, backoff_base,
                          backoff_max, created_at, finished_at, release, payload, ready)
        SELECT printf('%08d', i), 'w' || i % 9, 'default', iif(i % 10, 'succeeded', 'pending'), 'queued', 0, i, 3, 2,
               1, 1, i, iif(i % 10, i, NULL), 'r', 'null', iif(i % 10, NULL, i % 20 = 0) FROM n;
        INSERT INTO steps (run, kind, name, position, status, attempt, started_at)
        SELECT seq, 'run', 'a', 1, 'done', 1, 1 FROM runs;
        INSERT INTO waits (signal, run, step, position, since)
        SELECT 's' || seq, seq, 'a', 1, 1 FROM runs WHERE ready = 0;
        INSERT INTO signals (name, payload, sent_at, expires_at) SELECT 'k' || seq, '1', 1, seq FROM runs;
        """
    )
    yield db
    db.close()


#: query -> the indexes it may use ("" is the table's own key), and whether it may sort what it found.
PLANS: dict[str, tuple[set[str], bool]] = {
    "promote": ({"runs_later", ""}, False),
    "claim": ({"runs_ready", "", "sqlite_autoindex_workers_1", "sqlite_autoindex_leases_1", "json_each"}, False),
    "holder_of_key": ({"runs_unique_key"}, False),
    "steps_of": ({""}, True),
    "live_runs": ({"runs_by_status"}, False),
    "finished_of": ({""}, True),
    "step": ({""}, False),
    "holds_claim": ({""}, False),
    "save_steps": ({""}, False),
    "apply": ({""}, False),
    "mark_rerun": ({""}, False),
    "mark_all_rerun": ({""}, False),
    "end_sleeps": ({""}, False),
    "drop_steps": ({""}, False),
    "drop_waits": ({"waits_by_run", "json_each"}, False),
    "answered": ({"waits_by_run"}, True),
    "drop_wait": ({"waits_by_run"}, False),
    "make_due": ({""}, False),
    "end_wait": ({""}, False),
    "take_kept": ({"signals_by_name", ""}, False),
    "drop_kept": ({"signals_by_name", ""}, False),
    "waiting_runs": ({"", "waits_by_run"}, False),
    "wake": ({""}, False),
    "expire_signals": ({"signals_by_expiry", ""}, False),
    "runs_of": ({"runs_in_hand"}, True),
    "next_ready_group": ({"runs_ready"}, False),
    "declared_is_ready": ({"runs_ready", "", "json_each"}, False),
    "first_ready": ({"runs_ready"}, False),
    "next_due": ({"runs_later"}, False),
    "next_due_run": ({"runs_later"}, False),
    "run_by_seq": ({""}, False),
    "find_runs": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs_by_workflow": ({"runs_by_workflow"}, False),
    "list_runs_by_status": ({"runs_by_status"}, False),
    "list_succeeded": ({"sqlite_autoindex_runs_1"}, False),
    "list_runs_by_workflow_and_status": ({"runs_by_workflow"}, False),
    "attempts_of": ({""}, False),
    "waits_of": ({"waits_by_run", ""}, True),
    "list_unlucky_runs_by_workflow": ({"runs_unlucky"}, False),
    "drop_waits_from": ({"waits_by_run"}, False),
    "count_live": ({"runs_by_status"}, True),
    "delete_worker": ({"", "runs_in_hand", "sqlite_autoindex_workers_1"}, False),
    "next_ended_group": ({"runs_ended"}, False),
    "ended_runs": ({"runs_ended", ""}, False),
    "delete_runs": ({""}, False),
    "count_ended": ({"runs_ended"}, False),
    "count_dead": ({"runs_dead"}, False),
    "count_kept": ({"signals_by_expiry"}, False),
    "queues": ({"runs_ready", "runs_later"}, True),
    "ready_ahead": ({"runs_ready"}, False),
    "later_ahead": ({"runs_later"}, False),
    "in_hand": ({"runs_in_hand"}, False),
    "give_up_worker": ({"sqlite_autoindex_workers_1", ""}, False),
    "delete_steps": ({""}, False),
    "delete_attempts": ({""}, False),
    "list_schedules": ({"sqlite_autoindex_runs_1"}, False),
}
#: Walks through small tables, or ones that a LIMIT ends.
WALKS = {"all_waits", "kept_signals", "find_runs_by_end"}
#: Of a table that this store has not.
SHARED = {"await_end", "ring_for_ends", "forget_awaited"}


@pytest.mark.parametrize("name", PLANS)
def test_each_query_finds_its_rows_through_the_index_that_is_meant_for_it(filled: apsw.Connection, name: str) -> None:
    indexes, may_sort = PLANS[name]
    plan = explain(filled, name)
    used = {found[1] for line in plan if (found := re.search(r"USING (?:COVERING )?INDEX (\S+)", line))}
    used |= {"" for line in plan if "PRIMARY KEY" in line}
    assert used <= indexes, plan
    assert used, plan
    walked = [line for line in plan if re.match(r"SCAN (runs|steps|waits|w|signals|attempts)\b(?!.*USING)", line)]
    assert walked == [], plan
    if name not in ("next_due", "next_due_run", "count_live", "find_runs", "list_succeeded", "queues", "in_hand"):
        assert [line for line in plan if re.match(r"SCAN (runs|steps|waits|w|signals|attempts)\b", line)] == [], plan
    assert may_sort or not any("TEMP B-TREE" in line for line in plan), plan


def explain(db: apsw.Connection, name: str) -> list[str]:
    if columns := re.search(r"\(([^()]+)\) AS \(\{rows\}", Q[name]):
        width = columns[1].count(",") + 1
        found = db.execute("EXPLAIN QUERY PLAN " + in_bulk(name, width, 2), [1] * width * 2)
    else:
        given = {"workflows": "[]", "runs": "[]", "statuses": "[]", "since_id": "", "prefix": "0"}
        bound = dict.fromkeys(re.findall(r":(\w+)", Q[name]), 1) | given
        found = db.execute("EXPLAIN QUERY PLAN " + Q[name], bound)
    return [row[3] for row in found]


def test_every_query_that_looks_for_rows_has_its_plan_in_the_table() -> None:
    looks = {name for name, text in Q.items() if re.search(r"\b(runs|steps|waits|signals|attempts)\b.*\bWHERE\b", text)}
    assert looks - set(PLANS) - WALKS - SHARED == {"keep_signal"} & looks


@pytest.mark.parametrize(
    ("name", "bound", "most"),
    [
        ("claim", {"workflows": '["w0"]', "group": "default", "limit": 1, "now": 9, "worker": "w"}, 500),
        ("promote", {"now": 0}, 100),
        ("next_due", {}, 100),
        ("next_ready_group", {"after": "default"}, 100),
        ("next_ended_group", {"after": ""}, 100),
        ("ended_runs", {"group": "email", "before": 10_000, "limit": 10, "after_at": 0, "after_seq": 0}, 150),
        ("declared_is_ready", {"workflows": '["0"]', "group": "default"}, 100),
        ("first_ready", {"group": "default"}, 100),
        ("list_runs", {"since_id": "", "limit": 10}, 1_000),
        ("list_runs_by_status", {"since_id": "", "limit": 10, "status": "dead"}, 1_000),
        ("live_runs", {"status": "pending", "after": "00002000", "limit": 10}, 1_000),
        ("find_runs", {"prefix": "0000123", "beyond": "0000123~", "limit": 5}, 1_000),
        ("waiting_runs", {"name": "s10", "now": 9}, 300),
        ("take_kept", {"signal": "k7", "now": 0}, 300),
        ("runs_of", {"worker": "w"}, 100),
        ("ended_runs", {"group": "default", "before": 9**9, "limit": 10, "after_at": 2000, "after_seq": 2000}, 1_000),
        ("count_dead", {"since": 0, "before": 9**9}, 100),
        ("count_kept", {"now": 4990}, 300),
        ("queues", {"now": 0}, 4_000),
        ("ready_ahead", {"group": "default", "priority": 0, "due_at": 40, "seq": 40}, 500),
        ("later_ahead", {"now": 40, "group": "default", "priority": 0, "due_at": 40, "seq": 40}, 500),
        ("in_hand", {}, 100),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_the_work_of_a_query_does_not_grow_with_what_it_does_not_concern(
    filled: apsw.Connection, name: str, bound: dict[str, Any], most: int
) -> None:
    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        return False

    filled.execute("BEGIN")
    filled.set_progress_handler(count, 1)
    try:
        filled.execute(Q[name], dict.fromkeys(re.findall(r":(\w+)", Q[name])) | bound).fetchall()
    finally:
        filled.set_progress_handler(None)
        filled.execute("ROLLBACK")
    assert 0 < steps < most


# --- one commit for many ---------------------------------------------------------------------------------------------


@pytest.fixture
def counted(home: Home) -> Iterator[tuple[StoreThread, Callable[[], int]]]:
    """A store, and how many transactions it has committed."""
    commits: list[None] = []

    def connect() -> base.Store:
        store = SqliteStore(home.app_dir / "runs.db")
        store._db.set_commit_hook(lambda: bool(commits.append(None)))
        return store

    opened = StoreThread(connect, Bell(home.app_dir))
    yield opened, lambda: len(commits)
    opened.close()


@contextmanager
def lock_held(path: Path) -> Iterator[None]:
    """Another writer's turn, as long as the block lasts."""
    file = os.open(f"{path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(file)


def keep(name: str) -> base.SendSignal:
    return base.SendSignal(name=name, payload="1", now=0, expires_at=1 << 60)


def test_what_one_pass_of_a_loop_asks_for_is_one_commit(counted: tuple[StoreThread, Callable[[], int]]) -> None:
    opened, commits = counted
    before = commits()

    async def ask() -> None:
        await asyncio.gather(*(opened.do(keep(f"s{n}")) for n in range(500)))

    asyncio.run(ask())
    assert commits() - before == 1
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 500


def test_what_many_threads_ask_for_while_the_store_is_busy_is_one_commit(
    counted: tuple[StoreThread, Callable[[], int]], path: Path
) -> None:
    opened, commits = counted
    before = commits()
    with ThreadPoolExecutor(33) as pool:
        with lock_held(path):
            first = pool.submit(opened.do_sync, keep("first"))
            until(opened._using.locked)  # its turn has not come
            rest = [pool.submit(opened.do_sync, keep(f"s{n}")) for n in range(32)]
            until(lambda: opened._queue.qsize() == 32)
        assert [job.result() for job in [first, *rest]] == [0] * 33
    assert commits() - before == 2


def test_reading_takes_no_lock_and_commits_nothing(counted: tuple[StoreThread, Callable[[], int]], path: Path) -> None:
    opened, commits = counted
    before = commits()
    with lock_held(path):
        assert opened.do_sync(base.ListRuns(), timeout=20) == []
        assert opened.do_sync(base.CountRuns(), timeout=20) == {}
    assert commits() == before


def test_closing_waits_for_what_is_queued(home: Home, path: Path) -> None:
    opened = open_store(home)
    with ThreadPoolExecutor(9) as pool:
        with lock_held(path):
            asked = [pool.submit(opened.do_sync, keep("s0"))]
            until(opened._using.locked)  # its turn has not come
            asked += [pool.submit(opened.do_sync, keep(f"s{n}")) for n in range(1, 8)]
            until(lambda: opened._queue.qsize() == 7)
            closing = pool.submit(opened.close)
            until(lambda: opened._closed)
        closing.result(timeout=60)
        assert [job.result(timeout=60) for job in asked] == [0] * 8
    again = open_store(home)
    assert len(again.do_sync(base.KeptSignals(now=0))) == 8
    again.close()


# --- trouble that passes ---------------------------------------------------------------------------------------------

HOLDS_THE_LOCK = """
    import sys
    from pathlib import Path
    from tako_runtime.store.turnstile import Turnstile
    with Turnstile(Path(sys.argv[1]), 60):
        print("held", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def holder(path: Path, opened: StoreThread) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the writers' lock until it reads a line."""
    process = script(HOLDS_THE_LOCK, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_callers_are_told_that_the_store_is_locked_and_by_whom_and_what_they_asked_for_is_not_stored(
    home: Home, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE", 1)
    opened = open_store(home)

    async def ask() -> list[Any]:
        asked = [asyncio.ensure_future(opened.do(keep(f"s{n}"))) for n in range(50)]
        await asyncio.wait(asked, timeout=20)  # for all of them together, not for one after the other
        return [each.exception() if each.done() else each for each in asked]

    told = asyncio.run(ask())
    assert {type(each) for each in told} == {StoreLocked}
    assert str(holder.pid) in str(told[0])
    finished_by_hand(holder)
    assert opened.do_sync(keep("after")) == 0
    assert [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))] == ["after"]
    opened.close()


def test_a_caller_without_patience_is_told_even_where_its_turn_has_begun(
    opened: StoreThread, holder: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(opened.do_sync, keep("s"), timeout=1)
        try:
            assert isinstance(asked.exception(timeout=20), StoreBusy)
        finally:
            finished_by_hand(holder)
    assert opened.do_sync(base.KeptSignals(now=0)) == []


def test_a_caller_whose_turn_has_not_come_is_told_so_and_is_not_served_later(
    opened: StoreThread, holder: subprocess.Popen[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(opened.do_sync, keep("patient"), timeout=60)
        until(opened._using.locked)
        with pytest.raises(StoreBusy, match="locked for 1 s") as caught:
            opened.do_sync(keep("impatient"), timeout=1)
        assert "Nothing was stored" in caught.value.hint
        finished_by_hand(holder)
        assert patient.result() == 0
    assert [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))] == ["patient"]


def finished_by_hand(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    holder.wait(timeout=20)


def test_a_lock_ends_with_the_process_that_held_it(opened: StoreThread, holder: subprocess.Popen[str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(opened.do_sync, keep("s"))
        until(opened._using.locked)
        holder.kill()
        assert waiting.result(timeout=20) == 0


def test_a_tool_that_holds_the_file_for_long_is_trouble_that_passes(
    home: Home, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 100)
    opened = open_store(home)
    tool = apsw.Connection(str(path))
    tool.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy, match="BusyError"):
        opened.do_sync(keep("s"))
    assert opened.do_sync(base.ListRuns()) == []
    tool.execute("ROLLBACK")
    assert opened.do_sync(base.KeptSignals(now=0)) == []
    assert opened.do_sync(keep("s")) == 0
    tool.close()
    opened.close()


def test_a_full_store_is_trouble_that_passes(home: Home, path: Path) -> None:
    stores: list[SqliteStore] = []

    def connect() -> base.Store:
        stores.append(SqliteStore(path))
        return stores[0]

    opened = StoreThread(connect, Bell(home.app_dir))
    full = stores[0]._db.pragma("page_count")
    stores[0]._db.pragma("max_page_count", full)
    large = base.SendSignal(name="large", payload="1" * 100_000, now=0, expires_at=1 << 60)
    with pytest.raises(StoreBusy, match="FullError"):
        opened.do_sync(large)
    assert opened.do_sync(base.KeptSignals(now=0)) == []
    stores[0]._db.pragma("max_page_count", 1 << 30)
    assert opened.do_sync(large) == 0
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 1
    opened.close()
    assert healthy(path)


def test_a_disk_that_takes_no_more_is_trouble_that_passes(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import resource
            from tako_runtime import store
            from tako_runtime.errors import StoreBusy
            from tako_runtime.store import base
            opened = store.current()
            def send(name):
                opened.do_sync(base.SendSignal(name=name, payload="1" * 100_000, now=0, expires_at=1 << 60))
            def kept():
                return [each.name for each in opened.do_sync(base.KeptSignals(now=0))]
            send("before")
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            for _ in range(5):
                try:
                    send("during")
                    print("stored")
                except StoreBusy as busy:
                    print("busy:", busy.hint[:18])
            print(kept())
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            send("after")
            print(kept())
            opened.close()
            """,
            home=home,
        )
    )
    *tries, during, after = told.splitlines()
    assert "busy: Nothing was stored" in tries
    stored = ["before"] + ["during"] * tries.count("stored")
    assert during == str(stored)
    assert after == str([*stored, "after"])
    assert healthy(path)


# --- forks and many processes ----------------------------------------------------------------------------------------


def test_a_forked_child_opens_its_own_store_and_both_may_write(home: Home, path: Path) -> None:
    told = finished(
        script(
            """
            import os, sys
            from tako_runtime import store, signal_sync
            signal_sync("before")
            mine = store.current()
            child = os.fork()
            for n in range(50):
                signal_sync("child" if child == 0 else "parent")
            print("own" if (store.current() is not mine) == (child == 0) else "shared", flush=True)
            if child == 0:
                store.current().close()
                mine.close()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            signal_sync("after")
            mine.close()
            sys.exit(os.waitstatus_to_exitcode(status))
            """,
            home=home,
        )
    )
    assert told.split() == ["own", "own"]
    opened = open_store(home)
    names = [kept.name for kept in opened.do_sync(base.KeptSignals(now=0))]
    opened.close()
    assert {name: names.count(name) for name in names} == {"before": 1, "child": 50, "parent": 50, "after": 1}
    assert healthy(path)


def test_a_child_that_is_forked_while_others_write_is_not_held_up_by_their_locks(home: Home) -> None:
    finished(
        script(
            """
            import os, threading
            from tako_runtime import signal_sync
            signal_sync("open")
            stop = threading.Event()
            def write():
                while not stop.is_set():
                    signal_sync("parent")
            writers = [threading.Thread(target=write) for _ in range(4)]
            for each in writers: each.start()
            for _ in range(10):
                child = os.fork()
                if child == 0:
                    signal_sync("child")
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            stop.set()
            for each in writers: each.join()
            """,
            home=home,
        )
    )
    opened = open_store(home)
    names = [kept.name for kept in opened.do_sync(base.KeptSignals(now=0, limit=1_000_000))]
    opened.close()
    assert names.count("child") == 10


def test_a_process_that_dies_while_it_writes_does_not_leave_its_lock_to_forked_children(home: Home) -> None:
    """As under a preloading server: the parent is killed, its children, who never used the store, live on."""
    process = script(
        """
        import os, threading
        from tako_runtime import signal_sync
        signal_sync("open")
        def write():
            for n in range(60):
                signal_sync("parent")
            os.kill(os.getpid(), 9)
        writers = [threading.Thread(target=write) for _ in range(8)]
        for each in writers: each.start()
        child = os.fork()
        if child == 0:
            os.read(0, 1)
            os._exit(0)
        for each in writers: each.join()
        """,
        home=home,
    )
    process.wait(timeout=60)
    try:
        told = finished(script("from tako_runtime import signal_sync; print(signal_sync('free'))", home=home), 20)
    finally:
        process.communicate("\n")
    assert told == "0\n"


def test_a_child_that_outlives_the_process_it_was_forked_from_loses_nothing(home: Home, path: Path) -> None:
    """As when a server goes into the background after it has used the store."""
    child = script(
        """
        import os, sys
        from tako_runtime import signal_sync
        signal_sync("parent")
        if os.fork():
            os._exit(0)
        signal_sync("child, early")
        print("ready", flush=True)
        sys.stdin.readline()
        signal_sync("child, late")
        print("stored", flush=True)
        os.kill(os.getpid(), 9)
        """,
        home=home,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.wait(timeout=20)
    another = "from tako_runtime import signal_sync, store; signal_sync('another'); store.current().close()"
    finished(script(another, home=home))
    assert child.communicate("\n")[0] == "stored\n"
    opened = open_store(home)
    names = {kept.name for kept in opened.do_sync(base.KeptSignals(now=0))}
    opened.close()
    assert names == {"parent", "child, early", "another", "child, late"}
    assert healthy(path)


@pytest.mark.parametrize("when", ["idle", "opening", "writing"])
def test_a_forked_child_carries_none_of_the_stores_files(home: Home, when: str) -> None:
    told = finished(
        script(
            """
            import os, sys, threading
            from tako_runtime import signal_sync, store
            from tako_runtime.store.sqlite import SqliteStore, in_bulk
            reached, forked = threading.Event(), threading.Event()
            def pausing(real):
                def paused(self, *given):
                    answer = real(self, *given)
                    reached.set()
                    forked.wait(1)  # no longer, since the fork may wait for us
                    return answer
                return paused
            def held():
                files = {os.path.realpath(path): path.stat() for path in store.locate().app_dir.glob("runs.db*")}
                for number in range(3, 256):
                    try:
                        there = os.fstat(number)
                    except OSError:
                        continue
                    yield from (name for name, stat in files.items() if os.path.samestat(stat, there))
            if sys.argv[1] == "opening":
                SqliteStore._migrate = pausing(SqliteStore._migrate)
            else:
                signal_sync("before")
                SqliteStore._run = pausing(SqliteStore._run)
            thread = threading.Thread(target=signal_sync, args=("now",))
            thread.start()
            reached.wait()
            if sys.argv[1] == "idle":
                forked.set()
                thread.join()
            child = os.fork()
            if child == 0:
                print(*held(), flush=True)
                os._exit(0)
            forked.set()
            os.waitpid(child, 0)
            thread.join()
            """,
            when,
            home=home,
        )
    )
    assert told == "\n"


def test_a_forked_child_may_fork_again(home: Home) -> None:
    """As under a preloading server whose workers start processes of their own."""
    finished(
        script(
            """
            import os
            from tako_runtime import signal_sync
            def in_a_child(do):
                child = os.fork()
                if child == 0:
                    do()
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
            def further():
                in_a_child(lambda: signal_sync("grandchild"))
                signal_sync("child")
                in_a_child(lambda: signal_sync("grandchild"))
            signal_sync("parent")
            in_a_child(further)
            signal_sync("parent")
            """,
            home=home,
        ),
        30,
    )
    opened = open_store(home)
    names = sorted(kept.name for kept in opened.do_sync(base.KeptSignals(now=0)))
    opened.close()
    assert names == ["child", "grandchild", "grandchild", "parent", "parent"]


def test_threads_that_fork_at_the_same_time_do_not_stop_the_store(home: Home) -> None:
    finished(
        script(
            """
            import os, sys, threading
            from tako_runtime import signal_sync
            sys.setswitchinterval(1e-5)
            signal_sync("open")
            def forks():
                for _ in range(50):
                    child = os.fork()
                    if child == 0:
                        os._exit(0)
                    os.waitpid(child, 0)
            forking = [threading.Thread(target=forks) for _ in range(4)]
            for each in forking: each.start()
            for _ in range(50):
                signal_sync("written")
            for each in forking: each.join()
            """,
            home=home,
        ),
        30,
    )
    opened = open_store(home)
    assert len(opened.do_sync(base.KeptSignals(now=0))) == 51
    opened.close()


BUSY_PROCESS = """
    import asyncio, sys, threading, time
    from tako_runtime import clock, signal, store, workflow
    from tako_runtime.run import StepRecord, WorkerRecord, new_id
    from tako_runtime.state import Interrupted, Returned, settle
    from tako_runtime.store import base

    @workflow("order")
    async def order(payload, step): ...

    async def main(me, seconds):
        opened, now = store.current(), clock.SystemClock().now
        worker = "w-" + me
        await opened.do(base.AddWorker(worker=WorkerRecord(worker, "default", "host", 1, "dev", now(), now())))
        end, counts = time.monotonic() + seconds, [0, 0]
        async def enqueues():
            while time.monotonic() < end:
                await order.enqueue({"from": me})
                counts[0] += 1
        async def signals():
            while time.monotonic() < end:
                await signal("go:" + me, counts[0])
        async def lists():
            while time.monotonic() < end:
                await opened.do(base.ListRuns(limit=20))
                await opened.do(base.CountRuns())
        async def works():
            claim = dict(worker=worker, group="default", workflows=["order"])
            while time.monotonic() < end:
                for run in [each.run for each in await opened.do(base.ClaimRuns(limit=5, now=now(), **claim))]:
                    step = StepRecord("run", "a", 1, "done", run.attempt, now(), now(), result=b"1")
                    assert await opened.do(base.SaveStep(seq=run.seq, claim=run.claim, step=step)) == step
                    assert await opened.do(base.Apply(change=settle(run, Returned("1"), now())))
                    counts[1] += 1
        await asyncio.gather(enqueues(), signals(), lists(), works())
        print(*counts)

    asyncio.run(main(*sys.argv[1:2], float(sys.argv[2])))
    store.current().close()
"""


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_processes_that_enqueue_signal_list_and_save_never_hear_that_the_store_is_locked(
    home: Home, path: Path, seconds: float
) -> None:
    processes = [script(BUSY_PROCESS, n, seconds, home=home) for n in range(8)]
    told = [tuple(map(int, finished(process, seconds + 120).split())) for process in processes]
    assert all(enqueued > 0 for enqueued, _ in told)
    opened = open_store(home)
    live = opened.do_sync(base.CountRuns())
    opened.close()
    enqueued, ended = (sum(column) for column in zip(*told, strict=True))
    assert live.get(("pending", "queued"), 0) == enqueued - ended
    assert sum(live.values()) == enqueued - ended
    assert healthy(path)


# --- damage ----------------------------------------------------------------------------------------------------------

DAMAGED = [b"", b"{", b"\xff\xfe", b'"\xe9"', b"\x00\x01"]


@pytest.mark.parametrize("bytes_there", DAMAGED, ids=repr)
def test_a_damaged_payload_or_result_stops_no_list_and_no_claim(
    caller: Caller, behind: apsw.Connection, bytes_there: bytes
) -> None:
    ended, parked = caller.started(), caller.started()
    caller.save(parked, "charge")
    caller.settle(ended, Returned("1"))
    caller.settle(parked, Waits((), caller.now))
    sound = caller.enqueue()
    # Straight into the file, as a damaged disk would: the text is no text any more.
    there = {"bytes": bytes_there, "sound": sound}
    behind.execute("UPDATE runs SET payload = CAST(:bytes AS TEXT) WHERE id <> :sound", there)
    behind.execute("UPDATE runs SET result = CAST(:bytes AS TEXT) WHERE result IS NOT NULL", there)
    behind.execute("UPDATE steps SET result = CAST(:bytes AS TEXT)", there)
    listed = {run.id: run for run in caller.do(base.ListRuns())}
    assert len(listed) == 3
    assert (listed[ended.id].payload, listed[ended.id].result) == (bytes_there, bytes_there)
    claimed = {each.run.id: each for each in caller.claim(limit=9)}
    assert set(claimed) == {parked.id, sound}
    assert claimed[parked.id].run.payload == bytes_there
    assert [step.result for step in claimed[parked.id].steps] == [bytes_there]
    assert claimed[sound].run.payload == b"null"


@pytest.mark.parametrize("bytes_there", DAMAGED, ids=repr)
def test_a_damaged_kept_signal_stops_neither_the_list_nor_the_wait(
    caller: Caller, behind: apsw.Connection, bytes_there: bytes
) -> None:
    caller.signal("approval")
    behind.execute("UPDATE signals SET payload = CAST(? AS TEXT)", (bytes_there,))
    assert [kept.payload for kept in caller.do(base.KeptSignals(now=caller.now))] == [bytes_there]
    run = caller.started()
    step = caller.wait(run, "approval")
    assert step is not None
    assert step.status == "done"


def test_odd_text_in_names_and_keys_goes_through(caller: Caller) -> None:
    odd = '\'; DROP TABLE runs; -- \u2028 \U0001f419 %_\\ "x" \x7f'
    run_id = caller.enqueue(unique_key=odd, release=odd)
    [claimed] = caller.claim()
    caller.save(claimed.run, odd)
    caller.wait(claimed.run, odd)
    assert caller.signal(odd) == 1
    assert caller.enqueue(unique_key=odd) == run_id
    assert {step.name for step in caller.do(base.Steps(seq=claimed.run.seq))} == {odd}


def test_text_that_is_no_unicode_is_an_error_of_its_caller_and_stores_nothing(caller: Caller) -> None:
    with pytest.raises(StoreError):
        caller.enqueue(unique_key="\udce9")
    assert caller.do(base.ListRuns()) == []


def test_a_run_stays_readable_through_every_column_that_a_run_has(caller: Caller, behind: apsw.Connection) -> None:
    run = caller.started(priority=-(1 << 31), due_at=1, backoff_base=HOUR * 10**6, scheduled_at=5 * SECOND)
    columns = {row[1] for row in behind.execute("PRAGMA table_info(runs)")}
    assert columns - set(Run.__struct_fields__) == {"ready"}
    assert caller.get(run) == run
    assert set(StepRecord.__struct_fields__) <= {row[1] for row in behind.execute("PRAGMA table_info(steps)")}
    [check] = behind.execute("SELECT sql FROM sqlite_schema WHERE name = 'runs'").fetchone()
    assert all(f"'{status}'" in check for status in Status)
