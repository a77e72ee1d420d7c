"""`tako store copy`: an app moves from the embedded store to a shared one, and goes on there."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cli import document, tako
from conftest import Caller
from postgres import Server
from serving import keep_secrets

from tako_runtime.bell import Bell
from tako_runtime.clock import HOUR
from tako_runtime.errors import NotFound, Refused
from tako_runtime.run import ScheduleRecord
from tako_runtime.state import Returned, Sleeps, Waits
from tako_runtime.store import Home, base, copy, open_store
from tako_runtime.store.commit import StoreThread
from tako_runtime.store.sqlite import SqliteStore


@pytest.fixture
def shared(home: Home, server: Server) -> Iterator[Home]:
    url = server.database()
    yield home._replace(url=url)
    server.drop(url)


def fill(caller: Caller) -> None:
    """One of everything: a run that ended, one that waits, one that sleeps, one that is due; a signal, a schedule."""
    done, waiting, sleeping = (caller.started(payload=f'"tab\\tand \\\\ and ü {n}"') for n in range(3))
    caller.save(done, "a", result=b'"a\\nb"')
    caller.settle(done, Returned('"ok"'))
    caller.wait(waiting, "go", timeout=HOUR)
    caller.settle(waiting, Waits(("go",), caller.now + HOUR))
    caller.settle(sleeping, Sleeps(caller.now + HOUR))
    caller.enqueue(unique_key="k")
    caller.signal("nobody", '{"kept":1}')
    schedule = ScheduleRecord("report", "default", "0 9 * * *", "UTC", "latest", "allow", caller.now + HOUR)
    caller.do(base.SetSchedules(schedules=[schedule]))


def picture(store: StoreThread, now: int) -> object:
    runs = store.do_sync(base.ListRuns(limit=100))
    return (
        runs,
        [(store.do_sync(base.Steps(seq=run.seq)), store.do_sync(base.Attempts(seq=run.seq))) for run in runs],
        store.do_sync(base.OpenWaits()),
        store.do_sync(base.KeptSignals(now=now)),
        store.do_sync(base.ListSchedules()),
    )


def test_everything_arrives_as_it_was_and_parked_runs_go_on(opened: StoreThread, shared: Home, home: Home) -> None:
    caller = Caller(opened)
    fill(caller)
    before = picture(opened, caller.now)
    copied = copy(shared)
    moved = {one.table: one.rows for one in copied.tables}
    assert moved == {"runs": 4, "steps": 2, "attempts": 1, "waits": 1, "signals": 1, "schedules": 1}
    with closing(open_store(shared)) as there:
        assert picture(there, caller.now) == before
        new = Caller(there)
        assert new.signal("go", "7") == 1
        [woken, *_] = sorted(new.claim(limit=5), key=lambda each: each.run.seq)
        assert [step.result for step in woken.steps] == [b"7"]
        assert new.settle(woken.run, Returned("7"))
        assert new.enqueue(unique_key="k") in {run.id for run in there.do_sync(base.ListRuns(statuses=["running"]))}
        assert new.enqueue() not in {run.id for run in opened.do_sync(base.ListRuns())}
    assert picture(opened, caller.now) == ([], [], [], [], []), "nothing is in both"
    assert copied.before == home.app_dir / "runs-before.db"
    with closing(StoreThread(lambda: SqliteStore(copied.before), Bell(home.app_dir))) as kept:  # type: ignore[arg-type]
        assert picture(kept, caller.now) == before


def test_runs_and_schedules_of_local_workflows_stay_where_they_are(opened: StoreThread, shared: Home) -> None:
    caller = Caller(opened)
    fill(caller)
    warm = caller.started(workflow="order")
    caller.enqueue(workflow="warm")
    schedules = [
        ScheduleRecord(name, "default", "0 9 * * *", "UTC", "latest", "allow", caller.now)
        for name in ("report", "warm")
    ]
    caller.do(base.SetSchedules(schedules=schedules))
    caller.wait(warm, "mine")
    caller.settle(warm, Waits(("mine",), None))
    copied = copy(shared, local=["warm"])
    assert copied.stayed == {"warm": 1}
    assert {run.workflow for run in opened.do_sync(base.ListRuns())} == {"warm"}
    assert [one.workflow for one in opened.do_sync(base.ListSchedules())] == ["warm"]
    assert opened.do_sync(base.OpenWaits()) == []
    with closing(open_store(shared)) as there:
        assert {run.workflow for run in there.do_sync(base.ListRuns())} == {"order"}
        assert [one.workflow for one in there.do_sync(base.ListSchedules())] == ["report"]
        assert {wait.signal for wait in there.do_sync(base.OpenWaits())} == {"go", "mine"}


def test_a_dry_run_counts_and_keeps_nothing(opened: StoreThread, shared: Home) -> None:
    fill(Caller(opened))
    told = copy(shared, dry_run=True)
    with closing(open_store(shared)) as there:
        assert there.do_sync(base.ListRuns()) == []
        assert there.do_sync(base.ListSchedules()) == []
    assert told.before is None
    assert copy(shared).tables == told.tables, "and no number was used up by it"


def test_a_store_that_has_runs_is_not_filled_and_runs_in_hand_are_not_copied(opened: StoreThread, shared: Home) -> None:
    caller = Caller(opened)
    held = caller.started()
    with pytest.raises(Refused, match="are in hand"):
        copy(shared)
    caller.settle(held, Returned("1"))
    copy(shared)
    with pytest.raises(Refused, match="has runs already"):
        copy(shared)


def test_where_there_is_no_file_there_is_nothing_to_copy(shared: Home) -> None:
    with pytest.raises(NotFound, match="there is no store"):
        copy(shared)


def test_the_command_copies_into_the_database_of_the_secret(server: Server, tmp_path: Path) -> None:
    (tmp_path / "tako.toml").write_text('name = "shop"\n')
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "warm.py").write_text(
        "from tako_runtime import workflow\n@workflow('warm', local=True)\nasync def warm(step): ...\n"
    )
    home, url = Home("shop", tmp_path / ".tako"), server.database()
    with closing(open_store(home)) as opened:
        caller = Caller(opened)
        fill(caller)
        caller.enqueue(workflow="warm")
    words = ("store", "copy", "--from", "sqlite", "--to", "postgres")
    missing = document(*words, cwd=tmp_path, code=3)["error"]
    assert "DATABASE_URL" in missing["message"]
    keep_secrets(home, {"DATABASE_URL": url})
    assert document(*words, "--dry-run", cwd=tmp_path)["dry_run"] is True
    told = document(*words, cwd=tmp_path)
    assert {one["table"]: one["rows"] for one in told["copied"]}["runs"] == 4
    assert told["stayed"] == {"warm": 1}
    (tmp_path / "tako.toml").write_text('name = "shop"\n[storage]\nurl = "postgres"\n')
    runs = document("runs", "ls", cwd=tmp_path)["runs"]
    assert sorted((run["workflow"], run["local"]) for run in runs) == [("order", False)] * 4 + [("warm", True)]
    assert "up to date" in tako("store", "migrate", cwd=tmp_path).stderr
    server.drop(url)
