"""The embedded store's file: its modes, its migrations, and what damage to it stops."""

import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import apsw
import pytest
from conftest import Caller, finished, healthy, script

from tako_runtime.clock import HOUR, SECOND
from tako_runtime.errors import StoreError, StoreTooNew
from tako_runtime.run import Run, Status, StepRecord
from tako_runtime.state import Returned, Waits
from tako_runtime.store import Home, base, open_store, queries, sqlite
from tako_runtime.store import version as versions
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore


@pytest.fixture
def behind(opened: StoreThread, path: Path) -> Iterator[apsw.Connection]:
    """A second connection to the file, as a shell or a tool would have one."""
    connection = apsw.Connection(str(path))
    connection.set_busy_timeout(10_000)
    yield connection
    connection.close()


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
